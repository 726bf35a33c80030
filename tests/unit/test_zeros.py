# SPDX-License-Identifier: Apache-2.0
"""Zeros for real: the holes are the filesystem's own."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
import pathlib
import sys

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import lock
from imgprealloc import zeros
from imgprealloc.fallocate import Extent

from . import host as hosts
from .host import ENOSPC
from .host import Programs
from .host import opened_by_qemu
from .host import standing_lock


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "disk"
    path.touch()
    return path


def write(path: pathlib.Path) -> None:
    with path.open("r+b") as file:
        zeros.write(str(path), disk_file.name_of(file.fileno()), file.fileno())


def fill(path: pathlib.Path) -> int:
    return zeros._main("/instances/1/disk", str(path))


def holes(path: pathlib.Path) -> list[Extent]:
    with path.open("rb") as file:
        return list(zeros._holes(file.fileno()))


@contextlib.contextmanager
def called_a_hole(*extents: Extent) -> Iterator[None]:
    """Let the filesystem call these stretches holes, whatever is in them."""
    with fixtures.MockPatchObject(zeros, "_holes", lambda fd: iter(extents)):
        yield


# What starts the process.


def test_zeros_are_written_by_a_process_that_keeps_guests_out_even_without_us(
    programs: Programs, file: pathlib.Path
) -> None:
    os.truncate(file, units.Mi)

    write(file)

    [call] = programs.calls
    assert call.shown == (sys.executable, "-m", "imgprealloc.zeros", str(file), str(file))
    assert call.argv[-1].startswith(f"/proc/{os.getpid()}/fd/")


@pytest.mark.parametrize("content", [b"", b"x" * units.Mi], ids=["empty", "without holes"])
def test_file_without_holes_gets_no_zeros(programs: Programs, file: pathlib.Path, content: bytes) -> None:
    file.write_bytes(content)

    write(file)

    assert programs.calls == []


def test_no_process_is_started_to_write_zeros_to_a_disk_in_use(programs: Programs, file: pathlib.Path) -> None:
    os.truncate(file, units.Mi)

    with opened_by_qemu(str(file)), pytest.raises(exceptions.ImageInUse):
        write(file)

    assert programs.calls == []


def test_no_process_is_started_to_write_zeros_to_a_disk_that_is_open_without_a_lock(
    programs: Programs, file: pathlib.Path
) -> None:
    os.truncate(file, units.Mi)

    with (
        fixtures.MockPatchObject(lock, "_PAUSE", 0),
        file.open("rb"),
        pytest.raises(exceptions.ImageInUse, match="has the file open"),
    ):
        write(file)

    assert programs.calls == []


# The process.


def test_process_fills_every_hole_and_leaves_what_is_written(file: pathlib.Path) -> None:
    with file.open("wb") as disk:
        disk.seek(256 * units.Ki)
        disk.write(b"x" * 65536)
        disk.truncate(3 * units.Mi)
    before = file.read_bytes()

    assert fill(file) == 0

    assert file.read_bytes() == before
    assert holes(file) == []


def test_process_writes_nothing_while_a_guest_may_write(file: pathlib.Path) -> None:
    os.truncate(file, units.Mi)
    # One that has come after the caller has looked.
    with opened_by_qemu(str(file)):
        assert fill(file) == 1

    assert holes(file) != []


def test_process_writes_nothing_to_a_disk_that_backs_a_guest_s_snapshot(file: pathlib.Path) -> None:
    os.truncate(file, units.Mi)

    with opened_by_qemu(str(file), hosts.NO_WRITER, hosts.NO_RESIZER):
        assert fill(file) == 1

    assert holes(file) != []


def test_process_writes_over_holes_only_and_in_portions(file: pathlib.Path) -> None:
    with file.open("wb") as disk:
        disk.write(b"x" * 65536)
        disk.truncate(5 * units.Mi // 2)
    written: list[tuple[int, int]] = []
    real = os.pwrite

    def watched(fd: int, data: bytes, position: int) -> int:
        written.append((position, len(data)))
        return real(fd, data, position)

    with fixtures.MockPatchObject(os, "pwrite", watched):
        assert fill(file) == 0

    assert written == [(65536, units.Mi), (65536 + units.Mi, units.Mi), (65536 + 2 * units.Mi, units.Mi // 2 - 65536)]


@pytest.mark.parametrize("position", [0, 4095, 100_000, 2 * units.Mi - 1])
def test_hole_that_reads_as_data_is_an_error_and_nothing_is_written_over_it(
    file: pathlib.Path, position: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # lseek(2) has called dirty data a hole (OpenZFS 15526).
    os.truncate(file, 2 * units.Mi)
    with file.open("r+b") as disk:
        disk.seek(position)
        disk.write(b"\x01")
    before = file.read_bytes()

    with called_a_hole(Extent(0, 2 * units.Mi)):
        assert fill(file) == 1

    assert file.read_bytes() == before
    said = capsys.readouterr().err
    assert "/instances/1/disk" in said
    assert "calls a hole what is none" in said


def test_every_byte_is_read_before_it_is_written_over(file: pathlib.Path) -> None:
    os.truncate(file, 2 * units.Mi)
    done: list[tuple[str, int]] = []
    read, wrote = os.pread, os.pwrite

    def reading(fd: int, length: int, position: int) -> bytes:
        done.append(("read", position))
        return read(fd, length, position)

    def writing(fd: int, data: bytes, position: int) -> int:
        done.append(("write", position))
        return wrote(fd, data, position)

    with fixtures.MockPatchObject(os, "pread", reading), fixtures.MockPatchObject(os, "pwrite", writing):
        fill(file)

    assert done == [("read", 0), ("write", 0), ("read", units.Mi), ("write", units.Mi)]


def test_filesystem_that_knows_no_holes_is_all_data(file: pathlib.Path) -> None:
    os.truncate(file, units.Mi)
    ends = {os.SEEK_HOLE: units.Mi, os.SEEK_DATA: 0}

    with fixtures.MockPatchObject(os, "lseek", lambda fd, offset, whence: max(offset, ends[whence])):
        assert holes(file) == []


def test_fault_of_the_look_for_holes_is_an_error(file: pathlib.Path) -> None:
    os.truncate(file, units.Mi)

    def faulty(fd: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_DATA:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return 0

    with fixtures.MockPatchObject(os, "lseek", faulty), pytest.raises(OSError, match="Input/output error"):
        holes(file)


def test_zeros_are_on_stable_storage_before_a_guest_may_write_again(file: pathlib.Path) -> None:
    os.truncate(file, units.Mi)
    locks: list[int] = []
    with (
        file.open("rb") as guest,
        fixtures.MockPatchObject(
            os, "fdatasync", lambda fd: locks.append(standing_lock(guest.fileno(), hosts.NO_WRITER))
        ),
    ):
        fill(file)

    assert locks == [fcntl.F_RDLCK]


def raises(code: int) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_zeros_that_do_not_fit_are_told_in_the_words_of_strerror(
    file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fixtures.MockPatchObject(os, "fdatasync", raises(errno.ENOSPC)):
        status = fill(file)

    assert status == 1
    assert ENOSPC in capsys.readouterr().err


def test_process_leaves_nothing_open_and_nothing_locked(file: pathlib.Path) -> None:
    os.truncate(file, units.Mi)
    before = os.listdir("/proc/self/fd")

    fill(file)

    assert os.listdir("/proc/self/fd") == before
