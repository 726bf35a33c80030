# SPDX-License-Identifier: Apache-2.0
"""Where and with what the guests run; what is outside of a test's namespace is in isolation.py."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
import os
import pathlib
import shutil
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import loop_filesystem
from oslo_utils import units
import pytest
import tools_needed

from e2e import guest_image
from e2e import isolation
from e2e import libvirt_daemons

if TYPE_CHECKING:
    # Imports Nova, which only the pytest of a single test has time for.
    from e2e import cloud

_HERE = pathlib.Path(__file__).parent

# For what all tests have in common: the guest's image.
_SHARED = "IMGPREALLOC_E2E_SHARED"

# What is written when a filesystem is filled; the rest is only set aside.
_LAST = 64 * units.Mi

# Characters of a guest's console that are shown when a test fails.
_TAIL = 4000

_TOOLS = (
    *guest_image.TOOLS,
    *libvirt_daemons.DAEMONS,
    "qemu-system-x86_64",
    "qemu-img",
    "mkfs.ext4",
    "mkfs.xfs",
    "setpriv",
    "unshare",
)


def pytest_configure(config: pytest.Config) -> None:
    if not isolation.is_inside():
        directory = tempfile.TemporaryDirectory(prefix="e2e-guest-")
        os.environ[_SHARED] = directory.name
        config.add_cleanup(directory.cleanup)


def pytest_runtest_protocol(item: pytest.Item) -> object:
    if isolation.is_inside() or _HERE not in item.path.parents or os.geteuid():
        # Who is not root cannot have a namespace, and will be told by _tools.
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in isolation.reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if isolation.is_inside():
        isolation.write(item.config, report)
    return report


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if isolation.is_inside():
        # Nova's threads would keep the interpreter from ending.
        sys.stdout.flush()
        os._exit(0)


@pytest.fixture(scope="session")
def _tools() -> None:
    tools_needed.require(_TOOLS)


@pytest.fixture(scope="session")
def guest(_tools: None) -> guest_image.GuestImage:
    """What a guest boots from, built by the first test that wants it."""
    directory = pathlib.Path(os.environ[_SHARED], "image")
    if not directory.exists():
        building = pathlib.Path(tempfile.mkdtemp(dir=directory.parent))
        guest_image.build(building)
        building.rename(directory)
    return guest_image.GuestImage(directory)


@pytest.fixture
def qemu_system(_tools: None, tmp_path: pathlib.Path) -> Iterator[None]:
    """libvirt at qemu:///system, with nothing in it."""
    directory = tmp_path / "libvirt"
    directory.mkdir()
    with libvirt_daemons.running(directory):
        yield
        libvirt_daemons.destroy_all_domains()


@pytest.fixture
def filesystem(request: pytest.FixtureRequest) -> str:
    """Name the filesystem under instances_path; tests parametrize it."""
    return getattr(request, "param", "ext4")


@pytest.fixture
def room() -> int:
    """Say how large it is, in bytes; sparse, so that what is not used costs nothing."""
    return 8 * units.Gi


@pytest.fixture
def instances_path(_tools: None, filesystem: str, room: int) -> Iterator[pathlib.Path]:
    """A filesystem of its own for Nova's instances_path."""
    with loop_filesystem.mounted(filesystem, room) as mount_point:
        yield pathlib.Path(mount_point)


@pytest.fixture
def fill_filesystem(instances_path: pathlib.Path) -> Callable[[], None]:
    """Take all free space of the filesystem, down to its last block."""

    def fill() -> None:
        free = shutil.disk_usage(instances_path).free
        if free > _LAST:
            with (instances_path / "most").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free - _LAST)
        loop_filesystem.fill(str(instances_path))

    return fill


@pytest.fixture
def start_cloud(
    instances_path: pathlib.Path, qemu_system: None, guest: guest_image.GuestImage, tmp_path: pathlib.Path
) -> Iterator[Callable[..., cloud.Cloud]]:
    """Bring up a cloud with any options of nova.conf. It is not brought down, it ends with its process."""
    from e2e import cloud

    started: list[cloud.Cloud] = []

    def start(**options: Any) -> cloud.Cloud:
        started.append(cloud.Cloud(instances_path, tmp_path, guest, **options))
        started[-1].setUp()
        return started[-1]

    yield start
    # pytest shows it if the test has failed.
    for each in started:
        print(each.log())
    for console in sorted(tmp_path.glob("console-*")):
        print(console.name, console.read_text(errors="replace")[-_TAIL:], sep="\n")
