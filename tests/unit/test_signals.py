# SPDX-License-Identifier: Apache-2.0
"""An end by a signal."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import pathlib
import signal
import threading
import time
from typing import Any

import fixtures
import pytest

from imgprealloc import cli
from imgprealloc.cli import abreast
from imgprealloc.cli import signals
from imgprealloc.cli import working

from .host import Host

STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Give the handlers back as they were."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    after = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_signal_ends_the_block_with_its_number(number: signal.Signals) -> None:
    with pytest.raises(signals.Stopped) as caught, signals.stopping():
        send(number)

    assert caught.value.number == number
    assert number.name in str(caught.value)


def test_nothing_that_handles_errors_handles_an_end() -> None:
    assert not issubclass(signals.Stopped, Exception)


@pytest.mark.parametrize("number", STOPPING)
def test_those_that_follow_wait_for_the_end(number: signal.Signals) -> None:
    cleaned: list[bool] = []

    def clean() -> None:
        for _ in range(3):
            send(number)
        cleaned.append(True)

    stack = contextlib.ExitStack()
    stack.callback(clean)
    with pytest.raises(signals.Stopped) as caught, signals.stopping(), stack:
        send(signal.SIGTERM)

    assert cleaned == [True]
    assert caught.value.number == signal.SIGTERM


@pytest.mark.parametrize("number", STOPPING)
def test_signal_that_was_ignored_stays_ignored(number: signal.Signals) -> None:
    # As SIGHUP under nohup(1).
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals.stopping():
            send(number)
            assert signal.getsignal(number) is signal.SIG_IGN
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_one_that_comes_before_anything_was_begun_says_so() -> None:
    assert "nothing was begun" in str(signals.Stopped(signal.SIGTERM))


# The command.


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("verb", ["create", "allocate", "resize"])
def test_command_ends_with_128_and_the_number_and_a_line_about_the_disk(
    host: Host, capsys: pytest.CaptureFixture[str], verb: str, number: signal.Signals
) -> None:
    disk = host.path() if verb == "create" else host.raw()
    size = [] if verb == "allocate" else [str(1 << 30)]
    before = host.files
    for program in ("create", "fallocate", "resize"):
        host.then[program] = lambda: send(number)

    status = cli.main([verb, "--disk-format", "raw", disk, *size])

    assert status == 128 + number
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"imgprealloc: stopped by {number.name}: {disk} ")
    # Nothing beside it.
    assert host.files == before


def test_line_of_a_command_for_many_disks_says_how_many_are_done_and_that_all_are_whole(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of which the first cannot be done.
    paths = [host.path("missing"), *(host.raw(name=name) for name in ("one", "two", "three"))]

    def stop_at_the_second() -> None:
        if len(host.run("fallocate")) == 2:
            send(signal.SIGTERM)

    host.then["fallocate"] = stop_at_the_second
    status = cli.main(["allocate", *paths])

    assert status == 128 + signal.SIGTERM
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (f"imgprealloc: stopped by SIGTERM: 1 of 4 disks done; {paths[2]} is as it was; all disks are whole")


@pytest.mark.parametrize("number", STOPPING)
def test_show_of_many_disks_ends_with_one_line_about_the_one_that_was_waited_for(
    host: Host, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    others = set(threading.enumerate())
    goes_on = threading.Event()
    first = threading.Lock()

    def stop() -> None:
        if first.acquire(blocking=False):
            send(number)
        goes_on.wait(20)

    host.then["check"] = stop
    paths = [host.qcow2(name=f"disk{place}", mapped=1) for place in range(20)]

    with fixtures.MockPatchObject(abreast, "cpus", lambda: 2):
        status = cli.main(["show", *paths])
    goes_on.set()
    deadline = time.monotonic() + 20
    while set(threading.enumerate()) - others and time.monotonic() < deadline:
        time.sleep(0.01)

    assert status == 128 + number
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"imgprealloc: stopped by {number.name}: {paths[0]} is as it was"
    assert len(host.run("check")) <= 2


def replaced(disk: pathlib.Path) -> None:
    other = disk.parent / "other"
    other.write_bytes(b"new")
    os.replace(other, disk)


@pytest.mark.parametrize(
    ("make", "change", "became"),
    [
        (lambda disk: None, lambda disk: None, "was not made"),
        (lambda disk: None, lambda disk: disk.touch(), "is made, and whole"),
        (lambda disk: disk.touch(), lambda disk: None, "is as it was"),
        (lambda disk: disk.touch(), replaced, "is done: the new file has its place"),
        (lambda disk: disk.touch(), lambda disk: disk.unlink(), "cannot be looked at any more"),
        (
            lambda disk: disk.touch(),
            lambda disk: os.truncate(disk, 9),
            "has its content, and is not done: what was under way in it has been cut short; give the command again, "
            # As which a growth is refused whose size it has.
            "or, where it has grown to its new size already, imgprealloc allocate",
        ),
    ],
)
def test_line_tells_what_became_of_the_disk(
    tmp_path: pathlib.Path,
    make: Callable[[pathlib.Path], Any],
    change: Callable[[pathlib.Path], Any],
    became: str,
) -> None:
    disk = tmp_path / "disk"
    make(disk)
    before = working._stamp(str(disk))
    change(disk)

    assert working._became(before, working._stamp(str(disk))).startswith(became)
