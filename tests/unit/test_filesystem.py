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
from oslo_utils import units
import pytest

from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import mounts
from imgprealloc.filesystem import Filesystem

NOCOW = 0x00800000


NUMBERS = {
    "bcachefs": 0xCA451A4E,
    "btrfs": 0x9123683E,
    "ext4": 0xEF53,
    "nfs": 0x6969,
    "nfs4": 0x6969,
    "overlay": 0x794C7630,
    "tmpfs": 0x01021994,
    "xfs": 0x58465342,
    "zfs": 0x2FC12FC1,
}


@pytest.fixture
def kinds() -> Iterator[Callable[[dict[str, str]], None]]:
    """Give a function that sets the types of the folders of the host, with all that is in them."""
    folders: dict[str, str] = {}

    def of(fd: int) -> mounts.Mount | None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        found = [folder for folder in folders if pathlib.PurePath(path).is_relative_to(folder)]
        if not found:
            return None
        kind = folders[max(found, key=len)]
        upper = {"upperdir": kind.partition(":")[2]} if ":" in kind else {}
        return mounts.Mount(max(found, key=len), kind.partition(":")[0], "none", upper)

    def number(fd: int) -> int:
        mount = of(fd)
        return 0 if mount is None else NUMBERS.get(mount.type, 0x65735546)

    with fixtures.MockPatchObject(mounts, "of", of), fixtures.MockPatchObject(mounts, "number", number):
        yield folders.update


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
    tmp_path: pathlib.Path, kinds: Callable[[dict[str, str]], None], kind: str, can: bool, expected: Filesystem
) -> None:
    kinds({"/": "overlay", str(tmp_path): kind})

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
    tmp_path: pathlib.Path, kinds: Callable[[dict[str, str]], None], code: int
) -> None:
    kinds({"/": "xfs"})

    with fixtures.MockPatchObject(tempfile, "TemporaryFile", refusing(code)):
        assert filesystem.under(str(tmp_path)) == Filesystem("xfs", fallocate=True, copy_on_write=False)


def test_filesystem_that_may_not_be_written_is_not_believed(tmp_path: pathlib.Path) -> None:
    with (
        fixtures.MockPatchObject(tempfile, "TemporaryFile", refusing(errno.EROFS)),
        pytest.raises(OSError, match="Read-only"),
    ):
        filesystem.under(str(tmp_path))


def type_of(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return filesystem.type_of(file.fileno())


def test_mount_s_own_word_counts_where_the_number_leaves_it_open(
    tmp_path: pathlib.Path, kinds: Callable[[dict[str, str]], None]
) -> None:
    (tmp_path / "disk").touch()
    kinds({"/": "ext4", str(tmp_path): "fuse.glusterfs"})

    assert type_of(tmp_path / "disk") == "fuse.glusterfs"


def test_file_of_a_mount_that_is_gone_is_on_an_unknown_filesystem(
    tmp_path: pathlib.Path, kinds: Callable[[dict[str, str]], None]
) -> None:
    (tmp_path / "disk").touch()

    assert type_of(tmp_path / "disk") == "unknown"


@pytest.fixture
def upper(tmp_path: pathlib.Path) -> pathlib.Path:
    """Give a folder that stands for the one where an overlayfs puts what is written."""
    (tmp_path / "upper").mkdir()
    (tmp_path / "merged").mkdir()
    return tmp_path / "upper"


@pytest.mark.parametrize(
    ("below", "expected"),
    [
        ("ext4", Filesystem("ext4", True, False, overlay=True)),
        ("btrfs", Filesystem("btrfs", True, True, overlay=True)),
        ("zfs", Filesystem("zfs", False, True, overlay=True)),
    ],
)
def test_filesystem_below_an_overlay_counts(
    upper: pathlib.Path, kinds: Callable[[dict[str, str]], None], below: str, expected: Filesystem
) -> None:
    merged = upper.parent / "merged"
    kinds({"/": "xfs", str(upper): below, str(merged): f"overlay:{upper}"})

    assert under(merged, True) == expected


def test_error_names_the_filesystem_below_an_overlay_and_the_cause() -> None:
    assert Filesystem("btrfs", False, True, "compressed", True).described == (
        "btrfs filesystem below overlayfs (compressed)"
    )


@pytest.mark.parametrize(("inodes", "expected"), [(0, "btrfs"), (5, "overlay")])
def test_overlay_over_what_is_hidden_is_judged_by_what_it_counts(
    upper: pathlib.Path, kinds: Callable[[dict[str, str]], None], inodes: int, expected: str
) -> None:
    merged = upper.parent / "merged"
    kinds({"/": "xfs", str(merged): f"overlay:{upper}/away"})

    with fixtures.MockPatchObject(os, "statvfs", lambda fd: SimpleNamespace(f_files=inodes)):
        assert under(merged, True).type == expected


def copies_on_write(path: pathlib.Path, flags: int | None, *, is_shared: bool = False) -> bool:
    def ioctl(fd: int, request: int, buffer: MutableSequence[int]) -> int:
        assert request == 0x80086601
        if flags is None:
            raise OSError(errno.ENOTTY, "no flags here")
        buffer[0] = flags
        return 0

    with fixtures.MockPatchObject(fcntl, "ioctl", ioctl):
        fd = os.open(path, os.O_RDONLY)
        try:
            return filesystem.copies_on_write(fd, is_shared=is_shared)
        finally:
            os.close(fd)


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
    tmp_path: pathlib.Path, kinds: Callable[[dict[str, str]], None], kind: str, flags: int | None, copies: bool
) -> None:
    kinds({"/": "overlay", str(tmp_path): kind})
    disk = tmp_path / "disk"
    disk.touch()

    assert copies_on_write(disk, flags) is copies


@pytest.mark.parametrize(("kind", "copies"), [("btrfs", True), ("xfs", False)])
def test_what_a_snapshot_shares_takes_new_space_whatever_its_flags(
    tmp_path: pathlib.Path, kinds: Callable[[dict[str, str]], None], kind: str, copies: bool
) -> None:
    kinds({"/": "overlay", str(tmp_path): kind})
    disk = tmp_path / "disk"
    disk.touch()

    assert copies_on_write(disk, NOCOW, is_shared=True) is copies


@pytest.mark.parametrize(("user", "blocks"), [(0, 100), (162, 95)])
def test_reserve_of_the_superuser_is_not_for_disks_whoever_makes_them(user: int, blocks: int) -> None:
    space = SimpleNamespace(f_bfree=100, f_bavail=95, f_frsize=4096, f_bsize=65536)
    with (
        fixtures.MockPatchObject(os, "statvfs", lambda directory: space),
        fixtures.MockPatchObject(os, "geteuid", lambda: user),
    ):
        assert filesystem.available("/srv") == 95 * 4096
        assert filesystem.available_to_us("/srv") == blocks * 4096


@pytest.mark.parametrize(
    ("keep_free", "room"),
    [
        (0, 95 * units.Gi),
        ("0", 95 * units.Gi),
        # Less a part for the filesystem's own books.
        ("10G", 85 * units.Gi - 64 * units.Ki - (85 * units.Gi - 64 * units.Ki) // 1024),
        ("5%,90G", 90 * units.Gi - 64 * units.Ki - (90 * units.Gi - 64 * units.Ki) // 1024),
    ],
)
def test_room_is_what_is_available_less_what_is_kept_of_the_whole(keep_free: int | str, room: int) -> None:
    space = SimpleNamespace(f_blocks=100, f_bfree=99, f_bavail=95, f_frsize=units.Gi, f_bsize=4096)
    with fixtures.MockPatchObject(os, "statvfs", lambda directory: space):
        assert filesystem.room("/srv", keep_free) == room


def test_room_is_less_than_nothing_where_others_have_less_than_is_kept_for_them() -> None:
    space = SimpleNamespace(f_blocks=100, f_bavail=1, f_frsize=units.Gi)
    with fixtures.MockPatchObject(os, "statvfs", lambda directory: space):
        assert filesystem.room("/srv", "2%") < 0


@pytest.mark.parametrize(
    ("kind", "remote"),
    [("nfs", True), ("nfs4", True), ("ceph", True), ("fuse.sshfs", True), ("fuse", True), ("ext4", False),
     ("xfs", False), ("btrfs", False), ("overlay", False)],
)  # fmt: skip
def test_which_filesystems_other_hosts_may_have_open(
    tmp_path: pathlib.Path, kinds: Callable[[dict[str, str]], None], kind: str, remote: bool
) -> None:
    kinds({"/": "ext4", str(tmp_path): kind})
    with open(tmp_path / "disk", "wb") as file:
        assert filesystem.is_remote(file.fileno()) is remote
