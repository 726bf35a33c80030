# SPDX-License-Identifier: Apache-2.0
"""Several disks at a time."""

from __future__ import annotations

from collections.abc import Iterator
import os
import threading

import pytest

from imgprealloc.cli import abreast

# Seconds until a test that waits gives up.
PATIENCE = 20


def results(found: Iterator[object]) -> list[object]:
    return [result() for result in found]  # type: ignore[operator]


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_results_come_in_the_order_that_was_asked_for(at_once: int) -> None:
    assert results(abreast.in_order(lambda item: item * item, range(50), at_once)) == [n * n for n in range(50)]


def test_those_that_end_early_wait_for_those_that_were_asked_for_before() -> None:
    last_is_done = threading.Event()
    ended: list[int] = []

    def work(item: int) -> int:
        if item == 0:
            assert last_is_done.wait(PATIENCE)
        ended.append(item)
        if item == 3:
            last_is_done.set()
        return item

    assert results(abreast.in_order(work, range(4), 2)) == [0, 1, 2, 3]
    assert ended[-1] == 0


@pytest.mark.parametrize("at_once", [2, 3])
def test_as_many_as_may_are_worked_on_at_the_same_time(at_once: int) -> None:
    together = threading.Barrier(at_once, timeout=PATIENCE)

    # Each waits until there are others.
    assert results(abreast.in_order(lambda item: together.wait() >= 0, range(2 * at_once), at_once)) == [True] * (
        2 * at_once
    )


def test_no_more_than_may_are_worked_on_at_the_same_time() -> None:
    lock = threading.Lock()
    counts = [0, 0]

    def work(item: int) -> None:
        with lock:
            counts[0] += 1
            counts[1] = max(counts)
        threading.Event().wait(0.002)
        with lock:
            counts[0] -= 1

    results(abreast.in_order(work, range(60), 3))

    assert counts[1] <= 3


def test_of_many_only_a_few_are_begun_before_they_are_asked_for() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100_000):
            taken.append(item)
            yield item

    found = abreast.in_order(lambda item: item, items(), 2)
    for _ in range(10):
        next(found)()

    assert len(taken) < 30
    assert threading.active_count() < 30
    found.close()


@pytest.mark.parametrize("at_once", [1, 2])
def test_error_is_raised_at_its_turn_and_keeps_nobody_from_working(at_once: int) -> None:
    def work(item: int) -> int:
        if item % 2:
            raise LookupError(item)
        return item

    told: list[object] = []
    for result in abreast.in_order(work, range(6), at_once):
        try:
            told.append(result())
        except LookupError as exc:
            told.append(str(exc))

    assert told == [0, "1", 2, "3", 4, "5"]


def test_nothing_is_begun_once_nobody_asks_any_more() -> None:
    begun: list[int] = []
    go_on = threading.Event()
    is_under_way = threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        is_under_way.set()
        assert go_on.wait(PATIENCE)

    before = set(threading.enumerate())
    found = abreast.in_order(work, range(100), 2)
    next(found)
    assert is_under_way.wait(PATIENCE)
    found.close()
    go_on.set()
    for piece in set(threading.enumerate()) - before:
        piece.join(PATIENCE)

    assert len(begun) <= 2


def test_one_at_a_time_is_worked_on_where_it_is_asked_for() -> None:
    here = threading.get_ident()

    found = abreast.in_order(lambda item: threading.get_ident(), range(3), 1)

    assert results(found) == [here] * 3


def test_no_thread_keeps_a_command_from_ending() -> None:
    daemons = results(abreast.in_order(lambda item: threading.current_thread().daemon, range(2), 2))

    assert daemons == [True, True]


def test_cpus_are_those_that_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert abreast.cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
