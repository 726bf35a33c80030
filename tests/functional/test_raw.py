# SPDX-License-Identifier: Apache-2.0
"""raw: holes filled, shared extents unshared, and not a byte changed."""

from __future__ import annotations

import os
import pathlib

import images
import pytest

from functional import kinds
from imgprealloc import Mode
from imgprealloc import Preallocator
from imgprealloc import exceptions

KiB, MiB = 1 << 10, 1 << 20


def with_holes(path: pathlib.Path) -> pathlib.Path:
    """Make a raw disk of 16 MiB with random data in every second MiB."""
    images.sparse_file(path, 16 * MiB)
    with open(path, "r+b") as file:
        for start in range(0, 16 * MiB, 2 * MiB):
            file.seek(start)
            file.write(os.urandom(MiB))
        os.fsync(file.fileno())
    return path


def reflinked(path: pathlib.Path, source: pathlib.Path) -> pathlib.Path:
    """Copy a file as Nova's cp does, by sharing its extents."""
    images.run("cp", "--reflink=always", source, path)
    return path


@pytest.fixture
def disk(folder: pathlib.Path) -> pathlib.Path:
    return with_holes(folder / "disk")


def test_created_disk_is_preallocated_with_nothing_short(folder: pathlib.Path) -> None:
    image = Preallocator().create(folder / "disk", 16 * MiB, format="raw")

    assert (image.state, image.shortfall) == ("preallocated", 0)


def test_created_disk_takes_all_its_space(folder: pathlib.Path) -> None:
    Preallocator().create(folder / "disk", 16 * MiB, format="raw")

    assert images.allocated(folder / "disk") >= 16 * MiB


def test_created_disk_reads_as_zeros(folder: pathlib.Path) -> None:
    zeros = images.sparse_file(folder / "zeros", 16 * MiB)

    Preallocator().create(folder / "disk", 16 * MiB, format="raw")

    assert images.file_digest(folder / "disk") == images.file_digest(zeros)


@pytest.mark.parametrize("size", [1, 100, 513, 4097, 16 * MiB + 100])
def test_created_disk_of_no_whole_sectors_is_preallocated(folder: pathlib.Path, size: int) -> None:
    image = Preallocator().create(folder / "disk", size, format="raw")

    assert (image.state, image.virtual_size) == ("preallocated", -(-size // 512) * 512)


def test_mode_metadata_creates_a_thin_disk(folder: pathlib.Path) -> None:
    image = Preallocator("metadata").create(folder / "disk", 16 * MiB, format="raw")

    # QEMU writes a first block, to find out how it is to be aligned.
    assert (image.state, image.shortfall) == ("thin", 16 * MiB - 4096)


def test_mode_full_creates_a_disk_that_is_written(folder: pathlib.Path) -> None:
    Preallocator("full").create(folder / "disk", 16 * MiB, format="raw")

    assert images.unwritten(folder / "disk") == 0


def test_mode_falloc_creates_a_disk_that_is_not_written(folder: pathlib.Path) -> None:
    Preallocator("falloc").create(folder / "disk", 16 * MiB, format="raw")

    assert images.unwritten(folder / "disk") >= 16 * MiB - 4096


def test_disk_with_holes_is_thin(disk: pathlib.Path) -> None:
    image = Preallocator().inspect(disk, format="raw")

    assert (image.state, image.shortfall) == ("thin", 8 * MiB)


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_holes_are_filled(disk: pathlib.Path, mode: Mode) -> None:
    image = Preallocator(mode).preallocate(disk, format="raw")

    assert (image.state, images.allocated(disk) >= 16 * MiB) == ("preallocated", True)


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_filling_changes_no_byte(disk: pathlib.Path, mode: Mode) -> None:
    before = images.file_digest(disk)

    Preallocator(mode).preallocate(disk, format="raw")

    assert images.file_digest(disk) == before


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_filled_disk_is_the_same_file(disk: pathlib.Path, mode: Mode) -> None:
    before = disk.stat().st_ino

    Preallocator(mode).preallocate(disk, format="raw")

    assert disk.stat().st_ino == before


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_second_call_writes_nothing(disk: pathlib.Path, mode: Mode) -> None:
    Preallocator(mode).preallocate(disk, format="raw")
    before = images.identity(disk)

    Preallocator(mode).preallocate(disk, format="raw")

    assert images.identity(disk) == before


def test_mode_metadata_leaves_a_raw_disk_alone(disk: pathlib.Path) -> None:
    before = images.identity(disk)

    Preallocator("metadata").preallocate(disk, format="raw")

    assert images.identity(disk) == before


def test_mode_full_writes_the_holes(disk: pathlib.Path) -> None:
    Preallocator("full").preallocate(disk, format="raw")

    assert images.unwritten(disk) == 0


@kinds.common
def test_mode_full_keeps_data_that_is_dirty_over_unwritten_extents(folder: pathlib.Path) -> None:
    disk = images.sparse_file(folder / "disk", 16 * MiB)
    images.run("fallocate", "-n", "-l", 8 * MiB, disk)
    with open(disk, "r+b") as file:
        for start in range(0, 8 * MiB, MiB):
            file.seek(start + 12345)
            file.write(os.urandom(300 * KiB))
    # Not synced: the extent map calls all of it unwritten still.
    before = images.file_digest(disk)

    Preallocator("full").preallocate(disk, format="raw")

    assert images.file_digest(disk) == before


@kinds.common
def test_mode_full_writes_the_unwritten_parts_between_data_that_somebody_has_read(folder: pathlib.Path) -> None:
    disk = images.sparse_file(folder / "disk", 32 * MiB)
    images.run("fallocate", "-n", "-l", 24 * MiB, disk)
    with open(disk, "r+b") as file:
        for start in range(0, 24 * MiB, 3 * MiB):
            os.pwrite(file.fileno(), os.urandom(64 * KiB), start)
        os.fsync(file.fileno())
    before = images.file_digest(disk)

    Preallocator("full").preallocate(disk, format="raw")

    assert (images.unwritten(disk), images.file_digest(disk)) == (0, before)


def test_mode_full_writes_the_unwritten_parts_beside_dirty_data(folder: pathlib.Path) -> None:
    disk = images.sparse_file(folder / "disk", 16 * MiB)
    images.run("fallocate", "-n", "-l", 8 * MiB, disk)
    with open(disk, "r+b") as file:
        file.write(os.urandom(300 * KiB))

    Preallocator("full").preallocate(disk, format="raw")

    assert images.unwritten(disk) == 0


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_hole_at_the_very_end_is_filled(folder: pathlib.Path, mode: Mode) -> None:
    disk = images.random_file(folder / "disk", MiB)
    os.truncate(disk, 4 * MiB + 100)

    image = Preallocator(mode).preallocate(disk, format="raw")

    assert (image.state, image.file_size) == ("preallocated", 4 * MiB + 100)


def test_disk_that_is_one_hole_is_filled(folder: pathlib.Path) -> None:
    disk = images.sparse_file(folder / "disk", 16 * MiB)

    assert Preallocator().preallocate(disk, format="raw").state == "preallocated"


def test_empty_disk_has_nothing_to_preallocate(folder: pathlib.Path) -> None:
    disk = images.sparse_file(folder / "disk", 0)

    assert Preallocator().preallocate(disk, format="raw").shortfall == 0


def test_disk_without_holes_is_preallocated_already(folder: pathlib.Path) -> None:
    disk = images.random_file(folder / "disk", 4 * MiB)

    assert Preallocator().inspect(disk, format="raw").state == "preallocated"


def test_holes_that_a_sparse_copy_made_are_healed(folder: pathlib.Path, disk: pathlib.Path) -> None:
    Preallocator().preallocate(disk, format="raw")
    copy = folder / "copy"
    images.run("cp", "--reflink=never", "--sparse=always", disk, copy)

    states = Preallocator().inspect(copy, format="raw").state, Preallocator().preallocate(copy, format="raw").state

    assert states == ("thin", "preallocated")


@kinds.with_reflinks
def test_reflinked_disk_is_not_preallocated(folder: pathlib.Path) -> None:
    base = images.random_file(folder / "base", 16 * MiB)

    image = Preallocator().inspect(reflinked(folder / "disk", base), format="raw")

    assert (image.state, image.shared_bytes, image.shortfall) == ("thin", 16 * MiB, 16 * MiB)


@kinds.with_reflinks
def test_reflinked_disk_is_not_mended_by_fallocate(folder: pathlib.Path) -> None:
    base = images.random_file(folder / "base", 16 * MiB)
    disk = reflinked(folder / "disk", base)

    images.run("fallocate", "-n", "-l", 16 * MiB, disk)

    assert images.shared(disk) == 16 * MiB


@kinds.with_reflinks
@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_reflinked_disk_is_unshared(folder: pathlib.Path, mode: Mode) -> None:
    disk = reflinked(folder / "disk", images.random_file(folder / "base", 16 * MiB))

    image = Preallocator(mode).preallocate(disk, format="raw")

    assert (image.state, images.shared(disk)) == ("preallocated", 0)


@kinds.with_reflinks
@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_unsharing_changes_no_byte_of_either(folder: pathlib.Path, mode: Mode) -> None:
    base = with_holes(folder / "base")
    before = images.file_digest(base)
    disk = reflinked(folder / "disk", base)

    Preallocator(mode).preallocate(disk, format="raw")

    assert (images.file_digest(disk), images.file_digest(base)) == (before, before)


@kinds.with_reflinks
@pytest.mark.parametrize("size", [16 * MiB + 512, 16 * MiB + 100])
def test_unsharing_makes_a_disk_of_no_whole_blocks_no_longer(folder: pathlib.Path, size: int) -> None:
    disk = reflinked(folder / "disk", images.random_file(folder / "base", size))
    before = images.file_digest(disk)

    image = Preallocator().preallocate(disk, format="raw")

    assert (image.state, images.shared(disk)) == ("preallocated", 0)
    assert (disk.stat().st_size, images.file_digest(disk)) == (size, before)


@kinds.with_reflinks
def test_reflinked_disk_that_was_grown_is_unshared_and_filled(folder: pathlib.Path) -> None:
    disk = reflinked(folder / "disk", images.random_file(folder / "base", 8 * MiB + 100))
    os.truncate(disk, 16 * MiB)

    image = Preallocator().preallocate(disk, format="raw")

    assert (image.state, image.shortfall, image.shared_bytes) == ("preallocated", 0, 0)


@kinds.with_reflinks
def test_disk_in_thousands_of_shared_pieces_is_unshared(folder: pathlib.Path) -> None:
    base = images.sparse_file(folder / "base", 16 * MiB)
    with open(base, "r+b") as file:
        for start in range(0, 16 * MiB, 8 * KiB):
            os.pwrite(file.fileno(), b"\x5a" * 4096, start)
    disk = reflinked(folder / "disk", base)

    image = Preallocator().preallocate(disk, format="raw")

    assert (image.state, images.shared(disk)) == ("preallocated", 0)


def test_raw_disk_has_no_backing_file(folder: pathlib.Path) -> None:
    with pytest.raises(exceptions.UnsupportedFormat):
        Preallocator().create(folder / "disk", 16 * MiB, "base", format="raw")
