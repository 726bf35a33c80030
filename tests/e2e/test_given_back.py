# SPDX-License-Identifier: Apache-2.0
"""A guest that makes filesystems and trims them gives space back, whatever it is told of discards; it is had again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from imgprealloc import qemu_img

if TYPE_CHECKING:
    from e2e.cloud import Cloud
    from e2e.server import Server

# From which on QEMU does not unmap zeros where discards are ignored.
_HOLDS = (9, 1)

KINDS = pytest.mark.parametrize("images_type", ["qcow2", "raw"])


def _has_given_back(start_cloud: Callable[..., Cloud], images_type: str, heal_interval: int) -> Server:
    """Return a server whose guest has done what can give space back."""
    cloud = start_cloud(
        libvirt__images_type=images_type, libvirt__hw_disk_discard="unmap", imgprealloc__heal_interval=heal_interval
    )
    server = cloud.boot(cloud.image(disks="vdb", task="give_back"), cloud.flavor(root=1, ephemeral=1))
    assert {disk.state for disk in server.launch.disks.values()} == {"preallocated"}
    assert server.wait_for_guest()[-1] == "done, 0 failed"
    return server


@KINDS
def test_nothing_is_short_soon_after_a_guest_has_given_space_back(
    start_cloud: Callable[..., Cloud], images_type: str
) -> None:
    server = _has_given_back(start_cloud, images_type, heal_interval=1)

    server.wait_until_without_holes()

    assert server.is_running()
    # A file that has become longer would have taken space that nobody was promised.
    sizes = {name: disk.file_size for name, disk in server.launch.disks.items()}
    assert {name: disk.file_size for name, disk in server.disks().items()} == sizes
    server.wait_until_not_short()


def test_disk_is_short_that_nobody_looks_after(start_cloud: Callable[..., Cloud]) -> None:
    # The control; on a new QEMU there is nothing to do.
    server = _has_given_back(start_cloud, "raw", heal_interval=0)

    assert bool(server.disks()["vdb"].shortfall) == (qemu_img.version() < _HOLDS)
