# SPDX-License-Identifier: Apache-2.0
"""How long does Nova take over an instance disk, stock and with imgprealloc: builds, starts, growth, heals?

Each time it is what Nova's driver asks of a disk, and no more: at a build
cache() and then libvirt_info(), at a start libvirt_info() of one object and then
cache() of another. An overlay of 40 GiB and a raw copy of 4 GiB. Both kinds of
Nova take turns on the same filesystem, so that what the machine does meanwhile
strikes both; what counts is the ratio within such a pair. Needs root, and some
2 GiB under TMPDIR.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import time
import types
from typing import Any

import ground
import nova_disks

_GIB = 1024**3
_BASE_SIZE = _GIB // 4
# fallocate takes room here and none on the host.
_FILESYSTEM_SIZE = 200 * _GIB

# Of stock Nova's time; a first build or start of a process asks for what the
# process then knows, and a heal does what stock Nova leaves undone.
_BARS = {"build": 1.05, "start": 1.0}


@dataclasses.dataclass(frozen=True)
class Disk:
    """A kind of disk, of which there is one on either side."""

    title: str
    image_type: str
    size: int


@dataclasses.dataclass(frozen=True)
class Side:
    """One kind of Nova, and a disk of a guest that it has made before."""

    disks: nova_disks.Disks
    base: str
    disk: Disk

    def new(self) -> Any:
        return self.disks.image(self.disks.instance(), image_type=self.disk.image_type)

    def again(self, image: Any) -> Any:
        """Return another object of Nova's for a disk that is there."""
        uuid = os.path.basename(os.path.dirname(image.path))
        flavor = types.SimpleNamespace(extra_specs={})
        instance = types.SimpleNamespace(uuid=uuid, flavor=flavor, name="instance-1")
        return self.disks.image(instance, image_type=self.disk.image_type)

    def build(self, image: Any) -> None:
        self.disks.cache(image, self.base, self.disk.size)
        _describe(image)

    def start(self, image: Any, size: int | None = None) -> None:
        _describe(self.again(image))
        self.disks.cache(self.again(image), self.base, size or self.disk.size)


@dataclasses.dataclass(frozen=True)
class Deed:
    """What is measured: a name, what goes before, which is not measured, and what is."""

    name: str
    prepare: Callable[[Side], Any]
    do: Callable[[Side, Any], None]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A deed, and the seconds that it took, pair by pair."""

    disk: Disk
    deed: Deed
    stock: list[float] = dataclasses.field(default_factory=list)
    ours: list[float] = dataclasses.field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [ours / stock for stock, ours in zip(self.stock, self.ours)]

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios, which is not the ratio of the medians."""
        return statistics.median(self.ratios)

    def summary(self) -> dict[str, Any]:
        return {
            "disk": self.disk.title,
            "deed": self.deed.name,
            "stock_seconds": self.stock,
            "imgprealloc_seconds": self.ours,
            "stock_median": statistics.median(self.stock),
            "imgprealloc_median": statistics.median(self.ours),
            "ratio": self.ratio,
            "ratio_least": min(self.ratios),
            "ratio_greatest": max(self.ratios),
            "bar": _BARS.get(self.deed.name),
        }


def _describe(image: Any) -> None:
    image.libvirt_info("none", {})


def _built(side: Side) -> Any:
    image = side.new()
    side.build(image)
    return image


def _built_and_lost(side: Side) -> Any:
    """Make a disk, and give its space back, as a sparse copy does."""
    image = _built(side)
    subprocess.run(["fallocate", "--dig-holes", image.path], check=True)
    return image


def _forget() -> None:
    """Know nothing of disks and programs, as a new process does."""
    from imgprealloc import looks
    from imgprealloc import qemu_img
    import imgprealloc.nova

    imgprealloc.nova._base_sizes.clear()
    looks.forget()
    qemu_img.forget()


def _first_build(side: Side, image: Any) -> None:
    _forget()
    side.build(image)


def _first_start(side: Side, image: Any) -> None:
    _forget()
    side.start(image)


DEEDS = (
    Deed("first build", Side.new, _first_build),
    Deed("build", Side.new, Side.build),
    Deed("first start", _built, _first_start),
    Deed("start", _built, Side.start),
    Deed("growth", _built, lambda side, image: side.start(image, 2 * side.disk.size)),
    Deed("heal", _built_and_lost, Side.start),
)


def measure(measured: Measured, pairs: int, stock: Side, ours: Side) -> None:
    """Do the deed in pairs of stock and preallocating Nova, each first in its turn."""
    for number in range(pairs + 1):
        sides = [(stock, measured.stock), (ours, measured.ours)]
        for side, seconds in sides if number % 2 else reversed(sides):
            taken = _seconds(side, measured.deed)
            # The first pair fills Nova's image cache and everybody else's.
            if number:
                seconds.append(taken)


def _seconds(side: Side, deed: Deed) -> float:
    image = deed.prepare(side)
    ground.settle(side.disks.instances_path)
    started = time.perf_counter()
    deed.do(side, image)
    taken = time.perf_counter() - started
    shutil.rmtree(os.path.dirname(image.path))
    return taken


def table(found: list[Measured]) -> str:
    lines = [f"{'':30}{'stock Nova':>12}{'imgprealloc':>13}{'ratio':>8}{'pairs from':>12}{'to':>7}{'bar':>7}"]
    for one in found:
        bar = _BARS.get(one.deed.name)
        lines.append(
            f"{one.disk.title + ': ' + one.deed.name:30}{statistics.median(one.stock):10.3f} s"
            f"{statistics.median(one.ours):11.3f} s{one.ratio:8.2f}{min(one.ratios):12.2f}{max(one.ratios):7.2f}"
            f"{'' if bar is None else format(bar, '.2f'):>7}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = ground.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="beside one to warm up; default: %(default)s")
    parser.add_argument("--deeds", nargs="+", choices=[deed.name for deed in DEEDS], help="default: all")
    args = parser.parse_args()
    kinds = [Disk("overlay, 40 GiB", "qcow2", 40 * _GIB), Disk("raw, 4 GiB", "raw", 4 * _GIB)]
    deeds = [deed for deed in DEEDS if deed.name in (args.deeds or [deed.name])]
    found = [Measured(disk, deed) for disk in kinds for deed in deeds]
    with ground.mounted(args.filesystem, _FILESYSTEM_SIZE) as mount_point:
        instances_path = os.path.join(mount_point, "instances")
        os.mkdir(instances_path)
        base = ground.base_image(os.path.join(mount_point, "image.raw"), _BASE_SIZE)
        stock = nova_disks.Disks(instances_path, preallocated=False)
        ours = nova_disks.Disks(instances_path, preallocated=True)
        for one in found:
            measure(one, args.pairs, Side(stock, base, one.disk), Side(ours, base, one.disk))
    facts = {**ground.versions(), "filesystem": args.filesystem, "base_bytes": _BASE_SIZE}
    ground.tell(facts, {"measured": [one.summary() for one in found]}, table(found), as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
