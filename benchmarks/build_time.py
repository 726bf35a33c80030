# SPDX-License-Identifier: Apache-2.0
"""How long does Nova take to make an instance disk, stock and with imgprealloc?

One call of Nova's cache() for a new disk, in a process that has built one from
the same base image before: a 40 GiB overlay, and a 4 GiB raw copy. Both kinds
of Nova take turns on the same filesystem, so that what the machine does
meanwhile strikes both; what counts is the ratio within such a pair. Needs root,
and some 2 GiB under TMPDIR.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import sys
import time
from typing import Any

import ground
import nova_disks

_GIB = 1024**3
_BASE_SIZE = _GIB // 4
# fallocate takes room here and none on the host.
_FILESYSTEM_SIZE = 100 * _GIB
_BAR = 1.2


@dataclasses.dataclass(frozen=True)
class Build:
    """A disk to make, and the seconds that it took, pair by pair."""

    title: str
    image_type: str
    size: int
    stock: list[float] = dataclasses.field(default_factory=list)
    ours: list[float] = dataclasses.field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios, which is not the ratio of the medians."""
        return statistics.median(ours / stock for stock, ours in zip(self.stock, self.ours))

    def summary(self) -> dict[str, Any]:
        return {
            "disk": self.title,
            "stock_seconds": self.stock,
            "imgprealloc_seconds": self.ours,
            "stock_median": statistics.median(self.stock),
            "imgprealloc_median": statistics.median(self.ours),
            "ratio": self.ratio,
            "bar": _BAR,
        }


def measure(build: Build, pairs: int, stock: nova_disks.Disks, ours: nova_disks.Disks, base: str) -> None:
    """Make the disk in pairs of a stock and a preallocated one, each first in its turn."""
    for number in range(pairs + 1):
        sides = [(stock, build.stock), (ours, build.ours)]
        for disks, seconds in sides if number % 2 else reversed(sides):
            taken = _seconds(disks, build, base)
            # The first pair fills Nova's image cache and everybody else's.
            if number:
                seconds.append(taken)


def _seconds(disks: nova_disks.Disks, build: Build, base: str) -> float:
    image = disks.image(disks.instance(), image_type=build.image_type)
    ground.settle(disks.instances_path)
    started = time.perf_counter()
    disks.cache(image, base, build.size)
    taken = time.perf_counter() - started
    shutil.rmtree(os.path.dirname(image.path))
    return taken


def table(builds: list[Build]) -> str:
    lines = [f"{'':16}{'stock Nova':>12}{'imgprealloc':>13}{'ratio':>8}{'pairs from':>12}{'to':>7}"]
    for build in builds:
        ratios = [ours / stock for stock, ours in zip(build.stock, build.ours)]
        lines.append(
            f"{build.title:16}{statistics.median(build.stock):10.3f} s{statistics.median(build.ours):11.3f} s"
            f"{build.ratio:8.2f}{min(ratios):12.2f}{max(ratios):7.2f}"
        )
    lines += [f"{build.title}: bar: at most {_BAR} / measured {build.ratio:.2f}" for build in builds]
    return "\n".join(lines)


def main() -> int:
    parser = ground.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="beside one to warm up; default: %(default)s")
    args = parser.parse_args()
    builds = [Build("overlay, 40 GiB", "qcow2", 40 * _GIB), Build("raw, 4 GiB", "raw", 4 * _GIB)]
    with ground.mounted(args.filesystem, _FILESYSTEM_SIZE) as mount_point:
        instances_path = os.path.join(mount_point, "instances")
        os.mkdir(instances_path)
        base = ground.base_image(os.path.join(mount_point, "image.raw"), _BASE_SIZE)
        stock = nova_disks.Disks(instances_path, preallocated=False)
        ours = nova_disks.Disks(instances_path, preallocated=True)
        for build in builds:
            measure(build, args.pairs, stock, ours, base)
    facts = {**ground.versions(), "filesystem": args.filesystem, "base_bytes": _BASE_SIZE}
    ground.tell(facts, {"builds": [build.summary() for build in builds]}, table(builds), as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
