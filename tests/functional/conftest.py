# SPDX-License-Identifier: Apache-2.0
"""Where the disks of these tests are: real filesystems on loop devices, each mounted once."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import pathlib
import shutil
import tempfile

import images
import loop_filesystem
import pytest
import tools_needed

from functional import disks as disks_module

MiB = 1 << 20

TOOLS = (
    "qemu-img",
    "qemu-io",
    "qemu-nbd",
    "qemu-storage-daemon",
    "fio",
    "fallocate",
    "prlimit",
    *loop_filesystem.TOOLS,
)

# Sparse, so that what is not used costs nothing.
SIZES = {
    "ext4": 2048 * MiB,
    "ext2": 1024 * MiB,
    "xfs": 2048 * MiB,
    "btrfs": 1024 * MiB,
    "tmpfs": 1024 * MiB,
}


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    tools_needed.require(TOOLS)


@pytest.fixture(scope="session")
def mount_point_of(_tools: None) -> Iterator[Callable[[str], pathlib.Path]]:
    """Give the mount point of a kind of filesystem, mounted when it is first asked for."""
    mounted = {}
    with contextlib.ExitStack() as stack:

        def mount_point_of(kind: str) -> pathlib.Path:
            if kind not in mounted:
                mounted[kind] = pathlib.Path(stack.enter_context(loop_filesystem.mounted(kind, SIZES[kind])))
            return mounted[kind]

        yield mount_point_of


@pytest.fixture
def kind() -> str:
    """Name the filesystem that folder is on; tests parametrize it."""
    return "ext4"


@pytest.fixture
def folder(mount_point_of: Callable[[str], pathlib.Path], kind: str) -> Iterator[pathlib.Path]:
    """Give an empty folder on a filesystem with plenty of space."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=mount_point_of(kind)))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def tight(kind: str) -> Iterator[pathlib.Path]:
    """Give a small filesystem of its own to a test that fills it, new because XFS remembers having been full."""
    with loop_filesystem.mounted(kind, 300 * MiB) as mount_point:
        yield pathlib.Path(mount_point)


@pytest.fixture
def base(folder: pathlib.Path) -> pathlib.Path:
    """Give a raw base image of 24 MiB without a zero in it."""
    return images.random_file(folder / "base.raw", 24 * MiB)


# For the tables of faults and kills, on a filesystem that each module mounts as its own ground.


@pytest.fixture(scope="module")
def disks(ground: pathlib.Path) -> disks_module.Disks:
    """Give a disk of each kind, past all faults."""
    (ground / "made").mkdir()
    return disks_module.Disks(ground / "made")


@pytest.fixture
def place(ground: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give an empty folder for the disk."""
    place = ground / "place"
    place.mkdir()
    yield place
    for left in place.iterdir():
        left.unlink()
    place.rmdir()
