# SPDX-License-Identifier: Apache-2.0
"""An end by a signal: programs that we have started end, temporary files go, a line says what became of the disk."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import signal
import types
from typing import Optional

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal has come; not an error, so that nothing but the end of the command handles it.

    :param number: the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.notes: list[str] = []

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}: {'; '.join(self.notes or ['nothing was begun'])}"


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Have the first signal that asks for an end raise Stopped in the block; the next ones wait for its end.

    One that was ignored already, as SIGHUP is under nohup(1), stays ignored.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    heeded = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def stop(number: int, frame: Optional[types.FrameType]) -> None:
        for other in heeded:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
