# SPDX-License-Identifier: Apache-2.0
"""Disks that take turns: each phase goes over all of them in short turns.

fio is the guest; what it talks to is in served.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import tempfile
from typing import Any

import ground
import phases
from phases import Load
from phases import Phase
from phases import Place
import served
from subjects import Subject

_ORDER = random.Random(0)


@dataclasses.dataclass
class Series:
    """What one phase did on all disks: requests a second, in the order of the turns."""

    filesystem: str
    load: str
    phase: str
    place: str
    rates: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Course:
    """How long a run is.

    :param size: a disk's, in bytes; its base has half of it
    :param turns: of each disk, a phase
    :param most: requests a turn, where the phase does not say
    """

    size: int
    turns: int
    most: int


def run(
    found: Sequence[Subject], load: Load, course: Course, wanted: Sequence[Phase], base: str, mount_point: str
) -> Iterator[tuple[Phase, Place, dict[str, list[float]]]]:
    """Make every disk anew, take it through its phases, and remove it."""
    ground.await_space(mount_point, len(found) * course.size)
    with contextlib.ExitStack() as stack:
        uris = {}
        for subject in found:
            folder = tempfile.mkdtemp(prefix="disk-", dir=mount_point)
            stack.callback(shutil.rmtree, folder)
            path = subject.make(folder, base, course.size)
            stack.callback(_remove, path)
            socket = stack.enter_context(served.over_socket(path, folder, subject.format, subject.aio))
            uris[subject.title] = f"nbd+unix:///?socket={socket}"
        for phase in wanted:
            if phase is phases.LATER:
                for uri in uris.values():
                    _touch(uri, course.size)
            for place in phases.PLACES:
                yield phase, place, _measured(uris, phase, place, load, course, mount_point)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _measured(
    uris: dict[str, str], phase: Phase, place: Place, load: Load, course: Course, mount_point: str
) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {title: [] for title in uris}
    for turn in range(course.turns):
        # In another order each time, so that none always follows the same.
        for title in _ORDER.sample(list(uris), len(uris)):
            ground.settle(mount_point)
            rates[title].append(_rate(uris[title], phase, place, load, course, turn))
    return rates


def _rate(uri: str, phase: Phase, place: Place, load: Load, course: Course, turn: int) -> float:
    """Ask for the same places on each disk, and return the requests a second."""
    start, length = phases.area(phase.part, place, course.size)
    count = phases.requests(phase, load, course.size, course.turns, course.most)
    if phase.pattern == "write":
        # Each turn goes on where the last one has ended.
        length //= course.turns
        start += turn * length
    direction = "read" if phase.pattern == "randread" else "write"
    job = _fio(
        uri, f"--rw={phase.pattern}", f"--bs={phase.block}", f"--iodepth={load.depth}", f"--offset={start}",
        f"--size={length}", f"--io_size={count * phase.block}",
        # With randrepeat, which is fio's default, it takes no notice of the seed.
        "--randrepeat=0", f"--randseed={turn + 1 + 1000 * phases.PHASES.index(phase)}",
        *(["--fsync=1"] if load.flushes and direction == "write" else []),
    )[direction]  # fmt: skip
    if job["total_ios"] != count:
        raise RuntimeError(f"fio made {job['total_ios']} requests instead of {count}")
    # fio counts in whole milliseconds.
    return round(1000 * count / max(1, int(job["runtime"])), 1)


def _touch(uri: str, size: int) -> None:
    """Write a block into each of the clusters that stock Nova's disk has, so that it has them all."""
    for place in phases.PLACES:
        start, length = phases.area(phases.RANDOM, place, size)
        # One block, and past the rest of the cluster.
        _fio(uri, f"--rw=write:{phases.STOCK_CLUSTER - 4096}", "--bs=4096", "--iodepth=16", f"--offset={start}",
             f"--size={length}", f"--io_size={length // phases.STOCK_CLUSTER * 4096}")  # fmt: skip


def _fio(uri: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        # In a thread, because a process of its own would outlive the fio that is ended.
        ["fio", "--name=guest", "--thread", "--ioengine=nbd", f"--uri={uri}", *arguments, "--output-format=json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # fio prints notes before its JSON.
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return job
