# SPDX-License-Identifier: Apache-2.0
"""What a guest that runs has given back of its disk's file is set aside again.

Only holes within the file are filled, whatever its format is: no program reads
the disk, nothing of it is believed, and the file becomes no longer. Neither
content nor length changes, so that whatever else is done to the disk meanwhile
may go on, and nobody waits.
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
from imgprealloc import sizes
from imgprealloc.preallocator import Preallocator

LOG = logging.getLogger(__name__)

# What a disk may lack that nobody has seen whole: one that was thin when it was
# started, or copied, is for its next start.
_LITTLE = 0.1

_MOST_REMEMBERED = 10_000

# By device and inode: the length and the blocks of files that were seen without holes.
_whole: dict[tuple[int, int], tuple[int, int]] = {}
_whole_lock = threading.Lock()


def refill(strategy: Preallocator, path: str, filler: Optional[fallocate.Filler] = None) -> int:
    """Fill the holes of a disk that had none, and return how many bytes they had.

    A disk in which nothing has changed costs one stat(2), one whose guest has
    written to it a look at its extents.

    :param filler: fills them where the disk is not ours to write
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
        if missing and not _is_to_have_it(strategy, file, key, missing, length):
            return 0
        if missing:
            _fill(strategy, file, extents, length, missing, filler)
        _remember(key, length, os.fstat(file.fd).st_blocks)
    log.forget_one("given back", path)
    return missing


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
    is_ours = os.access(file.path, os.W_OK)
    # What has been filled when the space runs out all the same, stays: to make holes
    # of it again beside a guest, who may write there just then, would cost its data.
    with fallocate.filling_by(None if is_ours else filler):
        for gap in fallocate.gaps(extents, 0, length):
            fallocate.reserve(file.path, file.program_name, gap.start, gap.length)
    LOG.info("%s: what its guest had given back, %s, is set aside again", file.path, sizes.exact(missing))


def _remember(key: tuple[int, int], length: int, blocks: int) -> None:
    with _whole_lock:
        if len(_whole) >= _MOST_REMEMBERED:
            _whole.clear()
        _whole[key] = (length, blocks)


def forget() -> None:
    """Look at all disks again, as a new process would."""
    with _whole_lock:
        _whole.clear()
