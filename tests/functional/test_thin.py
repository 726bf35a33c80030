# SPDX-License-Identifier: Apache-2.0
"""The way back: space that nobody has written to is given back, and the content stays."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import images
import pytest

from functional import kinds
from imgprealloc import PreallocationError
from imgprealloc import Preallocator
from imgprealloc import exceptions

MiB = 1 << 20
SIZE = 64 * MiB

Make = Callable[[pathlib.Path], pathlib.Path]


def raw(folder: pathlib.Path, mode: str = "falloc") -> pathlib.Path:
    """Make a preallocated raw disk to which its guest has written here and there."""
    disk = folder / "disk"
    Preallocator(mode=mode).create(disk, SIZE, format="raw")  # type: ignore[arg-type]
    images.qemu_io(disk, "write -P 1 3M 1M", "write -P 2 40961k 3k", "write -P 3 63M 1M", format="raw")
    return disk


def overlay(folder: pathlib.Path, mode: str = "falloc") -> pathlib.Path:
    """Make a preallocated overlay to which its guest has written, zeros over its base, too."""
    base = images.random_file(folder / "base", 24 * MiB)
    disk = folder / "disk"
    Preallocator(mode=mode).create(disk, SIZE, str(base), backing_format="raw")  # type: ignore[arg-type]
    images.qemu_io(disk, "write -P 1 3M 1M", "write -z 5M 64k", "write -P 0 7M 64k", "write -P 2 41M 3k")
    return disk


def allocated(folder: pathlib.Path, mode: str = "falloc") -> pathlib.Path:
    """Make an overlay whose map calls all beyond its base data."""
    base = images.random_file(folder / "base", MiB)
    disk = folder / "disk"
    strategy = Preallocator(mode=mode, overlay_subclusters="allocated")  # type: ignore[arg-type]
    strategy.create(disk, SIZE, str(base), backing_format="raw")
    images.qemu_io(disk, "write -P 1 3M 1M")
    return disk


@kinds.with_fallocate
def test_raw_disk_gives_back_what_its_guest_has_not_written_and_reads_thin(folder: pathlib.Path) -> None:
    disk = raw(folder)
    before = images.file_digest(disk)

    image = Preallocator().thin(disk, format="raw")

    assert (image.state, image.virtual_size) == ("thin", SIZE)
    assert images.allocated(disk) <= 3 * MiB
    assert images.file_digest(disk) == before


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_overlay_keeps_its_map_and_every_byte_of_its_file(folder: pathlib.Path) -> None:
    disk = overlay(folder)
    before = images.file_digest(disk), images.allocated(disk)

    image = Preallocator().thin(disk, format="qcow2")

    assert image.state == "mapped"
    assert images.allocated(disk) < before[1] - 50 * MiB
    assert images.file_digest(disk) == before[0]
    images.check(disk)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_reserved_disk_gives_back_what_lies_past_its_end(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", SIZE)
    images.qemu_io(disk, "write -P 1 3M 1M")
    before = images.file_digest(disk), images.allocated(disk)
    assert Preallocator().preallocate(disk, "reserve", format="qcow2").state == "reserved"
    assert images.held(disk) > SIZE

    image = Preallocator().thin(disk, format="qcow2")

    assert image.state == "thin"
    assert images.allocated(disk) <= before[1]
    assert images.file_digest(disk) == before[0]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_is_in_the_page_cache_alone_is_no_space_that_nobody_has_written_to(folder: pathlib.Path) -> None:
    # The extent map calls it unwritten.
    disk = folder / "disk"
    Preallocator().create(disk, SIZE, format="raw")
    with disk.open("r+b") as file:
        file.seek(5 * MiB)
        file.write(b"\x77" * MiB)
    before = images.file_digest(disk)

    Preallocator().thin(disk, format="raw")

    images.run("sh", "-c", "echo 3 >/proc/sys/vm/drop_caches")
    assert images.file_digest(disk) == before


def test_thinning_twice_does_nothing_the_second_time(folder: pathlib.Path) -> None:
    disk = overlay(folder)
    Preallocator().thin(disk, format="qcow2")
    before = images.allocated(disk)

    image = Preallocator().thin(disk, format="qcow2")

    assert (image.state, images.allocated(disk)) == ("mapped", before)


@pytest.mark.parametrize("make", [raw, overlay])
def test_allocate_sets_aside_again_what_was_given_back(folder: pathlib.Path, make: Make) -> None:
    disk = make(folder)
    format = "raw" if make is raw else "qcow2"
    before = images.digest(disk, format)
    Preallocator().thin(disk, format=format)

    image = Preallocator().preallocate(disk, format=format)

    assert image.state == "preallocated"
    assert images.digest(disk, format) == before


def test_space_is_given_back_under_a_guess_because_no_byte_changes(folder: pathlib.Path) -> None:
    # A raw disk, to which its guest has written a header of qcow2.
    disk = images.qcow2(folder / "disk", SIZE)
    os.truncate(disk, SIZE)
    images.run("fallocate", "-l", SIZE, disk)
    before = images.file_digest(disk)

    Preallocator().thin(disk)

    assert images.allocated(disk) < MiB
    assert images.file_digest(disk) == before


# By a copy.


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("make", [raw, overlay, allocated])
def test_copy_is_thin_whatever_was_written_and_reads_the_same(folder: pathlib.Path, make: Make, mode: str) -> None:
    disk = make(folder, mode)  # type: ignore[call-arg]
    format = "raw" if make is raw else "qcow2"
    kept = images.info(disk, format)
    before = images.digest(disk, format)

    image = Preallocator().thin(disk, rewrite=True, format=format)

    assert image.state == "thin"
    assert images.allocated(disk) < 8 * MiB
    assert images.digest(disk, format) == before
    found = images.info(disk, format)
    for key in ("virtual-size", "cluster-size", "backing-filename", "backing-filename-format"):
        assert found.get(key) == kept.get(key)
    assert "disk" in os.listdir(folder)
    assert not [name for name in os.listdir(folder) if "imgprealloc" in name]


def test_copy_keeps_the_relative_name_of_its_base(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", SIZE, backing=base.name)
    images.qemu_io(disk, "write -P 1 0 1M")
    Preallocator().preallocate(disk, "rewrite", format="qcow2")
    before = images.digest(disk)

    image = Preallocator().thin(disk, rewrite=True, format="qcow2")

    assert (image.state, image.backing_file) == ("thin", base.name)
    assert images.digest(disk) == before


def test_disk_with_a_snapshot_is_not_copied_and_its_space_can_be_given_back_all_the_same(folder: pathlib.Path) -> None:
    disk = overlay(folder)
    images.run("qemu-img", "snapshot", "-c", "first", disk)
    before = images.file_digest(disk)

    with pytest.raises(exceptions.UnsupportedFormat, match="snapshots"):
        Preallocator().thin(disk, rewrite=True, format="qcow2")
    assert images.file_digest(disk) == before

    Preallocator().thin(disk, format="qcow2")
    assert images.file_digest(disk) == before
    assert images.allocated(disk) < SIZE // 2


def test_nothing_is_copied_under_a_guess(folder: pathlib.Path) -> None:
    disk = overlay(folder)
    before = images.identity(disk)

    with pytest.raises(exceptions.FormatNotCertain):
        Preallocator().thin(disk, rewrite=True)

    assert images.identity(disk) == before


# Who is kept out, and what ends it.


@contextlib.contextmanager
def by_qemu(disk: pathlib.Path):  # type: ignore[no-untyped-def]
    with images.guest(disk, format="raw"):
        yield


@contextlib.contextmanager
def by_a_loop_device(disk: pathlib.Path):  # type: ignore[no-untyped-def]
    device = images.run("losetup", "--find", "--show", disk).strip()
    try:
        yield
    finally:
        images.run("losetup", "--detach", device)


@contextlib.contextmanager
def by_a_reader(disk: pathlib.Path):  # type: ignore[no-untyped-def]
    with disk.open("rb"):
        yield


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize("opened", [by_qemu, by_a_loop_device, by_a_reader])
def test_disk_in_use_is_refused(
    folder: pathlib.Path, opened: Callable[[pathlib.Path], contextlib.AbstractContextManager[None]], rewrite: bool
) -> None:
    disk = raw(folder)
    with opened(disk):
        before = images.allocated(disk), images.file_digest(disk)
        with pytest.raises(exceptions.ImageInUse):
            Preallocator().thin(disk, rewrite=rewrite, format="raw")
        assert (images.allocated(disk), images.file_digest(disk)) == before


class _Enough(Exception):
    """Raised by a caller who has changed their mind."""


@pytest.mark.parametrize("rewrite", [False, True])
def test_caller_who_raises_ends_it_and_keeps_the_content(folder: pathlib.Path, rewrite: bool) -> None:
    disk = raw(folder)
    before = images.file_digest(disk)

    def enough(done: int, total: int) -> None:
        raise _Enough

    with pytest.raises(_Enough):
        Preallocator().thin(disk, rewrite=rewrite, format="raw", progress=enough)

    assert images.file_digest(disk) == before
    assert os.listdir(folder) == ["disk"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_end_of_the_command_changes_the_content(folder: pathlib.Path, number: signal.Signals) -> None:
    disk = folder / "disk"
    chance = random.Random(1)
    for _ in range(8):
        disk.unlink(missing_ok=True)
        Preallocator().create(disk, 8 * SIZE, format="raw")
        with disk.open("r+b") as file:
            for _ in range(200):
                file.seek(chance.randrange(8 * SIZE // 4096) * 4096)
                file.write(os.urandom(4096))
        before = images.file_digest(disk)
        process = subprocess.Popen(
            [sys.executable, "-m", "imgprealloc.cli", "thin", "--disk-format", "raw", disk],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(chance.uniform(0.2, 1.2))
        process.send_signal(number)
        process.wait()

        assert images.file_digest(disk) == before
        with contextlib.suppress(PreallocationError):
            Preallocator().thin(disk, format="raw")


# The command.


def command(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "imgprealloc.cli", *map(str, argv)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_command_shows_what_each_disk_has_given_back(folder: pathlib.Path) -> None:
    disk = raw(folder)
    before = images.allocated(disk)

    done = command("thin", "-f", "json", "--disk-format", "raw", disk)

    (row,) = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert (row["state"], row["error"]) == ("thin", None)
    assert row["given_back"] == before - images.allocated(disk) > 50 * MiB


def test_table_of_what_was_given_back_fits_80_characters(folder: pathlib.Path) -> None:
    instance = folder / "5b1c7f42-8d0e-4a63-b1f5-2c9e7a40d386"
    instance.mkdir()
    os.rename(raw(folder), instance / "disk.local")

    lines = command("thin", "--disk-format", "raw", instance).stdout.splitlines()

    assert "given back" in lines[1]
    # None is, and with it larger disks would take more.
    assert "in use" not in lines[1]
    assert max(map(len, lines[:-1])) <= 80


def test_command_says_of_a_full_disk_what_would_thin_it(folder: pathlib.Path) -> None:
    disk = raw(folder, "full")

    done = command("thin", "-f", "json", "--disk-format", "raw", disk)
    (row,) = json.loads(done.stdout)
    copied = command("thin", "--rewrite", "-f", "json", "--disk-format", "raw", disk)

    assert (done.returncode, row["state"], row["given_back"]) == (1, "preallocated", 0)
    assert "--rewrite" in row["error"]
    assert (copied.returncode, json.loads(copied.stdout)[0]["state"]) == (0, "thin")


def test_command_thins_no_disk_that_nobody_has_named(folder: pathlib.Path) -> None:
    assert command("thin").returncode == 2


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_copy_without_room_leaves_the_filesystem_to_others(tight: pathlib.Path, format: str) -> None:
    disk = tight / "disk"
    images.run("qemu-img", "create", "-q", "-f", format, disk, "170M")
    images.qemu_io(disk, "write -P 1 0 170M", format=format)
    others = images.sparse_file(tight / "others", 64 * MiB)
    least: list[int] = []

    def look(*_: int) -> None:
        least.append(os.statvfs(tight).f_bavail)

    with pytest.raises(exceptions.NoSpace):
        Preallocator().thin(disk, rewrite=True, format=format, progress=look)

    # No copy was begun.
    assert least == []
    images.run("fallocate", "-l", "64M", others)


def test_compressed_disk_is_not_copied_into_a_larger_one(folder: pathlib.Path) -> None:
    data = folder / "data"
    data.write_bytes(b"ab" * MiB)
    disk = images.qcow2_of(folder / "disk", data, "-c")
    before = images.allocated(disk)

    with pytest.raises(exceptions.UnsupportedFormat, match="compressed"):
        Preallocator().thin(disk, rewrite=True, format="qcow2")

    assert images.allocated(disk) == before
