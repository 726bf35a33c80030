# SPDX-License-Identifier: Apache-2.0
"""What is opened once is what is looked at and worked on."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import time
from typing import Any

import fixtures
import pytest

from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import lock
from imgprealloc.disk_file import DiskFile

from . import host as hosts

Opening = Callable[[str], "contextlib.AbstractContextManager[DiskFile]"]

each_opening = pytest.mark.parametrize("opening", [disk_file.opened, disk_file.claimed])


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "instance").mkdir()
    path = tmp_path / "instance" / "disk"
    path.write_bytes(b"content")
    return path


@pytest.fixture(autouse=True)
def all_closed() -> Iterator[None]:
    """Let no test leave a file open."""
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@each_opening
def test_disk_is_open_with_its_folder_and_its_name(disk: pathlib.Path, opening: Opening) -> None:
    with opening(str(disk)) as file:
        assert (file.path, file.folder, file.name) == (str(disk), str(disk.parent), "disk")
        assert os.path.samestat(os.fstat(file.fd), disk.stat())
        assert os.path.samestat(os.fstat(file.folder_fd), disk.parent.stat())
        assert file.real_path == str(disk)


@each_opening
def test_disk_that_is_open_and_cannot_be_looked_at_is_closed(disk: pathlib.Path, opening: Opening) -> None:
    failing = fixtures.MockPatchObject(os, "fstat", side_effect=OSError(errno.EIO, os.strerror(errno.EIO)))

    with pytest.raises(OSError, match="Input/output error"), failing, opening(str(disk)):
        pass


@each_opening
def test_relative_path_stays_as_it_was_named(
    disk: pathlib.Path, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(disk.parent)

    with opening("disk") as file:
        assert (file.path, file.real_path) == ("disk", str(disk))


@each_opening
def test_link_is_resolved_once(disk: pathlib.Path, opening: Opening) -> None:
    link = disk.parent.parent / "link"
    link.symlink_to("instance/disk")

    with opening(str(link)) as file:
        assert (file.path, file.folder, file.name) == (str(link), str(disk.parent), "disk")


@each_opening
def test_two_dots_after_a_link_lead_where_the_system_says(disk: pathlib.Path, opening: Opening) -> None:
    # By its letters LINK/../disk is the decoy.
    elsewhere = disk.parent.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "link").symlink_to(disk.parent)
    (elsewhere / "disk").write_bytes(b"decoy")
    (disk.parent.parent / "disk").write_bytes(b"true")

    with opening(str(elsewhere / "link" / ".." / "disk")) as file:
        assert os.pread(file.fd, 10, 0) == b"true"
        assert file.real_path == str(disk.parent.parent / "disk")


def test_program_opens_the_same_file_whatever_has_its_name_by_then(disk: pathlib.Path) -> None:
    with disk_file.opened(str(disk)) as file:
        disk.rename(disk.parent / "kept")
        disk.write_bytes(b"another")

        read = subprocess.run(["cat", file.program_name], stdout=subprocess.PIPE, check=True).stdout

    assert read == b"content"


def test_folder_stays_the_same_whatever_has_its_name_by_then(disk: pathlib.Path) -> None:
    with disk_file.place(str(disk)) as place:
        disk.parent.rename(disk.parent.parent / "kept")
        disk.parent.mkdir()

        assert place.stat() is not None


def test_backing_file_is_looked_for_beside_the_disk_itself(disk: pathlib.Path) -> None:
    link = disk.parent.parent / "link"
    link.symlink_to("instance/disk")

    with disk_file.opened(str(link)) as file:
        assert file.beside("base") == str(disk.parent / "base")
        assert file.beside("/b/base") == "/b/base"


# What is no disk.


@each_opening
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda path: os.mkdir(path), id="a folder"),
        pytest.param(lambda path: os.mkfifo(path), id="a pipe"),
        pytest.param(lambda path: os.symlink("/dev/null", path), id="a device"),
    ],
)
def test_what_is_no_regular_file_is_no_disk_and_is_not_waited_for(
    disk: pathlib.Path, opening: Opening, make: Callable[[str], None]
) -> None:
    path = str(disk.parent / "other")
    make(path)

    with pytest.raises(exceptions.DiskNotFound, match="not a regular file"), opening(path):
        pytest.fail("the block must not run")


@each_opening
@pytest.mark.parametrize("name", ["none", "", "none/disk", "disk\n"])
def test_what_is_not_there_is_not_found(disk: pathlib.Path, opening: Opening, name: str) -> None:
    with pytest.raises(exceptions.DiskNotFound), opening(os.path.join(disk.parent, name)):
        pytest.fail("the block must not run")


@each_opening
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_cannot_be_looked_at_is_not_what_is_not_there(disk: pathlib.Path, opening: Opening, code: int) -> None:
    real = os.stat

    def fail(path: Any, *how: Any, **more: Any) -> os.stat_result:
        if path == str(disk):
            raise OSError(code, os.strerror(code), path)
        return real(path, *how, **more)

    with (
        fixtures.MockPatchObject(os, "stat", fail),
        pytest.raises(OSError, match=os.strerror(code)),
        opening(str(disk)),
    ):
        pytest.fail("the block must not run")


@each_opening
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_comes_between_the_look_and_the_opening_is_neither_followed_nor_waited_for(
    disk: pathlib.Path, opening: Opening, kind: str
) -> None:
    real = os.open

    def late(path: str, flags: int, *mode: int, **how: int) -> int:
        if path == "disk":
            disk.unlink()
            os.mkfifo(disk) if kind == "pipe" else disk.symlink_to("/etc/passwd")
        return real(path, flags, *mode, **how)

    with (
        fixtures.MockPatchObject(os, "open", late),
        pytest.raises((exceptions.DiskNotFound, OSError)),
        opening(str(disk)),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_folder_is_no_place_for_a_disk(disk: pathlib.Path, name: str) -> None:
    with (
        pytest.raises(exceptions.DiskNotFound, match="names a folder"),
        disk_file.place(os.path.join(disk.parent, name)),
    ):
        pytest.fail("the block must not run")


def test_place_that_cannot_be_looked_at_is_not_one_where_nothing_is(disk: pathlib.Path) -> None:
    with disk_file.place(str(disk.parent / "none")) as place:
        assert place.stat() is None

        def fail(*how: Any, **more: Any) -> None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        with fixtures.MockPatchObject(os, "stat", fail), pytest.raises(OSError, match="Stale"):
            place.stat()


@each_opening
def test_who_asks_just_now_who_has_the_disk_open_is_waited_for(disk: pathlib.Path, opening: Opening) -> None:
    # A write lease, which lock takes for a moment, refuses those who would not wait.
    with disk.open("r+b") as other:
        fcntl.fcntl(other.fileno(), fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(other.fileno(), fcntl.F_SETLEASE, fcntl.F_WRLCK)

        def over(seconds: float) -> None:
            fcntl.fcntl(other.fileno(), fcntl.F_SETLEASE, fcntl.F_UNLCK)

        with fixtures.MockPatchObject(time, "sleep", over), opening(str(disk)) as file:
            assert os.pread(file.fd, 10, 0) == b"content"


# The only one at work.


def test_of_two_that_work_on_a_disk_the_second_is_refused(disk: pathlib.Path) -> None:
    with (
        disk_file.claimed(str(disk)),
        pytest.raises(exceptions.ImageInUse, match="another imgprealloc"),
        disk_file.claimed(str(disk)),
    ):
        pytest.fail("the block must not run")


def test_disk_that_is_worked_on_can_be_looked_at(disk: pathlib.Path) -> None:
    with disk_file.claimed(str(disk)), disk_file.opened(str(disk)):
        pass


def test_qemu_may_have_a_disk_that_is_claimed(disk: pathlib.Path) -> None:
    with disk_file.claimed(str(disk)), hosts.opened_by_qemu(str(disk)):
        pass


def test_who_has_waited_for_the_claim_does_not_work_on_what_was_replaced_meanwhile(disk: pathlib.Path) -> None:
    def late(fd: int) -> bool:
        other = disk.parent / "other"
        other.write_bytes(b"another")
        os.replace(other, disk)
        return True

    with (
        fixtures.MockPatchObject(lock, "try_exclusive", late),
        pytest.raises(exceptions.ImageInUse, match="replaced"),
        disk_file.claimed(str(disk)),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_disk_that_may_only_be_read_is_opened_for_reading(disk: pathlib.Path, code: int) -> None:
    real = os.open

    def refuse(path: str, flags: int, *mode: int, **how: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(code, os.strerror(code), path)
        return real(path, flags, *mode, **how)

    with fixtures.MockPatchObject(os, "open", refuse), disk_file.claimed(str(disk)) as file:
        assert os.pread(file.fd, 10, 0) == b"content"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda disk: disk.write_bytes(b"changed"), id="written"),
        pytest.param(lambda disk: os.truncate(disk, 1), id="cut off"),
        pytest.param(lambda disk: os.utime(disk, ns=(0, 0)), id="set back"),
        pytest.param(lambda disk: disk.unlink(), id="removed"),
        pytest.param(lambda disk: disk.rename(disk.parent / "kept"), id="renamed"),
        pytest.param(lambda disk: os.replace(_twin(disk), disk), id="replaced by one of the same time and size"),
    ],
)
def test_disk_that_has_changed_since_it_was_looked_at_is_refused(
    disk: pathlib.Path, change: Callable[[pathlib.Path], object]
) -> None:
    # Clocks of filesystems tick slowly.
    os.utime(disk, ns=(1, 1))
    with disk_file.opened(str(disk)) as file:
        stamp = file.stamp()
        file.refuse_changed(stamp)
        change(disk)

        with pytest.raises(exceptions.ImageInUse, match=r"it was (written to|replaced)"):
            file.refuse_changed(stamp)


def _twin(disk: pathlib.Path) -> pathlib.Path:
    twin = disk.parent / "twin"
    twin.write_bytes(disk.read_bytes())
    os.utime(twin, ns=(disk.stat().st_atime_ns, disk.stat().st_mtime_ns))
    return twin


def test_disk_that_its_guest_writes_to_meanwhile_can_be_claimed(disk: pathlib.Path) -> None:
    real = os.fstat

    def written(fd: int) -> os.stat_result:
        status = real(fd)
        with disk.open("ab") as guest:
            guest.write(b"more")
        return status

    with fixtures.MockPatchObject(os, "fstat", written), disk_file.claimed(str(disk)) as file:
        assert file.name == disk.name


def test_claim_ends_though_a_process_that_is_just_being_started_has_the_file_open(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "disk"
    path.touch()
    with disk_file.claimed(str(path)) as file:
        # As after fork(2), and before execve(2).
        inherited = os.dup(file.fd)

    try:
        with disk_file.claimed(str(path)):
            pass
    finally:
        os.close(inherited)


def test_claim_of_a_process_that_is_just_ending_is_waited_for(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "disk"
    path.touch()
    other = os.open(path, os.O_RDWR)
    assert lock.try_exclusive(other)

    with fixtures.MockPatchObject(time, "sleep", lambda seconds: os.close(other)), disk_file.claimed(str(path)):
        pass
