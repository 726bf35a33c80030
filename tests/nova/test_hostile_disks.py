# SPDX-License-Identifier: Apache-2.0
"""Each hostile disk at a start of its instance, in Nova's backends: Nova starts what it could, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
import os
import pathlib
import re
import shutil
import types
from typing import Any

from functional import hostile_disks
from functional import hostile_trials
from functional.hostile_disks import Entry
from functional.hostile_trials import Bench
from functional.hostile_trials import Fault
from functional.hostile_trials import Outcome
from functional.hostile_trials import Trial
import nova_disks
from oslo_utils import units
import pytest

# Stock Nova itself waits for these without end: it reads its record as a whole,
# and has qemu-img find out what a raw disk is, which opens what a vmdk names.
_WAITED_FOR = re.compile(r"disk\.info is a (FIFO|device)|vmdk .*names a FIFO")

# An instance's disk is called disk, and is one.
_STARTABLE = tuple(
    entry
    for entry in hostile_disks.entries()
    if entry.truth
    and entry.kind not in ("name", "flood")
    and not _WAITED_FOR.search(entry.name)
    and (entry.kind != "link" or "second name" in entry.name)
)

# A start takes a second: all that is about Nova's records, and some of each other kind.
_EVERY = {"record": 1, "link": 1, "raw": 3, "neighbour": 5, "sound": 5, "backing": 5, "feature": 7, "damage": 9}

ENTRIES = tuple(entry for index, entry in enumerate(_STARTABLE) if not index % _EVERY[entry.kind])

each_disk = pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])


@dataclasses.dataclass(frozen=True)
class Way:
    """How Nova may come to a disk: by which backend, and with what it is told to do to it."""

    images_type: str
    existing_disks: str

    def __str__(self) -> str:
        return f"images_type = {self.images_type}, existing_disks = {self.existing_disks}"


@pytest.fixture(scope="module")
def by_nova(request: pytest.FixtureRequest, room: str) -> Iterator[Outcome]:
    """Start an instance with each disk, in each way."""
    asked: list[Any] = [item for item in request.session.items if item.fspath == request.node.fspath]
    chosen = {item.callspec.params["entry"].name for item in asked if hasattr(item, "callspec")}
    wanted = [entry for entry in ENTRIES if entry.name in chosen]
    folder = pathlib.Path(room, f"hostile-{os.getpid()}")
    folder.mkdir()
    outcome = hostile_trials.in_processes(wanted, lambda entry: _start_in_all_ways(entry, folder))
    request.config.pluginmanager.register(hostile_trials.Summary("hostile disks, at a start", outcome))
    yield outcome
    shutil.rmtree(folder)


@each_disk
def test_disk_is_not_harmed_by_a_start(entry: Entry, by_nova: Outcome) -> None:
    assert [str(fault) for fault in by_nova[entry.name]] == []


def test_no_disk_is_lost_by_a_start(by_nova: Outcome) -> None:
    if len(by_nova) < len(ENTRIES):
        pytest.skip("only some disks were asked for")
    counts = hostile_trials.counts(by_nova)

    assert (counts["tried"] >= 60, counts["held"], counts["lost"]) == (True, counts["tried"], 0)


def _ways(entry: Entry) -> Iterator[Way]:
    for existing_disks in ("reserve", "rewrite"):
        # Where a host was switched, Qcow2 finds raw disks, and Flat, by its
        # record, qcow2 ones.
        yield Way("qcow2", existing_disks)
        if entry.truth == "raw" or entry.kind == "sound":
            yield Way("raw", existing_disks)


def _start_in_all_ways(entry: Entry, folder: pathlib.Path) -> list[Fault]:
    faults: list[Fault] = []
    instances = folder / str(ENTRIES.index(entry))
    (instances / "_base").mkdir(parents=True)
    hostile_disks.put(instances / "_base" / "base", hostile_disks.noise(units.Mi))
    for way in _ways(entry):
        uuid = nova_disks.new_uuid()
        bench = Bench(dataclasses.replace(entry, build=_recorded(entry, way)), instances / uuid)
        faults += _start(bench, way, instances, uuid)
    return faults


def _recorded(entry: Entry, way: Way) -> hostile_disks.Builder:
    """Have Nova's record beside a disk that has none; Nova wrote it as the disk was made."""

    def built(folder: pathlib.Path) -> pathlib.Path:
        if entry.record is None and (entry.truth == "raw" or way.images_type == "raw"):
            pathlib.Path(folder, "disk.info").write_text(json.dumps({f"{folder}/disk": entry.truth}))
        return entry.build(folder)

    return built


def _start(bench: Bench, way: Way, instances: pathlib.Path, uuid: str) -> list[Fault]:
    """Start an instance once, and return what is wrong with its disk then."""
    trial = Trial(
        str(way),
        bench.entry,
        certain=bench.entry.record in (None, "qcow2"),
        # By stock Nova, where it finds none that it understands.
        others=("disk.info",),
    )
    bench.set_up()
    error = _error(way, instances, uuid, preallocated=True)
    faults = bench.judge(trial, refused=error is not None)
    if error is None and not faults:
        return []
    bench.set_up()
    by_stock = _error(way, instances, uuid, preallocated=False)
    if error is not None and by_stock is None:
        faults.append(Fault(str(way), f"it does not start, by stock Nova it does: {error!r}"))
    # What stock Nova does as well is not ours.
    return [fault for fault in faults if fault not in bench.judge(trial, refused=by_stock is not None)]


def _error(way: Way, instances: pathlib.Path, uuid: str, *, preallocated: bool) -> Exception | None:
    """Do to a disk what Nova does at a start, and return its error, if there is one."""
    options = {
        "libvirt__images_type": way.images_type,
        "use_cow_images": way.images_type == "qcow2",
        "imgprealloc__existing_disks": way.existing_disks,
    }
    disks = nova_disks.Disks(str(instances), preallocated=preallocated, **options)
    instance = types.SimpleNamespace(uuid=uuid, name="instance-1", flavor=types.SimpleNamespace(extra_specs={}))
    try:
        with hostile_trials.alarm():
            image = disks.image(instance, "disk", way.images_type)
            # As Nova does: it describes the guest first.
            image.libvirt_info("none", {})
            disks.cache(image, str(instances / "_base" / "base"), 2 * units.Mi)
    except hostile_trials.Hung:
        return TimeoutError("it hangs")
    except Exception as exc:
        return exc
    return None
