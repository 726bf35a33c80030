# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import fixtures
from oslo_concurrency import processutils
from oslo_utils import units
import pytest

from imgprealloc import command
from imgprealloc import exceptions
from imgprealloc import pace
from imgprealloc import progress

from .host import EDQUOT
from .host import ENOSPC
from .host import Programs

DISK = "/instances/1/disk"
LIMITS = processutils.ProcessLimits(cpu_time=7, address_space=9)


def test_what_the_program_prints_is_returned(programs: Programs) -> None:
    programs.answers["create"] = lambda call: "Formatting"

    assert command.run(DISK, "qemu-img", "create", DISK) == "Formatting"


def test_programs_speak_the_c_locale_and_keep_the_rest_of_the_environment(programs: Programs) -> None:
    with fixtures.EnvironmentVariable("LC_ALL", "de_DE.UTF-8"), fixtures.EnvironmentVariable("TMPDIR", "/scratch"):
        command.run(DISK, "qemu-img", "create", DISK)

    environment = programs.calls[0].kwargs["env_variables"]
    assert (environment["LC_ALL"], environment["TMPDIR"]) == ("C", "/scratch")


def test_no_python_imports_from_where_we_are(programs: Programs) -> None:
    # Our own helpers are started with -m.
    command.run(DISK, "qemu-img", "create", DISK)

    assert programs.calls[0].kwargs["cwd"] == "/"


def test_threads_of_a_program_do_not_take_its_address_space(programs: Programs) -> None:
    command.run(DISK, "qemu-img", "check", DISK, limits=LIMITS)

    assert programs.calls[0].kwargs["env_variables"]["MALLOC_ARENA_MAX"] == "1"


def test_program_is_run_without_a_shell_and_without_root(programs: Programs) -> None:
    command.run(DISK, "qemu-img", "create", "$(reboot)")

    call = programs.calls[0]
    assert call.argv == ("qemu-img", "create", "$(reboot)")
    assert not {"shell", "run_as_root"} & set(call.kwargs)


def test_limits_are_passed_on(programs: Programs) -> None:
    command.run(DISK, "qemu-img", "info", DISK, limits=LIMITS)

    assert programs.calls[0].limits == ("--as=9", "--cpu=7")


def test_limits_are_set_in_the_program_and_nowhere_else() -> None:
    # For real: as prlimit has set them.
    limits = processutils.ProcessLimits(cpu_time=7, address_space=units.Gi, file_size=units.Mi)
    told = {
        line[:26].strip(): line[26:].split()[:2]
        for line in command.run(DISK, "cat", "/proc/self/limits", limits=limits).splitlines()
    }

    assert told["Max cpu time"] == ["7", "7"]
    assert told["Max address space"] == [str(units.Gi)] * 2
    assert told["Max file size"] == [str(units.Mi)] * 2
    assert "1073741824" not in pathlib.Path("/proc/self/limits").read_text()


def test_no_python_is_started_to_set_limits(programs: Programs) -> None:
    command.run(DISK, "qemu-img", "info", DISK, limits=LIMITS)

    assert "prlimit" not in programs.calls[0].kwargs


@pytest.mark.parametrize(
    ("script", "number"),
    [("while :; do :; done", signal.SIGKILL), ("kill -XCPU $$", signal.SIGXCPU), ("kill -SEGV $$", signal.SIGSEGV)],
)
def test_program_that_is_ended_under_its_limits_is_told_with_the_signal(script: str, number: int) -> None:
    # For real: through prlimit and timeout.
    with pytest.raises(exceptions.ProgramKilled, match=f"by signal {int(number)} under its limits"):
        command.run(DISK, "sh", "-c", script, limits=processutils.ProcessLimits(cpu_time=1))


def test_program_that_gets_no_more_memory_fails_by_itself() -> None:
    limits = processutils.ProcessLimits(address_space=100 * units.Mi)

    with pytest.raises(exceptions.CommandFailed, match=r"memory exhausted|annot allocate"):
        command.run(DISK, "dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1", limits=limits)


def test_program_that_prints_more_than_it_may_is_not_ended_for_it() -> None:
    # qemu-img check complains of each leaked cluster, and its answer still counts.
    limits = processutils.ProcessLimits(file_size=units.Mi)

    script = 'complaint=$(printf %2000000s); echo "$complaint" >&2; echo answer'
    # By the shell itself, not by a program that it starts.
    said = command.run(DISK, "sh", "-c", script, limits=limits)

    assert said == "answer\n"


def test_something_else_is_done_while_the_program_runs() -> None:
    # For real: the program waits for what is done meanwhile.
    read, write = os.pipe()
    with os.fdopen(read, "rb"), os.fdopen(write, "wb") as pipe:

        def answer() -> None:
            pipe.write(b"done")
            pipe.close()

        said = command.run(DISK, "head", "-c", "4", f"/proc/{os.getpid()}/fd/{read}", meanwhile=answer)

    assert said == "done"


@pytest.mark.parametrize("status", [0, 1])
def test_what_goes_wrong_meanwhile_is_told_when_the_program_has_ended(programs: Programs, status: int) -> None:
    ended: list[bool] = []
    programs.then["create"] = lambda: ended.append(True)
    programs.ends("create", status)

    def fail() -> None:
        assert not ended
        raise exceptions.BrokenImage(DISK, "broken", "Mend it.")

    with pytest.raises(exceptions.BrokenImage):
        command.run(DISK, "qemu-img", "create", DISK, meanwhile=fail)

    assert ended == [True]


def test_exit_status_that_is_no_failure_returns_what_was_printed(programs: Programs) -> None:
    programs.answers["check"] = lambda call: "{}"
    programs.ends("check", 3)

    assert command.run(DISK, "qemu-img", "check", DISK, exit_codes=(0, 3)) == "{}"


def test_any_other_exit_status_is_a_failure(programs: Programs) -> None:
    programs.ends("check", 3)

    with pytest.raises(exceptions.CommandFailed):
        command.run(DISK, "qemu-img", "check", DISK)


@pytest.mark.parametrize(
    ("why", "error"), [(ENOSPC, exceptions.NoSpace), ("Input/output error", exceptions.CommandFailed)]
)
def test_what_qemu_could_not_write_at_its_end_is_a_failure_with_status_0_too(
    programs: Programs, why: str, error: type[Exception]
) -> None:
    programs.ends("convert", 0, f"qemu-img: Failed to flush the L2 table cache: {why}")

    with pytest.raises(error, match=f"status 0.*L2 table cache: {why}"):
        command.run(DISK, "qemu-img", "convert", DISK)


def test_what_else_a_program_complains_of_with_status_0_is_no_failure(programs: Programs) -> None:
    programs.ends("convert", 0, "qemu-img: warning: something is deprecated")

    command.run(DISK, "qemu-img", "convert", DISK)


def test_failure_tells_program_status_and_what_it_said(programs: Programs) -> None:
    programs.ends("create", 1, "qemu-img: disk: Permission denied\n")

    with pytest.raises(exceptions.CommandFailed) as caught:
        command.run(DISK, "qemu-img", "create", "-f", "raw", DISK)

    assert type(caught.value) is exceptions.CommandFailed
    assert "qemu-img create failed with status 1: qemu-img: disk: Permission denied." in str(caught.value)


def test_failure_is_the_process_error_that_nova_expects(programs: Programs) -> None:
    programs.ends("create", 5, "no\n")

    with pytest.raises(processutils.ProcessExecutionError) as caught:
        command.run(DISK, "qemu-img", "create", DISK)

    error = caught.value
    assert (error.exit_code, error.stderr, error.stdout, error.cmd) == (5, "no", "", f"qemu-img create {DISK}")
    assert isinstance(error.__cause__, processutils.ProcessExecutionError)


@pytest.mark.parametrize("reason", [ENOSPC, EDQUOT])
@pytest.mark.parametrize("program", ["qemu-img", "fallocate", "dd"])
def test_full_filesystem_is_told_apart_whatever_program_meets_it(programs: Programs, program: str, reason: str) -> None:
    programs.ends("create" if program == "qemu-img" else program, 1, f"{program}: {DISK}: {reason}\n")

    with pytest.raises(exceptions.NoSpace) as caught:
        command.run(DISK, program, "create", DISK)

    assert isinstance(caught.value, processutils.ProcessExecutionError)
    assert (caught.value.path, caught.value.exit_code) == (DISK, 1)
    assert reason in str(caught.value.stderr)


def test_program_that_says_nothing_still_makes_an_error(programs: Programs) -> None:
    def mute(*argv: str, **kwargs: object) -> None:
        raise processutils.ProcessExecutionError(stdout=None, stderr=None, exit_code=9, cmd="sync")

    with (
        fixtures.MockPatch("oslo_concurrency.processutils.execute", mute),
        pytest.raises(exceptions.CommandFailed, match="status 9"),
    ):
        command.run(DISK, "sync", DISK)


def test_signal_under_limits_means_that_the_limits_were_reached(programs: Programs) -> None:
    programs.ends("info", -24)

    with pytest.raises(exceptions.ProgramKilled) as caught:
        command.run(DISK, "qemu-img", "info", DISK, limits=LIMITS)

    assert "signal 24" in caught.value.reason
    assert "7 s of CPU time and 9 bytes of memory" in caught.value.reason


def test_signal_without_limits_is_an_ordinary_failure(programs: Programs) -> None:
    programs.ends("create", -15)

    with pytest.raises(exceptions.CommandFailed, match="status -15"):
        command.run(DISK, "qemu-img", "create", DISK)


def test_missing_program_is_named_with_the_packages_to_install(programs: Programs) -> None:
    programs.uninstall("qemu-img")

    with pytest.raises(exceptions.ProgramMissing) as caught:
        command.run(DISK, "qemu-img", "create", DISK)

    assert "qemu-img could not be started: " in caught.value.reason
    assert "qemu-utils" in caught.value.remedy


def test_program_that_is_there_and_fails_under_limits_is_not_missing(programs: Programs) -> None:
    programs.ends("info", 1, "qemu-img: Could not open 'disk': No such file or directory")

    with pytest.raises(exceptions.CommandFailed, match="No such file"):
        command.run(DISK, "qemu-img", "info", DISK, limits=LIMITS)


@contextlib.contextmanager
def installed(folder: pathlib.Path, *programs: str) -> Iterator[None]:
    """Let nothing but these be installed."""
    for program in programs:
        (folder / program).symlink_to(str(shutil.which(program)))
    with fixtures.EnvironmentVariable("PATH", str(folder)):
        yield


# Not played: how timeout and prlimit end is theirs to say.
@pytest.mark.parametrize("limits", [None, processutils.ProcessLimits(cpu_time=30, address_space=2**30)])
@pytest.mark.parametrize(
    ("there", "missing"), [((), "timeout"), (("timeout",), "prlimit"), (("timeout", "prlimit"), "qemu-img")]
)
def test_program_that_is_missing_is_told_apart(
    tmp_path: pathlib.Path, limits: processutils.ProcessLimits | None, there: tuple[str, ...], missing: str
) -> None:
    if limits is None and missing == "prlimit":
        # Nothing wants it.
        missing = "qemu-img"
    with (
        installed(tmp_path, *there),
        pytest.raises(exceptions.ProgramMissing, match=f"{missing} could not be started") as caught,
    ):
        command.run(DISK, "qemu-img", "info", DISK, limits=limits)

    assert caught.value.program == missing


@pytest.mark.parametrize("status", [1, 126, 127])
def test_missing_program_is_told_whatever_status_a_release_of_prlimit_has_for_it(
    programs: Programs, status: int
) -> None:
    programs.uninstall("qemu-img")
    programs.ends("info", status)
    programs.fails_to_start = False

    with pytest.raises(exceptions.ProgramMissing, match="qemu-img could not be started"):
        command.run(DISK, "qemu-img", "info", DISK, limits=LIMITS)


def test_failed_program_is_told_with_the_names_of_the_files_that_it_was_given(
    programs: Programs, tmp_path: pathlib.Path
) -> None:
    with (tmp_path / "disk").open("wb") as file:
        name = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        programs.ends("create", 1, f"qemu-img: {name}: Permission denied")
        with pytest.raises(exceptions.CommandFailed) as caught:
            command.run(DISK, "qemu-img", "create", name)

    assert caught.value.cmd == f"qemu-img create {tmp_path}/disk"
    assert caught.value.stderr == f"qemu-img: {tmp_path}/disk: Permission denied"
    assert "/proc/" not in str(caught.value)


# What they print. For real, as all that follows.


def test_all_of_what_is_printed_is_returned_up_to_a_limit() -> None:
    assert command.run(DISK, "head", "-c", str(units.Mi), "/dev/zero") == "\0" * units.Mi


@pytest.mark.parametrize("status", [0, 3])
def test_flood_is_cut_off_and_takes_no_memory(status: int) -> None:
    # 100 MB of a program's stderr took 829 MiB.
    flood = f"head -c 100M /dev/zero | tr '\\0' x >&2 2>/dev/null; head -c 100M /dev/zero 2>/dev/null; exit {status}"

    tracemalloc.start()
    try:
        if status:
            with pytest.raises(exceptions.CommandFailed) as caught:
                command.run(DISK, "sh", "-c", flood)
            assert len(str(caught.value)) < 5000
            assert len(str(caught.value.stdout)) + len(str(caught.value.stderr)) < 5000
        else:
            assert len(command.run(DISK, "sh", "-c", flood)) <= units.Mi
        assert tracemalloc.get_traced_memory()[1] < 16 * units.Mi
    finally:
        tracemalloc.stop()


def test_what_goes_beyond_the_limit_is_refused_and_held_nowhere() -> None:
    with pytest.raises(exceptions.CommandFailed) as caught:
        command.run(DISK, "sh", "-c", "head -c 2M /dev/zero 2>/dev/null || exit 5")

    assert caught.value.exit_code == 5


def test_of_a_long_complaint_the_end_is_told() -> None:
    with pytest.raises(exceptions.CommandFailed) as caught:
        command.run(DISK, "sh", "-c", "seq 100000 >&2; echo 'No space left' >&2; exit 1")

    assert caught.value.reason.endswith("No space left")
    assert "sh -c failed with status 1: ... " in caught.value.reason


def test_what_is_no_utf_8_is_returned_all_the_same() -> None:
    assert os.fsencode(command.run(DISK, "printf", r"\377")) == b"\xff"


# How they end.


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """Give a program half a second, and one more until it is killed."""
    with fixtures.MockPatchObject(command, "WALL_TIME", 0.5), fixtures.MockPatchObject(command, "_GRACE", 1):
        yield


@pytest.mark.parametrize("limits", [None, processutils.ProcessLimits(cpu_time=30, address_space=2**30)])
@pytest.mark.parametrize("script", ["exec sleep 60", "trap '' TERM; while :; do sleep 0.1; done"])
def test_program_that_never_ends_is_ended(script: str, limits: processutils.ProcessLimits | None) -> None:
    started = time.monotonic()

    with hurried(), pytest.raises(exceptions.ProgramKilled, match="was not done after") as caught:
        command.run(DISK, "sh", "-c", script, limits=limits)

    assert caught.value.path == DISK
    assert time.monotonic() - started < 20


def test_what_has_more_to_write_has_more_time(programs: Programs) -> None:
    command.run(DISK, "sync", DISK, work=units.Ti)
    command.run(DISK, "sync", DISK)

    assert [call.seconds for call in programs.calls] == [600 + units.Ti / (4 * units.Mi), 600]


def until(true: Callable[[], object]) -> None:
    """Wait for something that has to come."""
    ends = time.monotonic() + 20
    while not true():
        assert time.monotonic() < ends, "it has not come"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def sleeper(told: pathlib.Path) -> tuple[str, ...]:
    """Return a program that tells its number and sleeps for longer than a test may take."""
    return "sh", "-c", f"echo $$ >{told}.part && mv {told}.part {told}; exec sleep 300"


def alarm(told: pathlib.Path) -> None:
    until(told.exists)
    signal.setitimer(signal.ITIMER_REAL, 0.2)


class Interrupt(BaseException):
    """What a signal's handler may raise."""


def test_exception_that_comes_meanwhile_ends_the_program(tmp_path: pathlib.Path) -> None:
    told = tmp_path / "told"

    def interrupted() -> None:
        until(told.exists)
        raise Interrupt

    with pytest.raises(Interrupt):
        command.run(DISK, *sleeper(told), meanwhile=interrupted)

    until(lambda: is_gone(int(told.read_text())))


def running(*argv: str) -> list[int]:
    """Return the numbers of the processes with this command line."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        # It may be gone by now.
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().split(b"\0")[:-1] == [os.fsencode(word) for word in argv]:
                found.append(int(process.name))
    return found


def test_program_that_is_just_being_started_is_ended_too() -> None:
    # Seconds that nobody else sleeps for.
    seconds = f"300.{os.getpid()}"
    try:
        for moment in range(200):

            def interrupted(moment: int = moment) -> None:
                time.sleep(moment * 0.00002)
                raise Interrupt

            with pytest.raises(Interrupt):
                command.run(DISK, "sleep", seconds, meanwhile=interrupted)

        until(lambda: not running("sleep", seconds))
    finally:
        for pid in running("sleep", seconds):
            os.kill(pid, signal.SIGKILL)


def test_signal_s_handler_that_raises_ends_the_program(tmp_path: pathlib.Path) -> None:
    told = tmp_path / "told"

    def handler(number: int, frame: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(Interrupt):
            command.run(
                DISK,
                *sleeper(told),
                meanwhile=lambda: alarm(told),
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    until(lambda: is_gone(int(told.read_text())))


@pytest.mark.parametrize("limits", ["None", "processutils.ProcessLimits(cpu_time=30)"])
def test_program_ends_with_the_process_that_has_started_it(tmp_path: pathlib.Path, limits: str) -> None:
    told = tmp_path / "told"
    code = (
        "from oslo_concurrency import processutils; from imgprealloc import command;"
        f"command.run('disk', *{sleeper(told)!r}, limits={limits})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as parent:
        until(told.exists)
        parent.kill()

    until(lambda: is_gone(int(told.read_text())))


def test_program_whose_starter_is_gone_already_does_nothing(tmp_path: pathlib.Path) -> None:
    # Too late to be told of its death.
    with (
        fixtures.MockPatchObject(os, "getppid", lambda: 1),
        pytest.raises(exceptions.ProgramKilled),
    ):
        command.run(DISK, "touch", str(tmp_path / "done"))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limits", ["None", "processutils.ProcessLimits(cpu_time=30)"])
def test_program_that_a_thread_waits_for_ends_with_the_process_too(tmp_path: pathlib.Path, limits: str) -> None:
    told = tmp_path / "told"
    code = (
        "import threading, time; from oslo_concurrency import processutils; from imgprealloc import command;"
        f"threading.Thread(target=command.run, args=('disk', *{sleeper(told)!r}), kwargs=dict(limits={limits}),"
        " daemon=True).start(); time.sleep(300)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ) as parent:
        until(told.exists)
        parent.kill()

    until(lambda: is_gone(int(told.read_text())))


def test_program_leaves_nothing_open() -> None:
    before = os.listdir("/proc/self/fd")

    command.run(DISK, "true")
    with pytest.raises(exceptions.CommandFailed):
        command.run(DISK, "false")

    assert os.listdir("/proc/self/fd") == before


# At a pace, and told.


def test_program_that_writes_much_waits_for_all_others_where_a_pace_is_kept(programs: Programs) -> None:
    command.run(DISK, "qemu-img", "convert", DISK, work=units.Gi)
    with pace.kept(pace.Pace()):
        command.run(DISK, "qemu-img", "convert", DISK, work=units.Gi)
        command.run(DISK, "qemu-img", "check", DISK, limits=LIMITS)

    assert [call.is_idle for call in programs.calls] == [False, True, False]


def test_work_is_done_without_ionice_too(programs: Programs) -> None:
    programs.uninstall("ionice")
    with pace.kept(pace.Pace()):
        command.run(DISK, "qemu-img", "convert", DISK, work=units.Gi)

    assert not programs.calls[0].is_idle


def test_program_that_is_to_be_slow_is_not_ended_for_it(programs: Programs) -> None:
    rate = 100 * units.Ki
    with pace.kept(pace.Pace(rate)):
        command.run(DISK, "qemu-img", "convert", DISK, work=units.Gi)

    assert programs.calls[0].seconds > units.Gi / rate


def test_idle_priority_is_the_program_s_for_real() -> None:
    with pace.kept(pace.Pace()):
        said = command.run(DISK, "sh", "-c", "ionice -p $$", work=1)

    assert said == "idle\n"


@pytest.fixture
def told() -> list[tuple[int, int]]:
    return []


def test_whoever_asks_is_told_what_a_program_prints_percents_of(told: list[tuple[int, int]]) -> None:
    script = 'printf "(25.00/100%%)\r(50.00/100%%)\r"; sleep 1'
    with progress.told_to(lambda *now: told.append(now)):
        command.run(DISK, "sh", "-c", script, told=progress.printed(1000))

    assert told[0] == (0, 1000)
    assert set(told[1:-1]) == {(500, 1000)}
    assert told[-1] == (1000, 1000)


def test_whoever_asks_is_told_how_a_file_grows(tmp_path: pathlib.Path, told: list[tuple[int, int]]) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * units.Mi)
    script = f"head -c {2 * units.Mi} /dev/zero >>{path}; sync {path}; sleep 1"
    with progress.told_to(lambda *now: told.append(now)):
        command.run(DISK, "sh", "-c", script, told=progress.allocated(str(path), 4 * units.Mi))

    assert told[0] == (0, 4 * units.Mi)
    assert (2 * units.Mi, 4 * units.Mi) in told
    assert told[-1] == (4 * units.Mi, 4 * units.Mi)


def test_nobody_is_told_of_what_nobody_asked_for() -> None:
    assert progress.printed(1) is None
    assert progress.allocated(DISK, 1) is None


@pytest.mark.parametrize("ended_by", [ValueError("enough"), KeyboardInterrupt()])
def test_whoever_is_told_can_end_the_program(ended_by: BaseException) -> None:
    def enough(done: int, total: int) -> None:
        raise ended_by

    with pytest.raises(type(ended_by)) as caught, progress.told_to(enough):
        command.run(DISK, "sleep", "3127", told=progress.printed(1))

    assert caught.value is ended_by
    assert not running("sleep", "3127")
