# SPDX-License-Identifier: Apache-2.0
"""What a guest that runs has given back of its disk's file is set aside again.

Holes within the file are filled, whatever its format is. What a guest gives back
of a qcow2 disk makes none: its clusters are free in the file, and the next write may
pass over some that do not suit it, and make the file longer. So space for that is
held past the file's end, once and for all, where QEMU lets a guest give back what it
has zeroed. No program reads the disk, and nothing of it is believed but the size in a
qcow2 header. Neither content nor length changes, so that whatever else is done to
the disk meanwhile may go on, and nobody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
import os
import threading
from typing import Optional

from oslo_log import log as logging

from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import log
from imgprealloc import looks
from imgprealloc import os_errors
from imgprealloc import promise
from imgprealloc import qcow2_header
from imgprealloc import qemu_img
from imgprealloc import sizes
from imgprealloc import worst_case
from imgprealloc.preallocator import Preallocator

LOG = logging.getLogger(__name__)

# What a disk may lack that nobody has seen whole: one that was thin when it was
# started, or copied, is for its next start.
_LITTLE = 0.1

_MOST_REMEMBERED = 10_000

# Blocks that no file has: one that was whole, and is looked at in the next round all the same.
_LOOK_AGAIN = -1

# By device and inode: the length and the blocks of files that were seen without holes.
_whole: dict[tuple[int, int], tuple[int, int]] = {}
_whole_lock = threading.Lock()


def refill(
    strategy: Preallocator, path: str, filler: Optional[fallocate.Filler] = None, *, format: Optional[str] = None
) -> int:
    """Fill the holes of a disk that had none, and return how many bytes were set aside.

    A disk in which nothing has changed costs one stat(2), one whose guest has
    written to it a look at its extents.

    :param filler: fills them where the disk is not ours to write
    :param format: as what QEMU has opened it; None where nobody knows
    :raises: PreallocationError, NoSpace among them: with nothing filled, unless
        others have taken the space meanwhile
    """
    if strategy.mode == "metadata":
        return 0
    try:
        status = os.stat(path)
    except FileNotFoundError as exc:
        raise exceptions.DiskNotFound(path, "it is gone", "Nothing is to be done.") from exc
    key, length = (status.st_dev, status.st_ino), status.st_size
    # Not at least so many: an extent map has blocks of its own, and grows with fragments.
    if _whole.get(key) == (length, status.st_blocks):
        return 0
    with os_errors.translated(path), disk_file.opened(path) as file:
        extents = fallocate.extents(file.program_name)
        if extents is None:
            return 0
        missing = length - fallocate.held(extents, length)
        end = max(length, _end(file, length)) if format == "qcow2" else length
        beyond = end - fallocate.held(extents, end) - missing
        if (missing or beyond) and not _is_to_have_it(strategy, file, key, missing, length):
            if missing:
                return 0
            # Nor can it be held in the next round.
            beyond = 0
        if missing:
            _fill(strategy, file, extents, length, missing, filler)
            LOG.info("%s: what its guest had given back, %s, is set aside again", file.path, sizes.exact(missing))
        is_all = not beyond or _hold_beyond(strategy, file, extents, length, end, beyond, filler)
        _remember(key, length, os.fstat(file.fd).st_blocks if is_all else _LOOK_AGAIN)
    log.forget_one("given back", path)
    return missing + (beyond if is_all else 0)


def _end(file: disk_file.DiskFile, length: int) -> int:
    """Return where ends what a qcow2 disk may ask for, whatever its guest gives back."""
    if qemu_img.version(file.path) >= qemu_img.KEEPS_ZEROED_SPACE:
        return length
    header = qcow2_header.look(file.fd)
    if header is None or not header.has_cluster_size:
        return length
    return worst_case.after_giving_back(header, length, -(-header.virtual_size // header.cluster_size))


def _is_to_have_it(
    strategy: Preallocator, file: disk_file.DiskFile, key: tuple[int, int], missing: int, length: int
) -> bool:
    """Whether space was held for a disk, and can be."""
    if key not in _whole and not looks.was_held(*key) and missing > length * _LITTLE:
        LOG.debug(
            "%s: %s short, which is more than given back; left to its next start", file.path, sizes.exact(missing)
        )
        return False
    is_shared = bool(fallocate.shared(file.program_name))
    if filesystem.copies_on_write(file.fd, is_shared=is_shared):
        return False
    return strategy.holds_space(file.path)


def _fill(
    strategy: Preallocator,
    file: disk_file.DiskFile,
    extents: Sequence[fallocate.Extent],
    length: int,
    missing: int,
    filler: Optional[fallocate.Filler],
) -> None:
    available = filesystem.room(file.fd, strategy.keep_free)
    if missing > available:
        raise promise.lacking(
            file.path, f"its guest has given {sizes.exact(missing)} back", available, strategy.keep_free
        )
    # What has been filled when the space runs out all the same, stays: to make holes
    # of it again beside a guest, who may write there just then, would cost its data.
    _reserve(file, extents, 0, length, filler)


def _hold_beyond(
    strategy: Preallocator,
    file: disk_file.DiskFile,
    extents: Sequence[fallocate.Extent],
    length: int,
    end: int,
    beyond: int,
    filler: Optional[fallocate.Filler],
) -> bool:
    """Hold what is missing past a file's end; whether there was room, which nobody has been promised."""
    if beyond > filesystem.room(file.fd, strategy.keep_free):
        LOG.debug("%s: no room for %s past its end", file.path, sizes.exact(beyond))
        return False
    try:
        _reserve(file, extents, length, end, filler)
    except exceptions.NoSpace as exc:
        # Others were first, or a quota has less.
        LOG.debug("%s", exc)
        return False
    LOG.debug("%s: %s are held past its end", file.path, sizes.exact(beyond))
    return True


def _reserve(
    file: disk_file.DiskFile,
    extents: Sequence[fallocate.Extent],
    start: int,
    end: int,
    filler: Optional[fallocate.Filler],
) -> None:
    is_ours = os.access(file.path, os.W_OK)
    with fallocate.filling_by(None if is_ours else filler):
        for gap in fallocate.gaps(extents, start, end):
            fallocate.reserve(file.path, file.program_name, gap.start, gap.length)


def _remember(key: tuple[int, int], length: int, blocks: int) -> None:
    with _whole_lock:
        if len(_whole) >= _MOST_REMEMBERED:
            _whole.clear()
        _whole[key] = (length, blocks)


def forget() -> None:
    """Look at all disks again, as a new process would."""
    with _whole_lock:
        _whole.clear()
