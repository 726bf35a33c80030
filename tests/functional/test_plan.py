# SPDX-License-Identifier: Apache-2.0
"""What is planned is what is taken of a real filesystem, and others have what is kept for them, also from root."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import json
import os
import pathlib
import subprocess
import sys
import time

import images
import loop_filesystem
import pytest

from functional import kinds
from imgprealloc import Existing
from imgprealloc import Mode
from imgprealloc import OverlaySubclusters
from imgprealloc import Preallocator
from imgprealloc import worst_case

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30

# Of a filesystem's own: extent trees and inodes.
BOOKS = 256 * KiB

NOBODY = "65534"


# What is written.


@pytest.mark.parametrize("preallocation", ["falloc", "metadata"])
def test_mapped_disk_s_zeros_are_in_the_plan(folder: pathlib.Path, preallocation: str) -> None:
    disk = images.qcow2(folder / "disk", 16 * MiB, preallocation=preallocation)

    plan = Preallocator("full").plan(disk, format="qcow2")
    Preallocator("full").preallocate(disk, format="qcow2")

    assert (plan.treatment, images.unwritten(disk)) == ("fill", 0)
    assert 16 * MiB <= plan.written <= 17 * MiB


# How long a new file is.


@pytest.mark.parametrize(
    ("size", "cluster_size"),
    [
        (512, 16 * KiB),
        (GiB, 16 * KiB),
        (64 * MiB - 512, 64 * KiB),
        (40 * GiB + 512, 64 * KiB),
        (GiB, 128 * KiB),
        (40 * GiB, 128 * KiB),
        (512, 2 * MiB),
        (40 * GiB, 2 * MiB),
    ],
)
def test_overlay_is_as_long_as_was_reckoned(
    folder: pathlib.Path, base: pathlib.Path, size: int, cluster_size: int
) -> None:
    # The file is as long in each mode, in this one mostly a hole.
    strategy = Preallocator("metadata", overlay_cluster_size=cluster_size)
    strategy.create(folder / "disk", size, str(base), backing_format="raw")

    reckoned = worst_case.length(size, cluster_size, extended_l2=True)
    assert reckoned - 8 * cluster_size <= (folder / "disk").stat().st_size <= reckoned


@pytest.mark.parametrize("subclusters", ["unallocated", "allocated", "copied"])
def test_overlay_is_as_long_whatever_is_allocated_in_it(
    folder: pathlib.Path, base: pathlib.Path, subclusters: OverlaySubclusters
) -> None:
    Preallocator(overlay_subclusters=subclusters).create(folder / "disk", GiB, str(base), backing_format="raw")

    assert (folder / "disk").stat().st_size <= worst_case.length(GiB, 128 * KiB, extended_l2=True)


@pytest.mark.parametrize("size", [64 * MiB - 512, 40 * GiB])
def test_disk_of_its_own_is_as_long_as_was_reckoned(folder: pathlib.Path, size: int) -> None:
    Preallocator("metadata").create(folder / "disk", size)

    reckoned = worst_case.length(size, 64 * KiB, extended_l2=False)
    assert reckoned - 8 * 64 * KiB <= (folder / "disk").stat().st_size <= reckoned


# What is taken.


def _raw(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    disk = images.random_file(folder / "disk", 4 * MiB)
    os.truncate(disk, 64 * MiB)
    return disk


def _blank(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    return images.qcow2(folder / "disk", 64 * MiB, backing=base)


def _stock(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    # As stock Nova leaves it.
    disk = _blank(folder, base)
    images.run("fallocate", "-n", "-l", 64 * MiB, disk)
    return disk


def _data(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    disk = _blank(folder, base)
    images.qemu_io(disk, "write -P 0x5a 3M 10M")
    return disk


@kinds.common
@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
@pytest.mark.parametrize(
    ("make", "existing"),
    [
        (_raw, "reserve"),
        (_blank, "reserve"),
        (_blank, "recreate_blank"),
        (_stock, "recreate_blank"),
        (_data, "reserve"),
        (_data, "rewrite"),
    ],
)
def test_space_that_is_planned_is_what_is_taken(
    folder: pathlib.Path,
    base: pathlib.Path,
    make: Callable[[pathlib.Path, pathlib.Path], pathlib.Path],
    existing: Existing,
    mode: Mode,
) -> None:
    disk = make(folder, base)
    format = "raw" if make is _raw else "qcow2"
    images.run("sync", "-f", folder)
    plan = Preallocator(mode).plan(disk, existing, format=format)
    before, digest = _available(folder), images.digest(disk) if format == "qcow2" else images.file_digest(disk)

    after = Preallocator(mode).preallocate(disk, existing, format=format)

    # XFS gives back what was removed a little later.
    deadline = time.monotonic() + 10
    while (taken := before - _available(folder)) > plan.space + BOOKS and time.monotonic() < deadline:
        time.sleep(0.05)
    assert after.state == plan.state
    assert plan.error is None
    # The reckoning of a new file is a bound, by some clusters.
    assert plan.space - 9 * 128 * KiB - BOOKS <= taken <= plan.space + BOOKS
    assert (images.digest(disk) if format == "qcow2" else images.file_digest(disk)) == digest


def _available(folder: pathlib.Path) -> int:
    """Return what anybody but root may take."""
    images.run("sync", "-f", folder)
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


# What others keep.

RAWS = tuple(f"raw{number}" for number in range(22))
DISKS = (*RAWS[:11], "used1", "used0", *RAWS[11:], "blank")


@pytest.fixture
def crowded(kind: str) -> Iterator[pathlib.Path]:
    """Give a filesystem that keeps some blocks for root, with disks that ask for more than there is."""
    with loop_filesystem.mounted(kind, 900 * MiB, reserved=5) as mount_point:
        folder = pathlib.Path(mount_point)
        base = images.random_file(folder / "base", 8 * MiB)
        # Each smaller than what is kept for root, so that one more would take of that.
        formats = {str(images.sparse_file(folder / name, 36 * MiB)): "raw" for name in RAWS}
        for name, size in (("used0", 32), ("used1", 40)):
            disk = images.qcow2(folder / name, size * MiB, backing=base)
            images.qemu_io(disk, "write -P 0x5a 3M 1M")
            formats[str(disk)] = "qcow2"
        formats[str(images.qcow2(folder / "blank", 24 * MiB, backing=base))] = "qcow2"
        (folder / "disk.info").write_text(json.dumps(formats))
        images.run("sync", "-f", folder)
        yield folder


def _allocate(folder: pathlib.Path, *argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "imgprealloc.cli", "allocate", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=120)


def _write_as_nobody(folder: pathlib.Path, size: int) -> int:
    """Write so much as anybody but root, and return the status."""
    setpriv = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]
    # Into what is open already: the folders above are not for everybody.
    with open(folder / "theirs", "wb") as file:
        dd = ["dd", "if=/dev/zero", "bs=1M", f"count={size // MiB}", "conv=fsync"]
        return subprocess.run([*setpriv, *dd], stdout=file, stderr=subprocess.PIPE, check=False).returncode


@kinds.common
@pytest.mark.parametrize("rewrite", [[], ["--rewrite"]], ids=["", "rewrite"])
def test_root_leaves_others_what_is_to_be_kept_for_them(crowded: pathlib.Path, rewrite: list[str]) -> None:
    done = _allocate(crowded, "--keep-free", "100M", *rewrite, "-f", "json", *DISKS)

    assert done.returncode == 1, done.stderr
    rows = {row["path"]: row for row in json.loads(done.stdout)}
    left_out = {name for name, row in rows.items() if row["error"]}
    assert tuple(rows) == DISKS
    assert left_out
    # The largest one, and of those that are alike the last ones.
    assert left_out == {"used1", *RAWS[len(RAWS) + 1 - len(left_out) :]}
    assert all("left out" in rows[name]["error"] for name in left_out)
    assert all(row["state"] in ("reserved", "preallocated") for name, row in rows.items() if name not in left_out)
    assert all(rows[name]["state"] == "thin" for name in left_out)
    assert _available(crowded) >= 100 * MiB
    # Less what the filesystem takes for it.
    assert _write_as_nobody(crowded, 99 * MiB) == 0


def test_stock_fallocate_as_root_leaves_nobody_else_anything(crowded: pathlib.Path) -> None:
    # The control.
    for name in RAWS[:10]:
        images.run("fallocate", "-n", "-l", (crowded / name).stat().st_size, crowded / name)
    space = os.statvfs(crowded)
    # ext4 keeps a little for its own needs, too.
    spare = space.f_bfree * space.f_frsize - 20 * MiB
    images.run("fallocate", "-l", spare, crowded / "filler")

    assert _available(crowded) == 0
    assert _write_as_nobody(crowded, 4 * MiB) != 0


@kinds.common
def test_dry_run_foretells_what_is_done(crowded: pathlib.Path) -> None:
    asked = ("--keep-free", "10%", "-f", "json", *DISKS)
    free = _available(crowded)

    told = _allocate(crowded, "--dry-run", *asked)
    assert _available(crowded) == free
    done = _allocate(crowded, *asked)

    planned, found = ({row["path"]: row for row in json.loads(run.stdout)} for run in (told, done))
    assert (told.returncode, done.returncode) == (1, 1)
    assert {name: row["state_after"] for name, row in planned.items()} == {
        name: row["state"] for name, row in found.items()
    }
    assert {name for name, row in planned.items() if not row["fits"]} == {
        name for name, row in found.items() if row["error"]
    }


def test_people_are_told_in_the_end_what_was_done(crowded: pathlib.Path) -> None:
    done = _allocate(crowded, "--keep-free", "1%,50M", *DISKS)

    last = done.stdout.splitlines()[-1]
    assert "1 made anew, " in last
    assert "left out" in last
    assert last.endswith(" more held than before.")
