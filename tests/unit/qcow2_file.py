# SPDX-License-Identifier: Apache-2.0
"""qcow2 files made by hand, byte by byte, after QEMU's docs/interop/qcow2.txt."""

from __future__ import annotations

import os
import struct

from oslo_utils import units

MAGIC = b"QFI\xfb"

DIRTY = 1 << 0
CORRUPT = 1 << 1
DATA_FILE = 1 << 2
COMPRESSION_TYPE = 1 << 3
EXTENDED_L2 = 1 << 4

AUTOCLEAR_BITMAPS = 1 << 0

# Where the header has the virtual size.
SIZE_OFFSET = 24
# And the autoclear features, since version 3.
AUTOCLEAR_OFFSET = 88

BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS = 0x23852875
END = 0


def extension(kind: int, content: bytes = b"") -> bytes:
    """Return a header extension, padded to 8 bytes."""
    return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)


def write(
    path: str,
    virtual_size: int = units.Gi,
    *,
    version: int = 3,
    cluster_bits: int = 16,
    backing_file: str | None = None,
    backing_format: str | None = None,
    encryption: int = 0,
    snapshots: int = 0,
    incompatible: int = 0,
    compatible: int = 0,
    autoclear: int = 0,
    bitmaps: int = 0,
    refcount_order: int = 4,
    l1_entries: int | None = None,
    l1_filled: int | None = None,
    magic: bytes = MAGIC,
) -> str:
    """Write an image as qemu-img create does: header, refcount table and block, L1 table, each in its own cluster.

    :param bitmaps: how many its header places; their directory is not there
    :param l1_entries: other than the virtual size needs
    :param l1_filled: which L1 entry points to an L2 table; else none does
    """
    cluster_size = 1 << cluster_bits
    if l1_entries is None:
        entry_size = 16 if incompatible & EXTENDED_L2 else 8
        l1_entries = -(-virtual_size // (cluster_size * (cluster_size // entry_size)))
    l1_offset = 3 * cluster_size

    extensions = b""
    if backing_format is not None:
        extensions += extension(BACKING_FORMAT, os.fsencode(backing_format))
    if bitmaps:
        extensions += extension(BITMAPS, struct.pack(">IIQQ", bitmaps, 0, 32 * bitmaps, 4 * cluster_size))
    if version == 3:
        extensions += extension(FEATURE_NAMES, b"\x00\x00dirty bit" + bytes(37))
    extensions += extension(END)
    header_length = 112 if version == 3 else 72
    name = os.fsencode(backing_file or "")

    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        magic, version, header_length + len(extensions) if name else 0, len(name), cluster_bits, virtual_size,
        encryption, l1_entries, l1_offset, cluster_size, 1, snapshots, 0,
    )  # fmt: skip
    if version == 3:
        header += struct.pack(">QQQII", incompatible, compatible, autoclear, refcount_order, header_length)
        header += bytes(header_length - len(header))

    with open(path, "r+b" if os.path.exists(path) else "wb") as file:
        file.truncate(0)
        file.write(header + extensions + name)
        file.truncate(l1_offset + l1_entries * 8)
        if l1_filled is not None:
            file.seek(l1_offset + l1_filled * 8)
            file.write(struct.pack(">Q", 1 << 63 | 4 * cluster_size))
    return path


def patch(path: str, offset: int, content: bytes) -> None:
    """Overwrite bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)
