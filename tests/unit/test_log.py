# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import collections
from collections.abc import Callable
import logging
import threading
import time

import fixtures
import pytest

from imgprealloc import log

Logged = Callable[[int], list[str]]


def test_warning_names_what_it_is_about(logged: Logged) -> None:
    log.warn_once("short", "/d/disk", "4096 bytes short")

    assert logged(logging.WARNING) == ["/d/disk: 4096 bytes short"]


def test_same_is_warned_of_once_and_is_debug_from_then_on(logged: Logged) -> None:
    # The numbers in it are others each time.
    for number in range(3):
        log.warn_once("short", "/d/disk", f"{number} bytes short")

    assert logged(logging.WARNING) == ["/d/disk: 0 bytes short"]
    assert logged(logging.DEBUG) == ["/d/disk: 1 bytes short", "/d/disk: 2 bytes short"]


@pytest.mark.parametrize(("kind", "subject"), [("growth", "/d/disk"), ("short", "/d/other"), ("short", "/d/dis")])
def test_another_kind_or_another_disk_is_warned_of_too(logged: Logged, kind: str, subject: str) -> None:
    log.warn_once("short", "/d/disk", "short")
    log.warn_once(kind, subject, "short")

    assert len(logged(logging.WARNING)) == 2


def test_what_is_remembered_does_not_grow_without_bound(logged: Logged) -> None:
    with fixtures.MockPatchObject(log, "_MOST_REMEMBERED", 10):
        for number in range(25):
            log.warn_once("short", f"/d/{number}", "short")

        assert len(log._warned) == 10
        # Whoever was pushed out is warned of once more, and the others are not.
        log.warn_once("short", "/d/0", "short")
        log.warn_once("short", "/d/24", "short")

    assert len(logged(logging.WARNING)) == 26


def test_new_process_warns_of_everything_once_more(logged: Logged) -> None:
    log.warn_once("short", "/d/disk", "short")
    log.forget()
    log.warn_once("short", "/d/disk", "short")

    assert len(logged(logging.WARNING)) == 2


class Slow(collections.OrderedDict[tuple[str, str], None]):
    """A memory that takes so long to look into that all who ask do it at the same time."""

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        time.sleep(0.05)
        return found


def test_of_several_threads_one_warns(logged: Logged) -> None:
    with fixtures.MockPatchObject(log, "_warned", Slow()):
        threads = [threading.Thread(target=log.warn_once, args=("short", "/d/disk", "short")) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert (len(logged(logging.WARNING)), len(logged(logging.DEBUG))) == (1, 3)
