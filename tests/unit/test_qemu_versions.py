# SPDX-License-Identifier: Apache-2.0
"""What is said of QEMU's versions: the page made from the counts, and who names the least one."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest
import qemu_versions

from imgprealloc import qemu_img

_REPOSITORY = pathlib.Path(__file__).parents[2]

_RESULT: dict[str, Any] = {
    "qemu": "5.2.0",
    "package": "bullseye, 1:5.2",
    "kernel": "6.18.1",
    "tests": ["tests/functional"],
    "given_back": {"raw": 1 << 20, "qcow2": 0},
    "files": {"test_raw": {"passed": 7, "failed": 0, "skipped": 0}},
    "failures": {},
    "skips": [],
    "good": True,
}


def _cells(line: str) -> list[str]:
    return re.split(r" {2,}", line)


def test_page_has_what_was_counted_and_given_back() -> None:
    page = qemu_versions.page([_RESULT]).splitlines()

    assert ["5.2.0", "bullseye, 1:5.2", "7", "0", "0", "1024", "0"] in map(_cells, page)
    assert ["``test_raw``", "7"] in map(_cells, page)


@pytest.mark.parametrize(("tests", "said"), [("tests/functional", "all"), ("tests/functional/test_raw.py", "some")])
def test_page_says_whether_all_tests_were_run(tests: str, said: str) -> None:
    assert f"({said} of them)" in qemu_versions.page([{**_RESULT, "tests": [tests]}])


def test_page_says_why_tests_were_skipped() -> None:
    page = qemu_versions.page([{**_RESULT, "skips": ["no zstd"]}])

    assert "\n* skipped with 5.2.0: no zstd\n" in page


def test_page_has_the_versions_in_their_order() -> None:
    later = {**_RESULT, "qemu": "10.0.2", "files": {"test_show": {"passed": 1, "failed": 2, "skipped": 0}}}

    page = qemu_versions.page([later, _RESULT]).splitlines()

    assert ["file", "5.2.0", "10.0.2"] in map(_cells, page)
    assert ["``test_raw``", "7", "not run"] in map(_cells, page)
    assert ["``test_show``", "not run", "1, 2 FAILED"] in map(_cells, page)


def _told(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], *results: dict[str, Any]) -> tuple[int, str]:
    files = [tmp_path / f"{number}.json" for number in range(len(results))]
    for file, result in zip(files, results):
        if result:
            file.write_text(json.dumps(result))
    status = qemu_versions.main(["sum", *map(str, files)])
    return status, capsys.readouterr().out.splitlines()[-1]


def test_sums_are_of_all_versions(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _told(tmp_path, capsys, _RESULT, _RESULT) == (0, "qemu: 14 passed, 0 failed, 0 skipped")


def test_version_that_left_no_file_is_a_failure(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _told(tmp_path, capsys, _RESULT, {}) == (1, "qemu: 7 passed, 1 failed, 0 skipped")


def test_run_that_is_not_good_is_a_failure_even_if_no_test_failed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _told(tmp_path, capsys, {**_RESULT, "good": False}) == (1, "qemu: 7 passed, 1 failed, 0 skipped")


def _text(*path: str) -> str:
    return " ".join(_REPOSITORY.joinpath(*path).read_text().split())


# As tools/test-qemu has them.
_VERSIONS = re.findall(r"\[(\d+\.\d+)\]=", _text("tools", "test-qemu"))


def test_page_is_of_the_versions_that_are_tested_and_of_no_failure() -> None:
    page = (_REPOSITORY / "doc" / "source" / "qemu.rst").read_text()
    [head] = (line for line in page.splitlines() if line.startswith("file  "))

    assert [version.rpartition(".")[0] for version in _cells(head)[1:]] == _VERSIONS
    assert "FAILED" not in page


def test_every_place_names_the_oldest_version_that_is_tested() -> None:
    oldest = ".".join(map(str, qemu_img.OVERLAY_PREALLOCATION))

    assert min(_VERSIONS, key=lambda version: [int(number) for number in version.split(".")]) == oldest
    assert f"It needs QEMU {oldest} or later" in _text("README.rst")
    assert f"Both hosts need QEMU {oldest} or later" in _text("doc", "source", "operators.rst")


def test_page_and_constant_agree_on_who_gives_space_back() -> None:
    rows = (_REPOSITORY / "doc" / "source" / "qemu.rst").read_text().splitlines()
    found = [_cells(row) for row in rows if re.match(r"\d+\.\d+\.\d+ ", row)]

    for version, *_, raw, qcow2 in found:
        is_kept = tuple(map(int, version.split("."))) >= qemu_img.KEEPS_ZEROED_SPACE
        assert (raw == "0", qcow2 == "0") == (is_kept, is_kept), version
    assert len(found) == len(_VERSIONS)
