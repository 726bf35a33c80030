# SPDX-License-Identifier: Apache-2.0
"""Write doc/source/benchmarks.rst, and its plots, from what suite.py has measured.

    python benchmarks/page.py [FILE]

FILE is what suite.py --json wrote; it is kept beside the plots, and is read from
there where none is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys
import textwrap
from typing import Any

import costs
import goals
import operations
from operations import Pairs
import pairs
import phases
import plots
import subjects
import turns

_SOURCE = pathlib.Path(__file__).resolve().parents[1] / "doc" / "source"
PAGE = _SOURCE / "benchmarks.rst"
PLOTS = _SOURCE / "benchmarks"
RESULTS = PLOTS / "results.json"

# What is plotted; the tables have all.
_PLOTTED = (
    subjects.CONTROL,
    subjects.ours("falloc", "unallocated"),
    subjects.ours("falloc", "allocated"),
    subjects.ours("falloc", "copied"),
    subjects.ours("full", "unallocated"),
    subjects.raw("falloc"),
    subjects.raw("full"),
)

_TEXT = """\
==========
Benchmarks
==========

{introduction}

How it is measured
==================

{facts}

* All disks that are compared are there at the same time, on one filesystem on a
  loop device, all of which was written to before. They take turns of some hundred
  requests, in another order each time. Each turn gives one ratio, to what stock
  Nova's disk did in the same turn; told are the median of these ratios and, in
  brackets, their quartiles.
* A disk's first half lies over a base image that is full of data, the second half
  beyond its end. "fsync" is one request at a time, with a flush after each
  write; "QD16" is 16 at a time without. Disks are opened by ``qemu-nbd`` with
  ``cache=none``, and with the ``aio`` that Nova chooses for them.
* "first writes" end before a third of stock Nova's clusters of 64 KiB is there.
  Before "later writes" one block of each of these has been written, so that stock
  Nova's disk allocates no more. "overwrites" go where all has been written.
* "unallocated", "allocated" and "copied" are the values of
  ``overlay_subclusters``.

What is noise
=============

{noise}

Goals
=====

{goals}

Where we lose
=============

Wherever an overlay of imgprealloc's was slower than stock Nova's, in three
quarters of the pairs or more, the worst first; below 1 for a guest's requests a
second, above 1 for the time of an operation of Nova's. Beside it is what stock
Nova's second disk did there: where that is as far from 1, it says nothing.

{losses}

A guest's requests
==================

{guest_io}

Cluster sizes
=============

``overlay_cluster_size``, for overlays whose subclusters are unallocated. A 4 KiB
write to clusters of more than 128 KiB copies the rest of a subcluster from the
base; smaller clusters need more of the map.

{cluster_sizes}

Snapshots and migrations
========================

Of a disk of which a guest has written 16 MiB: medians of the time, of what
reached the filesystem, and of the programs that Nova and imgprealloc started.

{operations}

Builds and starts
=================

By ``benchmarks/build_time.py``, in pairs as well.

{builds}

How the cost grows
==================

{costs}
"""

_INTRODUCTION = (
    "Measured by ``tox -e bench``, {}; ``benchmarks/page.py`` has written this page from what it found. A machine with "
    "disks of its own gives other rates; the ratios are what to look at, and ``tox -e bench -- --short`` gives those "
    "of your host."
)

_NONE = "Not measured in this run."


@dataclasses.dataclass(frozen=True)
class Results:
    """All that was measured, as values."""

    facts: Mapping[str, str]
    form: str
    guest_io: Sequence[turns.Series]
    cluster_sizes: Sequence[turns.Series]
    operations: Sequence[Pairs]
    costs: Sequence[costs.Growth]
    builds: Sequence[Pairs]

    @property
    def all_operations(self) -> list[Pairs]:
        return [*self.builds, *self.operations]


def read(text: str) -> Results:
    """Read what suite.py has written; a part that was left out is empty.

    :raises: KeyError, TypeError for what it cannot have written
    """
    found = json.loads(text)

    def both(row: dict[str, Any]) -> Pairs:
        sides = {side: [operations.Cost(**cost) for cost in row[side]] for side in ("stock", "ours")}
        return Pairs(**{**row, **sides})

    return Results(
        found["facts"],
        found["form"],
        [turns.Series(**row) for row in found.get("guest_io", ())],
        [turns.Series(**row) for row in found.get("cluster_sizes", ())],
        [both(row) for row in found.get("operations", ())],
        [costs.Growth(**row) for row in found.get("costs", ())],
        [_build(row) for row in found.get("builds", ())],
    )


def _build(row: Mapping[str, Any]) -> Pairs:
    """Read what build_time.py tells, which is times alone."""
    stock, ours = (
        [operations.Cost(taken, 0, 0) for taken in row[f"{side}_seconds"]] for side in ("stock", "imgprealloc")
    )
    # An older one has builds alone, and does not say so.
    name = ", ".join(row[key] for key in ("deed", "disk") if key in row)
    return Pairs(row["filesystem"], name, "imgprealloc", stock, ours, barred=row["bar"] is not None)


def page(results: Results) -> str:
    """Make the page."""
    return _TEXT.format(
        introduction=_filled(_INTRODUCTION.format(results.form)),
        facts="\n".join(f":{key}: {value}" for key, value in results.facts.items()),
        noise=_noise(results.guest_io),
        goals=_goals(goals.all_goals(results.guest_io, results.all_operations)),
        losses=_losses(goals.losses(results.guest_io, results.all_operations)),
        guest_io=_guest_io(results.guest_io),
        cluster_sizes=_guest_io_tables(results.cluster_sizes),
        operations=_operations(results.operations),
        builds=_builds(results.builds),
        costs=_costs(results.costs),
    )


def pictures(results: Results) -> dict[str, str]:
    """Draw the plots, by their files' names."""
    drawn = {}
    for (filesystem, load), found in _by_load(results.guest_io).items():
        rows = {
            f"{one.phase}, {one.place}": {
                title: pairs.ratio(one.rates[title], one.rates[subjects.STOCK])
                for title in _PLOTTED
                if title in one.rates
            }
            for one in found
        }
        title = f"{filesystem}, {load}: requests a second, as a multiple of stock Nova's (medians and quartiles)"
        drawn[_file(filesystem, load)] = plots.dots(title, rows)
    for unit, growths in _by_unit(results.costs).items():
        curves = {f"{growth.filesystem}, {growth.title}": growth.points for growth in growths}
        drawn[_file("growth", unit)] = plots.lines(f"seconds, by {unit}", unit, curves)
    return drawn


def _file(*words: str) -> str:
    return "-".join(words).lower() + ".svg"


def _by_load(series: Sequence[turns.Series]) -> dict[tuple[str, str], list[turns.Series]]:
    found: dict[tuple[str, str], list[turns.Series]] = {}
    for one in series:
        found.setdefault((one.filesystem, one.load), []).append(one)
    return found


def _by_unit(growths: Sequence[costs.Growth]) -> dict[str, list[costs.Growth]]:
    found: dict[str, list[costs.Growth]] = {}
    for growth in growths:
        found.setdefault(growth.unit, []).append(growth)
    return found


def _noise(series: Sequence[turns.Series]) -> str:
    twice = [spread for spread in map(goals.noise, series) if spread is not None]
    if not twice:
        return _NONE
    lowest, highest = min(spread.median for spread in twice), max(spread.median for spread in twice)
    middle = pairs.spread([spread.high - spread.low for spread in twice]).median
    return _filled(
        "Stock Nova's disk takes part twice, and ought to be as fast as itself. The medians of its ratios lay between "
        f"{lowest:.2f} and {highest:.2f}, and from quartile to quartile it was mostly {middle:.2f}. What is no further "
        "from 1 than that says nothing."
    )


def _goals(found: Sequence[goals.Goal]) -> str:
    rows = []
    for goal in found:
        bar = "" if goal.bar is None else f"{goal.sense} {goal.bar:g}"
        worst = ("", "") if not goal.cases else (str(goal.worst.ratio), f"{goal.worst.where}; {goal.worst.disk}")
        rows.append((goal.title, bar, goal.verdict, *worst))
    return _table(("goal", "ratio", "verdict", "worst", "there"), rows)


def _losses(found: Sequence[goals.Case]) -> str:
    if not found:
        return "Nowhere in this run."
    rows = [(case.disk, case.where, str(case.ratio), str(case.noise or "")) for case in found]
    return _table(("disk", "where", "ratio", "stock Nova, again"), rows)


def _guest_io(series: Sequence[turns.Series]) -> str:
    pictured = "\n\n".join(f".. image:: benchmarks/{_file(*key)}" for key in _by_load(series))
    return f"{pictured}\n\n{_guest_io_tables(series)}" if series else _NONE


def _guest_io_tables(series: Sequence[turns.Series]) -> str:
    tables = []
    for (filesystem, load), found in _by_load(series).items():
        for place in phases.PLACES:
            here = [one for one in found if one.place == place]
            if here:
                tables.append(f"{filesystem}, {load}, {place}:\n\n{_ratios(here)}")
    return "\n\n".join(tables) or _NONE


def _ratios(series: Sequence[turns.Series]) -> str:
    """Tabulate phases by disks: what stock Nova's did a second, and the others' ratios to it."""
    stock = [f"{pairs.spread(one.rates[subjects.STOCK]).median:.0f} a second" for one in series]
    rows = [(subjects.STOCK, *stock)]
    for title in dict.fromkeys(title for one in series for title in one.rates if title != subjects.STOCK):
        rows.append((title, *(str(pairs.ratio(one.rates[title], one.rates[subjects.STOCK])) for one in series)))
    return _table(("disk", *(one.phase for one in series)), rows)


def _operations(found: Sequence[Pairs]) -> str:
    if not found:
        return _NONE
    rows = [
        (both.filesystem, both.operation, both.disk, operations.told(both.stock), operations.told(both.ours),
         str(operations.seconds(both)))
        for both in found
    ]  # fmt: skip
    return _table(("on", "operation", "disk", "stock Nova", "imgprealloc", "ratio of the times"), rows)


def _builds(found: Sequence[Pairs]) -> str:
    if not found:
        return _NONE
    rows = []
    for both in found:
        medians = (f"{pairs.spread([cost.seconds for cost in side]).median:.3f} s" for side in (both.stock, both.ours))
        rows.append((both.filesystem, both.operation, *medians, str(operations.seconds(both))))
    return _table(("on", "what", "stock Nova", "imgprealloc", "ratio"), rows)


def _costs(found: Sequence[costs.Growth]) -> str:
    if not found:
        return _NONE
    pictured = "\n\n".join(f".. image:: benchmarks/{_file('growth', unit)}" for unit in _by_unit(found))
    rows = [
        (growth.filesystem, growth.title, f"{count:,.0f} {growth.unit}", f"{seconds:.3f} s")
        for growth in found
        for count, seconds in growth.points
    ]
    return f"{pictured}\n\n{_table(('on', 'what', 'of', 'takes'), rows)}"


def _filled(text: str) -> str:
    return textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a simple table; a first cell is never empty, or it would continue the row above."""
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def write(results: Results) -> None:
    """Write the page and its plots, in the place of those that were there."""
    PAGE.write_text(page(results))
    PLOTS.mkdir(exist_ok=True)
    for old in PLOTS.glob("*.svg"):
        old.unlink()
    for name, drawn in pictures(results).items():
        (PLOTS / name).write_text(drawn)


def main(arguments: Sequence[str]) -> int:
    if arguments:
        PLOTS.mkdir(exist_ok=True)
        RESULTS.write_text(pathlib.Path(arguments[0]).read_text())
    write(read(RESULTS.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
