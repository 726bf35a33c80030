# SPDX-License-Identifier: Apache-2.0
"""The ways in which Nova makes, moves and grows a disk, by the methods of its real driver.

Only the hypervisor and Glance are stood in for; tests/e2e has the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import shutil
import subprocess
import types
from typing import Any
from unittest import mock

from nova.virt.libvirt import utils as libvirt_utils
import nova_disks
from oslo_utils import units
import pytest

import imgprealloc
import imgprealloc.nova
from nova import context as nova_context
from nova import objects
from nova.virt import images

objects.register_all()

CONTEXT = nova_context.RequestContext("user", "project", is_admin=True)
DISKS = {"disk": units.Gi, "disk.eph0": units.Gi, "disk.swap": 64 * units.Mi}


class Instance(types.SimpleNamespace):
    """As much of an instance as the driver's methods for disks look at, without a database."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get_flavor(self) -> Any:
        return self.flavor


class Host:
    """A compute node whose hypervisor is a mock and whose disks are real."""

    def __init__(self, disks: nova_disks.Disks, base: str) -> None:
        self.path = disks.instances_path
        self.base = base
        self.driver = imgprealloc.nova.LibvirtDriver(mock.Mock())
        self.driver.image_backend = disks.backend

    def instance(self, *, root_gb: int = 1, **fields: Any) -> Instance:
        flavor = objects.Flavor(
            root_gb=root_gb, ephemeral_gb=1, swap=64, memory_mb=64, vcpus=1, name="a", flavorid="a", extra_specs={}
        )
        values: dict[str, Any] = {
            "uuid": nova_disks.new_uuid(),
            "ephemeral_gb": 0,
            "image_meta": objects.ImageMeta.from_dict({}),
            "image_ref": "155d900f-4e14-4e4c-a73d-069cbf4541e6",
            "kernel_id": "",
            "ramdisk_id": "",
            "os_type": "linux",
            "vm_mode": None,
            "vm_state": None,
            "task_state": None,
            "config_drive": "",
            "trusted_certs": None,
            "migration_context": None,
            "system_metadata": {"image_base_image_ref": "155d900f-4e14-4e4c-a73d-069cbf4541e6"},
            "flavor": flavor,
            "old_flavor": None,
            "new_flavor": None,
            "host": "here",
            "metadata": {},
            "key_data": None,
        }
        return Instance(**{**values, **fields})

    def create_images(self, instance: Instance, **kwargs: Any) -> None:
        """Run the driver's _create_image(), as spawn, rescue and finish_migration do."""
        block_devices = {
            "ephemerals": [{"device_name": "/dev/vdb", "size": 1, "guest_format": None, "virtual_name": "ephemeral0"}],
            "swap": {"device_name": "/dev/vdc", "swap_size": 64},
            "root_device_name": "/dev/vda",
            "block_device_mapping": [],
            "image": [],
        }
        # A rescue has the root disk alone.
        names = ["disk.rescue"] if kwargs.get("suffix") else list(DISKS)
        if kwargs.get("suffix"):
            block_devices = None
        mapping = {name: {"bus": "virtio", "dev": f"vd{letter}", "type": "disk"} for name, letter in zip(names, "abc")}
        with mock.patch.object(libvirt_utils, "fetch_image", self._fetch):
            self.driver._create_image(CONTEXT, instance, mapping, block_device_info=block_devices, **kwargs)

    def _fetch(self, context: Any, target: str, image_id: str, trusted_certs: Any = None) -> None:
        os.link(self.base, target)

    def disk(self, instance: Instance, name: str = "disk") -> str:
        return os.path.join(self.path, instance.uuid, name)


@pytest.fixture
def host(disks: Any, small_base: str) -> Callable[..., Host]:
    """Make a compute node with options of nova.conf."""

    def make(**options: Any) -> Host:
        options.setdefault("default_ephemeral_format", "ext4")
        return Host(disks(**options), small_base)

    return make


def _states(host: Host, instance: Instance) -> dict[str, str]:
    strategy = imgprealloc.Preallocator()
    return {name: strategy.inspect(host.disk(instance, name)).state for name in DISKS}


def _all(state: str) -> dict[str, str]:
    return dict.fromkeys(DISKS, state)


def _write(path: str, format: str, start: str = "70M") -> None:
    subprocess.run(["qemu-io", "-f", format, "-c", f"write -P 7 {start} 1M", path], check=True, capture_output=True)


def _digest(path: str, format: str) -> str:
    """Read a disk as its guest does."""
    command = ["qemu-img", "dd", "-f", format, "-O", "raw", "bs=1M", "count=80", f"if={path}", f"of={path}.dd"]
    subprocess.run(command, check=True)
    done = subprocess.run(["sha256sum", f"{path}.dd"], check=True, capture_output=True, text=True)
    os.unlink(f"{path}.dd")
    return done.stdout.split()[0]


KINDS = pytest.mark.parametrize("kind", ["qcow2", "raw"])


@KINDS
def test_spawn_preallocates_root_ephemeral_and_swap(host: Any, kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.instance()

    node.create_images(instance)

    assert _states(node, instance) == _all("preallocated")


@KINDS
def test_spawn_with_root_gb_0_preallocates_to_the_images_size(host: Any, kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.instance(root_gb=0)

    node.create_images(instance)

    assert _states(node, instance) == _all("preallocated")
    assert imgprealloc.Preallocator().inspect(node.disk(instance)).virtual_size == os.path.getsize(node.base)


@KINDS
def test_rebuild_preallocates_the_new_disks(host: Any, kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.instance()
    node.create_images(instance)
    _write(node.disk(instance), kind)
    for name in DISKS:
        os.unlink(node.disk(instance, name))

    node.create_images(instance)

    assert _states(node, instance) == _all("preallocated")


def _punched(path: str) -> None:
    """Lose the space of a disk, as a sparse copy does, in place."""
    subprocess.run(["fallocate", "--dig-holes", path], check=True)


@KINDS
def test_start_fills_the_holes_of_disks_and_replaces_none(host: Any, kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.instance()
    node.create_images(instance)
    _write(node.disk(instance), kind)
    for name in DISKS:
        _punched(node.disk(instance, name))
    before = {name: os.stat(node.disk(instance, name)).st_ino for name in DISKS}
    content = _digest(node.disk(instance), kind)
    info = [
        {
            "path": node.disk(instance, name),
            "type": kind,
            "virt_disk_size": size,
            "backing_file": _backing_file(node.disk(instance, name)),
        }
        for name, size in DISKS.items()
    ]

    # What hard_reboot, power_on and resume_state_on_host_boot call.
    with mock.patch.object(libvirt_utils, "fetch_image", node._fetch):
        node.driver._create_images_and_backing(CONTEXT, instance, os.path.join(node.path, instance.uuid), info)

    assert _states(node, instance) == _all("preallocated")
    assert {name: os.stat(node.disk(instance, name)).st_ino for name in DISKS} == before
    assert _digest(node.disk(instance), kind) == content


def _backing_file(path: str) -> str:
    done = subprocess.run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True)
    return str(json.loads(done.stdout).get("backing-filename", ""))


COPIES = pytest.mark.parametrize(
    "copy", [["rsync", "--sparse"], ["cp", "-r", "--sparse=always"], ["cp", "--sparse=never"]], ids=" ".join
)


@COPIES
@KINDS
def test_resize_with_cold_migration_ends_preallocated(host: Any, kind: str, copy: list[str]) -> None:
    node = host(libvirt__images_type=kind)
    source, instance = node.instance(), node.instance(root_gb=2)
    node.create_images(source)
    _write(node.disk(source), kind)
    os.mkdir(os.path.dirname(node.disk(instance)))
    # Swap is made anew at the destination; so is, here, the ephemeral disk.
    subprocess.run([*copy, node.disk(source), node.disk(instance)], check=True)
    content = _digest(node.disk(source), kind)

    node.create_images(instance)

    assert _states(node, instance) == _all("preallocated")
    assert imgprealloc.Preallocator().inspect(node.disk(instance)).virtual_size == 2 * units.Gi
    assert _digest(node.disk(instance), kind) == content


@KINDS
def test_reverted_resize_finds_its_disks_preallocated(host: Any, kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.instance()
    node.create_images(instance)
    folder = os.path.dirname(node.disk(instance))
    os.rename(folder, folder + "_resize")
    driver = node.driver
    for method in ("_get_guest_xml", "_create_guest_with_network", "_get_existing_guest_config"):
        if hasattr(driver, method):
            setattr(driver, method, mock.Mock())
    driver._get_all_assigned_mediated_devices = mock.Mock(return_value={})
    driver._finish_revert_migration_vtpm = mock.Mock()

    driver.finish_revert_migration(CONTEXT, instance, None, mock.Mock(), power_on=False)

    assert _states(node, instance) == _all("preallocated")


def test_disk_that_a_resize_converts_to_qcow2_is_reserved(host: Any) -> None:
    node = host(libvirt__images_type="raw")
    instance = node.instance()
    node.create_images(instance)
    _write(node.disk(instance), "raw")
    content = _digest(node.disk(instance), "raw")

    node.driver._disk_raw_to_qcow2(node.disk(instance))

    image = imgprealloc.Preallocator().inspect(node.disk(instance), format="qcow2")
    assert (image.state, image.shortfall) == ("reserved", 0)
    assert _digest(node.disk(instance), "qcow2") == content


@pytest.mark.parametrize("original_is_there", [True, False])
def test_unshelved_disk_is_rebased_and_stays_preallocated(host: Any, room: str, original_is_there: bool) -> None:
    node = host(libvirt__images_type="qcow2")
    snapshot = os.path.join(node.path, "snapshot")
    shutil.copyfile(node.base, snapshot)
    _write(snapshot, "raw", "32M")
    original, node.base = node.base, snapshot
    instance = node.instance(
        image_ref="70a599e0-31e7-49b7-b260-868f441e862b", vm_state="shelved_offloaded", task_state=None
    )

    def fetch(context: Any, target: str, image_id: str, trusted_certs: Any = None) -> None:
        if image_id != instance.image_ref and not original_is_there:
            from nova import exception

            raise exception.ImageNotFound(image_id=image_id)
        os.link(snapshot if image_id == instance.image_ref else original, target)

    node._fetch = fetch

    node.create_images(instance)

    assert _states(node, instance)["disk"] == "preallocated"
    compared = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", node.disk(instance), snapshot]
    assert subprocess.run(compared, check=False).returncode == 0
    assert _backing_file(node.disk(instance)) != _backing_file(snapshot) or not original_is_there


@KINDS
def test_rescue_disk_is_thin_and_the_root_disk_untouched(host: Any, kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.instance()
    node.create_images(instance)
    before = os.stat(node.disk(instance))

    node.create_images(instance, suffix=".rescue")

    rescue = os.stat(node.disk(instance, "disk.rescue"))
    after = os.stat(node.disk(instance))
    assert rescue.st_blocks * 512 <= os.path.getsize(node.base) + units.Mi
    if kind == "qcow2":
        assert rescue.st_blocks * 512 < units.Mi
    assert (after.st_ino, after.st_mtime_ns, after.st_blocks) == (before.st_ino, before.st_mtime_ns, before.st_blocks)


def test_cold_snapshot_has_nothing_that_glance_or_an_old_qemu_cannot_read(host: Any) -> None:
    node = host(libvirt__images_type="qcow2")
    instance = node.instance()
    node.create_images(instance)
    image = node.driver.image_backend.by_name(instance, "disk")
    snapshot = os.path.join(node.path, "uploaded")

    image.snapshot_extract(snapshot, "qcow2")

    done = subprocess.run(["qemu-img", "info", "--output=json", snapshot], check=True, capture_output=True)
    assert json.loads(done.stdout)["format-specific"]["data"]["extended-l2"] is False
    assert _is_safe(snapshot)


def _is_safe(path: str) -> bool:
    """Ask the inspector that guards Nova and Glance."""
    try:
        from oslo_utils.imageutils import format_inspector
    except ImportError:  # before oslo.utils 7.2, Nova has its own
        from nova.image import format_inspector
    inspector = format_inspector.detect_file_format(path)
    answer = inspector.safety_check()
    # Nova's says yes, oslo.utils' says nothing or raises.
    return str(inspector) == "qcow2" and answer in (True, None)


def test_inspector_would_refuse_one_of_our_overlays(host: Any) -> None:
    # The control for the test above: a disk must never be uploaded as it is.
    node = host(libvirt__images_type="qcow2")
    instance = node.instance()
    node.create_images(instance)

    with pytest.raises(Exception, match=r"(?i)safety|feature|backing"):
        assert _is_safe(node.disk(instance)), "safety check failed"


@KINDS
def test_targets_of_a_block_live_migration_are_preallocated(host: Any, kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.instance()
    folder = os.path.join(node.path, instance.uuid)
    os.mkdir(folder)
    backing = {"disk": "base", "disk.eph0": "ephemeral_1_default", "disk.swap": "swap_64"}
    info = [
        {
            "path": os.path.join(folder, name),
            "type": kind,
            "virt_disk_size": size,
            "backing_file": backing[name] if kind == "qcow2" else "",
        }
        for name, size in DISKS.items()
    ]

    with mock.patch.object(libvirt_utils, "fetch_image", node._fetch):
        node.driver._create_images_and_backing(CONTEXT, instance, folder, info)

    assert _states(node, instance) == _all("preallocated")


def test_holes_that_the_mirror_made_are_filled_while_the_guest_runs(host: Any) -> None:
    node = host(libvirt__images_type="raw")
    instance = node.instance()
    node.create_images(instance)
    for name in DISKS:
        _punched(node.disk(instance, name))
    info = [{"path": node.disk(instance, name), "type": "raw"} for name in DISKS]
    node.driver._reattach_instance_vifs = mock.Mock()
    node.driver._get_instance_disk_info = mock.Mock(return_value=info)

    # A guest has it open, with QEMU's lock.
    command = ["qemu-io", "-f", "raw", "-c", "sleep 60000", node.disk(instance)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as guest:
        try:
            node.driver.post_live_migration_at_destination(CONTEXT, instance, None, block_migration=True)
        finally:
            guest.kill()

    assert _states(node, instance) == _all("preallocated")


def test_precached_image_is_not_preallocated(host: Any) -> None:
    node = host()
    thin = os.path.join(node.path, "thin")
    with open(thin, "wb") as file:
        file.truncate(units.Gi)
    node.base = thin
    glance = mock.Mock()
    glance.get.return_value = {"disk_format": "raw"}
    glance.download.side_effect = lambda context, image_id, dest_path, trusted_certs: os.link(thin, dest_path)

    with mock.patch.object(images, "IMAGE_API", glance):
        node.driver.cache_image(CONTEXT, "155d900f-4e14-4e4c-a73d-069cbf4541e6")

    (cached,) = os.listdir(os.path.join(node.path, "_base"))
    assert os.stat(os.path.join(node.path, "_base", cached)).st_blocks == 0


@KINDS
def test_evacuated_instance_gets_its_disks_back_as_they_were(host: Any, kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.instance()
    node.create_images(instance)
    _write(node.disk(instance), kind)
    before = {name: _stamp(node.disk(instance, name)) for name in DISKS}

    # On shared storage the disks are there when the new host spawns.
    node.create_images(instance)

    assert {name: _stamp(node.disk(instance, name)) for name in DISKS} == before


def _stamp(path: str) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns, status.st_blocks


@KINDS
def test_disk_info_and_image_cache_are_as_stock_nova_leaves_them(
    disks: Any, host: Any, small_base: str, kind: str
) -> None:
    def left_by(node: Host) -> tuple[Any, Any]:
        instance = node.instance()
        node.create_images(instance)
        with open(node.disk(instance, "disk.info")) as file:
            noted = {os.path.basename(path): format for path, format in json.load(file).items()}
        cache = os.path.join(node.path, "_base")
        return noted, sorted((name, os.stat(os.path.join(cache, name)).st_size) for name in os.listdir(cache))

    ours = left_by(host(libvirt__images_type=kind))
    options = {"libvirt__images_type": kind, "default_ephemeral_format": "ext4"}
    stock = left_by(Host(disks(preallocated=False, **options), small_base))

    assert ours == stock


@KINDS
def test_sizes_that_the_resource_tracker_reads_are_as_with_stock_nova(
    disks: Any, host: Any, small_base: str, kind: str
) -> None:
    def told(node: Host) -> list[tuple[str, int, int]]:
        instance = node.instance()
        node.create_images(instance)
        found = []
        for name in DISKS:
            path = node.disk(instance, name)
            allocated = os.stat(path).st_blocks * 512
            virtual = images.qemu_img_info(path, kind).virtual_size
            # What _get_instance_disk_info_from_config() makes of them; a thin
            # disk's difference is what the host is over-committed by.
            found.append((name, virtual, max(virtual - allocated, 0)))
        return found

    ours = told(host(libvirt__images_type=kind))
    options = {"libvirt__images_type": kind, "default_ephemeral_format": "ext4"}
    stock = told(Host(disks(preallocated=False, **options), small_base))

    assert ours == stock
