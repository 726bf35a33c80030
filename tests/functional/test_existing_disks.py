# SPDX-License-Identifier: Apache-2.0
"""Disks that hold data before we come: what a guest reads never changes, whatever is done for their space."""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import shutil
from typing import Any

import images
import pytest

from functional import kinds
from imgprealloc import Mode
from imgprealloc import Preallocator

KiB, MiB = 1 << 10, 1 << 20


def used(path: pathlib.Path, base: images.StrPath) -> pathlib.Path:
    """Make an overlay that a guest has written to here and there."""
    disk = images.qcow2(path, 32 * MiB, backing=base)
    images.qemu_io(
        disk,
        "write -P 0x11 0 512",
        "write -P 0x22 3M 700k",
        "write -P 0x33 23M 2M",
        f"write -P 0x44 {32 * MiB - 512} 512",
    )
    return disk


@pytest.fixture
def disk(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    return used(folder / "disk", base)


@pytest.fixture
def copy(disk: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Give a copy of the disk as it was, to compare with."""
    return shutil.copyfile(disk, folder / "copy")


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_disk_with_data_is_reserved(disk: pathlib.Path, mode: Mode) -> None:
    image = Preallocator(mode).preallocate(disk, format="qcow2")

    assert (image.state, image.shortfall) == ("reserved", 0)


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
@pytest.mark.parametrize("rewrite", [False, True])
def test_disk_with_data_reads_the_same_afterwards(
    disk: pathlib.Path, copy: pathlib.Path, mode: Mode, rewrite: bool
) -> None:
    Preallocator(mode).preallocate(disk, "rewrite" if rewrite else "recreate_blank", format="qcow2")

    assert not images.differences(disk, copy)


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize("written", [False, True], ids=["blank", "with_data"])
def test_disk_that_has_to_stay_in_place_is_the_same_file_afterwards(
    folder: pathlib.Path, base: pathlib.Path, written: bool, rewrite: bool
) -> None:
    path = used(folder / "disk", base) if written else images.qcow2(folder / "disk", 32 * MiB, backing=base)
    before = os.stat(path).st_ino, images.file_digest(path)

    image = Preallocator().preallocate(path, existing="reserve", format="qcow2")

    assert (image.state, image.shortfall) == ("reserved", 0)
    assert (os.stat(path).st_ino, images.file_digest(path)) == before


def test_reserving_leaves_the_file_byte_for_byte(disk: pathlib.Path, copy: pathlib.Path) -> None:
    Preallocator().preallocate(disk, format="qcow2")

    assert images.file_digest(disk) == images.file_digest(copy)


def test_reserved_disk_has_the_space_of_its_worst_case(disk: pathlib.Path) -> None:
    image = Preallocator().preallocate(disk, format="qcow2")

    assert images.allocated(disk) >= image.worst_case_size > 32 * MiB


def test_reserving_again_writes_nothing(disk: pathlib.Path) -> None:
    Preallocator().preallocate(disk, format="qcow2")
    before = images.identity(disk)

    Preallocator().preallocate(disk, format="qcow2")

    assert images.identity(disk) == before


def test_mode_metadata_leaves_a_disk_with_data_alone(disk: pathlib.Path) -> None:
    before = images.identity(disk)

    Preallocator("metadata").preallocate(disk, format="qcow2")

    assert images.identity(disk) == before


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_rewritten_disk_has_every_cluster_mapped(disk: pathlib.Path, mode: Mode) -> None:
    Preallocator(mode).preallocate(disk, existing="rewrite", format="qcow2")

    found = images.check(disk)
    assert found["allocated-clusters"] == found["total-clusters"]


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_rewriting_gives_the_state_that_the_mode_promises(disk: pathlib.Path, mode: Mode) -> None:
    image = Preallocator(mode).preallocate(disk, existing="rewrite", format="qcow2")

    assert image.state == ("mapped" if mode == "metadata" else "preallocated")


def test_rewritten_disk_keeps_its_base(disk: pathlib.Path, base: pathlib.Path) -> None:
    image = Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert (image.backing_file, image.backing_format) == (str(base), "raw")


def test_relative_name_of_the_base_stays_relative_when_rewritten(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = used(folder / "disk", base.name)

    image = Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert (image.backing_file, image.state) == (base.name, "preallocated")


def test_rewriting_again_writes_nothing(disk: pathlib.Path) -> None:
    Preallocator().preallocate(disk, existing="rewrite", format="qcow2")
    before = images.identity(disk)

    Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert images.identity(disk) == before


def test_reserved_disk_can_still_be_rewritten(disk: pathlib.Path, copy: pathlib.Path) -> None:
    Preallocator().preallocate(disk, format="qcow2")

    image = Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert (image.state, images.differences(disk, copy)) == ("preallocated", "")


@pytest.mark.parametrize("base_size", [8 * MiB + 300, 24 * MiB + 512, 40 * MiB, 0])
def test_rewritten_disk_over_an_odd_base_reads_the_same(folder: pathlib.Path, base_size: int) -> None:
    base = images.random_file(folder / "odd.raw", base_size)
    disk = used(folder / "disk", base)
    copy = shutil.copyfile(disk, folder / "copy")

    Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert not images.differences(disk, copy)


def test_rewritten_disk_of_an_odd_size_reads_the_same(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 20 * MiB + 512, backing=base)
    images.qemu_io(disk, f"write -P 0x55 {20 * MiB} 512")
    copy = shutil.copyfile(disk, folder / "copy")

    Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert not images.differences(disk, copy)


def test_disk_without_a_base_is_rewritten(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2_of(folder / "disk", base)

    image = Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert (image.state, images.differences(disk, base, other_format="raw")) == ("preallocated", "")


def test_rewriting_in_mode_falloc_writes_no_more_than_was_written(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 256 * MiB)
    images.qemu_io(disk, "write -P 0x11 3M 1M")

    Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert images.unwritten(disk) >= 250 * MiB


def test_disk_whose_sparse_parts_hold_nothing_is_rewritten(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB)
    images.qemu_io(disk, "write -P 0x11 3M 1M")
    copy = shutil.copyfile(disk, folder / "copy")

    image = Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert (image.state, images.differences(disk, copy)) == ("preallocated", "")


# A zeroed cluster hides the base and allocates nothing: qemu-img check finds
# such a disk as empty as a new one.


@pytest.mark.parametrize("where", ["0 64k", "3M 1M", "0 32M", f"{32 * MiB - 64 * KiB} 64k"])
def test_check_takes_zeroed_clusters_for_nothing(folder: pathlib.Path, base: pathlib.Path, where: str) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)

    images.qemu_io(disk, f"write -z {where}")

    assert images.check(disk).get("allocated-clusters", 0) == 0


@pytest.mark.parametrize("where", ["0 64k", "3M 1M", "0 32M", "31M 1M"])
@pytest.mark.parametrize("rewrite", [False, True])
def test_zeroed_clusters_keep_hiding_the_base(
    folder: pathlib.Path, base: pathlib.Path, where: str, rewrite: bool
) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    images.qemu_io(disk, f"write -z {where}")
    copy = shutil.copyfile(disk, folder / "copy")

    Preallocator().preallocate(disk, "rewrite" if rewrite else "recreate_blank", format="qcow2")

    assert not images.differences(disk, copy)


@pytest.mark.parametrize("write", ["write -z 3M 1M", "write -z 0 32M", "write -P 0 3M 1M"])
def test_clusters_of_zeros_are_mapped_when_the_disk_is_rewritten(
    folder: pathlib.Path, base: pathlib.Path, write: str
) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    images.qemu_io(disk, write)

    image = Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert (image.state, image.mapped_clusters) == ("preallocated", image.clusters)


@pytest.mark.parametrize("rewrite", [False, True])
def test_zeroed_subclusters_keep_hiding_the_base(folder: pathlib.Path, base: pathlib.Path, rewrite: bool) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base, extended_l2="on", cluster_size=128 * KiB)
    images.qemu_io(disk, "write -z 3M 4k", "write -z 5M 8k")
    copy = shutil.copyfile(disk, folder / "copy")

    Preallocator().preallocate(disk, "rewrite" if rewrite else "recreate_blank", format="qcow2")

    assert not images.differences(disk, copy)


def test_zeroed_clusters_in_a_preallocated_overlay_stay_preallocated(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator().create(folder / "disk", 32 * MiB, str(base), backing_format="raw")

    images.qemu_io(folder / "disk", "write -z 3M 1M")

    assert Preallocator().inspect(folder / "disk", format="qcow2").state == "preallocated"


def test_discarded_clusters_are_seen(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator().create(folder / "disk", 32 * MiB, str(base), backing_format="raw")

    images.run("qemu-io", "-d", "unmap", "-f", "qcow2", "-c", "discard 3M 1M", folder / "disk")

    assert Preallocator().inspect(folder / "disk", format="qcow2").state != "preallocated"


def test_discarded_clusters_keep_hiding_the_base(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = folder / "disk"
    Preallocator().create(disk, 32 * MiB, str(base), backing_format="raw")
    images.run("qemu-io", "-d", "unmap", "-f", "qcow2", "-c", "discard 3M 1M", disk)
    copy = shutil.copyfile(disk, folder / "copy")

    image = Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert (image.state, images.differences(disk, copy)) == ("preallocated", "")


# What a copy does to a file: the map survives, the space does not.


@pytest.fixture
def sparse_copy(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """Give a preallocated overlay that rsync --sparse, say, has made holes in."""
    Preallocator().create(folder / "original", 32 * MiB, str(base), backing_format="raw")
    images.qemu_io(folder / "original", "write -P 0x11 1M 1M", "write -z 3M 1M")
    images.run("cp", "--reflink=never", "--sparse=always", folder / "original", folder / "disk")
    return folder / "disk"


def test_sparse_copy_is_mapped_but_holds_no_space(sparse_copy: pathlib.Path) -> None:
    assert Preallocator().inspect(sparse_copy, format="qcow2").state == "mapped"


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_sparse_copy_is_healed(sparse_copy: pathlib.Path, mode: Mode) -> None:
    image = Preallocator(mode).preallocate(sparse_copy, format="qcow2")

    assert (image.state, images.allocated(sparse_copy) >= image.file_size) == ("preallocated", True)


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_healing_changes_no_byte_of_the_file(sparse_copy: pathlib.Path, folder: pathlib.Path, mode: Mode) -> None:
    before = images.file_digest(folder / "original")

    Preallocator(mode).preallocate(sparse_copy, format="qcow2")

    assert images.file_digest(sparse_copy) == before


def test_healed_disk_is_the_same_file(sparse_copy: pathlib.Path) -> None:
    before = sparse_copy.stat().st_ino

    Preallocator().preallocate(sparse_copy, format="qcow2")

    assert sparse_copy.stat().st_ino == before


@kinds.with_reflinks
def test_reflinked_overlay_is_mapped_and_short_of_what_it_shares(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator("full").create(folder / "original", 32 * MiB, str(base), backing_format="raw")
    images.run("cp", "--reflink=always", folder / "original", folder / "disk")

    image = Preallocator().inspect(folder / "disk", format="qcow2")

    assert (image.state, image.shortfall >= 32 * MiB) == ("mapped", True)


@kinds.with_reflinks
def test_reflinked_overlay_is_unshared(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator("full").create(folder / "original", 32 * MiB, str(base), backing_format="raw")
    images.run("cp", "--reflink=always", folder / "original", folder / "disk")

    image = Preallocator().preallocate(folder / "disk", format="qcow2")

    assert (image.state, images.shared(folder / "disk")) == ("preallocated", 0)


@kinds.with_reflinks
def test_reflinked_disk_with_data_is_unshared_when_it_is_reserved(folder: pathlib.Path, base: pathlib.Path) -> None:
    used(folder / "original", base)
    images.run("cp", "--reflink=always", folder / "original", folder / "disk")

    image = Preallocator().preallocate(folder / "disk", format="qcow2")

    assert (image.state, image.shared_bytes, images.shared(folder / "disk")) == ("reserved", 0, 0)


# What a copy by qemu-img would lose.


@pytest.mark.parametrize("rewrite", [False, True])
def test_internal_snapshot_is_kept(disk: pathlib.Path, rewrite: bool) -> None:
    images.run("qemu-img", "snapshot", "-c", "kept", disk)

    Preallocator().preallocate(disk, "rewrite" if rewrite else "recreate_blank", format="qcow2")

    assert [snapshot["name"] for snapshot in images.info(disk)["snapshots"]] == ["kept"]


def test_internal_snapshot_of_a_disk_without_data_is_kept(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    images.run("qemu-img", "snapshot", "-c", "kept", disk)

    Preallocator().preallocate(disk, format="qcow2")

    assert [snapshot["name"] for snapshot in images.info(disk)["snapshots"]] == ["kept"]


def test_disk_with_an_internal_snapshot_is_never_called_preallocated(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator().create(folder / "disk", 32 * MiB, str(base), backing_format="raw")
    images.run("qemu-img", "snapshot", "-c", "kept", folder / "disk")

    image = Preallocator().preallocate(folder / "disk", format="qcow2")

    assert (image.state, image.shortfall) == ("reserved", 0)


@pytest.mark.parametrize("rewrite", [False, True])
def test_dirty_bitmap_is_kept(disk: pathlib.Path, rewrite: bool) -> None:
    images.run("qemu-img", "bitmap", "-f", "qcow2", "--add", disk, "kept")

    Preallocator().preallocate(disk, "rewrite" if rewrite else "recreate_blank", format="qcow2")

    assert [found["name"] for found in images.info(disk)["format-specific"]["data"]["bitmaps"]] == ["kept"]


def test_dirty_bitmap_of_a_disk_without_data_is_kept(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    images.run("qemu-img", "bitmap", "-f", "qcow2", "--add", disk, "kept")

    Preallocator().preallocate(disk, format="qcow2")

    assert [found["name"] for found in images.info(disk)["format-specific"]["data"]["bitmaps"]] == ["kept"]


def test_compressed_clusters_are_not_called_mapped(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2_of(folder / "disk", images.sparse_file(folder / "zeros", 0), "-c")
    images.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", _compressible(folder), disk)

    image = Preallocator().inspect(disk, format="qcow2")

    assert (image.compressed_clusters, image.mapped_clusters) == (8 * 16, 0)


@pytest.mark.parametrize(("rewrite", "state"), [(False, "reserved"), (True, "preallocated")])
def test_compressed_disk_reads_the_same(folder: pathlib.Path, rewrite: bool, state: str) -> None:
    source = _compressible(folder)
    disk = images.qcow2_of(folder / "disk", source, "-c")

    image = Preallocator().preallocate(disk, "rewrite" if rewrite else "recreate_blank", format="qcow2")

    assert (image.state, images.differences(disk, source, other_format="raw")) == (state, "")


def _compressible(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "compressible"
    path.write_bytes(b"compress me " * (8 * MiB // 12) + b"tail" * 2)
    return path


# What kind of qcow2 it is: as it was made, so it is when it is made anew.

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"compat": "0.10"},
    {"refcount_bits": 1},
    {"refcount_bits": 64, "lazy_refcounts": "on", "cluster_size": 4 * KiB},
    {"extended_l2": "on", "cluster_size": 128 * KiB},
    {"compression_type": "zstd"},
)

each_kind = pytest.mark.parametrize(
    "options", KINDS, ids=lambda options: ",".join(map(str, options.values())) or "none"
)


def kind_of(path: pathlib.Path) -> dict[str, object]:
    """Return what a guest's QEMU, and its owner, know the file as."""
    told = images.info(path)
    return {"cluster_size": told["cluster-size"], **told["format-specific"]["data"]}


def of_kind(path: pathlib.Path, options: dict[str, Any], backing: pathlib.Path | None = None) -> pathlib.Path:
    if "compression_type" in options and not images.knows_zstd():
        pytest.skip("this QEMU was built without zstd")
    return images.qcow2(path, 32 * MiB, backing=backing, **options)


@each_kind
@pytest.mark.parametrize("written", [False, True], ids=["blank", "with_data"])
@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_disk_that_is_made_anew_stays_of_its_kind(
    folder: pathlib.Path, options: dict[str, Any], written: bool, mode: Mode
) -> None:
    disk = of_kind(folder / "disk", options)
    if written:
        images.qemu_io(disk, "write -P 0x11 3M 1M")
    before, kind, copy = disk.stat().st_ino, kind_of(disk), shutil.copyfile(disk, folder / "copy")

    image = Preallocator(mode).preallocate(disk, "rewrite", format="qcow2")

    assert disk.stat().st_ino != before
    assert image.state == ("mapped" if mode == "metadata" else "preallocated")
    assert (kind_of(disk), images.differences(disk, copy)) == (kind, "")


@each_kind
@pytest.mark.parametrize("backed", [False, True])
def test_thin_copy_stays_of_its_kind(
    folder: pathlib.Path, base: pathlib.Path, options: dict[str, Any], backed: bool
) -> None:
    disk = of_kind(folder / "disk", options, base if backed else None)
    images.qemu_io(disk, "write -P 0x11 3M 1M")
    before, kind = disk.stat().st_ino, kind_of(disk)

    Preallocator().thin(disk, rewrite=True, format="qcow2")

    assert disk.stat().st_ino != before
    assert kind_of(disk) == kind


@each_kind
@pytest.mark.parametrize("written", [False, True], ids=["blank", "with_data"])
def test_overlay_that_is_made_anew_keeps_what_an_overlay_with_subclusters_can(
    folder: pathlib.Path, base: pathlib.Path, options: dict[str, Any], written: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    disk = of_kind(folder / "disk", options, base)
    if written:
        images.qemu_io(disk, "write -P 0x11 3M 1M")
    kind, copy = kind_of(disk), shutil.copyfile(disk, folder / "copy")

    image = Preallocator().preallocate(disk, "rewrite", format="qcow2")

    assert (image.state, images.differences(disk, copy)) == ("preallocated", "")
    if kind["compat"] == "0.10":
        assert kind_of(disk)["compat"] == "1.1"
        assert "of version 3 (compat=1.1)" in caplog.text
    else:
        assert kind_of(disk) == {**kind, "cluster_size": 128 * KiB, "extended-l2": True}
        assert "version" not in caplog.text


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
def test_disk_that_is_made_anew_is_as_long_as_was_reckoned(folder: pathlib.Path, refcount_bits: int) -> None:
    images.qcow2(folder / "disk", 64 * MiB, cluster_size=4 * KiB, refcount_bits=refcount_bits)

    needed = Preallocator("metadata").plan(folder / "disk", "rewrite", format="qcow2").needed
    Preallocator("metadata").preallocate(folder / "disk", "rewrite", format="qcow2")

    assert needed - 32 * KiB <= (folder / "disk").stat().st_size - 64 * MiB <= needed


def with_an_unknown_extension(disk: pathlib.Path) -> None:
    """Put another extension in the place of that with the features' names."""
    images.replace_in_header(disk, b"\x68\x03\xf8\x57", b"\x13\x37\x13\x37")


def with_an_unknown_feature(disk: pathlib.Path) -> None:
    """Set a compatible feature, which QEMU leaves alone."""
    with disk.open("r+b") as file:
        file.seek(80)
        file.write((1 << 40).to_bytes(8, "big"))


@pytest.mark.parametrize("change", [with_an_unknown_extension, with_an_unknown_feature])
@pytest.mark.parametrize("written", [False, True], ids=["blank", "with_data"])
@pytest.mark.parametrize("backed", [False, True])
def test_disk_with_more_in_its_header_than_is_known_is_not_made_anew(
    folder: pathlib.Path, base: pathlib.Path, change: Callable[[pathlib.Path], None], written: bool, backed: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base if backed else None)
    if written:
        images.qemu_io(disk, "write -P 0x11 3M 1M")
    change(disk)
    before = images.file_digest(disk)

    image = Preallocator().preallocate(disk, "rewrite", format="qcow2")

    assert (image.state, images.file_digest(disk)) == ("reserved", before)
    assert "not known here" in caplog.text
