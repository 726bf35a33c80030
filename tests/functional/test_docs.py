# SPDX-License-Identifier: Apache-2.0
"""The documentation's commands, run as a reader would type them, page by page, on a host with two instances.

What is typed is run by a shell, with the folders that a host has put below a
scratch folder. What the pages show of answers is compared but for numbers. Those
that are about services, packages or clouds are not run; tests/unit/test_docs.py
names them.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

import images
import pytest
import rst_blocks

from imgprealloc import Preallocator
from imgprealloc import cli

MiB = 1 << 20

# The instances of the pages: one that stock Nova has made, and one of ours.
_STOCK = "0d7a2c1e-53b7-4e0c-9f52-3b1f0c6d9a11"
_OURS = "5b1c7f42-8d0e-4a63-b1f5-2c9e7a40d386"

# As the pages name them.
_FOLDERS = ("/var/lib/nova", "/var/lib/prometheus/node-exporter")

# What is run: the command, and what the pages do with QEMU's tools beside it.
_RUN = ("imgprealloc ", "sudo -u nova imgprealloc ", "truncate ", "qemu-io ", "qemu-img ")

_PAGES = {
    page.name: commands
    for page in rst_blocks.PAGES
    if (commands := [command for command in rst_blocks.commands(page) if command.typed.startswith(_RUN)])
}


class Reader:
    """Somebody with a shell on a compute node.

    :param scratch: where the node's folders are; what is typed, is in its work/
    :param mount_point: what that is on
    """

    def __init__(self, scratch: pathlib.Path, mount_point: pathlib.Path) -> None:
        self._scratch = scratch
        self._mount_point = mount_point
        self.work = scratch / "work"
        instances = self._place("/var/lib/nova") / "instances"
        for folder in (self.work, scratch / "bin", scratch / ".nova", instances / "_base"):
            folder.mkdir(parents=True)
        self._place("/var/lib/prometheus/node-exporter").mkdir(parents=True)
        (scratch / ".nova" / "nova.conf").write_text(f"[DEFAULT]\ninstances_path = {instances}\n")
        command = scratch / "bin" / "imgprealloc"
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m imgprealloc.cli "$@"\n')
        command.chmod(0o755)
        base = images.random_file(instances / "_base" / "base", 16 * MiB)
        for uuid in (_STOCK, _OURS):
            (instances / uuid).mkdir()
            disk = images.qcow2(instances / uuid / "disk", 256 * MiB, backing=base)
            (instances / uuid / "disk.info").write_text(f'{{"{disk}": "qcow2"}}')
            images.qemu_io(disk, "write -P 0x5a 32M 1M")
        Preallocator().preallocate(instances / _OURS / "disk", "rewrite")

    def types(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line; paths are in its output as the reader knows them."""
        line = line.removeprefix("sudo -u nova ")
        for folder in _FOLDERS:
            line = line.replace(folder, str(self._place(folder)))
        environment = {
            **os.environ,
            "HOME": str(self._scratch),
            "PATH": f"{self._scratch / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))),
        }
        done = subprocess.run(
            line, shell=True, capture_output=True, text=True, check=False, timeout=120, cwd=self.work, env=environment
        )
        return subprocess.CompletedProcess(line, done.returncode, self._named(done.stdout), self._named(done.stderr))

    def _place(self, folder: str) -> pathlib.Path:
        return self._scratch / folder.lstrip("/")

    def _named(self, text: str) -> str:
        return text.replace(str(self._scratch), "").replace(str(self._mount_point), "/var/lib/nova")


def _shape(line: str) -> str:
    """Leave out what differs from host to host: numbers, their units, and the width of columns."""
    line = re.sub(r"\b\d+(?:\.\d+)?(?:B| (?:bytes|[KMGT]iB))?(?![-\w])", "N", line)
    return re.sub(r"-{2,}", "--", " ".join(line.split()))


@pytest.mark.parametrize("page", _PAGES)
def test_commands_of_a_page_do_what_it_says(page: str, folder: pathlib.Path) -> None:
    reader = Reader(folder, folder.parent)

    for command in _PAGES[page]:
        done = reader.types(command.typed)

        told = f"{command.place}: {command.typed}\n{done.stdout}{done.stderr}"
        assert done.returncode in command.ends, told
        if command.shown:
            assert [_shape(line) for line in done.stdout.splitlines()] == [_shape(line) for line in command.shown], told


# Of these the exit status is the answer.
_ENDS = {"check": (0, 1, 2), "check-nova": (0, 1)}

_MANAGER = cli.Imgprealloc().command_manager
# Beside cliff's own.
_VERBS = [name for name, _ in _MANAGER if name not in ("complete", "help")]


@pytest.mark.parametrize("name", _VERBS)
def test_examples_of_a_verb_s_help_can_be_typed(name: str, folder: pathlib.Path) -> None:
    reader = Reader(folder, folder.parent)
    verb: Any = _MANAGER.find_command([name])[0]
    shown = reader.types(f"imgprealloc {name} --help").stdout

    assert verb.examples
    for example in verb.examples:
        assert f"{example.deed}:\n    # {example.typed}\n" in shown
        done = reader.types(example.typed)
        assert done.returncode in _ENDS.get(name, (0,)), f"{example.typed}\n{done.stdout}{done.stderr}"


def test_answer_that_is_another_one_is_seen() -> None:
    assert _shape("| 0d7a2c1e | disk | 256 MiB | thin |  N  |") == "| 0d7a2c1e | disk | N | thin | N |"
    assert _shape("/var/lib/nova: 1 thin; 241.1 MiB short") != _shape("/var/lib/nova: 1 reserved; 241.1 MiB short")


@pytest.mark.parametrize(("page", "disk"), [("README.rst", "data"), ("doc/source/api.rst", "disk")])
def test_python_of_a_page_runs_where_its_commands_were_typed(
    page: str, disk: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(folder, folder.parent)
    for command in _PAGES.get(os.path.basename(page), []):
        reader.types(command.typed)
    monkeypatch.chdir(reader.work)

    for block in rst_blocks.blocks(rst_blocks.REPOSITORY / page, "python"):
        exec(compile(block.text, block.place, "exec"), {})

    assert (reader.work / disk).is_file()
