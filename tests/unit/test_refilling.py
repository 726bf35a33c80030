# SPDX-License-Identifier: Apache-2.0
"""Which disks of running guests are refilled, and what a look at one costs; the extent map is played."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import logging
import os
import pathlib
from unittest import mock

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import DiskNotFound
from imgprealloc import NoSpace
from imgprealloc import Preallocator
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import looks
from imgprealloc import refilling
from imgprealloc.fallocate import Extent

Logged = Callable[[int], list[str]]

SIZE = 100 * units.Mi


class Played:
    """A disk's extents, as a test says, and the stretches that were filled."""

    def __init__(self) -> None:
        self.extents: list[Extent] | None = [Extent(0, SIZE)]
        self.available = units.Ti
        self.copies_on_write = False
        self.holds_space = True
        self.looks = 0
        self.filled: list[tuple[int, int]] = []

    def lose(self, start: int, length: int) -> None:
        """Make a hole."""
        self.extents = [Extent(0, start), Extent(start + length, SIZE - start - length)]

    def look(self, name: str) -> list[Extent] | None:
        self.looks += 1
        return self.extents

    def reserve(self, path: str, name: str, start: int, length: int) -> None:
        self.filled.append((start, length))
        self.extents = [Extent(0, SIZE)]


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, SIZE)
    return str(path)


@pytest.fixture
def played() -> Iterator[Played]:
    """Play the filesystem, which has a whole disk at first."""
    made = Played()
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (fallocate, "extents", made.look),
            (fallocate, "reserve", made.reserve),
            (filesystem, "available", lambda folder: made.available),
            (filesystem, "copies_on_write", lambda name, is_shared: made.copies_on_write),
            (Preallocator, "holds_space", lambda self, path: made.holds_space),
        ):
            stack.enter_context(fixtures.MockPatchObject(owner, name, value))
        yield made


def _changed(disk: str) -> None:
    """Let the file have blocks that it had not."""
    with open(disk, "r+b") as file:
        file.seek(os.stat(disk).st_blocks * 512)
        file.write(b"x" * 4096)
        os.fsync(file.fileno())


def test_disk_that_was_whole_is_refilled_whatever_it_has_lost(disk: str, played: Played, logged: Logged) -> None:
    assert refilling.refill(Preallocator(), disk) == 0
    _changed(disk)
    played.lose(units.Mi, SIZE - 2 * units.Mi)

    assert refilling.refill(Preallocator(), disk) == SIZE - 2 * units.Mi

    assert played.filled == [(units.Mi, SIZE - 2 * units.Mi)]
    assert len(logged(logging.INFO)) == 1


def test_disk_in_which_nothing_has_changed_costs_one_stat(disk: str, played: Played) -> None:
    refilling.refill(Preallocator(), disk)
    assert played.looks == 1

    refilling.refill(Preallocator(), disk)
    assert played.looks == 1

    # The control: also where it has more than before, which may be the filesystem's own.
    _changed(disk)
    refilling.refill(Preallocator(), disk)
    assert played.looks == 2


@pytest.mark.parametrize(("lost", "filled"), [(SIZE // 10, True), (SIZE // 10 + 4096, False)])
def test_disk_that_nobody_has_seen_whole_may_lack_little(disk: str, played: Played, lost: int, filled: bool) -> None:
    played.lose(0, lost)

    refilling.refill(Preallocator(), disk)

    assert bool(played.filled) == filled


def test_disk_that_was_held_at_its_start_may_lack_much(disk: str, played: Played) -> None:
    played.lose(0, SIZE // 2)
    with fixtures.MockPatchObject(looks, "was_held", lambda device, inode: inode == os.stat(disk).st_ino):
        refilling.refill(Preallocator(), disk)

    assert played.filled == [(0, SIZE // 2)]


@pytest.mark.parametrize(
    "why_not",
    [{"extents": None}, {"copies_on_write": True}, {"holds_space": False}],
    ids=lambda why_not: next(iter(why_not)),
)
def test_disk_for_which_no_space_can_be_held_is_left(disk: str, played: Played, why_not: dict[str, object]) -> None:
    played.lose(0, 4096)
    for name, value in why_not.items():
        setattr(played, name, value)

    assert refilling.refill(Preallocator(), disk) == 0
    assert played.filled == []


def test_mode_that_promises_nothing_looks_at_nothing(played: Played) -> None:
    assert refilling.refill(Preallocator("metadata"), "/nowhere") == 0
    assert played.looks == 0


def test_nothing_is_filled_where_all_does_not_fit(disk: str, played: Played) -> None:
    played.lose(0, 8192)
    played.available = 8191

    with pytest.raises(NoSpace, match=r"8 KiB \(8192 bytes\) back"):
        refilling.refill(Preallocator(), disk)
    assert played.filled == []

    # And is, once it does.
    played.available = 8192
    assert refilling.refill(Preallocator(), disk) == 8192


def test_nothing_is_filled_where_others_are_to_keep_the_space(disk: str, played: Played) -> None:
    played.lose(0, 8192)
    played.available = units.Gi + 8192

    with pytest.raises(NoSpace):
        refilling.refill(Preallocator(keep_free="1G"), disk)
    assert played.filled == []

    played.available += units.Mi
    assert refilling.refill(Preallocator(keep_free="1G"), disk) == 8192


def test_disk_that_is_gone_is_told_as_that(tmp_path: pathlib.Path, played: Played) -> None:
    with pytest.raises(DiskNotFound):
        refilling.refill(Preallocator(), str(tmp_path / "gone"))


@pytest.mark.parametrize("is_ours", [True, False])
def test_holes_are_filled_by_who_may_write(disk: str, played: Played, is_ours: bool) -> None:
    played.lose(0, 8192)
    filler, filling_by = mock.Mock(), mock.MagicMock()
    with (
        fixtures.MockPatchObject(os, "access", lambda path, how: is_ours),
        fixtures.MockPatchObject(fallocate, "filling_by", filling_by),
    ):
        refilling.refill(Preallocator(), disk, filler)

    filling_by.assert_called_once_with(None if is_ours else filler)


@pytest.fixture
def grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each disk be one that may ask for 8 MiB past its end."""
    monkeypatch.setattr(refilling, "_end", lambda file, length: length + 8 * units.Mi)


@pytest.mark.usefixtures("grows")
def test_space_past_the_end_that_cannot_be_held_is_no_reason_to_look_again(disk: str, played: Played) -> None:
    played.holds_space = False

    first = refilling.refill(Preallocator(), disk, format="qcow2")
    looks_then = played.looks
    second = refilling.refill(Preallocator(), disk, format="qcow2")

    assert (first, second, played.filled, played.looks) == (0, 0, [], looks_then)


@pytest.mark.usefixtures("grows")
def test_space_past_the_end_that_others_take_first_is_no_fault_and_is_asked_for_again(
    disk: str, played: Played
) -> None:
    none_left = NoSpace(disk, "none is left", "Make room.")

    with fixtures.MockPatchObject(fallocate, "reserve", side_effect=none_left):
        first = refilling.refill(Preallocator(), disk, format="qcow2")
        looks_then = played.looks
        second = refilling.refill(Preallocator(), disk, format="qcow2")

    assert (first, second, played.looks) == (0, 0, 2 * looks_then)
