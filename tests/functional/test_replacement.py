# SPDX-License-Identifier: Apache-2.0
"""A disk is replaced whole or not at all: the file beside it, crashes, locks, and a filesystem without room."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

import images
import loop_filesystem
import pytest

from functional import kinds
from imgprealloc import Preallocator
from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import replacement

KiB, MiB = 1 << 10, 1 << 20

# A disk, and what it was before the crash.
Crashed = tuple[pathlib.Path, tuple[int, ...]]

TEMPORARY = ".disk.imgprealloc"
ZEROS = ".disk.imgprealloc-zeros"
# The mark of what imgprealloc itself has left, which it may remove.
OURS = 0o1600

ACL = "system.posix_acl_access"
# linux/posix_acl.h
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER, NOBODY = 0x01, 0x02, 0x04, 0x10, 0x20, 2**32 - 1


@pytest.fixture
def thin(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """Give Nova's overlay with nothing in it, which is replaced."""
    return images.qcow2(folder / "disk", 32 * MiB, backing=base)


@pytest.fixture
def used(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """Give an overlay with data in it, which is replaced if that is wanted."""
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    images.qemu_io(disk, "write -P 0x5a 3M 1M")
    return disk


# What is on stable storage.

LOST = r"No space left|Input/output error"


def replace_as_storage_runs_full(disk: pathlib.Path, storage: str) -> None:
    """Write a file that is to take a disk's place, which its storage loses, and have another hear of that first."""
    with (
        disk_file.claimed(str(disk)) as file,
        replacement.replacing(file, file.stamp(), lambda new: None) as new,
    ):
        os.pwrite(new.fd, os.urandom(8 * MiB), 0)
        loop_filesystem.fill(storage)
        fd = os.open(new.program_name, os.O_RDWR)
        # As QEMU's is that fails as it closes a file, of which it may say nothing.
        with pytest.raises(OSError, match=LOST):
            os.fsync(fd)
        os.close(fd)


def test_file_of_which_the_storage_has_lost_writes_is_not_taken_though_another_was_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with loop_filesystem.mounted("tmpfs", 96 * MiB) as storage:
        # A device that is larger than what is below it, as thin storage is.
        monkeypatch.setattr(tempfile, "tempdir", storage)
        with loop_filesystem.mounted("ext4", 400 * MiB, features=("-O", "^has_journal")) as mount_point:
            disk = pathlib.Path(mount_point, "disk")
            disk.write_bytes(b"what the guest has")
            os.sync()

            with pytest.raises(OSError, match=LOST):
                replace_as_storage_runs_full(disk, storage)

            os.unlink(os.path.join(storage, "filler"))
            assert disk.read_bytes() == b"what the guest has"
            assert sorted(os.listdir(mount_point)) == ["disk", "lost+found"]


# What is handed down to the new file.


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_mode_of_the_disk_is_kept(thin: pathlib.Path, mode: int) -> None:
    thin.chmod(mode)

    Preallocator().preallocate(thin, format="qcow2")

    assert thin.stat().st_mode & 0o7777 == mode


def test_owner_of_the_disk_is_kept(thin: pathlib.Path) -> None:
    os.chown(thin, 64055, 108)

    Preallocator().preallocate(thin, format="qcow2")

    assert (thin.stat().st_uid, thin.stat().st_gid) == (64055, 108)


@kinds.with_attributes
def test_extended_attributes_of_the_disk_are_kept(thin: pathlib.Path) -> None:
    os.setxattr(thin, "user.note", b"mine")
    os.setxattr(thin, "trusted.libvirt.security.ref_dac", b"1")

    Preallocator().preallocate(thin, format="qcow2")

    assert {name: os.getxattr(thin, name) for name in os.listxattr(thin)} == {
        "user.note": b"mine",
        "trusted.libvirt.security.ref_dac": b"1",
    }


def test_attributes_of_a_rewritten_disk_are_kept(used: pathlib.Path) -> None:
    used.chmod(0o640)
    os.chown(used, 64055, 108)

    Preallocator().preallocate(used, existing="rewrite", format="qcow2")

    assert (used.stat().st_mode & 0o7777, used.stat().st_uid, used.stat().st_gid) == (0o640, 64055, 108)


@kinds.with_attributes
def test_flags_of_the_disk_are_kept(thin: pathlib.Path) -> None:
    images.run("chattr", "+AdS", thin)

    Preallocator().preallocate(thin, format="qcow2")

    assert set("AdS") <= set(images.run("lsattr", thin).split()[0])
    # Not at the price of nocow.
    assert Preallocator().inspect(thin, format="qcow2").state == "preallocated"


@pytest.mark.parametrize("kind", ["xfs"])
def test_project_of_the_disk_is_kept(thin: pathlib.Path) -> None:
    images.run("xfs_io", "-c", "chproj 42", thin)

    Preallocator().preallocate(thin, format="qcow2")

    assert images.run("xfs_io", "-c", "lsproj", thin) == "projid = 42\n"


@pytest.mark.parametrize("kind", ["xfs"])
def test_disk_gets_the_project_of_a_folder_that_hands_down_its_own(thin: pathlib.Path, folder: pathlib.Path) -> None:
    # XFS lets nothing of another project be renamed into it.
    images.run("xfs_io", "-c", "chproj 42", "-c", "chattr +P", folder)

    Preallocator().preallocate(thin, format="qcow2")

    assert images.run("xfs_io", "-c", "lsproj", thin) == "projid = 42\n"


def test_new_disk_may_be_read_by_libvirts_user(folder: pathlib.Path) -> None:
    Preallocator().create(folder / "disk", 8 * MiB)

    assert (folder / "disk").stat().st_mode & 0o7777 == 0o644


def share(folder: pathlib.Path) -> None:
    """Give a folder a default ACL, by which what is made in it is another user's to read and to write."""
    entries = [(USER_OBJ, 7, NOBODY), (USER, 6, 65534), (GROUP_OBJ, 5, NOBODY), (MASK, 7, NOBODY), (OTHER, 5, NOBODY)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(folder, "system.posix_acl_default", acl)


@kinds.common
def test_disk_without_an_acl_inherits_none_from_its_folder(thin: pathlib.Path, folder: pathlib.Path) -> None:
    thin.chmod(0o660)
    share(folder)

    Preallocator().preallocate(thin, format="qcow2")

    assert (os.listxattr(thin), thin.stat().st_mode & 0o7777) == ([], 0o660)


def test_acl_of_the_disk_is_kept(folder: pathlib.Path, base: pathlib.Path) -> None:
    share(folder)
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    before = os.getxattr(disk, ACL), disk.stat().st_mode

    Preallocator().preallocate(disk, format="qcow2")

    assert (os.getxattr(disk, ACL), disk.stat().st_mode) == before


# Names that would keep the old disk.


def test_symbolic_link_is_not_replaced(thin: pathlib.Path, folder: pathlib.Path) -> None:
    (folder / "link").symlink_to(thin)

    with pytest.raises(exceptions.DiskIsLink, match="link"):
        Preallocator().preallocate(folder / "link", format="qcow2")


def test_disk_with_a_second_name_is_not_replaced(thin: pathlib.Path, folder: pathlib.Path) -> None:
    os.link(thin, folder / "second")

    with pytest.raises(exceptions.DiskIsLink, match="second name"):
        Preallocator().preallocate(thin, format="qcow2")


def test_disk_with_a_second_name_is_untouched(thin: pathlib.Path, folder: pathlib.Path) -> None:
    os.link(thin, folder / "second")
    before = images.identity(thin)

    with pytest.raises(exceptions.DiskIsLink):
        Preallocator().preallocate(thin, format="qcow2")

    assert images.identity(thin) == before


@pytest.fixture
def mounted(used: pathlib.Path, folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give the place where a disk with data is mounted, and nothing else."""
    place = folder / "mounted"
    place.touch()
    images.run("mount", "--bind", used, place)
    yield place
    images.run("umount", place)


def test_disk_that_is_mounted_by_itself_is_not_copied_for_nothing(mounted: pathlib.Path) -> None:
    before = images.identity(mounted)

    plan = Preallocator().plan(mounted, "rewrite", format="qcow2")
    with pytest.raises(exceptions.DiskIsLink, match="mounted"):
        Preallocator().preallocate(mounted, "rewrite", format="qcow2")

    assert isinstance(plan.error, exceptions.DiskIsLink)
    assert images.identity(mounted) == before


def test_disk_that_is_mounted_by_itself_gets_its_space(mounted: pathlib.Path) -> None:
    assert Preallocator().preallocate(mounted, format="qcow2").state == "reserved"


# Files that a crash has left.


@pytest.mark.parametrize("left", ["text", "image", "empty"])
def test_file_left_by_a_crash_is_replaced(thin: pathlib.Path, folder: pathlib.Path, left: str) -> None:
    if left == "image":
        images.qcow2(folder / TEMPORARY, 8 * MiB)
    else:
        (folder / TEMPORARY).write_text("left" if left == "text" else "")
    (folder / TEMPORARY).chmod(OURS)

    image = Preallocator().preallocate(thin, format="qcow2")

    assert (image.state, sorted(os.listdir(folder))) == ("preallocated", ["base.raw", "disk"])


def test_zeros_left_by_a_crash_are_replaced(thin: pathlib.Path, folder: pathlib.Path) -> None:
    (folder / ZEROS).write_bytes(b"not zero" * 1000)
    (folder / ZEROS).chmod(OURS)
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=folder / "base.raw")

    Preallocator().preallocate(thin, format="qcow2")

    assert (images.differences(thin, plain), (folder / ZEROS).exists()) == ("", False)


def test_link_put_in_the_temporary_files_place_is_not_followed(thin: pathlib.Path, folder: pathlib.Path) -> None:
    victim = images.random_file(folder / "victim", 4096)
    before = images.identity(victim)
    (folder / TEMPORARY).symlink_to(victim)

    with pytest.raises((OSError, exceptions.PreallocationError)):
        Preallocator().preallocate(thin, format="qcow2")

    assert images.identity(victim) == before


def started(call: str, folder: pathlib.Path) -> subprocess.Popen[bytes]:
    """Start the library in processes of its own, which can be killed; return once it is half way.

    :param call: what to call of a Preallocator in mode full
    """
    code = f"import imgprealloc; imgprealloc.Preallocator('full').{call}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, start_new_session=True)
    return process


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_for_children(process: subprocess.Popen[bytes]) -> None:
    """Wait until all is gone that a process in a session of its own has started."""
    while subprocess.run(["pgrep", "-s", str(process.pid)], stdout=subprocess.DEVNULL, check=False).returncode == 0:
        time.sleep(0.01)


def crash(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, as a power cut would."""
    # By the session: programs are in groups of their own.
    subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=True)
    process.wait()
    wait_for_children(process)


def in_the_making(path: pathlib.Path) -> Callable[[], bool]:
    """Return a condition: that a file has come to 32 MiB."""
    return lambda: os.path.exists(path) and images.allocated(path) > 32 * MiB


@pytest.fixture
def crashed(folder: pathlib.Path, base: pathlib.Path) -> Crashed:
    """Give a disk of 1 GiB whose preallocation was killed while it wrote."""
    disk = images.qcow2(folder / "disk", 1024 * MiB, backing=base)
    before = images.identity(disk)
    process = started("preallocate('disk', format='qcow2')", folder)
    wait_for(process, in_the_making(folder / TEMPORARY))
    crash(process)
    return disk, before


def test_disk_is_untouched_by_a_crash_in_the_middle(crashed: Crashed) -> None:
    disk, before = crashed

    assert images.identity(disk) == before


def test_what_a_crash_left_has_a_known_name_beside_the_disk(crashed: Crashed, folder: pathlib.Path) -> None:
    assert set(os.listdir(folder)) <= {"base.raw", "disk", TEMPORARY, ZEROS}


def test_next_run_ends_well_after_a_crash(crashed: Crashed, folder: pathlib.Path) -> None:
    disk, _ = crashed

    image = Preallocator().preallocate(disk, format="qcow2")

    assert (image.state, sorted(os.listdir(folder))) == ("preallocated", ["base.raw", "disk"])


def test_no_disk_is_there_after_a_crash_at_its_creation(folder: pathlib.Path) -> None:
    process = started(f"create('disk', {1024 * MiB})", folder)
    wait_for(process, in_the_making(folder / TEMPORARY))

    crash(process)

    assert os.listdir(folder) == [TEMPORARY]


def test_disk_can_be_created_after_a_crash_at_its_creation(folder: pathlib.Path) -> None:
    process = started(f"create('disk', {1024 * MiB})", folder)
    wait_for(process, in_the_making(folder / TEMPORARY))
    crash(process)

    image = Preallocator().create(folder / "disk", 32 * MiB)

    assert (image.state, os.listdir(folder)) == ("preallocated", ["disk"])


def test_rewritten_disk_is_untouched_by_a_crash_in_the_middle(folder: pathlib.Path) -> None:
    source = images.random_file(folder / "source", 64 * MiB)
    os.truncate(source, 1024 * MiB)
    disk = images.qcow2_of(folder / "disk", source)
    before = images.identity(disk)
    process = started("preallocate('disk', existing='rewrite', format='qcow2')", folder)
    wait_for(process, in_the_making(folder / TEMPORARY))

    crash(process)

    assert images.identity(disk) == before


@pytest.fixture
def crashed_growth(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Give an overlay of 16 MiB, over a base of 24, whose growth by 1 GiB was killed, and a plain one."""
    base = images.random_file(folder / "base", 24 * MiB + 300)
    plain = images.qcow2(folder / "plain", 16 * MiB, backing=base)
    Preallocator().create(folder / "disk", 16 * MiB, str(base), backing_format="raw")
    for either in (folder / "disk", plain):
        images.qemu_io(either, "write -P 0x5a 3M 1M", f"write -z {16 * MiB - 4096} 4096")
    process = started(f"resize('disk', {1024 * MiB}, format='qcow2')", folder)
    wait_for(process, lambda: images.allocated(folder / "disk") > 64 * MiB)
    crash(process)
    return folder / "disk", plain


def test_disk_reads_the_same_after_a_crash_in_its_growth(crashed_growth: tuple[pathlib.Path, pathlib.Path]) -> None:
    disk, plain = crashed_growth

    assert not images.differences(disk, plain)


def test_disk_can_be_grown_again_after_a_crash_in_its_growth(crashed_growth: tuple[pathlib.Path, pathlib.Path]) -> None:
    disk, plain = crashed_growth
    images.run("qemu-img", "resize", "-q", "-f", "qcow2", plain, 40 * MiB)

    image = Preallocator().resize(disk, 40 * MiB, format="qcow2")

    assert (image.state, images.differences(disk, plain)) == ("preallocated", "")


def test_raw_disk_reads_the_same_after_a_crash_in_mode_full(folder: pathlib.Path) -> None:
    disk = images.random_file(folder / "disk", 8 * MiB)
    os.truncate(disk, 1024 * MiB)
    before = images.file_digest(disk)
    process = started("preallocate('disk', format='raw')", folder)
    wait_for(process, lambda: images.allocated(disk) > 64 * MiB)

    crash(process)

    assert images.file_digest(disk) == before


def test_guests_data_lasts_though_imgprealloc_was_killed_half_way(folder: pathlib.Path) -> None:
    # Killed as by the kernel's OOM killer: it alone, and not what it started.
    disk = images.sparse_file(folder / "disk", 1024 * MiB)
    process = started("preallocate('disk', format='raw')", folder)
    wait_for(process, lambda: images.allocated(disk) > 32 * MiB)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    # A guest that is kept out until all is over is as good.
    write = ["qemu-io", "-f", "raw", "-c", f"write -P 0x5a {1023 * MiB} 1M", str(disk)]
    while subprocess.run(write, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        time.sleep(0.01)
    wait_for_children(process)

    images.qemu_io(disk, f"read -P 0x5a {1023 * MiB} 1M", format="raw")


# Two at once.


def test_disk_that_another_run_is_making_is_refused(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 1024 * MiB)
    process = started("preallocate('disk', format='qcow2')", folder)
    try:
        wait_for(process, in_the_making(folder / TEMPORARY))

        with pytest.raises(exceptions.ImageInUse, match="another imgprealloc"):
            Preallocator().preallocate(disk, format="qcow2")
    finally:
        crash(process)


def test_run_that_was_refused_does_not_disturb_the_other(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 512 * MiB)
    process = started("preallocate('disk', format='qcow2')", folder)
    wait_for(process, in_the_making(folder / TEMPORARY))
    with pytest.raises(exceptions.ImageInUse):
        Preallocator().preallocate(disk, format="qcow2")

    process.wait()

    assert Preallocator().inspect(disk, format="qcow2").state == "preallocated"


def test_file_that_comes_into_being_at_a_disks_path_is_not_overwritten(folder: pathlib.Path) -> None:
    failures = []

    def create() -> None:
        try:
            Preallocator("full").create(folder / "disk", 256 * MiB)
        except exceptions.DiskExists as exc:
            failures.append(exc)

    thread = threading.Thread(target=create)
    thread.start()
    while not (folder / TEMPORARY).exists():
        time.sleep(0.001)
    (folder / "disk").write_text("somebody else's")
    thread.join()

    assert (len(failures), (folder / "disk").read_text(), os.listdir(folder)) == (1, "somebody else's", ["disk"])


def test_file_that_is_there_is_not_overwritten_at_creation(folder: pathlib.Path) -> None:
    (folder / "disk").write_text("somebody else's")

    with pytest.raises(exceptions.DiskExists):
        Preallocator().create(folder / "disk", 8 * MiB)


def test_dangling_link_is_not_followed_at_creation(folder: pathlib.Path) -> None:
    (folder / "disk").symlink_to(folder / "elsewhere")

    with pytest.raises(exceptions.DiskExists):
        Preallocator().create(folder / "disk", 8 * MiB)


# A guest has the disk.


def test_disk_without_data_that_a_guest_has_is_not_replaced_and_gets_its_space(thin: pathlib.Path) -> None:
    inode, content = thin.stat().st_ino, images.file_digest(thin)

    with images.guest(thin):
        assert Preallocator().preallocate(thin, format="qcow2").state == "reserved"
        assert (thin.stat().st_ino, images.file_digest(thin)) == (inode, content)

    # The control: nobody has it any more.
    assert Preallocator().preallocate(thin, format="qcow2").state == "preallocated"
    assert thin.stat().st_ino != inode


def test_disk_with_data_that_a_guest_has_is_not_rewritten(used: pathlib.Path) -> None:
    with images.guest(used), pytest.raises(exceptions.ImageInUse):
        Preallocator().preallocate(used, existing="rewrite", format="qcow2")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_that_a_guest_has_does_not_grow(folder: pathlib.Path, format: str) -> None:
    Preallocator().create(folder / "disk", 8 * MiB, format=format)

    with images.guest(folder / "disk", format=format), pytest.raises(exceptions.ImageInUse):
        Preallocator().resize(folder / "disk", 16 * MiB, format=format)


def test_disk_that_a_guest_has_is_untouched_when_it_is_refused(used: pathlib.Path) -> None:
    with images.guest(used):
        before = images.identity(used)
        with pytest.raises(exceptions.ImageInUse):
            Preallocator().preallocate(used, "rewrite", format="qcow2")

        assert images.identity(used) == before


def test_file_of_the_temporary_name_that_a_guest_has_is_left_to_it(folder: pathlib.Path) -> None:
    images.qcow2(folder / TEMPORARY, 8 * MiB)

    with images.guest(folder / TEMPORARY):
        before = images.identity(folder / TEMPORARY)
        with pytest.raises(exceptions.FileInTheWay, match=TEMPORARY):
            Preallocator().create(folder / "disk", 8 * MiB)

        assert (os.listdir(folder), images.identity(folder / TEMPORARY)) == ([TEMPORARY], before)


def test_refusing_a_disk_that_a_guest_has_leaves_nothing_beside_it(used: pathlib.Path, folder: pathlib.Path) -> None:
    with images.guest(used):
        with pytest.raises(exceptions.ImageInUse):
            Preallocator().preallocate(used, "rewrite", format="qcow2")

        assert sorted(os.listdir(folder)) == ["base.raw", "disk"]


def test_disk_that_a_guest_has_can_be_looked_at(thin: pathlib.Path) -> None:
    with images.guest(thin):
        assert Preallocator().inspect(thin, format="qcow2").in_use is True


def test_disk_that_a_guest_has_given_back_is_replaced(thin: pathlib.Path) -> None:
    with images.guest(thin):
        pass

    assert Preallocator().preallocate(thin, format="qcow2").state == "preallocated"


def test_disk_with_data_that_a_guest_has_can_still_be_reserved(used: pathlib.Path) -> None:
    with images.guest(used):
        assert Preallocator().preallocate(used, format="qcow2").state == "reserved"


@pytest.fixture
def sparse_copy(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """Give a mapped overlay that has lost its space in a copy."""
    Preallocator().create(folder / "original", 32 * MiB, str(base), backing_format="raw")
    images.run("cp", "--reflink=never", "--sparse=always", folder / "original", folder / "disk")
    return folder / "disk"


def test_mapped_disk_that_a_guest_has_is_still_healed(sparse_copy: pathlib.Path) -> None:
    with images.guest(sparse_copy):
        image = Preallocator().preallocate(sparse_copy, format="qcow2")

        assert (image.state, image.in_use) == ("preallocated", True)


def test_healing_under_a_guest_that_writes_loses_nothing(sparse_copy: pathlib.Path, folder: pathlib.Path) -> None:
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=folder / "base.raw")
    writes = [f"write -P {1 + step % 255} {step * 37 % 8000 * 4096} 4096" for step in range(500)]

    with images.guest(sparse_copy) as address:
        writing = subprocess.Popen(
            ["qemu-io", "-f", "raw", *(word for write in writes for word in ("-c", write)), address],
            stdout=subprocess.DEVNULL,
        )
        Preallocator().preallocate(sparse_copy, format="qcow2")
        assert writing.wait() == 0

    images.qemu_io(plain, *writes)
    assert not images.differences(sparse_copy, plain)


def test_raw_disk_that_a_guest_has_is_still_healed(folder: pathlib.Path) -> None:
    disk = images.sparse_file(folder / "disk", 8 * MiB)

    with images.guest(disk, format="raw"):
        assert Preallocator().preallocate(disk, format="raw").state == "preallocated"


def test_raw_disk_that_a_guest_has_is_not_written_in_mode_full(folder: pathlib.Path) -> None:
    disk = images.sparse_file(folder / "disk", 8 * MiB)

    with images.guest(disk, format="raw"), pytest.raises(exceptions.ImageInUse):
        Preallocator("full").preallocate(disk, format="raw")


def test_guest_cannot_open_a_disk_that_is_being_replaced(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 1024 * MiB)
    process = started("preallocate('disk', format='qcow2')", folder)
    try:
        wait_for(process, in_the_making(folder / TEMPORARY))

        with pytest.raises(AssertionError, match="lock"):
            images.qemu_io(disk, "write -P 1 0 4096")
    finally:
        crash(process)
