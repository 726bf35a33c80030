# SPDX-License-Identifier: Apache-2.0
"""Space that runs out at any step, a filesystem that fails, and others who get at a disk between look and deed."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import pathlib
import subprocess
import time
from typing import Any

import images
import loop_filesystem
import pytest

from functional import disks as disks_module
from functional import tally
from functional.disks import TEMPORARY
from functional.disks import ZEROS
from functional.disks import MiB
from functional.disks import Verb
from functional.disks import attempt
from imgprealloc import Mode
from imgprealloc import PreallocationError
from imgprealloc import Preallocator
from imgprealloc import command
from imgprealloc import exceptions
from imgprealloc import filesystem

# What is left free, in KiB. A disk takes 4 to 6 MiB.
LADDER = (0, 4, 64, 256, 1024, 3072, 4608, 5632, 8192)


@pytest.fixture
def taken_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the space seem to be there when it is asked for, as if another process had taken it just then."""
    monkeypatch.setattr(filesystem, "available", lambda directory: 1 << 50)


def require_nothing_lost(
    verb: Verb, disks: disks_module.Disks, path: pathlib.Path, failed: PreallocationError | None
) -> None:
    """Require the right result, or that all is as it was and an error tells why."""
    disks_module.require_told(failed, path)
    if failed is None:
        disks.require_done(verb, path)
    else:
        disks.require_kept(verb, path)
        assert verb.disk or not path.exists(), "a disk that could not be made is there"
    left = {found.name for found in path.parent.iterdir()}
    assert left <= {path.name}, f"it left {left}"


def filesystem_free(directory: pathlib.Path) -> int:
    """Return the bytes that are free, by the last word of the filesystem."""
    space = os.statvfs(directory)
    return space.f_bfree * space.f_frsize


class Small:
    """A small filesystem of its own, with a folder for the disk; disks to copy from are elsewhere.

    :param mount_point: where it is
    """

    def __init__(self, mount_point: pathlib.Path) -> None:
        self.mount_point = mount_point
        self.place = mount_point / "place"
        self.place.mkdir(exist_ok=True)
        self.disk = self.place / "disk"

    def leave(self, kib: int) -> None:
        """Take all space but so much, as exactly as the filesystem lets us."""
        bulk = images.free(self.mount_point) - (kib << 10) - MiB
        with open(self.mount_point / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            os.posix_fallocate(filler.fileno(), 0, bulk)
            filler.seek(0, os.SEEK_END)
            while filesystem_free(self.mount_point) > kib << 10 or not kib:
                filler.write(bytes(4096))

    def clear(self) -> None:
        """Remove all but the folder."""
        (self.mount_point / "filler").unlink(missing_ok=True)
        for left in self.place.iterdir():
            left.unlink()


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> disks_module.Disks:
    """Give a disk of each kind."""
    return disks_module.Disks(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def small(request: pytest.FixtureRequest) -> Iterator[Small]:
    """Give a small filesystem of each type."""
    with loop_filesystem.mounted(request.param, 300 * MiB) as mount_point:
        yield Small(pathlib.Path(mount_point))


def test_no_lack_of_space_at_any_step_loses_a_disk(
    small: Small, disks: disks_module.Disks, pytestconfig: pytest.Config, taken_meanwhile: None
) -> None:
    with tally.table(pytestconfig, "space that runs out") as counts:
        for verb in disks.verbs():
            # Only what is there before takes part of it; the ladder begins where that ends.
            for kib in LADDER:
                small.clear()
                disks.prepare(verb, small.disk)
                small.leave(kib)
                failed = attempt(verb, small.disk)
                with counts.case(verb, f"{kib} KiB free"):
                    assert failed is None or isinstance(failed, exceptions.NoSpace), failed
                    require_nothing_lost(verb, disks, small.disk, failed)
    small.clear()


def test_no_quota_that_is_reached_at_any_step_loses_a_disk(
    disks: disks_module.Disks, pytestconfig: pytest.Config, taken_meanwhile: None
) -> None:
    with loop_filesystem.mounted("btrfs", 300 * MiB) as mount_point:
        images.run("btrfs", "quota", "enable", mount_point)
        images.run("btrfs", "subvolume", "create", f"{mount_point}/volume")
        place = Small(pathlib.Path(mount_point, "volume"))
        with tally.table(pytestconfig, "quotas that are reached") as counts:
            for verb in disks.verbs():
                for kib in (256, 2048, 5120):
                    images.run("btrfs", "qgroup", "limit", "none", place.mount_point)
                    place.clear()
                    disks.prepare(verb, place.disk)
                    images.run("sync", "-f", place.mount_point)
                    used = int(images.run("btrfs", "qgroup", "show", "--raw", "-f", place.mount_point).split()[-2])
                    images.run("btrfs", "qgroup", "limit", used + (kib << 10), place.mount_point)
                    failed = attempt(verb, place.disk)
                    with counts.case(verb, f"{kib} KiB below the quota"):
                        # Reserving is not offered where each overwrite takes new space.
                        fitting = (exceptions.NoSpace, exceptions.UnsupportedFilesystem)
                        assert failed is None or isinstance(failed, fitting), failed
                        require_nothing_lost(verb, disks, place.disk, failed)
            images.run("btrfs", "qgroup", "limit", "none", place.mount_point)
            place.clear()


@contextlib.contextmanager
def on_thin_storage() -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Give an ext4 on a sparse file whose own filesystem has no more room than it takes by now, and that one."""
    with loop_filesystem.mounted("tmpfs", 64 * MiB) as below, loop_filesystem.mounted("tmpfs", MiB) as beside:
        image, mount_point = images.sparse_file(f"{below}/image", 200 * MiB), pathlib.Path(beside, "mnt")
        mount_point.mkdir()
        # So that its own tables and its journal have their room.
        images.run(
            "mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", image
        )  # fmt: skip
        images.run("mount", "-o", "loop", image, mount_point)
        try:
            yield mount_point, pathlib.Path(below)
        finally:
            subprocess.run(["umount", "-l", mount_point], check=False, capture_output=True)


def mount_again(mount_point: pathlib.Path, below: pathlib.Path) -> None:
    """Mount it as after a restart, so that nothing is read that was only in memory."""
    images.run("umount", mount_point)
    image, deadline = below / "image", time.monotonic() + 30
    # The loop device goes a moment later; mount(8) would take it once more, with what it has in memory,
    # or only for reading.
    while images.run("losetup", "--associated", image):
        assert time.monotonic() < deadline, "the loop device does not go"
        time.sleep(0.02)
    subprocess.run(["e2fsck", "-f", "-y", image], check=False, capture_output=True)
    images.run("mount", "--rw", "-o", "loop", image, mount_point)


@pytest.mark.parametrize("name", ["rewrite", "recreate", "fill", "grow", "grow_raw", "create_overlay", "create_raw"])
def test_storage_that_fails_loses_no_disk(
    disks: disks_module.Disks, pytestconfig: pytest.Config, taken_meanwhile: None, name: str
) -> None:
    [verb] = [verb for verb in disks.verbs() if verb.name == name]
    with on_thin_storage() as (mount_point, below), tally.table(pytestconfig, "storage that fails") as counts:
        small = Small(mount_point)
        disks.prepare(verb, small.disk)
        images.run("sync", "-f", mount_point)
        loop_filesystem.fill(str(below))
        failed = attempt(verb, small.disk, Preallocator(mode="full"))
        (below / "filler").unlink()
        mount_again(mount_point, below)
        with counts.case(verb, "full"):
            assert failed, "it has not failed, though nothing can have been written"
            # On a filesystem that fails, removing may fail as well; the next call sees to it.
            disks.require_kept(verb, small.disk)
            assert {found.name for found in small.place.iterdir()} <= {
                "disk", TEMPORARY.format("disk"), ZEROS.format("disk")
            }  # fmt: skip
            assert attempt(verb, small.disk) is None
            require_nothing_lost(verb, disks, small.disk, None)


# Between look and deed: just before each program that a verb starts.


class Interference:
    """Does something just before a verb starts its n-th program."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], at: int) -> None:
        self.started = 0
        run = command.run

        def interfering(*args: Any, **kwargs: Any) -> str:
            self.started += 1
            if self.started == at:
                act()
            return run(*args, **kwargs)

        monkeypatch.setattr(command, "run", interfering)

    def has_come(self, at: int) -> bool:
        """Whether as many programs were started."""
        return self.started >= at


@pytest.mark.parametrize("name", ["rewrite", "recreate", "reserve", "grow", "create_overlay"])
def test_filesystem_that_becomes_read_only_in_between_loses_no_disk(
    disks: disks_module.Disks, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    [verb] = [verb for verb in disks.verbs() if verb.name == name]
    with on_thin_storage() as (mount_point, below), tally.table(pytestconfig, "read-only in between") as counts:
        small = Small(mount_point)
        at = 1
        while True:
            small.clear()
            disks.prepare(verb, small.disk)
            images.run("sync", "-f", mount_point)

            def abort() -> None:
                # As the kernel does by itself when the filesystem's own tables cannot be read.
                subprocess.run(["mount", "-o", "remount,abort", mount_point], check=False, capture_output=True)

            with monkeypatch.context() as patch:
                interference = Interference(patch, abort, at)
                failed = attempt(verb, small.disk)
            if not interference.has_come(at):
                break
            mount_again(mount_point, below)
            with counts.case(verb, "before program", at):
                if failed is None:
                    disks.require_done(verb, small.disk)
                disks.require_kept(verb, small.disk)
                again = attempt(verb, small.disk) if failed else None
                assert again is None, f"the next call fails: {again}"
                require_nothing_lost(verb, disks, small.disk, None)
            at += 1


def size_of(disk: pathlib.Path) -> int:
    """Return the size that a disk has, for its guest."""
    return int(images.info(disk)["virtual-size"])


def require_grown_by_the_next_call(
    verb: Verb, disks: disks_module.Disks, small: Small, mode: Mode, failed: PreallocationError | None
) -> None:
    """Require that a growth that has failed says how large the disk is, and that the next call does what is left."""
    if failed is not None:
        assert isinstance(failed, exceptions.NoSpace), failed
        disks.require_kept(verb, small.disk)
        found = size_of(small.disk)
        assert found in (disks_module.ODD_SIZE, verb.size), f"it has {found} bytes, as nobody has asked for"
        assert str(found) in str(failed) or found == disks_module.ODD_SIZE, f"it has {found} bytes: {failed}"
        assert {left.name for left in small.place.iterdir()} == {"disk"}
        (small.mount_point / "filler").unlink()
        again = attempt(verb, small.disk, Preallocator(mode=mode))
        if found == verb.size:
            assert isinstance(again, exceptions.InvalidSize), again
            Preallocator(mode=mode).preallocate(small.disk, "reserve", format=verb.format)
        else:
            assert again is None, f"the next call fails: {again}"
    require_nothing_lost(verb, disks, small.disk, None)
    assert Preallocator().inspect(small.disk, format=verb.format).mapped


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_growth_by_an_odd_size_that_lacks_space_says_what_the_disk_is_and_is_done_by_the_next_call(
    small: Small, disks: disks_module.Disks, pytestconfig: pytest.Config, taken_meanwhile: None, mode: Mode
) -> None:
    verb = disks.odd_growth()
    with tally.table(pytestconfig, "growth that lacks space") as counts:
        for kib in LADDER:
            small.clear()
            disks.prepare(verb, small.disk)
            small.leave(kib)
            failed = attempt(verb, small.disk, Preallocator(mode=mode))
            with counts.case(verb, mode, f"{kib} KiB free"):
                require_grown_by_the_next_call(verb, disks, small, mode, failed)
    small.clear()


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_growth_whose_space_is_taken_between_two_steps_says_what_the_disk_is_and_is_done_by_the_next_call(
    small: Small,
    disks: disks_module.Disks,
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
    taken_meanwhile: None,
    mode: Mode,
) -> None:
    verb = disks.odd_growth()
    with tally.table(pytestconfig, "growth that lacks space") as counts:
        at = 1
        while True:
            small.clear()
            disks.prepare(verb, small.disk)
            with monkeypatch.context() as patch:
                interference = Interference(patch, lambda: small.leave(0), at)
                failed = attempt(verb, small.disk, Preallocator(mode=mode))
            if not interference.has_come(at):
                break
            with counts.case(verb, mode, "before program", at):
                require_grown_by_the_next_call(verb, disks, small, mode, failed)
            at += 1
    small.clear()


def remove(disk: pathlib.Path, verb: Verb) -> None:
    """Remove it."""
    disk.unlink()


def link(disk: pathlib.Path, verb: Verb) -> None:
    """Give it a second name."""
    os.link(disk, disk.with_name("second"))


def grow(disk: pathlib.Path, verb: Verb) -> None:
    """Make it longer, by bytes that are not zero, whatever its length is by now."""
    with open(disk, "r+b") as file:
        file.seek(8 * MiB)
        file.write(b"\x77" * MiB)


def write(disk: pathlib.Path, verb: Verb) -> None:
    """Write to it without heeding QEMU's lock, and set its mtime back, as a backup program does."""
    before = disk.stat()
    options = f"driver={verb.format},file.driver=file,file.locking=off,file.filename={disk}"
    images.run("qemu-io", "--image-opts", "-c", "write -P 0x33 2M 64k", options)
    os.utime(disk, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(disk: pathlib.Path, verb: Verb) -> None:
    """Put another disk in its place, of the same size and mtime."""
    before = disk.stat()
    other = disk.with_name("other")
    other.write_bytes(disk.read_bytes())
    write(other, verb)
    with open(other, "r+b") as file:
        # Longer it may not be; what a longer one has at its end is an allocated cluster.
        assert os.fstat(file.fileno()).st_size >= before.st_size
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(disk)


def put_link(disk: pathlib.Path, verb: Verb) -> None:
    """Move it away, and put a link to it in its place."""
    disk.rename(disk.with_name("elsewhere"))
    disk.symlink_to("elsewhere")


OTHERS = (remove, link, grow, write, replace, put_link)


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
@pytest.mark.parametrize("name", ["rewrite", "recreate", "reserve", "fill", "grow", "grow_raw"])
def test_nothing_that_another_does_to_a_disk_in_between_is_lost(
    small_ext4: Small,
    disks: disks_module.Disks,
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    other: Callable[[pathlib.Path, Verb], None],
) -> None:
    [verb] = [verb for verb in disks.verbs() if verb.name == name]
    disk = small_ext4.disk
    small_ext4.clear()
    disks.prepare(verb, disk)
    other(disk, verb)
    # What has to be read afterwards, and what else is in the folder.
    expected = disks_module.examined(disk, verb.format).content if disk.exists() else None
    names = {found.name for found in small_ext4.place.iterdir()}

    with tally.table(pytestconfig, "others in between") as counts:
        at = 1
        while True:
            small_ext4.clear()
            disks.prepare(verb, disk)
            with monkeypatch.context() as patch:
                interference = Interference(patch, lambda: other(disk, verb), at)
                failed = attempt(verb, disk)
            if not interference.has_come(at):
                break
            with counts.case(verb, other.__name__, "before program", at, type(failed).__name__):
                assert {found.name for found in small_ext4.place.iterdir()} == names
                if expected is not None:
                    found = disks_module.examined(disk, verb.format)
                    assert found.content == expected, "what the other has done is not there"
                    assert found.faults == "", found.faults
                for second in names & {"second"}:
                    assert disk.samefile(disk.with_name(second)), "its names are those of two disks now"
            at += 1
    small_ext4.clear()


@pytest.fixture(scope="module")
def small_ext4() -> Iterator[Small]:
    """Give an ext4 with room enough."""
    with loop_filesystem.mounted("ext4", 300 * MiB) as mount_point:
        yield Small(pathlib.Path(mount_point))


@pytest.mark.parametrize("name", ["create", "create_overlay", "create_raw"])
@pytest.mark.parametrize("whose", ["disk", "temporary"])
def test_file_that_somebody_puts_where_a_disk_is_made_is_kept(
    small_ext4: Small,
    disks: disks_module.Disks,
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    whose: str,
) -> None:
    [verb] = [verb for verb in disks.verbs() if verb.name == name]
    disk = small_ext4.disk
    theirs = disk if whose == "disk" else disk.with_name(TEMPORARY.format("disk"))

    def put() -> None:
        theirs.unlink(missing_ok=True)
        theirs.write_bytes(b"somebody's")

    with tally.table(pytestconfig, "others in between") as counts:
        at = 1
        while True:
            small_ext4.clear()
            with monkeypatch.context() as patch:
                interference = Interference(patch, put, at)
                failed = attempt(verb, disk)
            if not interference.has_come(at):
                break
            with counts.case(verb, "a file at the name of the", whose, "before program", at):
                assert failed, "it has not failed"
                assert [found.name for found in small_ext4.place.iterdir()] == [theirs.name]
                assert theirs.read_bytes() == b"somebody's"
            at += 1
    small_ext4.clear()
