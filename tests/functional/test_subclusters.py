# SPDX-License-Identifier: Apache-2.0
"""What of an overlay is allocated before its guest writes: nothing, what lies beyond its base, or everything.

How it grows is in test_resize, what snapshots and mirrors copy of it in
test_copies.
"""

from __future__ import annotations

import os
import pathlib

import images
import pytest

from functional import kinds
from functional.modes import MODES
from functional.modes import SPACE_MODES
from imgprealloc import Mode
from imgprealloc import OverlaySubclusters
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc import qemu_img
from imgprealloc import subclusters as counted_subclusters

KiB, MiB = 1 << 10, 1 << 20

SIZE = 16 * MiB
# The same as of an overlay in test_overlays, less what is one case here.
ODD_SIZES = {
    "empty": 0,
    "one byte": 1,
    "a sector": 512,
    "4 KiB": 4096,
    "within a sector": 5 * MiB + 300,
    "within a subcluster": 5 * MiB + 7 * 512,
    "within a cluster": 5 * MiB + 9 * 4096,
    "in the last cluster": SIZE - 100,
    "as long as the disk": SIZE,
    "longer than the disk": SIZE + 70000,
}
SHORT_SIZES = {name: size for name, size in ODD_SIZES.items() if size < SIZE - MiB}
WITH_DATA: tuple[OverlaySubclusters, ...] = ("allocated", "copied")

each_size = pytest.mark.parametrize("size", ODD_SIZES.values(), ids=ODD_SIZES)
each_kind = pytest.mark.parametrize("subclusters", ["unallocated", "allocated", "copied"])


def aligned(size: int) -> int:
    return -(-size // (128 * KiB)) * 128 * KiB


def make(
    folder: pathlib.Path,
    subclusters: OverlaySubclusters,
    base: pathlib.Path,
    *,
    mode: Mode = "falloc",
    base_format: str = "raw",
) -> tuple[pathlib.Path, pathlib.Path]:
    """Make an overlay of ours and a plain one."""
    plain = images.qcow2(folder / "plain", SIZE, backing=base, backing_format=base_format)
    strategy = Preallocator(mode, overlay_subclusters=subclusters)
    strategy.create(folder / "disk", SIZE, str(base), backing_format=base_format)
    return folder / "disk", plain


@each_kind
@each_size
def test_overlay_reads_its_base(folder: pathlib.Path, subclusters: OverlaySubclusters, size: int) -> None:
    disk, plain = make(folder, subclusters, images.random_file(folder / "base", size))

    assert not images.differences(disk, plain)


@pytest.mark.parametrize("options", [(), ("-c",), ("-o", "cluster_size=4k")], ids=["plain", "compressed", "clusters"])
@pytest.mark.parametrize("size", [4096, 5 * MiB + 7 * 512, SIZE + 512])
def test_copy_of_a_qcow2_base_reads_like_it(folder: pathlib.Path, size: int, options: tuple[str, ...]) -> None:
    raw = images.random_file(folder / "raw", size)
    base = images.qcow2_of(folder / "base", raw, *options)

    disk, plain = make(folder, "copied", base, base_format="qcow2")

    assert (images.differences(disk, plain), images.check(disk)["check-errors"]) == ("", 0)


def test_copy_has_what_its_base_has_from_its_own_base(folder: pathlib.Path) -> None:
    lowest = images.random_file(folder / "lowest", 6 * MiB)
    base = images.qcow2(folder / "base", 8 * MiB, backing=lowest)
    images.qemu_io(base, "write -P 0x5a 1M 1M", "write -z 3M 1M")

    disk, plain = make(folder, "copied", base, base_format="qcow2")

    assert not images.differences(disk, plain)
    assert images.allocated_from(disk) == 0


@kinds.with_attributes
@pytest.mark.parametrize("mode", MODES)
def test_copy_reads_like_its_base_on_each_filesystem(folder: pathlib.Path, base: pathlib.Path, mode: Mode) -> None:
    disk = folder / "disk"
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=base)

    image = Preallocator(mode, overlay_subclusters="copied").create(
        disk, 32 * MiB, str(base), backing_format="raw"
    )  # fmt: skip

    assert image.state == ("mapped" if mode == "metadata" else "preallocated")
    assert not images.differences(disk, plain)


def test_nothing_is_allocated_by_default(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator().create(folder / "disk", 32 * MiB, str(base), backing_format="raw")

    assert images.allocated_in_map(folder / "disk") == 0


@pytest.mark.parametrize("mode", MODES)
@each_size
def test_unallocated_is_no_byte_of_it(folder: pathlib.Path, size: int, mode: Mode) -> None:
    disk, _ = make(folder, "unallocated", images.random_file(folder / "base", size), mode=mode)

    assert images.allocated_in_map(disk) == 0


@pytest.mark.parametrize("mode", SPACE_MODES)
@pytest.mark.parametrize("size", SHORT_SIZES.values(), ids=SHORT_SIZES)
def test_allocated_is_all_beyond_the_base(folder: pathlib.Path, size: int, mode: Mode) -> None:
    disk, _ = make(folder, "allocated", images.random_file(folder / "base", size), mode=mode)

    start = max(128 * KiB, aligned(size))
    assert images.allocated_from(disk) <= start
    assert images.allocated_in_map(disk) <= SIZE - start + 128 * KiB


@pytest.mark.parametrize("mode", SPACE_MODES)
@each_size
def test_copied_is_everything_but_what_follows_the_base_in_its_last_cluster(
    folder: pathlib.Path, size: int, mode: Mode
) -> None:
    disk, _ = make(folder, "copied", images.random_file(folder / "base", size), mode=mode)

    assert images.allocated_in_map(disk) >= SIZE - 128 * KiB
    assert not any(extent["depth"] for extent in images.extents(disk))


@each_kind
def test_header_keeps_the_base(folder: pathlib.Path, base: pathlib.Path, subclusters: OverlaySubclusters) -> None:
    strategy = Preallocator(overlay_subclusters=subclusters)

    image = strategy.create(folder / "disk", 32 * MiB, base.name, backing_format="raw")

    assert (image.backing_file, image.backing_format) == (base.name, "raw")


@each_kind
@kinds.with_attributes
def test_overlay_of_each_kind_is_preallocated_and_clean(
    folder: pathlib.Path, base: pathlib.Path, subclusters: OverlaySubclusters
) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)

    image = Preallocator(overlay_subclusters=subclusters).preallocate(disk, format="qcow2")

    assert (image.state, image.shortfall, images.check(disk)["check-errors"]) == ("preallocated", 0, 0)


@pytest.mark.parametrize("subclusters", WITH_DATA)
def test_what_does_not_fit_leaves_nothing(
    tight: pathlib.Path, folder: pathlib.Path, subclusters: OverlaySubclusters
) -> None:
    base = images.random_file(folder / "base", 64 * MiB)
    disk = tight / "disk"

    with pytest.raises(exceptions.NoSpace):
        Preallocator(overlay_subclusters=subclusters).create(disk, 400 * MiB, str(base), backing_format="raw")

    assert [name for name in os.listdir(tight) if "disk" in name] == []


# Rewriting one with data in it.


def written(folder: pathlib.Path, base_size: int, *, cluster_size: int = 64 * KiB) -> pathlib.Path:
    """Make stock Nova's overlay as a guest leaves it: data, zeros and holes over its base and beyond."""
    base = images.random_file(folder / "base", base_size)
    disk = images.qcow2(folder / "disk", 2 * SIZE, backing=base, cluster_size=cluster_size)
    images.qemu_io(
        disk, "write -P 1 0 200k", "write -z 1M 1M", "write -P 0 3M 256k", "write -P 2 5M 4k",
        f"write -P 3 {SIZE + MiB} 1M", f"write -z {SIZE + 3 * MiB} 1M", f"write -P 0 {SIZE + 5 * MiB} 512k",
        f"write -P 4 {2 * SIZE - 512} 512",
    )  # fmt: skip
    return disk


each_base = pytest.mark.parametrize("base_size", [8 * MiB, 5 * MiB + 7 * 512, 2 * SIZE], ids=["even", "odd", "long"])


@each_kind
@each_base
@pytest.mark.parametrize("cluster_size", [512, 64 * KiB, 2 * MiB])
def test_rewritten_disk_reads_as_before(
    folder: pathlib.Path, subclusters: OverlaySubclusters, base_size: int, cluster_size: int
) -> None:
    disk = written(folder, base_size, cluster_size=cluster_size)
    before = images.digest(disk)

    image = Preallocator(overlay_subclusters=subclusters).preallocate(disk, "rewrite", format="qcow2")

    assert (image.state, images.digest(disk), images.check(disk)["check-errors"]) == ("preallocated", before, 0)


@each_base
def test_rewriting_allocates_nothing_that_was_not(folder: pathlib.Path, base_size: int) -> None:
    disk = written(folder, base_size)
    before = images.allocated_in_map(disk)

    Preallocator().preallocate(disk, "rewrite", format="qcow2")

    assert images.allocated_in_map(disk) <= before


def test_map_that_calls_data_zeros_loses_none(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = written(folder, 8 * MiB)
    before = images.identity(disk)
    monkeypatch.setattr(qemu_img, "zeros", lambda *_, **__: iter([(64 * KiB, 64 * KiB)]))

    with pytest.raises(exceptions.CommandFailed, match="qemu-io"):
        Preallocator().preallocate(disk, "rewrite", format="qcow2")

    assert images.identity(disk) == before


@pytest.mark.parametrize("subclusters", WITH_DATA)
def test_rewriting_allocates_what_was_asked_for(folder: pathlib.Path, subclusters: OverlaySubclusters) -> None:
    size = 5 * MiB + 7 * 512
    disk = written(folder, size)

    Preallocator(overlay_subclusters=subclusters).preallocate(disk, "rewrite", format="qcow2")

    assert images.allocated_from(disk) <= (0 if subclusters == "copied" else aligned(size))


def test_rewritten_disk_keeps_the_relative_name_of_its_base(folder: pathlib.Path, base: pathlib.Path) -> None:
    for subclusters in ("unallocated", *WITH_DATA):
        disk = images.qcow2(folder / subclusters, 32 * MiB, backing=base.name)
        images.qemu_io(disk, "write -P 1 0 1M")

        image = Preallocator(overlay_subclusters=subclusters).preallocate(disk, "rewrite", format="qcow2")

        assert image.backing_file == base.name


# How much of it a copy of the disk alone has in it.


def _allocated(disk: pathlib.Path) -> int | None:
    with open(disk, "rb") as file:
        return counted_subclusters.allocated(file.fileno())


def test_clusters_count_in_which_something_was_written(folder: pathlib.Path, base: pathlib.Path) -> None:
    # Two tables: one has 8192 clusters.
    size = 1024 * MiB + 64 * MiB
    Preallocator().create(folder / "disk", size, str(base), backing_format="raw")
    disk = folder / "disk"
    assert _allocated(disk) == 0

    images.qemu_io(disk, "write -P 1 4k 4k", "write -P 1 64k 4k", "write -P 1 20M 256k", f"write -P 1 {1030 * MiB} 512")

    assert _allocated(disk) == 4 * 128 * KiB


@pytest.mark.parametrize("subclusters", WITH_DATA)
def test_all_counts_that_is_allocated_unwritten(folder: pathlib.Path, subclusters: OverlaySubclusters) -> None:
    disk, _ = make(folder, subclusters, images.random_file(folder / "base", 5 * MiB))

    assert _allocated(disk) == (SIZE if subclusters == "copied" else SIZE - 5 * MiB)


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}])
def test_disk_without_subclusters_is_not_counted(folder: pathlib.Path, options: dict[str, str]) -> None:
    assert _allocated(images.qcow2(folder / "disk", SIZE, **options)) is None


def test_what_is_no_qcow2_is_not_counted(folder: pathlib.Path) -> None:
    assert _allocated(images.random_file(folder / "disk", MiB)) is None


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        # The cluster size, the virtual size, the number of tables, and where they are.
        (20, 63), (24, 1 << 27), (36, 0), (40, 1 << 27)
    ],
)  # fmt: skip
def test_header_that_is_damaged_is_read_no_further(
    folder: pathlib.Path, base: pathlib.Path, offset: int, value: int
) -> None:
    Preallocator().create(folder / "disk", SIZE, str(base), backing_format="raw")
    images.qemu_io(folder / "disk", "write -P 1 0 1M")
    with open(folder / "disk", "r+b") as file:
        os.pwrite(file.fileno(), value.to_bytes(4, "big"), offset)

    assert _allocated(folder / "disk") is None


def test_no_more_tables_are_read_than_a_moment_allows(
    folder: pathlib.Path, base: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Preallocator().create(folder / "disk", SIZE, str(base), backing_format="raw")
    monkeypatch.setattr(counted_subclusters, "_MOST_TABLES", 64 * KiB)

    assert _allocated(folder / "disk") is None


# How far it has come.


@pytest.mark.parametrize("verb", ["create", "rewrite"])
def test_caller_is_told_how_far_a_copy_has_come(folder: pathlib.Path, base: pathlib.Path, verb: str) -> None:
    told: list[tuple[int, int]] = []
    strategy = Preallocator(overlay_subclusters="copied")

    if verb == "create":
        strategy.create(
            folder / "disk", 32 * MiB, str(base), backing_format="raw", progress=lambda *now: told.append(now)
        )
    else:
        disk = written(folder, 8 * MiB)
        strategy.preallocate(disk, "rewrite", format="qcow2", progress=lambda *now: told.append(now))

    assert (24 * MiB if verb == "create" else 8 * MiB,) * 2 in told
    assert all(0 <= done <= total for done, total in told)


class _Enough(Exception):
    """Raised by a caller who has changed their mind."""


@pytest.mark.parametrize("kind_of_error", [_Enough, BrokenPipeError, FileNotFoundError])
@pytest.mark.parametrize("after", [0, 1])
def test_caller_who_raises_ends_a_copy_and_keeps_the_disk(
    folder: pathlib.Path, kind_of_error: type[Exception], after: int
) -> None:
    base = images.random_file(folder / "base", 256 * MiB)
    disk = images.qcow2(folder / "disk", 300 * MiB, backing=base)
    images.qemu_io(disk, "write -P 1 0 1M")
    before = images.identity(disk)

    def enough(done: int, total: int) -> None:
        if done >= after:
            raise kind_of_error

    with pytest.raises(kind_of_error):
        Preallocator(overlay_subclusters="copied").preallocate(disk, "rewrite", format="qcow2", progress=enough)

    assert images.identity(disk) == before
    assert sorted(os.listdir(folder)) == ["base", "disk"]
    # Nor does a program go on, which would have the disk open.
    images.qemu_io(disk, "write -P 2 0 512")
