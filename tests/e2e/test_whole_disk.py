# SPDX-License-Identifier: Apache-2.0
"""A guest writes every byte of its disks, in random order, and reads them back."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import TYPE_CHECKING

from oslo_utils import units
import pytest

if TYPE_CHECKING:
    from e2e.cloud import Cloud
    from imgprealloc import DiskImage

STOCK = "libvirt.LibvirtDriver"


@pytest.fixture
def room() -> int:
    """Give what the disks take in whole GiB, as Nova counts it, and something for the filesystem itself."""
    return 3584 * units.Mi


@pytest.mark.parametrize(
    ("filesystem", "images_type"), [("ext4", "qcow2"), ("xfs", "qcow2"), ("xfs", "raw")], indirect=["filesystem"]
)
def test_guest_fills_its_disks_though_the_filesystem_is_full(
    start_cloud: Callable[..., Cloud], fill_filesystem: Callable[[], None], images_type: str
) -> None:
    cloud = start_cloud(libvirt__images_type=images_type)
    flavor = cloud.flavor(root=1, ephemeral=1, swap=64)
    server = cloud.boot(cloud.image(), flavor, before_launch=fill_filesystem)
    said = server.wait_for_guest()
    before, after = server.launch.disks, server.disks()
    assert said[-1] == "done, 0 failed"
    assert [disk.virtual_size for disk in before.values()] == [units.Gi, units.Gi, 64 * units.Mi]
    assert [disk.format for disk in before.values()] == [images_type] * 3
    assert {disk.state for disk in before.values()} == {"preallocated"}
    assert _sizes(after) == _sizes(before)
    assert server.is_running()
    assert server.status() == "ACTIVE"


def test_guest_changes_no_block_of_a_disk_that_was_written_for_it(start_cloud: Callable[..., Cloud]) -> None:
    cloud = start_cloud()
    server = cloud.boot(cloud.image(), cloud.flavor(root=1, extra_specs={"imgprealloc:mode": "full"}))
    assert server.wait_for_guest()[-1] == "done, 0 failed"
    before, after = server.launch.disks["vda"], server.disks()["vda"]
    assert before.state == "preallocated"
    assert after == dataclasses.replace(before, in_use=True, stamp=after.stamp)


@pytest.mark.parametrize(
    ("filesystem", "images_type", "disk", "state"),
    [
        ("ext4", "qcow2", "vda", "thin"),
        ("ext4", "qcow2", "vdb", "thin"),
        ("ext4", "qcow2", "vdc", "thin"),
        # Its bytes are there: qemu-img has asked XFS to allocate 1 MiB at a time, which is
        # enough for qcow2's own; and as much XFS wants to have left to zero the rest of a cluster.
        ("xfs", "qcow2", "vda", "reserved"),
        # Where cp made a clone of the base image.
        ("xfs", "raw", "vda", "thin"),
    ],
    indirect=["filesystem"],
)
def test_stock_nova_pauses_the_guest_and_calls_it_active(
    start_cloud: Callable[..., Cloud], fill_filesystem: Callable[[], None], images_type: str, disk: str, state: str
) -> None:
    cloud = start_cloud(compute_driver=STOCK, libvirt__images_type=images_type)
    flavor = cloud.flavor(root=1, ephemeral=1, swap=64)
    server = cloud.boot(cloud.image(disks=disk), flavor, before_launch=fill_filesystem)
    said = server.wait_for_guest()
    assert server.launch.disks[disk].state == state
    assert not any(line.startswith("done") for line in said)
    assert server.no_space() == [disk]
    assert server.status() == "ACTIVE"


def _sizes(disks: dict[str, DiskImage]) -> dict[str, tuple[int, ...]]:
    # Not st_blocks: ext4 counts the nodes of its extent trees in, and takes
    # them from what it has set aside for that.
    return {name: (disk.file_size, disk.held_size, disk.shortfall) for name, disk in disks.items()}
