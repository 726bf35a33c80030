# SPDX-License-Identifier: Apache-2.0
"""How the tests in a report are counted."""

from __future__ import annotations

import junit

_REPORT = """
<testsuites><testsuite>
<testcase classname="tests.functional.test_raw" name="test_one[ext4]"/>
<testcase classname="tests.functional.test_raw" name="test_two"><failure message="no&#10;more">text</failure></testcase>
<testcase classname="tests.functional.test_raw" name="test_three"><error message="no mount">text</error></testcase>
<testcase classname="tests.functional.test_show" name="test_four"><skipped message="needs fio">text</skipped></testcase>
<testcase classname="" name="tests.functional.test_gone"><error message="cannot be imported"/></testcase>
</testsuite></testsuites>
"""


def test_tests_are_counted_by_file_and_errors_are_failures() -> None:
    assert junit.counted(_REPORT)["files"] == {
        "test_raw": {"passed": 1, "failed": 2, "skipped": 0},
        "test_show": {"passed": 0, "failed": 0, "skipped": 1},
        "test_gone": {"passed": 0, "failed": 1, "skipped": 0},
    }


def test_failures_are_named_with_their_first_line_and_skips_with_their_reasons() -> None:
    found = junit.counted(_REPORT)

    assert found["failures"]["test_raw::test_two"] == "no"
    assert found["failures"]["test_raw::test_three"] == "no mount"
    assert found["skips"] == ["needs fio"]
