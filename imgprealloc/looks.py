# SPDX-License-Identifier: Apache-2.0
"""One look at a disk that has not changed, however often Nova asks of it; what was found, is remembered here.

Of one start Nova asks twice, by two objects that know nothing of each other: as
it describes the guest, and as it looks after the disks. What is remembered is
believed as long as the file's inode says the same of it. Where another file may
come to share its extents, of which its inode tells nothing (cp --reflink on XFS
and btrfs), the extents are looked at again.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
import time
from typing import Optional

from oslo_utils import units

from imgprealloc import disk_file
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import lock
from imgprealloc import os_errors
from imgprealloc.disk_file import DiskFile
from imgprealloc.image import DiskImage
from imgprealloc.image import FileStamp
from imgprealloc.preallocator import FORMATS
from imgprealloc.preallocator import Preallocator

# A host has hundreds of disks; of one that is pushed out there is a new look.
_MOST_REMEMBERED = 10_000

# Nanoseconds: a kernel's clock for inodes moves on in steps of up to 10 ms. Two
# changes within one look the same.
_STEP = 20 * units.Mi

# By device, inode and format.
_seen: collections.OrderedDict[tuple[int, int, str], DiskImage] = collections.OrderedDict()
_seen_lock = threading.Lock()


def at(strategy: Preallocator, path: str, format: str) -> DiskImage:
    """Look at a disk: in memory, then quickly, and only then as Preallocator.inspect() does, by a program.

    :raises: as inspect() does
    """
    found = None
    if format in FORMATS:
        with os_errors.translated(path), disk_file.opened(path) as file:
            found = _remembered(file, format) or FORMATS[format](strategy).glance(file)
    if found is None:
        found = strategy.inspect(path, format=format)
    remember(found)
    return found


def remember(found: DiskImage) -> None:
    """Remember what a look has found, if the disk is still that, and would be seen to change from now on."""
    try:
        status = os.stat(found.path)
    except OSError:
        return
    if not _is_of(found, status) or time.time_ns() - found.stamp.changed < _STEP:
        return
    with _seen_lock:
        key = (status.st_dev, status.st_ino, found.format)
        _seen[key] = found
        _seen.move_to_end(key)
        if len(_seen) > _MOST_REMEMBERED:
            _seen.popitem(last=False)


def was_held(device: int, inode: int) -> bool:
    """Whether all space of a file was held when it was last looked at, whatever has become of it since."""
    with _seen_lock:
        return any((found := _seen.get((device, inode, format))) is not None and found.held for format in FORMATS)


def forget() -> None:
    """Look at all disks again, as a new process would."""
    with _seen_lock:
        _seen.clear()


def _remembered(file: DiskFile, format: str) -> Optional[DiskImage]:
    status = os.fstat(file.fd)
    with _seen_lock:
        found = _seen.get((status.st_dev, status.st_ino, format))
    if found is None or not _is_of(found, status):
        return None
    if not filesystem.is_plain(file.fd) and not _has_same_extents(file, found):
        return None
    return dataclasses.replace(found, path=file.path, in_use=lock.has_writer(file.fd))


def _is_of(found: DiskImage, status: os.stat_result) -> bool:
    return found.stamp == FileStamp.from_stat(status) and found.allocated_size == status.st_blocks * 512


def _has_same_extents(file: DiskFile, found: DiskImage) -> bool:
    extents = fallocate.extents(file.program_name)
    if extents is None:
        # Then the blocks were counted, which are as they were.
        return True
    shared = (extent for extent in extents if extent.shared)
    return (
        fallocate.held(extents, found.worst_case_size) == found.held_size
        and fallocate.held(shared, found.worst_case_size) == found.shared_bytes
    )
