# SPDX-License-Identifier: Apache-2.0
"""How long a qcow2 file can become by what its guest writes.

QEMU's allocator (block/qcow2-refcount.c, alloc_clusters_noref) takes the first
free clusters that follow each other and are enough for a whole request; there
is no way for a guest to have it look anywhere but from the lowest free cluster
on, or from where it was last. So, from a file's last cluster on, a file grows by
no more than

* a cluster for each one of the guest's that has none of its own yet,
* all L2 tables: most may be missing, and with a snapshot each is copied,
* a refcount block for each stretch of the file that one describes,
* and, where the refcount table has to move because it is full, by what
  qcow2_refcount_area sets up behind it: it begins where a refcount block's
  stretch does, so that a gap is left, which longer requests may not fit in. With
  clusters of 64 KiB and refcounts of 16 bits that is past 16 TiB; with 512 bytes,
  past 8 MiB.

This is a bound for all writes and zero writes while the guest gives no cluster
back; and also where it does, if no request spans more than one cluster, because
then the lowest free cluster is taken each time. A discard or a zero write that
may unmap gives clusters back (with virtio-blk and QEMU before 9.1, a zero write
even with discard=ignore; in a file of version 2 without a backing file, any). A
longer request skips such gaps as are too small for it. There is no bound for
that in the file's shape: a cluster that was given back may cost a new one as
often as that is done. So it grows past this by no more than what was given back
since, with its refcounts, and the next look tells what it can become from there.
What had been given back before a look is taken to be there for the next requests
(reusable()), which it is as far as they fit in.

Layout: QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import dataclasses

from oslo_utils import units

from imgprealloc.qcow2_header import Header

# Of a refcount table and an L1 table, in bytes.
_ENTRY = 8
_L2_ENTRY = 8
_EXTENDED_L2_ENTRY = 16

# QEMU splits what is longer (BDRV_REQUEST_MAX_BYTES).
_LONGEST_REQUEST = 2 * units.Gi

# From here on no refcount table moves that a disk of up to some hundred GiB has.
_ORDINARY_CLUSTER_SIZE = 16 * units.Ki

# Clusters that QEMU has passed over as a file grew.
_GAPS = 64

# New refcount blocks that are placed behind a request before the table moves.
_BLOCKS_BEHIND = 3


def size(header: Header, image_end: int, clusters: int, growing: int) -> int:
    """Return the length that a qcow2 file can grow to, in bytes.

    :param image_end: where the last cluster in use ends
    :param clusters: of the virtual size
    :param growing: those that may still be allocated, of a guest that gives none back
    """
    if not growing:
        return image_end
    cluster_size = header.cluster_size
    in_a_block = cluster_size * 8 // header.refcount_bits
    in_an_l2_table = cluster_size // (_EXTENDED_L2_ENTRY if header.extended_l2 else _L2_ENTRY)
    longest = min(in_an_l2_table, max(1, _LONGEST_REQUEST // cluster_size))
    end = _divided(image_end, cluster_size) + growing + _divided(clusters, in_an_l2_table)
    entries = header.refcount_table_clusters * (cluster_size // _ENTRY)
    while _with_refcounts(end, in_a_block) > entries * in_a_block:
        full = entries * in_a_block
        start = (full // in_a_block + _divided(longest + _BLOCKS_BEHIND, in_a_block)) * in_a_block
        blocks, table = _moved(start, cluster_size, in_a_block)
        # No refcount of these clusters is there yet.
        end += start - full + blocks - start // in_a_block + table
        # The next move comes the sooner, the less far this one has gone.
        entries = _moved(full + in_a_block, cluster_size, in_a_block)[1] * (cluster_size // _ENTRY)
    return _with_refcounts(end, in_a_block) * cluster_size


def repaired(header: Header, image_end: int) -> tuple[Header, int]:
    """Return what QEMU may make of a header, and of where the last cluster in use ends, as it repairs refcounts.

    It writes a new table and new blocks, at worst behind all else, and then frees
    the old ones (qcow2-refcount.c, rebuild_refcount_structure). The table is
    no longer than it has to be, and begun anew as it grows. What is freed goes back to
    the filesystem, also with discard=ignore, and is missed at the next look.
    """
    cluster_size = header.cluster_size
    end = _divided(image_end, cluster_size)
    blocks, table = _moved(end, cluster_size, cluster_size * 8 // header.refcount_bits)
    least = _divided(blocks, cluster_size // _ENTRY)
    anew = dataclasses.replace(header, refcount_table_clusters=min(header.refcount_table_clusters, least))
    return anew, (end + blocks + 2 * table) * cluster_size


def length(virtual_size: int, cluster_size: int, *, extended_l2: bool, refcount_bits: int = 16) -> int:
    """Return how long a qcow2 file is at the most that qemu-img makes with all its clusters mapped, in bytes.

    That is its clusters and their L2 tables, an L1 table, the place of one from
    which it has moved as the disk was grown, a header, a refcount table, and
    refcount blocks.
    """
    clusters = _divided(virtual_size, cluster_size)
    l2_tables = _divided(clusters, cluster_size // (_EXTENDED_L2_ENTRY if extended_l2 else _L2_ENTRY))
    in_a_block = cluster_size * 8 // refcount_bits
    end = clusters + l2_tables + 2 * _divided(l2_tables * _ENTRY, cluster_size) + 2
    return _with_refcounts(end, in_a_block) * cluster_size


def reusable(header: Header, image_end: int, clusters: int, in_use: int) -> int:
    """Return how many clusters within a file are free for sure, and so are taken before it grows.

    A guest that zeroes its whole disk frees all of it: to count these clusters as
    lost would have the host hold twice the disk. Of small clusters, and where more
    than tables may lie between those of the guest, none count.

    :param clusters: of the virtual size
    :param in_use: by the guest, or by nothing (leaked)
    """
    if not _is_reused(header):
        return 0
    return max(0, image_end // header.cluster_size - in_use - _lost(header, clusters))


def after_giving_back(header: Header, image_end: int, clusters: int) -> int:
    """Return the greatest length that a file with a place for each cluster is said to grow to later, in bytes.

    That is what size() tells of it once its guest has given back clusters, as many as
    it may, of which reusable() takes some for lost. No more than image_end where the file
    is too short for all clusters, or none in it is ever taken for reusable.

    :param clusters: of the virtual size
    """
    if image_end < clusters * header.cluster_size or not _is_reused(header):
        return image_end
    # Where clusters are free, it does not matter which: what is lost, and all of the guest's, is what counts.
    return max(image_end, size(header, _lost(header, clusters) * header.cluster_size, clusters, clusters))


def _is_reused(header: Header) -> bool:
    return header.cluster_size >= _ORDINARY_CLUSTER_SIZE and not (header.snapshots or header.has_bitmaps)


def _lost(header: Header, clusters: int) -> int:
    """Return how many clusters of a file its guest cannot count on: what all tables take, and gaps."""
    # Where everything is allocated.
    tables = size(header, 0, clusters, clusters) // header.cluster_size - clusters
    return tables + header.refcount_table_clusters + _divided(header.l1_entries * _ENTRY, header.cluster_size) + _GAPS


def _with_refcounts(clusters: int, in_a_block: int) -> int:
    """Add the refcount blocks that clusters need, and those blocks themselves."""
    blocks = 0
    while blocks != (blocks := _divided(clusters + blocks, in_a_block)):
        pass
    return clusters + blocks


def _moved(start: int, cluster_size: int, in_a_block: int) -> tuple[int, int]:
    """Return how many refcount blocks there are, and clusters in their table, once that has moved to start.

    As qcow2_refcount_area() and qcow2_refcount_metadata_size() have it: the table
    has half as many entries again as it needs.
    """
    in_a_table = cluster_size // _ENTRY
    clusters, is_generous = start, False
    blocks = table = 0
    while True:
        before = blocks, table
        blocks = _divided(clusters + table + blocks, in_a_block)
        table = _divided(blocks, in_a_table)
        if (blocks, table) == before:
            if is_generous:
                return blocks, _divided(blocks + _divided(blocks, 2), in_a_table)
            clusters, is_generous = clusters + _divided(table, 2), True


def _divided(size: int, part: int) -> int:
    """Divide, and round up."""
    return -(-size // part)
