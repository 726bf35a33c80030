# SPDX-License-Identifier: Apache-2.0
"""The house rules that a reader relies on: who starts programs, who knows Nova, who imports whom."""

from __future__ import annotations

import ast
import os
import pathlib
import subprocess
import sys

import pytest

import imgprealloc

FOLDER = pathlib.Path(str(imgprealloc.__file__)).parent
MODULES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in FOLDER.rglob("*.py")
}

# The house: each module stands on those below it, and knows of nothing above.
FLOORS = (
    {"image", "log", "presence", "progress", "pace", "native_thread", "rounds", "instances", "sizes"},
    {"exceptions"},
    {"os_errors", "settings", "layout", "domains", "systemd_unit"},
    {"command", "plan"},
    {"qemu_img", "fallocate", "qcow2_header", "service"},
    {"subclusters", "cluster_map", "refcounts", "worst_case"},
    {"mounts"},
    {"filesystem"},
    {"lock"},
    {"zeros", "disk_file", "giving_back"},
    {"punching"},
    {"promise", "reading", "replacement", "storage"},
    {"backing", "format", "glance"},
    {"placement"},
    {"raw", "qcow2", "record"},
    {"preallocator"},
    {"looks"},
    {"healing", "refilling", "opts", "seams"},
    {"strategies"},
    {"nova", "extra_specs"},
    {"check_nova"},
    {"cli.abreast", "cli.signals", "cli.new_file", "cli.progress_bar", "cli.examples", "cli.by_mount"},
    {"cli.working"},
    {"cli.disks", "cli.request"},
    {"cli.picture", "cli.plans"},
    {"cli.allocate", "cli.check", "cli.metrics", "cli.check_nova", "cli.create", "cli.resize", "cli.show", "cli.thin"},
    {"cli"},
    {"cli.__main__"},
)
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}

# What the package says to its users.
FACADE = "__init__"


def imported(tree: ast.Module) -> set[str]:
    """List what a module imports, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(tree: ast.Module) -> set[str]:
    """List the modules of ours that a module imports, or imports something from."""
    found = set()
    for name in imported(tree):
        package, _, rest = name.partition(".")
        if package == "imgprealloc":
            # The longest part of it that is a module's name.
            parts = rest.split(".") if rest else []
            ends = [end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in MODULES]
            found.add(".".join(parts[: ends[0]]) if ends else FACADE)
    return found


def called(tree: ast.Module) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def users(*calls: str) -> set[str]:
    """List the modules that call one of these."""
    return {name for name, tree in MODULES.items() if set(calls) & called(tree)}


def test_every_module_has_its_floor() -> None:
    assert set(FLOOR_OF) == set(MODULES) - {FACADE}
    assert len(FLOOR_OF) == sum(map(len, FLOORS))


@pytest.mark.parametrize("module", sorted(FLOOR_OF))
def test_module_imports_only_what_is_below_it(module: str) -> None:
    above = {name for name in ours(MODULES[module]) - {FACADE} if FLOOR_OF[name] >= FLOOR_OF[module]}

    assert above == set()


def test_package_s_own_names_are_for_its_users_and_the_command_s_version() -> None:
    assert {name for name, tree in MODULES.items() if FACADE in ours(tree)} == {"cli"}


def test_one_module_starts_programs() -> None:
    starters = users("processutils.execute", "os.system", "os.popen", "subprocess.run", "subprocess.Popen")

    assert starters == {"command"}


def test_one_module_runs_qemu_img() -> None:
    runners = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "command.run"
        and any(isinstance(word, ast.Constant) and word.value == "qemu-img" for word in node.args)
    }

    assert runners == {"qemu_img"}


def test_only_what_nova_loads_and_its_check_import_nova() -> None:
    users = {name for name, tree in MODULES.items() if any(module.split(".")[0] == "nova" for module in imported(tree))}

    assert users == {"nova", "seams", "check_nova", "extra_specs"}


# One room for each question about a disk.


def test_one_module_writes_into_a_disk() -> None:
    assert users("os.pwrite", "os.write", "os.pwritev", "os.sendfile") == {"zeros"}


def test_one_module_removes_disks_one_our_own_files_and_one_puts_in_place_what_the_command_writes() -> None:
    removers = users("os.unlink", "os.remove", "os.rename", "os.replace", "shutil.rmtree")

    assert removers == {"presence", "replacement", "cli.new_file"}


def test_no_module_takes_a_look_that_fails_for_a_disk_that_is_not_there() -> None:
    # False for EIO, ESTALE and EACCES too.
    assert users("os.path.exists", "os.path.lexists", "os.path.isfile") == set()


def test_one_module_asks_who_uses_a_disk() -> None:
    # prctl(2) and ioctl(2) are others.
    assert {name for name in users("fcntl.fcntl") if name != "command"} == {"lock"}
    assert users("fcntl.lockf", "fcntl.flock") == set()


def test_one_module_reads_what_nova_has_noted() -> None:
    readers = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == "disk.info"
    }

    assert readers == {"record"}


def test_one_module_asks_for_holes() -> None:
    assert users("os.lseek") - {"command"} == {"zeros"}


def test_values_depend_on_nothing_of_ours_and_errors_on_what_a_disk_is() -> None:
    for name in FLOORS[0]:
        assert ours(MODULES[name]) == set()
    assert ours(MODULES["exceptions"]) == {"image"}


def test_settings_depend_on_nothing_but_how_sizes_are_written() -> None:
    assert ours(MODULES["settings"]) == {"sizes"}


def test_importing_the_library_starts_nothing_and_needs_no_nova() -> None:
    code = (
        "import sys, os; sys.addaudithook(lambda event, _: event in ('subprocess.Popen', 'os.exec', 'os.fork')"
        " and os._exit(3)); import imgprealloc, imgprealloc.opts;"
        "sys.exit(any(name.split('.')[0] in ('nova', 'eventlet') for name in sys.modules))"
    )

    path = os.pathsep.join([str(FOLDER.parent), *sys.path])
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=False)

    assert ended.returncode == 0
