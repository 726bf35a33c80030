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
import threading
import time
from typing import Any
from unittest import mock

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import command
from imgprealloc import exceptions
from imgprealloc import lock
from imgprealloc import pace
from imgprealloc import progress
from imgprealloc import zeros
from imgprealloc.fallocate import Extent

from . import host as hosts
from .host import ENOSPC
from .host import Programs
from .host import opened_by_qemu


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "disk"
    path.touch()
    return path


def write(path: pathlib.Path) -> None:
    with path.open("r+b") as file:
        zeros.write(str(path), file.fileno())


def fill(path: pathlib.Path) -> int:
    with path.open("r+b") as file:
        return zeros._main("/instances/1/disk", file.fileno())


def holes(path: pathlib.Path) -> list[Extent]:
    with path.open("rb") as file:
        return list(zeros.holes(file.fileno()))


@contextlib.contextmanager
def called_a_hole(*extents: Extent) -> Iterator[None]:
    """Let the filesystem call these stretches holes, whatever is in them."""
    with fixtures.MockPatchObject(zeros, "holes", lambda fd, start=0: iter(extents)):
        yield


# What starts the process.


def test_zeros_are_written_by_a_process_that_keeps_guests_out_even_without_us(
    programs: Programs, file: pathlib.Path
) -> None:
    os.truncate(file, units.Mi)

    write(file)

    [call] = programs.calls
    assert call.argv == (sys.executable, "-W", "ignore", "-m", "imgprealloc.zeros", str(file), "0")
    assert call.stdin is not None
    assert os.path.samestat(call.stdin, file.stat())


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


def test_process_that_ends_for_somebody_who_stays_is_told_as_that(file: pathlib.Path) -> None:
    os.truncate(file, units.Mi)
    held: list[Any] = []

    def visited(*_: object, **__: object) -> str:
        held.append(file.open("rb"))
        raise exceptions.CommandFailed(str(file), "imgprealloc.zeros failed with status 1", "Look.")

    with (
        fixtures.MockPatchObject(command, "run", visited),
        pytest.raises(exceptions.ImageInUse, match="has the file open"),
    ):
        write(file)

    held[0].close()


@pytest.mark.parametrize("kind", [exceptions.NoSpace, exceptions.CommandFailed])
def test_process_that_fails_by_itself_is_told_as_that(file: pathlib.Path, kind: type[Exception]) -> None:
    os.truncate(file, units.Mi)
    fault = kind(str(file), "imgprealloc.zeros failed with status 1", "Look.")

    with (
        fixtures.MockPatchObject(command, "run", mock.Mock(side_effect=fault)),
        pytest.raises(exceptions.CommandFailed) as caught,
    ):
        write(file)

    assert caught.value is fault


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

    block, end = zeros._BLOCK, 5 * units.Mi // 2
    assert written == [(start, min(block, end - start)) for start in range(65536, end, block)]


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
    assert f"called a hole what is none, at byte {position // zeros._BLOCK * zeros._BLOCK}" in said


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

    starts = range(0, 2 * units.Mi, zeros._BLOCK)
    assert done == [(deed, start) for start in starts for deed in ("read", "write")]


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
    leases: list[int] = []
    with fixtures.MockPatchObject(os, "fdatasync", lambda fd: leases.append(fcntl.fcntl(fd, fcntl.F_GETLEASE))):
        fill(file)

    assert leases == [fcntl.F_WRLCK]


def test_process_stops_when_somebody_opens_the_disk_and_lets_that_wait_until_then(file: pathlib.Path) -> None:
    # A guest that is being restored takes no lock of QEMU's, and may write at once.
    os.truncate(file, 4 * units.Mi)
    opened: list[int] = []
    somebody = threading.Thread(target=lambda: opened.append(os.open(file, os.O_RDWR)))
    real = os.pwrite

    def watched(fd: int, data: bytes, position: int) -> int:
        if position == 0:
            somebody.start()
            while fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK:
                time.sleep(0.001)
        assert not opened
        return real(fd, data, position)

    with fixtures.MockPatchObject(os, "pwrite", watched):
        assert fill(file) == 1

    somebody.join()
    os.close(opened[0])
    assert holes(file) == [Extent(zeros._BLOCK, 4 * units.Mi - zeros._BLOCK)]


@pytest.mark.parametrize("visits", [1, 3])
def test_process_goes_on_once_whoever_has_looked_at_the_disk_is_gone(file: pathlib.Path, visits: int) -> None:
    # As Nova's image cache looks at all disks, and imgprealloc metrics does, while a build takes an hour.
    os.truncate(file, 4 * units.Mi)
    real, seen = os.pwrite, 0
    visitors: list[threading.Thread] = []

    def watched(fd: int, data: bytes, position: int) -> int:
        nonlocal seen
        if seen < visits:
            seen += 1
            visitors.append(threading.Thread(target=file.read_bytes))
            visitors[-1].start()
            while fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK:
                time.sleep(0.001)
        return real(fd, data, position)

    with fixtures.MockPatchObject(os, "pwrite", watched):
        assert fill(file) == 0

    for visitor in visitors:
        visitor.join()
    assert seen == visits
    assert holes(file) == []


def test_disk_that_somebody_has_open_gets_no_zeros(file: pathlib.Path) -> None:
    os.truncate(file, units.Mi)

    with file.open("rb"):
        assert fill(file) == 1

    assert holes(file) == [Extent(0, units.Mi)]


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


def test_what_was_only_read_is_written_too(file: pathlib.Path) -> None:
    # lseek(2) calls it data, once it is in the page cache.
    with file.open("r+b") as disk:
        os.posix_fallocate(disk.fileno(), 0, 4 * units.Mi)
        disk.read()
        zeros._main(str(file), disk.fileno())
        zeros.forget_reads(disk.fileno())

    assert holes(file) == []


# From a place on, and at a pace.


def test_what_lies_before_the_start_is_left_as_it_was(file: pathlib.Path) -> None:
    os.truncate(file, 3 * units.Mi)

    with file.open("r+b") as disk:
        assert zeros._main("/instances/1/disk", disk.fileno(), units.Mi) == 0

    assert holes(file) == [Extent(0, units.Mi)]


def test_file_that_is_written_from_the_start_on_gets_no_zeros(programs: Programs, file: pathlib.Path) -> None:
    with file.open("r+b") as disk:
        disk.truncate(units.Mi)
        disk.seek(units.Mi)
        disk.write(b"x" * units.Mi)
        disk.flush()
        zeros.write(str(file), disk.fileno(), start=units.Mi)

    assert programs.calls == []


@pytest.mark.parametrize(("rate", "told"), [(None, "0"), (5 * units.Mi, str(5 * units.Mi))])
def test_process_is_told_of_the_pace(programs: Programs, file: pathlib.Path, rate: int | None, told: str) -> None:
    os.truncate(file, units.Mi)

    with pace.kept(pace.Pace(rate)):
        write(file)

    assert programs.calls[0].argv[-2:] == ("0", told)
    assert programs.calls[0].is_idle


def test_process_rests_until_it_is_no_faster_than_its_rate(file: pathlib.Path) -> None:
    os.truncate(file, 2 * units.Mi)
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with (
        fixtures.MockPatchObject(time, "monotonic", lambda: now[0]),
        fixtures.MockPatchObject(time, "sleep", sleep),
        file.open("r+b") as disk,
    ):
        assert zeros._main("/instances/1/disk", disk.fileno(), 0, units.Mi) == 0

    assert now == [pytest.approx(2.0)]
    assert holes(file) == []


def test_whoever_wants_to_open_the_file_does_not_wait_for_a_rest(file: pathlib.Path) -> None:
    os.truncate(file, units.Mi)
    opened: list[int] = []
    somebody = threading.Thread(target=lambda: opened.append(os.open(file, os.O_RDWR)))
    rests: list[float] = []

    def sleep(seconds: float) -> None:
        if not seconds:
            # No rest, but the wait for who has been let in, to be gone again.
            real(0.01)
            return
        rests.append(seconds)
        if len(rests) == 1:
            somebody.start()
            while fcntl.fcntl(disk.fileno(), fcntl.F_GETLEASE) == fcntl.F_WRLCK:
                real(0.001)

    real = time.sleep
    with (
        fixtures.MockPatchObject(lock, "_PAUSE", 0),
        fixtures.MockPatchObject(time, "sleep", sleep),
        file.open("r+b") as disk,
    ):
        # A block takes 64 s.
        assert zeros._main("/instances/1/disk", disk.fileno(), 0, 4 * units.Ki) == 1
        somebody.join()

    os.close(opened[0])
    assert len(rests) == 1
    assert rests[0] < 1


@pytest.mark.parametrize(("rate", "times"), [(None, 1), (0, 4)])
def test_no_more_piles_up_than_another_s_fsync_can_wait_for(file: pathlib.Path, rate: int | None, times: int) -> None:
    size = 3 * zeros._PORTION
    os.truncate(file, size)
    synced: list[int] = []
    with fixtures.MockPatchObject(os, "fdatasync", synced.append), file.open("r+b") as disk:
        assert zeros._main("/instances/1/disk", disk.fileno(), 0, rate) == 0

    assert len(synced) == times


def test_process_prints_how_far_it_is_as_we_read_it(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(file, units.Mi)
    with progress.told_to(lambda *now: None):
        work = progress.printed(units.Mi)
    assert work is not None

    fill(file)

    lines = capsys.readouterr().out.splitlines()
    assert [work.done(line.encode()) for line in lines] == [units.Mi * quarter // 4 for quarter in (1, 2, 3, 4)]
