# SPDX-License-Identifier: Apache-2.0
"""What do Nova's snapshots and block migrations cost, of stock Nova's disks and of imgprealloc's?

Time, bytes written to the filesystem, and programs that Nova starts for it. A
guest has written a little to each disk before. Both kinds of disk take turns;
what counts is the median of the ratios of such pairs. Builds, starts and growth
are build_time.py's. Needs root, and room under TMPDIR.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import ground
import pairs
import served
import storage_daemon
import subjects

MIB = 1024**2

# What a guest has written, in pieces of 64 KiB all over its disk.
_WRITTEN = 16 * MIB
_PIECE = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an operation took.

    :param written: bytes that reached the filesystem's device
    :param programs: those that Nova and imgprealloc started
    """

    seconds: float
    written: int
    programs: int


@dataclasses.dataclass
class Pairs:
    """What an operation took on stock Nova's disk and on another, in the order of the turns.

    :param barred: whether it has a bar: stock Nova does the same, and not less
    """

    filesystem: str
    operation: str
    disk: str
    stock: list[Cost] = dataclasses.field(default_factory=list)
    ours: list[Cost] = dataclasses.field(default_factory=list)
    barred: bool = True


@dataclasses.dataclass(frozen=True)
class Course:
    """How much is measured.

    :param size: of each disk, in bytes, of which its base has an eighth
    :param count: pairs of each, beside one to warm up
    :param disks: mode and subclusters of those held against stock Nova's
    """

    size: int
    count: int
    disks: Sequence[tuple[str, str]]


_DISKS = [("falloc", "unallocated"), ("falloc", "allocated"), ("falloc", "copied")]
FULL = Course(2048 * MIB, 7, [*_DISKS, ("metadata", "unallocated"), ("full", "unallocated")])
SHORT = Course(1024 * MIB, 3, _DISKS)

# Makes a disk by Nova's code, stock or with imgprealloc, as at each host of the cloud.
Spawn = Callable[[], Any]

# Takes a disk, what makes another, and an empty folder; gives what is to be measured.
Operation = Callable[[Any, Spawn, str], contextlib.AbstractContextManager[Callable[[], None]]]


@contextlib.contextmanager
def _live_snapshot(image: Any, spawn: Spawn, scratch: str) -> Iterator[Callable[[], None]]:
    """Do what Nova's _live_snapshot() does, QEMU's part by qemu-storage-daemon."""
    from nova.virt.libvirt import utils as libvirt_utils

    def work() -> None:
        delta = os.path.join(scratch, "snapshot.delta")
        size = libvirt_utils.get_disk_size(image.path, format="qcow2")
        base = libvirt_utils.get_disk_backing_file(image.path, format="qcow2", basename=False)
        libvirt_utils.create_image(delta, "qcow2", size, backing_file=base)
        qemu.open("delta", delta, backing=None)
        qemu.mirror("disk", "delta", "top")
        # Its lock would keep qemu-img out.
        qemu.run("blockdev-del", node_name="delta")
        libvirt_utils.extract_snapshot(delta, "qcow2", os.path.join(scratch, "snapshot"), "qcow2")

    with storage_daemon.running() as qemu:
        qemu.open("disk", image.path)
        yield work


@contextlib.contextmanager
def _cold_snapshot(image: Any, spawn: Spawn, scratch: str) -> Iterator[Callable[[], None]]:
    """Do what Nova's snapshot() does while the instance is shut off."""
    yield lambda: image.snapshot_extract(os.path.join(scratch, "snapshot"), "qcow2")


@contextlib.contextmanager
def _block_migration(image: Any, spawn: Spawn, scratch: str) -> Iterator[Callable[[], None]]:
    """Let the destination make its disk, and QEMU copy into it what is in this one."""
    made = []

    def work() -> None:
        made.append(spawn().path)
        with served.over_socket(made[0], scratch, "qcow2", "native") as address:
            qemu.run("blockdev-add", driver="nbd", node_name="target", server={"type": "unix", "path": address})
            qemu.mirror("disk", "target", "top")

    with storage_daemon.running() as qemu:
        qemu.open("disk", image.path)
        yield work
    shutil.rmtree(os.path.dirname(made[0]))


OPERATIONS: dict[str, Operation] = {
    "live snapshot": _live_snapshot,
    "cold snapshot": _cold_snapshot,
    "block migration": _block_migration,
}


class _Programs:
    """Counts the programs that this process starts."""

    def __init__(self) -> None:
        self.count = 0
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        # What stands for the destination's QEMU is not started for us.
        if event == "subprocess.Popen" and os.path.basename(os.fsdecode(arguments[0])) != "qemu-nbd":
            self.count += 1


def measure(kind: str, course: Course) -> list[Pairs]:
    """Measure all operations, on a filesystem that is made for it."""
    # An audit hook is for the rest of the process.
    programs = _Programs()
    with ground.mounted(kind, 8 * course.size) as mount_point:
        ground.write_out(mount_point)
        spawners = _spawners(mount_point, course)
        stock = spawners.pop(subjects.STOCK)
        found = []
        for operation, begin in OPERATIONS.items():
            for title, spawn in spawners.items():
                both = Pairs(kind, operation, title)
                for number in range(course.count + 1):
                    sides = [(stock, both.stock), (spawn, both.ours)]
                    for side, costs in sides if number % 2 else reversed(sides):
                        cost = _cost(begin, side, course, mount_point, programs)
                        if number:
                            costs.append(cost)
                found.append(both)
        return found


def _spawners(mount_point: str, course: Course) -> dict[str, Spawn]:
    """Return, for each disk, what makes it by Nova's code."""
    import nova_disks

    instances_path = os.path.join(mount_point, "instances")
    os.mkdir(instances_path)
    base = ground.base_image(os.path.join(mount_point, "image.raw"), course.size // 8)
    stock = nova_disks.Disks(instances_path, preallocated=False)
    ours = nova_disks.Disks(instances_path, preallocated=True)

    def spawner(disks: nova_disks.Disks, **specs: str) -> Spawn:
        return lambda: disks.spawn(base, course.size, **specs)

    found = {subjects.STOCK: spawner(stock)}
    for mode, subclusters in course.disks:
        specs = {"imgprealloc:mode": mode, "imgprealloc:overlay_subclusters": subclusters}
        found[subjects.ours(mode, subclusters)] = spawner(ours, **specs)
    return found


def _cost(begin: Operation, spawn: Spawn, course: Course, mount_point: str, programs: _Programs) -> Cost:
    """Make a disk, let a guest write to it, and measure what is done with it then."""
    image = spawn()
    _write(image.path, course.size)
    with tempfile.TemporaryDirectory(dir=mount_point) as scratch, begin(image, spawn, scratch) as work:
        ground.settle(mount_point)
        written, started, count = ground.written(mount_point), time.perf_counter(), programs.count
        work()
        seconds, count = time.perf_counter() - started, programs.count - count
        ground.settle(mount_point)
        cost = Cost(seconds, ground.written(mount_point) - written, count)
    shutil.rmtree(os.path.dirname(image.path))
    return cost


def _write(path: str, size: int) -> None:
    """Write the same on each disk, as a guest that has booted and worked a little."""
    places = random.Random(0).sample(range(size // _PIECE), _WRITTEN // _PIECE)
    commands = "".join(f"write -q -P {1 + place % 255} {place * _PIECE} {_PIECE}\n" for place in places)
    subprocess.run(["qemu-io", "-f", "qcow2", "-t", "none", path], input=commands + "flush\n", text=True, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def seconds(both: Pairs) -> pairs.Spread:
    """Return the ratios of the times of an operation to those on stock Nova's disk."""
    return pairs.ratio([cost.seconds for cost in both.ours], [cost.seconds for cost in both.stock])


def table(found: Sequence[Pairs]) -> str:
    lines = [f"{'':60}{'stock Nova':>24}{'imgprealloc':>26}   ratio of the times"]
    for both in found:
        name = f"{both.filesystem}, {both.operation}: {both.disk}"
        lines.append(f"{name:60}{told(both.stock):>24}{told(both.ours):>26}   {seconds(both)}")
    return "\n".join(lines)


def told(costs: Sequence[Cost]) -> str:
    """Return the medians of what something took."""
    taken = pairs.spread([cost.seconds for cost in costs]).median
    written = pairs.spread([cost.written for cost in costs]).median
    programs = pairs.spread([cost.programs for cost in costs]).median
    return f"{taken:.2f} s, {written / MIB:.0f} MiB, {programs:.0f}"


def main(arguments: Sequence[str]) -> int:
    return ground.run_part(
        arguments, __doc__, "fewer disks, and smaller ones",
        lambda kind, short: measure(kind, SHORT if short else FULL), table, "operations",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
