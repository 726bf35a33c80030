# SPDX-License-Identifier: Apache-2.0
"""What a qcow2 header says, where qemu-img is not asked, or cannot answer.

It is asked too late where a header names what must not be opened, and it cannot
tell whether a file holds anything at all. That no cluster is allocated (qemu-img
check) is not enough: a cluster that the guest has zeroed hides the backing file
without being allocated. But every cluster, zeroed ones too, has its entry in an
L2 table, so that a file without L2 tables reads like its backing file,
everywhere. Layout: QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

from collections.abc import Iterator
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

# Of the autoclear features: there are bitmaps, and they are up to date.
_BITMAPS = 1 << 0

# Of the incompatible features; the others are marks of dirt, corruption, and so on.
_SUBCLUSTERS = 1 << 4

_GREATEST_L1 = 32 * 1024 * 1024

# Where header and extensions end.
_LONGEST_HEADER = 4096
# Of a backing file, in bytes.
_LONGEST_NAME = 1023
_GREATEST_CLUSTER = 2 * 1024 * 1024


# The data is in another file, which QEMU opens by the name that is in the header.
_DATA_FILE = 1 << 2


@dataclasses.dataclass(frozen=True)
class Blank:
    """A qcow2 file without anything in it, as its header describes it. Sizes are bytes."""

    virtual_size: int
    cluster_size: Optional[int]
    backing_file: Optional[str]
    backing_format: Optional[str]


def blank(file: str | int) -> Blank | None:
    """Read the header of a qcow2 file that holds nothing, or return None.

    None too where there is more to the file than tables without entries:
    snapshots, bitmaps, encryption, an external data file, a fault. A damaged
    header may look blank: only with a check without errors and leaks it is.

    :param file: its name, or its descriptor
    """
    with _opened(file) as fd:
        head = os.pread(fd, _LONGEST_HEADER, 0)
        if len(head) < _VERSION_2.size:
            return None
        (
            magic, version, backing_offset, backing_length, cluster_bits, size, encryption,
            l1_entries, l1_offset, _, _, snapshots, _,
        ) = _VERSION_2.unpack_from(head)  # fmt: skip
        if magic != MAGIC or version not in (2, 3) or encryption or snapshots or not 9 <= cluster_bits <= 21:
            return None
        incompatible = 0
        if version == 3:
            if len(head) < _VERSION_2.size + _VERSION_3.size:
                return None
            incompatible, _, autoclear, _, _ = _VERSION_3.unpack_from(head, _VERSION_2.size)
            if incompatible & ~_SUBCLUSTERS or autoclear:
                return None
        if l1_entries * 8 > _GREATEST_L1 or backing_offset + backing_length > _GREATEST_CLUSTER:
            return None
        l1_table = os.pread(fd, l1_entries * 8, l1_offset)
        if len(l1_table) != l1_entries * 8 or any(l1_table):
            return None
        backing_file, backing_format = _backing(head, fd)
    cluster_size = 1 << cluster_bits
    entry_size = 16 if incompatible & _SUBCLUSTERS else 8
    if l1_entries * (cluster_size // entry_size) * cluster_size < size:
        return None
    if "\0" in (backing_file or "") or "\0" in (backing_format or ""):
        return None
    return Blank(size, cluster_size, backing_file, backing_format)


def backing(file: str | int) -> tuple[str | None, str | None]:
    """Return the name and the format of a backing file, as a header has them; None for what is not there.

    :param file: the name, or the descriptor, of a file that may be qcow2
    """
    with _opened(file) as fd:
        head = os.pread(fd, _LONGEST_HEADER, 0)
        return _backing(head, fd) if _is_qcow2(head) else (None, None)


def has_data_file(file: str | int) -> bool:
    """Whether a qcow2 header says that its data is in another file."""
    with _opened(file) as fd:
        head = os.pread(fd, _LONGEST_HEADER, 0)
    if not _is_qcow2(head) or _version(head) < 3 or len(head) < _VERSION_2.size + _VERSION_3.size:
        return False
    return bool(_VERSION_3.unpack_from(head, _VERSION_2.size)[0] & _DATA_FILE)


def has_lost_bitmaps(file: str | int) -> bool:
    """Whether a qcow2 header says that it has bitmaps, and does not say where."""
    with _opened(file) as fd:
        head = os.pread(fd, _LONGEST_HEADER, 0)
    if not _is_qcow2(head) or _version(head) < 3 or len(head) < _VERSION_2.size + _VERSION_3.size:
        return False
    _, _, autoclear, _, header_length = _VERSION_3.unpack_from(head, _VERSION_2.size)
    return bool(autoclear & _BITMAPS) and _extension(head, header_length, _BITMAPS_EXTENSION) is None


def can_zero_clusters(file: str | int) -> bool:
    """Whether the format has a mark for a cluster that reads as zeros: since version 3 (compat=1.1)."""
    with _opened(file) as fd:
        head = os.pread(fd, _VERSION_2.size, 0)
    return _is_qcow2(head) and _version(head) >= 3


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
        raise exceptions.FormatMismatch(
            path, "it is said to be qcow2, but has no qcow2 header", "Say raw if that is what it is."
        )
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
    return len(head) >= _VERSION_2.size and head.startswith(MAGIC) and _version(head) > 1


def _version(head: bytes) -> int:
    return int(_VERSION_2.unpack_from(head)[1])


def _backing(head: bytes, fd: int) -> tuple[str | None, str | None]:
    _, version, offset, length, *_ = _VERSION_2.unpack_from(head)
    if not offset:
        return None, None
    header_length = _VERSION_2.size
    if version >= 3 and len(head) >= _VERSION_2.size + _VERSION_3.size:
        header_length = _VERSION_3.unpack_from(head, _VERSION_2.size)[4]
    # Anywhere in the first cluster, says the specification.
    name = os.fsdecode(os.pread(fd, min(length, _LONGEST_NAME), min(offset, _GREATEST_CLUSTER)))
    return name or None, _extension(head, header_length, _BACKING_FORMAT)


def _extension(head: bytes, offset: int, wanted: int) -> str | None:
    while offset + _EXTENSION.size <= len(head):
        kind, length = _EXTENSION.unpack_from(head, offset)
        offset += _EXTENSION.size
        if kind == wanted:
            return os.fsdecode(head[offset : offset + length])
        if kind == 0:
            break
        offset += -(-length // 8) * 8
    return None
