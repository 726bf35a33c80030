# SPDX-License-Identifier: Apache-2.0
"""How fast does a guest write and read, on stock Nova's disk, on imgprealloc's, and on those of others?

All disks are new in each run and take turns in it; what counts is the median of
the ratios within a turn. The filesystem is one of its own under TMPDIR, all of
it written before, so that only the disks are measured and not the file it lives
in. Needs root, fio, and room for all disks under TMPDIR.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import os
import sys

import ground
import pairs
import phases
import subjects
from subjects import Subject
import turns

MIB = 1024**2

# Takes what makes a disk by stock Nova's code.
Choice = Callable[[Callable[[str, int], str]], list[Subject]]

# Short turns, because a machine is slow for seconds at a time, and disks made
# anew often, because two that were made alike differ by where they came to lie.
FULL = turns.Course(1536 * MIB, turns=4, most=150)
FULL_RUNS = 4
SHORT = turns.Course(768 * MIB, turns=2, most=150)
SHORT_RUNS = 2


def measure(
    kind: str, choose: Choice, course: turns.Course, runs: int, wanted: Sequence[phases.Phase] = phases.PHASES
) -> list[turns.Series]:
    """Measure under all loads, on a filesystem that is made for it."""
    with ground.mounted(kind, _room(choose, course.size)) as mount_point:
        ground.write_out(mount_point)
        base = ground.base_image(os.path.join(mount_point, "image.raw"), course.size // 2)
        found = choose(_stock(mount_point))
        series: dict[tuple[str, str, str], turns.Series] = {}
        for number in range(runs):
            for load in phases.LOADS:
                print(f"{kind}, {load.title}, run {number + 1} of {runs}", file=sys.stderr, flush=True)
                for phase, place, rates in turns.run(found, load, course, wanted, base, mount_point):
                    key = (load.title, phase.title, place)
                    none: dict[str, list[float]] = {subject.title: [] for subject in found}
                    one = series.setdefault(key, turns.Series(kind, *key, none))
                    for title, more in rates.items():
                        one.rates[title] += more
        return list(series.values())


def _stock(mount_point: str) -> Callable[[str, int], str]:
    import nova_disks

    instances_path = os.path.join(mount_point, "instances")
    os.mkdir(instances_path)
    stock = nova_disks.Disks(instances_path, preallocated=False)
    return lambda base, size: str(stock.spawn(base, size).path)


def _room(choose: Choice, size: int) -> int:
    """Return the bytes that all disks, the base image and a disk that is being made need."""
    return (len(choose(lambda base, size: "")) + 2) * size * 9 // 8 + 512 * MIB


def table(series: Sequence[turns.Series], against: str = subjects.STOCK) -> str:
    """Return the ratios of all disks to one of them, with their quartiles."""
    lines = []
    for one in series:
        lines += ["", f"{one.filesystem}, {one.load}: {one.phase}, {one.place}"]
        for title, rates in one.rates.items():
            median = pairs.spread(rates).median
            lines.append(f"  {title:<38}{median:9.0f} a second   {pairs.ratio(rates, one.rates[against])} of {against}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    by_title = {phase.title: phase for phase in phases.PHASES}
    parser = ground.parser(__doc__, "fewer disks, and smaller ones: some minutes")
    ground.filesystems(parser)
    parser.add_argument("--runs", type=int, help=f"default: {FULL_RUNS}, in short {SHORT_RUNS}")
    parser.add_argument("--cluster-sizes", help="compare imgprealloc's overlays with these, as in 64K,128K,2M")
    parser.add_argument("--mode", action="append", choices=subjects.MODES, help="of these; default: falloc")
    parser.add_argument("--phase", action="append", choices=by_title, help="default: all")
    args = parser.parse_args(arguments)
    choose: Choice = subjects.few if args.short else subjects.every
    if args.cluster_sizes:
        sizes = [ground.size(each) for each in args.cluster_sizes.split(",")]
        choose = functools.partial(subjects.by_cluster_size, modes=args.mode or ["falloc"], sizes=sizes)
    course, runs = (SHORT, SHORT_RUNS) if args.short else (FULL, FULL_RUNS)
    wanted = [by_title[title] for title in args.phase] if args.phase else phases.PHASES
    series = []
    for kind in args.filesystem or ground.FILESYSTEMS:
        series += measure(kind, choose, course, args.runs or runs, wanted)
    print(table(series))
    if args.json:
        ground.save(args.json, guest_io=[dataclasses.asdict(one) for one in series])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
