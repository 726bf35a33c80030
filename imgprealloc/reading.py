# SPDX-License-Identifier: Apache-2.0
"""How a DiskImage is read: a function for each format. Nothing here writes."""

from __future__ import annotations

from collections.abc import Mapping
import os
import stat
from typing import Any

from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import lock
from imgprealloc import qcow2_header
from imgprealloc import qemu_img
from imgprealloc.image import DiskImage

# For what qemu-img measure does not foresee: the refcount table moves when it
# grows, and leaves a gap.
_SPARE_CLUSTERS = 4


def raw(path: str) -> DiskImage:
    """Read a raw disk: its length, and what the filesystem has for it.

    :raises: DiskNotFound, BrokenImage, QemuImgMissing, QemuImgKilled
    """
    status = regular_file(path)
    virtual_size = qemu_img.number(path, qemu_img.info(os.path.abspath(path), "raw"), "virtual-size")
    # A length that is no multiple of 512 is rounded up for the guest.
    return _image(path, status, max(virtual_size, status.st_size), format="raw", virtual_size=virtual_size)


def qcow2(path: str) -> DiskImage:
    """Read a qcow2 disk: its header, its clusters, and what the filesystem has for it.

    :raises: DiskNotFound, FormatMismatch, UnsupportedFormat, BrokenImage,
        QemuImgMissing, QemuImgKilled
    """
    status = regular_file(path)
    target = os.path.abspath(path)
    qcow2_header.require(target)
    in_use = lock.in_use(target)
    described: list[tuple[dict[str, Any], Mapping[str, Any]]] = []

    def describe() -> None:
        info = qemu_img.info(target, "qcow2")
        header = qemu_img.section(path, info, "format-specific", "data")
        _refuse(path, info, header)
        described.append((info, header))

    # Side by side, because most of either is the start of the process that
    # sets its limits.
    check = qemu_img.check(target, "qcow2", meanwhile=describe)
    [(info, header)] = described
    faults = qemu_img.number(path, check, "check-errors") + qemu_img.count(path, check, "corruptions")
    # Of an image in use, half of a change may have been read.
    if faults and not in_use and not lock.in_use(target):
        raise _broken(path, f"qemu-img check finds {faults} errors in it")
    # Absent where it is 0. A compressed cluster is moved when it is written.
    compressed = qemu_img.count(path, check, "compressed-clusters")
    mapped = qemu_img.count(path, check, "allocated-clusters") - compressed
    return _image(
        path,
        status,
        max(status.st_size, _worst_case_size(path, info, header, check, mapped)),
        format="qcow2",
        virtual_size=qemu_img.number(path, info, "virtual-size"),
        in_use=in_use,
        backing_file=info.get("backing-filename"),
        backing_format=info.get("backing-filename-format"),
        full_backing_file=info.get("full-backing-filename"),
        cluster_size=qemu_img.number(path, info, "cluster-size"),
        extended_l2=bool(header.get("extended-l2")),
        clusters=_clusters(path, info, check),
        mapped_clusters=mapped,
        compressed_clusters=compressed,
        fragmented_clusters=qemu_img.count(path, check, "fragmented-clusters"),
        image_end=qemu_img.number(path, check, "image-end-offset"),
        snapshots=len(info.get("snapshots", ())),
        bitmaps=len(header.get("bitmaps", ())),
    )


def detected_format(path: str) -> str:
    """Return the format that qemu-img finds; only for want of a better word.

    :raises: DiskNotFound, BrokenImage, QemuImgMissing, QemuImgKilled
    """
    regular_file(path)
    return str(qemu_img.value(path, qemu_img.info(os.path.abspath(path)), "format"))


def virtual_size(path: str, format: str | None) -> int:
    """Return the virtual size, in bytes, of an image such as a backing file, which may be a block device.

    :raises: DiskNotFound, BrokenImage, QemuImgMissing, QemuImgKilled
    """
    if not (os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)):
        # QEMU would wait for a pipe for ever.
        regular_file(path)
    return qemu_img.number(path, qemu_img.info(path, format), "virtual-size")


def regular_file(path: str) -> os.stat_result:
    """Return what stat(2) says of a file.

    :raises: DiskNotFound
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as exc:
        raise exceptions.DiskNotFound(path, "there is no such file", "Check the path.") from exc
    if not stat.S_ISREG(status.st_mode):
        raise exceptions.DiskNotFound(path, "it is not a regular file", "Name an image file, not a device or a folder.")
    return status


def _refuse(path: str, info: dict[str, Any], header: Mapping[str, Any]) -> None:
    if header.get("corrupt"):
        raise _broken(path, "it is marked corrupt")
    if "data-file" in header:
        raise exceptions.UnsupportedFormat(
            path, "its data is in another file (data-file)", "Convert it with qemu-img convert first."
        )
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
    path: str, status: os.stat_result, worst_case_size: int, *, format: str, virtual_size: int, **more: Any
) -> DiskImage:
    """Complete a DiskImage by what the filesystem has for the file."""
    allocated_size = status.st_blocks * 512
    held_size, shared_bytes = min(allocated_size, worst_case_size), 0
    extents = fallocate.extents(path)
    if extents is not None:
        held_size = fallocate.held(extents, worst_case_size)
        shared_bytes = fallocate.held((extent for extent in extents if extent.shared), worst_case_size)
    return DiskImage(
        path=path,
        format=format,
        virtual_size=virtual_size,
        file_size=status.st_size,
        allocated_size=allocated_size,
        worst_case_size=worst_case_size,
        held_size=held_size,
        shared_bytes=shared_bytes,
        copy_on_write=filesystem.copies_on_write(path),
        modified=status.st_mtime_ns,
        **more,
    )


def _broken(path: str, reason: str) -> exceptions.BrokenImage:
    return exceptions.BrokenImage(
        path, reason, "Nothing was changed; save a copy, then try qemu-img check -r all on it."
    )
