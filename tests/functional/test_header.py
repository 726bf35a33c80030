# SPDX-License-Identifier: Apache-2.0
"""What is read of a disk without qemu-img info is what qemu-img info says of it."""

from __future__ import annotations

import pathlib
from typing import Any

import images
import pytest

from imgprealloc import DiskImage
from imgprealloc import Preallocator
from imgprealloc import qcow2_header
from imgprealloc import refcounts

KiB, MiB = 1 << 10, 1 << 20

# Of create -o.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"compat": "0.10"},
    {"compat": "0.10", "cluster_size": 4096},
    {"cluster_size": 512},
    {"cluster_size": 2 * MiB},
    {"refcount_bits": 1},
    {"refcount_bits": 64},
    {"extended_l2": "on", "cluster_size": 131072},
    {"lazy_refcounts": "on"},
    {"compression_type": "zstd"},
    {"preallocation": "metadata"},
]


def read(path: pathlib.Path, format: str = "qcow2") -> DiskImage:
    return Preallocator().inspect(path, format=format)


def require_told_alike(path: pathlib.Path) -> DiskImage:
    """Require that our look and qemu-img info tell the same."""
    told, found = images.info(path), read(path)
    data = told["format-specific"]["data"]
    with path.open("rb") as file:
        header = qcow2_header.read(str(path), file.fileno())
    assert found.virtual_size == told["virtual-size"]
    assert found.cluster_size == told["cluster-size"]
    assert found.extended_l2 == data.get("extended-l2", False)
    assert found.snapshots == len(told.get("snapshots", ()))
    assert found.bitmaps == len(data.get("bitmaps", ()))
    assert found.backing_file == told.get("backing-filename")
    assert found.backing_format == told.get("backing-filename-format")
    assert header.refcount_bits == data["refcount-bits"]
    assert (header.version >= 3) == (data["compat"] != "0.10")
    return found


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(map(str, options.values())) or "none")
def test_header_tells_what_qemu_img_info_tells(
    folder: pathlib.Path, base: pathlib.Path, options: dict[str, Any], backed: bool
) -> None:
    if backed and "preallocation" in options:
        options = {**options, "extended_l2": "on"}
    if "compression_type" in options and not images.knows_zstd():
        pytest.skip("this QEMU was built without zstd")

    require_told_alike(images.qcow2(folder / "disk", 31 * MiB + 512, backing=base if backed else None, **options))


def test_snapshots_and_bitmaps_are_counted_as_qemu_img_counts_them(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB)
    for number in range(3):
        images.run("qemu-img", "snapshot", "-c", f"s{number}", disk)
    for number in range(2):
        images.run("qemu-img", "bitmap", "--add", disk, f"b{number}")

    found = require_told_alike(disk)

    assert (found.snapshots, found.bitmaps) == (3, 2)


def test_bitmaps_that_are_out_of_date_are_none_for_qemu_img_too(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB)
    images.run("qemu-img", "bitmap", "--add", disk, "b")
    with disk.open("r+b") as file:
        # The autoclear features.
        file.seek(88)
        file.write(bytes(8))

    assert require_told_alike(disk).bitmaps == 0


def test_size_that_is_no_whole_sector_is_told_as_qemu_has_it(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB)
    with disk.open("r+b") as file:
        file.seek(24)
        file.write((32 * MiB - 100).to_bytes(8, "big"))

    assert require_told_alike(disk).virtual_size == 32 * MiB - 512


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 4095, 5 * MiB + 7])
def test_raw_disk_s_size_is_told_as_qemu_has_it(folder: pathlib.Path, length: int) -> None:
    disk = images.sparse_file(folder / "disk", length)

    assert read(disk, "raw").virtual_size == images.info(disk, "raw")["virtual-size"]


def test_disk_of_which_most_is_leaked_is_told_however_much_the_check_complains(folder: pathlib.Path) -> None:
    # Each leaked cluster is a line, and all of them are more than a program may print.
    disk = images.qcow2(folder / "disk", 256 * MiB, cluster_size=4096, preallocation="metadata")
    with disk.open("r+b") as file:
        head = file.read(48)
        entries, offset = int.from_bytes(head[36:40], "big"), int.from_bytes(head[40:48], "big")
        file.seek(offset)
        file.write(bytes(8 * entries))

    found = read(disk)

    assert (found.mapped_clusters, found.leaked_clusters >= 65536) == (0, True)


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 64])
def test_refcounts_end_with_the_file(folder: pathlib.Path, refcount_bits: int) -> None:
    # With one of no whole number of bytes, which none of its own is behind.
    disk = images.qcow2(folder / "disk", 3 * MiB, refcount_bits=refcount_bits, cluster_size=4096)
    for written in range(0, 60 * KiB, 4 * KiB):
        images.qemu_io(disk, f"write {written} 4k")

        with disk.open("rb") as file:
            assert refcounts.end_beyond(file.fileno(), disk.stat().st_size) == 0


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 64])
def test_refcounts_beyond_the_file_are_found_to_the_cluster(folder: pathlib.Path, refcount_bits: int) -> None:
    disk = images.qcow2(folder / "disk", 3 * MiB, refcount_bits=refcount_bits, cluster_size=4096)
    images.qemu_io(disk, "write 0 100k")
    end = disk.stat().st_size

    with disk.open("rb") as file:
        for clusters in range(1, 12):
            assert refcounts.end_beyond(file.fileno(), end - clusters * 4096) == end
