# SPDX-License-Identifier: Apache-2.0
"""A reservation that cannot have all gives back what it has got, and nothing that was there or is written meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import fcntl
import itertools
import os
import pathlib
from typing import Any

import images
import loop_filesystem
import pytest

from imgprealloc import Mode
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc.promise import Promise

KiB, MiB = 1 << 10, 1 << 20

SIZE = 128 * MiB
FREE = 48 * MiB
# What a filesystem may keep for its own tables, of a file in more pieces.
OWN = 256 * KiB

common = pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
each_format = pytest.mark.parametrize("disk_format", ["raw", "qcow2"])


@pytest.fixture
def disk_format() -> str:
    return "raw"


@pytest.fixture
def disk(tight: pathlib.Path, kind: str, disk_format: str) -> pathlib.Path:
    """Give a disk with data here and there, of which 48 MiB in 8 holes can be filled, and what follows cannot."""
    if kind == "btrfs":
        images.run("chattr", "+C", tight)
    path = tight / "disk"
    if disk_format == "raw":
        images.sparse_file(path, SIZE)
        with open(path, "r+b") as file:
            for start in range(0, SIZE, 8 * MiB):
                os.pwrite(file.fileno(), os.urandom(64 * KiB), start + 12345)
    else:
        images.qcow2(path, SIZE)
        images.qemu_io(path, "write -P 0x5a 3M 1M", "write -P 0x5b 33M 2M")
        # Of which stock Nova's disks have more than their end.
        os.truncate(path, os.path.getsize(path) + 4 * MiB)
    _leave(tight, FREE)
    return path


def _leave(folder: pathlib.Path, room: int) -> None:
    """Take all but so much, by files of 8 MiB, because btrfs does not tell what is really to be had."""
    fillers = folder / "fillers"
    fillers.mkdir()
    with contextlib.suppress(AssertionError):
        for number in itertools.count():
            images.run("fallocate", "-l", 8 * MiB, fillers / str(number))
    for filler in list(fillers.iterdir())[: room // (8 * MiB)]:
        filler.unlink()
    images.run("sync", "-f", folder)


@pytest.fixture(autouse=True)
def _taken_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the space seem to be there when it is asked for, as statvfs(2) says where it cannot be had."""
    monkeypatch.setattr(Promise, "require_space", lambda self, place, needed, fd=None: None)


@pytest.fixture
def reserved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List how many bytes of the disk were set aside, after each piece that was."""
    found: list[int] = []
    reserve = fallocate.reserve

    def listening(path: str, name: str, start: int, length: int) -> None:
        try:
            reserve(path, name, start, length)
        finally:
            found.append(os.stat(name).st_blocks * 512)

    monkeypatch.setattr(fallocate, "reserve", listening)
    return found


def _refused(disk: pathlib.Path, disk_format: str = "raw", mode: Mode = "falloc") -> exceptions.NoSpace:
    with pytest.raises(exceptions.NoSpace) as caught:
        Preallocator(mode).preallocate(disk, format=disk_format)
    return caught.value


@common
@each_format
@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_what_was_got_is_given_back(disk: pathlib.Path, disk_format: str, mode: Mode) -> None:
    free, length, content = images.free(disk.parent), disk.stat().st_size, images.file_digest(disk)

    _refused(disk, disk_format, mode)

    assert images.free(disk.parent) >= free - OWN
    assert (disk.stat().st_size, images.file_digest(disk)) == (length, content)


@common
def test_something_was_got(disk: pathlib.Path, reserved: list[int]) -> None:
    # The control of what is above.
    before = images.allocated(disk)

    _refused(disk)

    assert max(reserved) > before + 16 * MiB


@common
def test_disk_is_preallocated_once_there_is_room(disk: pathlib.Path) -> None:
    _refused(disk)
    images.run("rm", "-r", disk.parent / "fillers")

    assert Preallocator().preallocate(disk, format="raw").state == "preallocated"


@common
def test_what_was_set_aside_before_is_kept(disk: pathlib.Path) -> None:
    images.run("fallocate", "-n", "-o", 10 * MiB, "-l", 4 * MiB, disk)
    images.run("fallocate", "-n", "-o", 30 * MiB, "-l", 12 * MiB, disk)
    before = images.holes(disk)

    _refused(disk)

    assert images.holes(disk) == before


@common
@pytest.mark.parametrize("beyond", [0, 4 * MiB])
def test_what_lies_beyond_the_end_is_given_back_but_for_what_was_there(
    tight: pathlib.Path, kind: str, beyond: int
) -> None:
    if kind == "btrfs":
        images.run("chattr", "+C", tight)
    disk = images.qcow2(tight / "disk", SIZE)
    images.qemu_io(disk, "write -P 0x5a 3M 1M")
    end = disk.stat().st_size
    if beyond:
        images.run("fallocate", "-n", "-o", end, "-l", beyond, disk)
    _leave(tight, FREE)
    held = images.held(disk)

    _refused(disk, "qcow2")

    assert held <= images.held(disk)
    if not beyond:
        assert images.held(disk) == held
    assert disk.stat().st_size == end


@common
def test_what_is_written_meanwhile_is_kept_also_if_it_is_not_on_the_disk_yet(
    disk: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By somebody who has closed it again: a guest that was started and has ended.
    written = os.urandom(300 * KiB)
    reserve = fallocate.reserve

    def reserve_and_write(path: str, name: str, start: int, length: int) -> None:
        reserve(path, name, start, length)
        # The first hole is a small one.
        if length > 2 * MiB:
            with open(disk, "r+b") as file:
                os.pwrite(file.fileno(), written, start + MiB)
            starts.append(start + MiB)

    starts: list[int] = []
    monkeypatch.setattr(fallocate, "reserve", reserve_and_write)

    _refused(disk)

    assert len(starts) > 2
    with open(disk, "rb") as file:
        assert all(os.pread(file.fileno(), len(written), start) == written for start in starts)


@contextlib.contextmanager
def _read_by_somebody(disk: pathlib.Path) -> Iterator[None]:
    with open(disk, "rb"):
        yield


@contextlib.contextmanager
def _run_by_a_guest(disk: pathlib.Path) -> Iterator[None]:
    with images.guest(disk, format="raw"):
        yield


@common
@pytest.mark.parametrize("held_open", [_read_by_somebody, _run_by_a_guest])
def test_disk_that_somebody_has_open_keeps_what_it_has_got(
    disk: pathlib.Path,
    held_open: Callable[[pathlib.Path], contextlib.AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    punched: list[Any] = []
    monkeypatch.setattr(fallocate, "punch", lambda *stretch: punched.append(stretch))
    before, length = images.allocated(disk), disk.stat().st_size

    with held_open(disk):
        _refused(disk)

    assert punched == []
    assert (images.allocated(disk) > before, disk.stat().st_size) == (True, length)


@common
def test_disk_that_somebody_wants_to_open_meanwhile_keeps_the_rest(
    disk: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    punched: list[Any] = []
    punch = fallocate.punch

    def punch_and_be_waited_for(fd: int, start: int, length: int) -> None:
        punch(fd, start, length)
        punched.append(start)
        with pytest.raises(BlockingIOError):
            os.open(disk, os.O_RDWR | os.O_NONBLOCK)

    monkeypatch.setattr(fallocate, "punch", punch_and_be_waited_for)

    _refused(disk)

    assert len(punched) == 1


@common
def test_guest_that_the_kernel_lets_in_before_a_punch_is_refused_by_qemu_s_locks(
    disk: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it does when a punch has waited for 45 seconds, as on a frozen filesystem.
    refusals: list[str] = []
    punch = fallocate.punch

    def punch_late(fd: int, start: int, length: int) -> None:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        try:
            images.qemu_io(disk, f"write -P 0x77 {start} 4k", format="raw")
        except AssertionError as exc:
            refusals.append(str(exc))
        punch(fd, start, length)

    monkeypatch.setattr(fallocate, "punch", punch_late)

    _refused(disk)

    assert len(refusals) == 1
    assert 'Failed to get "write" lock' in refusals[0]
    # Nor does it keep anybody out afterwards.
    images.qemu_io(disk, "write 0 4k", format="raw")


def test_disk_that_another_host_may_have_open_keeps_what_it_has_got(
    disk: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # OCFS2 has holes, an extent map, and leases that only this host knows of.
    before = images.allocated(disk)
    monkeypatch.setattr(filesystem, "type_of", lambda fd: "ocfs2")

    _refused(disk)

    assert images.allocated(disk) > before + 16 * MiB


def test_disk_of_which_nobody_can_tell_who_has_it_open_keeps_what_it_has_got(
    disk: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def without_leases(fd: int, command: int, *argument: Any) -> Any:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return real(fd, command, *argument)

    before = images.allocated(disk)
    monkeypatch.setattr(fcntl, "fcntl", without_leases)

    _refused(disk)

    assert images.allocated(disk) > before + 16 * MiB


def test_fault_of_giving_back_does_not_hide_the_lack_of_space(
    disk: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fallocate, "filled", broken)

    assert "No space left" in str(_refused(disk))


def test_quota_that_statvfs_does_not_tell_of_leaves_nothing_half_done() -> None:
    with loop_filesystem.mounted("btrfs", 400 * MiB) as mount_point:
        volume = pathlib.Path(mount_point, "volume")
        images.run("btrfs", "quota", "enable", mount_point)
        images.run("btrfs", "subvolume", "create", volume)
        images.run("btrfs", "qgroup", "limit", 64 * MiB, volume)
        images.run("chattr", "+C", volume)
        disk = images.sparse_file(volume / "disk", SIZE)
        with open(disk, "r+b") as file:
            for start in range(0, SIZE, 8 * MiB):
                os.pwrite(file.fileno(), os.urandom(64 * KiB), start)
        images.run("sync", "-f", mount_point)
        before = images.allocated(disk)

        assert "quota" in str(_refused(disk))

        assert images.allocated(disk) == before
        # The quota is as good as before, too.
        images.run("fallocate", "-l", 48 * MiB, volume / "another")
