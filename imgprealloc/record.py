# SPDX-License-Identifier: Apache-2.0
"""Whose word on a disk's format counts. The only place that decides it.

The caller's word is best. Next is what is on record: Nova's disk.info beside the
disk, written before the guest's first instruction, and what the host that it comes
from, or libvirt, has told of it. The disk's own first bytes are a guess,
and never more: a guest may have written a header of another format to a raw
disk (CVE-2024-40767). Nothing here writes.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import stat
from typing import Literal, Optional

from oslo_utils import units

from imgprealloc import exceptions
from imgprealloc import log
from imgprealloc import qcow2_header
from imgprealloc import reading
from imgprealloc.disk_file import DiskFile

Source = Literal["the caller", "disk.info", "its first bytes"]

# What Nova writes for ten disks has some 1 KiB.
_GREATEST_RECORD = units.Mi

_NAME = "disk.info"

# What the hosts that disks come from, or libvirt, have told, by the names of the
# disks' folders and their own: instances_path may be another there.
# With the path there where that has to be the same file, if it is here.
_told: dict[tuple[str, str], tuple[str, Optional[str]]] = {}

# Disks that had no record of their own before this process let Nova write one,
# which then is but the configuration's word: device, inode.
_MOST_DOUBTED = 10_000
_doubted: collections.OrderedDict[tuple[int, int], None] = collections.OrderedDict()


@dataclasses.dataclass(frozen=True)
class Word:
    """What a disk's format is, and who says so."""

    format: str
    source: Source

    @property
    def certain(self) -> bool:
        """Whether a byte of the disk may be changed on this word."""
        return self.source != "its first bytes"


@dataclasses.dataclass(frozen=True)
class Note:
    """What is on record of a disk.

    :param exists: whether there is anything that could say something
    :param format: None where it says nothing, or nothing that can be believed
    """

    exists: bool
    format: Optional[str]


_NOTHING = Note(exists=False, format=None)
_UNKNOWN = Note(exists=True, format=None)


class _Pairs(list[tuple[str, object]]):
    """What a JSON object says, all of it: a dict would have but the last of two that have one key."""


def word(file: DiskFile, told: str | None = None) -> Word:
    """Return the best word on a disk's format.

    :param told: the caller's own
    :raises: UnsupportedFormat, BrokenImage, ProgramMissing, ProgramKilled
    """
    if told is not None:
        return Word(told, "the caller")
    found = note(file.path, file.real_path)
    if found.format is None:
        _refuse_empty(file)
        return Word(reading.guessed_format(file), "its first bytes")
    if found.format == "raw" and qcow2_header.begins(file.fd):
        log.warn_once(
            "raw on record",
            file.path,
            "taken for raw, as Nova has it on record, but it begins like qcow2: written by its guest, or by Nova, "
            "if that has converted the disk; the instance's XML tells. Then say --disk-format qcow2",
        )
    return Word(found.format, "disk.info")


def _refuse_empty(file: DiskFile) -> None:
    """Refuse to guess what a file without a byte is: a disk that was cut off is not one that has all it needs.

    :raises: BrokenImage
    """
    if not os.fstat(file.fd).st_size:
        raise exceptions.BrokenImage(
            file.path,
            "the file is empty, and nobody's word tells its format",
            "Have the disk back from a copy, or build its instance anew; if it has no size, say --disk-format raw.",
        )


def require_certain(file: DiskFile, said: Word, deed: str) -> None:
    """Refuse to change a byte of a disk under a guess.

    :param deed: what was about to be done to it, as in "it is not grown"
    :raises: FormatNotCertain
    """
    if not said.certain:
        other = "qcow2" if said.format == "raw" else "raw"
        raise exceptions.FormatNotCertain(
            file.path,
            f"nobody's word tells its format, and its first bytes, which make it {said.format}, may be its guest's; "
            f"{deed} under a guess",
            f"Say which it is: --disk-format {said.format}, or --disk-format {other} (format= in Python).",
            said.format,
        )


def note(path: str, real: Optional[str] = None) -> Note:
    """Return what Nova has noted of a disk, or others have told, by the file's name within its folder.

    Not by its path: state_path with a slash at its end, links, bind mounts,
    containers and UUID_resize give other paths for the same disk. A record
    that says raw wins, and one that cannot be read, or contradicts itself,
    tells of no format. Nova leaves "raw" when a resize converts a disk.

    :param real: where the disk lies, if that has been found out
    """
    real = os.path.realpath(path) if real is None else real
    notes = [
        _noted(folder, {os.path.basename(path), os.path.basename(real)})
        for folder in dict.fromkeys((os.path.realpath(os.path.dirname(path)), os.path.dirname(real)))
    ]
    formats = {found.format for found in notes if found.exists}
    told = told_of(path)
    if told is not None:
        formats.add(told)
    if not formats:
        return _NOTHING
    if "raw" in formats:
        return Note(exists=True, format="raw")
    if len(formats) > 1 or _is_doubted(path):
        return _UNKNOWN
    return Note(exists=True, format=formats.pop())


def agrees(path: str, format: str) -> bool:
    """Whether Nova has noted this format of a disk, and no other."""
    return note(path).format == format


@contextlib.contextmanager
def also_told(formats: Mapping[str, str], *, of_here: bool = False) -> Iterator[None]:
    """Let what somebody has told of disks' formats count, as a record does, for as long as the block runs.

    :param formats: by the disks' paths: of the host that they come from, or of libvirt
    :param of_here: whether the paths are this host's, so that a copy of a disk, in
        a folder of the same name elsewhere, is not what is told of
    """
    of_disks = {_instance_and_name(path): (format, path if of_here else None) for path, format in formats.items()}
    _told.update(of_disks)
    try:
        yield
    finally:
        for disk in of_disks:
            _told.pop(disk, None)


def told_of(path: str) -> Optional[str]:
    """Return the format that another has told of a disk, as also_told() has it; None where nobody has."""
    format, other = _told.get(_instance_and_name(path), (None, None))
    if other is not None:
        # In a container the disk may have another path, and libvirt's be nowhere.
        with contextlib.suppress(OSError):
            return format if os.path.samefile(path, other) else None
    return format


def _instance_and_name(path: str) -> tuple[str, str]:
    folder, name = os.path.split(os.path.normpath(path))
    return os.path.basename(folder), name


def doubt(path: str) -> None:
    """Remember that a disk stands without a record of its format, whatever Nova notes of it from now on.

    Nova's backends write down what the configuration says of disks that they
    have not made. To be called before they are.
    """
    try:
        status = os.stat(path)
    except OSError:
        return
    if note(path).format is None:
        _doubted[status.st_dev, status.st_ino] = None
        if len(_doubted) > _MOST_DOUBTED:
            _doubted.popitem(last=False)


def believe(path: str) -> None:
    """Doubt a disk no longer, because it has just been made, and what Nova notes of it is what it is."""
    try:
        status = os.stat(path)
    except OSError:
        return
    # A disk that is removed leaves its inode to the next one.
    _doubted.pop((status.st_dev, status.st_ino), None)


def forget() -> None:
    """Doubt nothing, as a new process would."""
    _doubted.clear()


def _is_doubted(path: str) -> bool:
    if not _doubted:
        return False
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) in _doubted


def _noted(folder: str, names: set[str]) -> Note:
    try:
        # A FIFO would be waited for, for ever.
        fd = os.open(os.path.join(folder, _NAME), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return _NOTHING
    except OSError:
        return _UNKNOWN
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return _UNKNOWN
        with open(fd, "rb", closefd=False) as file:
            content = file.read(_GREATEST_RECORD + 1)
        # A few KiB of brackets are too deep for Python's parser.
        noted = json.loads(content, object_pairs_hook=_Pairs) if len(content) <= _GREATEST_RECORD else None
    except (OSError, ValueError, RecursionError):
        return _UNKNOWN
    finally:
        os.close(fd)
    if not isinstance(noted, _Pairs):
        return _UNKNOWN
    formats = [format for path, format in noted if os.path.basename(path) in names]
    if "raw" in formats:
        return Note(exists=True, format="raw")
    if not formats:
        return _NOTHING
    first = formats[0]
    return Note(exists=True, format=first) if isinstance(first, str) and len(set(map(str, formats))) == 1 else _UNKNOWN
