# SPDX-License-Identifier: Apache-2.0
"""Refcounts of a qcow2 file beyond its end, as a growth leaves them that is killed; qemu-img check does not see them.

The next growth finds clusters in use where it wants to begin, and qemu-img
aborts (qcow2-refcount.c, qcow2_refcount_area). Layout: QEMU's
docs/interop/qcow2.txt.
"""

from __future__ import annotations

import array
import os
import sys

from oslo_utils import units

from imgprealloc import qcow2_header

_ENTRY = 8
_OFFSET = 0xFFFFFFFFFFFFFE00
# A table of so many bytes is for petabytes.
_MOST_TABLE = 8 * units.Mi


def end_beyond(fd: int, file_size: int) -> int:
    """Return where the last cluster ends that has a refcount and begins beyond the end of the file; 0 for none.

    :param file_size: bytes
    """
    header = qcow2_header.look(fd)
    if header is None or not header.has_cluster_size:
        return 0
    cluster_size = header.cluster_size
    in_a_block = cluster_size * 8 // header.refcount_bits
    first = file_size // cluster_size // in_a_block
    length = min(header.refcount_table_clusters * cluster_size, _MOST_TABLE) - first * _ENTRY
    if length <= 0 or header.refcount_table_offset > file_size:
        return 0
    table = os.pread(fd, length, header.refcount_table_offset + first * _ENTRY)
    blocks = array.array("Q", table[: len(table) // _ENTRY * _ENTRY])
    if sys.byteorder == "little":
        blocks.byteswap()
    for number in range(len(blocks) - 1, -1, -1):
        offset = blocks[number] & _OFFSET
        if not offset or offset > file_size:
            continue
        counted = os.pread(fd, cluster_size, offset).rstrip(b"\0")
        if counted:
            # Of several in a byte, the first are its lowest bits.
            bit = (len(counted) - 1) * 8 + counted[-1].bit_length() - 1
            last = (first + number) * in_a_block + bit // header.refcount_bits
            # A file may end within its last cluster.
            return (last + 1) * cluster_size if last * cluster_size >= file_size else 0
    return 0
