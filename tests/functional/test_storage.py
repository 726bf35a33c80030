# SPDX-License-Identifier: Apache-2.0
"""Storage that is thin below a filesystem: files with holes under loop devices, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import images
import loop_filesystem
import pytest

from imgprealloc import Preallocator
from imgprealloc import check_nova
from imgprealloc import filesystem
from imgprealloc import storage

MiB = 1 << 20

on_devices = pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])


@pytest.fixture
def whole(tight: pathlib.Path) -> pathlib.Path:
    """Give a filesystem whose loop device's file has all its space."""
    image = tight.parent / "image"
    # As a fallocate before mkfs would not have left it, which discards.
    images.run("fallocate", "-n", "-l", image.stat().st_size, image)
    return tight


def finding(folder: pathlib.Path, mode: str) -> check_nova.Finding:
    conf: Any = SimpleNamespace(
        instances_path=str(folder), imgprealloc=SimpleNamespace(mode=mode, on_unsupported="metadata")
    )
    return check_nova._instances_path(conf)


def show(*disks: object, format: str = "raw") -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "imgprealloc.cli", "show", "--disk-format", format, "-f", "json", *map(str, disks)]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)


@on_devices
def test_loop_device_on_a_sparse_file_is_thin(tight: pathlib.Path) -> None:
    assert f"is the file {tight.parent}/image, which has " in storage.thin_below_folder(tight)


@on_devices
def test_loop_device_on_a_file_that_has_all_its_space_is_not_thin(whole: pathlib.Path) -> None:
    assert storage.thin_below_folder(whole) == ""


def test_tmpfs_is_not_thin() -> None:
    with loop_filesystem.mounted("tmpfs", MiB) as mount_point:
        assert storage.thin_below_folder(pathlib.Path(mount_point)) == ""


@on_devices
def test_overlayfs_is_as_thin_as_what_keeps_its_files(tight: pathlib.Path) -> None:
    with loop_filesystem.overlaid(str(tight)) as merged:
        assert "which has " in storage.thin_below_folder(pathlib.Path(merged))


@pytest.fixture
def upon(tight: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a filesystem on a loop device whose file is on a thin one, and has nothing but space set aside."""
    image = tight / "image"
    image.touch()
    os.truncate(image, 64 * MiB)
    images.run("mkfs.ext4", "-q", "-F", image)
    images.run("fallocate", "-l", 64 * MiB, image)
    (tight / "upon").mkdir()
    images.run("mount", "-o", "loop", image, tight / "upon")
    yield tight / "upon"
    images.run("umount", tight / "upon")


def test_file_that_has_its_space_on_thin_storage_is_thin_itself(upon: pathlib.Path, tight: pathlib.Path) -> None:
    assert f"is the file {tight.parent}/image, which has " in storage.thin_below_folder(upon)


def test_file_that_is_written_on_thin_storage_is_not(upon: pathlib.Path, tight: pathlib.Path) -> None:
    # Each byte, as cp writes a file that has no hole left.
    with open(tight / "image", "r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content)
        os.fsync(file.fileno())

    assert storage.thin_below_folder(upon) == ""


# What is said of it.


@on_devices
def test_check_nova_says_that_falloc_holds_nothing_on_thin_storage_and_full_does(
    tight: pathlib.Path, kind: str
) -> None:
    falloc, full = (finding(tight, mode) for mode in ("falloc", "full"))

    assert (falloc.good, full.good) == (False, True)
    assert f"{tight}, on {kind}, on thin storage (loop" in falloc.detail
    assert "mode falloc holds nothing there, full does" in falloc.detail


@on_devices
def test_check_nova_has_nothing_to_say_of_storage_that_holds_all(whole: pathlib.Path, kind: str) -> None:
    assert finding(whole, "falloc").detail == f"{whole}, on {kind}, which can hold space (mode falloc)"


def test_check_nova_names_the_filesystem_below_overlayfs(tight: pathlib.Path) -> None:
    with loop_filesystem.overlaid(str(tight)) as merged:
        assert f"{merged}, on ext4 below overlayfs, " in finding(pathlib.Path(merged), "full").detail


@on_devices
def test_show_tells_once_of_thin_storage_below_disks_that_are_not_written(tight: pathlib.Path) -> None:
    for name in ("a", "b"):
        Preallocator("falloc").create(tight / name, 16 * MiB, format="raw")

    done = show(tight / "a", tight / "b")

    assert [disk["state"] for disk in json.loads(done.stdout)] == ["preallocated"] * 2
    assert done.stderr.count("thin storage below: loop") == 1
    assert f"{tight}: thin storage below" in done.stderr


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("argv", [["create", "disk", "16M"], ["resize", "disk", "24M"], ["allocate", "disk"]])
def test_whoever_has_space_set_aside_is_told_that_it_is_not_held(
    tight: pathlib.Path, argv: list[str], mode: str
) -> None:
    if argv[0] != "create":
        Preallocator("full").create(tight / "disk", 16 * MiB)
    if argv[0] == "allocate":
        Preallocator().thin(tight / "disk", rewrite=True, format="qcow2")

    done = subprocess.run(
        [sys.executable, "-m", "imgprealloc.cli", argv[0], "--mode", mode, "--disk-format", "qcow2", *argv[1:]],
        cwd=tight, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stderr.count("thin storage below: loop") == (mode == "falloc")


@on_devices
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_show_tells_nothing_of_a_disk_that_is_written_in_full(tight: pathlib.Path, format: str) -> None:
    Preallocator("full").create(tight / "disk", 16 * MiB, format=format)

    assert show(tight / "disk", format=format).stderr == ""


def test_show_tells_nothing_of_a_disk_whose_space_nobody_takes_for_held(tight: pathlib.Path) -> None:
    Preallocator("metadata").create(tight / "disk", 16 * MiB, format="raw")

    assert show(tight / "disk").stderr == ""


@on_devices
def test_show_tells_nothing_where_the_storage_holds_all(whole: pathlib.Path) -> None:
    Preallocator("falloc").create(whole / "disk", 16 * MiB, format="raw")

    assert show(whole / "disk").stderr == ""


# That it is true.


def test_control_what_falloc_sets_aside_is_not_held_by_thin_storage_and_what_full_writes_is(
    tight: pathlib.Path,
) -> None:
    image = tight.parent / "image"
    taken = {}
    for mode in ("falloc", "full"):
        before = images.allocated(image)
        Preallocator(mode).create(tight / mode, 64 * MiB, format="raw")
        images.free(tight)
        taken[mode] = images.allocated(image) - before

    assert (taken["falloc"] < 4 * MiB, taken["full"] >= 60 * MiB) == (True, True)
    assert filesystem.under(str(tight)).fallocate
