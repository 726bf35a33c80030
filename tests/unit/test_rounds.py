# SPDX-License-Identifier: Apache-2.0
"""A thread that goes round: what a round does, and that nothing ends the thread but who has started it."""

from __future__ import annotations

from collections.abc import Iterator
import threading
import time

import fixtures
import pytest

from imgprealloc import rounds

_PATIENCE = 60


@pytest.fixture
def clock() -> Iterator[list[float]]:
    """Let time stand still but for what a test adds to the list's only number."""
    now = [0.0]
    with fixtures.MockPatchObject(time, "monotonic", lambda: now[0]):
        yield now


def test_round_looks_after_each_once(clock: list[float]) -> None:
    seen: list[int] = []
    goes = rounds.Rounds("name", 600, lambda: {"b": 2, "a": 1}, seen.append)

    goes.round()
    goes.round()

    assert sorted(seen[:2]) == [1, 2]
    assert sorted(seen[2:]) == [1, 2]


def test_round_that_takes_long_ends_and_the_next_goes_on_from_there(clock: list[float]) -> None:
    seen: list[str] = []

    def look_after(name: str) -> None:
        seen.append(name)
        clock[0] += 40

    goes = rounds.Rounds("name", 600, lambda: {name: name for name in "abcd"}, look_after)

    goes.round()
    assert seen == ["a", "b"]
    goes.round()
    assert seen == ["a", "b", "c", "d"]
    goes.round()
    assert seen == ["a", "b", "c", "d", "a", "b"]


def test_round_gets_somewhere_however_long_one_takes(clock: list[float]) -> None:
    seen: list[str] = []

    def look_after(name: str) -> None:
        seen.append(name)
        clock[0] += 10_000

    goes = rounds.Rounds("name", 600, lambda: {name: name for name in "ab"}, look_after)

    for _ in range(3):
        goes.round()

    assert seen == ["a", "b", "a"]


def test_what_fails_ends_the_round_and_the_next_begins_behind_it(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def look_after(name: str) -> None:
        seen.append(name)
        if name == "a":
            raise RuntimeError("the host is away")

    goes = rounds.Rounds("name", 600, lambda: {name: name for name in "abc"}, look_after)

    goes.round()
    goes.round()

    assert seen == ["a", "b", "c", "a"]
    assert "the host is away" in caplog.text


def test_list_that_cannot_be_had_ends_the_round_alone(caplog: pytest.LogCaptureFixture) -> None:
    def find() -> dict[str, str]:
        raise RuntimeError("the database is away")

    rounds.Rounds("name", 600, find, pytest.fail).round()

    assert "the database is away" in caplog.text


def test_thread_goes_round_until_it_is_stopped_and_is_there_once() -> None:
    came = threading.Semaphore(0)
    goes = rounds.Rounds("goes round", 0.001, lambda: {"a": None}, lambda _: came.release())

    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "goes round"]

    goes.start()
    goes.start()
    [thread] = threads()
    assert thread.daemon
    for _ in range(3):
        assert came.acquire(timeout=_PATIENCE)

    # The old one may still be at it.
    goes.stop()
    goes.start()
    thread.join(_PATIENCE)
    [_] = threads()
    while came.acquire(blocking=False):
        pass
    assert came.acquire(timeout=_PATIENCE)
    goes.stop()
