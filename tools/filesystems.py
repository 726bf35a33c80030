# SPDX-License-Identifier: Apache-2.0
"""Try what each filesystem can promise a disk, and write doc/source/filesystems.rst from what came out.

    python tools/filesystems.py [--page] [NAME...]

On a new filesystem of each kind a disk is made in each mode over a base image,
the filesystem is filled to its last byte, and a guest's program writes the whole
disk twice and reads it back. NAME is a kind; without any all are tried. With
--page the page is written. Needs root. Ends with 1 if a disk that is called
preallocated could not be written, but for what is known of.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import platform
import random
import subprocess
import sys
from typing import Any, get_args

import loop_filesystem

from imgprealloc import DiskImage
from imgprealloc import Mode
from imgprealloc import PreallocationError
from imgprealloc import Preallocator
from imgprealloc import disk_file
from imgprealloc import promise
from imgprealloc import qemu_img

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
_PAGE = _REPOSITORY / "doc" / "source" / "filesystems.rst"

MODES: tuple[Mode, ...] = get_args(Mode)

_MIB = 1 << 20
_ROOM = 320 * _MIB
_BASE = 16 * _MIB
_SIZE = 32 * _MIB
_PIECE = 4096
_SECTOR = 512


class NotHere(Exception):
    """This kernel has no such filesystem; what mount(8) said."""


_Ground = Callable[[], "contextlib.AbstractContextManager[pathlib.Path]"]


@contextlib.contextmanager
def _plain(kind: str, sector_size: int = 512) -> Iterator[pathlib.Path]:
    with loop_filesystem.mounted(kind, _ROOM, sector_size=sector_size) as mount_point:
        yield pathlib.Path(mount_point)


@contextlib.contextmanager
def _compressed() -> Iterator[pathlib.Path]:
    with _plain("btrfs") as mount_point:
        _run("chattr", "+c", mount_point)
        yield mount_point


@contextlib.contextmanager
def _limited() -> Iterator[pathlib.Path]:
    """Give a subvolume that may have less than its filesystem has."""
    with _plain("btrfs") as mount_point:
        volume = mount_point / "volume"
        _run("btrfs", "quota", "enable", mount_point)
        _run("btrfs", "subvolume", "create", volume)
        _run("btrfs", "qgroup", "limit", str(128 * _MIB), volume)
        yield volume


@contextlib.contextmanager
def _in_a_project(kind: str, *features: str) -> Iterator[pathlib.Path]:
    """Give a folder that may have less than its filesystem has, where the kernel knows project quotas."""
    with contextlib.ExitStack() as stack:
        limited = loop_filesystem.mounted(kind, _ROOM, features=features, options="prjquota")
        try:
            mount_point = stack.enter_context(limited)
        except RuntimeError as exc:
            raise NotHere(str(exc)) from exc
        folder = pathlib.Path(mount_point, "folder")
        folder.mkdir()
        # New files are the folder's project's, too.
        _run("chattr", "-p", "42", folder)
        _run("chattr", "+P", folder)
        _run("xfs_quota", "-x", "-f", "-c", f"limit -p bhard={128 * _MIB} 42", mount_point)
        yield folder


@contextlib.contextmanager
def _overlaid(kind: str) -> Iterator[pathlib.Path]:
    with _plain(kind) as below, loop_filesystem.overlaid(str(below)) as merged:
        yield pathlib.Path(merged)


@contextlib.contextmanager
def _fuse() -> Iterator[pathlib.Path]:
    from functional import faulty_filesystem

    with _plain("ext4") as below, faulty_filesystem.mounted(below) as mounted:
        yield mounted.mount_point


@contextlib.contextmanager
def _fuse_without_fallocate() -> Iterator[pathlib.Path]:
    from functional import faulty_filesystem

    with _plain("ext4") as below, faulty_filesystem.mounted(below) as mounted:
        mounted.prepare(["fallocate"], "EOPNOTSUPP", at=None)
        yield mounted.mount_point


# By their names on the page.
GROUNDS: dict[str, _Ground] = {
    "ext4": functools.partial(_plain, "ext4"),
    "ext4, sectors of 4 KiB": functools.partial(_plain, "ext4", 4096),
    "XFS (reflink)": functools.partial(_plain, "xfs"),
    "XFS, sectors of 4 KiB": functools.partial(_plain, "xfs", 4096),
    "btrfs": functools.partial(_plain, "btrfs"),
    "btrfs, compressed folder": _compressed,
    "btrfs, qgroup at its limit": _limited,
    "btrfs, qgroup 1 MiB below its limit": _limited,
    "ext2": functools.partial(_plain, "ext2"),
    "tmpfs": functools.partial(_plain, "tmpfs"),
    "overlayfs over ext4": functools.partial(_overlaid, "ext4"),
    "overlayfs over XFS": functools.partial(_overlaid, "xfs"),
    "overlayfs over btrfs": functools.partial(_overlaid, "btrfs"),
    "FUSE, handed through to ext4": _fuse,
    "FUSE without fallocate": _fuse_without_fallocate,
    "ext4, project quota": functools.partial(_in_a_project, "ext4", "-O", "project,quota", "-E", "quotatype=prjquota"),
    "XFS, project quota": functools.partial(_in_a_project, "xfs"),
}

# What is called preallocated and cannot be written: at its limit btrfs wants room
# for the metadata of each write, also of one that takes no space.
KNOWN: frozenset[tuple[str, Mode]] = frozenset(
    {("btrfs, qgroup at its limit", "falloc"), ("btrfs, qgroup at its limit", "full")}
)

# Bytes that are left free, else none.
_LEFT = {"btrfs, qgroup 1 MiB below its limit": _MIB}

# Where less than a page is written, too, with so much left.
SECTORS_ON = ("ext4", "XFS (reflink)", "btrfs")
SECTORS_IN: tuple[Mode, ...] = ("falloc", "full")
_LEFT_FOR_SECTORS = {"none": 0, "32 KiB": 32 << 10, "1 MiB": _MIB, "16 MiB": 16 * _MIB}

# Of one write, in bytes; and where it begins, after the start of a page.
LENGTHS = {"512 bytes": 512, "1 KiB": 1 << 10, "4 KiB": 4 << 10, "5 KiB": 5 << 10, "64 KiB": 64 << 10}
_BEGINNINGS = (0, _SECTOR)
# What the guest finds there. Of a base image that has data in its first half alone.
PLACES = ("the base's data", "the base's zeros", "never written", "zeroed by the guest")
_STRETCH = 16 * _MIB
# Of that, for the writes of one length from one beginning, none of which shares a page with another.
_SHARE = _STRETCH // (len(LENGTHS) * len(_BEGINNINGS)) // (128 << 10) * (128 << 10)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a disk.

    :param kept: the mode that was promised for it, its own or a fallback
    :param state: as imgprealloc show has it; what was said, where no disk was made
    :param failed: how many of the guest's writes failed, or pages were wrong afterwards
    :param tried: how many writes there were
    """

    name: str
    mode: Mode
    kept: str
    state: str
    failed: int
    tried: int

    @property
    def good(self) -> bool:
        """Whether what is called preallocated can be written."""
        return self.state != "preallocated" or not self.failed


@dataclasses.dataclass(frozen=True)
class Sectors:
    """How many writes of a sector failed.

    :param place: what the guest has done there before
    :param failed: with so much left as _LEFT_FOR_SECTORS has it, one after the other
    :param tried: of how many, each time
    """

    name: str
    mode: Mode
    place: str
    failed: tuple[int, ...]
    tried: int


@dataclasses.dataclass(frozen=True)
class Enough:
    """How much has to be left that all writes of a length succeed.

    :param place: what the guest finds there
    :param left: as _LEFT_FOR_SECTORS names it, or "more", for each of LENGTHS: where
        they begin with a page, and where they begin within one
    """

    name: str
    mode: Mode
    place: str
    left: tuple[tuple[str, str], ...]


def outcome(name: str, mode: Mode) -> Outcome:
    """Try a mode on a filesystem of its own."""
    with GROUNDS[name]() as folder:
        disk = folder / "disk"
        with disk_file.place(str(disk)) as place:
            kept = promise.made(place, mode, "metadata").mode
        try:
            state = _made(disk, mode).state
        except PreallocationError as exc:
            return Outcome(name, mode, kept, exc.reason, 0, 0)
        _fill(folder, _LEFT.get(name, 0))
        return Outcome(name, mode, kept, state, *_overwritten(disk))


def sectors(name: str, mode: Mode) -> list[Sectors]:
    """Try writes of less than a page, with more and more left, each on a filesystem of its own."""
    failed: dict[tuple[str, int], list[int]] = {}
    for left in _LEFT_FOR_SECTORS.values():
        with GROUNDS[name]() as folder:
            _made(folder / "disk", mode)
            _fill(folder, left)
            for place, number, tried in _written_in_sectors(folder / "disk"):
                failed.setdefault((place, tried), []).append(number)
    return [Sectors(name, mode, place, tuple(numbers), tried) for (place, tried), numbers in failed.items()]


def enough(name: str, mode: Mode) -> list[Enough]:
    """Try writes of all lengths, with more and more left, each on a filesystem of its own."""
    needed: dict[tuple[str, int, int], str] = {}
    for told, left in _LEFT_FOR_SECTORS.items():
        with GROUNDS[name]() as folder:
            _made(folder / "disk", mode, size=len(PLACES) * _STRETCH, base=2 * _STRETCH, data=_STRETCH)
            _fill(folder, left)
            for case in _written(folder / "disk"):
                needed.setdefault(case, told)
    return [
        Enough(name, mode, place, tuple(
            (needed.get((place, length, 0), "more"), needed.get((place, length, _SECTOR), "more"))
            for length in LENGTHS.values()
        ))
        for place in PLACES
    ]  # fmt: skip


def _made(disk: pathlib.Path, mode: Mode, size: int = _SIZE, base: int = _BASE, data: int = _BASE) -> DiskImage:
    image = disk.parent / "base"
    image.write_bytes(random.Random(1).randbytes(data))
    os.truncate(image, base)
    return Preallocator(mode).create(disk, size, str(image), backing_format="raw")


def _fill(folder: pathlib.Path, leave: int) -> None:
    """Take all that is left of a filesystem, or of a limit on it, but for so many bytes."""
    spare = folder / "spare"
    if leave:
        _run("fallocate", "-l", str(leave), spare)
    # The bulk without writing it, where that can be done.
    space = os.statvfs(folder)
    bulk = space.f_bavail * space.f_frsize - 16 * _MIB
    subprocess.run(["fallocate", "-l", str(max(bulk, 1)), folder / "filler"], capture_output=True, check=False)
    _run("sync", "-f", folder)
    loop_filesystem.fill(str(folder))
    spare.unlink(missing_ok=True)
    _run("sync", "-f", folder)


def _overwritten(disk: pathlib.Path) -> tuple[int, int]:
    """Write each page of a disk, twice, in random order, and read it back.

    :returns: how many writes failed, or else how many pages read wrong, and how
        many writes there were
    """
    places = list(range(0, _SIZE, _PIECE))
    commands: list[str] = []
    for turn in (1, 2):
        random.Random(turn).shuffle(places)
        commands += [f"write -P {_pattern(place, turn)} {place} {_PIECE}" for place in places]
        commands.append("flush")
    commands += [f"read -P {_pattern(place, 2)} {place} {_PIECE}" for place in places]
    text = _guest(disk, commands)
    tried = 2 * len(places)
    failed = tried - text.count(f"wrote {_PIECE}/{_PIECE} bytes")
    if not failed:
        failed = len(places) - text.count(f"read {_PIECE}/{_PIECE} bytes") + text.count("verification failed")
    return failed, tried


def _written_in_sectors(disk: pathlib.Path) -> list[tuple[str, int, int]]:
    """Write sectors where nobody has written, and where there are the guest's own zeros; count what fails."""
    fresh = list(range(_BASE, _BASE + 2 * _MIB, _SECTOR))
    random.Random(3).shuffle(fresh)
    zeroed = random.Random(4).sample(range(_BASE + 4 * _MIB, _SIZE, _SECTOR), 2000)
    zeroing = [f"write -z {place} {_SECTOR}" for place in zeroed]
    found = []
    for name, places, before in (("never written", fresh, []), ("zeroed by the guest", zeroed, zeroing)):
        text = _guest(disk, [*before, *(f"write -P 7 {place} {_SECTOR}" for place in places)])
        tried = len(before) + len(places)
        found.append((name, tried - text.count(f"wrote {_SECTOR}/{_SECTOR} bytes"), tried))
    return found


def _written(disk: pathlib.Path) -> Iterator[tuple[str, int, int]]:
    """Write each length at each place, in random order; tell which have all succeeded, with their beginnings."""
    for number, place in enumerate(PLACES):
        start = number * _STRETCH
        for length in LENGTHS.values():
            for beginning in _BEGINNINGS:
                writes = [f"{at + beginning} {length}" for at in range(start, start + _SHARE, _apart(length))]
                random.Random(5).shuffle(writes)
                before = [f"write -z {write}" for write in writes if place == "zeroed by the guest"]
                text = _guest(disk, [*before, *(f"write -P 7 {write}" for write in writes)])
                if text.count(f"wrote {length}/{length} bytes") == len(before) + len(writes):
                    yield place, length, beginning
                start += _SHARE


def _apart(length: int) -> int:
    """Return how far apart writes begin: a power of 2, of at least two pages."""
    return max(2 * _PIECE, 1 << length.bit_length())


def _guest(disk: pathlib.Path, commands: list[str]) -> str:
    """Have qemu-io do it to a disk as a guest's QEMU would, and return what it says."""
    said = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-n", "-t", "none", disk],
        input="\n".join([*commands, "quit\n"]), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return said.stdout + said.stderr


def _pattern(place: int, turn: int) -> int:
    return 1 + (place // _PIECE + 101 * turn) % 255


def _run(*argv: Any) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


# The page.

_TEXT = """\
===========
Filesystems
===========

What each filesystem keeps of the promise, by ``tools/test-filesystems``, which has
also written this page. On a new filesystem of {room} MiB it makes an overlay of {size} MiB
over a base image of {base} MiB, by the defaults, once in each mode. Then it fills the
filesystem to its last byte, writes the whole disk twice in pages of {piece} bytes, in
random order, and reads it back. Linux was {linux}, QEMU {qemu}.

{results}

"done" is the mode that the disk got: where a filesystem cannot set space aside,
``on_unsupported`` decides, here by its default ``metadata``. A disk that is ``mapped``
has all its clusters, and not the space; ``imgprealloc show`` tells what it lacks, and
``on_unsupported = error`` makes no such disk in mode ``falloc``.

Less than a page
================

Where a guest writes less than a page to a place that it has not written, or more that
does not begin and end with a page, QEMU asks the filesystem to zero the rest of the page,
and that may want room. So many writes of
{sector} bytes failed, in random order beyond the base image, with so much left on the
filesystem: of 4096 where nobody had written; and of 2000 of zeros, and 2000 of data to
the same places afterwards.

{sectors}

btrfs needs the most of all in mode ``full``, and nothing in mode ``falloc``.

So much had to be left that all writes of a length succeeded: where they began with a page,
and {sector} bytes after that. They were {few} (64 KiB) to {many}, in random order, one
length after the other on the same filesystem; the base image had data in its first half
alone.

{enough}

One by one
==========

* **ext4, XFS and tmpfs** hold what is set aside. So do they below overlayfs, which is
  judged by the filesystem where it puts new files.
* **btrfs** does for files with ``nocow``, which each disk gets that is made there. A
  folder with the compression attribute (``chattr +c``) makes that void, and is taken
  for a filesystem that cannot set space aside. So is a disk whose subvolume has a
  snapshot copied on write, until it is rewritten. At the limit of a **qgroup** no
  write is let through, whatever is set aside, because btrfs wants room within it for
  the metadata of each write. With 1 MiB left all was written, by one guest that writes
  a page at a time; with 256 KiB most of mode ``falloc``'s writes failed.
* **ext2**, as all that have no ``fallocate`` (ext3, NFS before 4.2, ZFS), can hold only
  what has been written: mode ``full``, or ``on_unsupported = full``. ext3, NFS and ZFS
  were not tried here.
* **Project quotas** of XFS and ext4 are told by statvfs(2) of a folder that is a
  project's, so that what cannot be had is not begun. This page's kernel had none. On Linux
  6.1 (Debian 12's, in a virtual machine) both were tried in the same way, in a folder
  that could have 128 MiB: in modes ``falloc`` and ``full`` disks were ``preallocated``, and at
  the limit all of them was written.
* **FUSE** is what is behind it. The first hands all through, and has no map of extents; the
  second answers fallocate as NFS before 4.2 does.
* **Thin storage** below any of them (a loop device on a file with holes, a thin pool)
  holds nothing of what mode ``falloc`` sets aside, and what mode ``full`` writes;
  ``imgprealloc check-nova`` and ``imgprealloc show`` tell of it.
"""


def page(outcomes: list[Outcome], small: list[Sectors], all_lengths: list[Enough], linux: str, qemu: str) -> str:
    """Make the page from what became of all disks."""
    lefts = [f"{left} left" for left in _LEFT_FOR_SECTORS]
    return _TEXT.format(
        room=_ROOM // _MIB,
        size=_SIZE // _MIB,
        base=_BASE // _MIB,
        piece=_PIECE,
        sector=_SECTOR,
        sectors=_table(
            ("filesystem", "mode", "place", *lefts),
            [(found.name, found.mode, found.place, *map(str, found.failed)) for found in small],
        ),
        few=_SHARE // _apart(max(LENGTHS.values())),
        many=_SHARE // _apart(_SECTOR),
        enough=_table(
            ("filesystem", "mode", "place", *LENGTHS),
            [(found.name, found.mode, found.place, *map("; ".join, found.left)) for found in all_lengths],
        ),
        linux=linux,
        qemu=qemu,
        results=_table(("filesystem", "mode", "done", "state", "overwritten when full"), list(map(_row, outcomes))),
    )


def _row(outcome: Outcome) -> tuple[str, ...]:
    if not outcome.tried:
        return outcome.name, outcome.mode, outcome.kept, "not made", outcome.state
    verdict = f"{outcome.failed} of {outcome.tried} fail" if outcome.failed else "all of it"
    return outcome.name, outcome.mode, outcome.kept, outcome.state, verdict


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def main(arguments: list[str]) -> int:
    """Try all, print a line for each, and write the page; 0 if every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {'; '.join(GROUNDS)}")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(GROUNDS)
    if unknown:
        parser.error(f"no such filesystem: {'; '.join(sorted(unknown))}")
    # What is done instead is told by the table.
    logging.getLogger("imgprealloc").setLevel(logging.ERROR)
    outcomes = []
    for name in options.names or GROUNDS:
        for mode in MODES:
            try:
                outcomes.append(outcome(name, mode))
            except NotHere as exc:
                print(exc, file=sys.stderr)
                outcomes.append(Outcome(name, mode, "none", "this kernel has none", 0, 0))
            print(": ".join(_row(outcomes[-1])), flush=True)
    if options.page:
        small = [row for name in SECTORS_ON for mode in SECTORS_IN for row in sectors(name, mode)]
        all_lengths = [row for name in SECTORS_ON for mode in SECTORS_IN for row in enough(name, mode)]
        qemu = ".".join(map(str, qemu_img.version()))
        _PAGE.write_text(page(outcomes, small, all_lengths, platform.release().partition("-")[0], qemu))
    broken = [found for found in outcomes if not found.good and (found.name, found.mode) not in KNOWN]
    kept = [found for found in outcomes if found.good and (found.name, found.mode) in KNOWN]
    for found in broken:
        print(f"{found.name}, mode {found.mode}: called preallocated, and cannot be written", file=sys.stderr)
    for found in kept:
        print(f"{found.name}, mode {found.mode}: is known to fail, and does not", file=sys.stderr)
    return int(bool(broken or kept))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
