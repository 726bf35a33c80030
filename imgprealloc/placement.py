# SPDX-License-Identifier: Apache-2.0
"""Where a disk's bytes are: a qcow2 disk's in its file, a raw disk's on the storage below the filesystem.

For pictures. It looks for no faults, and whether a disk has its space is for
reading. Tables that a guest may have written are bounded before they are read.
"""

from __future__ import annotations

import array
from collections.abc import Iterator
import itertools
import operator
import os
import stat
import sys
from typing import Optional

from oslo_utils import units

from imgprealloc import backing
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import qcow2_header
from imgprealloc import zeros
from imgprealloc.disk_file import DiskFile
from imgprealloc.layout import Kind
from imgprealloc.layout import Layout
from imgprealloc.layout import Stretch
from imgprealloc.layout import laid_out
from imgprealloc.qcow2_header import Header

# 8 TiB have as much, in clusters of 64 KiB, or of 128 KiB with subclusters.
_MOST_TABLES = units.Gi
# Of a file, of which it is noted whether they are written.
_MOST_CLUSTERS = 256 * units.Mi

# In an entry: where the cluster is, that it is compressed, that it reads as zeros.
_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_ZEROS = 1 << 0
_ENTRY = 8
_ENTRY_WITH_SUBCLUSTERS = 16


def raw(file: DiskFile) -> Layout:
    """Lay out a raw disk: what the guest sees, and where the filesystem has put it.

    What is still in the page cache counts as unwritten.

    :raises: UnsupportedFilesystem, OSError
    """
    size = os.fstat(file.fd).st_size
    low, high = sys.maxsize, 0
    try:
        for extent in fallocate.placed(file.fd):
            if extent.place is not None:
                low, high = min(low, extent.place), max(high, extent.place + extent.length)
        return laid_out(size, "on the storage", min(low, high), high, _raw(file.fd, size))
    except OSError as exc:
        if exc.errno not in fallocate.NOT_SUPPORTED:
            raise
        raise exceptions.UnsupportedFilesystem(
            file.path,
            "its filesystem does not tell where on the storage a file's bytes are",
            "A raw disk there has no layout that could be shown; its state is in imgprealloc show.",
        ) from exc


def _raw(fd: int, size: int) -> Iterator[Stretch]:
    position = 0
    # What is set aside beyond its end is no part of the disk.
    for start, length, place, unwritten, shared in fallocate.placed(fd):
        length = min(length, size - start)
        if length <= 0:
            break
        if start > position:
            yield Stretch(position, start - position, None, "nothing")
        # One that has no place yet has data, or it would not be there.
        kind: Kind = "unwritten" if unwritten else "shared" if shared else "data"
        yield Stretch(start, length, place, kind)
        position = start + length
    if size > position:
        yield Stretch(position, size - position, None, "nothing")


def qcow2(file: DiskFile) -> Layout:
    """Lay out a qcow2 disk by its cluster map: what the guest sees, and where in the file it is.

    :raises: FormatMismatch, BrokenImage, UnsupportedFormat for a map that is too
        large, OSError
    """
    header = qcow2_header.read(file.path, file.fd)
    length = os.fstat(file.fd).st_size
    entry = _ENTRY_WITH_SUBCLUSTERS if header.extended_l2 else _ENTRY
    clusters = -(-header.virtual_size // header.cluster_size)
    if clusters * entry > _MOST_TABLES or length > _MOST_CLUSTERS * header.cluster_size:
        raise exceptions.UnsupportedFormat(
            file.path,
            f"{clusters} clusters of {header.cluster_size} bytes are too many for a picture",
            "Show disks up to 8 TiB (clusters of 64 KiB); its state is in imgprealloc show.",
        )
    stretches = _qcow2(file.fd, header, _base_end(file, header), clusters)
    return laid_out(header.virtual_size, "in the file", 0, length, stretches)


def _below(base_end: int, start: int, length: int) -> Iterator[Stretch]:
    """List what shows in a stretch of a disk that has no place in its file."""
    of_base = min(max(0, base_end - start), length)
    if of_base:
        yield Stretch(start, of_base, None, "base")
    if of_base < length:
        yield Stretch(start + of_base, length - of_base, None, "nothing")


def _base_end(file: DiskFile, header: Header) -> int:
    """Return where the backing file of a disk ends; the disk's own end, where that is not plain to see."""
    if header.backing_file is None:
        return 0
    if header.backing_format == "raw" and not backing.names_protocol(header.backing_file):
        try:
            status = os.stat(file.beside(header.backing_file))
        except (OSError, ValueError):
            return header.virtual_size
        if stat.S_ISREG(status.st_mode):
            return status.st_size
    return header.virtual_size


def _qcow2(fd: int, header: Header, base_end: int, clusters: int) -> Iterator[Stretch]:
    cluster_size = header.cluster_size
    entry = _ENTRY_WITH_SUBCLUSTERS if header.extended_l2 else _ENTRY
    a_table = cluster_size // entry
    written = _written(fd, cluster_size)
    tables = -(-clusters // a_table)
    l1_size = min(tables, header.l1_entries) * _ENTRY
    l1_table = _entries(os.pread(fd, l1_size, min(header.l1_offset, os.fstat(fd).st_size)))
    for number in range(tables):
        first = number * a_table
        count = min(a_table, clusters - first)
        start, end = first * cluster_size, min((first + count) * cluster_size, header.virtual_size)
        table = l1_table[number] & _OFFSET if number < len(l1_table) else 0
        read = os.pread(fd, count * entry, table) if table else b""
        if len(read) < count * entry:
            yield from _below(base_end, start, end - start)
            continue
        found = _entries(read)
        allocated = bytes(map(bool, _entries(read, "I")[3::4])) if header.extended_l2 else None
        for at, length, place, kind in _table(found[:: entry // _ENTRY], cluster_size, allocated, written):
            length = min(length, end - start - at)
            if place is None and kind == "base":
                yield from _below(base_end, start + at, length)
            else:
                yield Stretch(start + at, length, place, kind)


def _table(
    entries: array.array[int], cluster_size: int, allocated: Optional[bytes], written: bytes
) -> Iterator[Stretch]:
    """List what an L2 table has, from its first cluster on; "base" stands for all that shows what is below.

    :param allocated: of each cluster, whether one of its subclusters is; None
        where it has none
    :param written: of each cluster of the file, whether it is
    """
    count = len(entries)
    # Of a compressed cluster's entry; above is its length.
    offset_bits = 71 - cluster_size.bit_length()
    steps = map(operator.sub, itertools.islice(entries, 1, None), entries)
    # Each that does not follow the one before it in the file.
    breaks = itertools.compress(range(1, count), map(cluster_size.__ne__, steps))
    first = 0
    for end in itertools.chain(breaks, (count,)):
        start, length, entry = first * cluster_size, (end - first) * cluster_size, entries[first]
        place = entry & _OFFSET
        if entry & _COMPRESSED:
            yield Stretch(start, length, entry & ((1 << offset_bits) - 1), "data")
        elif not place:
            # A cluster that is marked as zeros hides what is below.
            yield Stretch(start, length, None, "nothing" if entry & _ZEROS else "base")
        else:
            is_data = bytes(end - first)
            if not entry & _ZEROS:
                at = place // cluster_size
                is_data = written[at : at + end - first].ljust(end - first, b"\0")
            if allocated is not None:
                is_data = bytes(map(operator.and_, is_data, allocated[first:end]))
            for begin, stop, kind in _alike(is_data):
                begun = begin * cluster_size
                yield Stretch(start + begun, (stop - begin) * cluster_size, place + begun, kind)
        first = end


def _alike(is_data: bytes) -> Iterator[tuple[int, int, Kind]]:
    """Split flags into stretches of those that are alike."""
    begin = 0
    while begin < len(is_data):
        other = is_data.find(b"\0" if is_data[begin] else b"\1", begin)
        stop = len(is_data) if other < 0 else other
        yield begin, stop, "data" if is_data[begin] else "unwritten"
        begin = stop


def _written(fd: int, cluster_size: int) -> bytes:
    """Tell of each cluster of a file whether anything was written there."""
    flags = bytearray(-(-os.fstat(fd).st_size // cluster_size))
    for first, end in zeros.written(fd, cluster_size):
        flags[first:end] = b"\1" * (end - first)
    return bytes(flags)


def _entries(read: bytes, kind: str = "Q") -> array.array[int]:
    """Return a table's numbers; what is left at its end is none."""
    entries = array.array(kind)
    entries.frombytes(read[: len(read) // entries.itemsize * entries.itemsize])
    if sys.byteorder == "little":
        entries.byteswap()
    return entries
