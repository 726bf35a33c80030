# SPDX-License-Identifier: Apache-2.0
"""Nova's own tests of all that has to do with disks, on our classes, and what their runner makes of the outcome."""

from __future__ import annotations

import os
import subprocess
import sys
import unittest

import pytest
import stock_suite

_RUNNER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stock_suite.py")


# Nova's write to their working directory, and beside Nova's own modules.
@pytest.mark.as_root
def test_novas_own_tests_pass_but_for_those_that_assert_the_bug() -> None:
    done = subprocess.run(
        [sys.executable, _RUNNER],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )

    assert done.returncode == 0, done.stdout + done.stderr


def _result(*outcomes: str) -> unittest.TestResult:
    """Run a suite with a test for each outcome, of that name."""

    class Example(unittest.TestCase):
        def id(self) -> str:
            return self._testMethodName

        def passes(self) -> None:
            pass

        def fails(self) -> None:
            self.fail()

        def breaks(self) -> None:
            raise OSError

        @unittest.expectedFailure
        def surprises(self) -> None:
            pass

        @unittest.skip("for a reason")
        def skips(self) -> None:
            pass

    result = unittest.TestResult()
    unittest.TestSuite(map(Example, outcomes)).run(result)
    return result


def test_listed_test_that_fails_is_good_and_is_told_with_its_reason() -> None:
    counts = stock_suite.judge(_result("passes", "fails", "skips"), {"fails": "a reason"})

    assert stock_suite.is_good(counts)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 0, 1)
    assert counts["expected_failures"] == {"fails": "a reason"}


@pytest.mark.parametrize("outcome", ["fails", "breaks", "surprises"])
def test_run_is_not_good_when_an_unlisted_test_fails(outcome: str) -> None:
    counts = stock_suite.judge(_result("passes", outcome), {})

    assert not stock_suite.is_good(counts)
    assert counts["unexpected_failures"] == [outcome]


def test_run_is_not_good_when_a_listed_test_passes() -> None:
    counts = stock_suite.judge(_result("passes"), {"passes": "a reason"})

    assert not stock_suite.is_good(counts)
    assert counts["unexpected_successes"] == ["passes"]


def test_run_is_not_good_when_a_listed_test_is_gone() -> None:
    assert not stock_suite.is_good(stock_suite.judge(_result("passes"), {"renamed": "a reason"}))


def test_run_of_nothing_is_not_good() -> None:
    assert not stock_suite.is_good(stock_suite.judge(_result(), {}))


def test_what_fails_without_us_is_expected_in_its_release_and_mode_alone() -> None:
    ours = set(stock_suite.EXPECTED_FAILURES)
    hanging = set(stock_suite.EXPECTED_WITHOUT_US["33", "threads"])

    assert set(stock_suite.expected_failures("33", "threads", stock=False)) == ours | hanging
    assert set(stock_suite.expected_failures("33", "threads", stock=True)) == hanging
    assert set(stock_suite.expected_failures("33", "eventlet", stock=False)) == ours
    assert set(stock_suite.expected_failures("34", "threads", stock=False)) == ours
