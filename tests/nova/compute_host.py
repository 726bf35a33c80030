# SPDX-License-Identifier: Apache-2.0
"""A compute node whose driver, qemu-img and disks are real, and whose hypervisor, network and Glance are stood in for.

The verbs of Host are what Nova's compute manager asks of its driver. What the
stand-ins leave out, tests/e2e has.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import inspect
import os
import subprocess
import threading
import time
import types
from typing import Any
from unittest import mock

import images
from nova.compute import power_state
from nova.network import model as network_model
from nova.virt.libvirt import config as vconfig
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
import nova_disks
from oslo_utils import units
import pytest

import imgprealloc
from imgprealloc import lock
import imgprealloc.nova
from nova import context as nova_context
from nova import exception
from nova import objects

objects.register_all()

# With a token, as each request of a user's has one; without, Nova looks after no backing files.
CONTEXT = nova_context.RequestContext("user", "project", is_admin=True, auth_token="token")
NETWORK = network_model.NetworkInfo([])
IMAGE = "155d900f-4e14-4e4c-a73d-069cbf4541e6"

DISKS = {"disk": units.Gi, "disk.eph0": units.Gi, "disk.swap": 64 * units.Mi}

KINDS = pytest.mark.parametrize("kind", ["qcow2", "raw"])


class Instance(types.SimpleNamespace):
    """As much of an instance as the driver looks at, without a database."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)

    def get_flavor(self) -> Any:
        return self.flavor

    def get_network_info(self) -> Any:
        return NETWORK

    def save(self, **kwargs: Any) -> None:
        """Nothing is kept."""


def flavor(root_gb: int = 1, **extra_specs: str) -> Any:
    """Return a flavor; an extra spec's colon is written as two underscores."""
    specs = {name.replace("__", ":"): value for name, value in extra_specs.items()}
    return objects.Flavor(
        root_gb=root_gb, ephemeral_gb=1, swap=64, memory_mb=64, vcpus=1, name="a", flavorid="a", extra_specs=specs
    )


class Domain:
    """As much of libvirt's domain as Nova's Guest asks for; the disks are in its XML."""

    def __init__(self, uuid: str, xml: str) -> None:
        self.xml = xml
        self.state = power_state.RUNNING
        self.on_mirror: Callable[[str], None] = lambda path: None
        self._uuid = uuid

    def XMLDesc(self, flags: int = 0) -> str:
        return self.xml

    def UUIDString(self) -> str:
        return self._uuid

    def name(self) -> str:
        return "instance-1"

    def isPersistent(self) -> bool:
        return False

    def blockRebase(self, disk: str, target: str, bandwidth: int, flags: int = 0) -> None:
        self.on_mirror(target)

    def blockJobAbort(self, disk: str, flags: int = 0) -> None:
        """The mirror is done."""

    def blockJobInfo(self, disk: str, flags: int = 0) -> dict[str, int]:
        # What libvirt says of a job that has ended.
        return {}


def create_guest(
    self: Any, context: Any, xml: str, instance: Instance, power_on: bool = True, pause: bool = False,
    post_xml_callback: Any = None,
) -> Any:  # fmt: skip
    """Stand in for LibvirtDriver._create_guest()."""
    self.domains[instance.uuid] = Domain(instance.uuid, xml)
    return mock.Mock()


class Host:
    """One compute node.

    :param disks: tells nova.conf, and where the instances are
    :param images: Glance's: files by their id
    """

    def __init__(self, disks: nova_disks.Disks, images: dict[str, str], *, preallocated: bool) -> None:
        self.path = disks.instances_path
        self.images = images
        self.domains: dict[str, Domain] = {}
        self.uploaded = os.path.join(self.path, "uploaded")
        self.driver = self._driver(preallocated)

    def _driver(self, preallocated: bool) -> Any:
        driver = (imgprealloc.nova if preallocated else libvirt_driver).LibvirtDriver(mock.Mock())
        driver._host = mock.Mock()
        driver._host.get_guest.side_effect = self._guest
        driver._host.list_instance_domains.side_effect = lambda **_: list(self.domains.values())
        driver._get_guest_xml = self._guest_xml
        driver._create_guest_with_network = self._create_guest_with_network
        driver.domains = self.domains
        driver._get_all_assigned_mediated_devices = mock.Mock(return_value={})
        driver.get_info = mock.Mock(return_value=mock.Mock(state=power_state.RUNNING))
        for method in (
            "_build_device_metadata",
            "_destroy",
            "_get_existing_guest_config",
            "_lvm_disks",
            "_reattach_instance_vifs",
            "_register_all_undefined_instance_details",
            "_register_undefined_instance_details",
            "_undefine_domain",
            "power_off",
            "unplug_vifs",
        ):
            # Not all are in each Nova.
            if hasattr(driver, method):
                setattr(driver, method, mock.Mock(return_value=None))
        driver._lvm_disks.return_value = []
        driver._image_api = mock.Mock()
        driver._image_api.get.return_value = {"name": "snapshot"}
        driver._image_api.update.side_effect = self._upload
        return driver

    def _guest(self, instance: Instance) -> Any:
        if instance.uuid not in self.domains:
            raise exception.InstanceNotFound(instance_id=instance.uuid)
        domain = self.domains[instance.uuid]
        guest = libvirt_guest.Guest(domain)
        guest.get_power_state = lambda host: domain.state
        return guest

    def _guest_xml(
        self, context: Any, instance: Instance, network_info: Any, disk_info: Any, image_meta: Any,
        rescue: Any = None, block_device_info: Any = None, **_: Any,
    ) -> str:  # fmt: skip
        """Describe the guest by its disks alone, and these as Nova does."""
        config = vconfig.LibvirtConfigGuest()
        config.virt_type, config.os_type = "qemu", "hvm"
        config.uuid, config.name, config.memory, config.vcpus = instance.uuid, instance.name, 65536, 1
        for device in self.driver._get_guest_storage_config(
            context, instance, image_meta, disk_info, rescue, block_device_info, instance.flavor, "hvm"
        ):
            config.add_device(device)
        return str(config.to_xml())

    def _create_guest_with_network(
        self, context: Any, xml: str, instance: Instance, *_: Any, power_on: bool = True, **__: Any
    ) -> Any:
        return self.driver._create_guest(context, xml, instance, power_on=power_on)

    def _upload(self, context: Any, image_id: str, metadata: Any, data: Any = None, **_: Any) -> None:
        with open(self.uploaded, "wb") as file:
            file.write(data.read())

    def fetch(self, context: Any, target: str, image_id: str, trusted_certs: Any = None) -> None:
        """Stand in for libvirt_utils.fetch_image()."""
        if image_id not in self.images:
            raise exception.ImageNotFound(image_id=image_id)
        os.link(self.images[image_id], target)

    def instance(self, flavor: Any = None, **fields: Any) -> Instance:
        """Return an instance that Nova is to build."""
        given = flavor or globals()["flavor"]()
        values: dict[str, Any] = {
            "uuid": nova_disks.new_uuid(),
            "name": "instance-1",
            "id": 1,
            "project_id": "project",
            "user_id": "user",
            "ephemeral_gb": 0,
            "image_meta": objects.ImageMeta.from_dict({}),
            "image_ref": IMAGE,
            "kernel_id": "",
            "ramdisk_id": "",
            "os_type": "linux",
            "vm_mode": None,
            "vm_state": None,
            "task_state": None,
            "config_drive": "",
            "trusted_certs": None,
            "migration_context": None,
            "numa_topology": None,
            "resources": None,
            "pci_requests": mock.Mock(requests=[]),
            "system_metadata": {"image_base_image_ref": IMAGE},
            "flavor": given,
            "old_flavor": given,
            "new_flavor": given,
            "host": "here",
            "metadata": {},
            "key_data": None,
            "info_cache": mock.Mock(network_info=NETWORK),
        }
        return Instance(**{**values, **fields})

    def take_over(self, other: Host) -> None:
        """Go on with the instances of another node, as after an upgrade or on shared storage."""
        self.path = other.path
        self.domains = self.driver.domains = other.domains
        nova_disks.CONF.set_override("instances_path", other.path)

    def spawn(self, instance: Instance) -> Instance:
        """Build an instance: also after a rebuild, an evacuation, a shelving, or a resize to another cell."""
        self.driver.spawn(
            CONTEXT, instance, instance.image_meta, [], None, {},
            network_info=NETWORK, block_device_info=block_devices(),
        )  # fmt: skip
        return instance

    def start(self, instance: Instance) -> None:
        """Start an instance that is shut off; what a hard reboot does, too."""
        with mock.patch.object(self.driver, "destroy"):
            _call(
                self.driver.power_on, CONTEXT, instance, NETWORK, block_device_info=block_devices(), share_info=[]
            )  # fmt: skip

    def boot(self, instance: Instance) -> None:
        """Start an instance as the host boots: without a token."""
        self.domains[instance.uuid].state = power_state.SHUTDOWN
        context = nova_context.get_admin_context()
        with mock.patch.object(self.driver, "destroy"):
            _call(
                self.driver.resume_state_on_host_boot, context, instance, NETWORK,
                block_device_info=block_devices(), share_info=[],
            )  # fmt: skip

    def migrate(self, instance: Instance, new_flavor: Any, destination: str) -> str:
        """Resize: copy the disks to where they are wanted, which is the folder of before. Returns their description."""
        told = self.driver.migrate_disk_and_power_off(
            CONTEXT, instance, destination, new_flavor, NETWORK, block_device_info=block_devices()
        )
        instance.old_flavor, instance.new_flavor, instance.flavor = instance.flavor, new_flavor, new_flavor
        return str(told)

    def finish_migration(self, instance: Instance, disk_info: str) -> None:
        """Resize: make of the copies what the new flavor wants."""
        migration = mock.Mock(source_compute="there")
        self.driver.finish_migration(
            CONTEXT, migration, instance, disk_info, NETWORK, instance.image_meta, True, {},
            block_device_info=block_devices(), power_on=False,
        )  # fmt: skip

    def revert_migration(self, instance: Instance) -> None:
        """Resize: go back to the disks of before."""
        instance.flavor, instance.new_flavor = instance.old_flavor, instance.flavor
        self.driver.finish_revert_migration(
            CONTEXT, instance, NETWORK, mock.Mock(), block_device_info=block_devices(), power_on=False
        )

    def expect(self, instance: Instance, disk_info: str) -> None:
        """Block live migration: make the targets."""
        data = objects.LibvirtLiveMigrateData(
            is_shared_block_storage=False,
            is_shared_instance_path=False,
            block_migration=True,
            instance_relative_path=instance.uuid,
        )
        self.driver.pre_live_migration(CONTEXT, instance, block_devices(), NETWORK, disk_info, data)

    def arrived(self, instance: Instance, *, join: bool = True) -> None:
        """Block live migration: the guest runs here. Wait for what goes on in the background, if not told otherwise."""
        self.driver.post_live_migration_at_destination(
            CONTEXT, instance, NETWORK, block_migration=True, block_device_info=block_devices()
        )
        for thread in threading.enumerate():
            if join and thread.name == imgprealloc.nova.BACKGROUND:
                thread.join()

    def rescue(self, instance: Instance) -> None:
        """Boot from a rescue disk."""
        _call(
            self.driver.rescue, CONTEXT, instance, NETWORK, instance.image_meta, "secret", block_devices(),
            share_info=[],
        )  # fmt: skip

    def snapshot(self, instance: Instance) -> str:
        """Snapshot an instance, and return the file that is uploaded."""
        self.driver.snapshot(CONTEXT, instance, IMAGE, lambda **_: None)
        return self.uploaded

    def disk(self, instance: Instance, name: str = "disk") -> str:
        """Return the path of a disk."""
        return os.path.join(self.path, instance.uuid, name)

    def formats(self, instance: Instance) -> dict[str, str]:
        """Return the formats of the disks, as libvirt is told."""
        return {os.path.basename(disk.source_path): disk.driver_format for disk in self.described(instance)}

    def described(self, instance: Instance) -> list[Any]:
        """Return the disks as the latest guest was started with them."""
        return [device for device in self._guest(instance).get_config().devices if device.root_name == "disk"]

    def states(self, instance: Instance) -> dict[str, str]:
        """Look at all disks."""
        return {name: self.inspect(instance, name).state for name in DISKS}

    def inspect(self, instance: Instance, name: str = "disk") -> imgprealloc.DiskImage:
        """Look at a disk."""
        return imgprealloc.Preallocator().inspect(self.disk(instance, name), format=self.formats(instance)[name])

    def inodes(self, instance: Instance) -> dict[str, int]:
        """Return what tells of all disks whether they are still the same files."""
        return {name: os.stat(self.disk(instance, name)).st_ino for name in DISKS}

    def identities(self, instance: Instance) -> dict[str, tuple[int, ...]]:
        """Return what changes in the inodes of all disks when they are replaced, or written, or given space."""
        return {name: images.identity(self.disk(instance, name)) for name in DISKS}

    def write(self, instance: Instance) -> None:
        """Write to all disks as the guest does: over what the base image has, and beyond."""
        for name, offsets in {"disk": ("10M", "700M"), "disk.eph0": ("500M",), "disk.swap": ("30M",)}.items():
            for offset in offsets:
                write(self.disk(instance, name), self.formats(instance)[name], offset)

    def keep(self, instance: Instance) -> dict[str, str]:
        """Write to all disks, and copy what is read from them then."""
        self.write(instance)
        kept = {}
        for name in DISKS:
            kept[name] = os.path.join(self.path, f"kept-{instance.uuid}-{name}")
            convert = ["qemu-img", "convert", "-f", self.formats(instance)[name], "-O", "raw"]
            images.run(*convert, self.disk(instance, name), kept[name])
        return kept

    def changed(self, instance: Instance, kept: dict[str, str]) -> list[str]:
        """Name the disks that read different now. What they have grown by has to read as zeros."""
        formats = self.formats(instance)
        return [
            name for name, copy in kept.items() if not images.reads_like(self.disk(instance, name), formats[name], copy)
        ]


def all_disks(state: str) -> dict[str, str]:
    """Say that all disks are in one state."""
    return dict.fromkeys(DISKS, state)


def write(path: str, format: str, offset: str = "70M") -> None:
    """Write a mebibyte to a disk, as a guest does."""
    images.qemu_io(path, f"write -P 7 {offset} 1M", format=format)


def write_qcow2_to(path: str, *, with_data: bool, size: int = 64 * units.Mi) -> None:
    """Write a qcow2 file to a raw disk, from its first byte on, as a guest may do."""
    source = images.qcow2(f"{path}.source", size)
    if with_data:
        images.qemu_io(source, "write -P 7 1M 1M")
    images.run("dd", f"if={source}", f"of={path}", "conv=notrunc", "status=none")
    source.unlink()


def lose_space(path: str) -> None:
    """Make holes in a file where nothing was written to it, as a sparse copy and QEMU's mirror do."""
    holes = []
    with open(path, "rb") as file:
        end, data = os.fstat(file.fileno()).st_size, 0
        while data < end:
            hole = os.lseek(file.fileno(), data, os.SEEK_HOLE)
            try:
                data = os.lseek(file.fileno(), hole, os.SEEK_DATA)
            except OSError:
                data = end
            if data - hole >= units.Mi:
                holes.append((hole, data - hole))
    for start, length in holes:
        images.run("fallocate", "--punch-hole", "--offset", start, "--length", length, path)


@contextlib.contextmanager
def in_use(path: str, format: str) -> Iterator[None]:
    """Have QEMU hold a disk open for writing, with its locks."""
    command = ["qemu-io", "-f", format, "-c", "write -P 9 1M 64k", "-c", "sleep 600000", path]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as guest:
        try:
            while not _has_writer(path):
                assert guest.poll() is None
                time.sleep(0.01)
            yield
        finally:
            assert _has_writer(path)
            guest.kill()


def _has_writer(path: str) -> bool:
    with open(path, "rb") as file:
        return lock.has_writer(file.fileno())


def block_devices() -> dict[str, Any]:
    """Return what the compute manager tells the driver of the disks beside the root disk."""
    return {
        "ephemerals": [
            {
                "device_name": "/dev/vdb", "device_type": "disk", "disk_bus": "virtio", "size": 1,
                "guest_format": None, "virtual_name": "ephemeral0",
            }
        ],
        "swap": {"device_name": "/dev/vdc", "device_type": "disk", "disk_bus": "virtio", "swap_size": 64},
        "root_device_name": "/dev/vda",
        "block_device_mapping": [],
        "image": [],
    }  # fmt: skip


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Leave out what this Nova's method does not know yet."""
    known = inspect.signature(function).parameters
    return function(*args, **{name: value for name, value in kwargs.items() if name in known})
