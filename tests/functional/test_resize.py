# SPDX-License-Identifier: Apache-2.0
"""Growing: the new part is preallocated, reads as zeros, and the old part is as it was.

The oracle is a plain thin disk that got the same writes and stock qemu-img's
own resize.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import pathlib
import struct
from typing import Any

import images
import pytest

from functional import kinds
from functional.modes import MODES
from imgprealloc import Mode
from imgprealloc import OverlaySubclusters
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc import lock
from imgprealloc import qemu_img

KiB, MiB = 1 << 10, 1 << 20

MakePair = Callable[..., "tuple[pathlib.Path, pathlib.Path]"]


# Base, old size, new size. A cluster has 128 KiB.
GROWTHS = {
    "from aligned to aligned": (8 * MiB, 12 * MiB, 20 * MiB),
    "from and to inside a cluster": (8 * MiB, 12 * MiB + 512, 20 * MiB + 512),
    "within the last cluster": (8 * MiB, 12 * MiB + 512, 12 * MiB + 1024),
    "to the last cluster's end": (8 * MiB, 12 * MiB + 512, 12 * MiB + 128 * KiB),
    "from inside a subcluster": (8 * MiB, 12 * MiB + 66 * KiB, 20 * MiB),
    "by one sector over a cluster's end": (8 * MiB, 12 * MiB, 12 * MiB + 512),
    "base of odd size": (8 * MiB + 300, 12 * MiB + 512, 20 * MiB),
    "base as long as the disk": (12 * MiB, 12 * MiB, 20 * MiB),
    "base longer, aligned": (16 * MiB, 12 * MiB, 20 * MiB),
    "base longer, inside a cluster": (16 * MiB + 300, 12 * MiB + 512, 20 * MiB),
    "base longer, inside a subcluster": (16 * MiB + 300, 12 * MiB + 66 * KiB, 20 * MiB + 512),
    "base longer than the grown disk": (24 * MiB, 12 * MiB + 512, 20 * MiB + 512),
    "base longer, within the last cluster": (16 * MiB, 12 * MiB + 512, 12 * MiB + 4096),
    "base longer by less than a cluster": (12 * MiB + 120 * KiB, 12 * MiB + 66 * KiB, 20 * MiB),
    "base ends in the disk's last cluster": (12 * MiB + 60 * KiB + 100, 12 * MiB + 66 * KiB, 20 * MiB),
    "base empty": (0, 12 * MiB + 512, 20 * MiB),
    "disk of one sector": (8 * MiB, 512, 20 * MiB),
}

# Those that each wrong idea of the base's end would spoil.
HARD = {
    name: GROWTHS[name]
    for name in (
        "from and to inside a cluster",
        "base of odd size",
        "base longer, inside a subcluster",
        "base longer by less than a cluster",
        "base ends in the disk's last cluster",
    )
}


@pytest.fixture
def pair(folder: pathlib.Path) -> MakePair:
    """Give a function that makes a preallocated overlay and a plain one, with the same data in them."""

    def pair(
        base_size: int,
        size: int,
        mode: Mode = "falloc",
        format: str = "raw",
        subclusters: OverlaySubclusters = "unallocated",
    ) -> tuple[pathlib.Path, pathlib.Path]:
        base = images.random_file(folder / "base", base_size)
        if format == "qcow2":
            base = images.qcow2_of(folder / "base.qcow2", base)
        plain = images.qcow2(folder / "plain", size, backing=base, backing_format=format)
        strategy = Preallocator(mode, overlay_subclusters=subclusters)
        strategy.create(folder / "disk", size, str(base), backing_format=format)
        for disk in (plain, folder / "disk"):
            images.qemu_io(disk, "write -P 0x5a 0 512", f"write -P 0xa5 {size - 512} 512")
        return folder / "disk", plain

    return pair


def grow_plainly(path: pathlib.Path, size: int) -> None:
    images.run("qemu-img", "resize", "-q", "-f", "qcow2", path, size)


@pytest.mark.parametrize(("base_size", "old", "new"), GROWTHS.values(), ids=GROWTHS)
def test_grown_overlay_reads_like_one_grown_by_qemu(pair: MakePair, base_size: int, old: int, new: int) -> None:
    disk, plain = pair(base_size, old)
    grow_plainly(plain, new)

    Preallocator().resize(disk, new, format="qcow2")

    assert not images.differences(disk, plain)


@pytest.mark.parametrize("mode", ["full", "metadata"])
@pytest.mark.parametrize(("base_size", "old", "new"), HARD.values(), ids=HARD)
def test_overlay_grown_in_another_mode_reads_like_one_grown_by_qemu(
    pair: MakePair, base_size: int, old: int, new: int, mode: Mode
) -> None:
    disk, plain = pair(base_size, old, mode)
    grow_plainly(plain, new)

    Preallocator(mode).resize(disk, new, format="qcow2")

    assert not images.differences(disk, plain)


@pytest.mark.parametrize(("base_size", "old", "new"), HARD.values(), ids=HARD)
def test_grown_overlay_over_a_qcow2_base_reads_like_one_grown_by_qemu(
    pair: MakePair, base_size: int, old: int, new: int
) -> None:
    disk, plain = pair(base_size, old, format="qcow2")
    grow_plainly(plain, new)

    Preallocator().resize(disk, new, format="qcow2")

    assert not images.differences(disk, plain)


@pytest.mark.parametrize(("base_size", "old", "new"), HARD.values(), ids=HARD)
def test_grown_overlay_is_preallocated_and_clean(pair: MakePair, base_size: int, old: int, new: int) -> None:
    disk, _ = pair(base_size, old)

    image = Preallocator().resize(disk, new, format="qcow2")

    assert (image.state, image.virtual_size, images.check(disk)["check-errors"]) == ("preallocated", new, 0)


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize(("base_size", "old", "new"), HARD.values(), ids=HARD)
def test_grown_part_of_an_overlay_with_allocated_subclusters_has_them_too(
    pair: MakePair, base_size: int, old: int, new: int, mode: Mode
) -> None:
    disk, _ = pair(base_size, old, mode, subclusters="copied")

    Preallocator(mode).resize(disk, new, format="qcow2")

    # From the next cluster on, unless the base is longer than the old disk
    # and ends behind it: then all of the grown part hides it.
    assert images.allocated_from(disk) <= min(-(-old // (128 * KiB)) * 128 * KiB, new)


@pytest.mark.parametrize("subclusters", ["allocated", "copied"])
@pytest.mark.parametrize(("base_size", "old", "new"), HARD.values(), ids=HARD)
def test_grown_overlay_with_allocated_subclusters_reads_like_one_grown_by_qemu(
    pair: MakePair, base_size: int, old: int, new: int, subclusters: OverlaySubclusters
) -> None:
    disk, plain = pair(base_size, old, subclusters=subclusters)
    grow_plainly(plain, new)

    Preallocator().resize(disk, new, format="qcow2")

    assert not images.differences(disk, plain)


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("subclusters", ["unallocated", "allocated", "copied"])
def test_overlay_without_allocated_subclusters_grows_without_them(
    pair: MakePair, mode: Mode, subclusters: OverlaySubclusters
) -> None:
    disk, _ = pair(8 * MiB, 12 * MiB, mode)
    before = images.allocated_in_map(disk)

    Preallocator(mode, overlay_subclusters=subclusters).resize(disk, 20 * MiB, format="qcow2")

    assert images.allocated_in_map(disk) == before


@pytest.mark.parametrize("mode", MODES)
def test_grown_overlay_has_every_cluster_mapped(pair: MakePair, mode: Mode) -> None:
    disk, _ = pair(8 * MiB, 12 * MiB, mode)

    Preallocator(mode).resize(disk, 20 * MiB, format="qcow2")

    assert images.check(disk)["allocated-clusters"] == 20 * MiB // (128 * KiB)


def test_grown_overlay_has_no_hole_in_its_file(pair: MakePair) -> None:
    disk, _ = pair(8 * MiB, 12 * MiB)

    Preallocator().resize(disk, 20 * MiB, format="qcow2")

    assert images.allocated(disk) >= disk.stat().st_size


def test_grown_overlay_keeps_its_base(pair: MakePair) -> None:
    disk, plain = pair(8 * MiB, 12 * MiB)

    Preallocator().resize(disk, 20 * MiB, format="qcow2")

    assert images.info(disk)["full-backing-filename"] == images.info(plain)["full-backing-filename"]


def test_growing_leaves_nothing_beside_the_disk(pair: MakePair) -> None:
    disk, _ = pair(8 * MiB, 12 * MiB)

    Preallocator().resize(disk, 20 * MiB, format="qcow2")

    assert sorted(os.listdir(disk.parent)) == ["base", "disk", "plain"]


@pytest.mark.parametrize("mode", MODES)
def test_overlay_that_grows_again_and_again_reads_like_one_grown_by_qemu(pair: MakePair, mode: Mode) -> None:
    disk, plain = pair(16 * MiB + 300, 4 * MiB + 512, mode)

    for size in (5 * MiB, 9 * MiB + 512, 9 * MiB + 1024, 15 * MiB + 66 * KiB, 15 * MiB + 100 * KiB, 21 * MiB + 512):
        Preallocator(mode).resize(disk, size, format="qcow2")
        grow_plainly(plain, size)
        for either in (disk, plain):
            images.qemu_io(either, f"write -P 0x77 {size - 70000 // 512 * 512} 512")

    assert not images.differences(disk, plain)


def test_overlay_that_grows_again_and_again_stays_preallocated(pair: MakePair) -> None:
    disk, _ = pair(8 * MiB + 300, 4 * MiB + 512)

    states = {Preallocator().resize(disk, size, format="qcow2").state for size in (5 * MiB, 9 * MiB + 512, 21 * MiB)}

    assert states == {"preallocated"}


def test_overlay_can_be_grown_in_a_mode_of_its_own_each_time(pair: MakePair) -> None:
    disk, plain = pair(8 * MiB + 300, 4 * MiB + 512, "metadata")

    sizes: dict[Mode, int] = {"full": 9 * MiB, "metadata": 12 * MiB + 512, "falloc": 16 * MiB}
    for mode, size in sizes.items():
        Preallocator(mode).resize(disk, size, format="qcow2")
        grow_plainly(plain, size)

    assert not images.differences(disk, plain)


def ending_pair(
    folder: pathlib.Path, base_size: int, size: int, format: str, mode: Mode | None
) -> tuple[pathlib.Path, pathlib.Path]:
    """Make an overlay, one of stock Nova's where there is no mode, and a plain one, to which nobody has written."""
    base = images.random_file(folder / "base", base_size)
    if format == "qcow2":
        base = images.qcow2_of(folder / "base.qcow2", base)
    disk, plain = folder / "disk", images.qcow2(folder / "plain", size, backing=base, backing_format=format)
    if mode is None:
        images.qcow2(disk, size, backing=base, backing_format=format)
    else:
        Preallocator(mode).create(disk, size, str(base), backing_format=format)
    return disk, plain


# The last cluster, when a disk that hides its base in what is new ends within it.

SHOWN = {
    name: GROWTHS[name]
    for name in (
        "base longer, inside a subcluster",
        "base longer by less than a cluster",
        "base ends in the disk's last cluster",
    )
}


@pytest.mark.parametrize("mode", ["metadata", None], ids=["ours", "stock's"])
@pytest.mark.parametrize("written", [0, 32 * KiB], ids=["not written to", "written in part"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize(("base_size", "old", "new"), SHOWN.values(), ids=SHOWN)
def test_last_cluster_keeps_the_base_that_shows_in_it_in_mode_metadata(
    folder: pathlib.Path, base_size: int, old: int, new: int, format: str, written: int, mode: Mode | None
) -> None:
    disk, plain = ending_pair(folder, base_size, old, format, mode)
    last = old // (128 * KiB) * 128 * KiB
    for either in (disk, plain):
        images.qemu_io(either, *([f"write -P 0x5a {last} {min(written, old - last)}"] if written else []))
    grow_plainly(plain, new)

    Preallocator("metadata").resize(disk, new, format="qcow2")

    assert not images.differences(disk, plain)
    assert images.check(disk)["check-errors"] == 0


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize(("base_size", "old", "new"), SHOWN.values(), ids=SHOWN)
def test_last_cluster_keeps_the_base_that_shows_in_it_where_all_else_is_written(
    folder: pathlib.Path, base_size: int, old: int, new: int, format: str, mode: Mode
) -> None:
    disk, plain = ending_pair(folder, base_size, old, format, mode)
    for either in (disk, plain):
        images.qemu_io(either, f"write -P 0x5a 0 {old // (128 * KiB) * 128 * KiB}")
    grow_plainly(plain, new)

    Preallocator(mode).resize(disk, new, format="qcow2")

    assert not images.differences(disk, plain)
    assert images.check(disk)["check-errors"] == 0


def shrunk(path: pathlib.Path, **options: Any) -> pathlib.Path:
    """Make a disk that was longer, and keeps in its last cluster what was written there beyond its end."""
    disk = images.qcow2(path, 1 * MiB + 60 * KiB, **options)
    images.qemu_io(disk, f"write -P 0x5a {1 * MiB} {60 * KiB}")
    images.run("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", disk, 1 * MiB + 512)
    return disk


@pytest.mark.parametrize("size", [1 * MiB + 4 * KiB, 2 * MiB], ids=["within its last cluster", "beyond it"])
def test_qemu_alone_shows_what_a_shrink_has_left(folder: pathlib.Path, size: int) -> None:
    disk, plain = shrunk(folder / "disk"), images.qcow2(folder / "plain", size)
    images.qemu_io(plain, f"write -P 0x5a {1 * MiB} 512")

    grow_plainly(disk, size)

    assert images.differences(disk, plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1 * MiB + 4 * KiB, 2 * MiB], ids=["within its last cluster", "beyond it"])
@pytest.mark.parametrize(
    "options", [{}, {"extended_l2": "on", "cluster_size": 128 * KiB}], ids=["plain", "subclusters"]
)
def test_what_a_shrink_has_left_does_not_come_back_as_a_disk_grows(
    folder: pathlib.Path, options: dict[str, Any], size: int, mode: Mode
) -> None:
    disk, plain = shrunk(folder / "disk", **options), images.qcow2(folder / "plain", size)
    images.qemu_io(plain, f"write -P 0x5a {1 * MiB} 512")

    Preallocator(mode).resize(disk, size, format="qcow2")

    assert not images.differences(disk, plain)
    assert images.check(disk)["check-errors"] == 0


def cut_short(disk: pathlib.Path, size: int) -> None:
    """Take the last step of a growth back, as a kill just before it does: the new size in the header."""
    with open(disk, "r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", size))


@pytest.mark.parametrize("size", [64 * MiB, 64 * MiB - 512], ids=["aligned", "inside a cluster"])
@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "stock's"])
def test_what_a_killed_growth_has_mapped_beyond_the_end_is_not_taken_for_the_disk_s(
    folder: pathlib.Path, is_ours: bool, size: int
) -> None:
    base = images.random_file(folder / "base", 8 * MiB)
    disk = folder / "disk"
    if is_ours:
        Preallocator(overlay_cluster_size=16 * KiB).create(disk, size, str(base), backing_format="raw")
    else:
        images.qcow2(disk, size, backing=base, cluster_size=16 * KiB)
    before = Preallocator().inspect(disk, format="qcow2")
    # Far enough for tables of its own: one is for 16 or 32 MiB.
    Preallocator().resize(disk, 112 * MiB, format="qcow2")
    cut_short(disk, size)

    after = Preallocator().inspect(disk, format="qcow2")

    assert (after.state, after.clusters) == (before.state, before.clusters)
    # QEMU has given the last one a place, where it ends within it.
    assert (after.mapped_clusters or 0) - (before.mapped_clusters or 0) == (not is_ours and size % MiB > 0)
    grown = Preallocator().resize(disk, 112 * MiB, format="qcow2")
    assert (grown.state == "preallocated", grown.virtual_size) == (is_ours, 112 * MiB)


def ending_in_compressed(path: pathlib.Path, base: pathlib.Path | None) -> pathlib.Path:
    """Make a disk with subclusters that ends within a cluster, which is compressed."""
    size, last = 1 * MiB - 512, 1 * MiB - 128 * KiB
    disk = images.qcow2(path, size, backing=base, extended_l2="on", cluster_size=128 * KiB)
    images.qemu_io(disk, f"write -c -P 0x5a {last} {size - last}")
    return disk


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_qemu_alone_loses_a_compressed_last_cluster_as_it_grows_a_disk(folder: pathlib.Path, mode: Mode) -> None:
    disk, plain = (ending_in_compressed(folder / name, None) for name in ("disk", "plain"))
    grow_plainly(plain, 2 * MiB)

    images.run("qemu-img", "resize", "-q", "-f", "qcow2", f"--preallocation={mode}", disk, 2 * MiB)

    assert images.differences(disk, plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1 * MiB, 2 * MiB], ids=["within its last cluster", "beyond it"])
@pytest.mark.parametrize("base_size", [None, 512 * KiB, 2 * MiB], ids=["no base", "shorter base", "longer base"])
def test_compressed_last_cluster_is_kept_as_a_disk_grows(
    folder: pathlib.Path, base_size: int | None, size: int, mode: Mode
) -> None:
    base = None if base_size is None else images.random_file(folder / "base", base_size)
    disk, plain = (ending_in_compressed(folder / name, base) for name in ("disk", "plain"))
    grow_plainly(plain, size)
    others = sorted(folder.iterdir())

    Preallocator(mode).resize(disk, size, format="qcow2")

    assert not images.differences(disk, plain)
    assert images.check(disk)["check-errors"] == 0
    assert sorted(folder.iterdir()) == others


def test_write_to_a_compressed_last_cluster_that_comes_meanwhile_is_kept(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = ending_in_compressed(folder / "disk", None)
    size = images.info(disk)["virtual-size"]
    copy_out = qemu_img.copy_out

    def copy_out_before_a_write(*args: Any, **backing: Any) -> None:
        copy_out(*args, **backing)
        images.qemu_io(disk, f"write -P 0x77 {size - 512} 512")

    monkeypatch.setattr(qemu_img, "copy_out", copy_out_before_a_write)

    with pytest.raises(exceptions.ImageInUse, match="written to"):
        Preallocator().resize(disk, 2 * MiB, format="qcow2")

    images.qemu_io(disk, f"read -P 0x77 {size - 512} 512")
    monkeypatch.undo()
    assert Preallocator().resize(disk, 2 * MiB, format="qcow2").virtual_size == 2 * MiB
    images.qemu_io(disk, f"read -P 0x77 {size - 512} 512")


@pytest.mark.parametrize(("base_size", "old", "new"), HARD.values(), ids=HARD)
def test_stock_overlay_reads_the_same_when_it_grew(folder: pathlib.Path, base_size: int, old: int, new: int) -> None:
    base = images.random_file(folder / "base", base_size)
    disk, plain = (images.qcow2(folder / name, old, backing=base) for name in ("disk", "plain"))
    for either in (disk, plain):
        images.qemu_io(either, f"write -P 0xa5 {old - 512} 512")
    grow_plainly(plain, new)

    Preallocator().resize(disk, new, format="qcow2")

    assert not images.differences(disk, plain)


def test_stock_overlay_has_its_grown_part_mapped(folder: pathlib.Path) -> None:
    base = images.random_file(folder / "base", 8 * MiB)
    disk = images.qcow2(folder / "disk", 12 * MiB, backing=base)
    images.qemu_io(disk, "write -P 0xa5 0 64k")

    image = Preallocator().resize(disk, 20 * MiB, format="qcow2")

    assert (image.mapped_clusters, image.clusters) == (1 + 8 * 16, 20 * 16)


def test_stock_overlay_that_was_reserved_is_reserved_after_growth(folder: pathlib.Path) -> None:
    base = images.random_file(folder / "base", 8 * MiB)
    disk = images.qcow2(folder / "disk", 12 * MiB, backing=base)
    images.qemu_io(disk, "write -P 0xa5 0 64k")
    Preallocator().preallocate(disk, format="qcow2")

    image = Preallocator().resize(disk, 20 * MiB, format="qcow2")

    assert (image.state, image.shortfall) == ("reserved", 0)


def test_reserved_disk_stays_within_its_bound_when_it_grew(folder: pathlib.Path) -> None:
    base = images.random_file(folder / "base", 8 * MiB)
    disk = images.qcow2(folder / "disk", 12 * MiB, backing=base)
    images.qemu_io(disk, "write -P 0xa5 0 64k")
    Preallocator().preallocate(disk, format="qcow2")

    image = Preallocator().resize(disk, 20 * MiB, format="qcow2")

    images.qemu_io(disk, *(f"write -P 0x5a {start}M 1M" for start in reversed(range(20))))
    assert disk.stat().st_size <= image.worst_case_size


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("old", "new"), [(12 * MiB, 20 * MiB), (12 * MiB + 512, 20 * MiB + 512)])
def test_disk_without_a_base_keeps_its_content(folder: pathlib.Path, old: int, new: int, mode: Mode) -> None:
    disk, plain = images.qcow2(folder / "disk", old), images.qcow2(folder / "plain", old)
    for either in (disk, plain):
        images.qemu_io(either, f"write -P 0xa5 {old - 512} 512")
    Preallocator(mode).preallocate(disk, existing="rewrite", format="qcow2")
    grow_plainly(plain, new)

    Preallocator(mode).resize(disk, new, format="qcow2")

    assert not images.differences(disk, plain)


@pytest.mark.parametrize("mode", MODES)
def test_disk_without_a_base_stays_what_it_was(folder: pathlib.Path, mode: Mode) -> None:
    before = Preallocator(mode).create(folder / "disk", 12 * MiB)

    after = Preallocator(mode).resize(folder / "disk", 20 * MiB, format="qcow2")

    assert after.state == before.state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("old", [12 * MiB, 12 * MiB + 100])
def test_raw_disk_keeps_its_content(folder: pathlib.Path, old: int, mode: Mode) -> None:
    disk = images.random_file(folder / "disk", old)
    plain = folder / "plain"
    images.run("cp", disk, plain)
    os.truncate(plain, 20 * MiB)

    Preallocator(mode).resize(disk, 20 * MiB, format="raw")

    assert images.file_digest(disk) == images.file_digest(plain)


@pytest.mark.parametrize("mode", MODES)
def test_raw_disk_has_its_grown_part_as_the_mode_says(folder: pathlib.Path, mode: Mode) -> None:
    disk = images.random_file(folder / "disk", 12 * MiB)

    image = Preallocator(mode).resize(disk, 20 * MiB, format="raw")

    assert image.shortfall == (8 * MiB if mode == "metadata" else 0)


def test_raw_disk_in_mode_full_has_its_grown_part_written(folder: pathlib.Path) -> None:
    disk = images.random_file(folder / "disk", 12 * MiB)

    Preallocator("full").resize(disk, 20 * MiB, format="raw")

    assert images.unwritten(disk) == 0


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [12 * MiB, 12 * MiB - 512])
def test_disk_does_not_shrink(folder: pathlib.Path, format: str, size: int) -> None:
    Preallocator().create(folder / "disk", 12 * MiB, format=format)

    with pytest.raises(exceptions.InvalidSize):
        Preallocator().resize(folder / "disk", size, format=format)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_that_may_not_shrink_is_untouched(folder: pathlib.Path, format: str) -> None:
    Preallocator().create(folder / "disk", 12 * MiB, format=format)
    before = images.identity(folder / "disk")

    with pytest.raises(exceptions.InvalidSize):
        Preallocator().resize(folder / "disk", 4 * MiB, format=format)

    assert images.identity(folder / "disk") == before


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_grown_to_no_whole_sectors_is_as_large_as_a_new_one(folder: pathlib.Path, format: str) -> None:
    Preallocator().create(folder / "disk", 12 * MiB, format=format)

    image = Preallocator().resize(folder / "disk", 20 * MiB + 100, format=format)

    assert image.virtual_size == 20 * MiB + 512


def test_disk_with_an_internal_snapshot_can_grow(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 12 * MiB)
    images.qemu_io(disk, "write -P 0xa5 0 1M")
    images.run("qemu-img", "snapshot", "-c", "before", disk)

    image = Preallocator().resize(disk, 20 * MiB, format="qcow2")

    assert (image.virtual_size, image.snapshots) == (20 * MiB, 1)


def test_growing_after_trim_like_writes_reads_like_one_grown_by_qemu(pair: MakePair) -> None:
    disk, plain = pair(16 * MiB + 300, 12 * MiB + 66 * KiB)
    for either in (disk, plain):
        images.qemu_io(either, f"write -z {12 * MiB - 64 * KiB} 128k", "write -z 1M 4096")
    grow_plainly(plain, 20 * MiB)

    Preallocator().resize(disk, 20 * MiB, format="qcow2")

    assert not images.differences(disk, plain)


@pytest.fixture
def trimmed(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Give a preallocated disk whose guest has trimmed its second half, with discard=unmap, and a plain one."""
    disk = folder / "disk"
    Preallocator().create(disk, 16 * MiB)
    plain = images.qcow2(folder / "plain", 16 * MiB)
    for either in (disk, plain):
        images.qemu_io(either, "write -P 0x5a 0 16M")
        images.run("qemu-io", "-d", "unmap", "-f", "qcow2", "-c", "discard 8M 8M", either)
    return disk, plain


@pytest.mark.parametrize("mode", MODES)
def test_disk_whose_end_was_trimmed_grows(trimmed: tuple[pathlib.Path, pathlib.Path], mode: Mode) -> None:
    # By less than was trimmed: its file is longer than the grown one would be.
    disk, plain = trimmed
    grow_plainly(plain, 20 * MiB)

    image = Preallocator(mode).resize(disk, 20 * MiB, format="qcow2")

    assert (image.virtual_size, images.differences(disk, plain)) == (20 * MiB, "")


def test_disk_whose_end_was_trimmed_has_its_grown_part_mapped(trimmed: tuple[pathlib.Path, pathlib.Path]) -> None:
    disk, _ = trimmed

    image = Preallocator().resize(disk, 20 * MiB, format="qcow2")

    assert (image.mapped_clusters or 0) >= 12 * 16


def test_overlay_without_data_reads_the_same_when_it_grew(folder: pathlib.Path) -> None:
    base = images.random_file(folder / "base", 8 * MiB + 300)
    disk, plain = (images.qcow2(folder / name, 4 * MiB, backing=base) for name in ("disk", "plain"))
    grow_plainly(plain, 20 * MiB)

    Preallocator().resize(disk, 20 * MiB, format="qcow2")

    assert not images.differences(disk, plain)


def test_overlay_without_data_that_grew_is_preallocated_then(folder: pathlib.Path) -> None:
    base = images.random_file(folder / "base", 8 * MiB + 300)
    disk, plain = (images.qcow2(folder / name, 4 * MiB, backing=base) for name in ("disk", "plain"))
    grow_plainly(plain, 20 * MiB)
    Preallocator().resize(disk, 20 * MiB, format="qcow2")

    image = Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert (image.state, images.differences(disk, plain)) == ("preallocated", "")


def compressed_and_overwritten(path: pathlib.Path, source: pathlib.Path, **options: str) -> pathlib.Path:
    """Make a qcow2 disk whose compressed clusters were freed when its guest wrote over them."""
    with open(source, "wb") as file:
        for _ in range(128):
            file.write(os.urandom(24 * KiB) + b"secret  " * (5 * KiB))
    chosen = ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []
    images.qcow2_of(path, source, "-c", *chosen)
    images.qemu_io(path, "write -P 1 0 8M")
    return path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_grown_part_does_not_show_what_was_in_freed_clusters(folder: pathlib.Path, compat: str, mode: Mode) -> None:
    path = compressed_and_overwritten(folder / "disk", folder / "source", compat=compat)

    Preallocator(mode).resize(path, 9 * MiB, format="qcow2")

    images.qemu_io(path, "read -P 0 8M 1M")
    images.check(path)


@kinds.without_fallocate
def test_grown_part_does_not_show_it_either_where_the_filesystem_cannot_hold_space(folder: pathlib.Path) -> None:
    path = compressed_and_overwritten(folder / "disk", folder / "source")

    assert Preallocator().resize(path, 9 * MiB, format="qcow2").state == "mapped"

    images.qemu_io(path, "read -P 0 8M 1M")


def count_beyond_the_end(path: pathlib.Path) -> None:
    """Count a cluster beyond the file's end as in use, as a growth does that is killed."""
    with open(path, "r+b") as file:
        header = file.read(112)
        (table,) = struct.unpack_from(">Q", header, 48)
        (block,) = struct.unpack(">Q", os.pread(file.fileno(), 8, table))
        cluster = -(-os.fstat(file.fileno()).st_size // (64 * KiB)) + 2
        os.pwrite(file.fileno(), b"\0\1", block + 2 * cluster)


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_disk_whose_growth_was_killed_can_be_grown(folder: pathlib.Path, mode: Mode) -> None:
    base = images.random_file(folder / "base", 8 * MiB)
    disk, plain = (images.qcow2(folder / name, 16 * MiB, backing=base) for name in ("disk", "plain"))
    for either in (disk, plain):
        images.qemu_io(either, "write -P 0x5a 3M 1M")
    count_beyond_the_end(disk)
    assert not images.check(disk).get("leaks")

    image = Preallocator(mode).resize(disk, 32 * MiB, format="qcow2")

    grow_plainly(plain, 32 * MiB)
    assert (image.virtual_size, images.differences(disk, plain)) == (32 * MiB, "")
    assert not images.check(disk).get("leaks")


def test_qemu_img_aborts_over_such_a_disk(folder: pathlib.Path) -> None:
    # The control.
    disk = images.qcow2(folder / "disk", 16 * MiB)
    count_beyond_the_end(disk)

    with pytest.raises(AssertionError, match="ended with -6"):
        images.run("qemu-img", "resize", "-q", "-f", "qcow2", "--preallocation=falloc", disk, 32 * MiB)


@pytest.mark.parametrize("killed", [False, True], ids=["left bytes", "left counts"])
def test_what_is_written_before_a_killed_growth_s_leavings_go_is_kept(
    folder: pathlib.Path, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = images.qcow2(folder / "disk", 16 * MiB)
    images.qemu_io(disk, "write -P 0x5a 3M 1M")
    if killed:
        count_beyond_the_end(disk)
    else:
        os.truncate(disk, disk.stat().st_size + 8 * MiB)
    looks: list[int] = []
    no_writer = lock.no_writer

    @contextlib.contextmanager
    def no_writer_after_a_write(path: str, fd: int) -> Iterator[None]:
        looks.append(fd)
        if len(looks) == 2:
            images.qemu_io(disk, "write -P 0x77 8M 2M")
        with no_writer(path, fd):
            yield

    monkeypatch.setattr(lock, "no_writer", no_writer_after_a_write)

    with pytest.raises(exceptions.ImageInUse, match="written to"):
        Preallocator().resize(disk, 32 * MiB, format="qcow2")

    images.qemu_io(disk, "read -P 0x77 8M 2M", "read -P 0x5a 3M 1M")
    images.check(disk)
    monkeypatch.undo()
    assert Preallocator().resize(disk, 32 * MiB, format="qcow2").virtual_size == 32 * MiB
    images.qemu_io(disk, "read -P 0x77 8M 2M")
