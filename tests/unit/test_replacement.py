# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import stat
import tempfile
import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import lock
from imgprealloc import os_errors
from imgprealloc import replacement
from imgprealloc.disk_file import Place
from imgprealloc.replacement import NewFile

from . import host as hosts
from .host import Programs

TEMPORARY = ".disk.imgprealloc"
ZEROS = ".disk.imgprealloc-zeros"


@pytest.fixture
def disk(programs: Programs, tmp_path: pathlib.Path) -> pathlib.Path:
    """Give the path of a disk in an empty folder."""
    return tmp_path / "disk"


def names(disk: pathlib.Path) -> list[str]:
    return sorted(os.listdir(disk.parent))


@contextlib.contextmanager
def new_disk(disk: pathlib.Path, judge: Callable[[NewFile], object] = lambda new: None) -> Any:
    """Give the new file that becomes the disk, or takes its place."""
    if not os.path.exists(disk):
        with disk_file.place(str(disk)) as place, replacement.new(place, judge) as new:
            yield new
        return
    with disk_file.claimed(str(disk)) as file, replacement.replacing(file, file.stamp(), judge) as new:
        yield new


def replace(disk: pathlib.Path, content: bytes = b"new") -> None:
    with new_disk(disk) as new:
        os.pwrite(new.fd, content, 0)


def content(file: Place) -> bytes:
    return pathlib.Path(file.folder, file.name).read_bytes()


def leave(disk: pathlib.Path, name: str = TEMPORARY, written: bytes = b"half of a disk") -> pathlib.Path:
    """Leave a file as a crash leaves ours."""
    path = disk.parent / name
    path.write_bytes(written)
    path.chmod(0o1600)
    return path


@contextlib.contextmanager
def zeros(disk: pathlib.Path, size: int) -> Any:
    with disk_file.place(str(disk)) as place, replacement.zeros(place, size) as file:
        yield file


# The next disk.


def test_new_file_becomes_the_disk(disk: pathlib.Path) -> None:
    replace(disk)

    assert disk.read_bytes() == b"new"
    assert names(disk) == ["disk"]


def test_new_file_takes_the_place_of_the_old_disk(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    replace(disk)

    assert disk.read_bytes() == b"new"
    assert names(disk) == ["disk"]


def test_new_file_is_empty_and_beside_the_disk(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    with new_disk(disk) as new:
        assert (new.folder, new.name) == (str(disk.parent), TEMPORARY)
        assert os.fstat(new.fd).st_size == 0
        assert disk.read_bytes() == b"old"


def test_new_file_is_on_stable_storage_before_it_gets_its_name(programs: Programs, disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")
    seen: list[bytes] = []
    programs.then["sync"] = lambda: seen.append(disk.read_bytes())

    replace(disk)

    assert [call.shown for call in programs.calls] == [("sync", str(disk.parent / TEMPORARY))]
    assert seen == [b"old"]


def test_name_is_on_stable_storage_too(disk: pathlib.Path) -> None:
    synced: list[tuple[bool, list[str]]] = []
    with fixtures.MockPatchObject(
        os, "fsync", lambda fd: synced.append((stat.S_ISDIR(os.fstat(fd).st_mode), names(disk)))
    ):
        replace(disk)

    assert synced == [(False, [TEMPORARY]), (True, ["disk"])]


@pytest.mark.parametrize("existed", [True, False])
def test_error_leaves_the_disk_as_it_was_and_nothing_beside_it(disk: pathlib.Path, existed: bool) -> None:
    if existed:
        disk.write_bytes(b"old")

    with contextlib.suppress(ZeroDivisionError), new_disk(disk) as new:
        os.pwrite(new.fd, b"half", 0)
        raise ZeroDivisionError

    assert names(disk) == (["disk"] if existed else [])
    assert not existed or disk.read_bytes() == b"old"


def test_file_that_is_judged_wanting_does_not_become_the_disk(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    def judge(new: NewFile) -> None:
        assert content(new) == b"new"
        raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError), new_disk(disk, judge) as new:
        os.pwrite(new.fd, b"new", 0)

    assert disk.read_bytes() == b"old"
    assert names(disk) == ["disk"]


def test_disk_that_is_written_to_meanwhile_is_not_replaced(programs: Programs, disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")
    # Clocks of filesystems tick slowly.
    os.utime(disk, (0, 0))
    # Not by QEMU, which our lock would keep out.
    programs.then["sync"] = lambda: disk.write_bytes(b"newer")

    with pytest.raises(exceptions.ImageInUse, match="written to"):
        replace(disk)

    assert disk.read_bytes() == b"newer"
    assert names(disk) == ["disk"]


@pytest.mark.parametrize("existed", [True, False])
def test_sync_that_fails_leaves_the_disk_as_it_was(programs: Programs, disk: pathlib.Path, existed: bool) -> None:
    if existed:
        disk.write_bytes(b"old")
    programs.ends("sync", 1, "sync: error syncing: Input/output error")

    with pytest.raises(exceptions.CommandFailed):
        replace(disk)

    assert names(disk) == (["disk"] if existed else [])
    assert not existed or disk.read_bytes() == b"old"


@pytest.mark.parametrize("existed", [True, False])
def test_writes_that_were_lost_and_told_to_another_leave_the_disk_as_it_was(
    programs: Programs, disk: pathlib.Path, existed: bool
) -> None:
    if existed:
        disk.write_bytes(b"old")

    with (
        fixtures.MockPatchObject(os, "fsync", side_effect=OSError(errno.EIO, "Input/output error")),
        pytest.raises(OSError, match="Input/output error"),
    ):
        replace(disk)

    assert [call.shown[0] for call in programs.calls] == ["sync"]
    assert names(disk) == (["disk"] if existed else [])
    assert not existed or disk.read_bytes() == b"old"


def test_what_a_crash_has_left_is_made_anew(disk: pathlib.Path) -> None:
    stale = leave(disk)

    with stale.open("rb") as witness:
        with new_disk(disk) as new:
            assert os.fstat(new.fd).st_size == 0
            assert not os.path.samestat(os.fstat(new.fd), os.fstat(witness.fileno()))
        assert witness.read() == b"half of a disk"


def test_space_without_content_that_a_crash_has_left_is_given_back(disk: pathlib.Path) -> None:
    stale = leave(disk, written=b"")
    with stale.open("r+b") as file, contextlib.suppress(OSError):
        # FALLOC_FL_KEEP_SIZE
        fallocate._fallocate(file.fileno(), 1, 0, units.Mi)
    if not stale.stat().st_blocks:
        pytest.skip("this filesystem holds no space past the end of a file")

    with new_disk(disk) as new:
        assert os.fstat(new.fd).st_blocks == 0


def test_disk_that_another_imgprealloc_makes_is_refused(disk: pathlib.Path) -> None:
    with new_disk(disk) as new:
        os.pwrite(new.fd, b"first", 0)
        with pytest.raises(exceptions.ImageInUse, match="another imgprealloc"):
            replace(disk, b"second")
        assert content(new) == b"first"

    assert disk.read_bytes() == b"first"


def test_claim_that_was_lost_while_it_was_made_is_made_again(disk: pathlib.Path) -> None:
    # Another imgprealloc, done between our open and our lock, has renamed or removed what we opened.
    attempts: list[int] = []

    def late(fd: int) -> bool:
        attempts.append(fd)
        if len(attempts) == 1:
            os.unlink(disk.parent / TEMPORARY)
        return True

    with fixtures.MockPatchObject(lock, "try_exclusive", late):
        replace(disk)

    assert len(attempts) == 2
    assert disk.read_bytes() == b"new"


def test_what_another_imgprealloc_has_just_taken_away_is_not_missed(disk: pathlib.Path) -> None:
    # There as we create ours, gone as we look at it.
    opened: list[int] = []
    real = os.open

    def late(path: str, flags: int, *mode: int, **how: int) -> int:
        if flags & os.O_EXCL:
            opened.append(flags)
            if len(opened) == 1:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        return real(path, flags, *mode, **how)

    with fixtures.MockPatchObject(os, "open", late):
        replace(disk)

    assert disk.read_bytes() == b"new"


def test_what_has_come_in_the_place_of_a_crash_s_remains_is_left_to_its_owner(disk: pathlib.Path) -> None:
    # Between our look at the remains and our lock on them, another imgprealloc has made its own file.
    temporary = leave(disk)
    locks: list[int] = []

    def late(fd: int) -> bool:
        locks.append(fd)
        if len(locks) == 1:
            temporary.unlink()
            leave(disk, written=b"another's")
        return len(locks) == 1

    with fixtures.MockPatchObject(lock, "try_exclusive", late), pytest.raises(exceptions.ImageInUse):
        replace(disk)

    assert temporary.read_bytes() == b"another's"


def test_crash_s_remains_that_a_dying_process_still_has_are_waited_for(disk: pathlib.Path) -> None:
    leave(disk)
    refusals = iter([False, False])

    with (
        fixtures.MockPatchObject(lock, "try_exclusive", lambda fd: next(refusals, True)),
        fixtures.MockPatchObject(lock, "_BETWEEN_ATTEMPTS", 0),
    ):
        replace(disk)

    assert disk.read_bytes() == b"new"


def is_in_the_way(disk: pathlib.Path, kind: str) -> None:
    """Put somebody's file where the new one would be."""
    path, other = disk.parent / TEMPORARY, disk.parent / "other"
    if kind == "text":
        path.write_text("precious")
    elif kind == "text, all may do all":
        path.write_text("precious")
        path.chmod(0o777)
    elif kind == "pipe":
        os.mkfifo(path)
        path.chmod(0o1600)
    elif kind == "folder":
        # With the sticky bit, as many have it.
        path.mkdir()
        path.chmod(0o1777)
    elif kind == "symbolic link":
        leave(disk, "other")
        path.symlink_to(other)
    else:
        leave(disk, "other")
        os.link(other, path)


def test_somebody_s_file_that_has_come_in_the_place_of_a_crash_s_remains_is_not_removed(disk: pathlib.Path) -> None:
    # Between our look at the remains and our opening them.
    remains = leave(disk)
    real = os.open

    def late(path: str, flags: int, *mode: int, **how: int) -> int:
        if path == TEMPORARY and not flags & os.O_EXCL:
            remains.unlink()
            remains.write_bytes(b"precious")
        return real(path, flags, *mode, **how)

    with fixtures.MockPatchObject(os, "open", late), pytest.raises(exceptions.FileInTheWay):
        replace(disk)

    assert remains.read_bytes() == b"precious"


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("kind", ["text", "text, all may do all", "pipe", "folder", "symbolic link", "hard link"])
def test_somebody_s_file_of_our_name_is_never_removed(disk: pathlib.Path, kind: str, existed: bool) -> None:
    if existed:
        disk.write_bytes(b"old")
    is_in_the_way(disk, kind)
    before = {name: os.lstat(disk.parent / name) for name in names(disk)}

    with pytest.raises(exceptions.FileInTheWay, match=rf"{disk.parent}/\{TEMPORARY} has the name") as caught:
        replace(disk)
    with disk_file.place(str(disk)) as place:
        assert replacement.leftovers(place) == []
        replacement.remove_leftovers(place)

    assert caught.value.path == str(disk)
    after = {name: os.lstat(disk.parent / name) for name in names(disk)}
    assert [(status.st_ino, status.st_mode, status.st_mtime_ns) for status in after.values()] == [
        (status.st_ino, status.st_mode, status.st_mtime_ns) for status in before.values()
    ]


def test_disk_that_qemu_writes_is_not_replaced(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    with hosts.opened_by_qemu(str(disk)), pytest.raises(exceptions.ImageInUse):
        replace(disk)

    assert disk.read_bytes() == b"old"
    assert names(disk) == ["disk"]


def test_qemu_cannot_start_to_write_a_disk_that_is_being_replaced(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    with new_disk(disk) as new:
        with disk.open("rb") as file:
            assert hosts.standing_lock(file.fileno(), hosts.NO_WRITER) != fcntl.F_UNLCK
        os.pwrite(new.fd, b"new", 0)


def test_qemu_that_has_opened_the_disk_just_before_is_kept_from_what_has_no_name_any_more(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")
    qemu: list[threading.Thread] = []
    locks_are_taken: list[bool] = []

    def come_to_locks(fd: int) -> None:
        time.sleep(0.5)
        locks_are_taken.append(lock._is_locked(fd, lock._NO_WRITER, lock._NO_RESIZER))
        os.close(fd)

    def rename(*files: Any) -> None:
        qemu.append(threading.Thread(target=come_to_locks, args=(os.open(disk, os.O_RDWR),)))
        qemu[0].start()
        rename_over(*files)

    rename_over = replacement._rename_over
    with fixtures.MockPatchObject(replacement, "_rename_over", rename):
        replace(disk)

    qemu[0].join()
    assert locks_are_taken == [True]
    assert disk.read_bytes() == b"new"


def test_reader_that_has_the_old_disk_open_is_not_waited_for_for_ever(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")
    readers: list[int] = []

    def rename(*files: Any) -> None:
        readers.append(os.open(disk, os.O_RDONLY))
        rename_over(*files)

    rename_over = replacement._rename_over
    with (
        fixtures.MockPatchObject(replacement, "_rename_over", rename),
        fixtures.MockPatchObject(lock, "_COMING_TO_LOCKS", 0.2),
    ):
        replace(disk)

    assert os.pread(readers[0], 3, 0) == b"old"
    os.close(readers[0])
    assert disk.read_bytes() == b"new"


def test_symbolic_link_is_refused(disk: pathlib.Path) -> None:
    target = disk.parent / "elsewhere"
    target.write_bytes(b"old")
    disk.symlink_to(target)

    with pytest.raises(exceptions.DiskIsLink, match="is a link"):
        replace(disk)

    assert disk.is_symlink()
    assert target.read_bytes() == b"old"


def test_symbolic_link_to_nowhere_is_not_followed(disk: pathlib.Path) -> None:
    disk.symlink_to(disk.parent / "nowhere")

    with pytest.raises(exceptions.DiskExists):
        replace(disk)

    assert names(disk) == ["disk"]


def test_disk_with_a_second_name_is_refused(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")
    os.link(disk, disk.parent / "second")

    with pytest.raises(exceptions.DiskIsLink, match="second name"):
        replace(disk)

    assert (disk.parent / "second").read_bytes() == b"old"


def test_disk_that_has_come_meanwhile_is_not_overwritten(disk: pathlib.Path) -> None:
    with pytest.raises(exceptions.DiskExists, match="meanwhile"), new_disk(disk):
        disk.write_bytes(b"somebody else's")

    assert disk.read_bytes() == b"somebody else's"
    assert names(disk) == ["disk"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o660, 0o1644])
def test_new_disk_has_the_mode_of_the_old_one(disk: pathlib.Path, mode: int) -> None:
    disk.write_bytes(b"old")
    disk.chmod(mode)

    replace(disk)

    assert stat.S_IMODE(disk.stat().st_mode) == mode


def test_nobody_else_can_open_the_new_file_before_it_has_the_mode_of_the_old_one(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")
    modes: list[int] = []

    def locked(fd: int) -> bool:
        modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        return True

    with fixtures.MockPatchObject(lock, "try_exclusive", locked):
        replace(disk)

    assert modes[-1] == 0o1600


def test_new_disk_has_the_extended_attributes_of_the_old_one(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")
    try:
        os.setxattr(disk, "user.imgprealloc", b"kept")
    except OSError as exc:
        pytest.skip(f"no extended attributes here: {exc.strerror}")

    replace(disk)

    assert os.getxattr(disk, "user.imgprealloc") == b"kept"


@pytest.mark.parametrize(("owner", "changed"), [((107, 108), [(107, 108)]), (None, [])])
def test_new_disk_has_the_owner_of_the_old_one(
    disk: pathlib.Path, owner: tuple[int, int] | None, changed: list[tuple[int, int]]
) -> None:
    # chown is root's, so that it is only looked at here; and not tried where it is not needed.
    disk.write_bytes(b"old")
    inode = disk.stat().st_ino
    real = os.fstat
    seen: list[tuple[int, int]] = []

    def owned(fd: int) -> os.stat_result:
        status = real(fd)
        if owner is None or status.st_ino != inode:
            return status
        return os.stat_result((*status[:4], *owner, *status[6:]), {"st_mtime_ns": 0, "st_ctime_ns": 0})

    with (
        fixtures.MockPatchObject(os, "fstat", owned),
        fixtures.MockPatchObject(os, "fchown", lambda fd, *ids: seen.append(ids)),
        fixtures.MockPatchObject(os, "geteuid", lambda: 0),
    ):
        replace(disk)

    assert seen == changed


def _somebody_else_s(disk: pathlib.Path, owner: int) -> Any:
    """Let a disk be another's, and this process not be root."""
    inode, real = disk.stat().st_ino, os.fstat

    def owned(fd: int) -> os.stat_result:
        status = real(fd)
        if status.st_ino != inode:
            return status
        return os.stat_result((*status[:4], owner, *status[5:]), {"st_mtime_ns": 0, "st_ctime_ns": 0})

    return fixtures.MockPatchObject(os, "fstat", owned)


def test_disk_of_somebody_else_s_is_refused_before_there_is_a_new_file(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")
    owner = disk.stat().st_uid + 2

    with (
        _somebody_else_s(disk, owner),
        fixtures.MockPatchObject(os, "geteuid", lambda: disk.stat().st_uid + 1),
        pytest.raises(exceptions.OwnerNotKept, match=f"user ID {owner}"),
        new_disk(disk),
    ):
        pytest.fail("there is a new file")

    assert names(disk) == ["disk"]
    assert disk.read_bytes() == b"old"


def test_disk_is_replaced_whose_owner_each_new_file_has(disk: pathlib.Path) -> None:
    # NFS with all_squash, CIFS with uid=: what we make there is not ours either.
    disk.write_bytes(b"old")

    with fixtures.MockPatchObject(os, "geteuid", lambda: disk.stat().st_uid + 1):
        replace(disk)

    assert names(disk) == ["disk"]
    assert disk.read_bytes() == b"new"


def test_disk_of_somebody_else_s_is_refused_where_nothing_can_be_made(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")
    nothing = mock.Mock(side_effect=PermissionError(errno.EACCES, os.strerror(errno.EACCES)))

    with (
        fixtures.MockPatchObject(os, "geteuid", lambda: disk.stat().st_uid + 1),
        fixtures.MockPatchObject(tempfile, "TemporaryFile", nothing),
        pytest.raises(exceptions.OwnerNotKept),
    ):
        replace(disk)

    assert disk.read_bytes() == b"old"


def test_disk_whose_attributes_may_not_be_copied_stays_as_it_was(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with pytest.raises(exceptions.OwnerNotKept, match="label"), fixtures.MockPatchObject(os, "fchmod", refuse):
        replace(disk)

    assert names(disk) == ["disk"]
    assert disk.read_bytes() == b"old"


# The mark by which ours is known.


def test_new_file_has_our_mark_until_it_is_the_disk(disk: pathlib.Path) -> None:
    modes: list[int] = []

    with new_disk(disk, lambda new: modes.append(stat.S_IMODE(os.fstat(new.fd).st_mode))) as new:
        modes.append(stat.S_IMODE(os.fstat(new.fd).st_mode))

    assert modes == [0o1600, 0o1600]
    assert not disk.stat().st_mode & stat.S_ISVTX


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_mark_stays_until_the_rename_when_a_disk_is_replaced(disk: pathlib.Path, mode: int) -> None:
    disk.write_bytes(b"old")
    disk.chmod(mode)
    seen: list[int] = []
    real = os.replace

    def watched(*arguments: Any, **how: Any) -> None:
        seen.append(stat.S_IMODE((disk.parent / TEMPORARY).stat().st_mode))
        real(*arguments, **how)

    with fixtures.MockPatchObject(os, "replace", watched):
        replace(disk)

    assert seen == [mode | stat.S_ISVTX]
    assert stat.S_IMODE(disk.stat().st_mode) == mode


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_disk_has_the_mode_that_qemu_img_would_give_it(disk: pathlib.Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        replace(disk)
    finally:
        os.umask(before)

    assert stat.S_IMODE(disk.stat().st_mode) == 0o644 & ~umask


# What a crash has left.


def test_what_a_crash_has_left_is_found_and_removed(disk: pathlib.Path) -> None:
    for name in (TEMPORARY, ZEROS):
        leave(disk, name)
    os.sync()
    size = (disk.parent / TEMPORARY).stat().st_blocks * 512

    with disk_file.place(str(disk)) as place:
        found = replacement.leftovers(place)
        assert [(left.path, left.size) for left in found] == [
            (str(disk.parent / name), size) for name in (TEMPORARY, ZEROS)
        ]
        assert names(disk) == [TEMPORARY, ZEROS]
        replacement.remove_leftovers(place)

    assert names(disk) == []


def test_what_another_imgprealloc_is_at_work_on_is_not_left_over(disk: pathlib.Path) -> None:
    with new_disk(disk), disk_file.place(str(disk)) as place:
        assert replacement.leftovers(place) == []
        replacement.remove_leftovers(place)
        assert names(disk) == [TEMPORARY]


def test_what_a_qemu_img_still_writes_is_left_until_it_has_ended(disk: pathlib.Path) -> None:
    left = leave(disk)

    with hosts.opened_by_qemu(str(left)):
        with disk_file.place(str(disk)) as place:
            replacement.remove_leftovers(place)
        with pytest.raises(exceptions.ImageInUse, match="open for writing"):
            replace(disk)

    assert left.exists()


def test_another_disk_s_remains_are_another_s(disk: pathlib.Path) -> None:
    leave(disk, ".disk.local.imgprealloc")

    with disk_file.place(str(disk)) as place:
        replacement.remove_leftovers(place)

    assert names(disk) == [".disk.local.imgprealloc"]


def test_no_pattern_for_disks_finds_a_new_file(disk: pathlib.Path) -> None:
    with new_disk(disk), disk_file.place(str(disk)) as place, replacement.zeros(place, 512):
        assert list(disk.parent.glob("disk*")) == []


# Filesystems that lack something.


def no_renameat2(code: int) -> fixtures.Fixture:
    def refuse(*arguments: object) -> int:
        ctypes.set_errno(code)
        return -1

    return fixtures.MockPatchObject(replacement, "_LIBC", SimpleNamespace(renameat2=refuse))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_without_an_exclusive_rename_the_name_is_taken_first(disk: pathlib.Path, code: int) -> None:
    with no_renameat2(code):
        replace(disk)

    assert disk.read_bytes() == b"new"
    assert names(disk) == ["disk"]


def test_without_an_exclusive_rename_too_nothing_is_overwritten(disk: pathlib.Path) -> None:
    with no_renameat2(errno.EINVAL), pytest.raises(exceptions.DiskExists, match="meanwhile"), new_disk(disk):
        disk.write_bytes(b"somebody else's")

    assert disk.read_bytes() == b"somebody else's"
    assert names(disk) == ["disk"]


def test_name_that_was_taken_for_nothing_is_given_back(disk: pathlib.Path) -> None:
    with (
        no_renameat2(errno.EINVAL),
        fixtures.MockPatchObject(os, "replace", raises(errno.EIO)),
        pytest.raises(OSError, match="Input/output error"),
    ):
        replace(disk)

    assert names(disk) == []


def test_real_fault_of_the_rename_is_an_error(disk: pathlib.Path) -> None:
    with no_renameat2(errno.EIO), pytest.raises(OSError, match="Input/output error"):
        replace(disk)

    assert names(disk) == []


def raises(code: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **how: Any) -> None:
        raise OSError(code, os.strerror(code), *arguments[:1])

    return fail


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS])
def test_filesystem_without_extended_attributes_has_none_to_keep(disk: pathlib.Path, code: int) -> None:
    disk.write_bytes(b"old")

    with fixtures.MockPatchObject(os, "listxattr", raises(code)):
        replace(disk)

    assert disk.read_bytes() == b"new"


def test_attributes_that_cannot_be_read_are_an_error_that_names_the_file(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    with (
        fixtures.MockPatchObject(os, "listxattr", raises(errno.EIO)),
        pytest.raises(exceptions.FileError) as caught,
        os_errors.translated(str(disk)),
    ):
        replace(disk)

    assert str(disk) in caught.value.reason
    assert disk.read_bytes() == b"old"
    assert names(disk) == ["disk"]


def raises_for_folders(code: int) -> Callable[[int], None]:
    """Return an fsync that fails for folders, and does nothing for files."""

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))

    return fsync


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
@pytest.mark.parametrize("existed", [True, False])
def test_folder_that_knows_no_sync_is_no_fault(disk: pathlib.Path, existed: bool, code: int) -> None:
    if existed:
        disk.write_bytes(b"old")

    with fixtures.MockPatchObject(os, "fsync", raises_for_folders(code)):
        replace(disk)

    assert disk.read_bytes() == b"new"


def test_folder_that_cannot_be_synced_is_told_by_its_name(disk: pathlib.Path) -> None:
    with (
        fixtures.MockPatchObject(os, "fsync", raises_for_folders(errno.EIO)),
        pytest.raises(exceptions.FileError, match="the new disk has its name, but may lose it") as caught,
        os_errors.translated(str(disk)),
    ):
        replace(disk)

    assert caught.value.reason.endswith(f"({disk.parent})")
    assert caught.value.errno == errno.EIO


# In use.


def test_disk_that_is_open_elsewhere_is_not_replaced(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    with (
        fixtures.MockPatchObject(lock, "_PAUSE", 0),
        disk.open("rb"),
        pytest.raises(exceptions.ImageInUse, match="has the file open"),
    ):
        replace(disk)

    assert disk.read_bytes() == b"old"
    assert names(disk) == ["disk"]


def test_disk_that_backs_a_guest_s_snapshot_is_not_replaced(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    with (
        hosts.opened_by_qemu(str(disk), hosts.READS, hosts.NO_WRITER, hosts.NO_RESIZER),
        pytest.raises(exceptions.ImageInUse, match="snapshot"),
    ):
        replace(disk)

    assert disk.read_bytes() == b"old"


def test_disk_that_was_replaced_by_one_of_the_same_time_and_size_is_not_ours_to_replace(
    programs: Programs, disk: pathlib.Path
) -> None:
    disk.write_bytes(b"old")
    status = disk.stat()

    def another() -> None:
        other = disk.parent / "other"
        other.write_bytes(b"OLD")
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(other, disk)

    programs.then["sync"] = another

    with pytest.raises(exceptions.ImageInUse, match="it was replaced"):
        replace(disk)

    assert disk.read_bytes() == b"OLD"
    assert names(disk) == ["disk"]


# Zeros.


def test_zeros_are_a_sparse_file_for_as_long_as_the_block_runs(disk: pathlib.Path) -> None:
    with zeros(disk, 1 << 40) as file:
        assert os.fstat(file.fd).st_size == 1 << 40
        assert os.fstat(file.fd).st_blocks == 0
        assert (file.folder, file.name) == (str(disk.parent), ZEROS)

    assert names(disk) == []


def test_zeros_go_away_after_an_error(disk: pathlib.Path) -> None:
    with contextlib.suppress(ZeroDivisionError), zeros(disk, 512):
        raise ZeroDivisionError

    assert names(disk) == []


def test_zeros_that_a_crash_has_left_are_made_anew(disk: pathlib.Path) -> None:
    leave(disk, ZEROS, b"not zero")

    with zeros(disk, 8) as file:
        assert content(file) == bytes(8)


def test_zeros_that_another_imgprealloc_uses_are_left_to_it(disk: pathlib.Path) -> None:
    with zeros(disk, 512) as file:
        with pytest.raises(exceptions.ImageInUse), zeros(disk, 1024):
            pytest.fail("the block must not run")
        assert os.fstat(file.fd).st_size == 512


def test_zeros_and_the_new_disk_have_different_names(disk: pathlib.Path) -> None:
    with new_disk(disk), zeros(disk, 512):
        assert names(disk) == [TEMPORARY, ZEROS]


def test_leftover_that_may_not_be_removed_is_in_nobody_s_way(
    disk: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk.write_bytes(b"old")
    left = leave(disk)
    real = os.open

    def forbidden(path: str, *how: Any, **more: Any) -> int:
        if path == TEMPORARY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *how, **more)

    with disk_file.opened(str(disk)) as file, fixtures.MockPatchObject(os, "open", forbidden):
        replacement.remove_leftovers(file)

    assert left.exists()
    assert "killed has left stays" in caplog.text


def test_name_too_long_for_ours_has_left_nothing(disk: pathlib.Path) -> None:
    long = disk.parent / ("d" * 250)
    long.write_bytes(b"disk")

    with disk_file.opened(str(long)) as file:
        replacement.remove_leftovers(file)
        assert replacement.leftovers(file) == []
