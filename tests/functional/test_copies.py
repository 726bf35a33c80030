# SPDX-License-Identifier: Apache-2.0
"""What Nova copies of a disk, by QEMU itself: live and cold snapshots, block migrations, mirrors; ours beside stock's.

What of an overlay counts as allocated decides it; see test_subclusters.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import os
import pathlib
import subprocess

import images
import pytest
import storage_daemon

from functional.modes import SPACE_MODES
from imgprealloc import Mode
from imgprealloc import OverlaySubclusters
from imgprealloc import Preallocator

KiB, MiB = 1 << 10, 1 << 20

BASE = 24 * MiB
SIZE = 256 * MiB
# What a guest does: small writes here and there, and a file or two.
SMALL = [f"write -P {1 + step % 255} {step * 5 * MiB + step * 4096} 4096" for step in range(48)]
WRITES = [*SMALL, "write -P 0x5a 100M 4M", "write -z 120M 2M", "write -P 0x5b 2M 1M"]
# Each of them may count for one cluster more than stock's: its own are of 64 KiB, ours of 128.
ALLOWANCE = (len(SMALL) + 3) * 128 * KiB


@dataclasses.dataclass(frozen=True)
class Pair:
    """A disk of ours and one of stock Nova's, with the same in them."""

    ours: pathlib.Path
    stock: pathlib.Path
    base: pathlib.Path

    def both(self, copy: Callable[[pathlib.Path], int]) -> tuple[int, int]:
        """Have something counted of both."""
        return copy(self.ours), copy(self.stock)


def as_made(pair: Pair, strategy: Preallocator) -> None:
    strategy.preallocate(pair.ours, format="qcow2")
    _write(pair)


def as_started(pair: Pair, strategy: Preallocator) -> None:
    """As made, then what a start does to it once a sparse copy has made holes."""
    as_made(pair, strategy)
    sparse = pair.ours.with_name("sparse")
    images.run("cp", "--reflink=never", "--sparse=always", pair.ours, sparse)
    os.replace(sparse, pair.ours)
    strategy.preallocate(pair.ours, "reserve", format="qcow2")


def as_rewritten(pair: Pair, strategy: Preallocator) -> None:
    _write(pair)
    strategy.preallocate(pair.ours, "rewrite", format="qcow2")


def as_grown(pair: Pair, strategy: Preallocator) -> None:
    as_made(pair, strategy)
    strategy.resize(pair.ours, 2 * SIZE, format="qcow2")
    images.run("qemu-img", "resize", "-q", "-f", "qcow2", pair.stock, 2 * SIZE)


def as_reserved(pair: Pair, strategy: Preallocator) -> None:
    _write(pair)
    strategy.preallocate(pair.ours, "reserve", format="qcow2")


def _write(pair: Pair) -> None:
    for disk in (pair.ours, pair.stock):
        images.qemu_io(disk, *WRITES)


# And the mode; that has little say in it.
HISTORIES = (
    (as_made, "falloc"), (as_made, "full"), (as_started, "falloc"), (as_rewritten, "falloc"), (as_grown, "falloc"),
    (as_grown, "full"), (as_reserved, "falloc"),
)  # fmt: skip


@pytest.fixture
def make(folder: pathlib.Path) -> Callable[..., Pair]:
    """Give a function that makes both disks, ours in a mode and with a history."""

    def make(
        history: Callable[[Pair, Preallocator], None],
        mode: Mode = "falloc",
        subclusters: OverlaySubclusters = "unallocated",
    ) -> Pair:
        base = images.random_file(folder / "base", BASE)
        ours, stock = (images.qcow2(folder / name, SIZE, backing=base) for name in ("ours", "stock"))
        images.run("fallocate", "-n", "-l", SIZE, stock)
        pair = Pair(ours, stock, base)
        history(pair, Preallocator(mode, overlay_subclusters=subclusters))
        return pair

    return make


each_history = pytest.mark.parametrize(
    ("history", "mode"), HISTORIES, ids=[f"{history.__name__}-{mode}" for history, mode in HISTORIES]
)


def live_snapshot(disk: pathlib.Path) -> tuple[int, pathlib.Path]:
    """Copy as Nova's live snapshot does: a mirror of what the disk itself has, into a delta over its base."""
    found = images.info(disk)
    delta = images.qcow2(disk.with_name(f"{disk.name}.delta"), found["virtual-size"], backing=found["backing-filename"])
    with storage_daemon.running() as daemon:
        return daemon.mirror_shallow(str(disk), str(delta)), delta


@each_history
def test_live_snapshot_copies_as_little_as_of_stocks_disk(
    make: Callable[..., Pair], history: Callable[[Pair, Preallocator], None], mode: Mode
) -> None:
    pair = make(history, mode)

    (ours, our_delta), (stock, stock_delta) = live_snapshot(pair.ours), live_snapshot(pair.stock)

    assert ours <= stock + ALLOWANCE
    assert images.allocated(our_delta) <= images.allocated(stock_delta) + ALLOWANCE
    assert not images.differences(our_delta, stock_delta)


@pytest.mark.parametrize(("subclusters", "least"), [("allocated", SIZE - BASE - MiB), ("copied", SIZE)])
def test_live_snapshot_of_allocated_subclusters_copies_them_all(
    make: Callable[..., Pair], subclusters: OverlaySubclusters, least: int
) -> None:
    # The price that an operator may choose.
    copied, delta = live_snapshot(make(as_made, "falloc", subclusters).ours)

    assert copied >= least
    assert images.allocated(delta) >= least - 2 * MiB


@each_history
def test_cold_snapshot_reads_as_little_as_of_stocks_disk(
    make: Callable[..., Pair], history: Callable[[Pair, Preallocator], None], mode: Mode
) -> None:
    pair = make(history, mode)

    def cold_snapshot(disk: pathlib.Path) -> int:
        return _read_by(["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", disk, disk.with_name("snapshot")])

    ours, stock = pair.both(cold_snapshot)

    assert ours <= stock + ALLOWANCE


def _read_by(command: list[images.StrPath]) -> int:
    """Run a program, and return the bytes that it has read."""
    process = subprocess.Popen(command)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    counted = pathlib.Path(f"/proc/{process.pid}/io").read_text()
    assert process.wait() == 0
    return int(counted.split()[1])


@each_history
def test_block_migration_sends_as_little_as_of_stocks_disk(
    make: Callable[..., Pair], history: Callable[[Pair, Preallocator], None], mode: Mode
) -> None:
    pair = make(history, mode)

    def migrate(disk: pathlib.Path) -> int:
        target = images.qcow2(disk.with_name(f"{disk.name}.target"), images.info(disk)["virtual-size"],
                              backing=pair.base)  # fmt: skip
        if disk == pair.ours:
            Preallocator(mode).preallocate(target, format="qcow2")
        with storage_daemon.running() as source, storage_daemon.running() as destination:
            address = str(disk.with_name("nbd"))
            destination.open("target", str(target))
            destination.serve("target", address)
            source.open("disk", str(disk))
            source.run(
                "blockdev-add", driver="nbd", node_name="remote", export="disk",
                server={"type": "unix", "path": address},
            )  # fmt: skip
            sent = source.mirror("disk", "remote", "top")
        os.unlink(address)
        assert not images.differences(target, disk)
        return sent

    ours, stock = pair.both(migrate)

    assert ours <= stock + ALLOWANCE


@pytest.mark.parametrize("mode", SPACE_MODES)
def test_mirror_of_the_whole_disk_takes_as_little_as_of_stocks(make: Callable[..., Pair], mode: Mode) -> None:
    pair = make(as_made, mode)

    def mirror(disk: pathlib.Path) -> int:
        copy = images.qcow2(disk.with_name(f"{disk.name}.copy"), SIZE)
        with storage_daemon.running() as daemon:
            daemon.open("disk", str(disk))
            daemon.open("copy", str(copy))
            daemon.mirror("disk", "copy", "full")
        assert not images.differences(copy, disk)
        return images.allocated(copy)

    ours, stock = pair.both(mirror)

    assert ours <= stock + ALLOWANCE
