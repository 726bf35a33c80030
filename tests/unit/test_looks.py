# SPDX-License-Identifier: Apache-2.0
"""What is remembered of a look, and for how long; and what preallocate() makes of it."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import logging
import os
import time
from typing import Any

import fixtures
import pytest

from imgprealloc import Existing
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import healing
from imgprealloc import looks
from imgprealloc.fallocate import Extent

from .host import SIZE
from .host import Host

# A disk that is thin, so that no quick look tells.
_OLD = 1_000_000_000


def _aged(path: str) -> str:
    """Let a disk be one whose last change is long ago, for the clock that looks go by."""
    os.utime(path, ns=(_OLD, _OLD))
    return path


@pytest.fixture(autouse=True)
def later() -> Any:
    """Let all changes be a second ago."""
    now = time.time_ns
    with fixtures.MockPatchObject(time, "time_ns", lambda: now() + 1_000_000_000):
        yield


def _looks(host: Host) -> int:
    return len(host.run("check"))


def _look(path: str, format: str = "qcow2") -> str:
    return looks.at(Preallocator(), path, format).state


def test_second_look_at_a_disk_that_has_not_changed_starts_nothing(host: Host) -> None:
    path = host.qcow2()

    assert [_look(path), _look(path)] == ["thin", "thin"]

    assert _looks(host) == 1


def _written(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"x")


def _replaced(path: str) -> None:
    with open(path, "rb") as file, open(f"{path}.new", "wb") as new:
        new.write(file.read())
    os.replace(f"{path}.new", path)


@pytest.mark.parametrize(
    "change",
    [_written, lambda path: os.utime(path), lambda path: os.chmod(path, 0o600)],
    ids=["size", "mtime", "ctime"],
)
def test_disk_whose_inode_tells_of_a_change_is_looked_at_again(host: Host, change: Callable[[str], object]) -> None:
    path = host.qcow2()
    _look(path)
    time.sleep(0.02)

    change(path)
    _look(path)

    assert _looks(host) == 2


def test_blocks_that_come_and_go_are_a_change(host: Host) -> None:
    path = host.qcow2()
    found = looks.at(Preallocator(), path, "qcow2")
    status = os.stat(path)

    assert looks._is_of(found, status)
    assert not looks._is_of(found, os.stat_result((*status[:10],), {**_times(status), "st_blocks": 99}))


def _times(status: os.stat_result) -> dict[str, Any]:
    return {name: getattr(status, name) for name in ("st_mtime_ns", "st_ctime_ns", "st_atime_ns")}


def test_what_is_known_of_a_disk_in_one_format_is_not_of_another(host: Host) -> None:
    path = host.qcow2()
    _look(path)

    assert looks.at(Preallocator(), path, "raw").format == "raw"


def test_disk_that_has_only_just_changed_is_not_remembered(host: Host) -> None:
    path = host.qcow2()
    with fixtures.MockPatchObject(time, "time_ns", lambda: os.stat(path).st_ctime_ns + 1_000_000):
        _look(path)
        _look(path)

    assert _looks(host) == 2


def test_disk_that_changes_while_it_is_looked_at_is_not_remembered(host: Host) -> None:
    path = host.qcow2()
    found = Preallocator().inspect(path, format="qcow2")
    time.sleep(0.02)
    os.utime(path)

    looks.remember(found)
    _look(path)

    assert _looks(host) == 2


def test_fault_is_not_remembered(host: Host) -> None:
    path = host.qcow2()
    host.disk(path)
    with (
        fixtures.MockPatchObject(Preallocator, "inspect", _broken),
        pytest.raises(exceptions.BrokenImage),
    ):
        _look(path)

    assert _look(path) == "thin"


def _broken(self: Preallocator, path: str, **_: Any) -> None:
    raise exceptions.BrokenImage(path, "it is so", "Do something.")


def test_memory_is_bounded(host: Host) -> None:
    paths = [host.qcow2(name=f"disk{number}") for number in range(3)]
    with fixtures.MockPatchObject(looks, "_MOST_REMEMBERED", 2):
        for path in paths:
            _look(path)

    assert len(looks._seen) == 2


@pytest.mark.parametrize(("is_plain", "asked"), [(True, 1), (False, 2)])
def test_where_extents_can_be_shared_behind_an_inode_s_back_they_are_looked_at_again(
    host: Host, is_plain: bool, asked: int
) -> None:
    path = host.qcow2()
    with fixtures.MockPatchObject(filesystem, "is_plain", lambda fd: is_plain):
        _look(path)
        whole = [Extent(0, SIZE, shared=True)]
        with fixtures.MockPatchObject(fallocate, "extents", lambda name: whole):
            _look(path)

    assert _looks(host) == asked


class Turn(contextlib.AbstractContextManager[None]):
    """A turn that tells how often it was taken, and what had been run by then."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.before: list[list[str]] = []

    def __enter__(self) -> None:
        self.before.append(list(self.host.changes))

    def __exit__(self, *_: object) -> None:
        """Whoever waits may go on."""


@pytest.mark.parametrize(
    ("disk", "existing", "taken"),
    [
        ({"mapped": 1.0}, "rewrite", 0),
        ({"mapped": 0.5, "held": 4 * SIZE}, "reserve", 0),
        ({"mapped": 1.0, "held": 0}, "reserve", 1),
        ({}, "just_made", 1),
        ({"mapped": 0.5}, "rewrite", 1),
    ],
)
def test_turn_is_taken_only_for_a_disk_that_is_treated_and_before_that(
    host: Host, disk: dict[str, Any], existing: Existing, taken: int
) -> None:
    turn = Turn(host)
    path = host.qcow2(**disk)

    if existing == "just_made":
        healing.preallocate_new(Preallocator(), path, "qcow2", turn)
    else:
        healing.heal(Preallocator(), path, "qcow2", existing, turn)

    assert turn.before == [[]] * taken


def test_what_is_known_of_a_disk_is_not_asked_again(host: Host) -> None:
    path = host.qcow2(mapped=1.0)
    known = Preallocator().inspect(path, format="qcow2")

    assert Preallocator().preallocate(path, format="qcow2", known=known) is known

    assert _looks(host) == 1


def test_what_was_known_of_a_disk_that_has_changed_is_not_believed(host: Host) -> None:
    path = host.qcow2(mapped=1.0)
    known = Preallocator().inspect(path, format="qcow2")
    time.sleep(0.02)
    os.utime(path)

    Preallocator().preallocate(path, format="qcow2", known=known)

    assert _looks(host) == 2


def test_no_disk_is_replaced_on_what_was_known_of_it(host: Host) -> None:
    # It is taken for an empty one, and is none.
    path = host.qcow2()
    known = Preallocator().inspect(path, format="qcow2")
    host.disk(path).mapped = 7

    image = Preallocator().preallocate(path, "recreate_blank", format="qcow2", known=known)

    assert image.state == "reserved"
    assert "create" not in host.changes


def test_disk_that_changes_while_its_turn_is_waited_for_is_looked_at_again(host: Host) -> None:
    path = host.qcow2(mapped=1.0, held=0)

    @contextlib.contextmanager
    def waiting() -> Any:
        time.sleep(0.02)
        os.utime(path)
        host.disk(path).held = 4 * SIZE
        yield

    healing.heal(Preallocator(), path, "qcow2", "reserve", waiting())

    assert host.changes == []


def test_disk_that_is_removed_while_its_turn_is_waited_for_gets_no_space(
    host: Host, logged: Callable[[int], list[str]]
) -> None:
    path = host.qcow2(mapped=1.0, held=0)

    @contextlib.contextmanager
    def waiting() -> Any:
        os.unlink(path)
        yield

    healing.heal(Preallocator(), path, "qcow2", "reserve", waiting())

    assert host.changes == []
    assert len(logged(logging.WARNING)) == 1


def test_disk_is_free_for_others_while_its_turn_is_waited_for(host: Host) -> None:
    path = host.qcow2(mapped=1.0, held=0)

    @contextlib.contextmanager
    def waiting() -> Any:
        Preallocator().resize(path, 2 * SIZE, format="qcow2")
        yield

    healing.heal(Preallocator(), path, "qcow2", "reserve", waiting())

    assert Preallocator().inspect(path, format="qcow2").state == "preallocated"
