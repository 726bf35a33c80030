# SPDX-License-Identifier: Apache-2.0
"""Whose filesystem it is that a disk is on: below overlayfs, below other mounts, and where a file alone is mounted."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import os
import pathlib

import images
import loop_filesystem
import pytest

from functional import kinds
from imgprealloc import Mode
from imgprealloc import OnUnsupported
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc import mounts

MiB = 1 << 20


@pytest.fixture
def merged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give an overlayfs that keeps its files on a filesystem of the kind."""
    with loop_filesystem.overlaid(str(folder)) as mount_point:
        yield pathlib.Path(mount_point)


def type_of(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return filesystem.type_of(file.fileno())


# overlayfs: statfs(2) says that it is one, and the files are another's.


@kinds.with_fallocate
def test_filesystem_of_an_overlayfs_is_the_one_that_keeps_its_files(merged: pathlib.Path, kind: str) -> None:
    (merged / "file").touch()

    assert (type_of(merged / "file"), filesystem.under(str(merged)).name) == (kind, f"{kind} below overlayfs")


@kinds.with_fallocate
@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_new_disk_on_overlayfs_is_preallocated(merged: pathlib.Path, kind: str, format: str, mode: Mode) -> None:
    image = Preallocator(mode).create(merged / "disk", 32 * MiB, format=format)

    below = merged.parent / "upperdir" / "disk"
    found = Preallocator().inspect(below, format=format)
    assert (image.state, image.shortfall, found.state, found.shortfall) == ("preallocated", 0, "preallocated", 0)


@kinds.with_fallocate
def test_overlay_on_overlayfs_is_made_anew_and_grows(merged: pathlib.Path, base: pathlib.Path) -> None:
    disk, plain = (images.qcow2(merged / name, 32 * MiB, backing=base) for name in ("disk", "plain"))

    Preallocator().preallocate(disk, format="qcow2")
    image = Preallocator().resize(disk, 48 * MiB, format="qcow2")
    images.run("qemu-img", "resize", "-q", "-f", "qcow2", plain, 48 * MiB)

    assert (image.state, image.shortfall, images.differences(disk, plain)) == ("preallocated", 0, "")


@kinds.copying_on_write
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_on_overlayfs_over_btrfs_that_is_copied_on_write_is_never_called_preallocated(
    merged: pathlib.Path, format: str
) -> None:
    images.run("qemu-img", "create", "-q", "-f", format, "-o", "preallocation=full", merged / "disk", 16 * MiB)

    image = Preallocator().inspect(merged / "disk", format=format)

    assert (image.state, image.shortfall) == ("thin" if format == "raw" else "mapped", image.worst_case_size)
    with pytest.raises(exceptions.UnsupportedFilesystem, match="copy on write"):
        Preallocator().preallocate(merged / "disk", "reserve", format=format)


@kinds.copying_on_write
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_on_overlayfs_over_btrfs_that_is_copied_on_write_is_rewritten(merged: pathlib.Path, format: str) -> None:
    images.run("qemu-img", "create", "-q", "-f", format, merged / "disk", 16 * MiB)
    images.qemu_io(merged / "disk", "write -P 0x5a 3M 1M", format=format)
    before = images.digest(merged / "disk", format)

    image = Preallocator().preallocate(merged / "disk", "rewrite", format=format)

    assert (image.state, image.shortfall, images.digest(merged / "disk", format)) == ("preallocated", 0, before)


@kinds.copying_on_write
@pytest.mark.parametrize("on_unsupported", ["metadata", "error"])
def test_compressed_folder_below_overlayfs_is_told_of(
    merged: pathlib.Path, on_unsupported: OnUnsupported, caplog: pytest.LogCaptureFixture
) -> None:
    compressed = merged / on_unsupported
    compressed.mkdir()
    images.run("chattr", "+c", compressed)
    strategy = Preallocator(on_unsupported=on_unsupported)

    if on_unsupported == "error":
        with pytest.raises(exceptions.UnsupportedFilesystem, match=r"btrfs filesystem below overlayfs \(.*chattr \+c"):
            strategy.create(compressed / "disk", 16 * MiB)
    else:
        assert strategy.create(compressed / "disk", 16 * MiB).state == "mapped"
        assert "compressed, chattr +c" in caplog.text


@kinds.without_fallocate
def test_fallback_below_overlayfs_is_the_one_of_the_filesystem_that_keeps_the_files(merged: pathlib.Path) -> None:
    with pytest.raises(exceptions.UnsupportedFilesystem, match="ext2 filesystem below overlayfs"):
        Preallocator(on_unsupported="error").create(merged / "disk", 16 * MiB)


@pytest.mark.parametrize(("kind", "believed"), [("ext4", "overlay"), ("xfs", "overlay"), ("btrfs", "btrfs")])
def test_overlayfs_whose_files_are_hidden_from_us_is_known_to_copy_on_write_or_not(
    merged: pathlib.Path, kind: str, believed: str
) -> None:
    with (
        loop_filesystem.mounted("tmpfs", MiB) as nothing,
        loop_filesystem.bound(nothing, str(merged.parent / "upperdir")),
    ):
        found = filesystem.under(str(merged))
        image = Preallocator().create(merged / "disk", 16 * MiB)

    assert (found.type, found.copy_on_write, image.state) == (believed, kind == "btrfs", "preallocated")


# Mounts over mounts.


def test_mount_that_is_hidden_by_another_has_no_say(mount_point_of: Callable[[str], pathlib.Path]) -> None:
    with loop_filesystem.mounted("tmpfs", MiB) as outer:
        inner = pathlib.Path(outer, "inner")
        inner.mkdir()
        with loop_filesystem.bound(str(mount_point_of("btrfs")), str(inner)):
            (inner / "file").touch()
            with open(inner / "file", "rb") as below, loop_filesystem.bound(str(mount_point_of("xfs")), outer):
                inner.mkdir()
                (inner / "file").touch()
                try:
                    assert filesystem.type_of(below.fileno()) == "btrfs"
                    assert (type_of(inner / "file"), filesystem.under(str(inner)).name) == ("xfs", "xfs")
                finally:
                    (inner / "file").unlink()
                    inner.rmdir()
            (inner / "file").unlink()


@pytest.mark.parametrize("kind", ["ext4", "btrfs", "tmpfs"])
def test_folder_that_is_bound_to_another_filesystem_is_on_its_own(
    mount_point_of: Callable[[str], pathlib.Path], folder: pathlib.Path, kind: str
) -> None:
    bound = mount_point_of("xfs") / f"bound-{kind}"
    bound.mkdir()
    with loop_filesystem.bound(str(folder), str(bound)):
        image = Preallocator().create(bound / "disk", 16 * MiB)

        assert (type_of(bound / "disk"), image.state) == (kind, "preallocated")
    bound.rmdir()


def test_file_of_a_mount_that_is_gone_is_still_known_by_its_number() -> None:
    with loop_filesystem.mounted("btrfs", 110 * MiB) as mount_point:
        file = open(pathlib.Path(mount_point, "file"), "wb")  # noqa: SIM115
    with file:
        assert (mounts.of(file.fileno()), filesystem.type_of(file.fileno())) == (None, "btrfs")


# A file that is mounted alone, as containers do.


@pytest.fixture
def alone(folder: pathlib.Path, mount_point_of: Callable[[str], pathlib.Path]) -> Iterator[pathlib.Path]:
    """Give a raw disk with holes that is on ext4, by a name in a folder on ext2."""
    images.sparse_file(folder / "disk", 16 * MiB)
    name = mount_point_of("ext2") / "disk"
    name.touch()
    with loop_filesystem.bound(str(folder / "disk"), str(name)):
        yield name
    name.unlink()


def test_file_that_is_mounted_alone_is_promised_what_its_own_filesystem_can(alone: pathlib.Path) -> None:
    image = Preallocator(on_unsupported="error").preallocate(alone, "reserve", format="raw")

    assert (image.state, images.allocated(alone)) == ("preallocated", 16 * MiB)


def test_space_is_looked_for_where_the_file_lies_that_is_mounted_alone(
    folder: pathlib.Path, mount_point_of: Callable[[str], pathlib.Path]
) -> None:
    images.sparse_file(folder / "disk", 64 * MiB)
    with loop_filesystem.mounted("tmpfs", MiB) as small:
        name = pathlib.Path(small, "disk")
        name.touch()
        with loop_filesystem.bound(str(folder / "disk"), str(name)):
            image = Preallocator().preallocate(name, "reserve", format="raw")

    assert (image.state, os.path.getsize(folder / "disk")) == ("preallocated", 64 * MiB)
