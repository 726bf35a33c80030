# SPDX-License-Identifier: Apache-2.0
"""Mode full on a disk that mode falloc has preallocated: what it holds is written, where that can be done."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import subprocess

import images
import pytest

from functional.terminal import Terminal
from functional.terminal import argv
from imgprealloc import Pace
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import healing
from imgprealloc import zeros

MiB = 1 << 20
SIZE = 64 * MiB

FULL = Preallocator("full")


def disk_in(folder: pathlib.Path, format: str) -> pathlib.Path:
    """Make a disk in mode falloc to which its guest has written."""
    disk = folder / "disk"
    if format == "raw":
        Preallocator().create(disk, SIZE, format="raw")
    else:
        base = images.random_file(folder / "base", 24 * MiB)
        Preallocator().create(disk, SIZE, str(base), backing_format="raw")
    images.qemu_io(disk, "write -P 1 3M 1M", "write -P 2 41M 3k", format=format)
    return disk


def is_written(disk: pathlib.Path) -> bool:
    """Whether a file is written up to its end, past which XFS may hold more, but for what qemu-img leaves of it."""
    with disk.open("r+b") as file:
        zeros.forget_reads(file.fileno())
        return not zeros.has_unwritten(file.fileno(), more_than=zeros.MOST_OF_METADATA)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_all_that_was_held_is_written_and_reads_the_same(folder: pathlib.Path, format: str) -> None:
    disk = disk_in(folder, format)
    before = images.digest(disk, format), images.file_digest(disk)
    assert images.unwritten(disk) > SIZE // 2

    image = FULL.preallocate(disk, format=format)

    assert image.state == "preallocated"
    assert images.unwritten(disk) == 0
    assert (images.digest(disk, format), images.file_digest(disk)) == before


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_second_call_writes_nothing(folder: pathlib.Path, format: str) -> None:
    disk = disk_in(folder, format)
    FULL.preallocate(disk, format=format)
    before = images.identity(disk)

    FULL.preallocate(disk, format=format)

    assert images.identity(disk) == before


def test_new_overlay_in_mode_full_is_not_written_once_more(folder: pathlib.Path, base: pathlib.Path) -> None:
    FULL.create(folder / "disk", SIZE, str(base), backing_format="raw")
    before = images.identity(folder / "disk")

    FULL.preallocate(folder / "disk", format="qcow2")

    assert images.identity(folder / "disk") == before


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_start_writes_what_it_has_to_set_aside_and_not_all_that_was_held(folder: pathlib.Path) -> None:
    disk = disk_in(folder, "raw")
    held, before = images.unwritten(disk), images.file_digest(disk)
    with disk.open("r+b") as file:
        for start in (8, 30, 50):
            fallocate.punch(file.fileno(), start * MiB, MiB)

    image = FULL.preallocate(disk, "reserve", format="raw", write_held=False)

    assert (image.state, images.unwritten(disk)) == ("preallocated", held - 3 * MiB)
    assert images.file_digest(disk) == before


def test_mapped_disk_gets_its_space_written_too(folder: pathlib.Path) -> None:
    disk = disk_in(folder, "qcow2")
    Preallocator().thin(disk, format="qcow2")
    before = images.digest(disk)

    image = FULL.preallocate(disk, format="qcow2")

    assert (image.state, images.unwritten(disk)) == ("preallocated", 0)
    assert images.digest(disk) == before


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_in_use_is_not_written_and_it_is_told(folder: pathlib.Path, format: str) -> None:
    disk = disk_in(folder, format)
    with images.guest(disk, format=format):
        unwritten = images.unwritten(disk)
        with pytest.raises(exceptions.ImageInUse, match="never written") as caught:
            FULL.preallocate(disk, format=format)
        assert images.unwritten(disk) == unwritten

    assert caught.value.image is not None
    assert caught.value.image.state == "preallocated"


def test_thin_disk_in_use_gets_its_space_before_it_is_told(folder: pathlib.Path) -> None:
    disk = images.sparse_file(folder / "disk", SIZE)
    with images.guest(disk, format="raw"), pytest.raises(exceptions.ImageInUse, match="never written"):
        FULL.preallocate(disk, format="raw")

    assert images.held(disk) == SIZE


@pytest.mark.parametrize("existing", ["reserve", "rewrite"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_start_of_an_instance_writes_nothing(folder: pathlib.Path, format: str, existing: str) -> None:
    # As nova-compute has it in mode full, for a disk of mode falloc.
    disk = disk_in(folder, format)
    before = images.identity(disk)

    healing.heal(FULL, str(disk), format, existing, contextlib.nullcontext())  # type: ignore[arg-type]

    assert images.identity(disk) == before


def test_start_sets_the_space_of_a_mapped_disk_aside_and_writes_nothing(folder: pathlib.Path) -> None:
    disk = disk_in(folder, "qcow2")
    Preallocator().thin(disk, format="qcow2")

    healing.heal(FULL, str(disk), "qcow2", "reserve", contextlib.nullcontext())

    assert Preallocator().inspect(disk, format="qcow2").state == "preallocated"
    assert images.unwritten(disk) > SIZE // 2


# The command.


def test_command_says_of_a_running_guest_s_disk_that_it_is_not_written(folder: pathlib.Path) -> None:
    disk = disk_in(folder, "raw")
    with images.guest(disk, format="raw"):
        done = subprocess.run(
            argv("allocate", "--mode", "full", "--disk-format", "raw", "-f", "json", disk),
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    (row,) = json.loads(done.stdout)
    assert done.returncode == 1
    assert (row["state"], row["in_use"]) == ("preallocated", True)
    assert "Stop the instance" in row["error"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_end_in_the_middle_of_the_writing_changes_no_byte(
    folder: pathlib.Path, number: signal.Signals, format: str
) -> None:
    disk = disk_in(folder, format)
    before, unwritten = images.file_digest(disk), images.unwritten(disk)
    terminal = Terminal("allocate", "--mode", "full", "--rate", "8M", "--disk-format", format, disk, columns=200)
    terminal.until("disk 1 of 1, [2-9][0-9] %")
    terminal.process.send_signal(number)
    terminal.end()

    assert 0 < images.unwritten(disk) < unwritten
    assert images.file_digest(disk) == before
    if number == signal.SIGTERM:
        assert terminal.process.returncode == 128 + number
        assert terminal.line.startswith(f"imgprealloc: stopped by SIGTERM: {disk} has its content, and is not done")


# At a pace.


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "ext2"])
@pytest.mark.parametrize("subclusters", ["unallocated", "allocated", "copied"])
def test_overlay_made_and_grown_at_a_pace_is_what_it_is_without(
    folder: pathlib.Path, base: pathlib.Path, subclusters: str, kind: str
) -> None:
    found = {}
    for name, pace in (("paced", Pace()), ("unpaced", None)):
        strategy = Preallocator("full", overlay_subclusters=subclusters)  # type: ignore[arg-type]
        strategy.create(folder / name, 26 * MiB, str(base), backing_format="raw", pace=pace)
        image = strategy.resize(folder / name, 32 * MiB, format="qcow2", pace=pace)
        found[name] = image.state, images.extents(folder / name)
        assert is_written(folder / name)

    assert found["paced"] == found["unpaced"]
    assert images.differences(folder / "paced", folder / "unpaced") == ""


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_raw_disk_made_and_grown_at_a_pace_is_written(folder: pathlib.Path, kind: str) -> None:
    pace = Pace(1 << 30)
    FULL.create(folder / "disk", 8 * MiB, format="raw", pace=pace)
    assert is_written(folder / "disk")
    image = FULL.resize(folder / "disk", 16 * MiB, format="raw", pace=pace)

    assert is_written(folder / "disk")
    assert image.state == "preallocated"


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_disk_rewritten_at_a_pace_reads_the_same(folder: pathlib.Path, base: pathlib.Path, mode: str) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    images.qemu_io(disk, "write -P 1 3M 1M", "write -z 5M 64k", "write -P 2 30M 3k")
    before = images.digest(disk)
    strategy = Preallocator(mode)  # type: ignore[arg-type]

    image = strategy.preallocate(disk, "rewrite", format="qcow2", pace=Pace(1 << 30))

    assert image.state == "preallocated"
    assert images.digest(disk) == before
    assert mode == "falloc" or is_written(disk)


@pytest.mark.parametrize("kind", ["ext2"])
def test_rate_that_mode_full_cannot_keep_is_refused_before_anything_is_made(folder: pathlib.Path) -> None:
    with pytest.raises(exceptions.UnsupportedFilesystem, match="rate"):
        FULL.create(folder / "disk", SIZE, format="raw", pace=Pace(1))

    assert not list(folder.iterdir())


def test_old_part_of_a_disk_that_grows_at_a_pace_is_as_it_was(folder: pathlib.Path) -> None:
    disk = disk_in(folder, "raw")
    unwritten = images.unwritten(disk)

    FULL.resize(disk, 2 * SIZE, format="raw", pace=Pace())

    assert images.unwritten(disk) == unwritten
    assert images.held(disk) == 2 * SIZE
