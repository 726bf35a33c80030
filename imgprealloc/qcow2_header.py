# SPDX-License-Identifier: Apache-2.0
"""What a qcow2 header says, where qemu-img is not asked, or cannot answer.

It is asked too late where a header names what must not be opened, its start is
most of what a look at a disk takes, and it cannot tell whether a file holds
anything at all. That no cluster is allocated (qemu-img check) is not enough: a
cluster that the guest has zeroed hides the backing file without being
allocated. But every cluster, zeroed ones too, has its entry in an L2 table, so
that a file without L2 tables reads like its backing file, everywhere.

A guest may have written the header: what it says is believed of an image only
once QEMU has opened it (qemu-img check), but where nothing is done to the disk for
it (glance), or where Nova has made the disk just now. Layout: QEMU's
docs/interop/qcow2.txt.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
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
_BITMAPS_EXTENSION = 0x23852875
# Their number, with which their extension begins.
_BITMAPS_COUNT = struct.Struct(">I")

# Extensions that tell no more of an image than its features do, or are of such as are refused: names of
# features, encryption, an external data file.
_TOLD_ELSEWHERE = frozenset({0x6803F857, 0x0537BE77, 0x44415441})
# In place of the kind of all that are not known.
_UNKNOWN_EXTENSION = 0

# Of the autoclear features: there are bitmaps, and they are up to date.
_BITMAPS = 1 << 0
# The data is raw in another file.
_RAW_DATA = 1 << 1

# Of the compatible features: refcounts are written when the image is closed.
_LAZY_REFCOUNTS = 1 << 0

# Of the incompatible features. Refcounts were not written when the image was last closed:
_DIRTY = 1 << 0
_CORRUPT = 1 << 1
# The data is in another file, which QEMU opens by the name that is in the header.
_DATA_FILE = 1 << 2
# Compressed clusters are not zlib's; there is one other kind.
_ZSTD = 1 << 3
_SUBCLUSTERS = 1 << 4

_GREATEST_L1 = 32 * 1024 * 1024

# Where header and extensions end, but for odd ones.
_USUAL_HEADER = 4096
# Of a backing file, in bytes.
_LONGEST_NAME = 1023
_LEAST_CLUSTER_BITS, _MOST_CLUSTER_BITS = 9, 21
_GREATEST_CLUSTER = 1 << _MOST_CLUSTER_BITS
_MOST_REFCOUNT_ORDER = 6

# Of version 2, and where nothing else is asked for.
_REFCOUNT_ORDER = 4
REFCOUNT_BITS = 1 << _REFCOUNT_ORDER


@dataclasses.dataclass(frozen=True)
class Header:
    """A qcow2 header, as it stands in the file. Sizes are bytes.

    :param virtual_size: of which QEMU leaves out what is no whole sector
    :param cluster_bits: the cluster size is 2 to the power of it
    :param refcount_order: the width of a refcount is 2 bits to the power of it
    :param encryption: its method, 0 for none
    :param incompatible: the features without which nobody may open it
    :param compatible: the features that whoever does not know them may ignore
    :param autoclear: the features that whoever does not know them has to clear
    :param backing_offset: where the backing file's name is, 0 for none
    :param backing_length: of that name, in bytes
    :param bitmaps: dirty bitmaps; None where it does not say where they are
    :param unknown_extension: whether it has an extension that is not known here
    :param backing_file: byte for byte, as JSON cannot carry each name
    """

    version: int
    virtual_size: int
    cluster_bits: int
    refcount_order: int
    encryption: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshots: int
    incompatible: int
    compatible: int
    autoclear: int
    bitmaps: Optional[int]
    unknown_extension: bool
    backing_offset: int
    backing_length: int
    backing_file: Optional[str]
    backing_format: Optional[str]

    @property
    def has_cluster_size(self) -> bool:
        """Whether clusters and refcounts are of a size that QEMU has."""
        is_cluster = _LEAST_CLUSTER_BITS <= self.cluster_bits <= _MOST_CLUSTER_BITS
        return is_cluster and self.refcount_order <= _MOST_REFCOUNT_ORDER

    @property
    def cluster_size(self) -> int:
        return 1 << min(self.cluster_bits, _MOST_CLUSTER_BITS)

    @property
    def refcount_bits(self) -> int:
        return 1 << min(self.refcount_order, _MOST_REFCOUNT_ORDER)

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & _SUBCLUSTERS)

    @property
    def corrupt(self) -> bool:
        """Whether QEMU has marked the image corrupt."""
        return bool(self.incompatible & _CORRUPT)

    @property
    def dirty(self) -> bool:
        """Whether its refcounts may have been lost with whoever had it open, so that QEMU repairs them at first."""
        return bool(self.incompatible & _DIRTY)

    @property
    def encrypted(self) -> bool:
        return bool(self.encryption)

    @property
    def has_data_file(self) -> bool:
        """Whether the data is in another file."""
        return bool(self.incompatible & _DATA_FILE)

    @property
    def options(self) -> dict[str, str]:
        """What qemu-img is told to make an image of this kind, of any size and over any backing file.

        Of what it does unasked, nothing.
        """
        asked = {
            "compat": "0.10" if self.version < 3 else "",
            "refcount_bits": "" if self.refcount_order == _REFCOUNT_ORDER else str(self.refcount_bits),
            "lazy_refcounts": "on" if self.compatible & _LAZY_REFCOUNTS else "",
            "compression_type": "zstd" if self.incompatible & _ZSTD else "",
            "extended_l2": "on" if self.extended_l2 else "",
        }
        return {name: value for name, value in asked.items() if value}

    @property
    def is_name_misplaced(self) -> bool:
        """Whether the backing file's name is too long, or does not end in the first cluster."""
        end = self.backing_offset + self.backing_length
        return bool(self.backing_offset) and (self.backing_length > _LONGEST_NAME or end > self.cluster_size)

    @property
    def is_plain(self) -> bool:
        """Whether tables are all there is to it: no snapshots, bitmaps, encryption, data file, or mark of damage."""
        is_known = self.version <= 3 and self.has_cluster_size and not self.incompatible & ~_SUBCLUSTERS
        return is_known and not (self.encrypted or self.snapshots or self.autoclear)

    @property
    def has_bitmaps(self) -> bool:
        """Whether it has bitmaps that are up to date."""
        return bool(self.autoclear & _BITMAPS)

    @property
    def has_unknown(self) -> bool:
        """Whether it has what is not known here, and need not be known to whoever opens the image."""
        features = self.compatible & ~_LAZY_REFCOUNTS | self.autoclear & ~(_BITMAPS | _RAW_DATA)
        return self.unknown_extension or bool(features)

    @property
    def has_lost_bitmaps(self) -> bool:
        """Whether it has bitmaps, and does not say where."""
        return self.has_bitmaps and self.bitmaps is None


@dataclasses.dataclass(frozen=True)
class Blank:
    """A qcow2 file without anything in it, as its header describes it. Sizes are bytes.

    :param options: as Header has them
    """

    virtual_size: int
    cluster_size: Optional[int]
    backing_file: Optional[str]
    backing_format: Optional[str]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read(path: str, fd: int) -> Header:
    """Read the header of a qcow2 file.

    :param path: for the error's text
    :raises: FormatMismatch, BrokenImage where QEMU knows no such clusters
    """
    header = look(fd)
    if header is None:
        raise _mismatch(path)
    if not header.has_cluster_size:
        raise exceptions.BrokenImage(
            path,
            f"its header tells of clusters of 2^{header.cluster_bits} bytes and refcounts of "
            f"2^{header.refcount_order} bits, which no image has",
            "Nothing was changed; say raw if that is what it is, or have the disk back from a copy.",
        )
    return header


def blank(file: str | int) -> Blank | None:
    """Read the header of a qcow2 file that holds nothing, or return None.

    None too where there is more to the file than tables without entries:
    snapshots, bitmaps, encryption, an external data file, a fault. A damaged
    header may look blank: only with a check without errors and leaks it is.

    :param file: its name, or its descriptor
    """
    with _opened(file) as fd:
        header = look(fd)
        if header is None or not header.is_plain:
            return None
        if header.is_name_misplaced or header.l1_entries * 8 > _GREATEST_L1:
            return None
        if header.l1_offset + header.l1_entries * 8 > os.fstat(fd).st_size:
            return None
        l1_table = os.pread(fd, header.l1_entries * 8, header.l1_offset)
    if len(l1_table) != header.l1_entries * 8 or any(l1_table):
        return None
    entry_size = 16 if header.extended_l2 else 8
    if header.l1_entries * (header.cluster_size // entry_size) * header.cluster_size < header.virtual_size:
        return None
    if "\0" in (header.backing_file or "") or "\0" in (header.backing_format or ""):
        return None
    return Blank(header.virtual_size, header.cluster_size, header.backing_file, header.backing_format, header.options)


def backing(file: str | int) -> tuple[str | None, str | None]:
    """Return the name and the format of a backing file, as a header has them; None for what is not there.

    :param file: the name, or the descriptor, of a file that may be qcow2
    """
    with _opened(file) as fd:
        header = look(fd)
    return (None, None) if header is None else (header.backing_file, header.backing_format)


def has_lost_bitmaps(file: str | int) -> bool:
    """Whether a qcow2 header says that it has bitmaps, and does not say where."""
    with _opened(file) as fd:
        header = look(fd)
    return header is not None and header.has_lost_bitmaps


def has_unknown(file: str | int) -> bool:
    """Whether a qcow2 header has what is not known here, as Header has it."""
    with _opened(file) as fd:
        header = look(fd)
    return header is not None and header.has_unknown


def can_zero_clusters(file: str | int) -> bool:
    """Whether the format has a mark for a cluster that reads as zeros: since version 3 (compat=1.1)."""
    with _opened(file) as fd:
        header = look(fd)
    return header is not None and header.version >= 3


def begins(file: str | int) -> bool:
    """Whether a file begins like qcow2; False for none that can be read."""
    try:
        with _opened(file) as fd:
            return _is_qcow2(os.pread(fd, _VERSION_2.size, 0))
    except OSError:
        return False


def virtual_size(path: str, file: str | int | None = None) -> int:
    """Return the virtual size, in bytes, that a qcow2 file's header has.

    :param path: for the error's text
    :param file: its descriptor; else it is opened by its path
    :raises: FormatMismatch
    """
    with _opened(path if file is None else file) as fd:
        head = os.pread(fd, _VERSION_2.size, 0)
    if not _is_qcow2(head):
        raise _mismatch(path)
    return int(_VERSION_2.unpack(head)[5])


@contextlib.contextmanager
def _opened(file: str | int) -> Iterator[int]:
    if isinstance(file, int):
        yield file
        return
    # A FIFO would be waited for.
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_qcow2(head: bytes) -> bool:
    return len(head) >= _VERSION_2.size and head.startswith(MAGIC) and int(_VERSION_2.unpack_from(head)[1]) > 1


def look(fd: int) -> Header | None:
    """Read a header as it stands, whatever it says; None for a file that does not begin with one."""
    head = os.pread(fd, _USUAL_HEADER, 0)
    if not _is_qcow2(head):
        return None
    (
        _, version, backing_offset, backing_length, cluster_bits, size, encryption,
        l1_entries, l1_offset, refcount_table_offset, refcount_table_clusters, snapshots, _,
    ) = _VERSION_2.unpack_from(head)  # fmt: skip
    incompatible, compatible, autoclear, refcount_order, length = 0, 0, 0, _REFCOUNT_ORDER, _VERSION_2.size
    if version >= 3:
        if len(head) < _VERSION_2.size + _VERSION_3.size:
            return None
        incompatible, compatible, autoclear, refcount_order, length = _VERSION_3.unpack_from(head, _VERSION_2.size)
    # Anywhere in the first cluster, says the specification.
    name_at = min(backing_offset, _GREATEST_CLUSTER)
    name = os.pread(fd, min(backing_length, _LONGEST_NAME), name_at) if backing_offset else b""
    # QEMU looks for extensions up to that name.
    end = name_at or 1 << min(cluster_bits, _MOST_CLUSTER_BITS)
    extensions = _extensions(head if len(head) >= end else os.pread(fd, end, 0), length, end)
    bitmaps = extensions.get(_BITMAPS_EXTENSION, b"")
    return Header(
        version=version,
        virtual_size=size,
        cluster_bits=cluster_bits,
        refcount_order=refcount_order,
        encryption=encryption,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        snapshots=snapshots,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        bitmaps=_BITMAPS_COUNT.unpack_from(bitmaps)[0] if len(bitmaps) >= _BITMAPS_COUNT.size else None,
        unknown_extension=_UNKNOWN_EXTENSION in extensions,
        backing_offset=backing_offset,
        backing_length=backing_length,
        backing_file=os.fsdecode(name) or None,
        backing_format=os.fsdecode(extensions[_BACKING_FORMAT]) if name and _BACKING_FORMAT in extensions else None,
    )


def _extensions(head: bytes, offset: int, end: int) -> dict[int, bytes]:
    """Return what the extensions that we know have in them; of two of a kind the last counts, as for QEMU.

    Of those that we do not know, nothing but that there is one (_UNKNOWN_EXTENSION).
    """
    found: dict[int, bytes] = {}
    end = min(end, len(head))
    while offset + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(head, offset)
        offset += _EXTENSION.size
        if kind == 0:
            break
        if kind in (_BACKING_FORMAT, _BITMAPS_EXTENSION):
            found[kind] = head[offset : min(offset + length, end)]
        elif kind not in _TOLD_ELSEWHERE:
            found[_UNKNOWN_EXTENSION] = b""
        offset += -(-length // 8) * 8
    return found


def _mismatch(path: str) -> exceptions.FormatMismatch:
    return exceptions.FormatMismatch(
        path, "it is said to be qcow2, but has no qcow2 header", "Say raw if that is what it is."
    )
