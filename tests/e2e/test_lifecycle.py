# SPDX-License-Identifier: Apache-2.0
"""What else Nova's API does to a server with disks: its guest finds them preallocated, and as it left them."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import pathlib
from typing import TYPE_CHECKING

import images
from oslo_utils import units
from oslo_utils.imageutils import format_inspector
import pytest

from e2e import guest_image

if TYPE_CHECKING:
    from e2e.cloud import Cloud

# The image has what whole_disk.c wrote in round 1, and the guest of the first
# launch writes its disks in round 2. Each later one checks that, and writes
# them once more.
FOUND = f"vda reads back, {units.Gi} bytes of round 2"
DONE = "done, 0 failed"


def test_hard_reboot_needs_no_space(start_cloud: Callable[..., Cloud], fill_filesystem: Callable[[], None]) -> None:
    cloud = start_cloud()
    server = cloud.boot(cloud.image(), cloud.flavor(root=1, swap=64), before_launch=fill_filesystem)
    assert server.wait_for_guest()[-1] == DONE
    written = server.disks()
    server.act("ACTIVE", reboot={"type": "HARD"})
    assert len(server.launches) == 2
    assert server.launch.disks.keys() == written.keys()
    for name, disk in server.launch.disks.items():
        assert disk.state == "preallocated"
        assert disk.file_size == written[name].file_size
        assert disk.stamp.modified == written[name].stamp.modified
    said = server.wait_for_guest()
    assert FOUND in said
    assert said[-1] == DONE


def test_resized_disk_is_preallocated_before_its_guest_sees_it(start_cloud: Callable[..., Cloud]) -> None:
    cloud = start_cloud()
    server = cloud.boot(cloud.image(), cloud.flavor(root=1, swap=64))
    assert server.wait_for_guest()[-1] == DONE
    server.act("VERIFY_RESIZE", resize={"flavorRef": cloud.flavor(root=2, swap=64)})
    assert server.launch.disks["vda"].virtual_size == 2 * units.Gi
    assert {disk.state for disk in server.launch.disks.values()} == {"preallocated"}
    before = server.launch.disks["vda"]
    said = server.wait_for_guest()
    assert FOUND in said
    assert said[-1] == DONE
    after = server.disks()["vda"]
    assert (after.file_size, after.held_size) == (before.file_size, before.held_size)
    server.act("ACTIVE", confirmResize=None)
    assert {disk.state for disk in server.disks().values()} == {"preallocated"}


def test_snapshot_is_an_image_like_any_other(
    start_cloud: Callable[..., Cloud], guest: guest_image.GuestImage, tmp_path: pathlib.Path
) -> None:
    cloud = start_cloud()
    server = cloud.boot(cloud.image(), cloud.flavor(root=1))
    assert server.wait_for_guest()[-1] == DONE
    assert server.launch.disks["vda"].extended_l2
    live = server.act("ACTIVE", createImage={"name": "of a guest that runs"})["image_id"]
    assert server.is_running()
    server.act("SHUTOFF", **{"os-stop": None})
    cold = server.act("SHUTOFF", createImage={"name": "of a guest that does not"})["image_id"]
    for image in live, cold:
        snapshot = cloud.glance.path(image)
        inspector = format_inspector.detect_file_format(str(snapshot))
        assert inspector is not None
        assert str(inspector) == "qcow2"
        inspector.safety_check()
        info = images.info(snapshot)
        assert not info["format-specific"]["data"]["extended-l2"]
        assert "backing-filename" not in info
        # And it has all that the guest wrote.
        content = tmp_path / image
        images.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", snapshot, content)
        assert f"reads back, {units.Gi} bytes of round 2" in images.run(guest.whole_disk, "check", content)
    # The disk itself is what it was.
    assert server.disks()["vda"].state == "preallocated"
    assert server.launch.disks["vda"].file_size == server.disks()["vda"].file_size


STOCK = "libvirt.LibvirtDriver"
OURS = "imgprealloc.LibvirtDriver"
# A page each 16 MiB of a disk of 2 GiB.
SPRINKLED = 128
# Of each page stock Nova's disk has a cluster of 64 KiB; the mirror copies as much of ours, of which one has 128 KiB.
AS_STOCK = SPRINKLED * 64 * units.Ki + units.Mi
AS_OURS = AS_STOCK + SPRINKLED * 128 * units.Ki


@pytest.mark.parametrize(
    ("driver", "extra_specs", "least", "most"),
    [
        (STOCK, {}, SPRINKLED * 4096, AS_STOCK),
        (OURS, {}, SPRINKLED * 4096, AS_OURS),
        (OURS, {"imgprealloc:mode": "full"}, SPRINKLED * 4096, AS_OURS),
        # The control: what an operator may choose costs what we say that it costs.
        (OURS, {"imgprealloc:overlay_subclusters": "allocated"}, units.Gi, 3 * units.Gi),
    ],
    ids=["stock", "unallocated", "full", "allocated"],
)
def test_live_snapshot_copies_what_the_guest_has_written(
    start_cloud: Callable[..., Cloud], driver: str, extra_specs: dict[str, str], least: int, most: int
) -> None:
    cloud = start_cloud(compute_driver=driver)
    server = cloud.boot(cloud.image("vda", "sprinkle"), cloud.flavor(root=2, extra_specs=extra_specs))
    assert server.wait_for_guest() == ["vda: sprinkle", f"vda is sprinkled, {SPRINKLED} writes", DONE]
    deltas = cloud.sizes_of_deltas()

    server.act("ACTIVE", createImage={"name": "of a guest that runs"})

    [size] = deltas
    assert least <= size <= most


def test_rescue_disk_is_novas_own_and_the_rescued_disk_stays_as_it_is(start_cloud: Callable[..., Cloud]) -> None:
    cloud = start_cloud()
    server = cloud.boot(cloud.image(), cloud.flavor(root=1))
    assert server.wait_for_guest()[-1] == DONE
    written = server.disks()["vda"]
    server.act("RESCUE", rescue={})
    rescue, rescued = server.launch.disks["vda"], server.launch.disks["vdb"]
    assert rescue.path.endswith("disk.rescue")
    assert rescue.state == "thin"
    assert rescue.mapped_clusters == 0
    assert rescued == dataclasses.replace(written, in_use=False)
    said = server.wait_for_guest()
    assert f"vda reads back, {guest_image.ROOT_IMAGE_SIZE} bytes of round 1" in said
    assert f"vdb reads back, {units.Gi} bytes of round 2" in said
    assert said[-1] == DONE
    server.act("ACTIVE", unrescue=None)
    assert list(server.launch.disks) == ["vda"]
    assert server.launch.disks["vda"].state == "preallocated"
    said = server.wait_for_guest()
    assert FOUND in said
    assert said[-1] == DONE


@pytest.mark.parametrize("images_type", ["qcow2", "raw"])
def test_build_without_space_is_sent_to_another_host_and_leaves_no_file(
    start_cloud: Callable[..., Cloud],
    fill_filesystem: Callable[[], None],
    instances_path: pathlib.Path,
    images_type: str,
) -> None:
    cloud = start_cloud(libvirt__images_type=images_type)
    image, flavor = cloud.image(), cloud.flavor(root=1)
    fill_filesystem()
    with pytest.raises(AssertionError, match="Exceeded maximum number of retries"):
        cloud.boot(image, flavor)
    # Which it would not have been, had Nova given up at the first host.
    assert "was re-scheduled: " in cloud.log()
    assert [path.name for path in instances_path.iterdir() if path.is_dir() and "-" in path.name] == []
