# SPDX-License-Identifier: Apache-2.0
"""A thread of nova-compute that looks after one thing after the other, again and again, in a small part of its time."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from collections.abc import Mapping
import threading
import time
from typing import Generic, Optional, TypeVar

from oslo_log import log as logging

LOG = logging.getLogger(__name__)

T = TypeVar("T")

# What a round may take of the time until the next.
_SHARE = 0.1


class Rounds(Generic[T]):
    """Goes round, and goes on where the round before had to end.

    :param name: the thread's
    :param interval: seconds from the end of a round to the next
    :param find: lists what there is, by names that stay the same from round to round
    :param look_after: called for each; what it raises ends the round, and is logged
    """

    def __init__(
        self, name: str, interval: float, find: Callable[[], Mapping[str, T]], look_after: Callable[[T], object]
    ) -> None:
        self._name = name
        self._interval = interval
        self._find = find
        self._look_after = look_after
        self._last = ""
        self._stopped = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        """Start the thread, for which nobody waits as the process ends; harmless while it runs."""
        if self._thread is None or not self._thread.is_alive() or self._stopped.is_set():
            # One that was stopped may be in its last round.
            self._stopped = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._stopped,), name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Begin nothing new."""
        self._stopped.set()

    def _run(self, stopped: threading.Event) -> None:
        while not stopped.wait(self._interval):
            self.round(stopped)

    def round(self, stopped: Optional[threading.Event] = None) -> None:
        """Go round once, as far as time allows.

        :param stopped: set by whoever wants no more of it
        """
        deadline = time.monotonic() + self._interval * _SHARE
        try:
            found = self._find()
            names = sorted(found)
            first = bisect.bisect_right(names, self._last)
            for number, name in enumerate(names[first:] + names[:first]):
                if (stopped is not None and stopped.is_set()) or (number and time.monotonic() > deadline):
                    LOG.debug("%s: %d of %d this time", self._name, number, len(names))
                    return
                self._last = name
                self._look_after(found[name])
        except Exception as exc:
            LOG.warning("%s: this round has ended early: %s", self._name, exc)
            LOG.debug("%s: %s", self._name, exc, exc_info=True)
