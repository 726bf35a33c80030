# SPDX-License-Identifier: Apache-2.0
"""Nova's API, conductor, scheduler and compute in this process, with Placement, on the real libvirt.

Nova's own base class for functional tests brings them up; what it has against
real libvirt, real commands and real files is lifted here. Glance is a folder.
Neutron and Cinder are Nova's fakes, of which nothing is wanted.
"""

# ruff: noqa: I001
from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import shutil
import sysconfig
from typing import Any

# With native threads, as in production; the other way would change all of pytest.
os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "true"

# First of all that is Nova's: it settles eventlet or threads.
import nova.tests.functional  # noqa: F401

import fixtures
from nova.tests import fixtures as nova_fixtures
from nova.tests.functional import integrated_helpers
from nova.virt.libvirt import utils as libvirt_utils
from oslo_config import cfg
from oslo_utils import uuidutils

from imgprealloc import opts
from e2e.guest_image import GuestImage
from e2e.server import Server

# KVM is ten times faster, but there are machines on which it is there and guests hang.
_VIRT_TYPE = os.environ.get("IMGPREALLOC_E2E_VIRT_TYPE", "qemu")

# Fixtures of Nova's that forbid what is wanted here.
_BANS = (
    "GenericPoisonFixture",
    "ImportModulePoisonFixture",
    "PoisonFunctions",
    "PrivsepNoHelperFixture",
    "SysFsPoisonFixture",
)

_TAIL = 20000

_KERNEL_ARGUMENTS = "console=ttyS0 quiet no_timer_check"


class Cloud(integrated_helpers._IntegratedTestBase):  # type: ignore[misc]
    """A cloud of one compute node, to be brought up by setUp().

    :param instances_path: a folder on the filesystem in question
    :param directory: on another, for all else
    :param guest: what its servers boot from
    :param options: of nova.conf, those in a group as in libvirt__images_type
    """

    CAST_AS_CALL = False
    ADMIN_API = True
    # Since 2.87 rescue is as it is today; 2.37 brought networks = "none".
    microversion = "2.90"

    def __init__(self, instances_path: pathlib.Path, directory: pathlib.Path, guest: GuestImage, **options: Any):
        super().__init__("setUp")
        self._instances_path = instances_path
        self._directory = directory
        self._guest = guest
        self._options = options
        self._server: Server | None = None

    def setUp(self) -> None:
        """Bring up all services."""
        for ban in _BANS:
            self.useFixture(fixtures.MonkeyPatch(f"nova.tests.fixtures.{ban}", _NoBan))
        images = self._directory / "glance"
        images.mkdir()
        self.useFixture(fixtures.MonkeyPatch("nova.tests.fixtures.GlanceFixture", lambda test: Glance(test, images)))
        super().setUp()
        self._kernel = self.glance.add(self._guest.kernel, "aki")
        self._ramdisk = self.glance.add(self._guest.ramdisk, "ari")

    def _setup_compute_service(self) -> Any:
        # Which the driver would do only later.
        opts.register(cfg.CONF)
        # What Nova runs as root, it runs in this process.
        self.useFixture(nova_fixtures.PrivsepFixture())
        for name, value in {
            "compute_driver": "imgprealloc.LibvirtDriver",
            "preallocate_images": "space",
            "instances_path": str(self._instances_path),
            "default_ephemeral_format": "ext4",
            "allow_resize_to_same_host": True,
            # The guest does not listen to its power button.
            "shutdown_timeout": 0,
            # Whether the disks fit is what the tests are about.
            "disk_allocation_ratio": 16.0,
            "reserved_host_memory_mb": 0,
            "libvirt__virt_type": _VIRT_TYPE,
            "libvirt__cpu_mode": "none",
            "vnc__enabled": False,
            "wsgi__api_paste_config": os.path.join(sysconfig.get_path("data"), "etc/nova/api-paste.ini"),
            **self._options,
        }.items():
            group, _, option = name.rpartition("__")
            self.flags(**{option: value}, **({"group": group} if group else {}))
        self._look_before_each_launch()
        self._move_consoles()
        return self.start_service("compute", host="compute")

    def _look_before_each_launch(self) -> None:
        from nova.virt.libvirt import guest as nova_guest

        launch = nova_guest.Guest.launch

        def look_and_launch(guest: Any, *args: Any, **kwargs: Any) -> None:
            assert self._server is not None
            self._server.about_to_launch(guest.get_xml_desc())
            launch(guest, *args, **kwargs)

        self.useFixture(fixtures.MonkeyPatch("nova.virt.libvirt.guest.Guest.launch", look_and_launch))

    def _move_consoles(self) -> None:
        """Keep the guests' consoles from needing the space that their disks have to do without."""

        def path(*_: Any) -> str:
            assert self._server is not None
            return self._server.console()

        driver = "nova.virt.libvirt.driver.LibvirtDriver"
        self.useFixture(fixtures.MonkeyPatch(f"{driver}._get_console_log_path", path))

    def sizes_of_deltas(self) -> list[int]:
        """Return a list of the bytes that each live snapshot from now on has had copied, as far as Nova has come."""
        sizes: list[int] = []
        extract = libvirt_utils.extract_snapshot

        def look_and_extract(delta: str, *args: Any, **kwargs: Any) -> Any:
            sizes.append(os.stat(delta).st_blocks * 512)
            return extract(delta, *args, **kwargs)

        self.useFixture(fixtures.MonkeyPatch("nova.virt.libvirt.utils.extract_snapshot", look_and_extract))
        return sizes

    def log(self) -> str:
        """Return what Nova has logged, but for each call of Placement's API."""
        lines = str(self.stdlog.logger.output).splitlines()
        return "\n".join(line for line in lines if "placement.requestlog" not in line)[-_TAIL:]

    def image(self, disks: str = "vd?", task: str = "rewrite") -> str:
        """Offer the guest's image, and return its id.

        :param disks: which of its disks the guest writes, as a pattern
        :param task: how, in the words of whole_disk.c
        """
        arguments = f"{_KERNEL_ARGUMENTS} e2e_{task}={disks}"
        return str(self.glance.add(
            self._guest.root, "raw", kernel_id=self._kernel, ramdisk_id=self._ramdisk, os_command_line=arguments
        ))  # fmt: skip

    def flavor(self, *, root: int, ephemeral: int = 0, swap: int = 0, extra_specs: dict[str, str] | None = None) -> str:
        """Make a flavor, its root and ephemeral disk in GiB, its swap disk in MiB, and return its id."""
        return str(self._create_flavor(
            memory_mb=256, vcpu=1, disk=root, ephemeral=ephemeral, swap=swap, extra_spec=extra_specs or {}
        ))  # fmt: skip

    def boot(self, image: str, flavor: str, before_launch: Callable[[], None] = lambda: None) -> Server:
        """Ask Nova for the cloud's one server, and wait until Nova says that it is there."""
        server = self._server = Server(self.api, self._directory, before_launch)
        request = self._build_server(image_uuid=image, flavor_id=flavor, networks="none")
        server.uuid = self.api.post_server({"server": request})["id"]
        server.wait_for("ACTIVE")
        return server


class Glance(nova_fixtures.GlanceFixture):  # type: ignore[misc]
    """Nova's fake of Glance, with the images' data as files in a folder."""

    def __init__(self, test: Any, directory: pathlib.Path) -> None:
        super().__init__(test)
        self._directory = directory

    def path(self, image_id: str) -> pathlib.Path:
        """Return the file with an image's data."""
        return self._directory / image_id

    def add(self, path: pathlib.Path, disk_format: str, **properties: str) -> str:
        """Offer a file as an image, and return its id."""
        image_id = str(uuidutils.generate_uuid())
        container_format = disk_format if disk_format in ("aki", "ari") else "bare"
        shutil.copyfile(path, self.path(image_id))
        self.create(None, {
            "id": image_id, "name": path.name, "status": "active", "disk_format": disk_format,
            "container_format": container_format, "size": path.stat().st_size, "min_disk": 0, "min_ram": 0,
            "visibility": "public", "protected": False, "deleted": False, "properties": properties,
        })  # fmt: skip
        return image_id

    def download(
        self, context: Any, image_id: str, data: Any = None, dst_path: str | None = None, trusted_certs: Any = None
    ) -> None:
        """Copy an image to where Nova wants it."""
        assert dst_path is not None
        shutil.copyfile(self.path(image_id), dst_path)

    def update(self, context: Any, image_id: str, metadata: Any, data: Any = None, purge_props: bool = False) -> Any:
        """Take a snapshot's data."""
        if data is not None:
            with self.path(image_id).open("wb") as file:
                shutil.copyfileobj(data, file)
        return super().update(context, image_id, metadata, None, purge_props)


class _NoBan(fixtures.Fixture):
    """Stands in the place of a fixture that forbids something."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
