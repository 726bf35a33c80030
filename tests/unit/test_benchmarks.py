# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks compute: ratios and their spread, where phases are, which goals are met, where we lose."""

from __future__ import annotations

import pathlib
import types
from typing import Any

import goals
import operations
from operations import Cost
from operations import Pairs
import pairs
from pairs import Spread
import phases
import pytest
import subjects
from turns import Series

from imgprealloc import Preallocator

_GIB = 1024**3


def test_ratio_is_the_median_of_the_pairs_and_not_the_ratio_of_medians() -> None:
    # The machine was ten times as fast in the last turn.
    assert pairs.ratio([10, 40, 300], [20, 20, 200]).median == 1.5
    assert pairs.ratio([10, 40, 1000], [10, 20, 2000]).median == 1.0


def test_half_of_the_values_lie_within_the_spread() -> None:
    assert pairs.spread([5, 1, 4, 2, 3]) == Spread(2, 3, 4, 5)


def test_one_value_is_its_own_spread() -> None:
    assert pairs.spread([7.5]) == Spread(7.5, 7.5, 7.5, 1)


def test_values_without_partners_are_refused() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        pairs.ratio([1, 2], [1])
    with pytest.raises(ValueError, match="nothing"):
        pairs.ratio([], [])


def test_parts_of_a_disk_do_not_overlap_and_keep_to_their_half() -> None:
    parts = (phases.RANDOM, phases.SEQUENTIAL, phases.SMALL)

    areas = sorted(phases.area(part, place, _GIB) for part in parts for place in phases.PLACES)

    assert areas[0][0] == 0
    assert [start + length for start, length in areas] == [start for start, _ in areas[1:]] + [_GIB]
    assert _GIB // 2 in [start for start, _ in areas]


def test_first_writes_of_all_turns_leave_two_thirds_of_stock_novas_clusters() -> None:
    clusters = phases.area(phases.RANDOM, "over the base", _GIB)[1] // phases.STOCK_CLUSTER

    writes = 3 * phases.requests(phases.FIRST, phases.QD16, _GIB, 3, 10_000)

    assert clusters / 3 - 3 <= writes <= clusters / 3


def test_turn_of_many_at_a_time_has_more_requests_and_no_turn_has_more_than_wanted() -> None:
    assert phases.requests(phases.FIRST, phases.FSYNC, _GIB, 3, 100) == 100
    assert phases.requests(phases.FIRST, phases.QD16, _GIB, 3, 100) == 400
    assert phases.requests(phases.READS, phases.QD16, _GIB, 3, 100) == 400


def test_sequential_writes_of_all_turns_fill_their_part() -> None:
    length = phases.area(phases.SEQUENTIAL, "over the base", _GIB)[1]

    assert 4 * phases.requests(phases.SEQUENTIAL_FIRST, phases.QD16, _GIB, 4, 500) * 65536 == length


def _series(phase: str = "first writes", load: str = "QD16", place: str = "over the base", **rates: float) -> Series:
    """Return what was measured, in turns that were all alike."""
    names = {
        "stock": subjects.STOCK,
        "raw": subjects.raw("falloc"),
        "raw_full": subjects.raw("full"),
        "unallocated": subjects.ours("falloc", "unallocated"),
        "full": subjects.ours("full", "unallocated"),
        "allocated": subjects.ours("falloc", "allocated"),
        "copied": subjects.ours("falloc", "copied"),
    }
    return Series("ext4", load, phase, place, {names[name]: [rate] * 3 for name, rate in rates.items()})


def _pairs(operation: str, stock: float, ours: float) -> Pairs:
    return Pairs("ext4", operation, subjects.ours("falloc", "unallocated"), [Cost(stock, 1, 1)], [Cost(ours, 1, 1)])


def _verdict(title: str, *series: Series, done: tuple[Pairs, ...] = ()) -> str:
    (goal,) = (goal for goal in goals.all_goals(series, done) if goal.title.startswith(title))
    return goal.verdict


@pytest.mark.parametrize(
    ("title", "good", "bad"),
    [
        ("copied", {"raw": 100, "copied": 95}, {"raw": 100, "copied": 94}),
        ("allocated", {"place": "beyond the base", "raw": 100, "allocated": 95},
         {"place": "beyond the base", "raw": 100, "allocated": 94}),
        ("unallocated, first writes, QD16", {"stock": 100, "unallocated": 200}, {"stock": 100, "unallocated": 199}),
        ("unallocated, first writes, QD16", {"stock": 100, "full": 200}, {"stock": 100, "full": 199}),
        ("unallocated, first writes, fsync", {"load": "fsync", "stock": 100, "unallocated": 130},
         {"load": "fsync", "stock": 100, "unallocated": 129}),
        ("unallocated, full", {"phase": "reads", "stock": 100, "full": 95},
         {"phase": "reads", "stock": 100, "full": 94}),
    ],
)  # fmt: skip
def test_goal_is_met_at_its_bar_and_not_below(title: str, good: dict[str, Any], bad: dict[str, Any]) -> None:
    assert _verdict(title, _series(**good)) == "met"
    assert _verdict(title, _series(**good), _series(**bad)) == "NOT MET in 1 of 2"


def test_operation_may_take_a_twentieth_longer() -> None:
    good, bad = _pairs("live snapshot", 1, 1.05), _pairs("live snapshot", 1, 1.06)

    assert _verdict("live snapshot", done=(good,)) == "met"
    assert _verdict("live snapshot", done=(good, bad)) == "NOT MET in 1 of 2"
    assert {operation: _verdict(operation, done=(good,)) for operation in operations.OPERATIONS} == {
        "live snapshot": "met",
        "cold snapshot": "not measured",
        "block migration": "not measured",
    }


@pytest.mark.parametrize("subclusters", ["allocated", "copied"])
def test_what_an_operator_has_chosen_has_its_price_told_apart(subclusters: str) -> None:
    dear = Pairs("ext4", "live snapshot", subjects.ours("falloc", subclusters), [Cost(1, 1, 1)], [Cost(3, 1, 1)])

    assert _verdict("live snapshot: no slower", done=(dear, _pairs("live snapshot", 1, 1))) == "met"
    assert _verdict("live snapshot: the price", done=(dear,)) == "told"


def test_what_was_not_measured_is_not_met() -> None:
    assert {goal.verdict for goal in goals.all_goals([], [])} == {"not measured"}


def test_what_is_beyond_the_base_alone_is_not_asked_of_what_lies_over_it() -> None:
    assert _verdict("allocated", _series(raw=100, allocated=10)) == "not measured"


def test_goal_without_a_bar_tells_its_worst_case() -> None:
    found = goals.all_goals([_series(stock=100, unallocated=300), _series("reads", stock=100, unallocated=60)], [])
    (goal,) = (goal for goal in found if goal.title.startswith("unallocated, falloc"))

    assert goal.verdict == "told"
    assert (goal.worst.where, goal.worst.ratio.median) == ("ext4, QD16: reads, over the base", 0.6)


def test_losses_are_told_worst_first_and_raw_disks_are_none_of_ours() -> None:
    series = [
        _series("reads", stock=100, unallocated=90, raw=10),
        _series("overwrites", stock=100, unallocated=50, copied=101),
    ]

    found = goals.losses(series, [_pairs("cold snapshot", 1, 2), _pairs("live snapshot", 1, 0.5)])

    assert [(case.where, case.ratio.median) for case in found] == [
        ("ext4, QD16: overwrites, over the base", 0.5),
        ("ext4, QD16: reads, over the base", 0.9),
        ("ext4, cold snapshot", 2.0),
    ]


def test_loss_in_less_than_three_quarters_of_the_pairs_is_not_told() -> None:
    one = Series("ext4", "QD16", "reads", "over the base",
                 {subjects.STOCK: [100] * 4, subjects.ours("falloc", "copied"): [50, 60, 90, 200]})  # fmt: skip

    assert goals.losses([one], []) == []


def test_titles_of_the_disks_are_distinct() -> None:
    def spawn(base: str, size: int) -> str:
        return ""

    sizes = [65536, subjects.CLUSTER_SIZE, 2 * 1024**2]
    for found in (
        subjects.every(spawn),
        subjects.few(spawn),
        subjects.by_cluster_size(spawn, ["falloc", "full"], sizes),
    ):
        titles = [subject.title for subject in found]
        assert len(set(titles)) == len(titles)
        assert titles[0] == subjects.STOCK


def test_goals_are_about_disks_that_the_short_form_has() -> None:
    titles = {subject.title for subject in subjects.few(lambda base, size: "")}

    assert titles >= {
        subjects.STOCK,
        subjects.CONTROL,
        subjects.raw("falloc"),
        *(subjects.ours("falloc", each) for each in ("unallocated", "allocated", "copied")),
        subjects.ours("full", "unallocated"),
    }


def test_raw_disk_has_its_base_image_s_data_as_nova_s_has(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"data")
    monkeypatch.setattr(Preallocator, "preallocate", lambda strategy, path, format: types.SimpleNamespace(path=path))
    raw = next(one for one in subjects.limits(lambda base, size: "") if one.title == subjects.raw("falloc"))

    assert pathlib.Path(raw.make(str(tmp_path), str(base), 8)).read_bytes() == b"data" + bytes(4)
