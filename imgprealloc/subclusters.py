# SPDX-License-Identifier: Apache-2.0
"""How far an overlay's subclusters are allocated, read from its L2 tables.

A mapped cluster's subclusters may still be unallocated: the backing file shows
through them. Layout: QEMU's docs/interop/qcow2.txt, "Extended L2 Entries".
"""

from __future__ import annotations

import os
import struct

from imgprealloc import qcow2_header

_L1_ENTRY = struct.Struct(">Q")
# The cluster, the subclusters that read as zeros, and those that are allocated.
_L2_ENTRY = struct.Struct(">QII")
_OFFSET = 0x00FFFFFFFFFFFE00
_ALL = 0xFFFFFFFF

_SAMPLES = 64


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


def _entry(fd: int, entry: struct.Struct, offset: int) -> tuple[int, ...]:
    read = os.pread(fd, entry.size, offset)
    return entry.unpack(read) if len(read) == entry.size else (0, 0, 0)
