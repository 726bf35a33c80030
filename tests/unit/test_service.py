# SPDX-License-Identifier: Apache-2.0
"""Who starts nova-compute on a host, and with what: by a /proc, by units and by scripts that are files here."""

from __future__ import annotations

import os
import pathlib
import sys

import fixtures
from oslo_config import cfg
import pytest

from imgprealloc import service

BOOT = 1_700_000_000

DEBIAN = ("--config-file=/etc/nova/nova.conf", "--config-file=/etc/nova/nova-compute.conf")


class Host:
    """A host whose files are below root."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.write("proc/stat", f"cpu 1 2\nbtime {BOOT}\nprocesses 7\n")
        self.write("proc/self/status", "Name:\tx\nNSpid:\t1\n")

    def write(self, path: str, text: str) -> pathlib.Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def runs(
        self,
        *words: str,
        pid: int = 4711,
        parent: int = 1,
        root: str = "",
        namespaces: str = "4711",
        **environment: str,
    ) -> None:
        """Start a program, 30 seconds after the host was booted."""
        folder = f"proc/{pid}"
        self.write(f"{folder}/cmdline", "".join(f"{word}\0" for word in words))
        self.write(f"{folder}/environ", "".join(f"{name}={value}\0" for name, value in environment.items()))
        ticks = 30 * os.sysconf("SC_CLK_TCK")
        self.write(f"{folder}/stat", f"{pid} (a ) b) S {parent} {' '.join(['0'] * 17)} {ticks} 0\n")
        self.write(f"{folder}/status", f"Name:\tx\nNSpid:\t{namespaces}\n")
        (self.root / folder / "cwd").symlink_to("/var/lib/nova")
        (self.root / folder / "root").symlink_to(root or self.root)
        (self.root / folder / "exe").symlink_to("/usr/bin/python3.13")

    def running(self) -> list[service.Invocation]:
        return service.running(str(self.root))

    def unit(self, text: str, name: str = "nova-compute.service") -> None:
        self.write(f"usr/lib/systemd/system/{name}", f"[Service]\n{text}\n")

    def script(self, text: str) -> pathlib.Path:
        path = self.write("etc/init.d/nova-compute", f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def configured(self) -> service.Invocation:
        found = service.configured(str(self.root))
        assert found is not None
        return found


@pytest.fixture
def host(tmp_path: pathlib.Path) -> Host:
    return Host(tmp_path)


# Those that run.


def test_running_one_tells_its_words_its_variables_and_when_it_was_started(host: Host) -> None:
    host.runs("/usr/bin/python3", "/usr/bin/nova-compute", *DEBIAN, "--log-file=/var/log/x", HOME="/var/lib/nova")

    [found] = host.running()

    assert found.configuration == DEBIAN
    assert (found.python, found.prog, found.folder) == ("/usr/bin/python3", "nova-compute", "/var/lib/nova")
    assert found.environment == {"HOME": "/var/lib/nova"}
    assert (found.pid, found.started, found.unknown) == (4711, BOOT + 31, "")


@pytest.mark.parametrize(
    "words",
    [
        ["nova-compute"],
        ["/opt/venv/bin/python3.12", "/opt/venv/bin/nova-compute"],
        ["python3", "-W", "ignore", "-u", "/usr/bin/nova-compute"],
    ],
)
def test_nova_compute_is_known_by_its_program(host: Host, words: list[str]) -> None:
    host.runs(*words)

    assert len(host.running()) == 1


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["tail", "-f", "/var/log/nova/nova-compute.log"],
        ["vi", "/usr/bin/nova-compute"],
        ["sudo", "-u", "nova", "nova-compute"],
        ["/usr/bin/python3", "/usr/bin/nova-api", "nova-compute"],
        ["/usr/bin/python3", "-c", "pass", "nova-compute"],
        ["/usr/bin/python3"],
        ["/usr/bin/python3", "-W"],
    ],
)
def test_what_only_speaks_of_nova_compute_is_not_one(host: Host, words: list[str]) -> None:
    host.runs(*words)

    assert host.running() == []


def test_those_of_containers_and_chroots_are_not_this_host_s(host: Host, tmp_path: pathlib.Path) -> None:
    host.runs("nova-compute", pid=1, root="/usr")
    host.runs("nova-compute", pid=2, namespaces="2\t1")

    assert host.running() == []


def test_child_that_is_about_to_start_a_program_is_not_another_one(host: Host) -> None:
    host.runs("nova-compute", pid=10)
    host.runs("nova-compute", pid=11, parent=10)

    assert [found.pid for found in host.running()] == [10]


def test_process_that_ends_meanwhile_is_none(host: Host) -> None:
    host.runs("nova-compute")
    (host.root / "proc/4711/stat").unlink()

    assert host.running() == []


def test_another_user_s_is_named_with_the_way_out(host: Host) -> None:
    host.runs("nova-compute", *DEBIAN)

    def refused(path: str) -> os.stat_result:
        if str(path).endswith("4711/root"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    real = os.stat
    with fixtures.MockPatchObject(os, "stat", refused):
        [found] = host.running()

    assert found.configuration == DEBIAN
    assert "as nova-compute's user, or as root" in found.unknown


def test_what_runs_and_is_hidden_from_us_keeps_us_from_nothing(host: Host) -> None:
    host.runs("nova-compute", pid=10)
    host.runs("nova-compute", pid=11)
    real = service._read

    def refused(folder: str, name: str) -> str:
        if folder.endswith("/10"):
            raise PermissionError(1, "Operation not permitted", folder)
        return real(folder, name)

    with fixtures.MockPatchObject(service, "_read", refused):
        assert [found.pid for found in host.running()] == [11]


def test_interpreter_is_looked_for_where_the_process_would(host: Host, tmp_path: pathlib.Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "python3").symlink_to(sys.executable)
    host.runs("python3", "/usr/bin/nova-compute", PATH=f"/nowhere:{tmp_path}/venv")

    [found] = host.running()

    assert found.python == f"{tmp_path}/venv/python3"


# Those that would be started.


def test_host_without_a_service_has_none(host: Host) -> None:
    assert service.configured(str(host.root)) is None


@pytest.mark.parametrize("name", ["nova-compute.service", "openstack-nova-compute.service", "devstack@n-cpu.service"])
def test_unit_tells_what_it_starts(host: Host, name: str) -> None:
    host.unit("User=root\nWorkingDirectory=~\nExecStart=/usr/bin/nova-compute --config-file nova-cpu.conf", name)

    found = host.configured()

    assert found.configuration == ("--config-file=/root/nova-cpu.conf",)
    assert found.environment == {"HOME": "/root"}
    assert found.told_by.endswith(f"/usr/lib/systemd/system/{name}")
    assert (found.pid, found.started, found.unknown) == (None, None, "")


def test_script_of_the_unit_names_its_python(host: Host) -> None:
    program = host.write("opt/nova-compute", "#!/opt/venv/bin/python3 -I\n")
    python = host.write("opt/python3", "")
    python.chmod(0o755)
    program.write_text(f"#!{python} -I\n")
    host.unit(f"ExecStart={program}")

    assert host.configured().python == str(python)


# Of openstack-pkg-tools, as far as it matters.
DEBIANS_SCRIPT = """
PROJECT_NAME=nova
NAME=nova-compute
DAEMON=/usr/bin/nova-compute
DAEMON_ARGS="--config-file=/etc/nova/nova-compute.conf"
[ -n "${CONFIG_FILE}" ] || CONFIG_FILE=/etc/nova/nova.conf
DAEMON_ARGS="--config-file=${CONFIG_FILE} ${DAEMON_ARGS} --log-file=/var/log/nova/nova-compute.log"
case "$1" in
systemd-start)
    exec $DAEMON $DAEMON_ARGS ;;
show-args)
    echo $DAEMON $DAEMON_ARGS ;;
esac
"""


def test_script_that_the_unit_calls_is_asked(host: Host) -> None:
    host.unit("User=root\nExecStart=/etc/init.d/nova-compute systemd-start")
    script = host.script(DEBIANS_SCRIPT)

    # Its own are not the service's.
    with fixtures.EnvironmentVariable("CONFIG_FILE", "/tmp/mine.conf"):
        found = host.configured()

    assert found.configuration == DEBIAN
    assert str(script) in found.told_by
    assert "nova-compute.service" in found.told_by
    assert found.unknown == ""


def test_script_without_a_unit_is_asked(host: Host) -> None:
    host.script(DEBIANS_SCRIPT)

    assert host.configured().configuration == DEBIAN


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exec nova-compute", "does not tell what it starts"),
        ("case $1 in show-args) echo nova-api ;; esac", "does not tell what it starts"),
        ("case $1 in show-args) exit 5 ;; esac", "status 5"),
    ],
)
def test_script_that_does_not_tell_is_named_with_the_way_out(host: Host, script: str, reason: str) -> None:
    host.script(script)

    unknown = host.configured().unknown

    assert reason in unknown
    assert "/etc/init.d/nova-compute" in unknown
    assert "--config-file" in unknown


@pytest.mark.parametrize("command", ["/usr/local/bin/start-nova", "", "'unclosed"])
def test_unit_that_does_not_tell_is_named_with_the_way_out(host: Host, command: str) -> None:
    host.unit(f"ExecStart=/usr/bin/docker start nova_compute\nExecStart={command or chr(34) * 2}")

    unknown = host.configured().unknown

    assert "nova-compute.service" in unknown
    assert "--config-file" in unknown


# What it reads.


@pytest.fixture
def files(tmp_path: pathlib.Path) -> pathlib.Path:
    """A home with all the places that oslo.config looks at."""
    home = tmp_path / "home"
    (home / "nova.conf.d").mkdir(parents=True)
    (home / "nova-compute.conf.d").mkdir()
    for name in (
        "nova.conf",
        "nova-compute.conf",
        "nova.conf.d/b.conf",
        "nova.conf.d/a.conf",
        "nova-compute.conf.d/c.conf",
    ):
        (home / name).write_text(f"[DEFAULT]\nhost = {name}\n")
    return home


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        (
            [],
            [
                "nova.conf",
                "nova-compute.conf",
                "nova.conf.d/a.conf",
                "nova.conf.d/b.conf",
                "nova-compute.conf.d/c.conf",
            ],
        ),
        (
            ["--config-file", "nova.conf", "--config-file=nova-compute.conf"],
            [
                "nova.conf.d/a.conf",
                "nova.conf.d/b.conf",
                "nova-compute.conf.d/c.conf",
                "nova.conf",
                "nova-compute.conf",
            ],
        ),
        (["--config-dir=nova.conf.d"], ["nova.conf", "nova-compute.conf", "nova.conf.d/a.conf", "nova.conf.d/b.conf"]),
        (
            ["--config-dir", "nova.conf.d", "--debug", "--config-file", "nova.conf"],
            ["nova.conf.d/a.conf", "nova.conf.d/b.conf", "nova.conf"],
        ),
    ],
)
def test_files_are_those_that_oslo_config_reads_and_the_last_counts(
    files: pathlib.Path, arguments: list[str], read: list[str]
) -> None:
    started = service.Invocation(
        arguments=tuple(arguments), environment={"HOME": str(files)}, folder=str(files), program="/usr/bin/nova-compute"
    )
    conf = cfg.ConfigOpts()
    conf.register_opt(cfg.StrOpt("host"))

    with started.surroundings():
        conf(list(started.configuration), project="nova", prog=started.prog)
        found = started.files_read(conf)

    assert [os.path.relpath(file, files) for file in found] == read
    assert conf.host == read[-1]


def test_service_s_variables_count_and_ours_do_not() -> None:
    started = service.Invocation(environment={"OS_DEFAULT__HOST": "theirs", "PATH": "/theirs", "HOME": "/theirs"})

    with fixtures.EnvironmentVariable("OS_LIBVIRT__VIRT_TYPE", "ours"):
        before = dict(os.environ)
        with started.surroundings():
            within = dict(os.environ)
        assert dict(os.environ) == before

    assert (within["OS_DEFAULT__HOST"], within["HOME"], within["PATH"]) == ("theirs", "/theirs", before["PATH"])
    assert "OS_LIBVIRT__VIRT_TYPE" not in within


def test_environment_of_a_python_is_its_virtual_one_or_its_prefix(tmp_path: pathlib.Path) -> None:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)

    assert service.environment_of(str(tmp_path / "venv" / "bin" / "python")) == str(tmp_path / "venv")
    assert service.environment_of(os.path.realpath(sys.executable)) == os.path.realpath(sys.base_prefix)


# Which of them counts.


def test_running_one_counts_before_its_unit_and_that_before_nothing(host: Host) -> None:
    assert service.found(str(host.root)) == service.Invocation()

    host.unit("ExecStart=/usr/bin/nova-compute")
    assert service.found(str(host.root)).told_by.endswith("nova-compute.service")

    host.runs("nova-compute")
    assert service.found(str(host.root)).pid == 4711
