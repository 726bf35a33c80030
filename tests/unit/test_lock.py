# SPDX-License-Identifier: Apache-2.0
"""Locks and leases for real: the kernel keeps two files opened in one process apart."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import fcntl
import glob
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import fixtures
import pytest

from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc import lock
from imgprealloc import mounts
from imgprealloc import punching
from imgprealloc import zeros

from . import host


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """Wait for nobody who has the file open."""
    with fixtures.MockPatchObject(lock, "_PAUSE", 0):
        yield


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "disk"
    path.write_bytes(b"content")
    return str(path)


@pytest.fixture
def fd(disk: str) -> Iterator[int]:
    """Give the disk, open as a verb has it."""
    with open(disk, "r+b") as file:
        yield file.fileno()


def qemu_may_write(path: str) -> bool:
    """Look as QEMU does when it opens an image for writing."""
    with open(path, "rb") as file:
        return all(
            host.standing_lock(file.fileno(), byte) == fcntl.F_UNLCK for byte in (host.NO_WRITER, host.NO_RESIZER)
        )


# What QEMU's bytes tell.


def test_disk_that_nobody_has_has_no_writer(fd: int) -> None:
    assert lock.has_writer(fd) is False


@pytest.mark.parametrize("byte", [host.WRITES, host.RESIZES])
def test_disk_that_qemu_may_write_or_resize_has_a_writer(disk: str, fd: int, byte: int) -> None:
    with host.opened_by_qemu(disk, byte):
        assert lock.has_writer(fd) is True


@pytest.mark.parametrize("byte", [host.READS, host.NO_WRITER, host.NO_RESIZER])
def test_disk_that_qemu_only_reads_has_no_writer(disk: str, fd: int, byte: int) -> None:
    with host.opened_by_qemu(disk, byte):
        assert lock.has_writer(fd) is False


@pytest.mark.parametrize("byte", [host.WRITES, host.RESIZES, host.NO_WRITER, host.NO_RESIZER])
def test_whoever_qemu_would_be_refused_by_is_refused_to_us(disk: str, fd: int, byte: int) -> None:
    # 201 and 203 are held by a guest whose disk stands on this one.
    with host.opened_by_qemu(disk, byte):
        with pytest.raises(exceptions.ImageInUse, match=disk):
            lock.refuse_users(disk, fd)
        with pytest.raises(exceptions.ImageInUse, match=disk), lock.no_writer(disk, fd):
            pytest.fail("the block must not run")


def test_disk_that_nobody_has_open_is_not_refused(disk: str, fd: int) -> None:
    lock.refuse_users(disk, fd)


# Writers are kept away.


def test_qemu_cannot_open_for_writing_what_is_kept_from_writers(disk: str, fd: int) -> None:
    with lock.no_writer(disk, fd):
        assert qemu_may_write(disk) is False


@pytest.mark.parametrize("byte", [host.NO_WRITER, host.NO_RESIZER])
def test_both_writing_and_resizing_are_forbidden(disk: str, fd: int, byte: int) -> None:
    with lock.no_writer(disk, fd), open(disk, "rb") as file:
        assert host.standing_lock(file.fileno(), byte) != fcntl.F_UNLCK


def test_qemu_can_open_for_writing_afterwards(disk: str, fd: int) -> None:
    with lock.no_writer(disk, fd):
        pass

    assert qemu_may_write(disk) is True


def test_qemu_can_open_for_writing_after_an_error(disk: str, fd: int) -> None:
    with contextlib.suppress(ZeroDivisionError), lock.no_writer(disk, fd):
        raise ZeroDivisionError

    assert qemu_may_write(disk) is True


def test_disk_with_a_writer_cannot_be_kept_from_writers(disk: str, fd: int) -> None:
    with host.opened_by_qemu(disk):
        with pytest.raises(exceptions.ImageInUse), lock.no_writer(disk, fd):
            pytest.fail("the block must not run")
        assert qemu_may_write(disk) is True


def test_of_two_that_keep_writers_away_the_second_is_refused(disk: str, fd: int) -> None:
    with lock.no_writer(disk, fd), open(disk, "r+b") as second:
        with pytest.raises(exceptions.ImageInUse), lock.no_writer(disk, second.fileno()):
            pytest.fail("the block must not run")
        assert qemu_may_write(disk) is False


def test_qemu_may_read_what_is_kept_from_writers(disk: str, fd: int) -> None:
    with lock.no_writer(disk, fd), open(disk, "rb") as file:
        # 200: "nobody else may read".
        assert host.standing_lock(file.fileno(), 200) == fcntl.F_UNLCK


# Whoever has it open without QEMU's bytes.


@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_open_file_elsewhere_is_refused(disk: str, fd: int, mode: str) -> None:
    # A guest that is being restored has its disk open, and no lock on it.
    with open(disk, mode), pytest.raises(exceptions.ImageInUse, match=f"fuser -v {disk}"):
        lock.refuse_users(disk, fd)


def test_open_file_that_is_soon_closed_is_waited_for(disk: str, fd: int) -> None:
    other = open(disk, "rb")  # noqa: SIM115
    with fixtures.MockPatchObject(time, "sleep", lambda seconds: other.close()):
        lock.refuse_users(disk, fd)

    assert other.closed


def test_no_lease_stays_behind(disk: str, fd: int) -> None:
    lock.refuse_users(disk, fd)

    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK


def test_who_opens_the_disk_while_it_is_looked_at_does_not_end_us(disk: str) -> None:
    # The kernel tells the holder of a lease by a signal that ends a process by default.
    code = f"""
import fcntl, os, subprocess, sys
from imgprealloc import lock

real = fcntl.fcntl

def opened_meanwhile(fd, command, *argument):
    answer = real(fd, command, *argument)
    if (command, argument) == (fcntl.F_SETLEASE, (fcntl.F_WRLCK,)):
        other = "import os\\ntry: os.open({disk!r}, os.O_RDWR | os.O_NONBLOCK)\\nexcept BlockingIOError: print('met')"
        subprocess.run([sys.executable, "-c", other], check=True)
    return answer

lock.fcntl.fcntl = opened_meanwhile
lock.refuse_users({disk!r}, os.open({disk!r}, os.O_RDWR))
print("alive")
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stdout.split()) == (0, ["met", "alive"])


def without_leases(code: int) -> fixtures.Fixture:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, *argument: Any) -> Any:
        if command == fcntl.F_SETLEASE:
            raise OSError(code, os.strerror(code))
        return real(fd, command, *argument)

    return fixtures.MockPatchObject(fcntl, "fcntl", refuse)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_a_filesystem_has_no_leases_we_do_without(disk: str, fd: int, code: int) -> None:
    with without_leases(code), open(disk, "rb"):
        lock.refuse_users(disk, fd)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.EAGAIN])
def test_where_it_has_to_be_certain_no_lease_is_a_refusal(disk: str, fd: int, code: int) -> None:
    with (
        without_leases(code),
        fixtures.MockPatchObject(filesystem, "is_remote", lambda path: True),
    ):
        with pytest.raises(exceptions.ImageInUse), lock.sole_opener(disk, fd, certainly=True):
            pytest.fail("it is not certain")
        # The control.
        with lock.sole_opener(disk, fd) as refuse_others:
            refuse_others()


def test_lease_on_what_other_hosts_may_have_open_proves_nothing(disk: str, fd: int) -> None:
    # OCFS2 grants it.
    with fixtures.MockPatchObject(filesystem, "is_remote", lambda fd: True):
        with pytest.raises(exceptions.ImageInUse), lock.sole_opener(disk, fd, certainly=True):
            pytest.fail("it is not certain")
        # The control.
        with lock.sole_opener(disk, fd) as refuse_others:
            refuse_others()


def test_user_for_whom_the_kernel_has_taken_the_lease_is_told_of(disk: str, fd: int) -> None:
    with lock.sole_opener(disk, fd) as refuse_others:
        # Whoever waits to open the file is let in after 45 seconds.
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        with pytest.raises(exceptions.ImageInUse):
            refuse_others()


@pytest.mark.parametrize("module", [zeros, punching])
def test_guest_that_has_waited_for_a_lease_is_not_refused_by_our_locks(disk: str, fd: int, module: Any) -> None:
    leases: list[int] = []
    no_writer = lock.no_writer

    @contextlib.contextmanager
    def listening(path: str, fd: int) -> Iterator[None]:
        leases.append(fcntl.fcntl(fd, fcntl.F_GETLEASE))
        with no_writer(path, fd):
            yield
        leases.append(fcntl.fcntl(fd, fcntl.F_GETLEASE))

    with fixtures.MockPatchObject(lock, "no_writer", listening):
        assert module._main(disk, fd) == 0

    assert leases == [fcntl.F_WRLCK, fcntl.F_WRLCK]


def test_server_that_gives_no_delegation_is_not_taken_for_a_user(disk: str, fd: int) -> None:
    with without_leases(errno.EAGAIN), fixtures.MockPatchObject(filesystem, "is_remote", lambda path: True):
        lock.refuse_users(disk, fd)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES])
def test_loop_device_s_file_is_refused_also_without_leases(
    disk: str, fd: int, tmp_path: pathlib.Path, code: int
) -> None:
    attribute = tmp_path / "backing_file"
    attribute.write_text(f"{disk}\n")

    with (
        without_leases(code),
        fixtures.MockPatchObject(glob, "glob", lambda pattern: [str(tmp_path / "gone"), str(attribute)]),
        pytest.raises(exceptions.ImageInUse, match="losetup --list"),
    ):
        lock.refuse_users(disk, fd)


def test_another_file_s_loop_device_is_nothing_to_us(disk: str, fd: int, tmp_path: pathlib.Path) -> None:
    attribute = tmp_path / "backing_file"
    attribute.write_text("/a/file/that/is/gone (deleted)\n")

    with without_leases(errno.EINVAL), fixtures.MockPatchObject(glob, "glob", lambda pattern: [str(attribute)]):
        lock.refuse_users(disk, fd)


# One imgprealloc alone.


def test_one_imgprealloc_alone_has_a_file(disk: str) -> None:
    with open(disk, "r+b") as first, open(disk, "r+b") as second:
        assert lock.try_exclusive(first.fileno()) is True
        assert lock.try_exclusive(second.fileno()) is False


def test_next_imgprealloc_has_it_once_the_first_is_gone(disk: str) -> None:
    with open(disk, "r+b") as first:
        lock.try_exclusive(first.fileno())

    with open(disk, "r+b") as second:
        assert lock.try_exclusive(second.fileno()) is True


def test_whether_another_imgprealloc_has_a_file_can_be_seen_without_taking_it(disk: str, fd: int) -> None:
    with open(disk, "r+b") as first:
        assert lock.is_exclusive(fd) is False
        lock.try_exclusive(first.fileno())
        assert lock.is_exclusive(fd) is True


def test_qemu_img_can_work_on_what_imgprealloc_has(disk: str) -> None:
    with open(disk, "r+b") as ours, open(disk, "rb") as qemu:
        lock.try_exclusive(ours.fileno())

        assert all(host.standing_lock(qemu.fileno(), byte) == fcntl.F_UNLCK for byte in range(100, 300))


def test_whoever_has_its_turn_outlasts_those_who_wait_for_it_with_the_file_open(disk: str, fd: int) -> None:
    # Else of two that come at once neither would be let in.
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with (
        fixtures.MockPatchObject(lock, "_PAUSE", 0.1),
        fixtures.MockPatchObject(time, "sleep", sleep),
        fixtures.MockPatchObject(time, "monotonic", lambda: now),
        open(disk, "rb"),
    ):
        with fixtures.MockPatchObject(lock, "try_exclusive", lambda fd: False):
            assert lock.wait_exclusive(fd) is False
        waited, now = now, 0.0
        with pytest.raises(exceptions.ImageInUse):
            lock.refuse_users(disk, fd)

    assert now > 1.5 * waited


# Other hosts.


def _mounted(type: str, options: str) -> Any:
    line = f"36 25 0:50 / /srv/nova rw shared:1 - {type} server:/nova rw,{options}"
    mount = mounts._parsed(line)
    return fixtures.MockPatchObject(mounts, "of", lambda fd: mount)


@pytest.mark.parametrize(
    ("type", "options", "unseen"),
    [
        ("nfs4", "vers=4.2,local_lock=none,addr=192.0.2.1", False),
        ("nfs", "vers=3,local_lock=none,addr=192.0.2.1", False),
        # Of these QEMU asks for none.
        ("nfs", "vers=3,local_lock=flock,addr=192.0.2.1", False),
        ("nfs", "vers=3,nolock,local_lock=all,addr=192.0.2.1", True),
        ("nfs", "vers=3,nolock,addr=192.0.2.1", True),
        ("nfs", "vers=3,local_lock=posix,addr=192.0.2.1", True),
        ("lustre", "flock,lazystatfs", False),
        ("lustre", "localflock,lazystatfs", True),
        ("cifs", "vers=3.1.1,soft", False),
        ("cifs", "vers=3.1.1,soft,nobrl", True),
    ],
)
def test_guest_of_another_host_is_not_seen_where_locks_are_this_host_s_alone(
    fd: int, type: str, options: str, unseen: bool
) -> None:
    with fixtures.MockPatchObject(filesystem, "type_of", lambda fd: type), _mounted(type, options):
        assert lock.may_be_used_unseen(fd) is unseen


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_guest_of_another_host_is_not_seen_where_there_are_no_locks(fd: int, code: int) -> None:
    with (
        fixtures.MockPatchObject(filesystem, "type_of", lambda fd: "lustre"),
        fixtures.MockPatchObject(fcntl, "fcntl", refusing(code)),
    ):
        assert lock.may_be_used_unseen(fd) is True


def test_no_other_host_has_a_local_filesystem_whatever_its_locks(fd: int) -> None:
    with (
        fixtures.MockPatchObject(filesystem, "type_of", lambda fd: "ext4"),
        fixtures.MockPatchObject(fcntl, "fcntl", refusing(errno.ENOLCK)),
    ):
        assert lock.may_be_used_unseen(fd) is False


def test_fault_of_the_look_for_other_hosts_is_an_error(fd: int) -> None:
    with (
        fixtures.MockPatchObject(filesystem, "type_of", lambda fd: "nfs"),
        fixtures.MockPatchObject(fcntl, "fcntl", refusing(errno.EIO)),
        pytest.raises(OSError, match="no locks"),
    ):
        lock.may_be_used_unseen(fd)


# Faults.


def refusing(code: int) -> Callable[..., bytes]:
    def refuse(*arguments: object) -> bytes:
        raise OSError(code, "no locks")

    return refuse


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_a_filesystem_has_no_locks_we_do_without_as_qemu_does(disk: str, fd: int, code: int) -> None:
    with fixtures.MockPatchObject(fcntl, "fcntl", refusing(code)):
        assert lock.has_writer(fd) is False
        with lock.no_writer(disk, fd):
            assert lock.try_exclusive(fd) is True


def test_any_other_fault_of_a_lock_is_an_error(fd: int) -> None:
    with fixtures.MockPatchObject(fcntl, "fcntl", refusing(errno.EIO)), pytest.raises(OSError, match="no locks"):
        lock.has_writer(fd)


# By EACCES AppArmor and SELinux say that there are to be no locks.
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_fault_of_the_exclusive_lock_is_not_taken_for_another_imgprealloc(fd: int, code: int) -> None:
    with (
        fixtures.MockPatchObject(fcntl, "fcntl", refusing(code)),
        pytest.raises(OSError, match="no locks"),
    ):
        lock.try_exclusive(fd)
