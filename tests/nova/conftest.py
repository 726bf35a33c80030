# SPDX-License-Identifier: Apache-2.0
"""Real Nova, real qemu-img, a real filesystem: what the tests here share."""

from __future__ import annotations

import os

if os.environ.setdefault("OS_NOVA_DISABLE_EVENTLET_PATCHING", "true") == "false":
    # Before anything else that could start a thread, as a service does it.
    import nova.monkey_patch

    # Up to Nova 31 the import does it.
    getattr(nova.monkey_patch, "patch", lambda: None)()

from collections.abc import Callable
from collections.abc import Iterator
import itertools
import logging
import subprocess
from typing import Any

import compute_host
import images
import loop_filesystem
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import utils as libvirt_utils
import nova_disks
from oslo_utils import units
import pytest

from imgprealloc import log
from imgprealloc import looks
from imgprealloc import record
import imgprealloc.nova

# What one test could not remove is not in the way of the next.
_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    """Tell what the tests here may be marked with."""
    config.addinivalue_line("markers", "as_root: gives up root itself, or wants to write where only root may")
    config.addinivalue_line(
        "markers", "as_user: has to do with files that are somebody else's, of whom root knows nothing"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what another user is for; see tools/as_user.py."""
    other = "as_user" if os.geteuid() == 0 else "as_root"
    left_out = [item for item in items if item.get_closest_marker(other)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Let no more be logged than by default; a test of the command, which logs all, may have run before."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.WARNING)
    yield
    root.setLevel(level)


@pytest.fixture(scope="session")
def room(request: pytest.FixtureRequest) -> Iterator[str]:
    """A large filesystem, most of which is never written; ext4 unless a test parametrizes it."""
    with loop_filesystem.mounted(getattr(request, "param", "ext4"), 60 * units.Gi) as mount_point:
        yield mount_point


@pytest.fixture(scope="session")
def base(room: str) -> str:
    """A full raw base image of 256 MiB."""
    return str(images.random_file(os.path.join(room, "base"), 256 * units.Mi))


@pytest.fixture(scope="session")
def small_base(room: str) -> str:
    """A full raw base image of 64 MiB."""
    return str(images.random_file(os.path.join(room, "small-base"), 64 * units.Mi))


@pytest.fixture
def disks(room: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., nova_disks.Disks]]:
    """Make Disks of either kind, with any options; the instances are removed afterwards."""
    log.forget()
    looks.forget()
    record.forget()
    imgprealloc.nova._base_sizes.clear()
    made: list[str] = []

    def make(*, preallocated: bool = True, **options: Any) -> nova_disks.Disks:
        path = os.path.join(room, f"instances-{os.getpid()}-{next(_numbers)}")
        os.mkdir(path)
        made.append(path)
        return nova_disks.Disks(path, preallocated=preallocated, **options)

    yield make
    for path in made:
        subprocess.run(["rm", "-rf", path], check=True)
    nova_disks.CONF.reset()


@pytest.fixture
def host(
    disks: Callable[..., nova_disks.Disks], small_base: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., compute_host.Host]:
    """Make compute nodes with options of nova.conf, which belongs to the one that was made last."""
    images = {compute_host.IMAGE: small_base}
    # In the class, because the driver of ours has one of its own above it.
    monkeypatch.setattr(libvirt_driver.LibvirtDriver, "_create_guest", compute_host.create_guest)

    def make(*, preallocated: bool = True, **options: Any) -> compute_host.Host:
        options.setdefault("default_ephemeral_format", "ext4")
        options.setdefault("use_cow_images", options.get("libvirt__images_type") != "raw")
        node = compute_host.Host(disks(preallocated=preallocated, **options), images, preallocated=preallocated)
        monkeypatch.setattr(libvirt_utils, "fetch_image", node.fetch)
        return node

    return make


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Every command that is run through processutils, as it runs."""
    from oslo_concurrency import processutils

    ran: list[tuple[str, ...]] = []
    execute = processutils.execute

    def listening(*cmd: Any, **kwargs: Any) -> Any:
        ran.append(tuple(str(word) for word in cmd))
        return execute(*cmd, **kwargs)

    monkeypatch.setattr(processutils, "execute", listening)
    return ran
