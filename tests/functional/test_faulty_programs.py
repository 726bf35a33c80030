# SPDX-License-Identifier: Apache-2.0
"""Programs that hang, lie, die, flood or do nothing: the right result, or an error, and the disk as it was."""

from __future__ import annotations

from collections.abc import Iterator
import json
import pathlib
import subprocess
import sys

import loop_filesystem
import pytest

from functional import disks as disks_module
from functional import faulty_programs
from functional import tally
from functional.disks import MiB
from functional.disks import Verb
from functional.faulty_programs import FaultyPrograms
from imgprealloc import PreallocationError
from imgprealloc import command
from imgprealloc import qemu_img

VERBS = ("reserve", "rewrite", "recreate", "fill", "grow", "grow_raw", "create", "create_overlay", "create_raw")
FLOODS = ("flood_stdout", "flood_stderr", "warn_much")

# Seconds, instead of minutes.
WALL_TIME = 1

MOST_MEMORY = 200 * MiB


@pytest.fixture(scope="module")
def ground() -> Iterator[pathlib.Path]:
    """Give a filesystem for this module."""
    with loop_filesystem.mounted("ext4", 400 * MiB) as mount_point:
        yield pathlib.Path(mount_point)


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> FaultyPrograms:
    """Give stand-ins that are not on PATH yet."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return FaultyPrograms(folder)


@pytest.fixture(params=VERBS)
def verb(request: pytest.FixtureRequest, disks: disks_module.Disks) -> Verb:
    """Give one verb after the other."""
    return next(verb for verb in disks.verbs() if verb.name == request.param)


def attempt(
    verb: Verb, path: pathlib.Path, programs: FaultyPrograms, monkeypatch: pytest.MonkeyPatch
) -> PreallocationError | None:
    """Do it with the stand-ins; return what went wrong."""
    # Asked once a process.
    qemu_img.forget()
    with monkeypatch.context() as patch:
        for name, value in programs.environment.items():
            patch.setenv(name, value)
        patch.setattr(command, "WALL_TIME", WALL_TIME, raising=False)
        try:
            return disks_module.attempt(verb, path)
        finally:
            qemu_img.forget()


def require_nothing_lost(verb: Verb, disks: disks_module.Disks, path: pathlib.Path, *, done: bool) -> None:
    """Require the right result, or all as it was; beside the disk there is nothing."""
    if done:
        disks.require_done(verb, path)
    else:
        disks.require_kept(verb, path)
        assert verb.disk or not path.exists(), "a disk that could not be made is there"
    assert {found.name for found in path.parent.iterdir()} <= {path.name}, "something is left beside the disk"


def called_by(
    verb: Verb,
    disks: disks_module.Disks,
    path: pathlib.Path,
    programs: FaultyPrograms,
    monkeypatch: pytest.MonkeyPatch,
) -> list[tuple[str, str]]:
    """Find out which programs a verb runs, when all goes well."""
    disks.prepare(verb, path)
    programs.plan()
    failed = attempt(verb, path, programs, monkeypatch)
    assert failed is None, failed
    return programs.called


def test_no_fault_of_a_program_loses_a_disk(
    verb: Verb,
    disks: disks_module.Disks,
    place: pathlib.Path,
    programs: FaultyPrograms,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    path = place / "disk"
    called = called_by(verb, disks, path, programs, monkeypatch)
    assert called, "none of the stand-ins was called"

    with tally.table(pytestconfig, "programs with a fault") as counts:
        for program, sub_command in called:
            for fault in faulty_programs.faults(program, sub_command):
                if fault in FLOODS:
                    continue
                disks.prepare(verb, path)
                programs.plan(program, sub_command, fault)
                failed = attempt(verb, path, programs, monkeypatch)
                with counts.case(verb, program, sub_command, fault):
                    assert not programs.overslept, "it was waited for"
                    disks_module.require_told(failed, path)
                    require_nothing_lost(verb, disks, path, done=failed is None)
                    assert programs.left_running() == []


@pytest.mark.parametrize("verb", ["rewrite", "create_overlay", "grow_raw"], indirect=True)
def test_no_flood_of_a_program_takes_memory(
    verb: Verb,
    disks: disks_module.Disks,
    place: pathlib.Path,
    programs: FaultyPrograms,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    path = place / "disk"
    called = called_by(verb, disks, path, programs, monkeypatch)

    with tally.table(pytestconfig, "programs that flood") as counts:
        for program, sub_command in called:
            for fault in FLOODS:
                disks.prepare(verb, path)
                programs.plan(program, sub_command, fault)
                with monkeypatch.context() as patch:
                    for name, value in programs.environment.items():
                        patch.setenv(name, value)
                    failed, memory = in_a_process_of_its_own(verb, path)
                with counts.case(verb, program, sub_command, fault):
                    assert memory < MOST_MEMORY, f"{memory >> 20} MiB of memory"
                    require_nothing_lost(verb, disks, path, done=failed is None)
                    assert failed is None or str(path) in failed, f"the error does not name the disk: {failed}"
                    assert failed is None or len(failed) < 8192, f"the error has {len(failed)} characters"
                    assert programs.left_running() == []


def in_a_process_of_its_own(verb: Verb, path: pathlib.Path) -> tuple[str | None, int]:
    """Run the command line in a new process; return its error, and the most memory that it used, in bytes."""
    code = (
        "import json, sys\n"
        "from imgprealloc.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "most = next(line for line in open('/proc/self/status') if line.startswith('VmHWM:'))\n"
        "print(json.dumps([status, int(most.split()[1]) << 10]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "-q", *verb.argv(path)],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    status, memory = json.loads(done.stdout.splitlines()[-1])
    return (done.stderr.strip() or "failed") if status else None, memory
