# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
import errno
import os
import pathlib
from typing import Any

import fixtures
import pytest

from imgprealloc import presence


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "disk"


def failing(call: str, code: int) -> fixtures.Fixture:
    """Let a system call fail."""

    def fail(*how: Any, **more: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fixtures.MockPatchObject(os, call, fail)


# A look that fails is no proof.

FAULTS = [errno.EIO, errno.ESTALE, errno.EACCES, errno.ELOOP, errno.ENOMEM, errno.ETIMEDOUT]


def test_file_that_is_there_is_there(disk: pathlib.Path) -> None:
    disk.touch()

    assert presence.is_there(str(disk)) is True


@pytest.mark.parametrize("make", [lambda disk: None, lambda disk: disk.symlink_to("nowhere")])
def test_file_that_is_not_there_is_not(disk: pathlib.Path, make: Callable[[pathlib.Path], None]) -> None:
    make(disk)

    assert presence.is_there(str(disk)) is False
    assert presence.is_there(f"{disk}/none") is False


@pytest.mark.parametrize("code", FAULTS)
def test_file_that_cannot_be_looked_at_may_be_there(disk: pathlib.Path, code: int) -> None:
    with failing("stat", code):
        assert presence.is_there(str(disk)) is True


# Absent is what neither its name nor its folder knows of.


def test_what_is_not_there_was_absent_and_nothing_is_made(disk: pathlib.Path) -> None:
    with failing("open", errno.EROFS):
        assert presence.was_absent(str(disk)) is True

    assert os.listdir(disk.parent) == []


def test_what_is_in_a_folder_that_is_not_there_was_absent(disk: pathlib.Path) -> None:
    assert presence.was_absent(f"{disk}/none") is True


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda disk: disk.write_bytes(b"precious"), id="a file"),
        pytest.param(lambda disk: disk.mkdir(), id="a folder"),
        pytest.param(lambda disk: os.mkfifo(disk), id="a pipe"),
        pytest.param(lambda disk: disk.symlink_to("nowhere"), id="a link to nowhere"),
    ],
)
def test_what_is_there_was_not_absent_and_stays(disk: pathlib.Path, make: Callable[[pathlib.Path], None]) -> None:
    make(disk)
    before = disk.lstat()

    assert presence.was_absent(str(disk)) is False
    assert disk.lstat() == before


@pytest.mark.parametrize("call", ["lstat", "listdir"])
@pytest.mark.parametrize("code", FAULTS)
def test_what_cannot_be_looked_at_is_not_proven_to_be_absent(disk: pathlib.Path, call: str, code: int) -> None:
    with failing(call, code):
        assert presence.was_absent(str(disk)) is False


def test_name_that_a_server_has_but_is_remembered_as_free_was_not_absent(disk: pathlib.Path) -> None:
    disk.write_bytes(b"precious")

    with failing("lstat", errno.ENOENT):
        assert presence.was_absent(str(disk)) is False


# Removing one file and no other.


def test_file_is_removed_if_it_is_the_one(disk: pathlib.Path) -> None:
    disk.touch()

    assert presence.remove_same(str(disk), disk.stat()) is True
    assert not disk.exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_file_that_cannot_be_looked_at_is_not_removed(disk: pathlib.Path, code: int) -> None:
    disk.touch()
    status = disk.stat()

    with failing("lstat", code):
        assert presence.remove_same(str(disk), status) is False

    assert disk.exists()


def test_another_file_of_that_name_is_not_removed(disk: pathlib.Path) -> None:
    disk.touch()
    status = disk.stat()
    (disk.parent / "other").write_bytes(b"precious")
    os.replace(disk.parent / "other", disk)

    assert presence.remove_same(str(disk), status) is False
    assert disk.read_bytes() == b"precious"


def test_link_to_the_file_is_not_the_file(disk: pathlib.Path) -> None:
    (disk.parent / "other").touch()
    disk.symlink_to(disk.parent / "other")

    assert presence.remove_same(str(disk), os.stat(disk)) is False
    assert disk.is_symlink()
