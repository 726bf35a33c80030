# SPDX-License-Identifier: Apache-2.0
"""A filesystem without room: an error that Nova knows, the disks as they were, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import os
import pathlib
import time

import images
import loop_filesystem
from oslo_concurrency import processutils
import pytest

from functional import kinds
from imgprealloc import Mode
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc.promise import Promise

KiB, MiB = 1 << 10, 1 << 20

FREE = 40 * MiB

Operation = Callable[[Preallocator, pathlib.Path], None]


def create_qcow2(strategy: Preallocator, folder: pathlib.Path) -> None:
    strategy.create(folder / "new", 64 * MiB)


def create_overlay(strategy: Preallocator, folder: pathlib.Path) -> None:
    strategy.create(folder / "new", 64 * MiB, "base", backing_format="raw")


def create_raw(strategy: Preallocator, folder: pathlib.Path) -> None:
    strategy.create(folder / "new", 64 * MiB, format="raw")


def preallocate_blank(strategy: Preallocator, folder: pathlib.Path) -> None:
    strategy.preallocate(folder / "blank", format="qcow2")


def rewrite(strategy: Preallocator, folder: pathlib.Path) -> None:
    strategy.preallocate(folder / "used", existing="rewrite", format="qcow2")


def reserve(strategy: Preallocator, folder: pathlib.Path) -> None:
    strategy.preallocate(folder / "used", format="qcow2")


def fill_raw(strategy: Preallocator, folder: pathlib.Path) -> None:
    strategy.preallocate(folder / "raw", format="raw")


def grow(strategy: Preallocator, folder: pathlib.Path) -> None:
    strategy.resize(folder / "grown", 72 * MiB, format="qcow2")


def grow_raw(strategy: Preallocator, folder: pathlib.Path) -> None:
    strategy.resize(folder / "raw", 128 * MiB, format="raw")


WITH_A_NEW_FILE = (create_qcow2, create_overlay, create_raw, preallocate_blank, rewrite)
IN_PLACE = (reserve, fill_raw, grow, grow_raw)

each_operation = pytest.mark.parametrize("operation", WITH_A_NEW_FILE + IN_PLACE, ids=lambda found: found.__name__)
each_with_a_new_file = pytest.mark.parametrize("operation", WITH_A_NEW_FILE, ids=lambda found: found.__name__)
each_mode = pytest.mark.parametrize("mode", ["falloc", "full"])


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Give one disk of each sort, to be copied."""
    folder = tmp_path_factory.mktemp("disks")
    images.random_file(folder / "base", 8 * MiB)
    for name in ("blank", "used", "stock"):
        images.qcow2(folder / name, 64 * MiB, backing="base")
    images.qemu_io(folder / "used", "write -P 0x5a 3M 1M")
    Preallocator().create(folder / "grown", 8 * MiB, "base", backing_format="raw")
    images.sparse_file(folder / "raw", 64 * MiB)
    return folder


@pytest.fixture
def small(kind: str, disks: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a filesystem with one disk of each sort, all of 64 MiB, and 40 MiB free."""
    with loop_filesystem.mounted(kind, 400 * MiB) as mount_point:
        images.run("cp", "--sparse=always", *disks.iterdir(), mount_point)
        # The copy has made holes in it.
        images.run("fallocate", "-n", "-l", (disks / "grown").stat().st_size, f"{mount_point}/grown")
        # As stock Nova leaves it.
        images.run("fallocate", "-n", "-l", 64 * MiB, f"{mount_point}/stock")
        images.run("fallocate", "-l", images.free(mount_point) - FREE, f"{mount_point}/filler")
        yield pathlib.Path(mount_point)


@pytest.fixture
def taken_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the space seem to be there when it is asked for, as if another process had taken it just then."""
    monkeypatch.setattr(Promise, "require_space", lambda self, place, needed, fd=None: None)


def files_in(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Return all that a failure could change in files, but for their space."""
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    return {
        name: (path.stat().st_ino, images.file_digest(path) if name != "filler" else "") for name, path in files.items()
    }


def freed(folder: pathlib.Path, expected: int) -> int:
    """Return the bytes that are free once the filesystem has cleared away what was removed; XFS takes its time."""
    deadline = time.monotonic() + 10
    while images.free(folder) < expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return images.free(folder)


@each_operation
def test_lack_of_space_is_told_as_such(small: pathlib.Path, operation: Operation) -> None:
    with pytest.raises(exceptions.NoSpace):
        operation(Preallocator(), small)


@each_operation
@each_mode
def test_lack_of_space_that_comes_about_half_way_is_told_as_such(
    small: pathlib.Path, taken_meanwhile: None, operation: Operation, mode: Mode
) -> None:
    with pytest.raises(exceptions.NoSpace):
        operation(Preallocator(mode), small)


def test_lack_of_space_is_a_process_error_as_nova_expects(small: pathlib.Path) -> None:
    with pytest.raises(processutils.ProcessExecutionError) as caught:
        create_overlay(Preallocator(), small)

    assert "No space left on device" in (caught.value.stderr or "")


def test_lack_of_space_half_way_is_a_process_error_as_nova_expects(small: pathlib.Path, taken_meanwhile: None) -> None:
    with pytest.raises(processutils.ProcessExecutionError) as caught:
        create_overlay(Preallocator(), small)

    assert "No space left on device" in (caught.value.stderr or "")


@each_operation
def test_error_names_the_disk_and_not_a_file_that_was_made_for_it(
    small: pathlib.Path, taken_meanwhile: None, operation: Operation
) -> None:
    with pytest.raises(exceptions.NoSpace) as caught:
        operation(Preallocator(), small)

    assert os.path.basename(caught.value.path) in ("new", "blank", "used", "grown", "raw")


@each_operation
def test_lack_of_space_changes_no_file_and_leaves_none(small: pathlib.Path, operation: Operation) -> None:
    before = files_in(small)

    with pytest.raises(exceptions.NoSpace):
        operation(Preallocator(), small)

    assert files_in(small) == before


@each_with_a_new_file
@each_mode
def test_lack_of_space_half_way_changes_no_file_and_leaves_none(
    small: pathlib.Path, taken_meanwhile: None, operation: Operation, mode: Mode
) -> None:
    before = files_in(small)

    with pytest.raises(exceptions.NoSpace):
        operation(Preallocator(mode), small)

    assert files_in(small) == before


@kinds.common
@each_operation
def test_lack_of_space_leaves_as_much_space_as_there_was(small: pathlib.Path, operation: Operation) -> None:
    before = images.free(small)

    with pytest.raises(exceptions.NoSpace):
        operation(Preallocator(), small)

    assert freed(small, before) >= before


@each_with_a_new_file
@each_mode
def test_lack_of_space_half_way_leaves_as_much_space_as_there_was(
    small: pathlib.Path, taken_meanwhile: None, operation: Operation, mode: Mode
) -> None:
    before = images.free(small)

    with pytest.raises(exceptions.NoSpace):
        operation(Preallocator(mode), small)

    assert freed(small, before) >= before


@each_mode
def test_disk_that_could_not_grow_is_still_preallocated(small: pathlib.Path, taken_meanwhile: None, mode: Mode) -> None:
    before = images.digest(small / "grown")

    with pytest.raises(exceptions.NoSpace):
        grow(Preallocator(mode), small)

    image = Preallocator().inspect(small / "grown", format="qcow2")
    assert (image.state, image.virtual_size, images.digest(small / "grown")) == ("preallocated", 8 * MiB, before)


@each_mode
def test_disk_that_could_not_grow_has_taken_a_cluster_at_the_most(
    small: pathlib.Path, taken_meanwhile: None, mode: Mode
) -> None:
    before = images.free(small)

    with pytest.raises(exceptions.NoSpace):
        grow(Preallocator(mode), small)

    assert freed(small, before - 256 * KiB) >= before - 256 * KiB


@each_mode
def test_disk_that_could_not_grow_grows_once_there_is_room(
    small: pathlib.Path, taken_meanwhile: None, mode: Mode
) -> None:
    with pytest.raises(exceptions.NoSpace):
        grow(Preallocator(mode), small)
    (small / "filler").unlink()

    assert Preallocator(mode).resize(small / "grown", 72 * MiB, format="qcow2").state == "preallocated"


def test_disk_is_replaced_once_there_is_room(small: pathlib.Path) -> None:
    with pytest.raises(exceptions.NoSpace):
        preallocate_blank(Preallocator(), small)
    (small / "filler").unlink()

    assert Preallocator().preallocate(small / "blank", format="qcow2").state == "preallocated"


@kinds.common
def test_unused_disk_that_has_its_space_is_reserved_where_a_second_one_has_no_room(small: pathlib.Path) -> None:
    before = (small / "stock").stat().st_ino

    image = Preallocator().preallocate(small / "stock", format="qcow2")

    assert (image.state, image.shortfall, (small / "stock").stat().st_ino) == ("reserved", 0, before)


def test_unused_disk_that_has_its_space_is_made_anew_where_there_is_room(small: pathlib.Path) -> None:
    (small / "filler").unlink()

    assert Preallocator().preallocate(small / "stock", format="qcow2").state == "preallocated"


@each_mode
def test_raw_disk_that_could_not_be_filled_reads_the_same(
    small: pathlib.Path, taken_meanwhile: None, mode: Mode
) -> None:
    before = images.file_digest(small / "raw")

    with pytest.raises(exceptions.NoSpace):
        fill_raw(Preallocator(mode), small)

    assert images.file_digest(small / "raw") == before


@kinds.common
def test_filesystem_full_to_the_last_byte_lets_a_preallocated_disk_be(tight: pathlib.Path) -> None:
    Preallocator().create(tight / "disk", 32 * MiB)
    loop_filesystem.fill(str(tight))

    assert Preallocator().preallocate(tight / "disk", format="qcow2").state == "preallocated"


# On a full XFS not even the file can be made that asks what the filesystem can promise.
@kinds.common
@pytest.mark.parametrize("mode", ["falloc", "metadata"])
def test_filesystem_full_to_the_last_byte_lets_a_reserved_disk_be(tight: pathlib.Path, mode: Mode) -> None:
    disk = images.qcow2(tight / "disk", 32 * MiB)
    images.qemu_io(disk, "write -P 0x5a 3M 1M")
    Preallocator().preallocate(disk, format="qcow2")
    loop_filesystem.fill(str(tight))

    image = Preallocator(mode).preallocate(disk, format="qcow2")

    assert (image.state, image.shortfall) == ("reserved", 0)


@kinds.common
def test_mode_metadata_without_any_room_leaves_no_file(tight: pathlib.Path) -> None:
    images.random_file(tight / "base", MiB)
    loop_filesystem.fill(str(tight))
    before = set(os.listdir(tight))

    with pytest.raises(exceptions.NoSpace):
        Preallocator("metadata").create(tight / "disk", 8192 * MiB, "base", backing_format="raw")

    assert set(os.listdir(tight)) == before


# XFS wants room for the whole of a range that fallocate(2) is asked for, also
# where most of it is held already.


@pytest.fixture
def snug(tight: pathlib.Path) -> Callable[[int], None]:
    """Give a function that leaves so much room on a filesystem, and 24 MiB, of which ext4 keeps some for itself."""

    def snug(room: int) -> None:
        images.run("fallocate", "-l", images.free(tight) - room - 24 * MiB, tight / "filler")

    return snug


@kinds.common
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_new_disk_needs_its_room_only_once(tight: pathlib.Path, snug: Callable[[int], None], format: str) -> None:
    snug(96 * MiB)

    assert Preallocator().create(tight / "disk", 96 * MiB, format=format).state == "preallocated"


@kinds.common
def test_overlay_needs_its_room_only_once(tight: pathlib.Path, snug: Callable[[int], None]) -> None:
    base = images.random_file(tight / "base", 8 * MiB)
    disk = images.qcow2(tight / "disk", 96 * MiB, backing=base)
    snug(96 * MiB)

    assert Preallocator().preallocate(disk, format="qcow2").state == "preallocated"


@kinds.common
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_growth_needs_its_room_only_once(tight: pathlib.Path, snug: Callable[[int], None], format: str) -> None:
    Preallocator().create(tight / "disk", 8 * MiB, format=format)
    snug(96 * MiB)

    assert Preallocator().resize(tight / "disk", 104 * MiB, format=format).state == "preallocated"


@kinds.common
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_holes_need_no_more_room_than_they_have(tight: pathlib.Path, snug: Callable[[int], None], format: str) -> None:
    Preallocator().create(tight / "disk", 96 * MiB, format=format)
    for hole in (8 * MiB, 40 * MiB):
        images.run("fallocate", "-p", "-o", hole, "-l", 2 * MiB, tight / "disk")
    snug(4 * MiB)

    assert Preallocator().preallocate(tight / "disk", format=format).state == "preallocated"


@kinds.common
@pytest.mark.parametrize("filler", [None, fallocate.fill_named], ids=["by itself", "by root"])
def test_very_many_holes_need_no_more_room_than_they_have(
    tight: pathlib.Path, snug: Callable[[int], None], filler: fallocate.Filler | None
) -> None:
    # By twos, the last of those at the begin would be filled together with the first at the end.
    holes = [*range(0, 499 * 8192, 8192), 150 * MiB, 155 * MiB, 160 * MiB]
    disk = images.sparse_file(tight / "disk", 160 * MiB)
    with open(disk, "r+b") as file:
        for hole, following in zip(holes, holes[1:]):
            os.posix_fallocate(file.fileno(), hole + 4096, following - hole - 4096)
    assert images.holes(disk) == 501 * 4096
    snug(4 * MiB)

    with fallocate.filling_by(filler):
        assert Preallocator().preallocate(disk, format="raw").state == "preallocated"


@kinds.common
def test_reserving_what_is_nearly_reserved_needs_no_more_room_than_is_short(
    tight: pathlib.Path, snug: Callable[[int], None]
) -> None:
    disk = images.qcow2(tight / "disk", 96 * MiB)
    images.qemu_io(disk, "write -P 0x5a 3M 1M")
    images.run("fallocate", "-n", "-l", 94 * MiB, disk)
    snug(4 * MiB)

    assert Preallocator().preallocate(disk, format="qcow2").state == "reserved"


def test_disk_in_mode_metadata_is_found_out_to_be_short_of_space(tight: pathlib.Path) -> None:
    image = Preallocator("metadata").create(tight / "disk", 64 * MiB)

    assert (image.state, image.shortfall >= 64 * MiB) == ("mapped", True)


@pytest.mark.parametrize("kind", ["xfs"])
def test_space_of_what_has_just_been_removed_counts(tight: pathlib.Path) -> None:
    # XFS frees it in the background, and the longer, the more pieces it is in.
    room = images.free(tight) * 4 // 5 // MiB * MiB
    with open(tight / "old", "wb") as file:
        for start in range(0, room, 8 * KiB):
            os.posix_fallocate(file.fileno(), start, 4 * KiB)
    images.run("sync", "-f", tight)

    (tight / "old").unlink()

    assert Preallocator().create(tight / "disk", room).state == "preallocated"
