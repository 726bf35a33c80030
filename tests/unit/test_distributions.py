# SPDX-License-Identifier: Apache-2.0
"""What is said of distributions: the page that is made from the results, and what counts as a failure."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import distributions
import pytest

_REPOSITORY = pathlib.Path(__file__).parents[2]

_RESULT: dict[str, Any] = {
    "suite": "trixie",
    "versions": {"python3-nova": "2:31.0.0-6", "qemu-utils": "1:10.0.2", "libvirt0": "11.3.0"},
    "python": "3.13.5",
    "kernel": "6.18.1-cloud",
    "tests": distributions._EVERYTHING,
    "steps": {"the package is installed": "", "the package is removed": ""},
    "files": {"test_spawn": {"passed": 7, "failed": 0, "skipped": 1}},
    "failures": {},
    "skips": ["no btrfs"],
    "good": True,
}


def _cells(line: str) -> list[str]:
    return re.split(r" {2,}", line)


def test_page_has_versions_and_counts() -> None:
    page = distributions.page([_RESULT]).splitlines()

    assert ["trixie", "2:31.0.0-6", "3.13.5", "1:10.0.2", "11.3.0", "all", "7", "0", "1"] in map(_cells, page)
    assert "* skipped in trixie: no btrfs" in page


def test_page_has_the_steps_and_who_has_failed_in_them_or_never_came_so_far() -> None:
    failed = {**_RESULT, "suite": "sid", "steps": {"the package is installed": "no room"}}

    page = distributions.page([_RESULT, failed]).splitlines()

    assert "* the package is installed (FAILED in sid)" in page
    assert "* the package is removed (FAILED in sid)" in page
    assert "* the package is removed" in distributions.page([_RESULT]).splitlines()


@pytest.mark.parametrize(
    ("tests", "said"), [(distributions._EVERYTHING, "all"), (["tests/nova/test_spawn.py"], "some")]
)
def test_page_says_whether_all_tests_were_run(tests: list[str], said: str) -> None:
    page = distributions.page([{**_RESULT, "tests": tests}]).splitlines()

    assert [said] == [_cells(line)[5] for line in page if line.startswith("trixie ")]


def _told(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], *results: dict[str, Any]) -> tuple[int, str]:
    files = [tmp_path / f"{number}.json" for number in range(len(results))]
    for file, result in zip(files, results):
        if result:
            file.write_text(json.dumps(result))
    status = distributions.main(["sum", *map(str, files)])
    return status, capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("second", "status", "line"),
    [
        (_RESULT, 0, "distributions: 14 passed, 0 failed, 2 skipped"),
        ({}, 1, "distributions: 7 passed, 1 failed, 1 skipped"),
        ({**_RESULT, "good": False}, 1, "distributions: 14 passed, 1 failed, 2 skipped"),
        ({**_RESULT, "good": False, "steps": {"a": "b", "c": "d"}}, 1, "distributions: 14 passed, 2 failed, 2 skipped"),
    ],
)
def test_sums_are_of_all_distributions_and_what_is_missing_or_not_good_is_a_failure(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], second: dict[str, Any], status: int, line: str
) -> None:
    assert _told(tmp_path, capsys, _RESULT, second) == (status, line)


def test_page_is_of_the_suites_that_are_tried_and_of_no_failure() -> None:
    page = (_REPOSITORY / "doc" / "source" / "distributions.rst").read_text()
    [suites] = re.findall(r"^suites=\((.*)\)$", (_REPOSITORY / "tools" / "test-distro").read_text(), re.MULTILINE)

    assert [line.split()[0] for line in page.splitlines() if re.match(r"[a-z]+  +\d", line)] == suites.split()
    assert "FAILED" not in page


@pytest.mark.parametrize(
    ("text", "set"),
    [
        ("[DEFAULT]\n#a = 0\na=1\nb = 2\n", "[DEFAULT]\n#a = 0\na = ours\nb = 2\n"),
        ("[DEFAULT]\n#a = 0\n[x]\n", "[DEFAULT]\na = ours\n#a = 0\n[x]\n"),
    ],
)
def test_option_is_set_where_it_is_or_in_its_section(tmp_path: pathlib.Path, text: str, set: str) -> None:
    path = tmp_path / "nova.conf"
    path.write_text(text)

    distributions._set(path, a="ours")

    assert path.read_text() == set
