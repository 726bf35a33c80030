# SPDX-License-Identifier: Apache-2.0
"""How far long work has come, on a terminal and elsewhere; the clock is played."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import io
import os
import time

import fixtures
import pytest

from imgprealloc.cli.disks import Size
from imgprealloc.cli.progress_bar import ProgressBar

MiB = 1 << 20


class Terminal(io.StringIO):
    """A terminal of 80 columns."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    @property
    def line(self) -> str:
        """What stands in its line."""
        return self.getvalue().rpartition("\r\x1b[K")[2]


class Clock(fixtures.Fixture):  # type: ignore[misc]
    """The seconds that have gone by."""

    now = 1000.0

    def _setUp(self) -> None:
        self.useFixture(fixtures.MockPatchObject(time, "monotonic", lambda: self.now))


@pytest.fixture
def clock() -> Iterator[Clock]:
    with Clock() as clock:
        yield clock


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with fixtures.MockPatchObject(os, "get_terminal_size", lambda fd: os.terminal_size((80, 24))):
        yield Terminal()


def bar_on(stream: io.StringIO, disks: int = 1) -> ProgressBar:
    return ProgressBar(stream, disks, lambda size: Size(size).human_readable())


def test_terminal_shows_which_disk_how_much_how_fast_and_how_long_it_will_take(
    clock: Clock, terminal: Terminal
) -> None:
    bar = bar_on(terminal, 3)
    with bar.of("first"):
        pass
    with bar.of("second") as tell:
        tell(0, 100 * MiB)
        clock.now += 5
        tell(20 * MiB, 100 * MiB)
        shown = terminal.line

    assert shown == "second: disk 2 of 3, 20 %, 20 MiB of 100 MiB, 4 MiB/s, 0:00:20 left"


def test_terminal_shows_a_bar_where_there_is_room(clock: Clock, terminal: Terminal) -> None:
    with (
        fixtures.MockPatchObject(os, "get_terminal_size", lambda fd: os.terminal_size((120, 24))),
        bar_on(terminal).of("disk") as tell,
    ):
        tell(0, 100)
        clock.now += 1
        tell(50, 100)
        shown = terminal.line

    assert shown.startswith("[############............] disk: disk 1 of 1, 50 %")


def test_what_is_too_long_for_the_terminal_loses_its_beginning(clock: Clock, terminal: Terminal) -> None:
    with bar_on(terminal).of("/instances/" + "x" * 100) as tell:
        tell(0, 100)
        clock.now += 1
        tell(50, 100)
        shown = terminal.line

    assert len(shown) == 79
    assert shown.endswith("50 %, 50 bytes of 100 bytes, 50 bytes/s, 0:00:01 left")


def test_name_cannot_speak_to_the_terminal(clock: Clock, terminal: Terminal) -> None:
    with bar_on(terminal).of("a\x1b[2Jb") as tell:
        tell(0, 100)
        clock.now += 1
        tell(50, 100)

    assert "\x1b[2J" not in terminal.getvalue()


def test_what_is_done_at_once_has_no_bar(clock: Clock, terminal: Terminal) -> None:
    with bar_on(terminal).of("disk") as tell:
        tell(0, 100)
        clock.now += 0.4
        tell(50, 100)
        tell(100, 100)

    assert terminal.getvalue() == ""


def test_line_is_empty_once_it_is_done_so_that_what_follows_is_not_mixed_up_with_it(
    clock: Clock, terminal: Terminal
) -> None:
    with bar_on(terminal).of("disk") as tell:
        tell(0, 100)
        clock.now += 1
        tell(50, 100)
        tell(100, 100)
        assert terminal.line == ""


def test_line_is_empty_after_an_error_or_a_signal(clock: Clock, terminal: Terminal) -> None:
    shown = []

    def stopped() -> None:
        with bar_on(terminal).of("disk") as tell:
            tell(0, 100)
            clock.now += 1
            tell(50, 100)
            shown.append(terminal.line)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()

    assert shown != [""]
    assert terminal.line == ""


def test_line_is_empty_after_a_signal_that_comes_as_the_bar_is_drawn(clock: Clock) -> None:
    class Signalled(Terminal):
        def flush(self) -> None:
            if self.line:
                raise KeyboardInterrupt

    with fixtures.MockPatchObject(os, "get_terminal_size", lambda fd: os.terminal_size((80, 24))):
        terminal = Signalled()
        with contextlib.suppress(KeyboardInterrupt), bar_on(terminal).of("disk") as tell:
            tell(0, 100)
            clock.now += 1
            tell(50, 100)

    assert ("50 %" in terminal.getvalue(), terminal.line) == (True, "")


def test_second_piece_of_a_disk_s_work_has_its_own_rate(clock: Clock, terminal: Terminal) -> None:
    with bar_on(terminal).of("disk") as tell:
        tell(0, 100)
        clock.now += 100
        tell(100, 100)
        tell(0, 1000)
        clock.now += 1
        tell(500, 1000)
        shown = terminal.line

    assert "500 bytes/s, 0:00:01 left" in shown


def test_elsewhere_there_is_a_line_each_ten_seconds_at_the_most(clock: Clock) -> None:
    stream = io.StringIO()
    with bar_on(stream).of("disk") as tell:
        for second in range(35):
            clock.now = 1000 + second
            tell(second * MiB, 50 * MiB)

    lines = stream.getvalue().splitlines()
    assert [line.partition(" %")[0] for line in lines] == [
        f"imgprealloc: disk: disk 1 of 1, {percent}" for percent in (20, 40, 60)
    ]
    assert lines[0].endswith("10 MiB of 50 MiB, 1 MiB/s, 0:00:40 left")
    assert "\r" not in stream.getvalue()


def test_nothing_that_is_done_within_ten_seconds_has_a_line(clock: Clock) -> None:
    stream = io.StringIO()
    with bar_on(stream).of("disk") as tell:
        for second in range(10):
            clock.now = 1000 + second
            tell(second, 9)

    assert stream.getvalue() == ""


def test_terminal_that_has_gone_away_ends_no_work(clock: Clock) -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    with bar_on(Gone()).of("disk") as tell:
        tell(0, 100)
        clock.now += 1
        tell(50, 100)
        done = True

    assert done
