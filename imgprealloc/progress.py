# SPDX-License-Identifier: Apache-2.0
"""How far long work has come: told to whoever asked a verb for it, wherever the work is done."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import contextvars
import dataclasses
import os
import re
from typing import Optional

Progress = Callable[[int, int], object]
"""Called with the bytes that are done, and those that there are."""

_asked: contextvars.ContextVar[Optional[Progress]] = contextvars.ContextVar("progress", default=None)

# As qemu-img -p prints it, over and over in the same line.
_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")

# So seldom does a process of ours print it, of which a MiB is kept.
_LEAST_STEP = 0.001


class _Ended(Exception):
    """What a caller has raised, who was told; none of our errors, and not to be taken for one.

    :param cause: that
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program has to do, and how it is seen how much of that is done.

    :param total: bytes
    :param done: returns how many of them are done, of what the program has
        printed; None where nothing tells yet
    """

    total: int
    done: Callable[[bytes], Optional[int]]


def printed(total: int) -> Optional[Work]:
    """Describe the work of a program that prints percents of total bytes; None where nobody asked."""
    if not is_asked_for():
        return None

    def done(said: bytes) -> Optional[int]:
        found = _PERCENT.findall(said)
        return int(float(found[-1]) / 100 * total) if found else None

    return Work(total, done)


def allocated(name: str, total: int) -> Optional[Work]:
    """Describe the work of a program that prints nothing, and gives a file total bytes more than it has now.

    :param name: by which the file can be found
    :returns: None where nobody asked
    """
    if not is_asked_for():
        return None
    before = _blocks(name)

    def done(said: bytes) -> Optional[int]:
        now = _blocks(name)
        return None if now is None or before is None else min(max(0, now - before), total)

    return Work(total, done)


def _blocks(name: str) -> Optional[int]:
    try:
        return os.stat(name).st_blocks * 512
    except OSError:
        # A bar is not worth an error.
        return None


class Printer:
    """Prints percents as printed() reads them; the other end of it, for a process of ours."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._told = 0

    def tell(self, done: int) -> None:
        """Print how many bytes are done, where that is more than was told by more than a little."""
        if done - self._told > self._total * _LEAST_STEP:
            self._told = done
            print(f"({done / self._total * 100:.2f}/100%)", flush=True)


@contextlib.contextmanager
def told_to(progress: Optional[Progress]) -> Iterator[None]:
    """Tell a caller of all long work in the block; None where nobody asked.

    :raises: what they raise
    """
    token = _asked.set(progress)
    try:
        yield
    except _Ended as ended:
        raise ended.cause from None
    finally:
        _asked.reset(token)


def is_asked_for() -> bool:
    """Whether anybody wants to know."""
    return _asked.get() is not None


def tell(done: int, total: int) -> None:
    """Say how far it has come, in bytes."""
    progress = _asked.get()
    try:
        if progress is not None:
            progress(done, total)
    except Exception as exc:
        raise _Ended(exc) from exc
