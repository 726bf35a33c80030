# SPDX-License-Identifier: Apache-2.0
"""The command while it works: a bar on a terminal, none elsewhere, and a priority that lets others go first."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import images
import pytest

from functional.terminal import Terminal
from functional.terminal import argv
from imgprealloc import Pace
from imgprealloc import Preallocator
from imgprealloc import command

MiB = 1 << 20


def test_terminal_has_a_bar_that_is_gone_at_the_end(folder: pathlib.Path) -> None:
    terminal = Terminal(
        "create", "--mode", "full", "--rate", "8M", "--disk-format", "raw", "-f", "json", folder / "disk", "16M",
        columns=200,
    )  # fmt: skip
    out = terminal.end()

    bars = terminal.shown.split("\r\x1b[K")
    assert any(
        re.match(r"\[#+\.+\] .*disk: disk 1 of 1, \d+ %, .* of 16 MiB, .*/s, 0:00:\d\d left$", bar) for bar in bars
    )
    # What is logged stands in its place.
    assert re.match(r".*/disk: mode full, absent before, preallocated now, [\d.]+ s$", terminal.line)
    assert json.loads(out)[0]["state"] == "preallocated"


def test_bar_says_which_of_the_disks_it_is_at(folder: pathlib.Path) -> None:
    for name in ("one", "two"):
        images.random_file(folder / name, 8 * MiB)
        os.truncate(folder / name, 24 * MiB)
    terminal = Terminal(
        "allocate", "--mode", "full", "--rate", "8M", "--disk-format", "raw", folder / "one", folder / "two"
    )
    terminal.until("one: disk 1 of 2")
    terminal.until("two: disk 2 of 2")
    terminal.end()

    assert terminal.process.returncode == 0


def test_rewrite_is_told_of_too(folder: pathlib.Path) -> None:
    base = images.random_file(folder / "base", MiB)
    disk = images.qcow2(folder / "disk", 64 * MiB, backing=base)
    images.qemu_io(disk, "write -P 1 0 24M")
    terminal = Terminal("allocate", "--rewrite", "--rate", "8M", "--disk-format", "qcow2", disk)
    terminal.until(r"disk 1 of 1, [1-9]\d* %")
    terminal.end()

    assert terminal.process.returncode == 0


def test_quiet_command_has_no_bar(folder: pathlib.Path) -> None:
    terminal = Terminal(
        "-q", "create", "--mode", "full", "--rate", "8M", "--disk-format", "raw", folder / "disk", "16M"
    )
    terminal.end()

    assert terminal.shown == ""


def test_elsewhere_there_is_no_bar(folder: pathlib.Path) -> None:
    done = subprocess.run(
        argv("create", "--mode", "full", "--rate", "8M", "--disk-format", "raw", "-f", "json", folder / "disk", "16M"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0
    assert re.fullmatch(r".*/disk: mode full, absent before, preallocated now, [\d.]+ s\n", done.stderr)
    assert json.loads(done.stdout)[0]["state"] == "preallocated"


def test_what_is_written_waits_for_all_others(folder: pathlib.Path) -> None:
    terminal = Terminal("create", "--mode", "full", "--rate", "4M", "--disk-format", "raw", folder / "disk", "64M")
    terminal.until("disk 1 of 1")
    priorities = {
        images.run("ionice", "-p", pid).strip()
        for pid in _children(terminal.process.pid)
        if pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().startswith(os.fsencode(sys.executable))
    }
    terminal.process.send_signal(signal.SIGINT)
    terminal.end()

    assert priorities == {"idle"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_command_that_is_stopped_says_in_one_line_what_was_done_and_that_all_is_whole(
    folder: pathlib.Path, number: signal.Signals
) -> None:
    for name in ("one", "two", "three"):
        images.qcow2(folder / name, 64 * MiB)
    images.qemu_io(folder / "two", "write -P 1 0 60M")
    before = {name: images.digest(folder / name) for name in ("one", "two", "three")}
    terminal = Terminal(
        "allocate", "--rewrite", "--rate", "8M", "--disk-format", "qcow2", folder / "one", folder / "two",
        folder / "three", columns=300,
    )  # fmt: skip
    terminal.until("two: disk 2 of 3")
    terminal.process.send_signal(number)
    terminal.end()

    assert terminal.process.returncode == 128 + number
    assert terminal.line == (
        f"imgprealloc: stopped by {number.name}: 1 of 3 disks done; {folder / 'two'} is as it was; all disks are whole"
    )
    assert {name: images.digest(folder / name) for name in before} == before
    assert Preallocator().inspect(folder / "one", format="qcow2").state == "preallocated"
    assert sorted(os.listdir(folder)) == ["one", "three", "two"]


def _children(pid: int) -> list[int]:
    """List all that a process has started, and what that has started in turn."""
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *_children(child)]
    return found


# The library.


class _Enough(Exception):
    """Raised by a caller who has changed their mind."""


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a program looked at so often that none is through between two looks."""
    monkeypatch.setattr(command, "_BETWEEN_LOOKS", 0.005)


def base_and_disk(folder: pathlib.Path, format: str) -> pathlib.Path:
    """Make a small disk with data in it, which is about to grow much."""
    disk = folder / "disk"
    if format == "raw":
        return images.random_file(disk, 4 * MiB)
    base = images.random_file(folder / "base", 2 * MiB)
    Preallocator().create(disk, 4 * MiB, str(base), backing_format="raw")
    images.qemu_io(disk, "write -P 1 1M 1M")
    return disk


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("pace", [None, Pace()], ids=["by qemu-img", "at a pace"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_caller_is_told_how_far_mode_full_is(folder: pathlib.Path, format: str, pace: Pace | None) -> None:
    told: list[tuple[int, int]] = []
    full = Preallocator("full")

    full.create(folder / "new", 256 * MiB, format=format, progress=lambda *now: told.append(now), pace=pace)
    on_the_way = [done for done, total in told if 0 < done < total]
    told.clear()
    disk = base_and_disk(folder, format)
    full.resize(disk, 256 * MiB, format=format, progress=lambda *now: told.append(now), pace=pace)

    assert on_the_way
    assert [done for done, total in told if 0 < done < total]
    assert all(0 <= done <= total for done, total in told)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("pace", [None, Pace()], ids=["by qemu-img", "at a pace"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_caller_who_raises_ends_a_growth_and_the_disk_is_whole(
    folder: pathlib.Path, format: str, pace: Pace | None
) -> None:
    disk = base_and_disk(folder, format)
    before = images.digest(disk, format)

    def enough(done: int, total: int) -> None:
        if 0 < done < total:
            raise _Enough

    with pytest.raises(_Enough):
        Preallocator("full").resize(disk, 256 * MiB, format=format, progress=enough, pace=pace)

    # A cluster may be leaked, and no more be wrong.
    checked = subprocess.run(["qemu-img", "check", "-q", "-f", format, disk], check=False)
    assert checked.returncode in ((0, 3) if format == "qcow2" else (63,))
    size = images.info(disk, format)["virtual-size"]
    assert size in (4 * MiB, 256 * MiB)
    Preallocator().resize(disk, 512 * MiB, format=format)
    images.run("qemu-img", "resize", "-q", "--shrink", "-f", format, disk, 4 * MiB)
    assert images.digest(disk, format) == before
    assert not [name for name in os.listdir(folder) if "imgprealloc" in name]


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("pace", [None, Pace()], ids=["by qemu-img", "at a pace"])
def test_caller_who_raises_ends_a_creation_and_nothing_is_left(folder: pathlib.Path, pace: Pace | None) -> None:
    def enough(done: int, total: int) -> None:
        if 0 < done < total:
            raise _Enough

    with pytest.raises(_Enough):
        Preallocator("full").create(folder / "disk", 256 * MiB, progress=enough, pace=pace)

    assert os.listdir(folder) == []
