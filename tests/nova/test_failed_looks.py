# SPDX-License-Identifier: Apache-2.0
"""One look that fails while Nova makes or starts a disk: what was there stays, and reads the same.

The instance's folder is a FUSE filesystem, on which each look of the process in
turn is answered with an error, Nova's own and ours. Those of the programs that
it runs are tried in tests/functional. IMGPREALLOC_EVERY_LOOK=1 leaves none out.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import os
import pathlib
import shutil
import stat
import subprocess
from typing import Any

from functional import faulty_filesystem
from functional import tally
from functional.faulty_filesystem import LOOKS
from functional.faulty_filesystem import FaultyFilesystem
import nova_disks
from oslo_utils import units
import pytest

import imgprealloc

SIZE = 6 * units.Mi

KINDS = pytest.mark.parametrize("kind", ["qcow2", "raw"])


@pytest.fixture
def tiny_base(room: str) -> str:
    """A full raw base image of 2 MiB, because many disks are made of it."""
    path = os.path.join(room, "tiny-base")
    if not os.path.exists(path):
        with open(path, "wb") as file:
            file.write(os.urandom(2 * units.Mi))
    return path


class Ground:
    """An instance's folder where looks fail, and Nova's object for the disk in it."""

    def __init__(self, disks: nova_disks.Disks, faulty: FaultyFilesystem, base: str, kind: str) -> None:
        self.faulty = faulty
        self.disk = faulty.below / "disk"
        self._disks, self._base, self._kind = disks, base, kind
        self._contents: dict[bytes, bytes] = {}

    def cache(self, size: int = SIZE) -> Exception | None:
        """Let Nova make the disk or find it, as at a build and a start; return what that ends with."""
        instance = type("Instance", (), {"uuid": self.faulty.mount_point.name, "flavor": None, "name": "instance-1"})
        try:
            image = self._disks.image(instance, "disk", self._kind)
            self._disks.cache(image, self._base, size)
        except Exception as exc:
            return exc
        return None

    def content(self) -> bytes:
        """Return what the guest reads, but for the zeros at the end."""
        copy = self.disk.parent.parent / "copy"
        read = self.disk.read_bytes()
        # Most of a table's cases come to the same.
        if read not in self._contents:
            convert = ["qemu-img", "convert", "-f", self._kind, "-O", "raw", str(self.disk), str(copy)]
            done = subprocess.run(convert, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            self._contents[read] = copy.read_bytes().rstrip(b"\0")
        return self._contents[read]

    def clear(self) -> None:
        """Remove all."""
        for left in self.faulty.below.iterdir():
            left.unlink(missing_ok=True)


@pytest.fixture
def ground(
    disks: Callable[..., nova_disks.Disks], tiny_base: str, kind: str, request: pytest.FixtureRequest
) -> Iterator[Ground]:
    """Give such a folder, with the options of nova.conf that a test parametrizes."""
    made = disks(**getattr(request, "param", {}))
    uuid = made.instance().uuid
    below = pathlib.Path(made.instances_path, "below")
    below.mkdir()
    with faulty_filesystem.mounted(below, pathlib.Path(made.instances_path, uuid)) as faulty:
        yield Ground(made, faulty, tiny_base, kind)


def used_disk(ground: Ground, kind: str, base: str) -> dict[str, bytes]:
    """Return the files of an instance whose disk stock Nova has made and its guest has written to."""
    # Nova's note of the format, which it makes at a build.
    assert ground.cache() is None
    ground.disk.unlink()
    path = str(ground.disk)
    if kind == "qcow2":
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path, str(SIZE)]
        subprocess.run(create, check=True)
    else:
        shutil.copyfile(base, path)
        os.truncate(path, SIZE)
    write = ["qemu-io", "-f", kind, "-c", "write -P 7 1M 100k", "-c", "write -P 8 4M 64k", path]
    subprocess.run(write, check=True, capture_output=True)
    return {found.name: found.read_bytes() for found in ground.faulty.below.iterdir()}


STARTS = [
    ("qcow2", {"imgprealloc__existing_disks": "reserve"}, SIZE),
    ("qcow2", {"imgprealloc__existing_disks": "rewrite"}, SIZE),
    ("raw", {"imgprealloc__existing_disks": "reserve"}, SIZE + units.Mi),
    ("raw", {"imgprealloc__existing_disks": "rewrite"}, SIZE),
]


@pytest.mark.parametrize(
    ("kind", "ground", "size"),
    STARTS,
    indirect=["ground"],
    ids=["qcow2-reserve", "qcow2-rewrite", "raw-reserve-grown", "raw-rewrite"],
)
def test_no_look_that_fails_at_a_start_loses_a_disk(
    ground: Ground, kind: str, tiny_base: str, size: int, pytestconfig: pytest.Config
) -> None:
    files = used_disk(ground, kind, tiny_base)
    before = ground.content()

    with tally.table(pytestconfig, "starts with a look that fails") as counts:
        at = 1
        while True:
            ground.clear()
            for name, content in files.items():
                (ground.faulty.below / name).write_bytes(content)
            if kind == "raw":
                # With its holes, or there is nothing to fill.
                subprocess.run(["fallocate", "--dig-holes", str(ground.disk)], check=True)
            ground.faulty.prepare(LOOKS, "EIO", at, os.getpid())
            failed = ground.cache(size)
            struck = ground.faulty.report().struck
            with counts.case("start", kind, "EIO at", at, struck):
                assert ground.disk.is_file(), f"the disk is gone: {failed}"
                assert ground.content() == before, f"the disk reads different: {failed}"
                assert struck or failed is None, f"it failed without a fault: {failed}"
                left = set(ground.faulty.files()) - set(files)
                assert not left or (struck and "imgprealloc" in struck.path), f"it left {left}"
            if struck is None:
                break
            at = faulty_filesystem.after(at)


@KINDS
def test_no_look_that_fails_at_a_build_leaves_anything_of_ours(
    ground: Ground, kind: str, tiny_base: str, pytestconfig: pytest.Config
) -> None:
    with open(tiny_base, "rb") as file:
        expected = file.read()
    with tally.table(pytestconfig, "builds with a look that fails") as counts:
        at = 1
        while True:
            ground.clear()
            ground.faulty.prepare(LOOKS, "EIO", at, os.getpid())
            failed = ground.cache()
            struck = ground.faulty.report().struck
            with counts.case("build", kind, "EIO at", at, struck):
                if failed is None:
                    assert ground.disk.is_file(), "it ended well, and there is no disk"
                    assert ground.content() == expected, "a new disk reads different from its base"
                else:
                    assert struck, f"it failed without a fault: {failed}"
                left = {name for name in ground.faulty.files() if "imgprealloc" in name}
                assert not left or (struck and "imgprealloc" in struck.path), f"it left {left}"
            if struck is None:
                break
            at = faulty_filesystem.after(at)


@KINDS
def test_build_works_without_attributes_and_links(ground: Ground, kind: str, tiny_base: str) -> None:
    failed = ground.cache()

    assert failed is None, failed
    with open(tiny_base, "rb") as file:
        assert ground.content() == file.read()


@KINDS
def test_build_works_where_only_root_may_set_the_sticky_bit_of_a_file(
    ground: Ground, kind: str, tiny_base: str
) -> None:
    # What FreeBSD's EFTYPE becomes on its way through NFS.
    ground.faulty.prepare(["chmod +t"], "EIO", None)

    failed = ground.cache()

    assert failed is None, failed
    assert stat.S_IMODE(ground.disk.stat().st_mode) == 0o644
    assert imgprealloc.Preallocator().inspect(ground.disk, format=kind).state == "preallocated"


@KINDS
def test_build_works_as_well_without_fallocate(ground: Ground, kind: str, tiny_base: str) -> None:
    ground.faulty.prepare(["fallocate"], "EOPNOTSUPP", None)

    failed = ground.cache()

    assert failed is None, failed


@pytest.mark.parametrize("kind", ["qcow2"])
@pytest.mark.parametrize("ground", [{"imgprealloc__existing_disks": "rewrite"}], indirect=True)
def test_start_removes_what_a_killed_run_has_left(ground: Ground, kind: str, tiny_base: str) -> None:
    used_disk(ground, kind, tiny_base)
    left = ground.faulty.below / ".disk.imgprealloc"
    left.write_bytes(b"half of a disk")
    left.chmod(0o1600)

    failed = ground.cache()

    assert failed is None, failed
    assert [name for name in ground.faulty.files() if "imgprealloc" in name] == []


def test_start_does_not_take_somebodys_file_for_a_leftover(
    disks: Callable[..., nova_disks.Disks], tiny_base: str
) -> None:
    made = disks()
    image = made.spawn(tiny_base, SIZE)
    theirs = pathlib.Path(image.path).with_name(".disk.imgprealloc")
    theirs.write_text("somebody's")

    made.cache(image, tiny_base, SIZE)

    assert theirs.read_text() == "somebody's"


@KINDS
def test_start_removes_a_leftover_also_where_there_is_nothing_else_to_do(
    disks: Callable[..., nova_disks.Disks], tiny_base: str, kind: str
) -> None:
    made = disks()
    image: Any = made.spawn(tiny_base, SIZE, image_type=kind)
    left = pathlib.Path(image.path).with_name(".disk.imgprealloc")
    left.write_bytes(b"half of a disk")
    left.chmod(0o1600)

    made.cache(image, tiny_base, SIZE)

    assert not left.exists()
