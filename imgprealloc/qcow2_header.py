# SPDX-License-Identifier: Apache-2.0
"""The one question that qemu-img does not answer: does a qcow2 file hold anything at all?

That no cluster is allocated (qemu-img check) is not enough: a cluster that the
guest has zeroed hides the backing file without being allocated. But every
cluster, zeroed ones too, has its entry in an L2 table, so that a file without
L2 tables reads like its backing file, everywhere. Layout: QEMU's
docs/interop/qcow2.txt.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from typing import Optional

from imgprealloc import exceptions

MAGIC = b"QFI\xfb"

# magic, version, backing file's offset and length, cluster bits, size,
# encryption, L1 entries and offset, refcount table's offset and clusters,
# snapshots and their offset
_VERSION_2 = struct.Struct(">4sIQIIQIIQQIIQ")
# incompatible, compatible, autoclear features, refcount order, header length
_VERSION_3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA

# Dirty, corrupt, and so on: anything but the subclusters of extended_l2.
_SUBCLUSTERS = 1 << 4

_GREATEST_L1 = 32 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Blank:
    """A qcow2 file without anything in it, as its header describes it. Sizes are bytes.

    :param end: where the last of its tables ends
    :param modified: the file's mtime in nanoseconds
    """

    virtual_size: int
    cluster_size: int
    end: int
    modified: int
    backing_file: Optional[str]
    backing_format: Optional[str]


def blank(path: str) -> Blank | None:
    """Read the header of a qcow2 file that holds nothing, or return None.

    None too where there is more to the file than tables without entries:
    snapshots, bitmaps, encryption, an external data file, a fault.
    """
    with open(path, "rb") as file:
        modified = os.fstat(file.fileno()).st_mtime_ns
        head = file.read(4096)
        if len(head) < _VERSION_2.size:
            return None
        (
            magic, version, backing_offset, backing_length, cluster_bits, size, encryption,
            l1_entries, l1_offset, refcounts_offset, refcounts_clusters, snapshots, _,
        ) = _VERSION_2.unpack_from(head)  # fmt: skip
        if magic != MAGIC or version not in (2, 3) or encryption or snapshots or not 9 <= cluster_bits <= 21:
            return None
        incompatible, header_length = 0, _VERSION_2.size
        if version == 3:
            if len(head) < _VERSION_2.size + _VERSION_3.size:
                return None
            incompatible, _, autoclear, _, header_length = _VERSION_3.unpack_from(head, _VERSION_2.size)
            if incompatible & ~_SUBCLUSTERS or autoclear:
                return None
        if l1_entries * 8 > _GREATEST_L1 or backing_offset + backing_length > len(head):
            return None
        file.seek(l1_offset)
        l1_table = file.read(l1_entries * 8)
        if len(l1_table) != l1_entries * 8 or any(l1_table):
            return None
    cluster_size = 1 << cluster_bits
    entry_size = 16 if incompatible & _SUBCLUSTERS else 8
    if l1_entries * (cluster_size // entry_size) * cluster_size < size:
        return None
    if not backing_offset:
        backing_length = 0
    backing_file = head[backing_offset : backing_offset + backing_length].decode(errors="surrogateescape")
    backing_format = _extension(head, header_length, _BACKING_FORMAT)
    if "\0" in backing_file or "\0" in (backing_format or ""):
        return None
    return Blank(
        size,
        cluster_size,
        max(l1_offset + l1_entries * 8, refcounts_offset + refcounts_clusters * cluster_size),
        modified,
        backing_file or None,
        backing_format,
    )


def can_zero_clusters(path: str) -> bool:
    """Whether the format has a mark for a cluster that reads as zeros: since version 3 (compat=1.1)."""
    with open(path, "rb") as file:
        head = file.read(_VERSION_2.size)
    return len(head) == _VERSION_2.size and _VERSION_2.unpack(head)[1] >= 3


def begins(path: str) -> bool:
    """Whether a file begins like qcow2; False for none that can be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def require(path: str) -> None:
    """Refuse a file that does not begin like qcow2.

    :raises: FormatMismatch
    """
    virtual_size(path)


def virtual_size(path: str) -> int:
    """Return the virtual size, in bytes, that a qcow2 file's header has.

    :raises: FormatMismatch
    """
    with open(path, "rb") as file:
        head = file.read(_VERSION_2.size)
    if len(head) < _VERSION_2.size or not head.startswith(MAGIC):
        raise exceptions.FormatMismatch(
            path, "it is said to be qcow2, but has no qcow2 header", "Say raw if that is what it is."
        )
    return int(_VERSION_2.unpack(head)[5])


def _extension(head: bytes, offset: int, wanted: int) -> str | None:
    while offset + _EXTENSION.size <= len(head):
        kind, length = _EXTENSION.unpack_from(head, offset)
        offset += _EXTENSION.size
        if kind == wanted:
            return head[offset : offset + length].decode(errors="surrogateescape")
        if kind == 0:
            break
        offset += -(-length // 8) * 8
    return None
