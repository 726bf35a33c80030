# SPDX-License-Identifier: Apache-2.0
"""Which format a file is in, who says so, and what is refused: wrong words, foreign features, broken images."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import os
import pathlib
import shutil
import struct
import subprocess
from typing import Any

import images
import pytest

from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc.format import Existing

KiB, MiB = 1 << 10, 1 << 20

Verb = Callable[..., object]
Damage = Callable[[pathlib.Path], None]

VERBS: dict[str, Verb] = {
    "inspect": lambda strategy, path, **named: strategy.inspect(path, **named),
    "preallocate": lambda strategy, path, **named: strategy.preallocate(path, **named),
    "rewrite": lambda strategy, path, **named: strategy.preallocate(path, existing="rewrite", **named),
    "resize": lambda strategy, path, **named: strategy.resize(path, 64 * MiB, **named),
}

each_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


# Who says so.


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_format_is_found_out_where_nobody_names_it(folder: pathlib.Path, format: str) -> None:
    images.run("qemu-img", "create", "-q", "-f", format, folder / "disk", 8 * MiB)

    assert Preallocator().inspect(folder / "disk").format == format


@each_verb
def test_raw_disk_that_is_said_to_be_qcow2_is_refused(folder: pathlib.Path, verb: Verb) -> None:
    disk = images.random_file(folder / "disk", MiB)

    with pytest.raises(exceptions.FormatMismatch):
        verb(Preallocator(), disk, format="qcow2")


@each_verb
def test_raw_disk_that_is_said_to_be_qcow2_is_untouched(folder: pathlib.Path, verb: Verb) -> None:
    disk = images.random_file(folder / "disk", MiB)
    before = images.identity(disk)

    with pytest.raises(exceptions.FormatMismatch):
        verb(Preallocator(), disk, format="qcow2")

    assert images.identity(disk) == before


def test_qcow2_file_that_is_said_to_be_raw_is_taken_for_raw(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 64 * MiB)

    image = Preallocator().preallocate(disk, format="raw")

    assert (image.format, image.state, image.file_size) == ("raw", "preallocated", disk.stat().st_size)


def test_qcow2_file_that_is_said_to_be_raw_keeps_its_bytes(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 64 * MiB)
    before = images.file_digest(disk)

    Preallocator().preallocate(disk, format="raw")

    assert images.file_digest(disk) == before


# A guest can write a qcow2 header to its raw disk. What it says is the
# guest's word, and may name any file of the host as its backing file.


@pytest.fixture(params=["blank", "with data", "preallocated"])
def disguised(request: pytest.FixtureRequest, folder: pathlib.Path) -> pathlib.Path:
    """Give a raw disk of 64 MiB that begins like a qcow2 image over a file of the host."""
    secret = images.random_file(folder / "secret", 4 * MiB)
    header = images.qcow2(folder / "header", 16 * MiB, backing=secret)
    if request.param == "with data":
        images.qemu_io(header, "write -P 0x5a 1M 64k")
    if request.param == "preallocated":
        Preallocator().preallocate(header, format="qcow2")
    disk = images.sparse_file(folder / "disk", 64 * MiB)
    with open(disk, "r+b") as file:
        file.seek(40 * MiB)
        file.write(os.urandom(MiB))
        file.seek(0)
        file.write(header.read_bytes())
    return disk


@pytest.mark.parametrize("rewrite", [False, True])
def test_disguised_raw_disk_keeps_its_bytes_where_nobody_names_the_format(
    disguised: pathlib.Path, rewrite: bool
) -> None:
    before = images.file_digest(disguised)

    with contextlib.suppress(exceptions.FormatNotCertain):
        Preallocator().preallocate(disguised, "rewrite" if rewrite else "recreate_blank")

    assert images.file_digest(disguised) == before


def test_disguised_raw_disk_does_not_grow_by_a_guess(disguised: pathlib.Path) -> None:
    before = images.file_digest(disguised)

    with pytest.raises(exceptions.PreallocationError):
        Preallocator().resize(disguised, 128 * MiB)

    assert images.file_digest(disguised) == before


def test_disguised_raw_disk_is_preallocated_by_the_word_of_the_caller(disguised: pathlib.Path) -> None:
    before = images.file_digest(disguised)

    image = Preallocator().preallocate(disguised, format="raw")

    assert (image.state, images.file_digest(disguised)) == ("preallocated", before)


def test_disguised_raw_disk_grows_by_the_word_of_the_caller(disguised: pathlib.Path, folder: pathlib.Path) -> None:
    plain = shutil.copyfile(disguised, folder / "plain")
    os.truncate(plain, 128 * MiB)

    Preallocator().resize(disguised, 128 * MiB, format="raw")

    assert images.file_digest(disguised) == images.file_digest(plain)


# Formats and features that are not ours.


@pytest.mark.parametrize("format", ["vmdk", "vdi", "vhdx", "vpc", "qed"])
def test_foreign_format_is_refused(folder: pathlib.Path, format: str) -> None:
    images.run("qemu-img", "create", "-q", "-f", format, folder / "disk", 16 * MiB)

    with pytest.raises(exceptions.UnsupportedFormat, match=format):
        Preallocator().preallocate(folder / "disk")


@each_verb
def test_foreign_format_is_refused_by_each_verb(folder: pathlib.Path, verb: Verb) -> None:
    images.run("qemu-img", "create", "-q", "-f", "vmdk", folder / "disk", 16 * MiB)

    with pytest.raises(exceptions.UnsupportedFormat, match="vmdk"):
        verb(Preallocator(), folder / "disk")


def test_foreign_format_is_refused_by_the_callers_word_too(folder: pathlib.Path) -> None:
    images.run("qemu-img", "create", "-q", "-f", "vmdk", folder / "disk", 16 * MiB)

    with pytest.raises(exceptions.UnsupportedFormat, match="vmdk"):
        Preallocator().preallocate(folder / "disk", format="vmdk")


def test_foreign_format_is_not_created(folder: pathlib.Path) -> None:
    with pytest.raises(exceptions.UnsupportedFormat):
        Preallocator().create(folder / "disk", 16 * MiB, format="vmdk")


@pytest.fixture
def data_file(folder: pathlib.Path) -> pathlib.Path:
    """Give a qcow2 image whose data is in another file."""
    return images.qcow2(folder / "disk", 16 * MiB, data_file=folder / "data")


@each_verb
def test_image_with_a_data_file_is_refused(data_file: pathlib.Path, verb: Verb) -> None:
    with pytest.raises(exceptions.UnsupportedFormat, match="data-file"):
        verb(Preallocator(), data_file, format="qcow2")


def test_image_with_a_data_file_is_untouched(data_file: pathlib.Path) -> None:
    before = images.identity(data_file)

    with pytest.raises(exceptions.UnsupportedFormat):
        Preallocator().preallocate(data_file, existing="rewrite", format="qcow2")

    assert images.identity(data_file) == before


@pytest.fixture(scope="module")
def luks(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Give a qcow2 image that LUKS encrypts; made once, because the key takes seconds."""
    path = tmp_path_factory.mktemp("luks") / "disk"
    command = (
        "qemu-img", "create", "-q", "--object", "secret,id=key,data=secret", "-f", "qcow2",
        "-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", path, 16 * MiB,
    )  # fmt: skip
    for _ in range(5):
        # On a busy machine QEMU may be "unable to get accurate CPU usage".
        with contextlib.suppress(AssertionError):
            images.run(*command)
            return path
    images.run(*command)
    return path


@pytest.fixture
def encrypted(luks: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copyfile(luks, folder / "disk"))


@each_verb
def test_encrypted_image_is_refused(encrypted: pathlib.Path, verb: Verb) -> None:
    with pytest.raises(exceptions.UnsupportedFormat, match="encrypted"):
        verb(Preallocator(), encrypted, format="qcow2")


def test_encrypted_image_is_untouched(encrypted: pathlib.Path) -> None:
    before = images.identity(encrypted)

    with pytest.raises(exceptions.UnsupportedFormat):
        Preallocator().preallocate(encrypted, existing="rewrite", format="qcow2")

    assert images.identity(encrypted) == before


# Broken images.


def cut_short(path: pathlib.Path) -> None:
    os.truncate(path, 20000)


def without_its_end(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 12345)


def marked_corrupt(path: pathlib.Path) -> None:
    with open(path, "r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 2))


def with_garbage_for_its_l1_table(path: pathlib.Path) -> None:
    with open(path, "r+b") as file:
        file.seek(40)
        file.seek(struct.unpack(">Q", file.read(8))[0])
        file.write(b"\xff" * 64)


def with_two_users_of_a_cluster(path: pathlib.Path) -> None:
    with open(path, "r+b") as file:
        file.seek(40)
        l1_offset = struct.unpack(">Q", file.read(8))[0]
        file.seek(l1_offset)
        l2_offset = struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00
        file.seek(l2_offset)
        entry = file.read(8)
        file.write(entry)


def with_an_unknown_version(path: pathlib.Path) -> None:
    with open(path, "r+b") as file:
        file.seek(4)
        file.write(struct.pack(">I", 77))


def with_an_unknown_feature(path: pathlib.Path) -> None:
    with open(path, "r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 1 << 60))


def with_a_huge_size(path: pathlib.Path) -> None:
    with open(path, "r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", 1 << 62))


DAMAGE: tuple[Damage, ...] = (
    cut_short,
    without_its_end,
    marked_corrupt,
    with_garbage_for_its_l1_table,
    with_two_users_of_a_cluster,
    with_an_unknown_version,
    with_an_unknown_feature,
    with_a_huge_size,
)

each_damage = pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)


@pytest.fixture
def broken(folder: pathlib.Path, damage: Damage) -> pathlib.Path:
    """Give a qcow2 image with 4 MiB of data in it, damaged in one way."""
    disk = images.qcow2(folder / "disk", 16 * MiB)
    images.qemu_io(disk, "write -P 0x5a 0 4M")
    damage(disk)
    return disk


@each_damage
@pytest.mark.parametrize("verb", [VERBS["inspect"], VERBS["resize"]], ids=["inspect", "resize"])
def test_broken_image_is_refused(broken: pathlib.Path, verb: Verb) -> None:
    with pytest.raises(exceptions.PreallocationError):
        verb(Preallocator(), broken, format="qcow2")


@each_damage
def test_broken_image_is_untouched(broken: pathlib.Path) -> None:
    before = images.identity(broken), images.file_digest(broken)

    with pytest.raises(exceptions.PreallocationError):
        Preallocator().preallocate(broken, existing="rewrite", format="qcow2")

    assert (images.identity(broken), images.file_digest(broken)) == before


def test_image_marked_corrupt_is_called_broken(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 16 * MiB)
    marked_corrupt(disk)

    with pytest.raises(exceptions.BrokenImage, match="marked corrupt"):
        Preallocator().preallocate(disk, format="qcow2")


def test_image_with_leaked_clusters_only_is_not_called_broken(folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 16 * MiB)
    images.qemu_io(disk, "write -P 0x5a 0 4M")
    with open(disk, "r+b") as file:
        file.seek(40)
        l1_offset = struct.unpack(">Q", file.read(8))[0]
        file.seek(l1_offset)
        l2_offset = struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00
        file.seek(l2_offset)
        file.write(bytes(8))

    assert Preallocator().preallocate(disk, existing="rewrite", format="qcow2").state == "preallocated"


@pytest.fixture
def unrepaired(folder: pathlib.Path) -> pathlib.Path:
    """Give an image whose refcounts were to be written when QEMU closed it, which was killed."""
    disk = images.qcow2(folder / "disk", 16 * MiB, lazy_refcounts="on", compat="1.1")
    images.run("sh", "-c", f"qemu-io -f qcow2 -c 'write -P 0x5a 0 4M' -c 'sigraise 9' {disk} || true")
    assert subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", disk], check=False).returncode == 2
    return disk


@pytest.mark.parametrize("existing", ["reserve", "recreate_blank", "rewrite"])
def test_image_that_waits_for_its_repair_is_reserved_and_keeps_its_bytes(
    unrepaired: pathlib.Path, existing: Existing, caplog: pytest.LogCaptureFixture
) -> None:
    before = unrepaired.stat().st_ino, images.file_digest(unrepaired)

    image = Preallocator().preallocate(unrepaired, existing, format="qcow2")

    assert (image.state, image.shortfall, image.waits_for_repair) == ("reserved", 0, True)
    assert (unrepaired.stat().st_ino, images.file_digest(unrepaired)) == before
    assert ("wait for their repair" in caplog.text) == (existing == "rewrite")


@pytest.mark.parametrize("options", [{}, {"cluster_size": 512, "refcount_bits": 64}, {"cluster_size": 2 * MiB}])
def test_image_that_waits_for_its_repair_has_the_space_for_it_and_for_its_guest(
    folder: pathlib.Path, options: dict[str, Any]
) -> None:
    disk = images.qcow2(folder / "disk", 2 * MiB, lazy_refcounts="on", compat="1.1", **options)
    images.run("sh", "-c", f"qemu-io -f qcow2 -c 'write -P 0x5a 0 1M' -c 'sigraise 9' {disk} || true")
    told = Preallocator().preallocate(disk, "reserve", format="qcow2").worst_case_size

    images.qemu_io(disk, "read -P 0x5a 0 1M", "write -P 0x22 1M 1M", "write -P 0x11 0 1M")

    assert max(disk.stat().st_size, images.check(disk)["image-end-offset"]) <= told
    # The old refcounts, which the repair has given back to the filesystem.
    assert Preallocator().inspect(disk, format="qcow2").shortfall <= 3 * options.get("cluster_size", 64 * KiB)
    assert Preallocator().preallocate(disk, "reserve", format="qcow2").shortfall == 0


def test_image_that_waits_for_its_repair_is_neither_grown_nor_copied(unrepaired: pathlib.Path) -> None:
    before = images.identity(unrepaired)

    with pytest.raises(exceptions.BrokenImage, match="check -r all"):
        Preallocator().resize(unrepaired, 32 * MiB, format="qcow2")
    with pytest.raises(exceptions.UnsupportedFormat, match="wait for their repair"):
        Preallocator().thin(unrepaired, rewrite=True, format="qcow2")

    assert images.identity(unrepaired) == before


def test_image_is_treated_like_any_other_once_it_is_repaired(unrepaired: pathlib.Path) -> None:
    images.qemu_io(unrepaired, "read -P 0x5a 0 4M")

    image = Preallocator().preallocate(unrepaired, "rewrite", format="qcow2")

    assert (image.state, image.waits_for_repair) == ("preallocated", False)


@pytest.fixture
def orphan(folder: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """Give an overlay with data whose base is gone."""
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    images.qemu_io(disk, "write -P 0x5a 1M 1M")
    base.unlink()
    return disk


def test_overlay_whose_base_is_gone_can_still_be_read(orphan: pathlib.Path, base: pathlib.Path) -> None:
    image = Preallocator().inspect(orphan, format="qcow2")

    assert (image.state, image.backing_file) == ("thin", str(base))


def test_overlay_whose_base_is_gone_can_still_be_reserved(orphan: pathlib.Path) -> None:
    assert Preallocator().preallocate(orphan, format="qcow2").state == "reserved"


def test_overlay_whose_base_is_gone_does_not_grow(orphan: pathlib.Path) -> None:
    before = images.identity(orphan)

    with pytest.raises(exceptions.PreallocationError, match="base"):
        Preallocator().resize(orphan, 64 * MiB, format="qcow2")

    assert images.identity(orphan) == before


@pytest.mark.parametrize("blank", [False, True])
def test_base_that_is_a_pipe_keeps_nobody_waiting(folder: pathlib.Path, blank: bool) -> None:
    # A header may name what never answers; a pipe, or a server.
    os.mkfifo(folder / "pipe")
    disk = images.qcow2(folder / "disk", 32 * MiB)
    if not blank:
        images.qemu_io(disk, "write -P 0x5a 1M 1M")
    images.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", folder / "pipe", "-F", "raw", disk)

    assert Preallocator().inspect(disk, format="qcow2").state == "thin"
    with contextlib.suppress(exceptions.BackingFileUnusable):
        Preallocator().preallocate(disk, format="qcow2")


def test_blank_overlay_whose_base_is_not_a_file_is_reserved(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB)
    images.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", f"file:{base}", "-F", "raw", disk)

    assert Preallocator().preallocate(disk, format="qcow2").state == "reserved"


def test_overlay_is_not_created_over_what_is_not_a_file(folder: pathlib.Path, base: pathlib.Path) -> None:
    with pytest.raises(exceptions.UnsupportedFormat, match="protocol"):
        Preallocator().create(folder / "disk", 32 * MiB, f"file:{base}", backing_format="raw")

    assert os.listdir(folder) == ["base.raw"]


def test_base_may_be_a_block_device(folder: pathlib.Path, base: pathlib.Path) -> None:
    device = images.run("losetup", "--find", "--show", "--read-only", base).strip()
    try:
        disk = images.qcow2(folder / "disk", 32 * MiB, backing=device)

        assert Preallocator().preallocate(disk, format="qcow2").state == "preallocated"
        images.run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", disk, base)
    finally:
        images.run("losetup", "--detach", device)


def test_overlay_without_data_whose_base_is_gone_is_untouched(folder: pathlib.Path, base: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    base.unlink()
    before = images.identity(disk)

    with pytest.raises(exceptions.PreallocationError):
        Preallocator().preallocate(disk, format="qcow2")

    assert (images.identity(disk), os.listdir(folder)) == (before, ["disk"])


def test_base_that_is_gone_leaves_no_disk_at_creation(folder: pathlib.Path) -> None:
    with pytest.raises(exceptions.PreallocationError):
        Preallocator().create(folder / "disk", 32 * MiB, str(folder / "gone"), backing_format="raw")

    assert os.listdir(folder) == []


# What is no disk at all.


@each_verb
def test_missing_disk_is_told_as_such(folder: pathlib.Path, verb: Verb) -> None:
    with pytest.raises(exceptions.DiskNotFound):
        verb(Preallocator(), folder / "disk")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@each_verb
def test_missing_disk_of_a_known_format_is_told_as_such(folder: pathlib.Path, verb: Verb, format: str) -> None:
    with pytest.raises(exceptions.DiskNotFound):
        verb(Preallocator(), folder / "disk", format=format)


@each_verb
def test_folder_is_no_disk(folder: pathlib.Path, verb: Verb) -> None:
    with pytest.raises(exceptions.DiskNotFound):
        verb(Preallocator(), folder)


@each_verb
def test_device_is_no_disk(verb: Verb) -> None:
    with pytest.raises(exceptions.DiskNotFound):
        verb(Preallocator(), "/dev/zero", format="raw")


@each_verb
def test_pipe_is_no_disk(folder: pathlib.Path, verb: Verb) -> None:
    os.mkfifo(folder / "pipe")

    with pytest.raises(exceptions.DiskNotFound):
        verb(Preallocator(), folder / "pipe")


@pytest.mark.parametrize("size", [0, -1, -512])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_size_that_is_none_is_refused_at_creation(folder: pathlib.Path, format: str, size: int) -> None:
    with pytest.raises(exceptions.InvalidSize):
        Preallocator().create(folder / "disk", size, format=format)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_size_beyond_all_reason_leaves_no_file(folder: pathlib.Path, format: str) -> None:
    with pytest.raises(exceptions.PreallocationError):
        Preallocator("metadata").create(folder / "disk", 1 << 62, format=format)

    assert os.listdir(folder) == []
