# SPDX-License-Identifier: Apache-2.0
"""How far long work has come, for people: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import time
from typing import Optional, TextIO

from imgprealloc.progress import Progress

# Seconds that something may take before anybody wants to know how far it is.
_SHORT = 0.5
# Seconds between two looks of a bar, and between two lines.
_BETWEEN_BARS = 0.1
_BETWEEN_LINES = 10

_WIDTH = 24
_LEAST_COLUMNS = 40

# To the beginning of the line, and clear it.
_CLEAR = "\r\x1b[K"


class ProgressBar:
    """Tells of one disk after the other.

    :param stream: where it is shown, as a bar if that is a terminal
    :param disks: how many there are
    :param readable: makes a size readable
    """

    def __init__(self, stream: TextIO, disks: int, readable: Callable[[float], str]) -> None:
        self._stream = stream
        self._disks = disks
        self._readable = readable
        self._number = 0
        self._is_terminal = stream.isatty()
        self._is_shown = False

    @contextlib.contextmanager
    def of(self, path: str) -> Iterator[Progress]:
        """Give what a verb is to call for a disk as long as the block runs, and take the bar away at its end."""
        self._number += 1
        try:
            yield _Disk(self, path).tell
        finally:
            self.clear()

    def show(self, path: str, done: int, total: int, seconds: float) -> None:
        """Show how far a disk is.

        :param done: bytes, of total
        :param seconds: that they have taken
        """
        text = self._text(path, done, total, seconds)
        if not self._is_terminal:
            self._write(f"imgprealloc: {text}\n")
            return
        columns = max(_LEAST_COLUMNS, self._columns())
        full = done * _WIDTH // total
        bar = f"[{'#' * full}{'.' * (_WIDTH - full)}] "
        if len(bar) + len(text) >= columns:
            bar = ""
        # First, because a signal may come as it is written.
        self._is_shown = True
        # The end tells more than the folder, and the last column would wrap.
        self._write(f"{_CLEAR}{(bar + text)[-(columns - 1) :]}")

    def clear(self) -> None:
        """Take the bar away, for what is to be said in its place."""
        if self._is_shown:
            self._write(_CLEAR)
            self._is_shown = False

    @property
    def interval(self) -> float:
        """Seconds between two times that it is shown."""
        return _BETWEEN_BARS if self._is_terminal else _BETWEEN_LINES

    def _text(self, path: str, done: int, total: int, seconds: float) -> str:
        rate = done / seconds if seconds else 0
        left = f", {_duration((total - done) / rate)} left" if rate else ""
        amounts = f"{self._readable(done)} of {self._readable(total)}, {self._readable(rate)}/s"
        name = path.encode("unicode_escape").decode()
        return f"{name}: disk {self._number} of {self._disks}, {done * 100 // total} %, {amounts}{left}"

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            return 0

    def _write(self, text: str) -> None:
        # Of a terminal that has gone away: the work is worth more than its bar.
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


class _Disk:
    """One disk's work, which may be several pieces, each of which begins at 0."""

    def __init__(self, bar: ProgressBar, path: str) -> None:
        self._bar = bar
        self._path = path
        self._began: Optional[float] = None
        self._shown = 0.0
        self._done = 0

    def tell(self, done: int, total: int) -> None:
        """Show it, where it is time for that."""
        now = time.monotonic()
        if self._began is None or done < self._done:
            # So that a bar comes after half a second, a line not before ten.
            self._began, self._shown = now, now + _SHORT - self._bar.interval if self._bar.interval < _SHORT else now
        self._done = done
        if done >= total:
            self._bar.clear()
        elif now - self._shown >= self._bar.interval:
            self._shown = now
            self._bar.show(self._path, done, total, now - self._began)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
