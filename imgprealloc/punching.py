# SPDX-License-Identifier: Apache-2.0
"""Space that nobody has written to, given back: no byte of a file changes, whatever its format is.

What is set aside and not written reads as zeros, and so does a hole. It is done
by a process of its own, because a disk that its guest has written at random has
millions of such stretches.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
import errno
import os
import sys

from oslo_utils import units

from imgprealloc import command
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import lock
from imgprealloc import native_thread
from imgprealloc import progress
from imgprealloc import zeros
from imgprealloc.fallocate import Extent

# What is read before it is given back; whoever wants to open the file meanwhile waits for no more.
_BLOCK = units.Mi


def give_back(path: str, fd: int) -> None:
    """Give all of a file's space back that is set aside and not written, also past its end.

    :param path: the disk, for the error's text
    :param fd: the only descriptor of it that this process has, for writing
    :raises: ImageInUse, UnsupportedFilesystem, CommandFailed, also where
        somebody opens the file meanwhile, or a stretch that is called unwritten
        reads as anything but zeros
    """
    lock.refuse_users(path, fd)
    _require_holes(path, fd)
    size = os.fstat(fd).st_size
    command.run(
        path, sys.executable, "-W", "ignore", "-m", __name__, path,
        work=size, stdin=fd, told=progress.printed(size),
    )  # fmt: skip


def _require_holes(path: str, fd: int) -> None:
    # Past the end, where there is nothing.
    beyond = os.fstat(fd).st_size // units.Mi * units.Mi + units.Gi
    try:
        native_thread.run(fallocate.punch, fd, beyond, units.Mi)
    except OSError as exc:
        if exc.errno == errno.EBADF:
            # It could only be opened for reading.
            code = errno.EROFS if os.fstatvfs(fd).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(code, os.strerror(code), path) from exc
        if exc.errno not in fallocate.NOT_SUPPORTED:
            raise
        raise exceptions.UnsupportedFilesystem(
            path,
            f"the {filesystem.type_of(fd)} filesystem cannot give back a part of a file",
            "Copy the disk instead (imgprealloc thin --rewrite).",
        ) from exc


def _unwritten(fd: int) -> Iterator[Extent]:
    """List what is held and not written; what is a hole already has nothing to give."""
    held = fallocate.extents_of(fd)
    holes = zeros.holes(fd)
    return holes if held is None else _common(holes, held)


def _common(first: Iterable[Extent], second: Iterable[Extent]) -> Iterator[Extent]:
    """List what is in both of two lists, each in order."""
    left, right = iter(first), iter(second)
    one, other = next(left, None), next(right, None)
    while one is not None and other is not None:
        start, end = max(one.start, other.start), min(one.end, other.end)
        if start < end:
            yield Extent(start, end - start)
        if one.end <= other.end:
            one = next(left, None)
        else:
            other = next(right, None)


def _punch(path: str, fd: int) -> None:
    """Give back what is unwritten of an open file, each block once it has been read.

    :raises: ImageInUse when somebody wants to open the file, FileError for a
        stretch that has something in it
    """
    size = os.fstat(fd).st_size
    printer = progress.Printer(size)
    # The locks within the lease: a guest that has waited for that would be refused by them.
    with lock.sole_opener(path, fd) as refuse_others, lock.no_writer(path, fd):
        zeros.forget_reads(fd)
        for extent in _unwritten(fd):
            for position in range(extent.start, extent.end, _BLOCK):
                refuse_others()
                length = min(extent.end - position, _BLOCK)
                zeros.require_zeros(path, fd, position, length)
                fallocate.punch(fd, position, length)
                printer.tell(position + length)
        refuse_others()
        # What is held past the end goes, where that is what it was: whom no lease keeps
        # out, as on NFS, may have grown the disk meanwhile, and be cut off.
        if os.fstat(fd).st_size == size:
            os.ftruncate(fd, size)


def _main(path: str, fd: int = 0) -> int:
    """Do what give_back() asks for, on standard input, and keep QEMU out meanwhile."""
    try:
        _punch(path, fd)
    except exceptions.PreallocationError as exc:
        print(exc.reason, file=sys.stderr)
        return 1
    except OSError as exc:
        print(exc.strerror, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
