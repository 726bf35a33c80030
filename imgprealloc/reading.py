# SPDX-License-Identifier: Apache-2.0
"""How a DiskImage is read: a function for each format. Nothing here writes."""

from __future__ import annotations

import os
import re
from typing import Any

from imgprealloc import cluster_map
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import lock
from imgprealloc import qcow2_header
from imgprealloc import qemu_img
from imgprealloc import worst_case
from imgprealloc.disk_file import DiskFile
from imgprealloc.image import DiskImage
from imgprealloc.image import FileStamp
from imgprealloc.qcow2_header import Header

# The unit of all virtual sizes.
SECTOR = 512

# What QEMU looks at to tell a format, and what it takes for VMware's (vmdk_probe).
_PROBED = 512
_VMDK = re.compile(rb"KDMV|COWD|(?:#[^\n]*\n| *\r?\n)*version=")


def raw(file: DiskFile) -> DiskImage:
    """Read a raw disk: its length, and what the filesystem has for it.

    No program is asked, and no byte of it believed.
    """
    status = os.fstat(file.fd)
    # A length that is no multiple of a sector is rounded up for the guest.
    virtual_size = -(-status.st_size // SECTOR) * SECTOR
    return _image(
        file,
        status,
        virtual_size,
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
    header = qcow2_header.read(path, file.fd)
    _refuse(path, header)
    in_use = lock.has_writer(file.fd)
    # What the header says is true as far as QEMU opens the image.
    check = qemu_img.check(path, file.program_name, "qcow2")
    faults = qemu_img.number(path, check, "check-errors") + qemu_img.count(path, check, "corruptions")
    # Of an image in use, half of a change may have been read.
    waits_for_repair = False
    if faults and not in_use and not lock.has_writer(file.fd):
        if not header.dirty:
            raise _broken(path, f"qemu-img check finds {faults} errors in it")
        # Whoever had it open was killed, and QEMU sees to that when it opens it next. What
        # the check counts it has from the cluster map.
        waits_for_repair = True
    # In whole sectors, as QEMU has it.
    virtual_size = header.virtual_size // SECTOR * SECTOR
    # Left out for a disk of no size.
    clusters = qemu_img.number(path, check, "total-clusters") if virtual_size else 0
    # Absent where it is 0. A compressed cluster is moved when it is written.
    compressed = qemu_img.count(path, check, "compressed-clusters")
    beyond = cluster_map.beyond_end(file.fd, header, virtual_size)
    mapped = max(0, qemu_img.count(path, check, "allocated-clusters") - compressed - beyond)
    image_end = qemu_img.number(path, check, "image-end-offset")
    # A cluster that belongs to a snapshot too is copied when it is written.
    growing = clusters if header.snapshots else clusters - mapped
    leaked = qemu_img.count(path, check, "leaks")
    # A compressed cluster may begin in one and end in the next, and keep both.
    taken = mapped + 2 * compressed + leaked + beyond
    growing = max(0, growing - worst_case.reusable(header, image_end, clusters, taken))
    shape = worst_case.repaired(header, image_end) if waits_for_repair else (header, image_end)
    return _image(
        file,
        status,
        max(status.st_size, worst_case.size(*shape, clusters, growing)),
        format="qcow2",
        virtual_size=virtual_size,
        in_use=in_use,
        backing_file=header.backing_file,
        backing_format=header.backing_format,
        cluster_size=header.cluster_size,
        extended_l2=header.extended_l2,
        clusters=clusters,
        mapped_clusters=mapped,
        compressed_clusters=compressed,
        leaked_clusters=leaked,
        fragmented_clusters=qemu_img.count(path, check, "fragmented-clusters"),
        image_end=image_end,
        waits_for_repair=waits_for_repair,
        snapshots=header.snapshots,
        bitmaps=_bitmaps(header),
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


def _refuse(path: str, header: Header) -> None:
    """Refuse what QEMU is not to see at all, or could not read without more than the file.

    :raises: UnsupportedFormat, BrokenImage
    """
    if header.has_data_file:
        # QEMU would open what it names.
        raise exceptions.UnsupportedFormat(
            path, "its data is in another file (data-file)", "Convert it with qemu-img convert first."
        )
    if header.corrupt:
        raise _broken(path, "it is marked corrupt")
    if header.encrypted:
        raise exceptions.UnsupportedFormat(
            path,
            "it is encrypted, and its clusters cannot be counted without the key",
            "Leave it as it is, or create it with qemu-img's own preallocation.",
        )


def _bitmaps(header: Header) -> int:
    # Without the mark they are out of date, for QEMU too.
    return header.bitmaps or 0 if header.has_bitmaps else 0


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
        copy_on_write=filesystem.copies_on_write(file.fd, is_shared=shared_bytes > 0),
        stamp=FileStamp.from_stat(status),
        **more,
    )


def _broken(path: str, reason: str) -> exceptions.BrokenImage:
    return exceptions.BrokenImage(
        path, reason, "Nothing was changed; save a copy, then try qemu-img check -r all on it."
    )
