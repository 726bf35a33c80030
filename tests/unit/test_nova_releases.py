# SPDX-License-Identifier: Apache-2.0
"""What is said of Nova's releases: the page that is made from the results, and every place that names the range."""

from __future__ import annotations

import copy
import json
import pathlib
import re
from typing import Any

import nova_releases
import pytest

from imgprealloc import check_nova

_REPOSITORY = pathlib.Path(__file__).parents[2]
_FOLDER = _REPOSITORY / "tests" / "nova" / "releases"
# By their numbers.
_RELEASES = {int(path.stem.partition("-")[2]): path for path in sorted(_FOLDER.glob("nova-*.txt"))}

_GOOD = {"passed": 7, "failed": 0, "skipped": 0, "good": True}

_RESULT: dict[str, Any] = {
    "nova": "27.5.1",
    "requires_python": ">=3.8",
    "python": "3.11.2",
    "qemu": "7.2.22",
    "modes": {
        "eventlet": {
            "integration": _GOOD,
            "stock": {**_GOOD, "passed": 11, "skipped": 3, "expected_failures": {"a.b.C.test_d": "a reason"}},
        }
    },
}


def _row(result: dict[str, Any], mode: str) -> str:
    (row,) = (line for line in nova_releases.page([result]).splitlines() if line.startswith("27.5.1  " + mode))
    return row


def test_row_has_what_was_counted() -> None:
    assert re.split(r" {2,}", _row(_RESULT, "eventlet")) == ["27.5.1", "eventlet", "7 passed", "11 passed", "3", "1"]


def test_mode_that_a_release_does_not_have_is_said_to_be_missing() -> None:
    assert _row(_RESULT, "native threads").endswith("its nova-compute has no such mode")


def test_test_that_is_expected_to_fail_is_named_with_its_reason() -> None:
    assert "* ``b.C.test_d``\n  a reason" in nova_releases.page([_RESULT])


def test_failures_are_on_the_page() -> None:
    result = copy.deepcopy(_RESULT)
    result["modes"]["eventlet"]["stock"].update(failed=2, good=False)

    assert "11 passed, 2 FAILED" in _row(result, "eventlet")


def _told(capsys: pytest.CaptureFixture[str], *files: pathlib.Path) -> tuple[int, str]:
    status = nova_releases.main(list(map(str, files)))
    return status, capsys.readouterr().out.splitlines()[-1]


def _file(tmp_path: pathlib.Path, **stock: Any) -> pathlib.Path:
    result = copy.deepcopy(_RESULT)
    result["modes"]["eventlet"]["stock"].update(stock)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    path.write_text(json.dumps(result))
    return path


def test_sums_are_of_all_files_and_parts(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = _file(tmp_path), _file(tmp_path)

    assert _told(capsys, *files) == (0, "releases: 36 passed, 0 failed, 6 skipped")


def test_release_that_left_no_file_is_a_failure(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = _file(tmp_path), tmp_path / "never-written.json"

    assert _told(capsys, *files) == (1, "releases: 18 passed, 1 failed, 3 skipped")


def test_run_that_is_not_good_is_a_failure_even_if_no_test_failed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _told(capsys, _file(tmp_path, good=False)) == (1, "releases: 18 passed, 1 failed, 3 skipped")


def _text(*path: str) -> str:
    return " ".join(_REPOSITORY.joinpath(*path).read_text().split())


@pytest.mark.parametrize("release", _RELEASES.values(), ids=_RELEASES)
def test_page_is_of_the_releases_and_requirements_that_are_tested(release: pathlib.Path) -> None:
    page = (_REPOSITORY / "doc" / "source" / "releases.rst").read_text()
    version, *pins = (line for line in release.read_text().splitlines() if not line.startswith("#"))

    assert f"\n{version[len('nova==') :]}  eventlet  " in page
    assert page.count(f"  {', '.join(pins)}\n") >= 1
    assert "FAILED" not in page


def test_every_place_names_the_same_range_of_releases() -> None:
    first, *_, last = _RELEASES
    series = [re.findall(r"Nova (\d{4}\.\d)", _RELEASES[number].read_text())[0] for number in (first, last)]

    assert range(first, last + 1) == check_nova._SUPPORTED
    assert list(_RELEASES) == list(check_nova._SUPPORTED)
    assert f"works with Nova {first} ({series[0]}) to {last} ({series[1]})" in _text("README.rst")
    assert f"Applies to Nova {first} to {last}:" in _text("contrib", "nova-imagebackend.patch")
    assert f"[testenv:nova-{{{','.join(map(str, _RELEASES))}}}]" in _text("tox.ini")


def test_link_names_the_newest_release() -> None:
    assert (_FOLDER / "nova.txt").readlink() == pathlib.Path(_RELEASES[max(_RELEASES)].name)
