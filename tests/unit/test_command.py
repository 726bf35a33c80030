# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import fixtures
from oslo_concurrency import processutils
import pytest

from imgprealloc import command
from imgprealloc import exceptions

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
    # Both oslo's wrapper for limits and our own helper are started with -m.
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

    assert programs.calls[0].limits is LIMITS


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


def test_program_that_is_missing_under_oslo_s_own_wrapper_is_told_apart(tmp_path: object) -> None:
    # Not played: how the wrapper ends is oslo.concurrency's to say.
    with (
        fixtures.EnvironmentVariable("PATH", str(tmp_path)),
        pytest.raises(exceptions.ProgramMissing, match="qemu-img could not be started"),
    ):
        command.run(DISK, "qemu-img", "info", DISK, limits=processutils.ProcessLimits(cpu_time=30, address_space=2**30))
