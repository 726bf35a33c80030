# SPDX-License-Identifier: Apache-2.0
"""What may be done to a disk whose guest has to start; the strategy is played."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import logging
import os
import pathlib
from typing import Any
from unittest import mock

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import Existing
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import healing
from imgprealloc import looks
from imgprealloc.fallocate import Extent
from imgprealloc.filesystem import Filesystem

Logged = Callable[[int], list[str]]


@pytest.fixture(autouse=True)
def _memoryless() -> Iterator[None]:
    """Let a look at a disk be what the strategy says; what is remembered of it, test_looks tells."""
    with (
        fixtures.MockPatchObject(looks, "at", lambda strategy, path, format: strategy.inspect(path, format=format)),
        fixtures.MockPatchObject(looks, "remember", lambda found: None),
    ):
        yield


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "disk"
    path.touch()
    return str(path)


class Turn:
    """A semaphore that tells whether it is held."""

    def __init__(self) -> None:
        self.held = False
        self.taken = 0

    def __enter__(self) -> None:
        self.held = True
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        self.held = False


@pytest.fixture
def turn() -> Turn:
    return Turn()


def playing(outcome: Any = None, *, state: str = "preallocated", mode: str = "falloc") -> mock.Mock:
    """Return a strategy that answers so."""
    strategy: mock.Mock = mock.create_autospec(Preallocator, instance=True)
    strategy.mode = mode
    strategy.inspect.return_value = mock.Mock(state=state, shared_bytes=0)
    strategy.has_work.return_value = True
    strategy.preallocate.side_effect = outcome
    return strategy


def error(kind: type[exceptions.PreallocationError], *more: Any) -> exceptions.PreallocationError:
    return kind("/d/disk", "it is so", "Do something.", *more)


# A disk that Nova has just made.


def test_new_disk_is_preallocated_as_one_that_was_just_made_and_in_turn(turn: Turn) -> None:
    strategy = playing()

    healing.preallocate_new(strategy, "/d/disk", "qcow2", turn)

    strategy.preallocate.assert_called_once_with("/d/disk", "just_made", format="qcow2", write_held=False)
    assert turn.taken == 1


@pytest.mark.parametrize("kind", [exceptions.NoSpace, exceptions.ImageInUse, exceptions.UnsupportedFilesystem])
def test_new_disk_that_cannot_be_preallocated_is_an_error(turn: Turn, kind: Any) -> None:
    with pytest.raises(kind):
        healing.preallocate_new(playing(error(kind)), "/d/disk", "qcow2", turn)

    assert not turn.held


@pytest.mark.parametrize(
    "kind",
    [exceptions.ImageInUse, exceptions.DiskIsLink, exceptions.OwnerNotKept, exceptions.FileInTheWay],
    ids=lambda kind: str(kind.__name__),
)
@pytest.mark.parametrize("mode", ["falloc", "metadata"])
def test_new_disk_that_cannot_be_made_anew_is_built_where_its_space_is_held(
    turn: Turn, logged: Logged, kind: type[exceptions.PreallocationError], mode: str
) -> None:
    held = mock.Mock(state="reserved" if mode == "falloc" else "thin")
    strategy = playing([error(kind), held], mode=mode)

    with fixtures.MockPatchObject(looks, "remember", mock.Mock()):
        healing.preallocate_new(strategy, "/d/disk", "qcow2", turn)
        looks.remember.assert_called_once_with(held)  # type: ignore[attr-defined]

    assert [call.args[1] for call in strategy.preallocate.mock_calls] == ["just_made", "reserve"]
    [warning] = logged(logging.WARNING)
    assert "not made anew" in warning


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_new_disk_that_cannot_be_made_anew_nor_held_is_an_error(turn: Turn, mode: str) -> None:
    strategy = playing([error(exceptions.ImageInUse), mock.Mock(state="thin")], mode=mode)

    with pytest.raises(exceptions.ImageInUse):
        healing.preallocate_new(strategy, "/d/disk", "qcow2", turn)

    assert not turn.held


# A disk that was there.


@pytest.mark.parametrize("existing", ["reserve", "rewrite"])
def test_disk_that_was_there_is_preallocated_as_far_as_it_may_be(disk: str, turn: Turn, existing: Existing) -> None:
    strategy = playing()

    healing.heal(strategy, disk, "raw", existing, turn)

    known = strategy.inspect.return_value
    strategy.preallocate.assert_called_once_with(disk, existing, format="raw", known=known, write_held=False)
    assert turn.taken == 1


@pytest.mark.parametrize(("shared", "copying", "calls"), [(0, False, 1), (4096, False, 0), (4096, True, 1)])
def test_what_would_have_to_be_copied_is_left_where_stock_nova_does_nothing(
    disk: str, turn: Turn, shared: int, copying: bool, calls: int
) -> None:
    strategy = playing()
    strategy.inspect.return_value.shared_bytes = shared

    healing.heal(strategy, disk, "raw", "reserve", turn, copying=copying)

    assert strategy.preallocate.call_count == calls


def test_disk_that_needs_nothing_waits_for_nobody(disk: str, turn: Turn) -> None:
    strategy = playing()
    strategy.has_work.return_value = False

    healing.heal(strategy, disk, "raw", "rewrite", turn)

    strategy.preallocate.assert_not_called()
    assert turn.taken == 0


def test_disk_that_would_take_what_is_kept_free_stays_as_it_is_and_waits_for_nobody(
    disk: str, turn: Turn, logged: Logged
) -> None:
    strategy = playing()
    strategy.has_work.side_effect = error(exceptions.NoSpace)

    for _ in range(2):
        healing.heal(strategy, disk, "raw", "reserve", turn)

    strategy.preallocate.assert_not_called()
    assert turn.taken == 0
    assert len(logged(logging.WARNING)) == 1


def test_disk_that_cannot_be_looked_at_is_warned_of_and_its_guest_starts(disk: str, turn: Turn, logged: Logged) -> None:
    strategy = playing()
    strategy.inspect.side_effect = error(exceptions.BrokenImage)

    healing.heal(strategy, disk, "qcow2", "reserve", turn, stock_length=units.Gi)

    strategy.preallocate.assert_not_called()
    assert len(logged(logging.WARNING)) == 1


@pytest.mark.parametrize(
    "fault",
    [
        error(exceptions.ImageInUse),
        error(exceptions.FormatMismatch),
        error(exceptions.FormatNotCertain, "qcow2"),
        error(exceptions.BrokenImage),
        error(exceptions.OwnerNotKept),
        error(exceptions.FileInTheWay),
        error(exceptions.DiskIsLink),
        error(exceptions.CommandFailed),
        error(exceptions.ProgramMissing, "qemu-img"),
        error(exceptions.FileError, 5),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_what_cannot_be_done_is_warned_of_once_and_the_guest_starts(
    disk: str, turn: Turn, logged: Logged, fault: Exception
) -> None:
    for _ in range(2):
        healing.heal(playing(fault), disk, "qcow2", "reserve", turn, stock_length=units.Gi)

    [warning] = logged(logging.WARNING)
    assert warning == f"{disk}: not preallocated: /d/disk: it is so. Do something."
    assert not turn.held


@pytest.mark.parametrize(
    "kind",
    [exceptions.ImageInUse, exceptions.DiskIsLink, exceptions.OwnerNotKept, exceptions.FileInTheWay],
    ids=lambda kind: str(kind.__name__),
)
def test_disk_that_cannot_be_replaced_is_reserved(
    disk: str, turn: Turn, logged: Logged, kind: type[exceptions.PreallocationError]
) -> None:
    asked: list[str] = []

    def preallocate(path: str, existing: Existing, **_: Any) -> mock.Mock:
        asked.append(existing)
        if existing == "rewrite":
            raise error(kind)
        return mock.Mock()

    with fixtures.MockPatchObject(looks, "remember", mock.Mock()):
        healing.heal(playing(preallocate), disk, "qcow2", "rewrite", turn)

    assert asked == ["rewrite", "reserve"]
    [warning] = logged(logging.WARNING)
    assert "not made anew" in warning


def test_what_nobody_has_foreseen_is_told_with_its_trace_and_the_guest_starts(
    disk: str, turn: Turn, caplog: pytest.LogCaptureFixture
) -> None:
    healing.heal(playing(ZeroDivisionError()), disk, "qcow2", "reserve", turn)

    [told] = [line for line in caplog.records if line.levelno == logging.ERROR]
    assert told.exc_info is not None
    assert disk in told.getMessage()


def test_end_by_a_signal_is_no_error_that_a_start_passes_over(disk: str, turn: Turn) -> None:
    with pytest.raises(KeyboardInterrupt):
        healing.heal(playing(KeyboardInterrupt()), disk, "qcow2", "reserve", turn)

    assert not turn.held


@pytest.mark.parametrize(
    ("state", "mode", "warnings"),
    [("thin", "falloc", 1), ("mapped", "full", 1), ("reserved", "falloc", 0), ("preallocated", "full", 0),
     ("thin", "metadata", 0)],
)  # fmt: skip
def test_disk_that_is_not_ours_to_write_is_only_looked_at(
    disk: str, turn: Turn, logged: Logged, state: str, mode: str, warnings: int
) -> None:
    strategy = playing(state=state, mode=mode)

    with fixtures.MockPatchObject(os, "access", lambda path, how: False):
        for _ in range(2):
            healing.heal(strategy, disk, "raw", "rewrite", turn)

    strategy.preallocate.assert_not_called()
    assert len(logged(logging.WARNING)) == warnings
    assert turn.taken == 0


def test_disk_that_is_not_ours_to_write_has_its_holes_filled_by_who_may(disk: str, turn: Turn) -> None:
    filled = []

    def preallocate(path: str, existing: Existing, **_: Any) -> None:
        fallocate.reserve(path, path, 4096, 8192)

    strategy = dataclasses.replace(Preallocator(), mode="full", on_unsupported="full")
    made = playing(preallocate)
    with (
        fixtures.MockPatchObject(os, "access", lambda path, how: False),
        fixtures.MockPatchObject(healing, "without_zeros", lambda strategy: made) as without_zeros,
    ):
        healing.heal(
            strategy, disk, "raw", "rewrite", turn, filler=lambda *stretch: filled.append((*stretch, turn.held))
        )

    status = os.stat(disk)
    assert filled == [(disk, status.st_dev, status.st_ino, 4096, 8192, True)]
    assert made.preallocate.call_args.args == (disk, "reserve")
    assert without_zeros


def test_disk_that_is_ours_has_its_holes_filled_by_ourselves(disk: str, turn: Turn) -> None:
    def preallocate(path: str, existing: Existing, **_: Any) -> None:
        fallocate.reserve(path, path, 0, 8192)

    healing.heal(playing(preallocate), disk, "raw", "reserve", turn, filler=lambda *_: pytest.fail("it is ours"))

    assert os.stat(disk).st_blocks * 512 >= 8192


# Space that is short.


@contextlib.contextmanager
def under(available: int, held: list[Extent] | None = None, *, can: bool = True) -> Iterator[None]:
    with (
        fixtures.MockPatchObject(filesystem, "under", lambda folder: Filesystem("ext4", can, False)),
        fixtures.MockPatchObject(filesystem, "available_to_us", lambda folder: available),
        fixtures.MockPatchObject(fallocate, "extents", lambda path: held),
    ):
        yield


@pytest.mark.parametrize(
    ("length", "available", "held", "lacks"),
    [
        (units.Mi, units.Mi, [], False),
        (units.Mi, units.Mi - 1, [], True),
        (units.Mi, 0, [Extent(0, units.Mi)], False),
        (units.Mi, 4096, [Extent(0, units.Mi - 4096)], False),
        (units.Mi, 4095, [Extent(0, units.Mi - 4096)], True),
        # Past what stock Nova would have asked for.
        (units.Mi, 4095, [Extent(units.Mi, units.Mi)], True),
        (None, 0, [], False),
        (0, 0, [], False),
    ],
)
def test_start_fails_for_want_of_space_only_where_stock_nova_s_would(
    disk: str, turn: Turn, logged: Logged, length: int | None, available: int, held: list[Extent], lacks: bool
) -> None:
    short = pytest.raises(exceptions.NoSpace) if lacks else contextlib.nullcontext()

    with under(available, held), short:
        healing.heal(playing(error(exceptions.NoSpace)), disk, "qcow2", "reserve", turn, stock_length=length)

    assert len(logged(logging.WARNING)) == (0 if lacks else 1)


def test_start_does_not_fail_for_want_of_space_where_stock_nova_may_not_write(
    disk: str, turn: Turn, logged: Logged
) -> None:
    with (
        under(0, []),
        fixtures.MockPatchObject(os, "access", lambda path, how: False),
        fixtures.MockPatchObject(healing, "without_zeros", lambda strategy: strategy),
    ):
        healing.heal(
            playing(error(exceptions.NoSpace)), disk, "raw", "reserve", turn, stock_length=units.Gi,
            filler=lambda *_: None,
        )  # fmt: skip

    assert len(logged(logging.WARNING)) == 1


def test_one_error_does_not_hide_another_of_the_same_disk(disk: str, turn: Turn, logged: Logged) -> None:
    for kind in (exceptions.ImageInUse, exceptions.NoSpace, exceptions.ImageInUse):
        healing.heal(playing(error(kind)), disk, "qcow2", "reserve", turn)

    assert len(logged(logging.WARNING)) == 2


def test_without_an_extent_map_the_blocks_count(disk: str) -> None:
    with open(disk, "wb") as file:
        file.write(b"x" * units.Mi)
        os.fsync(file.fileno())

    with under(0, None):
        assert not healing.would_lack_space_in_stock_nova(disk, units.Mi)
        assert healing.would_lack_space_in_stock_nova(disk, 2 * units.Mi)


def test_where_there_is_no_fallocate_stock_nova_does_without(disk: str) -> None:
    with under(0, [], can=False):
        assert not healing.would_lack_space_in_stock_nova(disk, units.Mi)


def test_guest_starts_where_it_cannot_be_told(disk: str) -> None:
    def fail(folder: str) -> Filesystem:
        raise OSError(5, "Input/output error")

    with fixtures.MockPatchObject(filesystem, "under", fail):
        assert not healing.would_lack_space_in_stock_nova(disk, units.Mi)
