# SPDX-License-Identifier: Apache-2.0
"""What a disk file is, as values. Nothing here reads or changes a file."""

from __future__ import annotations

import dataclasses
import os
from typing import Literal, Optional

State = Literal["thin", "reserved", "mapped", "preallocated"]


@dataclasses.dataclass(frozen=True)
class FileStamp:
    """What changes in a file's inode when the file is replaced or written: two that are equal are of one content.

    :param size: bytes
    :param modified: mtime in nanoseconds
    :param changed: ctime in nanoseconds, which nobody can set back
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def from_stat(cls, status: os.stat_result) -> FileStamp:
        """Take a stamp from what stat(2) says."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclasses.dataclass(frozen=True)
class DiskImage:
    """A disk image file as it stood when it was read. Sizes are bytes.

    :param path: the file, as the caller named it
    :param format: "raw" or "qcow2"
    :param virtual_size: what the guest sees
    :param file_size: the file's length
    :param allocated_size: st_blocks * 512; on a filesystem with reflinks and
        beyond the file's end this says less than it seems to
    :param worst_case_size: the length that the file may grow to
    :param held_size: how much of worst_case_size the filesystem has set aside
        for this file, shared or not
    :param shared_bytes: how much of held_size belongs to another file too
    :param copy_on_write: whether each overwrite takes new space (btrfs
        without nocow, ZFS)
    :param in_use: whether QEMU had it open for writing
    :param backing_file: exactly as the header has it
    :param backing_format: the same; None where it says none
    :param cluster_size: bytes; None where the format has no clusters
    :param extended_l2: whether a cluster has subclusters
    :param clusters: of the whole virtual size; None where the format has no
        cluster map
    :param mapped_clusters: those that a write need not allocate
    :param fragmented_clusters: those that do not follow their predecessor
    :param compressed_clusters: those that move when they are written
    :param leaked_clusters: those that are in use by nothing: of a crash, or
        because the table that points to them cannot be found any more
    :param image_end: where the last cluster in use ends
    :param stamp: the file that was read, for whoever is about to replace it
    :param waits_for_repair: whether QEMU writes all its refcounts anew before
        anybody writes to it
    :param snapshots: internal snapshots, each of which makes mapped clusters
        copy on write again
    :param bitmaps: persistent dirty bitmaps that are up to date
    """

    path: str
    format: str
    virtual_size: int
    file_size: int
    allocated_size: int
    worst_case_size: int
    held_size: int
    shared_bytes: int
    copy_on_write: bool
    # Of the moment, and so nothing that two looks at a disk could agree in.
    stamp: FileStamp = dataclasses.field(compare=False)
    in_use: bool = False
    backing_file: Optional[str] = None
    backing_format: Optional[str] = None
    cluster_size: Optional[int] = None
    extended_l2: bool = False
    clusters: Optional[int] = None
    mapped_clusters: Optional[int] = None
    fragmented_clusters: Optional[int] = None
    compressed_clusters: int = 0
    leaked_clusters: int = 0
    image_end: int = 0
    waits_for_repair: bool = False
    snapshots: int = 0
    bitmaps: int = 0

    @property
    def mapped(self) -> bool:
        """Whether no write by the guest allocates a cluster."""
        return self.clusters == self.mapped_clusters and not self.snapshots

    @property
    def held(self) -> bool:
        """Whether the filesystem has set aside all that the guest may write."""
        return self.shortfall == 0

    @property
    def state(self) -> State:
        """What the disk is; raw has no map, and so is thin or preallocated."""
        if self.mapped:
            if self.held:
                return "preallocated"
            return "thin" if self.clusters is None else "mapped"
        return "reserved" if self.held else "thin"

    @property
    def shortfall(self) -> int:
        """Bytes that the filesystem may still be asked for, in the worst case."""
        if self.copy_on_write:
            return self.worst_case_size
        return self.worst_case_size - self.held_size + self.shared_bytes

    @property
    def has_stray_bytes(self) -> bool:
        """Whether a file with a cluster map goes on after its image's last cluster."""
        return self.cluster_size is not None and self.file_size > -(-self.image_end // self.cluster_size) * (
            self.cluster_size
        )
