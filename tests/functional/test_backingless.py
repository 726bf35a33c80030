# SPDX-License-Identifier: Apache-2.0
"""qcow2 without a backing file: swap, ephemeral disks, flattened instances."""

from __future__ import annotations

import os
import pathlib

import images
import pytest

from functional.modes import MODES
from imgprealloc import Mode
from imgprealloc import Preallocator

KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture(params=["created", "made of Nova's"])
def disk(request: pytest.FixtureRequest, folder: pathlib.Path) -> pathlib.Path:
    """Give a preallocated disk of 32 MiB, made in either way."""
    if request.param == "created":
        Preallocator().create(folder / "disk", 32 * MiB)
    else:
        Preallocator().preallocate(images.qcow2(folder / "disk", 32 * MiB), format="qcow2")
    return folder / "disk"


def test_disk_has_standard_l2_entries(disk: pathlib.Path) -> None:
    assert images.info(disk)["format-specific"]["data"]["extended-l2"] is False


def test_disk_has_every_cluster_mapped(disk: pathlib.Path) -> None:
    found = images.check(disk)

    assert found["allocated-clusters"] == found["total-clusters"] == 32 * MiB // (64 * KiB)


def test_disk_is_not_fragmented(disk: pathlib.Path) -> None:
    assert images.check(disk).get("fragmented-clusters", 0) == 0


def test_disk_has_no_hole_in_its_file(disk: pathlib.Path) -> None:
    assert images.allocated(disk) >= disk.stat().st_size


def test_disk_is_preallocated_with_nothing_short(disk: pathlib.Path) -> None:
    image = Preallocator().inspect(disk)

    assert (image.state, image.shortfall) == ("preallocated", 0)


def test_disk_has_no_backing_file(disk: pathlib.Path) -> None:
    assert "backing-filename" not in images.info(disk)


def test_disk_reads_as_zeros(disk: pathlib.Path, folder: pathlib.Path) -> None:
    zeros = images.sparse_file(folder / "zeros", 32 * MiB)

    assert not images.differences(disk, zeros, other_format="raw")


def test_disk_leaves_nothing_beside_it(disk: pathlib.Path) -> None:
    assert os.listdir(disk.parent) == [disk.name]


def test_second_call_writes_nothing(disk: pathlib.Path) -> None:
    before = images.identity(disk)

    Preallocator().preallocate(disk, format="qcow2")

    assert images.identity(disk) == before


@pytest.mark.parametrize("mode", MODES)
def test_mode_decides_the_state(folder: pathlib.Path, mode: Mode) -> None:
    image = Preallocator(mode).create(folder / "disk", 32 * MiB)

    assert image.state == ("mapped" if mode == "metadata" else "preallocated")


@pytest.mark.parametrize("mode", MODES)
def test_mode_decides_the_state_of_novas_disk(folder: pathlib.Path, mode: Mode) -> None:
    image = Preallocator(mode).preallocate(images.qcow2(folder / "disk", 32 * MiB), format="qcow2")

    assert image.state == ("mapped" if mode == "metadata" else "preallocated")


@pytest.mark.parametrize("mode", MODES)
def test_disk_in_each_mode_is_clean(folder: pathlib.Path, mode: Mode) -> None:
    Preallocator(mode).create(folder / "disk", 32 * MiB)

    assert images.check(folder / "disk")["check-errors"] == 0


def test_mode_full_leaves_nothing_unwritten(folder: pathlib.Path) -> None:
    Preallocator("full").create(folder / "disk", 32 * MiB)

    assert images.unwritten(folder / "disk") <= 512 * KiB


@pytest.mark.parametrize("cluster_size", [4 * KiB, 2 * MiB])
def test_cluster_size_of_the_disk_is_kept(folder: pathlib.Path, cluster_size: int) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, cluster_size=cluster_size)

    image = Preallocator().preallocate(disk, format="qcow2")

    assert (image.cluster_size, image.state) == (cluster_size, "preallocated")


def test_disk_of_the_first_qcow2_version_is_preallocated_too(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, compat="0.10")

    image = Preallocator().preallocate(disk, format="qcow2")

    assert image.state == "preallocated"


def test_disk_that_stock_nova_has_preallocated_is_taken_for_what_it_is(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB)
    images.run("fallocate", "-n", "-l", 32 * MiB, disk)

    assert Preallocator().inspect(disk).state == "thin"


def test_disk_that_stock_nova_has_preallocated_becomes_mapped(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB)
    images.run("fallocate", "-n", "-l", 32 * MiB, disk)

    image = Preallocator().preallocate(disk, format="qcow2")

    assert (image.state, image.mapped_clusters) == ("preallocated", image.clusters)


@pytest.mark.parametrize("size", [512, 64 * KiB - 512, 64 * KiB + 512, 32 * MiB + 512])
def test_disk_of_an_odd_size_is_preallocated(folder: pathlib.Path, size: int) -> None:
    image = Preallocator().create(folder / "disk", size)

    assert (image.state, image.virtual_size) == ("preallocated", size)


def test_disk_of_no_whole_sectors_is_as_large_as_qemus_own(folder: pathlib.Path) -> None:
    plain = images.qcow2(folder / "plain", 32 * MiB + 100)

    image = Preallocator().create(folder / "disk", 32 * MiB + 100)

    assert image.virtual_size == images.info(plain)["virtual-size"]


def test_disk_of_no_size_at_all_has_nothing_to_preallocate(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 0)

    assert Preallocator().preallocate(disk, format="qcow2").shortfall == 0


def test_qcow2_strategy_needs_not_be_told_the_format(folder: pathlib.Path) -> None:
    image = Preallocator().create(folder / "disk", 32 * MiB)

    assert image.format == "qcow2"


def test_guest_writes_over_the_whole_disk_and_the_file_stays_as_long_as_it_was(disk: pathlib.Path) -> None:
    before = disk.stat().st_size

    images.qemu_io(disk, *(f"write -P 0x5a {start}M 1M" for start in range(32)))

    assert disk.stat().st_size == before
