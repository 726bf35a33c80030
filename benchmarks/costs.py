# SPDX-License-Identifier: Apache-2.0
"""How does the cost grow, with a disk's size, with the number of disks, and with the number of a disk's extents?

The filesystem is sparse, so that 4 TiB find room on it. Needs root, and some GiB
under TMPDIR for the cluster maps.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import os
import shutil
import subprocess
import sys
import time

import ground

from imgprealloc import Mode
from imgprealloc import Preallocator

GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Growth:
    """Seconds that something takes, by what there is of it.

    :param unit: what is counted
    :param points: the count, and the seconds
    """

    filesystem: str
    title: str
    unit: str
    points: list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Course:
    """How far it goes.

    :param sizes: of disks, in GiB
    """

    sizes: Sequence[int]
    disks: Sequence[int]
    extents: Sequence[int]


FULL = Course((10, 40, 160, 640, 1024, 4096), (1, 10, 100, 1000), (1, 100, 10_000, 100_000, 1_000_000))
SHORT = Course((10, 40, 160), (1, 10, 50), (1, 1000, 100_000))


def measure(kind: str, course: Course) -> list[Growth]:
    """Measure all of it, on a filesystem that is made for it."""
    # Room for the largest disk, its map, and what the others need.
    with ground.mounted(kind, (max(course.sizes) * 5 // 4 + 16) * GIB) as mount_point:
        return [
            *_sizes(kind, course.sizes, mount_point),
            _disks(kind, course.disks, mount_point),
            _extents(kind, course.extents, mount_point),
        ]


def _sizes(kind: str, sizes: Sequence[int], mount_point: str) -> list[Growth]:
    base = ground.base_image(os.path.join(mount_point, "base"), GIB // 16)
    path = os.path.join(mount_point, "disk")
    found = []
    modes: tuple[Mode, ...] = ("metadata", "falloc")
    for mode in modes:
        strategy = Preallocator(mode)
        made, seen = [], []
        for size in sizes:

            def make(size: int = size, strategy: Preallocator = strategy) -> None:
                strategy.create(path, size * GIB, base, backing_format="raw")

            made.append((float(size), _seconds(make, mount_point)))
            seen.append((float(size), _seconds(lambda: Preallocator().inspect(path, format="qcow2"), mount_point)))
            os.unlink(path)
        found.append(Growth(kind, f"making a disk, {mode}", "GiB", made))
        found.append(Growth(kind, f"looking at a disk, {mode}", "GiB", seen))
    return found


def _disks(kind: str, counts: Sequence[int], mount_point: str) -> Growth:
    folder = os.path.join(mount_point, "disks")
    os.mkdir(folder)
    paths = [os.path.join(folder, f"disk{number}") for number in range(max(counts))]
    Preallocator().create(paths[0], GIB // 64, format="qcow2")
    for path in paths[1:]:
        # Not by name, or all would be one file.
        shutil.copyfile(paths[0], path)
    show = [sys.executable, "-W", "ignore", "-m", "imgprealloc.cli", "show", "-f", "json", "--disk-format", "qcow2"]

    def look(count: int) -> Callable[[], object]:
        return lambda: subprocess.run([*show, *paths[:count]], check=True, stdout=subprocess.DEVNULL)

    points = [(float(count), _seconds(look(count), mount_point)) for count in counts]
    shutil.rmtree(folder)
    return Growth(kind, "imgprealloc show", "disks", points)


def _extents(kind: str, counts: Sequence[int], mount_point: str) -> Growth:
    path = os.path.join(mount_point, "extents")
    points = []
    for count in counts:
        with open(path, "wb") as file:
            file.truncate(8192 * count)
            for number in range(count):
                # Every other block, so that each is an extent of its own.
                os.posix_fallocate(file.fileno(), 8192 * number, 4096)
        points.append((float(count), _seconds(lambda: Preallocator().inspect(path, format="raw"), mount_point)))
        os.unlink(path)
    return Growth(kind, "looking at a raw disk", "extents", points)


def _seconds(work: Callable[[], object], mount_point: str) -> float:
    ground.settle(mount_point)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def table(found: Sequence[Growth]) -> str:
    lines = []
    for growth in found:
        lines.append(f"{growth.filesystem}, {growth.title}")
        lines += [f"  {count:>12,.0f} {growth.unit:<10}{seconds:10.3f} s" for count, seconds in growth.points]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    return ground.run_part(
        arguments, __doc__, "up to 160 GiB, 50 disks and 100,000 extents",
        lambda kind, short: measure(kind, SHORT if short else FULL), table, "costs",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
