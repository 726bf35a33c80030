# SPDX-License-Identifier: Apache-2.0
"""How fast are a guest's first writes, on stock Nova's disk, on imgprealloc's, and on a preallocated raw file?

4 KiB at random places beyond the base image, one at a time, each followed by a
flush, through qemu-nbd as QEMU would do it for a guest (cache=none). All disks
are new in each run and take turns in it, and the median of the runs counts. The
filesystem is one of its own under TMPDIR, all of it written before, so that
only the disks are measured and not the file it lives in. Needs root, fio,
and 6 GiB under TMPDIR; takes a few minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

import ground
import nova_disks

from imgprealloc import Mode
from imgprealloc import Preallocator

_MIB = 1024**2
_BASE_SIZE = 64 * _MIB
_DISK_SIZE = 1024 * _MIB
# All five disks, the base image twice, and some to spare.
_FILESYSTEM_SIZE = 6144 * _MIB
_TURN = 500
_MODES: tuple[Mode, ...] = ("falloc", "full")
_BAR_STOCK = 1.5
_BAR_RAW = 0.9


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of disk, how to make one, and the IOPS that were measured on it."""

    title: str
    format: str
    make: Callable[[], str]
    iops: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.iops)


def subjects(instances_path: str, base: str) -> list[Subject]:
    """List the disks to compare. Stock Nova has but one way, fallocate -n."""
    stock = nova_disks.Disks(instances_path, preallocated=False)
    ours = nova_disks.Disks(instances_path, preallocated=True)

    def stock_overlay() -> str:
        return str(stock.spawn(base, _DISK_SIZE).path)

    def raw(mode: Mode) -> str:
        path = os.path.join(ours.instances_path, ours.instance().uuid, "disk")
        return Preallocator(mode).create(path, _DISK_SIZE, format="raw").path

    def overlay(mode: str) -> str:
        return str(ours.spawn(base, _DISK_SIZE, **{"imgprealloc:mode": mode}).path)

    found = [Subject("stock Nova", "qcow2", stock_overlay)]
    for mode in _MODES:
        found.append(Subject(f"imgprealloc, {mode}", "qcow2", functools.partial(overlay, mode)))
        found.append(Subject(f"raw, {mode}", "raw", functools.partial(raw, mode)))
    return found


def measure(found: list[Subject], writes: int, aio: str, mount_point: str) -> None:
    """Make every disk anew, and let them be written to in turns.

    In short turns, because the machine is slow and fast for seconds at a time.
    """
    paths = [subject.make() for subject in found]
    ground.settle(mount_point)
    milliseconds = [0] * len(found)
    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.callback(shutil.rmtree, os.path.dirname(path))
        uris = [stack.enter_context(_served(path, each.format, aio)) for path, each in zip(paths, found)]
        for turn in range(writes // _TURN):
            order = range(len(found))
            # Back and forth, so that none always follows the same.
            for number in order if turn % 2 else reversed(order):
                ground.settle(mount_point)
                milliseconds[number] += _write(uris[number], turn)
    for subject, taken in zip(found, milliseconds):
        subject.iops.append(1000 * (writes // _TURN) * _TURN / taken)


def _write(uri: str, turn: int) -> int:
    """Write the same places on each disk, and return the milliseconds that it took."""
    done = subprocess.run(
        [
            "fio", "--name=first-writes", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=1",
            "--fsync=1", f"--offset={_BASE_SIZE}", f"--size={_DISK_SIZE - _BASE_SIZE}", f"--io_size={_TURN * 4096}",
            # With randrepeat, which is fio's default, it takes no notice of the seed.
            "--randrepeat=0", f"--randseed={turn + 1}", "--output-format=json",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # fio prints notes before its JSON.
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write"]
    if job["total_ios"] != _TURN:
        raise RuntimeError(f"fio made {job['total_ios']} writes instead of {_TURN}")
    return int(job["runtime"])


@contextlib.contextmanager
def _served(path: str, format: str, aio: str) -> Iterator[str]:
    """Serve a disk over a socket, opened as Nova has QEMU open it for a guest."""
    socket = os.path.join(os.path.dirname(path), "nbd")
    server = subprocess.Popen(
        [
            "qemu-nbd", "--persistent", "--shared=4", f"--socket={socket}", f"--format={format}",
            "--cache=none", f"--aio={aio}", "--discard=ignore", path,
        ]
    )  # fmt: skip
    try:
        while not os.path.exists(socket):
            if server.poll() is not None:
                raise RuntimeError(f"qemu-nbd ended with status {server.returncode}")
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        server.terminate()
        server.wait()


def ratios(found: list[Subject]) -> dict[str, tuple[float, float]]:
    """Return each ratio with the least that it should be."""
    by_title = {subject.title: subject.median for subject in found}
    result = {}
    for mode in _MODES:
        ours = by_title[f"imgprealloc, {mode}"]
        result[f"imgprealloc, {mode} / stock Nova"] = (ours / by_title["stock Nova"], _BAR_STOCK)
        result[f"imgprealloc, {mode} / raw, {mode}"] = (ours / by_title[f"raw, {mode}"], _BAR_RAW)
    return result


def table(found: list[Subject]) -> str:
    lines = [f"{'4 KiB first writes a second':<30}{'median':>8}   runs"]
    for subject in found:
        runs = " ".join(f"{iops:6.0f}" for iops in subject.iops)
        lines.append(f"{subject.title:<30}{subject.median:8.0f}   {runs}")
    for title, (ratio, bar) in ratios(found).items():
        lines.append(f"{title}: bar: at least {bar} / measured {ratio:.2f}")
    return "\n".join(lines)


def main() -> int:
    parser = ground.arguments(__doc__)
    parser.add_argument("--runs", type=int, default=3, help="default: %(default)s")
    # More would often meet a 64 KiB cluster of stock Nova's disk that has been written to before.
    parser.add_argument("--writes", type=int, default=3000, help=f"a disk and run, by {_TURN}; default: %(default)s")
    parser.add_argument("--aio", choices=("native", "threads", "io_uring"), default="native",
                        help="native is what Nova chooses for a preallocated disk; default: %(default)s")  # fmt: skip
    args = parser.parse_args()
    with ground.mounted(args.filesystem, _FILESYSTEM_SIZE) as mount_point:
        ground.write_out(mount_point)
        instances_path = os.path.join(mount_point, "instances")
        os.mkdir(instances_path)
        base = ground.base_image(os.path.join(mount_point, "image.raw"), _BASE_SIZE)
        found = subjects(instances_path, base)
        for _ in range(args.runs):
            measure(found, args.writes, args.aio, mount_point)
        facts = {
            **ground.versions(),
            "filesystem": args.filesystem,
            "aio": args.aio,
            "loop_direct_io": str(ground.is_direct(mount_point)).lower(),
        }
    results = {
        "iops": {each.title: each.iops for each in found},
        "ratios": {title: {"ratio": ratio, "bar": bar} for title, (ratio, bar) in ratios(found).items()},
    }
    ground.tell(facts, results, table(found), as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
