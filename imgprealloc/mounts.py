# SPDX-License-Identifier: Apache-2.0
"""Which mounted filesystem holds an open file, by the kernel's word on the file itself; what it can do is not here.

A path does not tell: something may have been mounted over a folder on the way
since, and on overlayfs the bytes of a file are on another filesystem.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import ctypes
import dataclasses
import os
import re
from typing import Optional

# linux/magic.h
OVERLAYFS = 0x794C7630

_LIBC = ctypes.CDLL(None, use_errno=True)
# Longer than the structure, of which only the first word counts.
_STATFS_LENGTH = 512

_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclasses.dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mountinfo.

    :param point: the folder, or file, that it is mounted on
    :param type: the filesystem's name, as in /proc/mounts
    :param source: what is mounted; for most a device's path
    :param options: the filesystem's own; those without a value have an empty one
    """

    point: str
    type: str
    source: str
    options: dict[str, str]


def number(fd: int) -> int:
    """Return the number by which statfs(2) tells the type of the filesystem that an open file or folder is on.

    :raises: OSError
    """
    answer = ctypes.create_string_buffer(_STATFS_LENGTH)
    if _LIBC.fstatfs(fd, answer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    # All numbers have 32 bits, and so has the word itself on s390x.
    return ctypes.c_uint32.from_buffer(answer).value


def identifier(fd: int) -> str:
    """Return what tells the mount that a file was opened through from all others."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return fields["mnt_id"].strip()


def of(fd: int) -> Optional[Mount]:
    """Find the mount that a file was opened through; None if it is gone, or another namespace's."""
    wanted = identifier(fd)
    # A path is bytes, of which only the separators are sure to be ASCII.
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            if line.split(" ", 1)[0] == wanted:
                return _parsed(line)
    return None


def _parsed(line: str) -> Mount:
    # ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE SOURCE OPTIONS
    left, right = line.rstrip("\n").split(" - ", 1)
    kind, source, options = right.split(" ", 2)
    words = (word.partition("=") for word in options.split(","))
    return Mount(
        _unescaped(left.split(" ")[4]),
        kind,
        _unescaped(source),
        {key: _unescaped(value) for key, _, value in words},
    )


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), text)


@contextlib.contextmanager
def holding(fd: int) -> Iterator[int]:
    """Give what is open on the filesystem that holds the bytes of a file, or of a folder's new files.

    That is fd itself, and on overlayfs the folder where that puts what is
    written, its upperdir. Where this process cannot see it (a container's own
    root), it is fd all the same.
    """
    upper = _upper(fd) if number(fd) == OVERLAYFS else None
    if upper is None:
        yield fd
        return
    try:
        yield upper
    finally:
        os.close(upper)


def _upper(fd: int) -> Optional[int]:
    mount = of(fd)
    path = "" if mount is None else mount.options.get("upperdir", "")
    if not os.path.isabs(path):
        return None
    try:
        upper = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    # By that path there may be another folder here than where it was mounted.
    with contextlib.suppress(OSError):
        if _size(upper) == _size(fd):
            return upper
    os.close(upper)
    return None


def _size(fd: int) -> tuple[int, int]:
    # overlayfs answers with the other's, but for the type.
    space = os.statvfs(fd)
    return space.f_frsize, space.f_blocks
