# SPDX-License-Identifier: Apache-2.0
"""Zeros, written where a file reads as zeros already: the only place that writes into a disk itself.

It is done by a process of its own, because it may take minutes, in which a
system call in ours would stop every other thread of an eventlet's
nova-compute.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import errno
import os
import sys
import time

from oslo_utils import units

from imgprealloc import command
from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc import lock
from imgprealloc import native_thread
from imgprealloc import pace
from imgprealloc import progress
from imgprealloc.fallocate import Extent

# So small that whoever waits for the file waits no time that anybody notices.
_BLOCK = 256 * units.Ki

# Of what a pace is kept for: so much may pile up in the page cache, and be
# what somebody else's fsync has to wait for.
_PORTION = 16 * units.Mi

# Seconds, of which whoever waits for the file notices as little. A block at 4 KiB a
# second is 64, and after 45 the kernel lets them in, whom QEMU's locks then refuse.
_LONGEST_REST = 0.1

# So often the writing goes on after somebody who has opened the file; each of them costs an fsync.
_MOST_VISITS = 1000

# Of the process: what comes before the stretches that it writes in.
_WITHIN = "within"

# Bytes that qemu-img leaves unwritten in a qcow2 file's own metadata, less than
# a cluster of the largest size.
MOST_OF_METADATA = 2 * units.Mi


def write(path: str, fd: int, *, start: int = 0, within: Sequence[Extent] | None = None) -> None:
    """Write zeros over all that is a hole, or set aside but not written yet.

    :param path: the disk, for the error's text
    :param fd: the only descriptor of it that this process has
    :param start: the byte that it begins at
    :param within: where alone it does so; no more than a command line can tell
    :raises: ImageInUse, also where somebody opens the file meanwhile and stays,
        NoSpace, CommandFailed, also where the filesystem calls a hole what reads as
        something else
    """
    lock.refuse_users(path, fd)
    # Else what is unwritten and has all been read is not missed.
    native_thread.run(forget_reads, fd)
    if not native_thread.run(lambda: has_unwritten(fd, start=start)):
        return
    kept = pace.current()
    rate = [] if kept is None else [str(kept.rate or 0)]
    size = os.fstat(fd).st_size
    stretches = [] if within is None else [_WITHIN, *(f"{extent.start}:{extent.length}" for extent in within)]
    try:
        command.run(
            path, sys.executable, "-W", "ignore", "-m", __name__, path, str(start), *rate, *stretches,
            work=size, stdin=fd,
            told=progress.printed(size - start if within is None else sum(extent.length for extent in within)),
        )  # fmt: skip
    except exceptions.NoSpace:
        raise
    except exceptions.CommandFailed:
        # Who has come meanwhile, and is still there, is what it has ended for.
        lock.refuse_users(path, fd, patience=0)
        raise


def has_unwritten(fd: int, *, more_than: int = 0, start: int = 0) -> bool:
    """Whether a file has more than so many bytes that were not written yet, whether they are held or not."""
    found = 0
    for hole in holes(fd, start):
        found += hole.length
        if found > more_than:
            return True
    return False


def unwritten(fd: int) -> int:
    """Count the bytes of a file that were not written yet, whether they are held or not."""
    return sum(hole.length for hole in holes(fd))


def forget_reads(fd: int) -> None:
    """Take out of the page cache what was only read, and let no more in than is asked for.

    lseek(2) calls that data, where it is unwritten in the file. May take seconds.
    """
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    # Else what lies behind a stretch that is read would come as well.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def holes(fd: int, start: int = 0) -> Iterator[Extent]:
    """List what is said to read as zeros without having been written, from start on.

    By lseek(2) and not by the extent map, which calls data unwritten that is
    still in the page cache.
    """
    end = os.fstat(fd).st_size
    start = os.lseek(fd, start, os.SEEK_HOLE) if start < end else end
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


def require_zeros(path: str, fd: int, position: int, length: int) -> None:
    """Read what is said to read as zeros.

    lseek(2) is not believed: it has called dirty data a hole (OpenZFS 15526).

    :raises: FileError where it has something in it
    """
    if os.pread(fd, length, position) == bytes(length):
        return
    kind = filesystem.type_of(fd)
    raise exceptions.FileError(
        path,
        f"the {kind} filesystem has called a hole what is none, at byte {position}, or somebody has written there "
        "just now",
        "Nothing was written over it. If nobody had the disk open, save a copy of it, and look into the kernel's log.",
        errno.EIO,
    )


class _Paced:
    """Writes blocks as fast as it may, and lets no more pile up than the next one's fsync can wait for.

    :param rate: bytes a second; 0 for no limit
    """

    def __init__(self, fd: int, rate: int) -> None:
        self._fd = fd
        self._rate = rate
        self._began = time.monotonic()
        self._done = 0
        self._piled = 0

    def written(self, length: int, refuse_others: Callable[[], None]) -> None:
        """Take a rest after so many bytes, where that is due, and end it for whoever wants to open the file."""
        self._done += length
        self._piled += length
        if self._piled >= _PORTION:
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._piled = 0
        if not self._rate:
            return
        while (rest := self._began + self._done / self._rate - time.monotonic()) > 0:
            refuse_others()
            time.sleep(min(rest, _LONGEST_REST))


class _Unpaced:
    """Writes blocks as fast as the kernel takes them."""

    def written(self, length: int, refuse_others: Callable[[], None]) -> None:
        """Go on."""


def _fill(path: str, fd: int, stretches: Sequence[Extent], pace: _Paced | _Unpaced) -> None:
    """Write zeros into the holes of an open file, and go on once somebody who has opened it is gone again.

    :raises: ImageInUse when somebody has it open who stays, and what _fill_alone() raises
    """
    printer = progress.Printer(sum(stretch.length for stretch in stretches))
    for _ in range(_MOST_VISITS):
        try:
            _fill_alone(path, fd, stretches, pace, printer)
        except exceptions.ImageInUse:
            # A guest stays, a look does not: Nova's image cache looks at all disks each 40 minutes.
            lock.refuse_users(path, fd)
            # Now, and not while the next one has to wait for it.
            os.fsync(fd)
        else:
            return
    _fill_alone(path, fd, stretches, pace, printer)


def _fill_alone(
    path: str, fd: int, stretches: Sequence[Extent], pace: _Paced | _Unpaced, printer: progress.Printer
) -> None:
    """Write zeros into the holes of an open file, each block once it has been read.

    :raises: ImageInUse when somebody wants to open the file, FileError for a
        hole that has something in it
    """
    zeros, before = bytes(_BLOCK), 0
    # The locks within the lease: a guest that has waited for that would be refused by them.
    with lock.sole_opener(path, fd) as refuse_others, lock.no_writer(path, fd):
        forget_reads(fd)
        for stretch in stretches:
            for hole in holes(fd, stretch.start):
                position, end = hole.start, min(hole.end, stretch.end)
                while position < end:
                    refuse_others()
                    block = memoryview(zeros)[: min(end - position, _BLOCK)]
                    require_zeros(path, fd, position, len(block))
                    length = os.pwrite(fd, block, position)
                    position += length
                    printer.tell(before + position - stretch.start)
                    pace.written(length, refuse_others)
                if hole.end >= stretch.end:
                    break
            before += stretch.length
        os.fdatasync(fd)


def _main(
    path: str, fd: int = 0, start: int = 0, rate: int | None = None, *, within: Sequence[Extent] | None = None
) -> int:
    """Do what write() asks for, on standard input, and keep QEMU out meanwhile: this process may outlive the other."""
    stretches = [Extent(start, os.fstat(fd).st_size - start)] if within is None else within
    try:
        _fill(path, fd, stretches, _Unpaced() if rate is None else _Paced(fd, rate))
    except exceptions.PreallocationError as exc:
        print(exc.reason, file=sys.stderr)
        return 1
    except OSError as exc:
        print(exc.strerror, file=sys.stderr)
        return 1
    return 0


def _told(words: Sequence[str], fd: int = 0) -> int:
    """Do it as a command line tells it.

    :param words: the disk, the start, the rate, if any, and the stretches, if any
    """
    at = words.index(_WITHIN, 1) if _WITHIN in words[1:] else len(words)
    stretches = []
    for stretch in words[at + 1 :]:
        first, length = map(int, stretch.split(":"))
        stretches.append(Extent(first, length))
    return _main(words[0], fd, *map(int, words[1:at]), within=stretches if at < len(words) else None)


if __name__ == "__main__":
    sys.exit(_told(sys.argv[1:]))
