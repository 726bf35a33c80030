# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
import os
from typing import Any

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import Existing
from imgprealloc import Mode
from imgprealloc import OnUnsupported
from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc.filesystem import Filesystem

from . import in_format
from .host import ENOSPC
from .host import SIZE
from .host import Host
from .in_format import InFormat

NFS = Filesystem("nfs", fallocate=False, copy_on_write=False)
BTRFS = Filesystem("btrfs", fallocate=True, copy_on_write=True)
ZFS = Filesystem("zfs", fallocate=False, copy_on_write=True)

# Which treatment.


@pytest.mark.parametrize(
    ("mode", "space", "changes"),
    [
        pytest.param("falloc", {"held": SIZE}, [], id="falloc, all held"),
        pytest.param("falloc", {"held": 0}, ["fallocate"], id="falloc, sparse"),
        pytest.param("falloc", {"held": SIZE, "shared": 4096}, ["unshare"], id="falloc, a reflink"),
        pytest.param("full", {"held": SIZE}, ["zeros"], id="full, all held"),
        pytest.param("full", {"held": 0}, ["fallocate", "zeros"], id="full, sparse"),
        pytest.param("full", {"held": SIZE, "shared": 4096}, ["unshare", "zeros"], id="full, a reflink"),
        pytest.param("metadata", {"held": 0}, [], id="metadata, sparse"),
        pytest.param("metadata", {"held": SIZE, "shared": 4096}, [], id="metadata, a reflink"),
    ],
)
@pytest.mark.parametrize("existing", ["recreate_blank", "rewrite"])
def test_what_a_raw_disk_gets(
    host: Host, mode: Mode, space: dict[str, Any], changes: list[str], existing: Existing
) -> None:
    image = in_format.raw(mode).preallocate(host.raw(SIZE, **space), existing)

    assert host.changes == changes
    assert image.state == ("preallocated" if changes or space == {"held": SIZE} else "thin")


def test_whole_file_is_reserved_and_no_more(host: Host) -> None:
    in_format.raw().preallocate(host.raw(SIZE))

    [call] = host.run("fallocate")
    assert (call.after("-o"), call.after("-l")) == ("0", str(SIZE))


def test_raw_disk_stays_the_same_file_with_the_same_content(host: Host) -> None:
    path = host.raw(SIZE)
    with open(path, "r+b") as disk:
        disk.seek(units.Mi)
        disk.write(b"x" * 65536)
    before = os.stat(path).st_ino

    in_format.raw("full").preallocate(path)

    with open(path, "rb") as disk:
        content = disk.read()
    assert content == bytes(units.Mi) + b"x" * 65536 + bytes(SIZE - units.Mi - 65536)
    assert os.stat(path).st_ino == before


def test_without_fallocate_the_fallback_full_writes_zeros(host: Host) -> None:
    host.filesystem = NFS

    image = in_format.raw(on_unsupported="full").preallocate(host.raw(SIZE))

    assert set(host.changes) == {"zeros"}
    assert image.state == "preallocated"


def test_without_fallocate_the_fallback_metadata_leaves_it_thin(host: Host) -> None:
    host.filesystem = NFS

    image = in_format.raw().preallocate(host.raw(SIZE))

    assert host.changes == []
    assert image.state == "thin"


# Copy on write.


def test_on_btrfs_a_disk_that_copies_on_write_is_refused(host: Host) -> None:
    host.filesystem = BTRFS

    with pytest.raises(exceptions.UnsupportedFilesystem, match="copy on write"):
        in_format.raw().preallocate(host.raw(SIZE, held=SIZE))

    assert host.changes == []


def test_on_btrfs_a_disk_that_may_be_rewritten_is_made_anew_with_nocow(host: Host) -> None:
    host.filesystem = BTRFS

    image = in_format.raw().preallocate(host.raw(SIZE, held=SIZE), existing="rewrite")

    [convert] = host.run("convert")
    assert convert.options == {"nocow": "on", "preallocation": "falloc"}
    assert host.changes == ["convert", "sync"]
    assert image.state == "preallocated"


def test_on_btrfs_a_disk_with_nocow_is_treated_like_any_other(host: Host) -> None:
    host.filesystem = BTRFS
    path = host.raw(SIZE)
    host.disk().nocow = True

    assert in_format.raw().preallocate(path).state == "preallocated"
    assert host.changes == ["fallocate"]


def test_on_btrfs_a_new_disk_gets_nocow(host: Host) -> None:
    host.filesystem = BTRFS

    assert in_format.raw().create(host.path(), SIZE).state == "preallocated"
    assert host.run("create")[0].options["nocow"] == "on"


@pytest.mark.parametrize("existing", ["recreate_blank", "rewrite"])
@pytest.mark.parametrize("fallback", ["metadata", "full"])
def test_on_zfs_there_is_nothing_to_be_done_for_a_disk(host: Host, fallback: OnUnsupported, existing: Existing) -> None:
    host.filesystem = ZFS

    image = in_format.raw(on_unsupported=fallback).preallocate(host.raw(SIZE), existing)

    assert (host.changes, image.state) == ([], "thin")


# create


@pytest.mark.parametrize(
    ("mode", "preallocation", "state"),
    [("falloc", "falloc", "preallocated"), ("full", "full", "preallocated"), ("metadata", "off", "thin")],
)
def test_new_raw_disk_is_made_beside_and_put_in_place(host: Host, mode: Mode, preallocation: str, state: str) -> None:
    image = in_format.raw(mode).create(host.path(), SIZE)

    assert (image.state, image.virtual_size) == (state, SIZE)
    [create] = host.run("create")
    assert create.options == {"preallocation": preallocation}
    assert create.shown[-2] == host.path(".disk.imgprealloc")
    assert host.files == ["disk"]


def test_raw_disk_has_no_backing_file(host: Host) -> None:
    with pytest.raises(exceptions.UnsupportedFormat, match="no backing file"):
        in_format.raw().create(host.path(), SIZE, host.base(SIZE))

    assert host.calls == []


# resize


@pytest.mark.parametrize(("mode", "preallocation"), [("falloc", "falloc"), ("full", "full"), ("metadata", "off")])
def test_raw_disk_grows_in_its_mode(host: Host, mode: Mode, preallocation: str) -> None:
    image = in_format.raw(mode).resize(host.raw(SIZE, held=SIZE), 2 * SIZE)

    [call] = host.run("resize")
    assert f"--preallocation={preallocation}" in call.argv
    assert image.virtual_size == 2 * SIZE
    assert image.state == ("thin" if mode == "metadata" else "preallocated")


def test_thin_raw_disk_may_stay_thin_when_it_grows(host: Host) -> None:
    path = host.raw(SIZE)
    host.then["resize"] = lambda: setattr(host.disk(path), "held", SIZE)

    assert in_format.raw().resize(path, 2 * SIZE).state == "thin"
    assert host.changes == ["resize"]


# Space.


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize(
    ("work", "needed"),
    [
        pytest.param(lambda p, host: p.create(host.path("new"), SIZE), SIZE, id="create"),
        pytest.param(lambda p, host: p.preallocate(host.raw(SIZE, held=SIZE - 8192)), 8192, id="preallocate"),
        pytest.param(lambda p, host: p.resize(host.raw(SIZE, held=SIZE), SIZE + 65536), 65536, id="resize"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_runs(
    host: Host, work: Callable[[InFormat, Host], object], needed: int, mode: Mode
) -> None:
    host.available = needed - 1

    with pytest.raises(exceptions.NoSpace):
        work(in_format.raw(mode), host)

    assert host.changes == []
    assert host.files in ([], ["disk"])


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_what_just_fits_is_made(host: Host, mode: Mode) -> None:
    host.available = SIZE

    in_format.raw(mode).create(host.path(), SIZE)

    assert host.available == 0


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_what_just_fits_is_grown(host: Host, mode: Mode) -> None:
    host.available = 65536

    in_format.raw(mode).resize(host.raw(SIZE, held=SIZE), SIZE + 65536)

    assert host.available == 0


def test_what_just_fits_is_reserved(host: Host) -> None:
    host.available = SIZE

    in_format.raw().preallocate(host.raw(SIZE))

    assert host.available == 0


def test_what_just_fits_is_written(host: Host) -> None:
    host.available = SIZE

    in_format.raw("full").preallocate(host.raw(SIZE))

    assert host.available == 0


def test_metadata_asks_for_no_space(host: Host) -> None:
    host.available = 0

    in_format.raw("metadata").create(host.path(), SIZE)
    in_format.raw("metadata").resize(host.path(), 2 * SIZE)

    assert os.path.getsize(host.path()) == 2 * SIZE


def test_space_that_another_takes_meanwhile_is_told_apart_too(host: Host) -> None:
    path = host.raw(SIZE)
    host.ends("fallocate", 1, f"fallocate: fallocate failed: {ENOSPC}")

    with pytest.raises(exceptions.NoSpace, match="fallocate"):
        in_format.raw().preallocate(path)


# In use.


def test_disk_in_use_gets_its_space_because_that_changes_nothing_that_is_read(
    host: Host, opened: Callable[[str], object]
) -> None:
    path = host.raw(SIZE, held=SIZE, shared=4096)
    opened(path)

    assert in_format.raw().preallocate(path).state == "preallocated"


def test_no_zeros_are_written_to_a_disk_in_use(host: Host, opened: Callable[[str], object]) -> None:
    path = host.raw(SIZE)
    opened(path)

    with pytest.raises(exceptions.ImageInUse) as caught:
        in_format.raw("full").preallocate(path)

    assert host.run("zeros") == []
    # Its space is set aside all the same, and it is told.
    assert caught.value.image is not None
    assert caught.value.image.state == "preallocated"
    assert "never written" in str(caught.value)


def test_disk_in_use_is_not_rewritten(host: Host, opened: Callable[[str], object]) -> None:
    host.filesystem = BTRFS
    path = host.raw(SIZE)
    opened(path)

    with pytest.raises(exceptions.ImageInUse):
        in_format.raw().preallocate(path, existing="rewrite")

    assert host.changes == []


def test_disk_written_to_since_it_was_read_is_not_rewritten(host: Host) -> None:
    host.filesystem = BTRFS
    path = host.raw(SIZE)

    def look(name: str, *, is_shared: bool) -> bool:
        os.utime(path)
        return True

    with (
        fixtures.MockPatchObject(filesystem, "copies_on_write", look),
        pytest.raises(exceptions.ImageInUse, match="written to"),
    ):
        in_format.raw().preallocate(path, existing="rewrite")

    assert host.changes == []
    assert host.files == ["disk"]
