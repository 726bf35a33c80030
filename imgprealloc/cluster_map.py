# SPDX-License-Identifier: Apache-2.0
"""A qcow2 file's cluster map, read without qemu-img: whether each cluster has a place that is its own.

And how many have one after the disk's end, which qemu-img check does not tell.

What it says yes to is fully mapped. What it says no to may be that too, or
damaged, or anything: qemu-img check tells. It looks for no faults, and is as
safe as a read: what a header asks it to read is bounded before anything is.
Layout: QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import array
import dataclasses
import itertools
import operator
import os
import sys
from typing import Optional

from oslo_utils import units

from imgprealloc import native_thread
from imgprealloc import qcow2_header

# A table's entry: in its first byte COPIED, which says that the cluster is in
# use by it alone, and nothing else; its last byte has the mark of a cluster
# that reads as zeros. Between them is the offset, a multiple of 512.
_COPIED = b"\x80"
_ENTRY = 8
_ENTRY_WITH_SUBCLUSTERS = 16
_OFFSET = 0x00FFFFFFFFFFFE00

# 2 TiB have as much, in clusters of 128 KiB with subclusters or of 64 KiB without.
_MOST_TABLES = 256 * units.Mi
_A_READ = units.Mi


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A qcow2 file in which no write allocates a cluster. Sizes are bytes.

    :param end: where the last cluster that the map tells of ends
    """

    virtual_size: int
    cluster_size: int
    clusters: int
    extended_l2: bool
    end: int


def mapped(fd: int) -> Optional[Mapped]:
    """Read a cluster map, if all of it is plain and every cluster is in it; None for all else.

    :param fd: an open file that may be qcow2, also one in use
    """
    return native_thread.run(_mapped, fd)


def _mapped(fd: int) -> Optional[Mapped]:
    status = os.fstat(fd)
    header = qcow2_header.look(fd)
    if header is None or not header.is_plain:
        return None
    size, cluster_size = header.virtual_size, header.cluster_size
    # Each cluster has to be in the file, whose space is really there: with that,
    # there is no more to read than a file of this size can have.
    if not size or size > status.st_size or status.st_blocks * 512 < status.st_size:
        return None
    entry = _ENTRY_WITH_SUBCLUSTERS if header.extended_l2 else _ENTRY
    clusters = -(-size // cluster_size)
    tables = -(-clusters // (cluster_size // entry))
    if clusters * entry > _MOST_TABLES or tables > header.l1_entries:
        return None
    if header.l1_offset > status.st_size:
        return None
    # Of one that is damaged, qemu-img tells.
    if not _has_refcounts(fd, status.st_size, header):
        return None
    l1_table = _offsets(os.pread(fd, tables * _ENTRY, header.l1_offset), tables, _ENTRY)
    if l1_table is None:
        return None
    end, last = max(l1_table) + cluster_size, 0
    left = clusters * entry
    for table in l1_table:
        for position in range(0, min(cluster_size, left), _A_READ):
            length = min(cluster_size - position, left - position, _A_READ)
            offsets = _offsets(os.pread(fd, length, table + position), length // entry, entry)
            if offsets is None:
                return None
            # As they are made. What a guest has allocated in another order is for
            # qemu-img, which finds a place that two clusters have.
            if offsets[0] < last or not _ascend(offsets):
                return None
            last = offsets[-1] + cluster_size
        left -= cluster_size
    end = max(end, last)
    if end > status.st_size:
        return None
    return Mapped(size, cluster_size, clusters, header.extended_l2, end)


def beyond_end(fd: int, header: qcow2_header.Header, virtual_size: int) -> int:
    """Count the clusters that a map has after the disk's end, as a growth leaves them that is killed.

    :param fd: of an image that QEMU has opened
    :param virtual_size: in bytes, as QEMU has it
    :raises: OSError
    """
    return native_thread.run(_beyond_end, fd, header, virtual_size)


def _beyond_end(fd: int, header: qcow2_header.Header, virtual_size: int) -> int:
    cluster_size = header.cluster_size
    entry = _ENTRY_WITH_SUBCLUSTERS if header.extended_l2 else _ENTRY
    table, first = divmod(-(-virtual_size // cluster_size), cluster_size // entry)
    tables = min(header.l1_entries - table, _MOST_TABLES // cluster_size)
    if tables <= 0:
        return 0
    found = 0
    for offset in _numbers(os.pread(fd, tables * _ENTRY, header.l1_offset + table * _ENTRY), _ENTRY):
        if offset & _OFFSET:
            start = first * entry
            entries = os.pread(fd, cluster_size - start, (offset & _OFFSET) + start)
            found += sum(1 for number in _numbers(entries, entry) if number & _OFFSET)
        first = 0
    return found


def _numbers(entries: bytes, entry: int) -> array.array[int]:
    """Return the first number of each entry."""
    numbers = array.array("Q", entries[: len(entries) // entry * entry])[:: entry // _ENTRY]
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def _ascend(offsets: array.array[int]) -> bool:
    """Whether each is greater than the one before it."""
    return all(map(operator.lt, offsets, itertools.islice(offsets, 1, None)))


def _has_refcounts(fd: int, file_size: int, header: qcow2_header.Header) -> bool:
    """Whether the refcount table is in the file, and so are the blocks that a file of this size has at the least."""
    cluster_size, offset, clusters = header.cluster_size, header.refcount_table_offset, header.refcount_table_clusters
    # A block has the most refcounts where each has but a bit.
    least = max(1, file_size // (cluster_size * cluster_size * 8))
    if not offset or offset % cluster_size or offset + clusters * cluster_size > file_size:
        return False
    if least * _ENTRY > clusters * cluster_size:
        return False
    blocks = array.array("Q", os.pread(fd, least * _ENTRY, offset))
    if sys.byteorder == "little":
        blocks.byteswap()
    return len(blocks) == least and all(
        block and not block % cluster_size and block + cluster_size <= file_size for block in blocks
    )


def _offsets(entries: bytes, count: int, entry: int) -> Optional[array.array[int]]:
    """Return where the clusters are that a table points to; None if it is not plain."""
    if len(entries) != count * entry:
        return None
    if entries[::entry] != _COPIED * count or entries[_ENTRY - 1 :: entry].count(0) != count:
        return None
    unmarked = bytearray(entries)
    unmarked[::entry] = bytes(count)
    offsets = array.array("Q", bytes(unmarked))[:: entry // _ENTRY]
    if sys.byteorder == "little":
        offsets.byteswap()
    # A cluster at 0 is none.
    return offsets if min(offsets) else None
