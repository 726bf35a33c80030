# SPDX-License-Identifier: Apache-2.0
"""What each filesystem can promise, and what becomes of a disk where it can promise nothing."""

from __future__ import annotations

import array
from collections.abc import Callable
import fcntl
import os
import pathlib

import images
import pytest

from functional import kinds
from imgprealloc import Mode
from imgprealloc import OnUnsupported
from imgprealloc import Preallocator
from imgprealloc import exceptions

KiB, MiB = 1 << 10, 1 << 20

FS_IOC_GETFLAGS = 0x80086601
NOCOW = 0x00800000

Operation = Callable[[Preallocator, pathlib.Path], object]


def nocow(path: pathlib.Path) -> bool:
    """Whether btrfs writes to this file in place."""
    flags = array.array("l", [0])
    with open(path, "rb") as file:
        fcntl.ioctl(file.fileno(), FS_IOC_GETFLAGS, flags)
    return bool(flags[0] & NOCOW)


# Where space can be held.


@kinds.with_fallocate
@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_new_disk_is_preallocated(folder: pathlib.Path, format: str, mode: Mode) -> None:
    image = Preallocator(mode).create(folder / "disk", 32 * MiB, format=format)

    assert (image.state, image.shortfall, images.allocated(folder / "disk") >= image.file_size) == (
        "preallocated",
        0,
        True,
    )


@kinds.with_fallocate
@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_overlay_is_clean_and_reads_its_base(folder: pathlib.Path, base: pathlib.Path, mode: Mode) -> None:
    disk, plain = (images.qcow2(folder / name, 32 * MiB, backing=base) for name in ("disk", "plain"))

    Preallocator(mode).preallocate(disk, format="qcow2")

    assert (images.check(disk)["check-errors"], images.differences(disk, plain)) == (0, "")


@kinds.with_fallocate
def test_second_call_writes_nothing(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator().create(folder / "disk", 32 * MiB, str(base), backing_format="raw")
    before = images.identity(folder / "disk")

    Preallocator().preallocate(folder / "disk", format="qcow2")

    assert images.identity(folder / "disk") == before


@kinds.with_fallocate
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_grown_disk_is_preallocated(folder: pathlib.Path, format: str) -> None:
    Preallocator().create(folder / "disk", 16 * MiB, format=format)

    image = Preallocator().resize(folder / "disk", 32 * MiB, format=format)

    assert (image.state, image.shortfall) == ("preallocated", 0)


@kinds.with_fallocate
def test_disk_with_data_is_rewritten(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk, plain = (images.qcow2(folder / name, 32 * MiB, backing=base) for name in ("disk", "plain"))
    for either in (disk, plain):
        images.qemu_io(either, "write -P 0x5a 3M 1M")

    image = Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert (image.state, images.differences(disk, plain)) == ("preallocated", "")


@pytest.mark.parametrize("kind", ["xfs", "tmpfs"])
def test_disk_with_data_is_reserved(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    images.qemu_io(disk, "write -P 0x5a 3M 1M")

    image = Preallocator().preallocate(disk, format="qcow2")

    assert (image.state, image.shortfall) == ("reserved", 0)


@pytest.mark.parametrize("kind", ["xfs", "tmpfs"])
def test_holes_of_a_raw_disk_are_filled(folder: pathlib.Path) -> None:
    disk = images.sparse_file(folder / "disk", 16 * MiB)

    image = Preallocator().preallocate(disk, format="raw")

    assert (image.state, images.allocated(disk) >= 16 * MiB) == ("preallocated", True)


# btrfs copies on write, but for files that were made otherwise.


@kinds.copying_on_write
@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_new_disk_on_btrfs_is_not_copied_on_write(folder: pathlib.Path, format: str, mode: Mode) -> None:
    Preallocator(mode).create(folder / "disk", 16 * MiB, format=format)

    assert nocow(folder / "disk")


@kinds.copying_on_write
def test_novas_overlay_on_btrfs_is_no_longer_copied_on_write(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)

    Preallocator().preallocate(disk, format="qcow2")

    assert nocow(disk)


@kinds.copying_on_write
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_that_is_copied_on_write_is_never_called_preallocated(folder: pathlib.Path, format: str) -> None:
    options = ["-o", "preallocation=full"]
    images.run("qemu-img", "create", "-q", "-f", format, *options, folder / "disk", 16 * MiB)

    image = Preallocator().inspect(folder / "disk", format=format)

    assert (image.state, image.shortfall) == ("thin" if format == "raw" else "mapped", image.worst_case_size)


@kinds.copying_on_write
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_that_is_copied_on_write_cannot_be_reserved(folder: pathlib.Path, format: str) -> None:
    images.run("qemu-img", "create", "-q", "-f", format, folder / "disk", 16 * MiB)
    images.qemu_io(folder / "disk", "write -P 0x5a 3M 1M", format=format)

    with pytest.raises(exceptions.UnsupportedFilesystem, match="copy on write"):
        Preallocator().preallocate(folder / "disk", format=format)


@kinds.copying_on_write
@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_that_is_copied_on_write_is_rewritten(folder: pathlib.Path, format: str, mode: Mode) -> None:
    images.run("qemu-img", "create", "-q", "-f", format, folder / "disk", 16 * MiB)
    images.qemu_io(folder / "disk", "write -P 0x5a 3M 1M", format=format)
    before = images.digest(folder / "disk", format)

    image = Preallocator(mode).preallocate(folder / "disk", existing="rewrite", format=format)

    assert (image.state, nocow(folder / "disk"), images.digest(folder / "disk", format)) == (
        "preallocated",
        True,
        before,
    )


@kinds.copying_on_write
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_mode_metadata_leaves_a_disk_with_data_alone(folder: pathlib.Path, format: str) -> None:
    images.run("qemu-img", "create", "-q", "-f", format, folder / "disk", 16 * MiB)
    images.qemu_io(folder / "disk", "write -P 0x5a 3M 1M", format=format)
    before = images.identity(folder / "disk")

    Preallocator("metadata").preallocate(folder / "disk", format=format)

    assert images.identity(folder / "disk") == before


@kinds.copying_on_write
def test_reflinked_disk_on_btrfs_is_not_preallocated(folder: pathlib.Path) -> None:
    Preallocator("full").create(folder / "original", 16 * MiB, format="raw")
    # A reflink wants both to be nocow, or neither.
    images.run("chattr", "+C", folder)
    images.run("cp", "--reflink=always", folder / "original", folder / "disk")

    assert Preallocator().inspect(folder / "disk", format="raw").state == "thin"


@kinds.copying_on_write
def test_reflinked_disk_on_btrfs_is_rewritten_or_refused(folder: pathlib.Path) -> None:
    Preallocator("full").create(folder / "original", 16 * MiB, format="raw")
    images.run("chattr", "+C", folder)
    images.run("cp", "--reflink=always", folder / "original", folder / "disk")
    before = images.file_digest(folder / "disk")

    state: str
    try:
        state = Preallocator().preallocate(folder / "disk", format="raw").state
    except exceptions.PreallocationError:
        state = "refused"

    assert (state in ("preallocated", "refused"), images.file_digest(folder / "disk")) == (True, before)


def shared_with_a_snapshot(folder: pathlib.Path, format: str) -> pathlib.Path:
    """Make a preallocated disk whose subvolume has a snapshot now."""
    volume = folder / "volume"
    images.run("btrfs", "-q", "subvolume", "create", volume)
    Preallocator().create(volume / "disk", 16 * MiB, format=format)
    images.qemu_io(volume / "disk", "write -P 0x5a 3M 1M", format=format)
    images.run("sync", "-f", volume)
    images.run("btrfs", "-q", "subvolume", "snapshot", volume, folder / "snapshot")
    return volume / "disk"


@kinds.copying_on_write
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_shared_with_a_snapshot_of_its_subvolume_takes_new_space(folder: pathlib.Path, format: str) -> None:
    disk = shared_with_a_snapshot(folder, format)

    assert Preallocator().inspect(disk, format=format).shortfall >= 16 * MiB
    with pytest.raises(exceptions.UnsupportedFilesystem, match="shares nothing with a snapshot"):
        Preallocator().preallocate(disk, "reserve", format=format)


@kinds.copying_on_write
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_shared_with_a_snapshot_of_its_subvolume_is_rewritten(folder: pathlib.Path, format: str) -> None:
    disk = shared_with_a_snapshot(folder, format)
    before = images.digest(disk, format)

    image = Preallocator().preallocate(disk, "rewrite", format=format)

    assert (image.state, image.shortfall, images.digest(disk, format)) == ("preallocated", 0, before)


@kinds.copying_on_write
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("back", [False, True], ids=["rewrite", "thin"])
def test_compressed_disk_is_rewritten(
    folder: pathlib.Path, format: str, back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    disk = folder / "disk"
    disk.touch()
    images.run("chattr", "+c", disk)
    images.run("qemu-img", "create", "-q", "-f", format, disk, 16 * MiB)
    images.qemu_io(disk, "write -P 0x5a 1M 1M", format=format)
    before = images.digest(disk, format)

    if back:
        Preallocator().thin(disk, rewrite=True, format=format)
    else:
        image = Preallocator().preallocate(disk, "rewrite", format=format)
        assert (image.state, image.shortfall) == ("preallocated", 0)

    assert images.digest(disk, format) == before
    assert "not compressed any more" in caplog.text


@pytest.fixture
def compressed(folder: pathlib.Path) -> pathlib.Path:
    """Give a folder whose files btrfs compresses, and copies on write for that."""
    place = folder / "compressed"
    place.mkdir()
    images.run("chattr", "+c", place)
    return place


@kinds.copying_on_write
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_compressed_folder_is_a_filesystem_that_cannot_hold_space(
    compressed: pathlib.Path, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = Preallocator().create(compressed / "disk", 16 * MiB, format=format)

    assert (image.state, image.shortfall > 0) == ("thin" if format == "raw" else "mapped", True)
    assert "compressed" in caplog.text


@kinds.copying_on_write
def test_compressed_folder_is_refused_where_the_promise_has_to_be_kept(compressed: pathlib.Path) -> None:
    with pytest.raises(exceptions.UnsupportedFilesystem, match="compressed, chattr"):
        Preallocator(on_unsupported="error").create(compressed / "disk", 16 * MiB)

    assert list(compressed.iterdir()) == []


# ext2 has no fallocate.


@kinds.without_fallocate
def test_overlay_is_at_least_mapped_where_space_cannot_be_held(folder: pathlib.Path, base: pathlib.Path) -> None:
    image = Preallocator().create(folder / "disk", 32 * MiB, str(base), backing_format="raw")

    assert (image.state, image.shortfall > 0) == ("mapped", True)


@kinds.without_fallocate
def test_fallback_to_metadata_does_not_write_the_disk(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator().create(folder / "disk", 256 * MiB, str(base), backing_format="raw")

    assert images.allocated(folder / "disk") < 2 * MiB


@kinds.without_fallocate
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_fallback_to_full_gives_a_new_disk_all_its_space(folder: pathlib.Path, format: str) -> None:
    image = Preallocator(on_unsupported="full").create(folder / "disk", 16 * MiB, format=format)

    assert (image.state, image.shortfall) == ("preallocated", 0)


@kinds.without_fallocate
@pytest.mark.parametrize("on_unsupported", ["metadata", "full"])
def test_fallback_lets_the_base_show_through(
    folder: pathlib.Path, base: pathlib.Path, on_unsupported: OnUnsupported
) -> None:
    disk, plain = (images.qcow2(folder / name, 32 * MiB, backing=base) for name in ("disk", "plain"))

    Preallocator(on_unsupported=on_unsupported).preallocate(disk, format="qcow2")

    assert not images.differences(disk, plain)


@kinds.without_fallocate
def test_fallback_to_full_gives_an_overlay_all_its_space(folder: pathlib.Path, base: pathlib.Path) -> None:
    image = Preallocator(on_unsupported="full").create(folder / "disk", 32 * MiB, str(base), backing_format="raw")

    assert (image.state, image.shortfall) == ("preallocated", 0)


@kinds.without_fallocate
def test_mode_full_needs_no_fallback(folder: pathlib.Path, base: pathlib.Path) -> None:
    image = Preallocator("full", on_unsupported="error").create(
        folder / "disk", 32 * MiB, str(base), backing_format="raw"
    )

    assert image.state == "preallocated"


@kinds.without_fallocate
def test_fallback_to_full_fills_the_holes_of_a_raw_disk(folder: pathlib.Path) -> None:
    disk = images.random_file(folder / "disk", MiB)
    os.truncate(disk, 16 * MiB)
    before = images.file_digest(disk)

    image = Preallocator(on_unsupported="full").preallocate(disk, format="raw")

    assert (image.state, images.file_digest(disk)) == ("preallocated", before)


@kinds.without_fallocate
def test_fallback_to_full_heals_a_mapped_overlay(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk, plain = (images.qcow2(folder / name, 32 * MiB, backing=base) for name in ("disk", "plain"))
    Preallocator("metadata").preallocate(disk, format="qcow2")

    image = Preallocator(on_unsupported="full").preallocate(disk, format="qcow2")

    assert (image.state, images.differences(disk, plain)) == ("preallocated", "")


@kinds.without_fallocate
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_fallback_to_full_grows_a_disk_with_all_its_space(folder: pathlib.Path, format: str) -> None:
    strategy = Preallocator(on_unsupported="full")
    strategy.create(folder / "disk", 16 * MiB, format=format)

    image = strategy.resize(folder / "disk", 32 * MiB, format=format)

    assert (image.state, image.shortfall) == ("preallocated", 0)


@kinds.without_fallocate
def test_disk_with_data_cannot_be_reserved_and_is_left_alone(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    images.qemu_io(disk, "write -P 0x5a 3M 1M")
    before = images.identity(disk)

    image = Preallocator().preallocate(disk, format="qcow2")

    assert (image.state, images.identity(disk)) == ("thin", before)


@kinds.without_fallocate
def test_second_call_in_a_fallback_writes_nothing(folder: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator().create(folder / "disk", 32 * MiB, str(base), backing_format="raw")
    before = images.identity(folder / "disk")

    Preallocator().preallocate(folder / "disk", format="qcow2")

    assert images.identity(folder / "disk") == before


REFUSED: dict[str, Operation] = {
    "create raw": lambda strategy, folder: strategy.create(folder / "new", 16 * MiB, format="raw"),
    "create qcow2": lambda strategy, folder: strategy.create(folder / "new", 16 * MiB),
    "preallocate": lambda strategy, folder: strategy.preallocate(folder / "disk", format="qcow2"),
    "resize": lambda strategy, folder: strategy.resize(folder / "disk", 64 * MiB, format="qcow2"),
}


@kinds.without_fallocate
@pytest.mark.parametrize("operation", REFUSED.values(), ids=REFUSED)
def test_no_fallback_is_an_error(folder: pathlib.Path, operation: Operation) -> None:
    images.qcow2(folder / "disk", 16 * MiB)

    with pytest.raises(exceptions.UnsupportedFilesystem, match="ext2"):
        operation(Preallocator(on_unsupported="error"), folder)


@kinds.without_fallocate
@pytest.mark.parametrize("operation", REFUSED.values(), ids=REFUSED)
def test_no_fallback_leaves_everything_as_it_was(folder: pathlib.Path, operation: Operation) -> None:
    disk = images.qcow2(folder / "disk", 16 * MiB)
    before = images.identity(disk)

    with pytest.raises(exceptions.UnsupportedFilesystem):
        operation(Preallocator(on_unsupported="error"), folder)

    assert (os.listdir(folder), images.identity(disk)) == (["disk"], before)


@kinds.without_fallocate
def test_no_fallback_is_no_error_for_a_disk_that_has_its_space(folder: pathlib.Path) -> None:
    Preallocator("full").create(folder / "disk", 16 * MiB)

    image = Preallocator(on_unsupported="error").preallocate(folder / "disk", format="qcow2")

    assert image.state == "preallocated"
