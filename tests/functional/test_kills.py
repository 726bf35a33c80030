# SPDX-License-Identifier: Apache-2.0
"""An end at any point: by SIGKILL, by signals that ask for it, and by another call on the same disk.

40 SIGKILLs at random points; as many as IMGPREALLOC_KILLS says, if it is set,
such as 300. IMGPREALLOC_SEED repeats a run, as far as time can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from concurrent import futures
import glob
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import images
import loop_filesystem
import pytest

from functional import disks as disks_module
from functional import processes
from functional import tally
from functional.disks import GROWN
from functional.disks import TEMPORARY
from functional.disks import ZEROS
from functional.disks import MiB
from functional.disks import Verb
from functional.faulty_programs import FaultyPrograms
from imgprealloc import PreallocationError
from imgprealloc import Preallocator
from imgprealloc import exceptions

KILLS = int(os.environ.get("IMGPREALLOC_KILLS", "40"))
SEED = int(os.environ.get("IMGPREALLOC_SEED", "1"))

KILLED = ("create_overlay", "recreate", "rewrite", "reserve", "grow")


@pytest.fixture(scope="module")
def ground() -> Iterator[pathlib.Path]:
    """Give a filesystem for this module."""
    with loop_filesystem.mounted("ext4", 1024 * MiB) as mount_point:
        yield pathlib.Path(mount_point)


@pytest.fixture
def by_name(disks: disks_module.Disks) -> dict[str, Verb]:
    """Give the verbs by their names."""
    return {verb.name: verb for verb in disks.verbs()}


def names(place: pathlib.Path) -> set[str]:
    """Return what is in a folder."""
    return {found.name for found in place.iterdir()}


# SIGKILL.


def begin(verb: Verb, path: pathlib.Path, mode: str, mark: str) -> int:
    """Do it in a process of its own, forked, so that no time goes by before it begins; return its number."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.environ[processes.MARK] = mark
            verb.act(Preallocator(mode=mode), str(path))  # type: ignore[arg-type]
            status = 0
        finally:
            # Nothing of pytest's.
            os._exit(status)
    return pid


def time_of(verb: Verb, disks: disks_module.Disks, path: pathlib.Path, mode: str) -> float:
    """Measure how long it takes when nobody ends it, in seconds."""
    disks.prepare(verb, path)
    started = time.monotonic()
    pid = begin(verb, path, mode, "timing")
    assert os.waitpid(pid, 0)[1] == 0, f"{verb} fails by itself"
    return time.monotonic() - started


def go_on(verb: Verb, disks: disks_module.Disks, path: pathlib.Path, mode: str) -> None:
    """Give the same call again, and require that it does what is left to be done."""
    done = verb.disk is None and path.exists()
    if verb.name.startswith("grow") and images.info(path, verb.format)["virtual-size"] == verb.size:
        # Killed when all was done but the last look.
        done = True
        Preallocator(mode=mode).preallocate(path, "reserve", format=verb.format)  # type: ignore[arg-type]
    if not done:
        verb.act(Preallocator(mode=mode), str(path))  # type: ignore[arg-type]
    disks.require_done(verb, path)


def kill(verb: Verb, path: pathlib.Path, mode: str, mark: str, after: float) -> None:
    """Begin a verb in a process of its own, and kill that after so many seconds."""
    pid = begin(verb, path, mode, mark)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_no_kill_loses_a_disk(
    disks: disks_module.Disks, by_name: dict[str, Verb], place: pathlib.Path, pytestconfig: pytest.Config
) -> None:
    path, chance = place / "disk", random.Random(SEED)
    times = {(name, mode): time_of(by_name[name], disks, path, mode) for name in KILLED for mode in ("falloc", "full")}
    with tally.table(pytestconfig, f"SIGKILL at random points (seed {SEED})") as counts:
        for number in range(KILLS):
            name, mode = KILLED[number % len(KILLED)], chance.choice(("falloc", "full"))
            verb, after = by_name[name], chance.uniform(0, times[name, mode])
            disks.prepare(verb, path)
            kill(verb, path, mode, f"kill-{number}", after)
            with counts.case(verb, mode, f"killed after {after:.3f} s (kill {number})"):
                try:
                    assert not (found := processes.left_running(f"kill-{number}")), f"children are left: {found}"
                    assert names(place) <= {"disk", TEMPORARY.format("disk"), ZEROS.format("disk")}, names(place)
                    if verb.disk is None and path.exists():
                        disks.require_done(verb, path)
                    disks.require_kept(verb, path)
                    go_on(verb, disks, path, mode)
                    assert names(place) == {"disk"}, f"{names(place)} after the next call"
                except (PreallocationError, OSError) as exc:
                    raise AssertionError(f"the next call fails: {exc}") from exc
            for left in place.iterdir():
                left.unlink()


def test_no_kill_of_a_growth_by_an_odd_size_loses_a_disk(
    disks: disks_module.Disks, place: pathlib.Path, pytestconfig: pytest.Config
) -> None:
    path, chance, verb = place / "disk", random.Random(SEED), disks.odd_growth()
    modes = ("falloc", "full", "metadata")
    times = {mode: time_of(verb, disks, path, mode) for mode in modes}
    with tally.table(pytestconfig, f"SIGKILL of a growth by an odd size (seed {SEED})") as counts:
        for number in range(KILLS):
            mode = modes[number % len(modes)]
            after = chance.uniform(0, times[mode])
            disks.prepare(verb, path)
            kill(verb, path, mode, f"kill-{number}", after)
            with counts.case(verb, mode, f"killed after {after:.3f} s (kill {number})"):
                assert not (found := processes.left_running(f"kill-{number}")), f"children are left: {found}"
                disks.require_kept(verb, path)
                # As it was, or as it was asked for.
                size = images.info(path)["virtual-size"]
                assert size in (disks_module.ODD_SIZE, verb.size), size
                try:
                    again = disks_module.attempt(verb, path, Preallocator(mode=mode))  # type: ignore[arg-type]
                    if size == verb.size:
                        assert isinstance(again, exceptions.InvalidSize), again
                        assert names(place) == {"disk"}, f"{names(place)} after the next call"
                        Preallocator(mode=mode).preallocate(path, "reserve", format="qcow2")  # type: ignore[arg-type]
                    else:
                        assert again is None, again
                except (PreallocationError, OSError) as exc:
                    raise AssertionError(f"the next call fails: {exc}") from exc
                assert names(place) == {"disk"}, f"{names(place)} after the next call"
                disks.require_done(verb, path)


def killed_at(program: str, sub_command: str, verb: Verb, path: pathlib.Path, programs: FaultyPrograms) -> None:
    """Kill the command where it waits for a program."""
    process = waiting_at(program, sub_command, verb, path, programs)
    process.kill()
    process.wait()


def waiting_at(
    program: str, sub_command: str, verb: Verb, path: pathlib.Path, programs: FaultyPrograms
) -> subprocess.Popen[str]:
    """Start the command, and return once a program that it waits for has started, and hangs."""
    programs.plan(program, sub_command, "hang")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "imgprealloc.cli", *verb.argv(path)],
        env={**os.environ, **programs.environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while (program, sub_command) not in programs.called:
        assert process.poll() is None and time.monotonic() < deadline, "it does not come so far"  # noqa: PT018
        time.sleep(0.01)
    return process


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> FaultyPrograms:
    """Give programs of which one can be made to hang."""
    (tmp_path / "programs").mkdir()
    return FaultyPrograms(tmp_path / "programs")


AT_WORK = [
    ("rewrite", "qemu-img", "convert"),
    ("rewrite", "qemu-io", ""),
    ("rewrite", "sync", ""),
    ("recreate", "qemu-img", "create"),
    ("create", "qemu-img", "create"),
    ("create_overlay", "qemu-img", "convert"),
    ("create_overlay", "qemu-img", "resize"),
    ("grow", "qemu-img", "resize"),
    ("reserve", "qemu-img", "check"),
]

each_at_work = pytest.mark.parametrize(
    ("name", "program", "sub_command"), AT_WORK, ids=["_".join(filter(None, work)) for work in AT_WORK]
)


@each_at_work
def test_programs_end_with_the_process_that_started_them(
    by_name: dict[str, Verb], disks: disks_module.Disks, place: pathlib.Path, programs: FaultyPrograms,
    name: str, program: str, sub_command: str,
) -> None:  # fmt: skip
    disks.prepare(by_name[name], place / "disk")

    killed_at(program, sub_command, by_name[name], place / "disk", programs)

    assert programs.left_running() == []
    disks.require_kept(by_name[name], place / "disk")


@each_at_work
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_ends_the_command_and_all_that_is_of_it(
    by_name: dict[str, Verb], disks: disks_module.Disks, place: pathlib.Path, programs: FaultyPrograms,
    name: str, program: str, sub_command: str, number: signal.Signals,
) -> None:  # fmt: skip
    verb, path = by_name[name], place / "disk"
    disks.prepare(verb, path)
    process = waiting_at(program, sub_command, verb, path, programs)

    process.send_signal(number)
    _, told = process.communicate(timeout=30)

    assert process.returncode == 128 + number, told
    assert len(told.splitlines()) == 1, told
    assert str(path) in told
    assert re.search("is as it was|was not made|has its content", told), told
    assert names(place) == ({"disk"} if verb.disk else set())
    assert programs.left_running() == []
    disks.require_kept(verb, path)


def test_ignored_signal_stays_ignored(by_name: dict[str, Verb], disks: disks_module.Disks, place: pathlib.Path) -> None:
    verb, path = by_name["rewrite"], place / "disk"
    disks.prepare(verb, path)
    process = subprocess.Popen(
        ["nohup", sys.executable, "-W", "ignore", "-m", "imgprealloc.cli", *verb.argv(path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip

    time.sleep(0.2)
    process.send_signal(signal.SIGHUP)

    assert process.wait(60) == 0
    disks.require_done(verb, path)


# What a SIGKILL leaves.


@pytest.fixture
def leftover(
    by_name: dict[str, Verb], disks: disks_module.Disks, place: pathlib.Path, programs: FaultyPrograms
) -> pathlib.Path:
    """Give a disk whose rewriting was killed, with what that has left beside it."""
    path = place / "disk"
    disks.prepare(by_name["rewrite"], path)
    killed_at("sync", "", by_name["rewrite"], path, programs)
    assert programs.left_running() == []
    return path


def imgprealloc(*argv: object) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    words = [sys.executable, "-W", "ignore", "-m", "imgprealloc.cli", *map(str, argv)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_leftover_is_a_regular_file_with_the_mark(leftover: pathlib.Path) -> None:
    left = leftover.with_name(TEMPORARY.format("disk"))

    assert names(leftover.parent) == {"disk", left.name}
    assert (left.is_file(), left.stat().st_nlink, left.stat().st_mode & 0o1000) == (True, 1, 0o1000)


def test_leftover_is_not_found_by_a_pattern_for_disks(leftover: pathlib.Path) -> None:
    assert glob.glob(f"{leftover.parent}/disk*") == [str(leftover)]


def test_leftover_is_told_of_by_show(leftover: pathlib.Path) -> None:
    done = imgprealloc("show", "--disk-format", "qcow2", leftover)

    assert str(leftover.with_name(TEMPORARY.format("disk"))) in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


def test_leftover_is_not_removed_by_show(leftover: pathlib.Path) -> None:
    imgprealloc("show", "--disk-format", "qcow2", leftover)

    assert leftover.with_name(TEMPORARY.format("disk")).exists()


@pytest.mark.parametrize("existing", ["reserve", "recreate_blank", "rewrite"])
def test_leftover_is_removed_by_the_next_call(leftover: pathlib.Path, existing: str) -> None:
    Preallocator().preallocate(leftover, existing, format="qcow2")  # type: ignore[arg-type]

    assert names(leftover.parent) == {"disk"}


def test_leftover_is_removed_though_there_is_nothing_else_to_do(leftover: pathlib.Path) -> None:
    left = leftover.with_name(TEMPORARY.format("disk"))
    leftover.unlink()
    aside = left.rename(left.with_name("aside"))
    Preallocator().create(leftover, 4 * MiB)
    aside.rename(left)

    Preallocator().preallocate(leftover, format="qcow2")

    assert names(leftover.parent) == {"disk"}


def test_leftover_is_removed_by_the_next_growth(leftover: pathlib.Path) -> None:
    Preallocator().resize(leftover, GROWN, format="qcow2")

    assert names(leftover.parent) == {"disk"}


def test_leftover_is_removed_by_the_next_creation(leftover: pathlib.Path) -> None:
    leftover.unlink()

    Preallocator().create(leftover, 4 * MiB)

    assert names(leftover.parent) == {"disk"}


# Two calls, and many.


def both(first: Callable[[], object], second: Callable[[], object]) -> list[int]:
    """Do two things at once, each in a process of its own; return their ends: 0 done, 2 refused, 1 anything else."""
    ready, go = os.pipe()
    pids = []
    for act in (first, second):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.close(go)
                os.read(ready, 1)
                act()
                status = 0
            except (exceptions.ImageInUse, exceptions.InvalidSize):
                # Or the other one has done it already.
                status = 2
            except BaseException as exc:
                print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(ready)
    os.close(go)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


PAIRS = {
    "rewrite_and_grow": ("rewrite", "grow"),
    "grow_and_grow": ("grow", "grow"),
    "rewrite_and_rewrite": ("rewrite", "rewrite"),
    "reserve_and_grow": ("reserve", "grow"),
    "fill_and_grow_raw": ("fill", "grow_raw"),
    "create_and_create": ("create_overlay", "create_overlay"),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_calls_on_one_disk_end_and_lose_nothing(
    by_name: dict[str, Verb], disks: disks_module.Disks, place: pathlib.Path, pytestconfig: pytest.Config, pair: str
) -> None:
    path = place / "disk"
    first, second = (by_name[name] for name in PAIRS[pair])
    with tally.table(pytestconfig, "two calls on one disk") as counts:
        for attempt in range(4):
            disks.prepare(first, path)
            ends = both(lambda: first.act(Preallocator(), str(path)), lambda: second.act(Preallocator(), str(path)))
            with counts.case(pair, attempt, ends):
                if pair != "create_and_create":
                    assert set(ends) <= {0, 2}, "one has failed otherwise than by being refused"
                assert 0 in ends, "neither was done"
                last = second if ends[1] == 0 else first
                disks.require_done(last, path)
                assert names(place) == {"disk"}, names(place)
            for left in place.iterdir():
                left.unlink()


def test_64_disks_at_once(
    by_name: dict[str, Verb], disks: disks_module.Disks, place: pathlib.Path, pytestconfig: pytest.Config
) -> None:
    verbs = [by_name[name] for name in ("rewrite", "recreate", "grow", "create_overlay")] * 16
    paths = [place / f"disk{number}" for number in range(len(verbs))]
    for verb, path in zip(verbs, paths):
        disks.prepare(verb, path)

    with futures.ThreadPoolExecutor(len(verbs)) as pool:
        done = list(pool.map(disks_module.attempt, verbs, paths))

    with tally.table(pytestconfig, "64 disks at once") as counts:
        for verb, path, failed in zip(verbs, paths, done):
            with counts.case(verb, path.name):
                assert failed is None, f"it failed: {failed}"
                disks.require_done(verb, path)
        with counts.case("the folder"):
            assert names(place) == {path.name for path in paths}


# On stable storage.


@pytest.mark.parametrize("name", ["rewrite", "recreate", "create", "create_raw"])
def test_new_file_is_on_stable_storage_before_it_gets_its_name_and_the_name_afterwards(
    by_name: dict[str, Verb], disks: disks_module.Disks, place: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    verb, path, log = by_name[name], place / "disk", tmp_path / "log"
    disks.prepare(verb, path)

    images.run(
        "strace", "-f", "-y", "-qq", "-e", "trace=/^f(data)?sync$|^rename", "-o", log,
        sys.executable, "-W", "ignore", "-m", "imgprealloc.cli", *verb.argv(path),
    )  # fmt: skip

    lines = [line for line in log.read_text().splitlines() if re.search(r"= 0( |$)|resumed", line)]
    temporary = re.escape(TEMPORARY.format("disk"))
    [renamed] = [number for number, line in enumerate(lines) if re.search(rf"rename.*{temporary}", line)]
    files = [number for number, line in enumerate(lines) if re.search(rf"sync\(\d+<[^>]*{temporary}>", line)]
    folders = [number for number, line in enumerate(lines) if re.search(rf"fsync\(\d+<{place}>", line)]
    assert [number for number in files if number < renamed], "\n".join(lines)
    assert [number for number in folders if number > renamed], "\n".join(lines)


# In use, without a lock of QEMU's.

REFUSED = ("rewrite", "recreate", "grow", "grow_raw", "fill_full")
GOES_ON = ("reserve", "fill")


def use(by_name: dict[str, Verb], name: str, path: pathlib.Path) -> None:
    """Do it, in mode full if the name says so."""
    verb = by_name[name.removesuffix("_full")]
    verb.act(Preallocator(mode="full") if name.endswith("_full") else Preallocator(), str(path))


@pytest.fixture(params=[*REFUSED, *GOES_ON])
def name(request: pytest.FixtureRequest) -> str:
    """Give one verb after the other."""
    return str(request.param)


@pytest.fixture
def in_use(by_name: dict[str, Verb], disks: disks_module.Disks, place: pathlib.Path, name: str) -> pathlib.Path:
    """Give the disk that somebody is going to use."""
    disks.prepare(by_name[name.removesuffix("_full")], place / "disk")
    return place / "disk"


def require_left_alone(by_name: dict[str, Verb], disks: disks_module.Disks, name: str, path: pathlib.Path) -> None:
    """Do it while somebody uses the disk: refused, or done without a change of a byte."""
    before = path.stat().st_ino, images.file_digest(path)
    if name in REFUSED:
        with pytest.raises(exceptions.ImageInUse):
            use(by_name, name, path)
    else:
        use(by_name, name, path)
    assert (path.stat().st_ino, images.file_digest(path)) == before
    assert names(path.parent) <= {"disk", "snapshot"}


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_disk_that_another_process_has_open_is_left_alone(
    by_name: dict[str, Verb], disks: disks_module.Disks, in_use: pathlib.Path, name: str, mode: str
) -> None:
    code = "import sys; file = open(sys.argv[1], sys.argv[2] + 'b'); print('open', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, in_use, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            require_left_alone(by_name, disks, name, in_use)
        finally:
            holder.terminate()


def test_disk_that_a_loop_device_has_is_left_alone(
    by_name: dict[str, Verb], disks: disks_module.Disks, in_use: pathlib.Path, name: str
) -> None:
    device = images.run("losetup", "--find", "--show", in_use).strip()
    try:
        require_left_alone(by_name, disks, name, in_use)
    finally:
        images.run("losetup", "--detach", device)


@pytest.mark.parametrize("name", ["grow_raw", "fill", "fill_full"], indirect=True)
def test_disk_that_is_mounted_keeps_what_is_written_to_it(
    by_name: dict[str, Verb], place: pathlib.Path, name: str, tmp_path: pathlib.Path
) -> None:
    disk = images.sparse_file(place / "disk", 16 * MiB)
    images.run("mkfs.ext4", "-q", "-F", disk)
    images.run("mount", "-o", "loop", disk, tmp_path)
    try:
        (tmp_path / "file").write_bytes(b"mine" * 50000)
        verb = by_name[name.removesuffix("_full")]
        strategy = Preallocator(mode="full") if name.endswith("_full") else Preallocator()
        failed: PreallocationError | None = None
        try:
            if verb.name == "grow_raw":
                strategy.resize(disk, 32 * MiB, format="raw")
            else:
                verb.act(strategy, str(disk))
        except PreallocationError as exc:
            failed = exc
    finally:
        images.run("umount", tmp_path)
    assert isinstance(failed, exceptions.ImageInUse) == (name in REFUSED), failed
    images.run("mount", "-o", "loop,ro", disk, tmp_path)
    try:
        assert (tmp_path / "file").read_bytes() == b"mine" * 50000
    finally:
        images.run("umount", tmp_path)


@pytest.mark.parametrize("name", [*REFUSED[:3], "reserve"], indirect=True)
def test_disk_that_a_running_guests_snapshot_stands_on_is_left_alone(
    by_name: dict[str, Verb], disks: disks_module.Disks, in_use: pathlib.Path, name: str, tmp_path: pathlib.Path
) -> None:
    snapshot = images.qcow2(in_use.with_name("snapshot"), disks_module.SIZE, backing=in_use, backing_format="qcow2")
    base = {
        "driver": "qcow2", "node-name": "base", "read-only": True,
        "file": {"driver": "file", "filename": str(in_use)},
    }  # fmt: skip
    top = {
        "driver": "qcow2", "node-name": "top", "backing": "base",
        "file": {"driver": "file", "filename": str(snapshot)},
    }  # fmt: skip
    socket = tmp_path / "nbd"
    guest = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", json.dumps(base), "--blockdev", json.dumps(top),
         "--nbd-server", f"addr.type=unix,addr.path={socket}", "--export", "type=nbd,id=e,node-name=top,writable=on"]
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while not socket.exists():
            assert guest.poll() is None and time.monotonic() < deadline, "it does not start"  # noqa: PT018
            time.sleep(0.02)
        require_left_alone(by_name, disks, name, in_use)
    finally:
        guest.terminate()
        guest.wait()
