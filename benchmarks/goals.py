# SPDX-License-Identifier: Apache-2.0
"""What imgprealloc is to reach, and whether what was measured has reached it. Also where it loses.

Nothing here measures: a case is a ratio of what was measured side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
from typing import Literal, Optional

import operations
import pairs
from pairs import Spread
import phases
import subjects
import turns

# Rates are better the higher they are, times the lower.
Sense = Literal["at least", "at most"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One ratio, and where it was measured.

    :param noise: what two disks that are alike did there
    """

    where: str
    disk: str
    against: str
    ratio: Spread
    noise: Optional[Spread] = None


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a ratio is to be, in each of its cases.

    :param bar: None where as much as can be had is wanted, and no more is known
    """

    title: str
    sense: Sense
    bar: Optional[float]
    cases: Sequence[Case]

    def is_met_by(self, case: Case) -> bool:
        """Whether the median of a case is where it should be."""
        if self.bar is None:
            return True
        return case.ratio.median >= self.bar if self.sense == "at least" else case.ratio.median <= self.bar

    @property
    def missed(self) -> list[Case]:
        return [case for case in self.cases if not self.is_met_by(case)]

    @property
    def worst(self) -> Case:
        """The case that is furthest from the goal, or nearest to missing it.

        :raises: ValueError where nothing was measured
        """
        chosen = min if self.sense == "at least" else max
        return chosen(self.cases, key=lambda case: case.ratio.median)

    @property
    def verdict(self) -> str:
        """Say in a word whether it is met; what was not measured is not."""
        if not self.cases:
            return "not measured"
        if self.bar is None:
            return "told"
        return "met" if not self.missed else f"NOT MET in {len(self.missed)} of {len(self.cases)}"


def all_goals(series: Sequence[turns.Series], done: Sequence[operations.Pairs]) -> list[Goal]:
    """List the goals, each with its cases."""
    first, beyond = phases.FIRST.title, phases.PLACES[1]

    def unallocated(mode: str, chosen: Iterable[turns.Series]) -> list[Case]:
        return _rates(chosen, subjects.ours(mode, "unallocated"), subjects.STOCK)

    def with_first(load: phases.Load) -> list[turns.Series]:
        return [one for one in series if one.phase == first and one.load == load.title]

    def like_raw(subclusters: str, chosen: Sequence[turns.Series]) -> list[Case]:
        return [
            case
            for mode in ("falloc", "full")
            for case in _rates(chosen, subjects.ours(mode, subclusters), subjects.raw(mode))
        ]

    goals = [
        Goal("copied is as fast as raw, everywhere", "at least", 0.95, like_raw("copied", series)),
        Goal(
            "allocated is as fast as raw, beyond the base",
            "at least", 0.95, like_raw("allocated", [one for one in series if one.place == beyond]),
        ),
    ]  # fmt: skip
    for load, bar in ((phases.QD16, 2.0), (phases.FSYNC, 1.3)):
        cases = [case for mode in ("falloc", "full") for case in unallocated(mode, with_first(load))]
        goals.append(Goal(f"unallocated, first writes, {load.title}: faster than stock Nova", "at least", bar, cases))
    goals += [
        Goal("unallocated, full: nowhere slower than stock Nova", "at least", 0.95, unallocated("full", series)),
        Goal("unallocated, falloc: as little slower as can be had", "at least", None, unallocated("falloc", series)),
    ]
    for name in dict.fromkeys([*(both.operation for both in done if both.barred), *operations.OPERATIONS]):
        here = [both for both in done if both.operation == name]
        given = [_time(both) for both in here if both.barred and not _is_chosen(both)]
        goals.append(Goal(f"{name}: no slower than stock Nova", "at most", 1.05, given))
        told = [_time(both) for both in here if _is_chosen(both)]
        if told:
            goals.append(Goal(f"{name}: the price of allocated and copied", "at most", None, told))
    return goals


def losses(series: Sequence[turns.Series], done: Sequence[operations.Pairs]) -> list[Case]:
    """List where an overlay of imgprealloc's is slower than stock Nova's, the worst first.

    A case counts when three quarters of its pairs say so.
    """
    titles = dict.fromkeys(title for one in series for title in one.rates if title.startswith("imgprealloc"))
    slow = [case for title in titles for case in _rates(series, title, subjects.STOCK) if case.ratio.high < 1]
    late = [case for case in map(_time, done) if case.ratio.low > 1]
    return [
        *sorted(slow, key=lambda case: case.ratio.median),
        *sorted(late, key=lambda case: case.ratio.median, reverse=True),
    ]


def _is_chosen(both: operations.Pairs) -> bool:
    """Whether an operator has chosen what a snapshot or a migration has to copy."""
    return both.disk.endswith((", allocated", ", copied"))


def _rates(series: Iterable[turns.Series], disk: str, against: str) -> list[Case]:
    """Compare two disks in all that both were measured in."""
    return [
        Case(where(one), disk, against, pairs.ratio(one.rates[disk], one.rates[against]), noise(one))
        for one in series
        if disk in one.rates and against in one.rates
    ]


def _time(both: operations.Pairs) -> Case:
    return Case(f"{both.filesystem}, {both.operation}", both.disk, subjects.STOCK, operations.seconds(both))


def noise(one: turns.Series) -> Optional[Spread]:
    """Compare stock Nova's disk with another of its kind, if there is one."""
    if subjects.CONTROL not in one.rates:
        return None
    return pairs.ratio(one.rates[subjects.CONTROL], one.rates[subjects.STOCK])


def where(one: turns.Series) -> str:
    """Say where a series was measured."""
    return f"{one.filesystem}, {one.load}: {one.phase}, {one.place}"
