# SPDX-License-Identifier: Apache-2.0
"""The page of the filesystems: how it is made from the results, and that it is of all that are tried."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import logging
import pathlib
import re

import filesystems
from filesystems import MODES
from filesystems import Enough
from filesystems import Outcome
from filesystems import Sectors
import pytest

_PAGE = pathlib.Path(__file__).parents[2] / "doc" / "source" / "filesystems.rst"


@pytest.fixture(autouse=True)
def logger_is_as_it_was() -> Iterator[None]:
    """Let the other tests' warnings be heard."""
    logger = logging.getLogger("imgprealloc")
    level = logger.level
    yield
    logger.setLevel(level)


def _row(outcome: Outcome) -> list[str]:
    lines = filesystems.page([outcome], [], [], "6.18", "7.2.22").splitlines()
    (row,) = (line for line in lines if line.startswith(outcome.name))
    return re.split(r" {2,}", row)


def test_row_has_what_became_of_a_disk() -> None:
    found = Outcome("XFS (reflink)", "falloc", "falloc", "preallocated", 0, 16384)

    assert _row(found) == ["XFS (reflink)", "falloc", "falloc", "preallocated", "all of it"]


def test_writes_that_failed_are_counted() -> None:
    assert _row(Outcome("ext2", "falloc", "metadata", "mapped", 5, 16384))[2:] == [
        "metadata",
        "mapped",
        "5 of 16384 fail",
    ]


def test_disk_that_was_not_made_has_the_reason() -> None:
    assert _row(Outcome("ext2", "full", "full", "no space", 0, 0))[3:] == ["not made", "no space"]


def test_filesystem_that_this_kernel_has_not_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere() -> contextlib.AbstractContextManager[pathlib.Path]:
        raise filesystems.NotHere("mount: unknown filesystem")

    monkeypatch.setattr(filesystems, "GROUNDS", {"nowhere": nowhere})

    assert filesystems.main(["nowhere"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"nowhere: {mode}: none: not made: this kernel has none" for mode in MODES]
    assert "mount: unknown filesystem" in said.err


@pytest.mark.parametrize(
    ("state", "failed", "good"),
    [("preallocated", 0, True), ("preallocated", 1, False), ("mapped", 1, True), ("mapped", 0, True)],
)
def test_only_what_is_called_preallocated_has_to_be_written(state: str, failed: int, good: bool) -> None:
    assert Outcome("ext4", "falloc", "falloc", state, failed, 16384).good is good


def test_row_of_sectors_has_what_failed_with_more_and_more_left() -> None:
    text = filesystems.page([], [Sectors("btrfs", "full", "never written", (9, 8, 7, 0), 4096)], [], "6.18", "7.2.22")

    assert [re.split(r" {2,}", line) for line in text.splitlines() if line.startswith("btrfs  ")] == [
        ["btrfs", "full", "never written", "9", "8", "7", "0"]
    ]


@pytest.mark.parametrize("name", filesystems.SECTORS_ON)
@pytest.mark.parametrize("mode", filesystems.SECTORS_IN)
def test_page_tells_of_sectors_and_how_much_is_enough_for_them(name: str, mode: str) -> None:
    rows = [cells for line in _PAGE.read_text().splitlines() if (cells := re.split(r" {2,}", line))[:2] == [name, mode]]

    assert [cells[-1] for cells in rows if len(cells) == 7] == ["0", "0"]


def test_row_of_lengths_has_how_much_is_enough_for_each() -> None:
    left = (("none", "32 KiB"), *[("none", "none")] * 3, ("none", "more"))
    text = filesystems.page([], [], [Enough("btrfs", "full", "never written", left)], "6.18", "7.2.22")

    assert [re.split(r" {2,}", line) for line in text.splitlines() if line.startswith("btrfs  ")] == [
        ["btrfs", "full", "never written", "none; 32 KiB", *["none; none"] * 3, "none; more"]
    ]


@pytest.mark.parametrize("name", filesystems.SECTORS_ON)
@pytest.mark.parametrize("mode", filesystems.SECTORS_IN)
def test_page_tells_of_each_length_at_each_place(name: str, mode: str) -> None:
    rows = [cells for line in _PAGE.read_text().splitlines() if (cells := re.split(r" {2,}", line))[:2] == [name, mode]]

    assert [cells[2] for cells in rows if len(cells) == 3 + len(filesystems.LENGTHS)] == [*filesystems.PLACES]


@pytest.mark.parametrize("name", filesystems.GROUNDS)
@pytest.mark.parametrize("mode", filesystems.MODES)
def test_page_has_a_row_for_each_filesystem_and_mode(name: str, mode: str) -> None:
    rows = [cells for line in _PAGE.read_text().splitlines() if (cells := re.split(r" {2,}", line))[:2] == [name, mode]]

    assert [len(row) for row in rows if len(row) < 7] == [5]


@pytest.mark.parametrize("name", filesystems.GROUNDS)
def test_page_promises_nothing_that_failed(name: str) -> None:
    broken = {
        line for line in _PAGE.read_text().splitlines() if line.startswith(f"{name}  ") and "preallocated" in line
    }
    known = {mode for kind, mode in filesystems.KNOWN if kind == name}

    assert {re.split(r" {2,}", line)[1] for line in broken if "fail" in line} == known
