# SPDX-License-Identifier: Apache-2.0
"""The truth: on a filesystem filled to its last byte, a guest writes its whole disk, and nothing fails or grows.

Beside it the control: what stock Nova does fails there. If a control stops
failing, this project is no longer needed for that case, or the test is blind.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import images
import loop_filesystem
import pytest

from functional import kinds
from imgprealloc import Mode
from imgprealloc import OverlaySubclusters
from imgprealloc import Preallocator
from imgprealloc import qemu_img

KiB, MiB = 1 << 10, 1 << 20

BASE = 24 * MiB
SIZE = 40 * MiB
# That has to be available for writes smaller than a subcluster; 32 KiB were enough, too.
LEAST = 64 * KiB

pytestmark = kinds.common


def write_randomly(address: str, *, size: int, offset: int = 0, block_size: int = 4096, seed: int = 1) -> str:
    """Write every block once, in random order, as a guest; then read all back.

    :returns: nothing, or what fio says of the failure
    """
    done = subprocess.run(
        [
            "fio", "--name=guest", "--ioengine=nbd", f"--uri={address}", "--rw=randwrite", "--iodepth=4",
            f"--bs={block_size}", f"--offset={offset}", f"--size={size}", f"--randseed={seed}",
            "--end_fsync=1", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--output-format=json",
        ],
        capture_output=True, text=True, check=False, cwd="/tmp",
    )  # fmt: skip
    if done.returncode:
        return done.stdout + done.stderr
    # Lines of warnings may come before.
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    assert (job["write"]["total_ios"], job["read"]["total_ios"]) == (size // block_size, size // block_size)
    return ""


def size_and_blocks(path: pathlib.Path) -> tuple[int, int]:
    """Return what must not grow: the file's length, and the blocks that hold its data.

    Not st_blocks, which on ext4 counts the extent tree too. It grows when
    parts of an unwritten extent are written, out of a pool kept for that.
    """
    return path.stat().st_size, images.held(path)


def full(folder: pathlib.Path) -> None:
    """Fill a filesystem to its last byte, and make sure of it."""
    # The bulk without writing it, which would take most of the test's time.
    images.run("fallocate", "-l", images.free(folder) - 8 * MiB, folder / "filler")
    loop_filesystem.fill(str(folder))
    with pytest.raises(AssertionError, match="No space left"):
        images.run(
            "dd", "if=/dev/urandom", f"of={folder}/filler", "bs=4k", "count=1", "oflag=append", "conv=notrunc,fsync"
        )


@pytest.fixture
def base(tight: pathlib.Path) -> pathlib.Path:
    return images.random_file(tight / "base", BASE)


@pytest.fixture(params=["falloc", "full"])
def overlay(request: pytest.FixtureRequest, tight: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """Give a preallocated overlay that is longer than its base, on a filesystem that is full now."""
    Preallocator(request.param).create(tight / "disk", SIZE, str(base), backing_format="raw")
    full(tight)
    return tight / "disk"


def test_guest_writes_its_whole_overlay_in_pages(overlay: pathlib.Path) -> None:
    before = size_and_blocks(overlay)

    with images.guest(overlay) as address:
        failure = write_randomly(address, size=SIZE)

    assert (failure, size_and_blocks(overlay)) == ("", before)


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("subclusters", ["allocated", "copied"])
def test_guest_writes_its_overlay_beyond_the_base_in_sectors(
    tight: pathlib.Path, base: pathlib.Path, mode: Mode, subclusters: OverlaySubclusters
) -> None:
    strategy = Preallocator(mode, overlay_subclusters=subclusters)
    strategy.create(tight / "disk", SIZE, str(base), backing_format="raw")
    full(tight)
    before = size_and_blocks(tight / "disk")

    with images.guest(tight / "disk") as address:
        failure = write_randomly(address, offset=BASE, size=2 * MiB, block_size=512)

    assert (failure, size_and_blocks(tight / "disk")) == ("", before)


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_guest_needs_next_to_no_space_to_write_unallocated_subclusters_in_sectors(
    tight: pathlib.Path, base: pathlib.Path, mode: Mode
) -> None:
    # QEMU zeroes what a sector leaves of its subcluster, for which the
    # filesystem may want a block to split an extent.
    Preallocator(mode).create(tight / "disk", SIZE, str(base), backing_format="raw")
    loop_filesystem.fill(str(tight), leave=LEAST)
    before = size_and_blocks(tight / "disk")

    with images.guest(tight / "disk") as address:
        failure = write_randomly(address, offset=BASE, size=2 * MiB, block_size=512)

    assert (failure, size_and_blocks(tight / "disk")) == ("", before)


def test_guest_that_wrote_all_finds_the_base_where_it_did_not(tight: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator().create(tight / "disk", SIZE, str(base), backing_format="raw")
    full(tight)
    # Every eighth page, up and down the disk.
    count = BASE // 32768
    writes = [f"write -P {1 + step % 255} {step * 37 % count * 32768} 4096" for step in range(count)]

    images.qemu_io(tight / "disk", *writes)

    (tight / "filler").unlink()
    plain = images.qcow2(tight / "plain", SIZE, backing=base)
    images.qemu_io(plain, *writes)
    assert not images.differences(tight / "disk", plain)


def test_guest_writes_its_whole_overlay_after_it_grew(tight: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator().create(tight / "disk", 16 * MiB + 512, str(base), backing_format="raw")
    Preallocator().resize(tight / "disk", SIZE, format="qcow2")
    full(tight)
    before = size_and_blocks(tight / "disk")

    with images.guest(tight / "disk") as address:
        failure = write_randomly(address, size=SIZE)

    assert (failure, size_and_blocks(tight / "disk")) == ("", before)


def test_guest_writes_its_whole_overlay_after_a_sparse_copy_was_healed(tight: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator().create(tight / "original", SIZE, str(base), backing_format="raw")
    images.run("cp", "--reflink=never", "--sparse=always", tight / "original", tight / "disk")
    Preallocator().preallocate(tight / "disk", format="qcow2")
    full(tight)
    before = size_and_blocks(tight / "disk")

    with images.guest(tight / "disk") as address:
        failure = write_randomly(address, size=SIZE)

    assert (failure, size_and_blocks(tight / "disk")) == ("", before)


def test_guest_writes_its_whole_disk_after_it_was_rewritten(tight: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(tight / "disk", SIZE, backing=base)
    images.qemu_io(disk, "write -P 0x5a 3M 700k", "write -P 0x5a 30M 1M")
    Preallocator().preallocate(disk, existing="rewrite", format="qcow2")
    full(tight)
    before = size_and_blocks(disk)

    with images.guest(disk) as address:
        failure = write_randomly(address, size=SIZE)

    assert (failure, size_and_blocks(disk)) == ("", before)


def test_guest_writes_its_rewritten_disk_beyond_the_base_in_sectors(tight: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(tight / "disk", SIZE, backing=base)
    images.qemu_io(disk, "write -P 0x5a 3M 700k")
    Preallocator().preallocate(disk, existing="rewrite", format="qcow2")
    loop_filesystem.fill(str(tight), leave=LEAST)
    before = disk.stat().st_size

    with images.guest(disk) as address:
        failure = write_randomly(address, offset=BASE, size=2 * MiB, block_size=512)

    assert (failure, disk.stat().st_size) == ("", before)


@pytest.mark.parametrize("block_size", [4096, 512])
def test_guest_writes_its_disk_without_a_base(tight: pathlib.Path, block_size: int) -> None:
    Preallocator().create(tight / "disk", SIZE)
    full(tight)
    before = size_and_blocks(tight / "disk")

    with images.guest(tight / "disk") as address:
        failure = write_randomly(address, size=SIZE * block_size // 4096, block_size=block_size)

    assert (failure, size_and_blocks(tight / "disk")) == ("", before)


# Only reserved: the file grows, up to where its space was set aside.


def scattered(disk: pathlib.Path, size: int) -> None:
    """Write random data here and there, so that the file is as fragmented as can be."""
    images.qemu_io(
        disk, *(f"write -P {1 + step % 255} {step * 37 % 50 * (size // 50) // 512 * 512} 9216" for step in range(50))
    )


def test_guest_writes_its_whole_disk_that_was_only_reserved(tight: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(tight / "disk", SIZE, backing=base)
    scattered(disk, BASE)
    image = Preallocator().preallocate(disk, format="qcow2")
    full(tight)

    with images.guest(disk) as address:
        failure = write_randomly(address, size=SIZE, block_size=64 * KiB)

    assert (failure, disk.stat().st_size <= image.worst_case_size) == ("", True)


def test_guest_writes_its_whole_unused_disk_that_was_only_reserved_for_lack_of_room(tight: pathlib.Path) -> None:
    disk = images.qcow2(tight / "disk", SIZE)
    images.run("fallocate", "-n", "-l", SIZE, disk)
    images.run("fallocate", "-l", images.free(tight) - SIZE // 2, tight / "taken")
    image = Preallocator().preallocate(disk, format="qcow2")
    full(tight)

    with images.guest(disk) as address:
        failure = write_randomly(address, size=SIZE, block_size=64 * KiB)

    assert (image.state, failure, disk.stat().st_size <= image.worst_case_size) == ("reserved", "", True)


def test_guest_writes_its_disk_that_was_only_reserved_in_pages(
    tight: pathlib.Path, kind: str, base: pathlib.Path
) -> None:
    disk = images.qcow2(tight / "disk", SIZE, backing=base)
    scattered(disk, BASE)
    image = Preallocator().preallocate(disk, format="qcow2")
    # Less than a cluster over zeros makes QEMU ask for ZERO_RANGE, for which
    # XFS wants up to 2 MiB free, that it does not take; see the limits below.
    loop_filesystem.fill(str(tight), leave=2 * MiB if kind == "xfs" else 0)

    with images.guest(disk) as address:
        failure = write_randomly(address, size=SIZE)

    assert (failure, disk.stat().st_size <= image.worst_case_size) == ("", True)


def test_guest_writes_its_whole_disk_that_was_reserved_after_a_snapshot(tight: pathlib.Path) -> None:
    disk = images.qcow2(tight / "disk", SIZE)
    scattered(disk, SIZE)
    images.run("qemu-img", "snapshot", "-c", "kept", disk)
    image = Preallocator().preallocate(disk, format="qcow2")
    full(tight)

    with images.guest(disk) as address:
        failure = write_randomly(address, size=SIZE, block_size=64 * KiB)

    assert (failure, disk.stat().st_size <= image.worst_case_size) == ("", True)


def test_guest_writes_its_whole_disk_that_was_reserved_while_compressed(tight: pathlib.Path) -> None:
    source = tight / "source"
    source.write_bytes(b"compress me " * (SIZE // 12) + bytes(SIZE % 12))
    disk = images.qcow2_of(tight / "disk", source, "-c")
    image = Preallocator().preallocate(disk, format="qcow2")
    source.unlink()
    full(tight)

    with images.guest(disk) as address:
        failure = write_randomly(address, size=SIZE, block_size=64 * KiB)

    assert (failure, disk.stat().st_size <= image.worst_case_size) == ("", True)


# raw.


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_guest_writes_its_whole_raw_disk(tight: pathlib.Path, mode: Mode) -> None:
    Preallocator(mode).create(tight / "disk", SIZE, format="raw")
    full(tight)
    before = size_and_blocks(tight / "disk")

    with images.guest(tight / "disk", format="raw") as address:
        failure = write_randomly(address, size=SIZE)

    assert (failure, size_and_blocks(tight / "disk")) == ("", before)


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_guest_writes_its_whole_raw_disk_that_novas_cp_copied(
    tight: pathlib.Path, base: pathlib.Path, mode: Mode
) -> None:
    images.run("cp", "-r", base, tight / "disk")
    os.truncate(tight / "disk", SIZE)
    Preallocator(mode).preallocate(tight / "disk", format="raw")
    full(tight)
    before = size_and_blocks(tight / "disk")

    with images.guest(tight / "disk", format="raw") as address:
        failure = write_randomly(address, size=SIZE)

    assert (failure, size_and_blocks(tight / "disk")) == ("", before)


# The limits, which the documentation has to tell. All are of XFS: QEMU asks
# for fallocate(ZERO_RANGE) where less than a cluster, or a subcluster, is
# written over what reads as zeros, and a full XFS answers ENOSPC.


def test_limit_pages_over_zeros_of_a_disk_that_was_only_reserved(tight: pathlib.Path, kind: str) -> None:
    disk = images.qcow2(tight / "disk", SIZE)
    scattered(disk, BASE)
    Preallocator().preallocate(disk, format="qcow2")
    full(tight)

    with images.guest(disk) as address:
        failure = write_randomly(address, offset=BASE, size=SIZE - BASE)

    assert ("No space left on device" in failure) == (kind == "xfs")


def test_limit_sectors_over_zeros_of_a_qcow2_base(tight: pathlib.Path, kind: str) -> None:
    base = images.qcow2(tight / "base", BASE)
    Preallocator().create(tight / "disk", SIZE, str(base), backing_format="qcow2")
    full(tight)

    with images.guest(tight / "disk") as address:
        failure = write_randomly(address, size=2 * MiB, block_size=512)

    assert ("No space left on device" in failure) == (kind == "xfs")


def test_limit_sectors_beyond_the_base_of_an_overlay_that_was_mapped_before_it_got_its_space(
    tight: pathlib.Path, kind: str, base: pathlib.Path
) -> None:
    Preallocator("metadata").create(tight / "disk", SIZE, str(base), backing_format="raw")
    Preallocator("falloc").preallocate(tight / "disk", format="qcow2")
    full(tight)

    with images.guest(tight / "disk") as address:
        failure = write_randomly(address, offset=BASE, size=2 * MiB, block_size=512)

    assert ("No space left on device" in failure) == (kind == "xfs")


@pytest.mark.parametrize("block_size", [4 * KiB, 64 * KiB])
def test_limit_pages_and_more_that_begin_within_a_page_beyond_the_base(
    tight: pathlib.Path, kind: str, base: pathlib.Path, block_size: int
) -> None:
    Preallocator().create(tight / "disk", SIZE, str(base), backing_format="raw")
    full(tight)

    with images.guest(tight / "disk") as address:
        failure = write_randomly(address, offset=BASE + 512, size=2 * MiB, block_size=block_size)

    assert ("No space left on device" in failure) == (kind == "xfs"), failure


def test_limit_sectors_over_zeros_of_a_raw_base(tight: pathlib.Path, kind: str) -> None:
    base = images.sparse_file(tight / "base", BASE)
    Preallocator().create(tight / "disk", SIZE, str(base), backing_format="raw")
    full(tight)

    with images.guest(tight / "disk") as address:
        failure = write_randomly(address, size=2 * MiB, block_size=512)

    # Since then QEMU looks for the holes of a raw file as it does for those of a qcow2 file.
    sees_holes = qemu_img.version() >= (10, 1)
    assert ("No space left on device" in failure) == (kind == "xfs" and sees_holes), failure


def test_guest_writes_pages_over_zeros_of_a_qcow2_base(tight: pathlib.Path) -> None:
    base = images.qcow2(tight / "base", BASE)
    Preallocator().create(tight / "disk", SIZE, str(base), backing_format="qcow2")
    full(tight)

    with images.guest(tight / "disk") as address:
        failure = write_randomly(address, size=SIZE)

    assert failure == ""


# The controls.


def preallocated_by_stock_nova(disk: pathlib.Path) -> pathlib.Path:
    images.run("fallocate", "-n", "-l", SIZE, disk)
    return disk


def test_control_stock_novas_overlay_fails(tight: pathlib.Path, base: pathlib.Path) -> None:
    disk = preallocated_by_stock_nova(images.qcow2(tight / "disk", SIZE, backing=base))
    full(tight)

    with images.guest(disk) as address:
        failure = write_randomly(address, size=SIZE)

    assert "No space left on device" in failure


def test_control_overlay_that_is_only_mapped_fails(tight: pathlib.Path, base: pathlib.Path) -> None:
    Preallocator("metadata").create(tight / "disk", SIZE, str(base), backing_format="raw")
    full(tight)

    with images.guest(tight / "disk") as address:
        failure = write_randomly(address, size=SIZE)

    assert "No space left on device" in failure


def test_control_stock_novas_raw_copy_fails_where_extents_are_shared(
    tight: pathlib.Path, kind: str, base: pathlib.Path
) -> None:
    images.run("cp", "-r", base, tight / "disk")
    os.truncate(tight / "disk", SIZE)
    disk = preallocated_by_stock_nova(tight / "disk")
    full(tight)

    with images.guest(disk, format="raw") as address:
        failure = write_randomly(address, size=SIZE)

    assert ("No space left on device" in failure) == (kind == "xfs")
