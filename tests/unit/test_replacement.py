# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import stat

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import lock
from imgprealloc import replacement

from . import host as hosts
from .host import Programs

TEMPORARY = "disk.imgprealloc"


@pytest.fixture
def disk(programs: Programs, tmp_path: pathlib.Path) -> pathlib.Path:
    """Give the path of a disk in an empty folder."""
    return tmp_path / "disk"


def names(disk: pathlib.Path) -> list[str]:
    return sorted(os.listdir(disk.parent))


def replace(disk: pathlib.Path, content: bytes = b"new") -> None:
    with replacement.new_disk(str(disk)) as new:
        pathlib.Path(new).write_bytes(content)


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

    with replacement.new_disk(str(disk)) as new:
        assert new == str(disk.parent / TEMPORARY)
        assert os.path.getsize(new) == 0
        assert disk.read_bytes() == b"old"


def test_new_file_is_on_stable_storage_before_it_gets_its_name(programs: Programs, disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")
    seen: list[bytes] = []
    programs.then["sync"] = lambda: seen.append(disk.read_bytes())

    replace(disk)

    assert [call.argv for call in programs.calls] == [("sync", f"{disk}.imgprealloc")]
    assert seen == [b"old"]


def test_name_is_on_stable_storage_too(disk: pathlib.Path) -> None:
    synced: list[tuple[bool, list[str]]] = []
    with fixtures.MockPatchObject(
        os, "fsync", lambda fd: synced.append((stat.S_ISDIR(os.fstat(fd).st_mode), names(disk)))
    ):
        replace(disk)

    assert synced == [(True, ["disk"])]


@pytest.mark.parametrize("existed", [True, False])
def test_error_leaves_the_disk_as_it_was_and_nothing_beside_it(disk: pathlib.Path, existed: bool) -> None:
    if existed:
        disk.write_bytes(b"old")

    with contextlib.suppress(ZeroDivisionError), replacement.new_disk(str(disk)) as new:
        pathlib.Path(new).write_bytes(b"half")
        raise ZeroDivisionError

    assert names(disk) == (["disk"] if existed else [])
    assert not existed or disk.read_bytes() == b"old"


def test_file_that_is_judged_wanting_does_not_become_the_disk(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    def judge(new: str) -> None:
        assert pathlib.Path(new).read_bytes() == b"new"
        raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError), replacement.new_disk(str(disk), judge) as new:
        pathlib.Path(new).write_bytes(b"new")

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


def test_what_a_crash_has_left_is_made_anew(disk: pathlib.Path) -> None:
    stale = disk.parent / TEMPORARY
    stale.write_bytes(b"half of a disk")
    before = stale.stat().st_ino
    other_name = disk.parent / "witness"
    os.link(stale, other_name)

    with replacement.new_disk(str(disk)) as new:
        assert os.path.getsize(new) == 0
        assert os.stat(new).st_ino != before

    assert other_name.read_bytes() == b"half of a disk"


def test_space_without_content_that_a_crash_has_left_is_given_back(disk: pathlib.Path) -> None:
    stale = disk.parent / TEMPORARY
    stale.touch()
    with stale.open("r+b") as file, contextlib.suppress(OSError):
        # FALLOC_FL_KEEP_SIZE
        fallocate._fallocate(file.fileno(), 1, 0, units.Mi)
    if not stale.stat().st_blocks:
        pytest.skip("this filesystem holds no space past the end of a file")
    os.link(stale, disk.parent / "witness")

    with replacement.new_disk(str(disk)) as new:
        assert os.stat(new).st_blocks == 0
        assert not os.path.samefile(new, disk.parent / "witness")


def test_disk_that_another_imgprealloc_makes_is_refused(disk: pathlib.Path) -> None:
    with replacement.new_disk(str(disk)) as new:
        pathlib.Path(new).write_bytes(b"first")
        with pytest.raises(exceptions.ImageInUse, match="another imgprealloc"):
            replace(disk, b"second")
        assert pathlib.Path(new).read_bytes() == b"first"

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

    def late(path: str, flags: int, *mode: int) -> int:
        opened.append(flags)
        if len(opened) == 1:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        return real(path, flags, *mode)

    with fixtures.MockPatchObject(os, "open", late):
        replace(disk)

    assert disk.read_bytes() == b"new"


def test_what_has_come_in_the_place_of_a_crash_s_remains_is_left_to_its_owner(disk: pathlib.Path) -> None:
    # Between our look at the remains and our lock on them, another imgprealloc has made its own file.
    temporary = disk.parent / TEMPORARY
    temporary.write_bytes(b"remains")
    locks: list[int] = []

    def late(fd: int) -> bool:
        locks.append(fd)
        if len(locks) == 1:
            temporary.unlink()
            temporary.write_bytes(b"another's")
        return len(locks) == 1

    with fixtures.MockPatchObject(lock, "try_exclusive", late), pytest.raises(exceptions.ImageInUse):
        replace(disk)

    assert temporary.read_bytes() == b"another's"


def test_link_in_the_place_of_the_new_file_is_not_followed(disk: pathlib.Path) -> None:
    victim = disk.parent / "victim"
    victim.write_bytes(b"precious")
    (disk.parent / TEMPORARY).symlink_to(victim)

    with (
        fixtures.MockPatchObject(lock, "try_exclusive", lambda fd: pytest.fail("the link was followed")),
        pytest.raises(OSError, match="symbolic links"),
    ):
        replace(disk)

    assert victim.read_bytes() == b"precious"


def test_disk_that_qemu_writes_is_not_replaced(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    with hosts.opened_by_qemu(str(disk)), pytest.raises(exceptions.ImageInUse):
        replace(disk)

    assert disk.read_bytes() == b"old"
    assert names(disk) == ["disk"]


def test_qemu_cannot_start_to_write_a_disk_that_is_being_replaced(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")

    with replacement.new_disk(str(disk)), disk.open("rb") as file:
        # 201: "nobody else may write".
        assert hosts.standing_lock(file.fileno(), 201) != fcntl.F_UNLCK


def test_symbolic_link_is_refused(disk: pathlib.Path) -> None:
    target = disk.parent / "elsewhere"
    target.write_bytes(b"old")
    disk.symlink_to(target)

    with pytest.raises(exceptions.UnsupportedFormat, match="is a link"):
        replace(disk)

    assert disk.is_symlink()
    assert target.read_bytes() == b"old"


def test_symbolic_link_to_nowhere_is_refused(disk: pathlib.Path) -> None:
    disk.symlink_to(disk.parent / "nowhere")

    with pytest.raises(exceptions.UnsupportedFormat, match="is a link"):
        replace(disk)

    assert names(disk) == ["disk"]


def test_disk_with_a_second_name_is_refused(disk: pathlib.Path) -> None:
    disk.write_bytes(b"old")
    os.link(disk, disk.parent / "second")

    with pytest.raises(exceptions.UnsupportedFormat, match="second name"):
        replace(disk)

    assert (disk.parent / "second").read_bytes() == b"old"


@pytest.fixture
def half_published(disk: pathlib.Path) -> pathlib.Path:
    """Give a disk whose creation a crash has ended just before the new file's own name was to go."""
    disk.write_bytes(b"old")
    os.link(disk, disk.parent / TEMPORARY)
    return disk


def test_second_name_that_a_crash_of_ours_has_left_is_taken_away(half_published: pathlib.Path) -> None:
    replace(half_published)

    assert half_published.read_bytes() == b"new"
    assert names(half_published) == ["disk"]


def test_second_name_that_another_imgprealloc_is_about_to_take_away_is_left_to_it(
    half_published: pathlib.Path,
) -> None:
    with half_published.open("r+b") as file:
        assert lock.try_exclusive(file.fileno())

        with pytest.raises(exceptions.ImageInUse, match="another imgprealloc"):
            replace(half_published)

    assert half_published.read_bytes() == b"old"
    assert names(half_published) == ["disk", TEMPORARY]


def test_disk_with_a_third_name_is_still_refused(half_published: pathlib.Path) -> None:
    os.link(half_published, half_published.parent / "third")

    with pytest.raises(exceptions.UnsupportedFormat, match="second name"):
        replace(half_published)

    assert half_published.read_bytes() == b"old"


def test_disk_that_has_come_meanwhile_is_not_overwritten(disk: pathlib.Path) -> None:
    with pytest.raises(exceptions.DiskExists, match="meanwhile"), replacement.new_disk(str(disk)):
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

    assert modes == [0o600]


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
    real = os.stat
    seen: list[tuple[int, int]] = []

    def owned(path: str, **how: bool) -> os.stat_result:
        status = real(path, **how)
        if owner is None or path != str(disk):
            return status
        return os.stat_result((*status[:4], *owner, *status[6:]))

    with (
        fixtures.MockPatchObject(os, "stat", owned),
        fixtures.MockPatchObject(os, "fchown", lambda fd, *ids: seen.append(ids)),
    ):
        replace(disk)

    assert seen == changed


# Zeros.


def test_zeros_are_a_sparse_file_for_as_long_as_the_block_runs(disk: pathlib.Path) -> None:
    with replacement.zeros(str(disk), 1 << 40) as zeros:
        assert os.stat(zeros).st_size == 1 << 40
        assert os.stat(zeros).st_blocks == 0
        assert pathlib.Path(zeros).parent == disk.parent

    assert names(disk) == []


def test_zeros_go_away_after_an_error(disk: pathlib.Path) -> None:
    with contextlib.suppress(ZeroDivisionError), replacement.zeros(str(disk), 512):
        raise ZeroDivisionError

    assert names(disk) == []


def test_zeros_that_a_crash_has_left_are_made_anew(disk: pathlib.Path) -> None:
    (disk.parent / "disk.imgprealloc-zeros").write_bytes(b"not zero")

    with replacement.zeros(str(disk), 8) as zeros:
        assert pathlib.Path(zeros).read_bytes() == bytes(8)


def test_zeros_that_another_imgprealloc_uses_are_left_to_it(disk: pathlib.Path) -> None:
    with replacement.zeros(str(disk), 512) as zeros:
        with pytest.raises(exceptions.ImageInUse), replacement.zeros(str(disk), 1024):
            pytest.fail("the block must not run")
        assert os.path.getsize(zeros) == 512


def test_zeros_and_the_new_disk_have_different_names(disk: pathlib.Path) -> None:
    with replacement.new_disk(str(disk)), replacement.zeros(str(disk), 512):
        assert names(disk) == ["disk.imgprealloc", "disk.imgprealloc-zeros"]
