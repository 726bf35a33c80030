# SPDX-License-Identifier: Apache-2.0
"""What sysfs tells of the storage below a filesystem, on a tree like its; functional/test_storage.py has real loops."""

from __future__ import annotations

from collections.abc import Iterator
import os
import pathlib

import fixtures
import pytest

from imgprealloc import storage

MiB = 1 << 20


class Sysfs:
    """A tree like sysfs's, with the block devices that a test puts into it."""

    def __init__(self, root: pathlib.Path) -> None:
        self._root = root
        (root / "dev" / "block").mkdir(parents=True)
        (root / "block").mkdir()

    def add(self, name: str, *below: str, within: str = "", **files: str) -> None:
        """Add a device, MAJOR:MINOR of which is 9 and its name's last digit.

        :param below: the devices that it stands on
        :param within: the disk that it is a partition of
        :param files: what it has beside, "__" for each "/" in their names
        """
        folder = self._root / "block" / within / name
        (folder / "slaves").mkdir(parents=True)
        for device in below:
            (folder / "slaves" / device).symlink_to(next((self._root / "block").rglob(device)))
        for file, content in files.items():
            path = folder / file.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{content}\n")
        (self._root / "dev" / "block" / f"9:{name[-1]}").symlink_to(folder)


@pytest.fixture
def sysfs(tmp_path: pathlib.Path) -> Iterator[Sysfs]:
    """Give a host all of whose filesystems are on the device 9:9."""
    root = tmp_path / "sys"
    with (
        fixtures.MockPatchObject(storage, "_SYSFS", str(root)),
        fixtures.MockPatchObject(storage, "_devices", lambda fd: ["9:9"]),
    ):
        yield Sysfs(root)


def lvm(suffix: str = "") -> dict[str, str]:
    return {"dm__uuid": f"LVM-{'a' * 64}{suffix}", "dm__name": f"vg-volume{suffix}"}


def test_disk_is_not_thin(tmp_path: pathlib.Path, sysfs: Sysfs) -> None:
    sysfs.add("vda9")

    assert storage.thin_below_folder(tmp_path) == ""


def test_device_that_sysfs_does_not_know_is_not_called_thin(tmp_path: pathlib.Path, sysfs: Sysfs) -> None:
    assert storage.thin_below_folder(tmp_path) == ""


def test_linear_volume_is_not_thin(tmp_path: pathlib.Path, sysfs: Sysfs) -> None:
    sysfs.add("vda1")
    sysfs.add("dm-9", "vda1", **lvm())

    assert storage.thin_below_folder(tmp_path) == ""


@pytest.mark.parametrize(
    "pool",
    [
        lvm("-tpool"),
        {"dm__uuid": f"stratis-1-private-{'b' * 32}-thin-pool", "dm__name": "stratis-1-private-pool"},
    ],
    ids=["LVM", "Stratis"],
)
def test_volume_of_a_thin_pool_is_thin(tmp_path: pathlib.Path, sysfs: Sysfs, pool: dict[str, str]) -> None:
    sysfs.add("vda1")
    sysfs.add("dm-2", "vda1", **lvm("_tdata"))
    sysfs.add("dm-3", "dm-2", **pool)
    sysfs.add("dm-9", "dm-3", **lvm())

    assert storage.thin_below_folder(tmp_path) == f"{pool['dm__name']} is a thin pool"


def test_pool_is_found_below_encryption_raid_and_partitions(tmp_path: pathlib.Path, sysfs: Sysfs) -> None:
    sysfs.add("dm-3", **lvm("-tpool"))
    sysfs.add("dm-4", "dm-3", **lvm())
    sysfs.add("dm-4p5", within="dm-4", partition="1")
    sysfs.add("vda6")
    sysfs.add("md7", "vda6", "dm-4p5")
    sysfs.add("dm-8", "md7", dm__uuid="CRYPT-LUKS2-c", dm__name="secret")
    sysfs.add("dm-8p9", within="dm-8", partition="1")

    assert storage.thin_below_folder(tmp_path) == "vg-volume-tpool is a thin pool"


def loop(sysfs: Sysfs, path: pathlib.Path, size: int, **more: str) -> None:
    sysfs.add("loop9", loop__backing_file=str(path), size=str(size // 512), **more)


def test_loop_device_on_a_file_with_holes_is_thin(tmp_path: pathlib.Path, sysfs: Sysfs) -> None:
    image = tmp_path / "an image"
    image.touch()
    os.truncate(image, MiB)
    loop(sysfs, image, MiB)

    assert (
        storage.thin_below_folder(tmp_path)
        == f"loop9 is the file {image}, which has 0 bytes of its 1 MiB ({MiB} bytes)"
    )


@pytest.mark.parametrize(
    ("size", "limits"),
    [
        (MiB - 4096, {"loop__offset": "4096"}),
        (65536, {"loop__offset": "4096", "loop__sizelimit": "65536"}),
        (MiB - 4096, {"loop__offset": "4096", "loop__sizelimit": "0"}),
    ],
)
def test_loop_device_on_a_part_of_a_file_is_looked_at(
    tmp_path: pathlib.Path, sysfs: Sysfs, size: int, limits: dict[str, str]
) -> None:
    (tmp_path / "image").touch()
    os.truncate(tmp_path / "image", MiB)
    loop(sysfs, tmp_path / "image", size, **limits)

    assert storage.thin_below_folder(tmp_path).startswith("loop9 is the file")


def test_file_of_another_size_is_not_the_one_of_the_loop_device(tmp_path: pathlib.Path, sysfs: Sysfs) -> None:
    (tmp_path / "image").touch()
    os.truncate(tmp_path / "image", MiB)
    loop(sysfs, tmp_path / "image", 2 * MiB)

    assert storage.thin_below_folder(tmp_path) == ""


def test_loop_device_whose_file_is_gone_is_not_called_thin(tmp_path: pathlib.Path, sysfs: Sysfs) -> None:
    loop(sysfs, tmp_path / "image (deleted)", MiB)

    assert storage.thin_below_folder(tmp_path) == ""


def test_file_that_has_all_its_space_on_the_very_device_ends_the_search(tmp_path: pathlib.Path, sysfs: Sysfs) -> None:
    with open(tmp_path / "image", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, MiB)
    loop(sysfs, tmp_path / "image", MiB)

    assert storage.thin_below_folder(tmp_path) == ""
