# SPDX-License-Identifier: Apache-2.0
"""Zeros, written where a file reads as zeros already: the only place that writes into a disk itself.

It is done by a process of its own, because it may take minutes, in which a
system call in ours would stop every other thread of an eventlet's
nova-compute.
"""

from __future__ import annotations

from collections.abc import Iterator
import errno
import os
import sys

from oslo_utils import units

from imgprealloc import command
from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc import lock
from imgprealloc import native_thread
from imgprealloc.fallocate import Extent

# So small that whoever waits for the file waits no time that anybody notices.
_BLOCK = 256 * units.Ki


def write(path: str, fd: int) -> None:
    """Write zeros over all that is a hole, or set aside but not written yet.

    :param path: the disk, for the error's text
    :param fd: the only descriptor of it that this process has
    :raises: ImageInUse, NoSpace, CommandFailed, also where somebody opens the
        file meanwhile, or the filesystem calls a hole what reads as something else
    """
    lock.refuse_users(path, fd)
    if native_thread.run(has_unwritten, fd):
        command.run(
            path, sys.executable, "-W", "ignore", "-m", __name__, path, work=os.fstat(fd).st_size, stdin=fd
        )  # fmt: skip


def has_unwritten(fd: int, *, more_than: int = 0) -> bool:
    """Whether a file has more than so many bytes that were not written yet, whether they are held or not."""
    found = 0
    for hole in _holes(fd):
        found += hole.length
        if found > more_than:
            return True
    return False


def _holes(fd: int) -> Iterator[Extent]:
    """List what is said to read as zeros without having been written.

    By lseek(2) and not by the extent map, which calls data unwritten that is
    still in the page cache.
    """
    end = os.fstat(fd).st_size
    start = os.lseek(fd, 0, os.SEEK_HOLE) if end else end
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            data = end
        yield Extent(start, data - start)
        start = os.lseek(fd, data, os.SEEK_HOLE) if data < end else end


def written(fd: int, unit: int) -> Iterator[tuple[int, int]]:
    """List where something was written: from which unit of an open file to before which.

    As lseek(2) has it, with no more than two questions a unit, however many holes there are.

    :param unit: bytes
    """
    position, end = 0, os.fstat(fd).st_size
    while position < end:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
            hole = os.lseek(fd, data, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            return
        first, last = data // unit, -(-hole // unit)
        yield first, last
        position = last * unit


def _fill(path: str, fd: int) -> None:
    """Write zeros into the holes of an open file, each block once it has been read.

    lseek(2) is not believed: it has called dirty data a hole (OpenZFS 15526).

    :raises: ImageInUse when somebody wants to open the file, FileError for a
        hole that has something in it
    """
    zeros = bytes(_BLOCK)
    with lock.sole_opener(path, fd) as refuse_others:
        for hole in _holes(fd):
            position = hole.start
            while position < hole.end:
                refuse_others()
                block = memoryview(zeros)[: min(hole.end - position, _BLOCK)]
                if os.pread(fd, len(block), position) != block:
                    kind = filesystem.type_of(fd)
                    raise exceptions.FileError(
                        path,
                        f"the {kind} filesystem has called a hole what is none, at byte {position}, or somebody has "
                        "written there just now",
                        "Nothing was written over it. If nobody had the disk open, save a copy of it, and look into "
                        "the kernel's log.",
                        errno.EIO,
                    )
                position += os.pwrite(fd, block, position)
        os.fdatasync(fd)


def _main(path: str, fd: int = 0) -> int:
    """Do what write() asks for, on standard input, and keep QEMU out meanwhile: this process may outlive the other."""
    try:
        with lock.no_writer(path, fd):
            _fill(path, fd)
    except exceptions.PreallocationError as exc:
        print(exc.reason, file=sys.stderr)
        return 1
    except OSError as exc:
        print(exc.strerror, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
