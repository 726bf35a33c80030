# SPDX-License-Identifier: Apache-2.0
"""imgprealloc check-nova beside a nova-compute that runs, by whatever it was started with.

What runs here has nova-compute's name and words, and sleeps; tools/test-distro has the
real one. A PID namespace keeps it from others that run on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import tools_needed

OURS = "imgprealloc.LibvirtDriver"
STOCK = "libvirt.LibvirtDriver"

# Starts a nova-compute, if there are words for one, waits until it runs, lets something
# happen, and looks.
_LOOK = """
import os, subprocess, sys, time
program, ready, then, *arguments = {started!r}
if program:
    compute = subprocess.Popen([program, ready, *arguments])
    while not os.path.exists(ready):
        time.sleep(0.01)
if then:
    # Later than by the clock's ticks and the second in which the host was booted.
    os.utime(then, (time.time() + 10, time.time() + 10))
status = subprocess.run({command!r}).returncode
if program:
    compute.kill()
    compute.wait()
sys.exit(status)
"""

_COMPUTE = """\
#!{python}
import sys, time
open(sys.argv[1], "w").close()
time.sleep(600)
"""

# Without the services of this machine; without wrapping the table's cells.
_CHECK = """
import sys
from imgprealloc import cli, service
service._UNITS, service._INIT_SCRIPT = (), "none"
sys.exit(cli.main(["check-nova", "--max-width", "0", *sys.argv[1:]]))
"""

_ROWS = """
import json, sys
from imgprealloc import check_nova
print(json.dumps([[found.subject, found.good, found.detail] for found in check_nova.check([], sys.argv[1])]))
"""


class Answer:
    """What the command said, with the rows by their subjects."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        assert done.stdout, done.stderr
        self.status = done.returncode
        self.first = done.stdout.splitlines()[0]
        cells = [
            [cell.strip() for cell in line.split("|")[1:4]] for line in done.stdout.splitlines()[1:] if "|" in line
        ]
        self.rows = {subject: (good == "True", detail) for subject, good, detail in cells[1:]}


@pytest.fixture
def home(tmp_path: pathlib.Path) -> pathlib.Path:
    """A home, which is where Nova looks first for its configuration."""
    path = tmp_path / "home"
    (path / ".nova").mkdir(parents=True)
    return path


@pytest.fixture
def write(home: pathlib.Path, tmp_path: pathlib.Path) -> Callable[[str, str], str]:
    """Write a file of configuration that is good, but for a driver."""

    def write(name: str, driver: str) -> str:
        path = home / ".nova" / name
        path.parent.mkdir(exist_ok=True)
        # Mode full is as good on thin storage.
        path.write_text(
            textwrap.dedent(f"""\
            [DEFAULT]
            compute_driver = {driver}
            preallocate_images = space
            instances_path = {tmp_path}
            [imgprealloc]
            mode = full
            """)
        )
        return str(path)

    return write


@pytest.fixture
def look(home: pathlib.Path, tmp_path: pathlib.Path) -> Callable[..., Answer]:
    """Run check-nova beside a nova-compute.

    :param started: its arguments; None for none
    :param named: those of check-nova
    :param touched: a file that is changed once it runs
    :param python: its interpreter
    """
    tools_needed.require(["unshare"])

    def look(
        started: list[str] | None = None,
        named: list[str] | None = None,
        touched: str = "",
        python: str = sys.executable,
    ) -> Answer:
        program = tmp_path / "nova-compute"
        program.write_text(_COMPUTE.format(python=python))
        program.chmod(0o755)
        ready = str(tmp_path / "ready")
        command = [sys.executable, "-W", "ignore", "-c", _CHECK, *(named or [])]
        words = ["", "", touched] if started is None else [str(program), ready, touched, *started]
        code = _LOOK.format(started=words, command=command)
        done = subprocess.run(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", code],
            env={**os.environ, "HOME": str(home), "OS_NOVA_DISABLE_EVENTLET_PATCHING": "true"},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        return Answer(done)

    return look


def test_running_nova_compute_is_asked_what_it_was_started_with(
    look: Callable[..., Answer], write: Callable[[str, str], str]
) -> None:
    write("nova.conf", OURS)
    stock = write("stock.conf", STOCK)

    answer = look([f"--config-file={stock}"])

    assert answer.status == 1
    assert "NOT" in answer.first
    assert answer.rows["configuration"] == (True, stock)
    assert answer.rows["compute_driver"][0] is False
    assert f"{STOCK}, by {stock}" in answer.rows["compute_driver"][1]


def test_without_one_nova_s_own_places_are_looked_at(
    look: Callable[..., Answer], write: Callable[[str, str], str]
) -> None:
    # The control.
    ours = write("nova.conf", OURS)
    # Or that of a distribution's package would be read, in /etc/nova.
    of_service = write("nova-compute.conf", OURS)
    write("stock.conf", STOCK)

    answer = look()

    assert (answer.status, answer.first) == (0, "Instances will be preallocated.")
    assert answer.rows["configuration"] == (True, f"{ours}, {of_service}")
    assert "no service of it is here" in answer.rows["nova-compute"][1]


def test_drop_in_does_not_count_where_a_file_is_named_that_says_otherwise(
    look: Callable[..., Answer], write: Callable[[str, str], str]
) -> None:
    nova_conf, stock = write("nova.conf", STOCK), write("nova-compute.conf", STOCK)
    drop_in = write("nova-compute.conf.d/ours.conf", OURS)

    named, by_default = look(["--config-file", stock]), look([])

    assert named.status == 1
    assert named.rows["configuration"] == (True, f"{drop_in}, {stock}")
    assert f"{STOCK}, by {stock}; " in named.rows["compute_driver"][1]
    # The control: without that word it does.
    assert by_default.status == 0
    assert by_default.rows["configuration"] == (True, f"{nova_conf}, {stock}, {drop_in}")


def test_several_files_are_read_in_the_order_in_which_they_were_named(
    look: Callable[..., Answer], write: Callable[[str, str], str]
) -> None:
    first, last = write("first.conf", STOCK), write("last.conf", OURS)

    answer = look(["--config-file", first, "--config-file", last])

    assert (answer.status, answer.first) == (0, "Instances will be preallocated.")
    assert answer.rows["configuration"] == (True, f"{first}, {last}")
    assert f"started with --config-file={first} --config-file={last}" in answer.rows["nova-compute"][1]


@pytest.mark.parametrize("is_same", [True, False])
def test_other_files_than_nova_compute_s_are_looked_at_and_never_good(
    look: Callable[..., Answer], write: Callable[[str, str], str], is_same: bool
) -> None:
    ours, theirs = write("ours.conf", OURS), write("theirs.conf", OURS)

    answer = look(["--config-file", ours if is_same else theirs], ["--config-file", ours])

    assert answer.rows["configuration"] == (True, ours)
    assert answer.rows["compute_driver"][0] is True
    assert answer.rows["nova-compute"][0] is is_same
    assert answer.status == int(not is_same)
    assert is_same or f"reads {theirs}" in answer.rows["nova-compute"][1]


def test_file_that_was_changed_since_wants_a_restart(
    look: Callable[..., Answer], write: Callable[[str, str], str]
) -> None:
    ours = write("nova.conf", OURS)

    answer = look([], touched=ours)

    assert answer.status == 0
    assert answer.first == "Instances will be preallocated once nova-compute has been restarted."
    assert ours in answer.rows["restart"][1]


def test_nova_compute_of_another_python_is_no_concern_of_this_one(
    look: Callable[..., Answer], write: Callable[[str, str], str], tmp_path: pathlib.Path
) -> None:
    write("nova.conf", OURS)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "pyvenv.cfg").write_text(f"home = {pathlib.Path(sys.executable).resolve().parent}\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.symlink_to(pathlib.Path(sys.executable).resolve())

    answer = look([], python=str(python))

    assert answer.status == 1
    assert answer.rows["nova-compute"][0] is False
    assert f"run {tmp_path}/venv/bin/imgprealloc" in answer.rows["nova-compute"][1]


@pytest.mark.parametrize(("driver", "good"), [(OURS, True), (STOCK, False)])
def test_unit_is_asked_where_nova_compute_does_not_run(
    write: Callable[[str, str], str], tmp_path: pathlib.Path, driver: str, good: bool
) -> None:
    root = tmp_path / "root"
    (root / "proc" / "self").mkdir(parents=True)
    unit = root / "etc" / "systemd" / "system" / "nova-compute.service"
    unit.parent.mkdir(parents=True)
    named = write("named.conf", driver)
    unit.write_text(f"[Service]\nExecStart={sys.executable} /usr/bin/nova-compute --config-file {named}\n")

    command = [sys.executable, "-W", "ignore", "-c", _ROWS, str(root)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)

    rows: dict[str, Any] = {subject: (good, detail) for subject, good, detail in json.loads(done.stdout)}
    assert rows["configuration"] == (True, named)
    assert f"does not run; {unit} starts it with --config-file={named}" in rows["nova-compute"][1]
    assert rows["compute_driver"][0] is good
