# SPDX-License-Identifier: Apache-2.0
"""qcow2 with a backing file: mapped everywhere, and the base shows through.

Growing is in test_resize, what is allocated of it in test_subclusters.
"""

from __future__ import annotations

import os
import pathlib

import images
import pytest

from functional.modes import MODES
from imgprealloc import Mode
from imgprealloc import Preallocator
from imgprealloc import exceptions

KiB, MiB = 1 << 10, 1 << 20


# Of a disk of 16 MiB: where the base ends inside a sector, a subcluster, a
# cluster, at the end of one, and where it ends before or behind the disk.
ODD_SIZES = {
    "empty": 0,
    "one byte": 1,
    "within a sector": 5 * MiB + 300,
    "within a subcluster": 5 * MiB + 7 * 512,
    "within a cluster": 5 * MiB + 9 * 4096,
    "a byte more than a cluster": 5 * MiB + 1,
    "a byte less than a cluster": 5 * MiB - 1,
    "cluster aligned": 5 * MiB,
    "in the last cluster": 16 * MiB - 100,
    "as long as the disk": 16 * MiB,
    "longer than the disk": 16 * MiB + 70000,
}
SHORT_SIZES = {name: size for name, size in ODD_SIZES.items() if size < 15 * MiB}


def overlay_like_novas(folder: pathlib.Path, base: images.StrPath, cluster_size: int = 64 * KiB) -> pathlib.Path:
    """Make the overlay that Nova makes, with nothing in it."""
    return images.qcow2(folder / "disk", 32 * MiB, backing=base, cluster_size=cluster_size)


@pytest.fixture(params=["created", "made of Nova's"])
def overlay(request: pytest.FixtureRequest, folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """Give a preallocated overlay of 32 MiB over 24 MiB, made in either way."""
    if request.param == "created":
        Preallocator().create(folder / "disk", 32 * MiB, str(base), backing_format="raw")
    else:
        Preallocator().preallocate(overlay_like_novas(folder, base), format="qcow2")
    return folder / "disk"


def test_overlay_has_subclusters(overlay: pathlib.Path) -> None:
    assert images.info(overlay)["format-specific"]["data"]["extended-l2"] is True


def test_overlay_has_128_kib_clusters(overlay: pathlib.Path) -> None:
    assert images.info(overlay)["cluster-size"] == 128 * KiB


def test_overlay_names_its_base_and_the_format(overlay: pathlib.Path, base: pathlib.Path) -> None:
    found = images.info(overlay)

    assert (found["backing-filename"], found["backing-filename-format"]) == (str(base), "raw")


def test_overlay_has_every_cluster_mapped(overlay: pathlib.Path) -> None:
    found = images.check(overlay)

    assert found["allocated-clusters"] == found["total-clusters"] == 32 * MiB // (128 * KiB)


def test_overlay_is_not_fragmented(overlay: pathlib.Path) -> None:
    assert images.check(overlay).get("fragmented-clusters", 0) == 0


def test_overlay_is_no_longer_than_one_that_qemu_makes_in_one_go(
    overlay: pathlib.Path, folder: pathlib.Path, base: pathlib.Path
) -> None:
    whole = images.qcow2(
        folder / "whole", 32 * MiB, backing=base, extended_l2="on", cluster_size=128 * KiB, preallocation="falloc"
    )

    assert overlay.stat().st_size == whole.stat().st_size


def test_overlay_has_no_hole_in_its_file(overlay: pathlib.Path) -> None:
    assert images.allocated(overlay) >= overlay.stat().st_size


def test_overlay_is_preallocated_with_nothing_short(overlay: pathlib.Path) -> None:
    image = Preallocator().inspect(overlay)

    assert (image.state, image.shortfall) == ("preallocated", 0)


def test_overlay_reads_its_base_through_mapped_clusters(
    overlay: pathlib.Path, folder: pathlib.Path, base: pathlib.Path
) -> None:
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=base)

    assert not images.differences(overlay, plain)


def test_overlay_leaves_nothing_beside_it(overlay: pathlib.Path, base: pathlib.Path) -> None:
    assert sorted(os.listdir(overlay.parent)) == sorted([base.name, overlay.name])


def test_second_call_writes_nothing(overlay: pathlib.Path) -> None:
    before = images.identity(overlay)

    Preallocator().preallocate(overlay, format="qcow2")

    assert images.identity(overlay) == before


def test_call_that_has_to_find_out_the_format_writes_nothing_either(overlay: pathlib.Path) -> None:
    before = images.identity(overlay)

    Preallocator().preallocate(overlay)

    assert images.identity(overlay) == before


@pytest.mark.parametrize("cluster_size", [4 * KiB, 64 * KiB, 2 * MiB])
def test_cluster_size_of_the_base_has_no_say(folder: pathlib.Path, base: pathlib.Path, cluster_size: int) -> None:
    backing = images.qcow2_of(folder / "base.qcow2", base, "-o", f"cluster_size={cluster_size}")

    image = Preallocator().create(folder / "disk", 32 * MiB, str(backing), backing_format="qcow2")

    assert image.cluster_size == 128 * KiB


@pytest.mark.parametrize("cluster_size", [512, 64 * KiB, 2 * MiB])
def test_cluster_size_of_novas_overlay_has_no_say(folder: pathlib.Path, base: pathlib.Path, cluster_size: int) -> None:
    disk = overlay_like_novas(folder, base, cluster_size=cluster_size)

    image = Preallocator().preallocate(disk, format="qcow2")

    assert image.cluster_size == 128 * KiB


@pytest.mark.parametrize("cluster_size", [16 * KiB, 32 * KiB, 2 * MiB])
def test_cluster_size_can_be_chosen(folder: pathlib.Path, base: pathlib.Path, cluster_size: int) -> None:
    strategy = Preallocator(overlay_cluster_size=cluster_size)

    image = strategy.create(folder / "disk", 32 * MiB, str(base), backing_format="raw")

    assert (image.cluster_size, image.state) == (cluster_size, "preallocated")


def test_overlay_in_smaller_clusters_reads_its_base(folder: pathlib.Path, base: pathlib.Path) -> None:
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=base)

    Preallocator(overlay_cluster_size=16 * KiB).create(folder / "disk", 32 * MiB, str(base), backing_format="raw")

    assert not images.differences(folder / "disk", plain)


def test_relative_name_of_the_base_stays_relative_at_creation(folder: pathlib.Path, base: pathlib.Path) -> None:
    image = Preallocator().create(folder / "disk", 32 * MiB, base.name, backing_format="raw")

    assert image.backing_file == base.name


def test_relative_name_of_the_base_stays_relative_in_novas_overlay(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = overlay_like_novas(folder, base.name)

    image = Preallocator().preallocate(disk, format="qcow2")

    assert (image.backing_file, image.state) == (base.name, "preallocated")


def test_name_of_the_base_is_kept_to_the_letter(folder: pathlib.Path, base: pathlib.Path) -> None:
    (folder / "in").mkdir()
    disk = images.qcow2(folder / "in" / "disk", 32 * MiB, backing=f"..//./{base.name}")

    image = Preallocator().preallocate(disk, format="qcow2")

    assert image.backing_file == f"..//./{base.name}"


def test_base_format_is_not_guessed_where_the_caller_names_none(folder: pathlib.Path, base: pathlib.Path) -> None:
    # qemu-img itself refuses to: a user's raw image could show the host's files.
    backing = images.qcow2_of(folder / "base.qcow2", base)

    with pytest.raises(exceptions.FormatNotCertain, match="--backing-format"):
        Preallocator().create(folder / "disk", 32 * MiB, str(backing))

    assert not (folder / "disk").exists()


def test_base_that_looks_like_qcow2_stays_raw_where_the_header_says_so(
    folder: pathlib.Path, base: pathlib.Path
) -> None:
    backing = images.qcow2_of(folder / "base.qcow2", base)
    disk = overlay_like_novas(folder, backing)
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=backing)

    image = Preallocator().preallocate(disk, format="qcow2")

    assert (image.backing_format, images.differences(disk, plain)) == ("raw", "")


def test_base_of_another_format_than_ours_can_back_an_overlay(folder: pathlib.Path, base: pathlib.Path) -> None:
    backing = folder / "base.vmdk"
    images.run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", base, backing)
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=backing, backing_format="vmdk")

    image = Preallocator().create(folder / "disk", 32 * MiB, str(backing), backing_format="vmdk")

    assert (image.state, images.differences(folder / "disk", plain)) == ("preallocated", "")


def test_base_of_an_overlay_may_be_an_overlay(folder: pathlib.Path, base: pathlib.Path) -> None:
    middle = images.qcow2(folder / "middle", 28 * MiB, backing=base)
    images.qemu_io(middle, "write -P 0x5a 20M 7M")
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=middle, backing_format="qcow2")

    Preallocator().create(folder / "disk", 32 * MiB, str(middle), backing_format="qcow2")

    assert not images.differences(folder / "disk", plain)


def test_overlay_whose_header_names_no_base_format_is_only_reserved(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = overlay_like_novas(folder, base)
    images.forget_backing_format(disk)

    image = Preallocator().preallocate(disk, format="qcow2")

    assert (image.backing_format, image.extended_l2, image.state) == (None, False, "reserved")


@pytest.mark.parametrize("mode", MODES)
def test_mode_decides_the_state(folder: pathlib.Path, base: pathlib.Path, mode: Mode) -> None:
    image = Preallocator(mode).create(folder / "disk", 32 * MiB, str(base), backing_format="raw")

    assert image.state == ("mapped" if mode == "metadata" else "preallocated")


@pytest.mark.parametrize("mode", MODES)
def test_mode_decides_the_state_of_novas_overlay(folder: pathlib.Path, base: pathlib.Path, mode: Mode) -> None:
    image = Preallocator(mode).preallocate(overlay_like_novas(folder, base), format="qcow2")

    assert image.state == ("mapped" if mode == "metadata" else "preallocated")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_lets_the_base_show_through(folder: pathlib.Path, base: pathlib.Path, mode: Mode) -> None:
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=base)

    Preallocator(mode).preallocate(overlay_like_novas(folder, base), format="qcow2")

    assert not images.differences(folder / "disk", plain)


def test_mode_metadata_takes_next_to_no_space(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator("metadata").create(folder / "disk", 256 * MiB, str(base), backing_format="raw")

    assert images.allocated(folder / "disk") < 2 * MiB


def test_mode_full_leaves_nothing_unwritten(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator("full").create(folder / "disk", 32 * MiB, str(base), backing_format="raw")

    assert images.unwritten(folder / "disk") <= 256 * KiB


def test_mode_falloc_after_metadata_holds_the_space(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator("metadata").create(folder / "disk", 32 * MiB, str(base), backing_format="raw")

    image = Preallocator("falloc").preallocate(folder / "disk", format="qcow2")

    assert (image.state, image.shortfall) == ("preallocated", 0)


def test_mode_metadata_after_falloc_writes_nothing(overlay: pathlib.Path) -> None:
    before = images.identity(overlay)

    Preallocator("metadata").preallocate(overlay, format="qcow2")

    assert images.identity(overlay) == before


def odd_base(folder: pathlib.Path, format: str, size: int) -> pathlib.Path:
    """Make a base of an odd size; qcow2 knows whole sectors only."""
    raw = images.random_file(folder / "odd.raw", size)
    return raw if format == "raw" else images.qcow2_of(folder / "odd.qcow2", raw)


@pytest.mark.parametrize("size", ODD_SIZES.values(), ids=ODD_SIZES)
def test_not_a_byte_of_an_odd_base_is_lost(folder: pathlib.Path, size: int) -> None:
    backing = odd_base(folder, "raw", size)
    plain = images.qcow2(folder / "plain", 16 * MiB, backing=backing)

    Preallocator().create(folder / "disk", 16 * MiB, str(backing), backing_format="raw")

    assert not images.differences(folder / "disk", plain)


@pytest.mark.parametrize("size", [size for size in ODD_SIZES.values() if size % 512 == 0])
def test_not_a_byte_of_an_odd_qcow2_base_is_lost(folder: pathlib.Path, size: int) -> None:
    backing = odd_base(folder, "qcow2", size)
    plain = images.qcow2(folder / "plain", 16 * MiB, backing=backing, backing_format="qcow2")

    Preallocator().create(folder / "disk", 16 * MiB, str(backing), backing_format="qcow2")

    assert not images.differences(folder / "disk", plain)


@pytest.mark.parametrize("size", ODD_SIZES.values(), ids=ODD_SIZES)
def test_novas_overlay_loses_no_byte_of_an_odd_base_in_mode_full(folder: pathlib.Path, size: int) -> None:
    backing = odd_base(folder, "raw", size)
    plain, disk = (images.qcow2(folder / name, 16 * MiB, backing=backing) for name in ("plain", "disk"))

    Preallocator("full").preallocate(disk, format="qcow2")

    assert not images.differences(disk, plain)


@pytest.mark.parametrize("size", SHORT_SIZES.values(), ids=SHORT_SIZES)
def test_overlay_over_an_odd_base_is_clean_and_preallocated(folder: pathlib.Path, size: int) -> None:
    backing = odd_base(folder, "raw", size)

    image = Preallocator().create(folder / "disk", 16 * MiB, str(backing), backing_format="raw")

    assert (image.state, images.check(folder / "disk")["check-errors"]) == ("preallocated", 0)


@pytest.mark.parametrize("size", [512, 70 * KiB + 512, 16 * MiB + 512, 16 * MiB - 512])
def test_disk_of_an_odd_size_reads_like_a_plain_one(folder: pathlib.Path, size: int) -> None:
    backing = images.random_file(folder / "odd.raw", 5 * MiB + 300)
    plain = images.qcow2(folder / "plain", size, backing=backing)

    image = Preallocator().create(folder / "disk", size, str(backing), backing_format="raw")

    assert (image.state, images.differences(folder / "disk", plain)) == ("preallocated", "")


@pytest.mark.parametrize("mode", MODES)
def test_disk_of_no_whole_sectors_is_as_large_as_qemus_own(
    folder: pathlib.Path, base: pathlib.Path, mode: Mode
) -> None:
    plain = images.qcow2(folder / "plain", 32 * MiB + 100, backing=base)

    image = Preallocator(mode).create(folder / "disk", 32 * MiB + 100, str(base), backing_format="raw")

    assert image.virtual_size == images.info(plain)["virtual-size"]


def test_guest_that_writes_part_of_a_subcluster_keeps_the_rest_of_the_base(
    overlay: pathlib.Path, folder: pathlib.Path, base: pathlib.Path
) -> None:
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=base)
    writes = [f"write -P 0xa5 {24 * MiB - 100 * KiB + step * 4608} 512" for step in range(40)]

    images.qemu_io(overlay, *writes)

    images.qemu_io(plain, *writes)
    assert not images.differences(overlay, plain)
