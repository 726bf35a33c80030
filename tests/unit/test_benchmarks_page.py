# SPDX-License-Identifier: Apache-2.0
"""The page of the benchmarks and its plots: what is drawn where, and that they are those of the results beside them."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any
from xml.etree import ElementTree

import costs
import operations
import page
from pairs import Spread
import plots
import pytest
import subjects
import turns

_OURS = subjects.ours("falloc", "unallocated")
_RATES = {subjects.STOCK: [100.0, 100.0], subjects.CONTROL: [90.0, 110.0], _OURS: [50.0, 50.0]}

# As build_time.py tells it.
_DEED = {
    "filesystem": "xfs",
    "deed": "start",
    "disk": "overlay, 40 GiB",
    "stock_seconds": [1, 2],
    "imgprealloc_seconds": [3, 6],
}


def _results(**parts: Any) -> page.Results:
    return page.read(json.dumps({"facts": {"qemu": "7.2.22"}, "form": "in full", **parts}))


def _series() -> dict[str, Any]:
    return dataclasses.asdict(turns.Series("ext4", "QD16", "first writes", "over the base", _RATES))


def test_axis_goes_from_its_start_to_its_end_by_factors() -> None:
    axis = plots.Scale(1, 100, 50, 250)

    assert [axis.position(value) for value in (1, 10, 100)] == pytest.approx([50, 150, 250])


def test_value_beyond_the_axis_is_drawn_at_its_end() -> None:
    axis = plots.Scale(1, 100, 50, 250)

    assert [axis.position(value) for value in (0.001, 1000)] == [50, 250]


def test_axis_upwards_has_the_smaller_values_lower() -> None:
    axis = plots.Scale(1, 4, 300, 100)

    assert axis.position(2) == pytest.approx(200)


def test_axis_has_all_values_and_ends_at_powers() -> None:
    axis = plots.scale([0.3, 3.0], 2, 0, 1)

    assert (axis.lowest, axis.highest) == (0.25, 4)
    assert axis.ticks(2) == [0.25, 0.5, 1, 2, 4]
    # One value alone has an axis, too.
    assert plots.scale([10.0], 10, 0, 1).ticks(10) == [10, 100]


def _circles(drawn: str) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(drawn)
    found = root.iterfind("{http://www.w3.org/2000/svg}circle")
    return [(float(circle.attrib["cx"]), float(circle.attrib["cy"])) for circle in found]


def test_each_median_is_a_dot_at_its_ratio() -> None:
    half, double = Spread(0.5, 0.5, 0.5, 1), Spread(2, 2, 2, 1)

    drawn = plots.dots("title", {"a row": {"slow": half, "fast": double}, "another": {"fast": half}})

    (slow, fast, other), legend = _circles(drawn)[:3], _circles(drawn)[3:]
    assert slow[0] == other[0] < fast[0]
    assert slow[1] < fast[1] < other[1]
    assert len(legend) == 2


def test_spread_is_a_line_from_quartile_to_quartile() -> None:
    drawn = plots.dots("title", {"a row": {"disk": Spread(0.5, 1, 2, 9)}})

    (x, y), _ = _circles(drawn)
    lines = [line.attrib for line in ElementTree.fromstring(drawn).iterfind("{http://www.w3.org/2000/svg}line")]
    (spread,) = (line for line in lines if float(line["y1"]) == float(line["y2"]) == y)
    assert float(spread["x1"]) < x < float(spread["x2"])
    assert x - float(spread["x1"]) == pytest.approx(float(spread["x2"]) - x, abs=0.2)


def test_ten_times_as_many_are_as_far_to_the_right_everywhere() -> None:
    drawn = plots.lines("title", "disks", {"show": [(1, 0.1), (10, 1), (100, 10)]})

    places = _circles(drawn)[:3]
    assert places[0][0] < places[1][0]
    assert places[0][1] > places[1][1]
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.2)
    assert places[0][1] - places[1][1] == pytest.approx(places[1][1] - places[2][1], abs=0.2)


def test_page_has_ratios_goals_losses_and_noise() -> None:
    made = page.page(_results(guest_io=[_series()]))

    assert "100 a second" in made
    assert f"{_OURS}  0.50 (0.50-0.50)\n" in made
    assert "NOT MET in 1 of 1" in made
    assert f"{_OURS}  ext4, QD16: first writes, over the base  0.50 (0.50-0.50)  1.00 (0.95-1.05)\n" in made
    assert "between 1.00 and 1.00, and from quartile to quartile it was mostly 0.10." in " ".join(made.split())
    assert ":qemu: 7.2.22" in made


def test_page_says_what_was_not_measured() -> None:
    made = page.page(_results())

    assert made.count("Not measured in this run.") == 6
    assert "not measured" in made
    assert " met " not in made


def test_page_tells_what_operations_and_sizes_cost() -> None:
    both = operations.Pairs(
        "xfs", "live snapshot", _OURS, [operations.Cost(1, 2**20, 3)], [operations.Cost(2, 2**21, 4)]
    )
    growth = costs.Growth("xfs", "making a disk", "GiB", [(10, 0.25)])

    made = page.page(_results(operations=[dataclasses.asdict(both)], costs=[dataclasses.asdict(growth)]))

    assert f"live snapshot  {_OURS}  1.00 s, 1 MiB, 3  2.00 s, 2 MiB, 4  2.00 (2.00-2.00)" in made
    assert "making a disk  10 GiB  0.250 s" in made


def test_start_that_takes_too_long_misses_its_goal() -> None:
    made = page.page(_results(builds=[{**_DEED, "bar": 1.0}]))

    assert "xfs  start, overlay, 40 GiB  1.500 s     4.500 s      3.00 (3.00-3.00)" in made
    assert re.search(r"\nstart, overlay, 40 GiB: no slower than stock Nova +at most 1.05 +NOT MET in 1 of 1", made)


def test_what_stock_nova_leaves_undone_has_no_goal() -> None:
    made = page.page(_results(builds=[{**_DEED, "deed": "heal", "bar": None}]))

    assert "xfs  heal, overlay, 40 GiB  1.500 s" in made
    assert "heal, overlay, 40 GiB: no slower" not in made


def test_every_plot_that_the_page_shows_is_drawn() -> None:
    growth = costs.Growth("xfs", "making a disk", "GiB", [(10, 0.25), (40, 0.5)])
    results = _results(guest_io=[_series()], costs=[dataclasses.asdict(growth)])

    shown = [line.rpartition("/")[2] for line in page.page(results).splitlines() if line.startswith(".. image::")]

    assert shown == ["ext4-qd16.svg", "growth-gib.svg"]
    assert sorted(page.pictures(results)) == sorted(shown)


def test_page_and_plots_are_those_of_the_results_beside_them() -> None:
    results = page.read(page.RESULTS.read_text())

    assert page.PAGE.read_text() == page.page(results)
    drawn = {path.name: path.read_text() for path in page.PLOTS.glob("*.svg")}
    assert drawn == page.pictures(results)
