# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import MutableSequence
import errno
import fcntl
import os
import pathlib
import tempfile
from types import SimpleNamespace

import fixtures
import psutil
import pytest

from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc.filesystem import Filesystem

NOCOW = 0x00800000


@pytest.fixture
def mounts() -> Iterator[Callable[..., None]]:
    """Give a function that sets the mount points and types of the host."""
    table: list[SimpleNamespace] = []
    with fixtures.MockPatchObject(psutil, "disk_partitions", lambda all: table):
        yield lambda types: table.extend(
            SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in types.items()
        )


def under(folder: pathlib.Path, can: bool) -> Filesystem:
    with fixtures.MockPatchObject(fallocate, "supported", lambda fd, length: can):
        return filesystem.under(str(folder))


def refusing(code: int) -> Callable[..., None]:
    def refuse(**how: str) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize(
    ("kind", "can", "expected"),
    [
        ("ext4", True, Filesystem("ext4", fallocate=True, copy_on_write=False)),
        ("xfs", True, Filesystem("xfs", fallocate=True, copy_on_write=False)),
        ("nfs4", False, Filesystem("nfs4", fallocate=False, copy_on_write=False)),
        ("btrfs", True, Filesystem("btrfs", fallocate=True, copy_on_write=True)),
        # Even should the probe be taken in: they copy on write, and have no nocow.
        ("bcachefs", True, Filesystem("bcachefs", fallocate=False, copy_on_write=True)),
        ("zfs", True, Filesystem("zfs", fallocate=False, copy_on_write=True)),
        ("zfs", False, Filesystem("zfs", fallocate=False, copy_on_write=True)),
    ],
)
def test_what_a_filesystem_can_promise(
    tmp_path: pathlib.Path, mounts: Callable[..., None], kind: str, can: bool, expected: Filesystem
) -> None:
    mounts({"/": "overlay", str(tmp_path): kind})

    assert under(tmp_path, can) == expected


def test_look_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    under(tmp_path, True)

    assert list(tmp_path.iterdir()) == []


def test_look_is_taken_on_the_filesystem_itself(tmp_path: pathlib.Path) -> None:
    devices: list[int] = []

    with fixtures.MockPatchObject(fallocate, "supported", lambda fd, length: devices.append(os.fstat(fd).st_dev)):
        filesystem.under(str(tmp_path))

    assert devices == [tmp_path.stat().st_dev]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_filesystem_too_full_to_be_looked_at_is_believed(
    tmp_path: pathlib.Path, mounts: Callable[..., None], code: int
) -> None:
    mounts({"/": "xfs"})

    with fixtures.MockPatchObject(tempfile, "TemporaryFile", refusing(code)):
        assert filesystem.under(str(tmp_path)) == Filesystem("xfs", fallocate=True, copy_on_write=False)


def test_filesystem_that_may_not_be_written_is_not_believed(tmp_path: pathlib.Path) -> None:
    with (
        fixtures.MockPatchObject(tempfile, "TemporaryFile", refusing(errno.EROFS)),
        pytest.raises(OSError, match="Read-only"),
    ):
        filesystem.under(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/nova/1/disk", "xfs"),
        ("/srv/novadisk", "ext4"),
        ("/srv", "ext4"),
        ("/etc/passwd", "overlay"),
    ],
)
def test_path_is_on_the_filesystem_of_its_nearest_mount_point(
    mounts: Callable[..., None], path: str, kind: str
) -> None:
    mounts({"/": "overlay", "/srv": "ext4", "/srv/nova": "xfs"})

    assert filesystem.mounted_type(path) == kind


def test_link_is_followed_to_the_filesystem_that_it_leads_to(
    tmp_path: pathlib.Path, mounts: Callable[..., None]
) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    mounts({"/": "ext4", str(tmp_path / "far"): "btrfs"})

    assert filesystem.mounted_type(str(tmp_path / "link" / "disk")) == "btrfs"


def test_host_without_mount_points_has_an_unknown_filesystem(mounts: Callable[..., None]) -> None:
    mounts({})

    assert filesystem.mounted_type("/disk") == "unknown"


def copies_on_write(path: pathlib.Path, flags: int | None, *, is_shared: bool = False) -> bool:
    def ioctl(fd: int, request: int, buffer: MutableSequence[int]) -> int:
        assert request == 0x80086601
        if flags is None:
            raise OSError(errno.ENOTTY, "no flags here")
        buffer[0] = flags
        return 0

    with fixtures.MockPatchObject(fcntl, "ioctl", ioctl):
        return filesystem.copies_on_write(str(path), is_shared=is_shared)


@pytest.mark.parametrize(
    ("kind", "flags", "copies"),
    [
        pytest.param("ext4", 0, False, id="ext4"),
        pytest.param("xfs", None, False, id="xfs"),
        pytest.param("btrfs", 0, True, id="btrfs"),
        pytest.param("btrfs", NOCOW, False, id="btrfs with nocow"),
        pytest.param("btrfs", NOCOW - 1, True, id="btrfs with all other flags"),
        pytest.param("zfs", None, True, id="zfs, which has no flags"),
    ],
)
def test_which_files_take_new_space_when_they_are_overwritten(
    tmp_path: pathlib.Path, mounts: Callable[..., None], kind: str, flags: int | None, copies: bool
) -> None:
    mounts({"/": "overlay", str(tmp_path): kind})
    disk = tmp_path / "disk"
    disk.touch()

    assert copies_on_write(disk, flags) is copies


@pytest.mark.parametrize(("kind", "copies"), [("btrfs", True), ("xfs", False)])
def test_what_a_snapshot_shares_takes_new_space_whatever_its_flags(
    tmp_path: pathlib.Path, mounts: Callable[..., None], kind: str, copies: bool
) -> None:
    mounts({"/": "overlay", str(tmp_path): kind})
    disk = tmp_path / "disk"
    disk.touch()

    assert copies_on_write(disk, NOCOW, is_shared=True) is copies


@pytest.mark.parametrize(("user", "blocks"), [(0, 100), (162, 95)])
def test_reserve_of_the_superuser_is_not_available_to_others(user: int, blocks: int) -> None:
    space = SimpleNamespace(f_bfree=100, f_bavail=95, f_frsize=4096, f_bsize=65536)
    with (
        fixtures.MockPatchObject(os, "statvfs", lambda directory: space),
        fixtures.MockPatchObject(os, "geteuid", lambda: user),
    ):
        assert filesystem.available("/srv") == blocks * 4096


@pytest.mark.parametrize(
    ("kind", "remote"),
    [("nfs", True), ("nfs4", True), ("ceph", True), ("fuse.sshfs", True), ("fuse", True), ("ext4", False),
     ("xfs", False), ("btrfs", False), ("overlay", False)],
)  # fmt: skip
def test_which_filesystems_other_hosts_may_have_open(mounts: Callable[..., None], kind: str, remote: bool) -> None:
    mounts({"/": "ext4", "/srv": kind})

    assert filesystem.is_remote("/srv/disk") is remote
