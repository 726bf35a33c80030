# SPDX-License-Identifier: Apache-2.0
"""What is refused before space is given back, and what is given back; the holes are the filesystem's own."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import sys
from typing import Any
from unittest import mock

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import lock
from imgprealloc import progress
from imgprealloc import punching
from imgprealloc import zeros
from imgprealloc.fallocate import Extent

from . import host as hosts
from .host import Programs
from .host import opened_by_qemu


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    """Give a file of 4 MiB that is held, of which the second is written."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * units.Mi)
        file.seek(units.Mi)
        file.write(b"x" * units.Mi)
    return path


def punch(path: pathlib.Path) -> int:
    with path.open("r+b") as file:
        return punching._main(str(path), file.fileno())


def test_space_is_given_back_by_a_process_of_its_own(programs: Programs, file: pathlib.Path) -> None:
    with file.open("r+b") as disk:
        punching.give_back(str(file), disk.fileno())

    [call] = programs.calls
    assert call.argv == (sys.executable, "-W", "ignore", "-m", "imgprealloc.punching", str(file))
    assert call.stdin is not None
    assert os.path.samestat(call.stdin, file.stat())


def test_process_gives_back_what_is_not_written_and_changes_no_byte(file: pathlib.Path) -> None:
    before = file.read_bytes()

    assert punch(file) == 0

    assert units.Mi <= file.stat().st_blocks * 512 < 2 * units.Mi
    assert file.read_bytes() == before


def test_process_gives_back_what_lies_past_the_end(file: pathlib.Path) -> None:
    with file.open("r+b") as disk:
        fallocate._fallocate(disk.fileno(), fallocate._KEEP_SIZE, 4 * units.Mi, 8 * units.Mi)

    assert punch(file) == 0

    assert file.stat().st_blocks * 512 < 2 * units.Mi
    assert file.stat().st_size == 4 * units.Mi


def test_disk_that_has_grown_meanwhile_is_not_cut_off(file: pathlib.Path) -> None:
    # By somebody on another host, whom no lease keeps out.
    def grow(*_: object) -> None:
        os.truncate(file, 8 * units.Mi)

    with (
        fixtures.MockPatchObject(lock, "sole_opener", lambda path, fd: contextlib.nullcontext(lambda: None)),
        fixtures.MockPatchObject(zeros, "require_zeros", grow),
    ):
        assert punch(file) == 0

    assert file.stat().st_size == 8 * units.Mi


def test_stretch_that_reads_as_data_is_an_error_and_is_kept(
    file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # lseek(2) has called dirty data a hole (OpenZFS 15526).
    before = file.read_bytes()

    with fixtures.MockPatchObject(zeros, "holes", lambda fd: iter([Extent(0, 4 * units.Mi)])):
        assert punch(file) == 1

    assert file.read_bytes() == before
    assert "called a hole what is none" in capsys.readouterr().err


@pytest.mark.parametrize("bytes_", [(), (hosts.NO_WRITER, hosts.NO_RESIZER)], ids=["open", "backs a snapshot"])
def test_process_gives_nothing_back_of_what_a_guest_uses(file: pathlib.Path, bytes_: tuple[int, ...]) -> None:
    # One that has come after the caller has looked, on a filesystem without leases.
    def unleased(path: str, fd: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext(lambda: None)

    with opened_by_qemu(str(file), *bytes_), fixtures.MockPatchObject(lock, "sole_opener", unleased):
        assert punch(file) == 1

    assert file.stat().st_blocks * 512 >= 4 * units.Mi


def test_process_gives_nothing_back_of_what_somebody_has_open(file: pathlib.Path) -> None:
    with file.open("rb"):
        assert punch(file) == 1

    assert file.stat().st_blocks * 512 >= 4 * units.Mi


def test_no_process_is_started_for_a_disk_in_use(programs: Programs, file: pathlib.Path) -> None:
    with (
        fixtures.MockPatchObject(lock, "_PAUSE", 0),
        file.open("rb"),
        file.open("r+b") as disk,
        pytest.raises(exceptions.ImageInUse),
    ):
        punching.give_back(str(file), disk.fileno())

    assert programs.calls == []


def test_filesystem_that_gives_back_no_part_of_a_file_is_told(programs: Programs, file: pathlib.Path) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with (
        fixtures.MockPatchObject(fallocate, "punch", fail),
        file.open("r+b") as disk,
        pytest.raises(exceptions.UnsupportedFilesystem, match="--rewrite"),
    ):
        punching.give_back(str(file), disk.fileno())

    assert programs.calls == []


def test_file_that_may_only_be_read_is_a_matter_of_permissions(programs: Programs, file: pathlib.Path) -> None:
    with file.open("rb") as disk, pytest.raises(PermissionError):
        punching.give_back(str(file), disk.fileno())

    assert programs.calls == []


def test_filesystem_that_may_only_be_read_is_no_matter_of_permissions(programs: Programs, file: pathlib.Path) -> None:
    with (
        file.open("rb") as disk,
        fixtures.MockPatchObject(os, "fstatvfs", lambda fd: mock.Mock(f_flag=os.ST_RDONLY)),
        pytest.raises(OSError, match="Read-only file system"),
    ):
        punching.give_back(str(file), disk.fileno())


def test_process_prints_how_far_it_is_as_we_read_it(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.told_to(lambda *now: None):
        work = progress.printed(4 * units.Mi)
    assert work is not None

    punch(file)

    told = [work.done(line.encode()) for line in capsys.readouterr().out.splitlines()]
    assert told == [megabyte * units.Mi for megabyte in (1, 3, 4)]


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ([], [(0, 9)], []),
        ([(0, 9)], [], []),
        ([(0, 4), (6, 4)], [(2, 6)], [(2, 2), (6, 2)]),
        ([(2, 6)], [(0, 4), (6, 4)], [(2, 2), (6, 2)]),
        ([(0, 2)], [(2, 2)], []),
        ([(0, 2), (4, 2)], [(0, 2), (4, 2)], [(0, 2), (4, 2)]),
    ],
)
def test_what_is_in_both_of_two_lists(
    first: list[tuple[int, int]], second: list[tuple[int, int]], both: list[tuple[int, int]]
) -> None:
    lists = ([Extent(*pair) for pair in pairs] for pairs in (first, second))

    assert [(extent.start, extent.length) for extent in punching._common(*lists)] == both
