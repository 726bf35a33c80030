# SPDX-License-Identifier: Apache-2.0
"""How far an overlay's subclusters are allocated, read from its L2 tables.

A mapped cluster's subclusters may still be unallocated: the backing file shows
through them. Layout: QEMU's docs/interop/qcow2.txt, "Extended L2 Entries".
"""

from __future__ import annotations

import array
import os
import struct
from typing import Optional

from oslo_utils import units

from imgprealloc import native_thread
from imgprealloc import qcow2_header

_L1_ENTRY = struct.Struct(">Q")
# The cluster, the subclusters that read as zeros, and those that are allocated.
_L2_ENTRY = struct.Struct(">QII")
_OFFSET = 0x00FFFFFFFFFFFE00
_ALL = 0xFFFFFFFF

_SAMPLES = 64

# Where an L2 entry has those that are allocated, in units of theirs.
_ALLOCATED_AT, _ALLOCATED_EACH = 3, 4
# Bytes of L2 tables; 2 TiB have as much, in clusters of 128 KiB.
_MOST_TABLES = 256 * units.Mi


def mostly_allocated(fd: int, start: int, end: int) -> bool:
    """Whether most clusters between two places have all of their subclusters allocated, by a sample of them.

    Most and not all, because a guest's discards take some away, and its writes
    allocate some.

    :param fd: of a qcow2 file with extended L2 entries
    :param start: bytes, in the guest's disk
    :param end: bytes; a cluster that only begins before it does not count
    """
    header = qcow2_header.look(fd)
    if header is None:
        return False
    first, last = -(-start // header.cluster_size), end // header.cluster_size
    if first >= last:
        return False
    step = max(1, (last - first) // _SAMPLES)
    clusters = range(first, last, step)
    entries_a_table = header.cluster_size // _L2_ENTRY.size
    allocated = 0
    for cluster in clusters:
        index, entry = divmod(cluster, entries_a_table)
        if index >= header.l1_entries:
            break
        table = _entry(fd, _L1_ENTRY, header.l1_offset + index * _L1_ENTRY.size)[0] & _OFFSET
        if table:
            allocated += _entry(fd, _L2_ENTRY, table + entry * _L2_ENTRY.size)[2] == _ALL
    return 2 * allocated > len(clusters)


def allocated(fd: int) -> Optional[int]:
    """Count the bytes of the clusters in which a subcluster is allocated: what a copy of the overlay alone has in it.

    As its L2 tables have it at the moment, also of a disk in use.

    :param fd: of a file that may be qcow2
    :returns: None for one without extended L2 entries, or with more of them than are read here
    :raises: OSError
    """
    return native_thread.run(_allocated, fd)


def _allocated(fd: int) -> Optional[int]:
    header = qcow2_header.look(fd)
    if header is None or not header.extended_l2 or not header.has_cluster_size:
        return None
    tables = -(-header.virtual_size // (header.cluster_size // _L2_ENTRY.size * header.cluster_size))
    if tables > header.l1_entries or tables * header.cluster_size > _MOST_TABLES:
        return None
    table = os.pread(fd, tables * _L1_ENTRY.size, header.l1_offset)
    if len(table) != tables * _L1_ENTRY.size:
        return None
    clusters = 0
    for (entry,) in _L1_ENTRY.iter_unpack(table):
        if entry & _OFFSET:
            found = os.pread(fd, header.cluster_size, entry & _OFFSET)
            # Whether any is: the order of the bytes has no say in that.
            marks = array.array("I", found[: len(found) // _L2_ENTRY.size * _L2_ENTRY.size])
            marks = marks[_ALLOCATED_AT::_ALLOCATED_EACH]
            clusters += len(marks) - marks.count(0)
    return clusters * header.cluster_size


def _entry(fd: int, entry: struct.Struct, offset: int) -> tuple[int, ...]:
    read = os.pread(fd, entry.size, offset)
    return entry.unpack(read) if len(read) == entry.size else (0, 0, 0)
