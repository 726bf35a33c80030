# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of real disks are, beside what qemu-img map and filefrag say."""

from __future__ import annotations

import os
import pathlib
import random
from xml.etree import ElementTree

import images
import pytest

from imgprealloc import FormatMismatch
from imgprealloc import Layout
from imgprealloc import Preallocator
from imgprealloc import UnsupportedFilesystem
from imgprealloc import UnsupportedFormat
from imgprealloc.cli import picture
from imgprealloc.layout import Kind
from imgprealloc.layout import Stretch

from . import kinds

MiB = 1 << 20
KiB = 1 << 10

# Of which a column is less than a cluster, so that each stretch is told by itself.
SIZE = 12 * MiB
CLUSTER = 64 * KiB


def layout(disk: pathlib.Path, format: str = "qcow2") -> Layout:
    return Preallocator().layout(disk, format=format)


def lengths(found: Layout) -> dict[Kind, int]:
    """Add up what has a place, by its kind."""
    sums: dict[Kind, int] = {}
    for stretch in found.stretches:
        sums[stretch.kind] = sums.get(stretch.kind, 0) + stretch.length
    return sums


def test_qcow2_stretches_are_where_qemu_img_says_that_they_are(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", SIZE)
    clusters = random.Random(1).sample(range(SIZE // CLUSTER), 100)
    images.qemu_io(disk, *(f"write -q -P 1 {cluster * CLUSTER} {CLUSTER}" for cluster in clusters))

    found = layout(disk)

    assert found.dots == frozenset()
    assert {(each.start, each.length, each.place) for each in found.stretches} == {
        (extent["start"], extent["length"], extent["offset"]) for extent in images.extents(disk) if extent["data"]
    }
    assert found.pieces > 50
    assert (found.virtual_size, found.low, found.high) == (SIZE, 0, disk.stat().st_size)


def test_new_overlay_shows_its_base_and_zeros_beyond(folder: pathlib.Path) -> None:
    base = images.random_file(folder / "base", SIZE // 2)

    found = layout(images.qcow2(folder / "disk", SIZE, backing=base))

    assert (found.stretches, found.dots, found.pieces) == ((), frozenset(), 0)
    assert {column for column, kind in found.bare if kind == "base"} == set(range(120))
    assert {column for column, kind in found.bare if kind == "nothing"} == set(range(120, 240))


def test_overlay_whose_base_is_gone_is_drawn(folder: pathlib.Path) -> None:
    base = images.random_file(folder / "base", SIZE // 2)
    disk = images.qcow2(folder / "disk", SIZE, backing=base)
    base.unlink()

    assert layout(disk).kinds == {"base"}


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_preallocated_disk_is_in_one_piece_with_its_place_unwritten(folder: pathlib.Path, format: str) -> None:
    disk = folder / "disk"
    Preallocator().create(disk, SIZE, format=format)

    found = layout(disk, format)

    # QEMU writes a raw file's first block, to learn its alignment.
    written = 4 * KiB if format == "raw" else 0
    assert lengths(found) == {"unwritten": SIZE - written}
    assert {dot.kind for dot in found.dots} == ({"data"} if written else set())
    assert found.pieces < 10 if written else found.pieces == 1


@pytest.mark.parametrize("subclusters", ["unallocated", "allocated", "copied"])
def test_what_a_guest_has_written_to_a_preallocated_overlay_is_data_and_the_rest_is_not(
    folder: pathlib.Path, base: pathlib.Path, subclusters: str
) -> None:
    disk = folder / "disk"
    size = 48 * MiB
    strategy = Preallocator(overlay_subclusters=subclusters)  # type: ignore[arg-type]
    strategy.create(disk, size, str(base), backing_format="raw")
    images.qemu_io(disk, "write -P 1 30M 2M")

    found = layout(disk)

    data = 2 * MiB if subclusters != "copied" else 26 * MiB
    assert lengths(found) == {"data": data, "unwritten": size - data}
    assert Stretch(30 * MiB, 2 * MiB, _place(found, 30 * MiB), "data") in found.stretches


def test_overlay_that_is_written_with_zeros_shows_its_base_all_the_same(
    folder: pathlib.Path, base: pathlib.Path
) -> None:
    disk = folder / "disk"
    Preallocator("full").create(disk, 24 * MiB, str(base), backing_format="raw")

    assert lengths(layout(disk)) == {"unwritten": 24 * MiB}


def _place(found: Layout, start: int) -> int:
    (place,) = (each.place for each in found.stretches if each.start == start)
    assert place is not None
    return place


def test_zeroed_clusters_hide_the_base(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 24 * MiB, backing=base)
    images.qemu_io(disk, "write -z 0 12M")

    found = layout(disk)

    assert {kind for column, kind in found.bare if column < 120} == {"nothing"}
    assert {kind for column, kind in found.bare if column >= 120} == {"base"}


def test_data_that_is_marked_as_zeros_keeps_its_place_and_is_data_no_more(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", SIZE)
    images.qemu_io(disk, f"write -P 1 0 {SIZE}", "write -z 4M 4M")

    assert lengths(layout(disk)) == {"data": 8 * MiB, "unwritten": 4 * MiB}


def test_compressed_clusters_are_data_in_their_place(folder: pathlib.Path) -> None:
    source = folder / "source"
    source.write_bytes(b"0123456789abcdef" * (SIZE // 16))
    disk = images.qcow2_of(folder / "disk", source, "-c")

    found = layout(disk)

    assert lengths(found) == {"data": SIZE}
    assert all(each.place is not None and each.place < disk.stat().st_size for each in found.stretches)


@kinds.with_reflinks
def test_raw_disk_s_places_are_those_that_filefrag_tells(folder: pathlib.Path) -> None:
    disk = images.sparse_file(folder / "disk", SIZE)
    images.qemu_io(disk, "write -P 1 1M 1M", "write -P 2 8M 1M", format="raw")
    images.run("fallocate", "-o", 4 * MiB, "-l", MiB, disk)
    os.sync()
    copy = folder / "copy"
    images.run("cp", "--reflink=always", disk, copy)

    found, shared = layout(disk, "raw"), layout(copy, "raw")

    assert lengths(found) == {"shared": 2 * MiB, "unwritten": MiB}
    assert lengths(shared)["shared"] == 2 * MiB
    assert {(each.start, each.place) for each in found.stretches} == _filefrag(disk)
    assert {kind for column, kind in found.bare} == {"nothing"}


def _filefrag(path: pathlib.Path) -> set[tuple[int, int]]:
    lines = images.run("filefrag", "-s", "-v", "-b512", path).splitlines()[3:-1]
    numbers = [[int(part.split("..")[0]) * 512 for part in line.split(":")[1:3]] for line in lines]
    return {(start, place) for start, place in numbers}


@pytest.mark.parametrize("kind", ["tmpfs"])
def test_filesystem_that_does_not_tell_is_an_error_of_ours(folder: pathlib.Path) -> None:
    disk = images.sparse_file(folder / "disk", SIZE)

    with pytest.raises(UnsupportedFilesystem, match="does not tell where"):
        layout(disk, "raw")


def test_disk_that_is_not_qcow2_is_an_error(folder: pathlib.Path) -> None:
    with pytest.raises(FormatMismatch):
        layout(images.sparse_file(folder / "disk", SIZE))


def test_map_that_is_too_large_is_refused_before_it_is_read(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", SIZE)
    with open(disk, "r+b") as file:
        file.seek(24)
        file.write((1 << 62).to_bytes(8, "big"))

    with pytest.raises(UnsupportedFormat, match="too many for a picture"):
        layout(disk)


def test_header_whose_table_is_nowhere_is_drawn_as_empty(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", SIZE)
    with open(disk, "r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 8)

    assert layout(disk).kinds == {"nothing"}


def test_large_disk_s_picture_is_small(folder: pathlib.Path) -> None:
    disk = folder / "disk"
    images.qcow2(disk, 1 << 40, preallocation="metadata")
    images.qemu_io(disk, "write -P 1 300G 1M")

    found = layout(disk)

    assert found.kinds == {"unwritten", "data"}
    assert found.pieces < 5000
    drawn = picture.svg([picture.Panel(str(disk), "qcow2", found)])
    assert len(drawn) < 100 * KiB
    ElementTree.fromstring(drawn)
