# SPDX-License-Identifier: Apache-2.0
"""The Debian package and the RPM: what is in them, and where."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest
import tools_needed

_REPOSITORY = pathlib.Path(__file__).parents[2]
_OURS = {
    str(path.relative_to(_REPOSITORY))
    for folder in ("imgprealloc", "nova")
    for pattern in ("*.py", "py.typed")
    for path in (_REPOSITORY / folder).rglob(pattern)
}
_UNITS = {path.name for path in (_REPOSITORY / "contrib" / "systemd").iterdir()}


def _output(*command: str | pathlib.Path) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _built(tool: str, folder: pathlib.Path) -> pathlib.Path:
    [line] = _output(_REPOSITORY / "tools" / tool, folder).splitlines()
    return pathlib.Path(line)


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Build the Debian package; lintian finds no error and no warning, or it is not built."""
    tools_needed.require(["dpkg-buildpackage", "dh", "lintian"])
    return _built("build-deb", tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="module")
def in_deb(deb: pathlib.Path) -> set[str]:
    """The package's files; folders are none."""
    lines = (line.split(maxsplit=5) for line in _output("dpkg-deb", "--contents", deb).splitlines())
    return {words[5].partition(" -> ")[0].removeprefix("./") for words in lines if not words[0].startswith("d")}


@pytest.fixture(scope="module")
def rpm(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Build the RPM."""
    tools_needed.require(["rpmbuild"])
    return _built("build-rpm", tmp_path_factory.mktemp("rpm"))


@pytest.fixture(scope="module")
def in_rpm(rpm: pathlib.Path) -> set[str]:
    """The RPM's files."""
    listed = _output("rpm", "--query", "--list", "--package", rpm).splitlines()
    folders = {line for line in listed if any(other.startswith(f"{line}/") for other in listed)}
    return {line.lstrip("/") for line in listed if line not in folders}


def _below(folder: str, files: set[str]) -> set[str]:
    return {file[len(folder) :] for file in files if file.startswith(folder)}


def _without_metadata(files: set[str]) -> set[str]:
    return {file for file in files if not file.startswith("imgprealloc-")}


def test_deb_has_every_module_where_debian_s_nova_is(in_deb: set[str]) -> None:
    assert _without_metadata(_below("usr/lib/python3/dist-packages/", in_deb)) == _OURS


def test_rpm_has_every_module_where_nova_is(in_rpm: set[str]) -> None:
    assert _without_metadata(_below("usr/lib/python3/site-packages/", in_rpm)) == _OURS


@pytest.mark.parametrize("package", ["in_deb", "in_rpm"])
def test_package_has_the_command_the_units_the_manual_and_the_completion(
    package: str, request: pytest.FixtureRequest
) -> None:
    files: set[str] = request.getfixturevalue(package)

    assert "usr/bin/imgprealloc" in files
    assert _below("usr/lib/systemd/system/", files) == _UNITS
    assert any(re.fullmatch(r"usr/share/man/man1/imgprealloc\.1(\.gz)?", file) for file in files)
    assert "usr/share/bash-completion/completions/imgprealloc" in files


@pytest.mark.parametrize("package", ["in_deb", "in_rpm"])
def test_package_has_nothing_in_etc_and_enables_nothing(package: str, request: pytest.FixtureRequest) -> None:
    files: set[str] = request.getfixturevalue(package)

    assert not {file for file in files if file.startswith(("etc/", "var/")) or ".wants/" in file}


def test_deb_starts_and_enables_nothing_as_it_is_installed(deb: pathlib.Path, tmp_path: pathlib.Path) -> None:
    subprocess.run(["dpkg-deb", "--control", deb, tmp_path], check=True)
    scripts = [path.read_text() for path in tmp_path.iterdir() if path.name in ("preinst", "postinst")]

    assert any("was-enabled 'imgprealloc-allocate.timer'" in script for script in scripts)
    assert not any(re.search(r"deb-systemd-invoke|systemctl", script) for script in scripts)


def test_deb_depends_on_debian_s_nova_and_on_all_that_we_require(deb: pathlib.Path) -> None:
    depends = _output("dpkg-deb", "--field", deb, "Depends")
    required = re.findall(r"^([a-z.-]+)>=", (_REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)

    assert required
    for name in ("nova", *required):
        assert re.search(rf"\bpython3-{re.escape(name)}\b", depends), name


_REMOVED = pytest.mark.parametrize(
    ("package", "argument", "is_stopped"),
    [("deb", "remove", True), ("deb", "upgrade", False), ("rpm", "0", True), ("rpm", "1", False)],
)


@_REMOVED
def test_package_takes_its_timers_with_it_as_it_is_removed(
    package: str, argument: str, is_stopped: bool, request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> None:
    built = request.getfixturevalue(package)
    if package == "deb":
        script = _output("dpkg-deb", "--info", built, "prerm")
    else:
        script = _output("rpm", "--query", "--package", built, "--queryformat", "%{PREUN}")
    log = tmp_path / "log"
    log.touch()
    # Python's is not asked for here; systemd's fail, as they may.
    for program, status in {"deb-systemd-invoke": 1, "systemctl": 1, "py3clean": 0}.items():
        (tmp_path / program).write_text(f'#!/bin/sh\necho "{program} $@" >>{log}\nexit {status}\n')
        (tmp_path / program).chmod(0o755)

    # As if systemd ran.
    script = script.replace("/run/systemd/system", "/")
    subprocess.run(["sh", "-ec", script, "script", argument], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)

    said = [line.split() for line in log.read_text().splitlines() if not line.startswith("py3clean")]
    timers = {unit for unit in _UNITS if unit.endswith(".timer")}
    assert [timers & set(words) for words in said] == ([timers] if is_stopped else [])
    assert all({"stop", "--now"} & set(words) for words in said)
