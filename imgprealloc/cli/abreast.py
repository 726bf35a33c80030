# SPDX-License-Identifier: Apache-2.0
"""Several disks at a time, told in the order that was asked for. For looks alone: what writes takes its turn."""

from __future__ import annotations

import collections
from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterable
import functools
import os
import threading
from typing import Generic, Optional, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# For each that is worked on, so that one that takes long does not keep the others waiting; no more, because there
# may be 100,000.
_BEGUN = 4


def cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(
    work: Callable[[_Item], _Result], items: Iterable[_Item], at_once: int = 1
) -> Generator[Callable[[], _Result], None, None]:
    """Work on each item, and yield for each, in their order, what waits for its result or raises its error.

    With at_once of 1 the work is done by whoever calls what is yielded. Once the
    generator is closed, no more work is begun.
    """
    if at_once <= 1:
        for item in items:
            yield functools.partial(work, item)
        return
    turns = _Turns(at_once)
    begun: collections.deque[_Piece[_Item, _Result]] = collections.deque()
    try:
        for item in items:
            begun.append(_Piece(work, item, turns))
            if len(begun) == _BEGUN * at_once:
                yield begun.popleft().result
        while begun:
            yield begun.popleft().result
    finally:
        turns.over = True


class _Turns(threading.BoundedSemaphore):
    """Who may work now."""

    over = False


class _Piece(threading.Thread, Generic[_Item, _Result]):
    """The work on one item."""

    def __init__(self, work: Callable[[_Item], _Result], item: _Item, turns: _Turns) -> None:
        # A daemon, because a command that is stopped waits for no filesystem;
        # its program ends with it, by its parent's death.
        super().__init__(daemon=True)
        self._work, self._item, self._turns = work, item, turns
        self._result: list[_Result] = []
        self._error: Optional[BaseException] = None
        self.start()

    def run(self) -> None:
        with self._turns:
            if self._turns.over:
                return
            try:
                self._result.append(self._work(self._item))
            except BaseException as exc:
                self._error = exc

    def result(self) -> _Result:
        """Wait for the end of it."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._result[0]
