# SPDX-License-Identifier: Apache-2.0
"""Space inside a file: fallocate(1) and the kernel's extent map. What is written into it is in zeros.

Calls that may take minutes run in a process of their own, those that may take
seconds in a native thread: under eventlet a system call in ours would stop
every other thread of nova-compute.
"""

from __future__ import annotations

import array
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import contextvars
import ctypes
import dataclasses
import errno
import heapq
import itertools
import operator
import os
import struct
import sys
from typing import NamedTuple, Optional, overload

from oslo_utils import units

from imgprealloc import command
from imgprealloc import exceptions
from imgprealloc import native_thread
from imgprealloc import progress

# linux/falloc.h
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_UNSHARE_RANGE = 0x40

# linux/fiemap.h
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQQQIIII")
_FIEMAP_MAX_LENGTH = 2**64 - 1
_FLAG_SYNC = 0x0001
_EXTENT_LAST = 0x0001
# Delayed allocations have no place yet.
_EXTENT_UNKNOWN = 0x0002
_EXTENT_UNWRITTEN = 0x0800
_EXTENT_MERGED = 0x1000
_EXTENT_SHARED = 0x2000
_EXTENTS_A_CALL = 512

# A process each.
_MOST_GAPS = 500
# A command line ends at 2 MiB.
_STRETCHES_A_CALL = 1000

# After which it is told how far the copying has come.
_UNSHARED_AT_ONCE = 256 * units.Mi

# So small that it is done before a process of its own has started, which takes
# 15 ms of a disk's 200: the holes that qemu-img leaves in its metadata.
AT_ONCE = units.Mi

NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY)

_LIBC = ctypes.CDLL(None, use_errno=True)

Filler = Callable[[str, int, int, int, int], object]
"""Fills the holes in a stretch of a file that we may not write to; takes what fill_named() takes."""

_filler: contextvars.ContextVar[Optional[Filler]] = contextvars.ContextVar("filler", default=None)


@dataclasses.dataclass(frozen=True)
class Extent:
    """A stretch of a file, in bytes, that the filesystem has set aside."""

    start: int
    length: int
    shared: bool = False

    @property
    def end(self) -> int:
        return self.start + self.length


class Placed(NamedTuple):
    """A stretch of a file, in bytes, and where on its storage that is.

    :param place: None for what has no place there yet
    :param unwritten: set aside, and not written, but perhaps in the page cache
    """

    start: int
    length: int
    place: Optional[int]
    unwritten: bool
    shared: bool


class ExtentMap(Sequence[Extent]):
    """The stretches of a file, in order; they become objects as they are asked for.

    A fragmented file has millions. As many objects would be looked through by
    Python's garbage collector, which stops all threads for that. By starts and ends,
    their offsets in bytes, nobody need make objects of all.
    """

    def __init__(self) -> None:
        self.starts = array.array("Q")
        self.ends = array.array("Q")
        self._shared = bytearray()

    def add(self, start: int, end: int, *, shared: bool) -> None:
        """Add what follows; nothing where it is empty."""
        if end > start:
            self.starts.append(start)
            self.ends.append(end)
            self._shared.append(shared)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Extent: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Extent]: ...

    def __getitem__(self, index: int | slice) -> Extent | Sequence[Extent]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        start = self.starts[index]
        return Extent(start, self.ends[index] - start, bool(self._shared[index]))


def reserve(path: str, name: str, start: int, length: int) -> None:
    """Set aside space for a stretch of a file, also past its end; fill holes only.

    Neither the file's length nor its content changes, so that it is safe while
    a guest runs.

    :param path: the disk, for the error's text
    :param name: by which a program opens it
    :raises: NoSpace, CommandFailed, OSError
    """
    filler = _filler.get()
    if filler is not None:
        status = os.stat(name)
        try:
            filler(os.path.realpath(path), status.st_dev, status.st_ino, start, length)
        except OSError:
            raise
        except Exception as exc:
            # Of what lies between us and who fills it.
            raise exceptions.FileError(
                path,
                f"nobody is there to fill its holes: {exc!r}",
                "See whether Nova's privsep daemon works.",
                errno.EACCES,
            ) from exc
        return
    if length <= AT_ONCE:
        native_thread.run(_reserve, name, start, length)
        return
    if not os.access(name, os.W_OK):
        # As the program would say, but by the kind that callers know.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    told = progress.allocated(name, length)
    command.run(path, "fallocate", "-n", "-o", str(start), "-l", str(length), name, work=length, told=told)


def _reserve(name: str, start: int, length: int) -> None:
    with open(name, "r+b") as file:
        _fallocate(file.fileno(), _KEEP_SIZE, start, length)


@contextlib.contextmanager
def filling_by(filler: Optional[Filler]) -> Iterator[None]:
    """Have the block's reserve() done by somebody who may write to the files; None for ourselves."""
    token = _filler.set(filler)
    try:
        yield
    finally:
        _filler.reset(token)


def fill_named(path: str, device: int, inode: int, start: int, length: int) -> None:
    """Do reserve() to the file that a path names, if it is the one that was meant.

    For a process that may write to any file; whoever asks it may not.

    :param device: st_dev of the file
    :param inode: its st_ino
    :raises: OSError, with ESTALE for another file, and ENOSPC where others than
        root could not have so much
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (device, inode):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        space = os.fstatvfs(fd)
        available = space.f_bavail * space.f_frsize
        # A stretch of many holes has most of its space already.
        if available < length and available < _lacking(fd, start, length):
            # Root would get what is kept for root.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        _fallocate(fd, _KEEP_SIZE, start, length)
    finally:
        os.close(fd)


def _lacking(fd: int, start: int, length: int) -> int:
    """Count the bytes of a stretch that are not set aside."""
    found = extents_of(fd)
    return length if found is None else sum(hole.length for hole in _missing(found, start, start + length))


def gaps(found: Sequence[Extent] | None, start: int, end: int) -> list[Extent]:
    """List what is not set aside between start and end, in no more than _MOST_GAPS pieces.

    For reserve(), because XFS wants as much free space as the whole range has,
    allocated already or not. So of very many a few are taken together, and none that have
    much between them.

    :param found: the file's extents()
    """
    if found is None:
        return [Extent(start, end - start)]
    return native_thread.run(_gaps, found, start, end)


def _missing(found: Sequence[Extent], start: int, end: int) -> ExtentMap:
    missing = ExtentMap()
    position = start
    for extent in itertools.chain(found, [Extent(end, 0)]):
        missing.add(position, min(extent.start, end), shared=False)
        position = max(position, extent.end)
    return missing


def _gaps(found: Sequence[Extent], start: int, end: int) -> list[Extent]:
    missing = _missing(found, start, end)
    if len(missing) <= _MOST_GAPS:
        return list(missing)
    half = _MOST_GAPS // 2
    size = -(-len(missing) // half)
    # In numbers, because there may be millions.
    between = array.array("Q", map(operator.sub, itertools.islice(missing.starts, 1, None), missing.ends))
    longest = heapq.nlargest(half - 1, range(len(between)), key=between.__getitem__)
    breaks = sorted({*range(size, len(missing), size), *(number + 1 for number in longest)})
    groups = zip([0, *breaks], [*breaks, len(missing)])
    return [Extent(missing.starts[first], missing.ends[end - 1] - missing.starts[first]) for first, end in groups]


def shared(name: str) -> list[Extent]:
    """List what a file shares with others, as far as the filesystem tells."""
    found = extents(name) or ()
    return native_thread.run(lambda: [extent for extent in found if extent.shared])


def unshare(path: str, name: str, shared: Sequence[Extent]) -> None:
    """Give the file its own copy of stretches that it shares with other files.

    :param path: the disk, for the error's text
    :param name: by which a program opens it
    :raises: NoSpace, CommandFailed
    """
    stretches = [f"{extent.start}:{extent.length}" for extent in shared]
    for first in range(0, len(stretches), _STRETCHES_A_CALL):
        batch = stretches[first : first + _STRETCHES_A_CALL]
        length = sum(extent.length for extent in shared[first : first + _STRETCHES_A_CALL])
        command.run(
            path,
            sys.executable,
            "-W",
            "ignore",
            "-m",
            __name__,
            name,
            *batch,
            work=length,
            told=progress.printed(length),
        )


def extents(name: str) -> Sequence[Extent] | None:
    """Return what the filesystem has set aside for a file, also past its end.

    In as few pieces as can be told apart: a guest that writes in random order
    makes an extent of each 4 KiB, 26 million in 100 GiB.

    :returns: None where the filesystem cannot tell (tmpfs, NFS)
    """
    return native_thread.run(_extents, name)


def _extents(name: str) -> ExtentMap | None:
    with open(name, "rb") as file:
        return extents_of(file.fileno())


def extents_of(fd: int) -> ExtentMap | None:
    """Return as extents() does what an open file has; whoever has a lease on it cannot open it once more."""
    try:
        return _fiemap(fd)
    except OSError as exc:
        if exc.errno in NOT_SUPPORTED:
            return None
        raise


def _fiemap(fd: int) -> ExtentMap:
    joined = ExtentMap()
    # The piece that the next extent may belong to.
    start, end, was_shared = 0, 0, False
    for answer in _answers(fd):
        for logical, _, length, _, _, flags, _, _, _ in answer:
            shared = bool(flags & _EXTENT_SHARED)
            if logical != end or shared != was_shared:
                joined.add(start, end, shared=was_shared)
                start, was_shared = logical, shared
            end = logical + length
    joined.add(start, end, shared=was_shared)
    return joined


def _answers(fd: int, how: int = 0) -> Iterator[list[tuple[int, ...]]]:
    """Ask for the extents of an open file, as the kernel tells them: some hundreds at a time.

    Without FIEMAP_FLAG_SYNC, unless it is asked for: it would wait for the writes of
    a guest. Delayed allocations are listed too, and count as set aside.
    """
    end, flags = 0, 0
    while not flags & _EXTENT_LAST:
        buffer = bytearray(_FIEMAP.size + _EXTENTS_A_CALL * _FIEMAP_EXTENT.size)
        _FIEMAP.pack_into(buffer, 0, end, _FIEMAP_MAX_LENGTH - end, how, 0, _EXTENTS_A_CALL, 0)
        _ioctl(fd, _FS_IOC_FIEMAP, buffer)
        found = _FIEMAP.unpack_from(buffer)[3]
        if not found:
            return
        answer = list(_FIEMAP_EXTENT.iter_unpack(memoryview(buffer)[_FIEMAP.size :][: found * _FIEMAP_EXTENT.size]))
        logical, _, length, _, _, flags, _, _, _ = answer[-1]
        end = logical + length
        yield answer


def placed(fd: int) -> Iterator[Placed]:
    """List where on its storage an open file's extents are, in order, each as the kernel tells it.

    :raises: OSError, with EOPNOTSUPP where the filesystem cannot tell (tmpfs, NFS)
    """
    for answer in _answers(fd):
        for logical, physical, length, _, _, flags, _, _, _ in answer:
            yield Placed(
                logical,
                length,
                None if flags & _EXTENT_UNKNOWN else physical,
                bool(flags & _EXTENT_UNWRITTEN),
                bool(flags & _EXTENT_SHARED),
            )


def filled(fd: int, before: Sequence[Extent], start: int, end: int) -> Sequence[Extent]:
    """List what was a hole between start and end, is set aside now, and has had nothing written to it.

    What is dirty is written out first, because until then an extent with data
    in the page cache is called unwritten.

    :param before: the file's extents() when it was a hole
    :raises: OSError
    """
    return native_thread.run(_filled, fd, before, start, end)


def _filled(fd: int, before: Sequence[Extent], start: int, end: int) -> ExtentMap:
    found = ExtentMap()
    holes = iter(_missing(before, start, end))
    hole = next(holes, None)
    for answer in _answers(fd, _FLAG_SYNC):
        for logical, _, length, _, _, flags, _, _, _ in answer:
            # A flag that says anything else, also one that we do not know, is a reason to leave it.
            if flags & ~(_EXTENT_LAST | _EXTENT_MERGED) != _EXTENT_UNWRITTEN:
                continue
            while hole is not None and hole.end <= logical:
                hole = next(holes, None)
            while hole is not None and hole.start < logical + length:
                found.add(max(hole.start, logical), min(hole.end, logical + length), shared=False)
                if hole.end > logical + length:
                    break
                hole = next(holes, None)
    return found


def held(found: Iterable[Extent], end: int) -> int:
    """Count the bytes before end that are set aside."""
    return native_thread.run(lambda: sum(max(0, min(extent.end, end) - extent.start) for extent in found))


def _ioctl(fd: int, request: int, buffer: bytearray) -> None:
    # fcntl.ioctl() lets no other thread run meanwhile, where the buffer has
    # more than 1 KiB; and a file's extent map may have to be read from the disk.
    if _LIBC.ioctl(fd, ctypes.c_ulong(request), (ctypes.c_char * len(buffer)).from_buffer(buffer)) < 0:
        raise _os_error()


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _LIBC.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise _os_error()


def _os_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def supported(fd: int, length: int) -> bool:
    """Try fallocate(2) on an empty file, and say whether it really holds space.

    A filesystem may answer success and set nothing aside (ZFS does), so that
    only st_blocks tells.
    """
    try:
        _fallocate(fd, _KEEP_SIZE, 0, length)
    except OSError as exc:
        if exc.errno in NOT_SUPPORTED:
            return False
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        raise
    return os.fstat(fd).st_blocks * 512 >= length


def punch(fd: int, start: int, length: int) -> None:
    """Give a stretch of an open file back to the filesystem; it reads as zeros then, and the file stays as long.

    :raises: OSError
    """
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, start, length)


def _unshare(name: str, *stretches: str) -> None:
    pairs = [tuple(map(int, stretch.split(":"))) for stretch in stretches]
    printer, done = progress.Printer(sum(length for _, length in pairs)), 0
    with open(name, "r+b") as file:
        for start, length in pairs:
            for position in range(start, start + length, _UNSHARED_AT_ONCE):
                piece = min(_UNSHARED_AT_ONCE, start + length - position)
                # The last extent goes on to the end of its block, beyond a file that has no whole number of them.
                _fallocate(file.fileno(), _UNSHARE_RANGE | _KEEP_SIZE, position, piece)
                done += piece
                printer.tell(done)


def _main(name: str, *stretches: str) -> int:
    """Do what would take too long in the caller's process; the other end of unshare()."""
    try:
        _unshare(name, *stretches)
    except OSError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
