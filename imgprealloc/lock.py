# SPDX-License-Identifier: Apache-2.0
"""QEMU's lock on an image file, as far as we look at it and take part in it.

QEMU locks single bytes of an image with F_OFD_SETLK (block/file-posix.c,
RAW_LOCK_PERM_BASE): byte 100 + n says "I use permission n", byte 200 + n
says "nobody else may use permission n". Permission 1 is writing, 3 is
resizing. Where a filesystem has no such locks, QEMU does without, and so do we.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
import struct

from imgprealloc import exceptions

_WRITES, _RESIZES = 101, 103
_NO_WRITER, _NO_RESIZER = 201, 203
# Outside QEMU's bytes, so that qemu-img can work on what we have locked.
_OURS = 300

_FLOCK = struct.Struct("hhqqi4x")
_NO_LOCKS_HERE = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP)


def _fcntl(fd: int, command: int, kind: int, byte: int) -> int:
    """Set or ask for a lock on one byte; return the kind of lock that stands."""
    try:
        answer = fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except OSError as exc:
        if exc.errno in _NO_LOCKS_HERE:
            return fcntl.F_UNLCK
        raise
    return int(_FLOCK.unpack(answer)[0])


def has_writer(fd: int) -> bool:
    """Whether QEMU has an open file open for writing too."""
    return any(_fcntl(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK for byte in (_WRITES, _RESIZES))


def in_use(path: str) -> bool:
    """Whether QEMU has the image open for writing."""
    with open(path, "rb") as file:
        return has_writer(file.fileno())


def refuse_writer(path: str) -> None:
    """Refuse an image that QEMU has open for writing.

    :raises: ImageInUse
    """
    with open(path, "rb") as file:
        _refuse_writer(path, file.fileno())


def _refuse_writer(path: str, fd: int) -> None:
    if has_writer(fd):
        raise exceptions.ImageInUse(path, "QEMU has the image open for writing", "Stop the instance, then try again.")


@contextlib.contextmanager
def no_writer(path: str) -> Iterator[None]:
    """Keep QEMU from opening an image for writing, while it is copied or replaced.

    :raises: ImageInUse
    """
    with open(path, "rb") as file:
        # First forbid, then look, as QEMU does: of two that come at once, at
        # least one sees the other.
        for byte in (_NO_WRITER, _NO_RESIZER):
            _fcntl(file.fileno(), fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
        _refuse_writer(path, file.fileno())
        yield


def try_exclusive(fd: int) -> bool:
    """Take the lock that one imgprealloc alone can have; False if another has it."""
    try:
        _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, _OURS)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
