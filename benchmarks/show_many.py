# SPDX-License-Identifier: Apache-2.0
"""How long does imgprealloc show take for all disks of a host, and how much memory?

A mix of disks, each in its instance's folder with Nova's disk.info beside it: of
ten, five are thin overlays that their guests have written to, three are preallocated
overlays, and two are raw. The command looks at all of them at once, as an operator
or a timer has it do; the median of the runs counts. The memory is the most that the
command had, or any program that it started. Needs root and 2 GiB under
TMPDIR; takes a minute.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

import ground

from imgprealloc import Preallocator

_MIB = 1024**2
_BASE_SIZE = 16 * _MIB
_DISK_SIZE = 1024 * _MIB
# So small, because space is really set aside for them.
_PREALLOCATED_SIZE = 24 * _MIB
_WRITTEN = 256 * 1024
_FILESYSTEM_SIZE = 2048 * _MIB
# More are links to these; each look at one is a look of its own.
_MOST_FILES = 100
_BAR_MILLISECONDS = 20.0
_BAR_MIB = 100.0

# A process of its own asks, because a new program's count begins with the memory of the one that started it.
_WITH_MEMORY = """\
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_maxrss, usage.ru_utime + usage.ru_stime)
sys.exit(status)
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run of the command took."""

    seconds: float
    cpu_seconds: float
    mib: float


def disks(instances_path: str, base: str, count: int) -> list[str]:
    """Make the disks of a host, each in a folder of its own."""
    made: list[str] = []
    for number in range(count):
        folder = os.path.join(instances_path, f"{number:08x}-0000-4000-8000-000000000000")
        os.mkdir(folder)
        path = os.path.join(folder, "disk")
        format = "raw" if number % 10 >= 8 else "qcow2"
        with open(os.path.join(folder, "disk.info"), "w") as file:
            json.dump({path: format}, file)
        if number >= _MOST_FILES:
            os.link(made[number % _MOST_FILES], path)
        elif format == "raw":
            with open(path, "wb") as file:
                file.truncate(_DISK_SIZE)
        elif number % 10 >= 5:
            Preallocator("falloc").create(path, _PREALLOCATED_SIZE, base, format="qcow2", backing_format="raw")
        else:
            _output("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path, str(_DISK_SIZE))
            _output("qemu-io", "-f", "qcow2", "-c", f"write -q {number}M {_WRITTEN}", path)
        made.append(path)
    return made


def show(paths: list[str]) -> Run:
    """Run the command once on all of them."""
    command = [sys.executable, "-W", "ignore", "-m", "imgprealloc.cli", "show", "-f", "json", *paths]
    started = time.monotonic()
    memory, cpu_seconds = _output(sys.executable, "-c", _WITH_MEMORY, *command).split()
    return Run(time.monotonic() - started, float(cpu_seconds), int(memory) / 1024)


def results(runs: list[Run], count: int) -> dict[str, float]:
    """Return what counts of the runs, for one disk."""
    seconds = statistics.median(run.seconds for run in runs)
    cpu_seconds = statistics.median(run.cpu_seconds for run in runs)
    return {
        "milliseconds_a_disk": 1000 * seconds / count,
        "cpu_milliseconds_a_disk": 1000 * cpu_seconds / count,
        "cpus_used": cpu_seconds / seconds,
        "mib": max(run.mib for run in runs),
    }


def table(found: dict[str, float]) -> str:
    return "\n".join(
        [
            f"ms a disk: bar: at most {_BAR_MILLISECONDS:.0f} / measured {found['milliseconds_a_disk']:.1f}",
            f"MiB: bar: at most {_BAR_MIB:.0f} / measured {found['mib']:.0f}",
            f"of {len(os.sched_getaffinity(0))} CPUs {found['cpus_used']:.1f} were used, "
            f"{found['cpu_milliseconds_a_disk']:.1f} ms a disk",
        ]
    )


def main() -> int:
    parser = ground.arguments(__doc__)
    parser.add_argument("--disks", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args()
    with ground.mounted(args.filesystem, _FILESYSTEM_SIZE) as mount_point:
        instances_path = os.path.join(mount_point, "instances")
        os.mkdir(instances_path)
        base = ground.base_image(os.path.join(mount_point, "image.raw"), _BASE_SIZE)
        paths = disks(instances_path, base, args.disks)
        ground.settle(mount_point)
        runs = [show(paths) for _ in range(args.runs)]
    facts = {**ground.versions(), "filesystem": args.filesystem, "disks": args.disks}
    found = results(runs, args.disks)
    ground.tell(facts, {**found, "runs": [dataclasses.asdict(run) for run in runs]}, table(found), as_json=args.json)
    return 0


def _output(*argv: str) -> str:
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
