# SPDX-License-Identifier: Apache-2.0
"""Locks for real: the kernel keeps two files opened in one process apart."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import errno
import fcntl
import pathlib

import fixtures
import pytest

from imgprealloc import exceptions
from imgprealloc import lock

from . import host

# QEMU's side (block/file-posix.c): byte 200 + n for "nobody else may use permission n".
NO_WRITER, NO_RESIZER = 201, 203


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "disk"
    path.write_bytes(b"content")
    return str(path)


def qemu_may_write(path: str) -> bool:
    """Look as QEMU does when it opens an image for writing."""
    with open(path, "rb") as file:
        return all(host.standing_lock(file.fileno(), byte) == fcntl.F_UNLCK for byte in (NO_WRITER, NO_RESIZER))


def test_disk_that_nobody_has_is_not_in_use(disk: str) -> None:
    assert lock.in_use(disk) is False


@pytest.mark.parametrize("byte", [host.WRITES, host.RESIZES])
def test_disk_that_qemu_may_write_or_resize_is_in_use(disk: str, byte: int) -> None:
    with host.opened_by_qemu(disk, byte):
        assert lock.in_use(disk) is True


def test_disk_that_qemu_only_reads_is_not_in_use(disk: str) -> None:
    with host.opened_by_qemu(disk, host.READS):
        assert lock.in_use(disk) is False


def test_writer_is_refused(disk: str) -> None:
    with host.opened_by_qemu(disk), pytest.raises(exceptions.ImageInUse, match=disk):
        lock.refuse_writer(disk)


def test_reader_is_not_refused(disk: str) -> None:
    with host.opened_by_qemu(disk, host.READS):
        lock.refuse_writer(disk)


def test_qemu_cannot_open_for_writing_what_is_kept_from_writers(disk: str) -> None:
    with lock.no_writer(disk):
        assert qemu_may_write(disk) is False


@pytest.mark.parametrize("byte", [NO_WRITER, NO_RESIZER])
def test_both_writing_and_resizing_are_forbidden(disk: str, byte: int) -> None:
    with lock.no_writer(disk), open(disk, "rb") as file:
        assert host.standing_lock(file.fileno(), byte) != fcntl.F_UNLCK


def test_qemu_can_open_for_writing_afterwards(disk: str) -> None:
    with lock.no_writer(disk):
        pass

    assert qemu_may_write(disk) is True


def test_qemu_can_open_for_writing_after_an_error(disk: str) -> None:
    with contextlib.suppress(ZeroDivisionError), lock.no_writer(disk):
        raise ZeroDivisionError

    assert qemu_may_write(disk) is True


def test_disk_with_a_writer_cannot_be_kept_from_writers(disk: str) -> None:
    with host.opened_by_qemu(disk):
        with pytest.raises(exceptions.ImageInUse), lock.no_writer(disk):
            pytest.fail("the block must not run")
        assert qemu_may_write(disk) is True


def test_two_may_keep_writers_away_at_the_same_time(disk: str) -> None:
    with lock.no_writer(disk), lock.no_writer(disk):
        assert qemu_may_write(disk) is False


def test_qemu_may_read_what_is_kept_from_writers(disk: str) -> None:
    with lock.no_writer(disk), open(disk, "rb") as file:
        # 200: "nobody else may read".
        assert host.standing_lock(file.fileno(), 200) == fcntl.F_UNLCK


def test_one_imgprealloc_alone_has_a_file(disk: str) -> None:
    with open(disk, "r+b") as first, open(disk, "r+b") as second:
        assert lock.try_exclusive(first.fileno()) is True
        assert lock.try_exclusive(second.fileno()) is False


def test_next_imgprealloc_has_it_once_the_first_is_gone(disk: str) -> None:
    with open(disk, "r+b") as first:
        lock.try_exclusive(first.fileno())

    with open(disk, "r+b") as second:
        assert lock.try_exclusive(second.fileno()) is True


def test_qemu_img_can_work_on_what_imgprealloc_has(disk: str) -> None:
    with open(disk, "r+b") as ours, open(disk, "rb") as qemu:
        lock.try_exclusive(ours.fileno())

        assert all(host.standing_lock(qemu.fileno(), byte) == fcntl.F_UNLCK for byte in range(100, 300))


def refusing(code: int) -> Callable[..., bytes]:
    def refuse(*arguments: object) -> bytes:
        raise OSError(code, "no locks")

    return refuse


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_a_filesystem_has_no_locks_we_do_without_as_qemu_does(disk: str, code: int) -> None:
    with fixtures.MockPatchObject(fcntl, "fcntl", refusing(code)):
        assert lock.in_use(disk) is False
        with lock.no_writer(disk), open(disk, "r+b") as file:
            assert lock.try_exclusive(file.fileno()) is True


def test_any_other_fault_of_a_lock_is_an_error(disk: str) -> None:
    with fixtures.MockPatchObject(fcntl, "fcntl", refusing(errno.EIO)), pytest.raises(OSError, match="no locks"):
        lock.in_use(disk)


def test_fault_of_the_exclusive_lock_is_not_taken_for_another_imgprealloc(disk: str) -> None:
    with (
        fixtures.MockPatchObject(fcntl, "fcntl", refusing(errno.EIO)),
        open(disk, "r+b") as file,
        pytest.raises(OSError, match="no locks"),
    ):
        lock.try_exclusive(file.fileno())
