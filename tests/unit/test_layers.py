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
MODULES = {path.stem: ast.parse(path.read_text()) for path in FOLDER.glob("*.py")}


def imported(tree: ast.Module) -> set[str]:
    """List what a module imports, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def called(tree: ast.Module) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_one_module_starts_programs() -> None:
    starters = {
        name
        for name, tree in MODULES.items()
        if {"processutils.execute", "os.system", "os.popen"} & called(tree)
        or any(module.split(".")[0] == "subprocess" for module in imported(tree))
    }

    assert starters == {"command"}


def test_only_what_nova_loads_and_its_check_import_nova() -> None:
    users = {name for name, tree in MODULES.items() if any(module.split(".")[0] == "nova" for module in imported(tree))}

    assert users == {"nova", "check_nova", "extra_specs"}


@pytest.mark.parametrize(
    "lower",
    ["image", "exceptions", "command", "lock", "qcow2_header", "qemu_img", "fallocate", "filesystem", "reading",
     "replacement", "terms"],
)  # fmt: skip
def test_what_is_below_the_strategy_does_not_know_of_it(lower: str) -> None:
    above = {"preallocator", "opts", "nova", "cli", "check_nova"}

    assert (
        not {module.split(".")[1] for module in imported(MODULES[lower]) if module.startswith("imgprealloc.")} & above
    )


def test_values_and_errors_depend_on_nothing_of_ours() -> None:
    for name in ("image", "exceptions"):
        assert not [module for module in imported(MODULES[name]) if module.startswith("imgprealloc")]


def test_importing_the_library_starts_nothing_and_needs_no_nova() -> None:
    code = (
        "import sys, os; sys.addaudithook(lambda event, _: event in ('subprocess.Popen', 'os.exec', 'os.fork')"
        " and os._exit(3)); import imgprealloc, imgprealloc.opts;"
        "sys.exit(any(name.split('.')[0] in ('nova', 'eventlet') for name in sys.modules))"
    )

    path = os.pathsep.join([str(FOLDER.parent), *sys.path])
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=False)

    assert ended.returncode == 0
