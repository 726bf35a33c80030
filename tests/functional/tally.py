# SPDX-License-Identifier: Apache-2.0
"""Counts of what a table of faults has tried, and what came of it, for the end of pytest's output."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses

import pytest


@dataclasses.dataclass
class Tally:
    """One table's counts: what was tried has held, or something was lost."""

    title: str
    tried: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def case(self, *told: object) -> Iterator[None]:
        """Count a case; what does not hold in the block is kept for the end of the table, with the case's name."""
        self.tried += 1
        try:
            yield
        except AssertionError as exc:
            # What pytest adds to the assertion's own words would fill pages.
            words = str(exc).splitlines() or ["it does not hold"]
            self.lost.append(f"{' '.join(map(str, told))}: {words[0]}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the counts after pytest's own."""
        lost = len(self.lost)
        terminalreporter.write_line(f"{self.title}: {self.tried} tried, {self.tried - lost} held, lost: {lost}")


@contextlib.contextmanager
def table(config: pytest.Config, title: str) -> Iterator[Tally]:
    """Give the counts of the table of that title, and fail if the block has lost anything.

    Tests may share a title; its line is printed once, at the end of the run.
    """
    tally = config.pluginmanager.get_plugin(title)
    if tally is None:
        tally = Tally(title)
        config.pluginmanager.register(tally, title)
    assert isinstance(tally, Tally)
    before = len(tally.lost)
    yield tally
    lost = tally.lost[before:]
    assert not lost, "\n".join(lost)
