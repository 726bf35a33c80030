# SPDX-License-Identifier: Apache-2.0
"""A quick look: whether a disk is preallocated for sure. No program is started, and nothing is written.

What is seen here is that there is nothing to do, and that the space is held.
Whatever else may be the case of a disk is for reading.
"""

from __future__ import annotations

import os
from typing import Any, Optional

from imgprealloc import cluster_map
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import lock
from imgprealloc import qcow2_header
from imgprealloc.disk_file import DiskFile
from imgprealloc.image import DiskImage
from imgprealloc.image import FileStamp
from imgprealloc.reading import SECTOR


def raw(file: DiskFile) -> Optional[DiskImage]:
    """Look at a raw disk, which is as large as its file."""
    status = os.fstat(file.fd)
    if not status.st_size or status.st_size % SECTOR:
        return None
    return _held(file, status, status.st_size, format="raw", virtual_size=status.st_size)


def qcow2(file: DiskFile) -> Optional[DiskImage]:
    """Look at a qcow2 disk: at its header and its cluster map."""
    status = os.fstat(file.fd)
    found = cluster_map.mapped(file.fd)
    if found is None:
        return None
    backing_file, backing_format = qcow2_header.backing(file.fd)
    return _held(
        file,
        status,
        max(status.st_size, found.end),
        format="qcow2",
        virtual_size=found.virtual_size,
        backing_file=backing_file,
        backing_format=backing_format,
        cluster_size=found.cluster_size,
        extended_l2=found.extended_l2,
        clusters=found.clusters,
        mapped_clusters=found.clusters,
        image_end=found.end,
    )


def _held(file: DiskFile, status: os.stat_result, worst_case_size: int, **more: Any) -> Optional[DiskImage]:
    """Describe a disk of which the filesystem holds all; None if it does not, or cannot tell."""
    # A filesystem may need blocks of its own for a file, but not fewer than it has.
    if status.st_blocks * 512 < status.st_size or (
        not filesystem.is_plain(file.fd) and filesystem.copies_on_write(file.fd, is_shared=False)
    ):
        return None
    extents = fallocate.extents(file.program_name)
    # Those that touch are one, so that the first has to be all.
    if not extents or extents[0].start or extents[0].shared or extents[0].end < worst_case_size:
        return None
    if file.stamp() != FileStamp.from_stat(status):
        return None
    return DiskImage(
        path=file.path,
        file_size=status.st_size,
        allocated_size=status.st_blocks * 512,
        worst_case_size=worst_case_size,
        held_size=worst_case_size,
        shared_bytes=0,
        copy_on_write=False,
        stamp=FileStamp.from_stat(status),
        in_use=lock.has_writer(file.fd),
        **more,
    )
