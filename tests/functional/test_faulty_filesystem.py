# SPDX-License-Identifier: Apache-2.0
"""One look that fails, at each place where a verb looks: no disk is taken for a new one, and none is lost.

os.path.exists() is False for EIO, ESTALE and EACCES, too. On FUSE, where each
look can be made to fail, and which has neither extended attributes nor links.
IMGPREALLOC_EVERY_LOOK=1 leaves no look of any verb out.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import images
import loop_filesystem
import pytest

from functional import disks as disks_module
from functional import faulty_filesystem
from functional import tally
from functional.disks import MiB
from functional.disks import Verb
from functional.disks import attempt
from functional.disks import require_told
from functional.faulty_filesystem import CHANGES
from functional.faulty_filesystem import LOOKS
from functional.faulty_filesystem import FaultyFilesystem
from imgprealloc import Existing
from imgprealloc import PreallocationError
from imgprealloc import Preallocator
from imgprealloc import mounts

VERBS = ("reserve", "rewrite", "recreate", "fill", "grow", "grow_raw", "create", "create_overlay", "create_raw")

# Each look of these is made to fail; what the others have in common with them, is not tried for each of them.
ALL_LOOKS = ("rewrite", "create", "create_overlay")


@pytest.fixture(scope="module")
def ground() -> Iterator[pathlib.Path]:
    """Give the filesystem that is handed through, so fast that all places can be tried."""
    with loop_filesystem.mounted("ext4", 400 * MiB) as mount_point:
        yield pathlib.Path(mount_point)


@pytest.fixture
def faulty(ground: pathlib.Path) -> Iterator[FaultyFilesystem]:
    """Give the faulty filesystem, empty; a new one, because neither FUSE nor the kernel forgets faults at once."""
    below = pathlib.Path(tempfile.mkdtemp(dir=ground))
    with faulty_filesystem.mounted(below) as mounted:
        yield mounted
    shutil.rmtree(below)


@pytest.fixture(params=VERBS)
def verb(request: pytest.FixtureRequest, disks: disks_module.Disks) -> Verb:
    """Give one verb after the other."""
    return next(verb for verb in disks.verbs() if verb.name == request.param)


# A folder is opened for that alone.
_OF_A_SYNC = ("opendir", "fsyncdir")


def require_nothing_lost(
    verb: Verb, disks: disks_module.Disks, faulty: FaultyFilesystem, done: bool, failed: object = None
) -> None:
    """Require that a disk that was there is there, that a new one is whole or absent, and that nothing remains.

    What a failed look itself kept from being removed has gone with the next call.
    """
    assert faulty.open_files() == [], f"a file is left open: {failed}"
    disk = faulty.below / "disk"
    if done:
        disks.require_done(verb, disk)
    elif verb.disk is None:
        assert not os.path.lexists(disk), f"a disk that could not be made is there: {failed}"
    else:
        disks.require_kept(verb, disk)


def strike_each(
    verb: Verb,
    disks: disks_module.Disks,
    faulty: FaultyFilesystem,
    counts: tally.Tally,
    operations: tuple[str, ...],
    error: str,
    after: Callable[[int], int] = faulty_filesystem.after,
) -> None:
    """Let the first operation fail, in the next run another one, until there are no more.

    :param after: tells which comes after which
    """
    at = 1
    while True:
        for left_before in faulty.below.iterdir():
            left_before.unlink(missing_ok=True)
        disks.prepare(verb, faulty.below / "disk")
        faulty.prepare(operations, error, at)
        failed = attempt(verb, faulty.mount_point / "disk")
        struck = faulty.report().struck
        if struck is None:
            with counts.case(verb, "without a fault"):
                assert failed is None, failed
                assert faulty.files() == ["disk"]
            return
        with counts.case(verb, error, "at", at, struck):
            require_told(failed, faulty.mount_point / "disk")
            # A folder that cannot be synced has the new disk all the same, and the error says so.
            require_nothing_lost(verb, disks, faulty, failed is None or struck.name in _OF_A_SYNC, failed)
            left = set(faulty.files()) - {"disk"}
            if "-probe-" in struck.path:
                # It was made, and whoever made it was told that it was not.
                left.discard(struck.path[1:])
            if left:
                assert left <= {disks_module.TEMPORARY.format("disk"), disks_module.ZEROS.format("disk")}, (
                    f"it left {left}"
                )
                # Once more, without a fault: what was left is removed, or was told of.
                if failed is None:
                    disks.prepare(verb, faulty.below / "disk")
                again = attempt(verb, faulty.mount_point / "disk")
                assert again is None, f"what was left is in the way: {again}"
                assert faulty.files() == ["disk"], "what was left is not removed"
        at = after(at)


def test_no_look_that_fails_loses_a_disk(
    verb: Verb, disks: disks_module.Disks, faulty: FaultyFilesystem, pytestconfig: pytest.Config
) -> None:
    with tally.table(pytestconfig, "looks that fail") as counts:
        each = {"after": lambda at: at + 1} if verb.name in ALL_LOOKS else {}
        strike_each(verb, disks, faulty, counts, LOOKS, "EIO", **each)


@pytest.mark.parametrize("error", ["ESTALE", "EACCES"])
@pytest.mark.parametrize("verb", ["rewrite", "grow", "create_overlay"], indirect=True)
def test_no_other_error_of_a_look_loses_a_disk(
    verb: Verb, disks: disks_module.Disks, faulty: FaultyFilesystem, pytestconfig: pytest.Config, error: str
) -> None:
    with tally.table(pytestconfig, "looks that fail") as counts:
        strike_each(verb, disks, faulty, counts, LOOKS, error, lambda at: at + 10)


def test_no_change_that_fails_loses_a_disk(
    verb: Verb, disks: disks_module.Disks, faulty: FaultyFilesystem, pytestconfig: pytest.Config
) -> None:
    with tally.table(pytestconfig, "changes that fail") as counts:
        strike_each(verb, disks, faulty, counts, CHANGES, "EIO", lambda at: at + 3)


COPIES: dict[str, Callable[[str], object]] = {
    "thin": lambda path: Preallocator().thin(path, rewrite=True, format="qcow2"),
    "rewrite": lambda path: Preallocator().preallocate(path, "rewrite", format="qcow2"),
    "rewrite, metadata": lambda path: Preallocator("metadata").preallocate(path, "rewrite", format="qcow2"),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_no_copy_is_taken_whose_last_writes_have_failed(
    disks: disks_module.Disks, faulty: FaultyFilesystem, pytestconfig: pytest.Config, copy: Callable[[str], object]
) -> None:
    # QEMU makes them as it closes a disk, when its exit status is settled.
    made = faulty.below.parent / "data"
    images.qcow2(made, disks_module.SIZE, backing=disks.base)
    images.qemu_io(made, "write -P 0x5a 0 300k", "write -P 0xa5 1M 300k", "write -P 0x77 3M 300k")
    before, at = images.digest(made), 1
    with tally.table(pytestconfig, "writes that fail from then on") as counts:
        while True:
            shutil.copyfile(made, faulty.below / "disk")
            faulty.prepare(("write",), "EIO", at, onwards=True)
            with contextlib.suppress(PreallocationError):
                copy(str(faulty.mount_point / "disk"))
            if faulty.report().struck is None:
                break
            with counts.case("from the write", at):
                assert images.digest(faulty.below / "disk") == before, "the disk reads different"
            at += 1
    assert at > 5


def test_what_takes_a_failed_look_for_an_absent_disk_loses_it(
    disks: disks_module.Disks, faulty: FaultyFilesystem
) -> None:
    # The control: this is how it was done, and how it is done in many places.
    disk = faulty.mount_point / "disk"
    disks.put("used", faulty.below / "disk")
    faulty.prepare(LOOKS, "EIO", 1)

    if not os.path.exists(disk):
        disk.write_bytes(b"a new disk")

    assert (faulty.report().struck is not None, (faulty.below / "disk").read_bytes()) == (True, b"a new disk")


# Neither extended attributes nor hard links, and no fallocate.


def test_verb_works_without_attributes_and_links(
    verb: Verb, disks: disks_module.Disks, faulty: FaultyFilesystem
) -> None:
    disks.prepare(verb, faulty.below / "disk")

    verb.act(Preallocator(), str(faulty.mount_point / "disk"))

    disks.require_done(verb, faulty.below / "disk")
    assert faulty.files() == ["disk"]


def test_verb_works_without_fallocate_as_well(verb: Verb, disks: disks_module.Disks, faulty: FaultyFilesystem) -> None:
    disks.prepare(verb, faulty.below / "disk")
    faulty.prepare(["fallocate"], "EOPNOTSUPP", None)

    verb.act(Preallocator(), str(faulty.mount_point / "disk"))

    disks.require_done(verb, faulty.below / "disk")
    assert faulty.files() == ["disk"]


def test_command_works_without_attributes_and_links(
    verb: Verb, disks: disks_module.Disks, faulty: FaultyFilesystem
) -> None:
    disks.prepare(verb, faulty.below / "disk")
    argv = [sys.executable, "-m", "imgprealloc.cli", *verb.argv(faulty.mount_point / "disk")]

    done = subprocess.run(argv, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    disks.require_done(verb, faulty.below / "disk")


def test_new_disk_does_not_replace_what_comes_into_being_meanwhile(
    faulty: FaultyFilesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without links and flags of rename there is no way to publish a file that does not exist yet but one: O_EXCL.
    from imgprealloc import qemu_img

    create = qemu_img.create

    def interfering(*args: object, **kwargs: object) -> None:
        create(*args, **kwargs)  # type: ignore[arg-type]
        (faulty.mount_point / "disk").write_bytes(b"somebody's")

    monkeypatch.setattr(qemu_img, "create", interfering)
    with pytest.raises(PreallocationError):
        Preallocator().create(faulty.mount_point / "disk", 4 * MiB)

    assert (faulty.files(), (faulty.below / "disk").read_bytes()) == (["disk"], b"somebody's")


# Errors name files, and tell a real one from a filesystem's lack.


@pytest.mark.parametrize("operation", ["create", "rename", "chmod", "truncate", "fallocate", "fsync"])
def test_error_names_files_and_no_descriptors(
    disks: disks_module.Disks, faulty: FaultyFilesystem, operation: str
) -> None:
    [verb] = [verb for verb in disks.verbs() if verb.name == "rewrite"]
    disks.prepare(verb, faulty.below / "disk")
    faulty.prepare([operation], "EIO", None)

    with pytest.raises(PreallocationError) as raised:
        verb.act(Preallocator(), str(faulty.mount_point / "disk"))

    told = str(raised.value)
    assert str(faulty.mount_point / "disk") in told
    assert "/proc/" not in told
    assert "/dev/fd" not in told
    # Such as in "Operation not supported (5)".
    assert not any(f"({number})" in told for number in range(100)), told


def test_folder_that_cannot_be_synced_by_its_nature_is_no_error(
    disks: disks_module.Disks, faulty: FaultyFilesystem, verb: Verb
) -> None:
    disks.prepare(verb, faulty.below / "disk")
    faulty.prepare(["fsyncdir"], "EINVAL", None)

    verb.act(Preallocator(), str(faulty.mount_point / "disk"))

    disks.require_done(verb, faulty.below / "disk")


@pytest.mark.parametrize("name", ["rewrite", "recreate", "create", "create_raw"])
def test_folder_that_cannot_be_synced_for_a_fault_is_named(
    disks: disks_module.Disks, faulty: FaultyFilesystem, name: str
) -> None:
    [verb] = [verb for verb in disks.verbs() if verb.name == name]
    disks.prepare(verb, faulty.below / "disk")
    faulty.prepare(["fsyncdir"], "EIO", None)

    with pytest.raises(PreallocationError, match=rf"{faulty.mount_point}(?!/)"):
        verb.act(Preallocator(), str(faulty.mount_point / "disk"))

    disks.require_kept(verb, faulty.below / "disk")


@pytest.mark.parametrize("existing", ["recreate_blank", "reserve"])
def test_nothing_is_lost_that_another_host_s_guest_writes_whose_locks_are_not_seen(
    faulty: FaultyFilesystem, monkeypatch: pytest.MonkeyPatch, existing: Existing
) -> None:
    # The folder below is the other host's mount of what both have by NFS. What this one sees of locks are its own.
    disk = images.qcow2(faulty.below / "disk", 8 * MiB)
    options = {"vers": "3", "nolock": "", "local_lock": "all"}
    monkeypatch.setattr(mounts, "of", lambda fd: mounts.Mount("/instances", "nfs", "server:/instances", options))

    with images.guest(disk) as address:
        image = Preallocator().preallocate(faulty.mount_point / "disk", existing, format="qcow2")
        images.qemu_io(address, "write -P 7 1M 64k", format="raw")

    images.qemu_io(disk, "read -P 7 1M 64k")
    assert image.state == "reserved"
