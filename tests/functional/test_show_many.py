# SPDX-License-Identifier: Apache-2.0
"""The command's look at many disks: what it runs for them, and that nothing of it is left when it is stopped."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import images
import pytest

from functional import processes

MiB = 1 << 20

# Writes down that it was called, and does as the real one; or waits, once it is told to.
_STAND_IN = """#!/bin/sh
echo "$*" >>{folder}/called
while [ -e {folder}/wait ]; do sleep 0.05; done
exec {real} "$@"
"""


class Watched:
    """A folder for the front of PATH, whose qemu-img tells how it is called."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        stand_in = folder / "qemu-img"
        stand_in.write_text(_STAND_IN.format(folder=folder, real=shutil.which("qemu-img")))
        stand_in.chmod(0o755)

    @property
    def called(self) -> list[str]:
        """The sub-commands that were run, in order."""
        called = self.folder / "called"
        return [line.split()[0] for line in called.read_text().splitlines()] if called.exists() else []

    def show(self, *argv: str) -> subprocess.Popen[str]:
        """Start the command."""
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "imgprealloc.cli", "show", *argv],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PATH": path, processes.MARK: str(self.folder)},
        )  # fmt: skip


@pytest.fixture
def watched(tmp_path: pathlib.Path) -> Watched:
    """Give a qemu-img that is watched."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return Watched(folder)


@pytest.fixture
def many(folder: pathlib.Path, base: pathlib.Path) -> list[str]:
    """Give disks as on a host: thin and mapped overlays of two sizes, and raw ones."""
    images.qcow2(folder / "0", 32 * MiB, backing=base)
    images.qcow2(folder / "1", 64 * MiB, backing=base)
    images.qcow2(folder / "2", 32 * MiB, backing=base, preallocation="metadata", extended_l2="on")
    images.sparse_file(folder / "3", 8 * MiB)
    for number in range(4, 24):
        shutil.copy(folder / f"{number % 4}", folder / f"{number}")
    record = {str(folder / f"{number}"): "raw" if number % 4 == 3 else "qcow2" for number in range(24)}
    (folder / "disk.info").write_text(json.dumps(record))
    return list(record)


def test_look_at_a_disk_is_one_qemu_img(watched: Watched, many: list[str]) -> None:
    process = watched.show("-f", "json", *many)
    out, err = process.communicate(timeout=120)

    assert (process.returncode, err) == (0, "")
    assert [disk["path"] for disk in json.loads(out)] == many
    called = watched.called
    assert called.count("check") == 18
    assert set(called) == {"check"}


def test_error_with_one_disk_keeps_the_others_in_their_order(watched: Watched, many: list[str]) -> None:
    os.truncate(many[5], 100)
    os.unlink(many[9])

    process = watched.show("-f", "json", *many)
    out, err = process.communicate(timeout=120)

    assert process.returncode == 1
    rows = json.loads(out)
    assert [row["path"] for row in rows] == many
    assert [row["path"] for row in rows if row["error"]] == [many[5], many[9]]
    assert [line.partition(": ")[0] for line in err.splitlines()] == [many[5], many[9]]


@contextlib.contextmanager
def waiting(watched: Watched, many: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a command whose programs have begun and do not end."""
    (watched.folder / "wait").touch()
    with watched.show(*many) as process:
        try:
            deadline = time.monotonic() + 60
            while len(watched.called) < len(os.sched_getaffinity(0)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_the_command_and_all_its_programs(
    watched: Watched, many: list[str], number: signal.Signals
) -> None:
    with waiting(watched, many) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        left = processes.left_running(str(watched.folder))

    assert (process.returncode, out, left) == (128 + number, "", [])
    assert err == f"imgprealloc: stopped by {number.name}: {many[0]} is as it was\n"
    assert len(watched.called) == len(os.sched_getaffinity(0))


def test_kill_of_the_command_leaves_no_program(watched: Watched, many: list[str]) -> None:
    with waiting(watched, many) as process:
        process.kill()
        process.wait()

        assert processes.left_running(str(watched.folder)) == []
