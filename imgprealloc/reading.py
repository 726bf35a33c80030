# SPDX-License-Identifier: Apache-2.0
"""How a DiskImage is read: a function for each format. Nothing here writes."""

from __future__ import annotations

from collections.abc import Mapping
import os
import re
from typing import Any

from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import lock
from imgprealloc import qcow2_header
from imgprealloc import qemu_img
from imgprealloc.disk_file import DiskFile
from imgprealloc.image import DiskImage
from imgprealloc.image import FileStamp

# For what qemu-img measure does not foresee: the refcount table moves when it
# grows, and leaves a gap.
_SPARE_CLUSTERS = 4

# The unit of all virtual sizes.
SECTOR = 512

# What QEMU looks at to tell a format, and what it takes for VMware's (vmdk_probe).
_PROBED = 512
_VMDK = re.compile(rb"KDMV|COWD|(?:#[^\n]*\n| *\r?\n)*version=")


def raw(file: DiskFile) -> DiskImage:
    """Read a raw disk: its length, and what the filesystem has for it.

    :raises: BrokenImage, ProgramMissing, ProgramKilled
    """
    status = os.fstat(file.fd)
    virtual_size = qemu_img.number(file.path, qemu_img.info(file.path, file.program_name, "raw"), "virtual-size")
    # A length that is no multiple of 512 is rounded up for the guest.
    return _image(
        file,
        status,
        max(virtual_size, status.st_size),
        format="raw",
        virtual_size=virtual_size,
        in_use=lock.has_writer(file.fd),
    )


def qcow2(file: DiskFile) -> DiskImage:
    """Read a qcow2 disk: its header, its clusters, and what the filesystem has for it.

    :raises: FormatMismatch, UnsupportedFormat, BrokenImage, ProgramMissing,
        ProgramKilled
    """
    path = file.path
    status = os.fstat(file.fd)
    qcow2_header.virtual_size(path, file.fd)
    if qcow2_header.has_data_file(file.fd):
        # Not to be seen by QEMU at all, which would open what it names.
        raise exceptions.UnsupportedFormat(
            path, "its data is in another file (data-file)", "Convert it with qemu-img convert first."
        )
    in_use = lock.has_writer(file.fd)
    # Byte for byte, as JSON cannot carry each name.
    backing_file, backing_format = qcow2_header.backing(file.fd)
    described: list[tuple[dict[str, Any], Mapping[str, Any]]] = []

    def describe() -> None:
        info = qemu_img.info(path, file.program_name, "qcow2")
        header = qemu_img.section(path, info, "format-specific", "data")
        _refuse(path, info, header)
        described.append((info, header))

    # Side by side, because most of either is the start of the process that
    # sets its limits.
    check = qemu_img.check(path, file.program_name, "qcow2", meanwhile=describe)
    [(info, header)] = described
    faults = qemu_img.number(path, check, "check-errors") + qemu_img.count(path, check, "corruptions")
    # Of an image in use, half of a change may have been read.
    if faults and not in_use and not lock.has_writer(file.fd):
        raise _broken(path, f"qemu-img check finds {faults} errors in it")
    # Absent where it is 0. A compressed cluster is moved when it is written.
    compressed = qemu_img.count(path, check, "compressed-clusters")
    mapped = qemu_img.count(path, check, "allocated-clusters") - compressed
    return _image(
        file,
        status,
        max(status.st_size, _worst_case_size(path, info, header, check, mapped)),
        format="qcow2",
        virtual_size=qemu_img.number(path, info, "virtual-size"),
        in_use=in_use,
        backing_file=backing_file,
        backing_format=backing_format,
        cluster_size=qemu_img.number(path, info, "cluster-size"),
        extended_l2=bool(header.get("extended-l2")),
        clusters=_clusters(path, info, check),
        mapped_clusters=mapped,
        compressed_clusters=compressed,
        leaked_clusters=qemu_img.count(path, check, "leaks"),
        fragmented_clusters=qemu_img.count(path, check, "fragmented-clusters"),
        image_end=qemu_img.number(path, check, "image-end-offset"),
        snapshots=len(info.get("snapshots", ())),
        bitmaps=len(header.get("bitmaps", ())),
    )


def guessed_format(file: DiskFile) -> str:
    """Return the format that a disk's first bytes look like, as qemu-img does; only for want of a better word.

    Headers that lead QEMU to other files are told without its help.

    :raises: BrokenImage, ProgramMissing, ProgramKilled
    """
    head = os.pread(file.fd, _PROBED, 0)
    if qcow2_header.begins(file.fd):
        return "qcow2"
    if _VMDK.match(head):
        return "vmdk"
    return str(qemu_img.value(file.path, qemu_img.info(file.path, file.program_name), "format"))


def virtual_size(path: str, name: str, format: str | None) -> int:
    """Return the virtual size, in bytes, of an image such as a backing file, which may be a block device.

    :param path: the disk that it is asked for, for the error's text
    :raises: BrokenImage, ProgramMissing, ProgramKilled
    """
    return qemu_img.number(path, qemu_img.info(path, name, format), "virtual-size")


def _refuse(path: str, info: dict[str, Any], header: Mapping[str, Any]) -> None:
    if header.get("corrupt"):
        raise _broken(path, "it is marked corrupt")
    if info.get("encrypted"):
        raise exceptions.UnsupportedFormat(
            path,
            "it is encrypted, and its clusters cannot be counted without the key",
            "Leave it as it is, or create it with qemu-img's own preallocation.",
        )


def _clusters(path: str, info: dict[str, Any], check: dict[str, Any]) -> int:
    # Left out for a disk of no size.
    return qemu_img.number(path, check, "total-clusters") if qemu_img.number(path, info, "virtual-size") else 0


def _worst_case_size(
    path: str, info: dict[str, Any], header: Mapping[str, Any], check: dict[str, Any], mapped: int
) -> int:
    """Return the length that a qcow2 file can grow to, in bytes."""
    image_end = qemu_img.number(path, check, "image-end-offset")
    clusters = _clusters(path, info, check)
    # A cluster that belongs to a snapshot too is copied when it is written.
    growing = clusters if info.get("snapshots") else clusters - mapped
    if not growing:
        return image_end
    cluster_size = qemu_img.number(path, info, "cluster-size")
    refcount_bits = qemu_img.number(path, header, "refcount-bits")
    size = qemu_img.number(path, info, "virtual-size")
    shape = {"cluster_size": str(cluster_size), "refcount_bits": str(refcount_bits)}
    if header.get("extended-l2"):
        shape["extended_l2"] = "on"
    metadata = qemu_img.measure(path, size, "qcow2", shape) - size
    # The measured image is dense; this file may have gaps, which want
    # refcounts too.
    refcounts = image_end * refcount_bits // (8 * cluster_size) + cluster_size
    return image_end + (growing + _SPARE_CLUSTERS) * cluster_size + metadata + refcounts


def _image(
    file: DiskFile, status: os.stat_result, worst_case_size: int, *, format: str, virtual_size: int, **more: Any
) -> DiskImage:
    """Complete a DiskImage by what the filesystem has for the file."""
    allocated_size = status.st_blocks * 512
    held_size, shared_bytes = min(allocated_size, worst_case_size), 0
    extents = fallocate.extents(file.program_name)
    if extents is not None:
        held_size = fallocate.held(extents, worst_case_size)
        shared_bytes = fallocate.held((extent for extent in extents if extent.shared), worst_case_size)
    return DiskImage(
        path=file.path,
        format=format,
        virtual_size=virtual_size,
        file_size=status.st_size,
        allocated_size=allocated_size,
        worst_case_size=worst_case_size,
        held_size=held_size,
        shared_bytes=shared_bytes,
        copy_on_write=filesystem.copies_on_write(file.program_name),
        stamp=FileStamp.from_stat(status),
        **more,
    )


def _broken(path: str, reason: str) -> exceptions.BrokenImage:
    return exceptions.BrokenImage(
        path, reason, "Nothing was changed; save a copy, then try qemu-img check -r all on it."
    )
