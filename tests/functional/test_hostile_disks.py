# SPDX-License-Identifier: Apache-2.0
"""Each hostile disk through every verb, by the library and by the command: nothing is lost, and each error helps."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from typing import Any, Optional

import pytest
import tools_needed

from functional import hostile_disks
from functional import hostile_trials
from functional.hostile_disks import Entry
from functional.hostile_trials import Bench
from functional.hostile_trials import Fault
from functional.hostile_trials import Outcome
from functional.hostile_trials import Trial
import imgprealloc

ENTRIES = hostile_disks.entries()
# As a command, one disk takes seconds: each odd name, and some of each other kind.
SAMPLE = tuple(
    entry for index, entry in enumerate(ENTRIES) if (entry.kind == "name" and entry.truth == "qcow2") or not index % 16
)

each_disk = pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])
each_sample = pytest.mark.parametrize("entry", SAMPLE, ids=[entry.name for entry in SAMPLE])

# What a verb does to a disk, in the words of the command. create is to refuse.
VERBS: dict[str, Callable[[pathlib.Path, Optional[str]], Any]] = {
    "show": lambda path, format: imgprealloc.Preallocator().inspect(path, format=format),
    "allocate": lambda path, format: imgprealloc.Preallocator().preallocate(path, format=format),
    "allocate --rewrite": lambda path, format: imgprealloc.Preallocator().preallocate(path, "rewrite", format=format),
    "resize": lambda path, format: imgprealloc.Preallocator().resize(path, hostile_disks.GROWN, format=format),
    "create": lambda path, format: imgprealloc.Preallocator().create(path, hostile_disks.GROWN, format=format),
}
_LOOKING = ("show", "create")

# Where programs and Python are, and what they read on each system.
_SYSTEM = (
    "/bin/", "/dev/null", "/dev/random", "/dev/tty", "/dev/urandom", "/etc/", "/lib", "/proc/", "/sbin/", "/sys/",
    "/usr/", "/var/lib/sss/",
    # stevedore's, of the command's verbs.
    os.path.expanduser("~/.cache/python-entrypoints"),
)  # fmt: skip

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "v": "\v", "f": "\f"}


@pytest.fixture(scope="module")
def room(mount_point_of: Any) -> Iterator[pathlib.Path]:
    """Give a folder for all disks on a filesystem that can hold space."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=mount_point_of("ext4")))
    yield folder
    shutil.rmtree(folder)


def _wanted(request: pytest.FixtureRequest, test: str, all_of_them: Iterable[Entry]) -> list[Entry]:
    """Return the disks of those tests that were asked for."""
    asked: list[Any] = [item for item in request.session.items if getattr(item, "originalname", "") == test]
    chosen = {item.callspec.params["entry"].name for item in asked}
    return [entry for entry in all_of_them if entry.name in chosen]


@pytest.fixture(scope="module")
def by_library(request: pytest.FixtureRequest, room: pathlib.Path) -> Outcome:
    """Call every verb on each disk."""
    wanted = _wanted(request, test_disk_is_not_harmed.__name__, ENTRIES)
    outcome = hostile_trials.in_processes(wanted, lambda entry: _call_verbs(entry, _folder(room, entry)))
    request.config.pluginmanager.register(hostile_trials.Summary("hostile disks", outcome))
    return outcome


@pytest.fixture(scope="module")
def by_command(request: pytest.FixtureRequest, room: pathlib.Path) -> Outcome:
    """Run the command on some disks, and look at what is opened then."""
    tools_needed.require(["strace"])
    wanted = _wanted(request, test_disk_is_not_harmed_by_the_command.__name__, SAMPLE)
    outcome = hostile_trials.in_processes(wanted, lambda entry: _run_commands(entry, _folder(room, entry)))
    request.config.pluginmanager.register(hostile_trials.Summary("hostile disks, by the command", outcome))
    return outcome


def _folder(room: pathlib.Path, entry: Entry) -> pathlib.Path:
    return room / f"{ENTRIES.index(entry)}"


@each_disk
def test_disk_is_not_harmed(entry: Entry, by_library: Outcome) -> None:
    assert [str(fault) for fault in by_library[entry.name]] == []


@each_sample
def test_disk_is_not_harmed_by_the_command(entry: Entry, by_command: Outcome) -> None:
    assert [str(fault) for fault in by_command[entry.name]] == []


def test_no_disk_is_lost(by_library: Outcome) -> None:
    if len(by_library) < len(ENTRIES):
        pytest.skip("only some disks were asked for")
    counts = hostile_trials.counts(by_library)

    assert (counts["tried"] >= 60, counts["held"], counts["lost"]) == (True, counts["tried"], 0)


# Prints the most memory in KiB that the command had, or a program that it waited for. A process of
# its own asks, because a new program's count begins with the memory of the one that started it.
_WITH_MEMORY = """\
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def test_program_that_prints_without_end_takes_little_memory(room: pathlib.Path) -> None:
    bench = Bench(hostile_disks.ENDLESS, room / "flood")
    path, _ = bench.set_up()
    with subprocess.Popen(
        [sys.executable, "-c", _WITH_MEMORY, *_command(), "show", "--disk-format", "qcow2", path],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            with hostile_trials.alarm(5 * hostile_trials.HANG):
                said = process.stderr.read(10 * hostile_disks.MiB)
                memory = int(process.stdout.read())
                process.wait()
        finally:
            hostile_trials.end_session(process.pid)

    assert (process.returncode, memory < 300 * 1024, len(said) < 4096) == (1, True, True)
    assert bench.judge(_trial(bench.entry, "show", "qcow2"), refused=True) == []


# By the library.


def _call_verbs(entry: Entry, folder: pathlib.Path) -> list[Fault]:
    faults: list[Fault] = []
    bench = Bench(entry, folder)
    for verb in VERBS:
        for format in dict.fromkeys((None, entry.truth)):
            try:
                faults += _call(bench, verb, format)
            except hostile_trials.Hung:
                # No sense in waiting as long for the others.
                return [*faults, Fault(_title(verb, format), "it hangs")]
    shutil.rmtree(folder)
    return faults


def _title(verb: str, format: str | None) -> str:
    return verb if format is None else f"{verb} --disk-format {format}"


def _trial(entry: Entry, verb: str, format: str | None) -> Trial:
    return Trial(
        _title(verb, format),
        entry,
        certain=format is not None or entry.record in ("raw", "qcow2"),
        may_write=verb not in _LOOKING,
        grows=verb == "resize",
    )


def _call(bench: Bench, verb: str, format: str | None) -> list[Fault]:
    """Call one verb, and return what is wrong with how it has ended, or with the disk then."""
    trial = _trial(bench.entry, verb, format)
    path, _ = bench.set_up()
    faults = []
    error: Exception | None = None
    try:
        with hostile_trials.alarm():
            found = VERBS[verb](path, format)
        if verb == "resize" and found.virtual_size != hostile_disks.GROWN:
            faults.append(Fault(trial.name, f"it has {found.virtual_size} bytes now, and says that all is well"))
    except imgprealloc.PreallocationError as exc:
        error = exc
        if not _names(str(exc), path) or not str(exc.remedy).strip():
            faults.append(Fault(trial.name, f"the error does not name the disk, or no way out: {exc!r}"))
    except Exception as exc:
        error = exc
        faults.append(Fault(trial.name, f"it is no error of ours: {exc!r}"))
    faults += _unexpected(bench.entry, trial, verb, error)
    return faults + bench.judge(trial, refused=error is not None)


def _unexpected(entry: Entry, trial: Trial, verb: str, error: object) -> Iterator[Fault]:
    """Say where a verb that had to do its work has not done it, or the other way round."""
    if verb == "create" and error is None:
        yield Fault(trial.name, "it is no error that the file is there already")
    if verb in _LOOKING and (verb, entry.expected) != ("show", "works"):
        return
    if trial.certain and entry.expected == "works" and error is not None:
        yield Fault(trial.name, f"it is refused, though nothing is wrong: {error!r}")
    if trial.certain and entry.expected == "refused" and error is None:
        yield Fault(trial.name, "it is not refused")


def _names(text: str, path: pathlib.Path) -> bool:
    """Whether a text names a file, as it is or with its odd letters escaped."""
    name = path.name
    shown = (name, repr(name)[1:-1], ascii(name)[1:-1], name.encode(errors="backslashreplace").decode())
    return any(form in text for form in shown)


# By the command.


def _command() -> list[str]:
    """Return the command of this environment."""
    installed = os.path.join(sysconfig.get_path("scripts"), "imgprealloc")
    return [installed] if os.path.exists(installed) else [sys.executable, "-m", "imgprealloc.cli"]


def _run_commands(entry: Entry, folder: pathlib.Path) -> list[Fault]:
    faults: list[Fault] = []
    bench = Bench(entry, folder)
    for verb, format in (("show", None), ("allocate --rewrite", None), ("resize", entry.truth)):
        try:
            faults += _run(bench, verb, format)
        except subprocess.TimeoutExpired:
            return [*faults, Fault(_title(verb, format), "it hangs")]
    shutil.rmtree(folder)
    return faults


def _run(bench: Bench, verb: str, format: str | None) -> list[Fault]:
    """Run the command once, and return what is wrong with what it said, opened, or did."""
    trial = _trial(bench.entry, verb, format)
    path, _ = bench.set_up()
    with tempfile.TemporaryDirectory(prefix="imgprealloc-strace-") as scratch:
        trace = pathlib.Path(scratch, "trace")
        watch = [
            "strace",
            "-f",
            "--seccomp-bpf",
            "-qq",
            "-y",
            "-o",
            str(trace),
            "-e",
            "trace=open,openat,openat2,creat",
        ]
        told = [] if format is None else ["--disk-format", format]
        size = [str(hostile_disks.GROWN)] if verb in ("resize", "create") else []
        done = subprocess.run(
            [*watch, *_command(), *verb.split(), *told, str(path), *size],
            capture_output=True, check=False, cwd="/", timeout=hostile_trials.HANG, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        opened = list(_opened(trace.read_text(errors="replace")))
    said = done.stderr.decode(errors="surrogateescape")
    faults = []
    if done.returncode not in (0, 1, 2) or "Traceback" in said:
        faults.append(Fault(trial.name, f"status {done.returncode}: {said}"))
    if done.returncode and not any(_helps(line, path) for line in said.splitlines()):
        faults.append(Fault(trial.name, f"no line names the disk and a way out: {said}"))
    faults += [Fault(trial.name, f"it opened {name}") for name in opened if not _may_open(bench, path, name)]
    faults += _unexpected(bench.entry, trial, verb, said if done.returncode else None)
    return faults + bench.judge(trial, refused=bool(done.returncode))


def _helps(line: str, path: pathlib.Path) -> bool:
    """Whether a line has a file's name, what is wrong, and what to do."""
    return _names(line, path) and bool(re.search(r": .+\. \S.+\.$", line))


def _opened(trace: str) -> Iterator[str]:
    """Return the files that were opened, as the kernel has found them."""
    for found in re.finditer(r"= \d+<(.*)>$", trace, re.MULTILINE):
        yield re.sub(r"\\([0-7]{1,3}|.)", _unescaped, found[1])


def _unescaped(found: re.Match[str]) -> str:
    """Return the letter, or byte, that strace has told by an escape of C's."""
    told = found[1]
    return chr(int(told, 8)) if told.isdigit() else _ESCAPES.get(told, told)


def _may_open(bench: Bench, path: pathlib.Path, opened: str) -> bool:
    """Whether a file is the disk, its declared base, Nova's record, ours, or the system's."""
    if opened.startswith(hostile_disks.SECRET):
        return False
    folder = os.path.realpath(bench.folder)
    if not opened.startswith(f"{folder}/"):
        ours = (sys.prefix, sys.base_prefix, str(pathlib.Path(__file__).parents[2]), os.path.dirname(folder))
        return opened == "/" or opened.startswith((*_SYSTEM, *ours))
    name = os.fsencode(os.path.realpath(path)).decode("latin-1")
    beside, last = os.path.split(name)
    known = [name, beside, *(f"{folder}/{declared}" for declared in bench.entry.declared)]
    known += [f"{place}/disk.info" for place in (beside, folder)]
    temporary = (f"{beside}/.{last}.imgprealloc", f"{beside}/{last}.imgprealloc", f"{beside}/#")
    return opened in known or opened.startswith(temporary)
