# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
from typing import Any

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import Existing
from imgprealloc import Mode
from imgprealloc import OverlaySubclusters
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import lock
from imgprealloc.filesystem import Filesystem
from imgprealloc.qcow2 import Qcow2

from . import in_format
from .host import ENOSPC
from .host import SIZE
from .host import Call
from .host import Host
from .host import csv
from .host import failure
from .host import standing_lock
from .in_format import InFormat

NFS = Filesystem("nfs", fallocate=False, copy_on_write=False)
BTRFS = Filesystem("btrfs", fallocate=True, copy_on_write=True)
ZFS = Filesystem("zfs", fallocate=False, copy_on_write=True)

CLUSTER = 128 * units.Ki

OVERLAY_OPTIONS = {"cluster_size": str(CLUSTER), "extended_l2": "on"}

# Which treatment, of those that the design names in their order.


@pytest.mark.parametrize("existing", ["recreate_blank", "rewrite"])
@pytest.mark.parametrize(
    ("mode", "disk", "changes", "state"),
    [
        # 1. Already preallocated: nothing.
        ("falloc", {"mapped": 1.0}, [], "preallocated"),
        ("full", {"mapped": 1.0}, ["zeros"], "preallocated"),
        ("metadata", {"mapped": 1.0}, [], "preallocated"),
        ("metadata", {"mapped": 1.0, "held": 0}, [], "mapped"),
        # 3. Every cluster mapped: the space over the file's length.
        ("falloc", {"mapped": 1.0, "held": 0}, ["fallocate"], "preallocated"),
        ("full", {"mapped": 1.0, "held": 0}, ["fallocate", "zeros"], "preallocated"),
        ("falloc", {"mapped": 1.0, "shared": 4096}, ["unshare"], "preallocated"),
        # 4. Nothing in it: a new one.
        ("falloc", {}, ["create", "fallocate", "sync"], "preallocated"),
        ("full", {}, ["create", "fallocate", "sync"], "preallocated"),
        ("metadata", {}, ["create", "sync"], "mapped"),
    ],
)
def test_what_a_disk_without_a_backing_file_gets_either_way(
    host: Host, mode: Mode, disk: dict[str, Any], changes: list[str], state: str, existing: Existing
) -> None:
    image = in_format.qcow2(mode).preallocate(host.qcow2(SIZE, **disk), existing)

    assert (host.changes, image.state) == (changes, state)


@pytest.mark.parametrize("existing", ["recreate_blank", "rewrite"])
@pytest.mark.parametrize(
    ("subclusters", "mode", "changes", "state"),
    [
        ("unallocated", "falloc", ["create", "resize", "fallocate", "sync"], "preallocated"),
        ("unallocated", "full", ["create", "resize", "fallocate", "sync"], "preallocated"),
        ("unallocated", "metadata", ["create", "resize", "sync"], "mapped"),
        ("allocated", "falloc", ["create", "resize", "fallocate", "sync"], "preallocated"),
        ("allocated", "full", ["create", "resize", "fallocate", "sync"], "preallocated"),
        ("allocated", "metadata", ["create", "resize", "sync"], "mapped"),
        ("copied", "falloc", ["convert", "rebase", "resize", "fallocate", "sync"], "preallocated"),
        ("copied", "full", ["convert", "rebase", "resize", "fallocate", "sync"], "preallocated"),
        ("copied", "metadata", ["convert", "rebase", "resize", "sync"], "mapped"),
    ],
)
def test_what_an_overlay_without_anything_in_it_gets(
    host: Host, subclusters: OverlaySubclusters, mode: Mode, changes: list[str], state: str, existing: Existing
) -> None:
    strategy = in_format.qcow2(mode, overlay_subclusters=subclusters)

    image = strategy.preallocate(host.overlay(), existing)

    assert (host.changes, image.state) == (changes, state)


@pytest.mark.parametrize(
    ("mode", "existing", "changes", "state"),
    [
        # 5. Data in it: a copy where that is allowed, else room for the worst case.
        ("falloc", "recreate_blank", ["fallocate"], "reserved"),
        ("full", "recreate_blank", ["fallocate"], "reserved"),
        ("metadata", "recreate_blank", [], "thin"),
        ("falloc", "rewrite", ["convert", "fallocate", "sync"], "preallocated"),
        ("full", "rewrite", ["convert", "fallocate", "sync"], "preallocated"),
        ("metadata", "rewrite", ["convert", "sync"], "mapped"),
    ],
)
@pytest.mark.parametrize("make", [Host.qcow2, Host.overlay])
def test_what_a_disk_with_data_gets(
    host: Host, make: Callable[..., str], mode: Mode, existing: Existing, changes: list[str], state: str
) -> None:
    image = in_format.qcow2(mode).preallocate(make(host, SIZE, mapped=0.5), existing)

    assert (host.changes, image.state) == (changes, state)


def test_disk_with_nothing_but_zeroed_clusters_has_data(host: Host) -> None:
    # A zeroed cluster hides the backing file, and is not counted by qemu-img check.
    path = host.overlay(mapped=0.0)

    in_format.qcow2().preallocate(path)

    assert host.changes == ["fallocate"]


def test_disk_without_a_size_is_not_made_anew(host: Host) -> None:
    # qemu-img create, ended by a signal, leaves such a file.
    in_format.qcow2().preallocate(host.qcow2(0))

    assert host.run("create", "convert") == []


def test_disk_that_was_already_reserved_is_left_alone(host: Host) -> None:
    path = host.qcow2(mapped=0.5)
    first = in_format.qcow2().preallocate(path)
    host.calls.clear()

    second = in_format.qcow2().preallocate(path)

    assert host.changes == []
    assert (second, second.state) == (first, "reserved")


def test_reserved_disk_can_still_be_rewritten(host: Host) -> None:
    path = host.qcow2(mapped=0.5)
    in_format.qcow2().preallocate(path)

    assert in_format.qcow2().preallocate(path, existing="rewrite").state == "preallocated"


def test_disk_with_data_is_never_rewritten_unasked(host: Host) -> None:
    path = host.overlay(mapped=0.5)
    before = os.stat(path)

    in_format.qcow2().preallocate(path)

    after = os.stat(path)
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def test_room_for_the_worst_case_goes_past_the_end_of_the_file(host: Host) -> None:
    path = host.qcow2(mapped=0.5)
    held = in_format.qcow2().inspect(path).held_size

    image = in_format.qcow2().preallocate(path)

    # What is held already is not asked for again.
    [call] = host.run("fallocate")
    assert (call.after("-o"), call.after("-l")) == (str(held), str(image.worst_case_size - held))
    assert image.worst_case_size > image.file_size


def test_mapped_disk_is_held_over_its_length_and_no_more(host: Host) -> None:
    path = host.qcow2(mapped=1.0, held=0)

    in_format.qcow2().preallocate(path)

    [call] = host.run("fallocate")
    assert (call.after("-o"), call.after("-l")) == ("0", str(os.path.getsize(path)))


# What is made anew keeps what it has to.


def test_new_overlay_keeps_its_backing_file_s_name_and_format(host: Host) -> None:
    host.base(SIZE // 2)
    path = host.overlay(backing_file="base")

    image = in_format.qcow2().preallocate(path)

    assert (image.backing_file, image.backing_format, image.virtual_size) == ("base", "raw", SIZE)


def test_rewritten_overlay_keeps_its_backing_file_s_name_and_format(host: Host) -> None:
    host.base(SIZE // 2)
    path = host.overlay(mapped=0.5, backing_file="base")

    image = in_format.qcow2().preallocate(path, existing="rewrite")

    assert (image.backing_file, image.backing_format, image.virtual_size) == ("base", "raw", SIZE)


@pytest.mark.parametrize("mapped", [None, 0.5])
def test_disk_without_a_backing_file_keeps_its_cluster_size(host: Host, mapped: float | None) -> None:
    path = host.qcow2(cluster_size=units.Mi, mapped=mapped)

    image = in_format.qcow2().preallocate(path, existing="rewrite")

    assert (image.cluster_size, image.extended_l2) == (units.Mi, False)


@pytest.mark.parametrize("mapped", [None, 0.5])
def test_overlay_gets_subclusters_and_the_configured_cluster_size(host: Host, mapped: float | None) -> None:
    path = host.overlay(cluster_size=units.Mi, mapped=mapped)

    image = in_format.qcow2(overlay_cluster_size=CLUSTER // 2).preallocate(path, existing="rewrite")

    assert (image.cluster_size, image.extended_l2) == (CLUSTER // 2, True)


# A copy is told its backing file's format among the options.
@pytest.mark.parametrize(("mapped", "backing"), [(None, {}), (0.5, {"backing_fmt": "raw"})])
@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_new_overlay_is_made_in_the_mode(host: Host, mode: Mode, mapped: float | None, backing: dict[str, str]) -> None:
    in_format.qcow2(mode).preallocate(host.overlay(mapped=mapped), existing="rewrite")

    [call] = host.run("create", "convert")
    assert call.options == {"preallocation": mode, **OVERLAY_OPTIONS, **backing}


# Growing a new overlay under zeros.


@pytest.mark.parametrize(
    ("base", "first_size"),
    [
        pytest.param(4 * CLUSTER, 4 * CLUSTER, id="in whole clusters"),
        pytest.param(4 * CLUSTER + 1, 5 * CLUSTER, id="a byte into the next cluster"),
        pytest.param(5 * CLUSTER - 1, 5 * CLUSTER, id="a byte short of a cluster"),
        pytest.param(100_000_256 % SIZE, -(-(100_000_256 % SIZE) // CLUSTER) * CLUSTER, id="an odd size"),
        pytest.param(0, CLUSTER, id="empty"),
    ],
)
def test_new_overlay_starts_as_long_as_its_base_rounded_up_to_a_cluster(host: Host, base: int, first_size: int) -> None:
    # Else the base's last cluster reads as zeros.
    in_format.qcow2(overlay_subclusters="allocated").create(host.path(), SIZE, host.base(base), backing_format="raw")

    [create], [resize] = host.run("create"), host.run("resize")
    assert create.argv[-1] == str(first_size)
    assert resize.argv[-1] == str(SIZE)
    assert resize.is_over_zeros


@pytest.mark.parametrize("base", [SIZE, SIZE - 1, SIZE - CLUSTER + 1, 2 * SIZE])
def test_overlay_no_longer_than_its_base_is_not_grown(host: Host, base: int) -> None:
    image = in_format.qcow2(overlay_subclusters="allocated").create(
        host.path(), SIZE, host.base(base), backing_format="raw"
    )

    assert host.run("resize") == []
    assert host.run("create")[0].argv[-1] == str(SIZE)
    assert image.virtual_size == SIZE


def test_qcow2_base_counts_by_its_virtual_size(host: Host) -> None:
    base = host.qcow2(4 * CLUSTER, name="base", mapped=0.5)

    in_format.qcow2(overlay_subclusters="allocated").create(host.path(), SIZE, base, backing_format="qcow2")

    assert host.run("create")[0].argv[-1] == str(4 * CLUSTER)
    assert host.run("info")[0].after("-f") == "qcow2"


def test_base_in_another_format_is_asked_in_that_format(host: Host) -> None:
    base = host.base(SIZE // 2)
    host.disk(base).format = "vmdk"

    in_format.qcow2(overlay_subclusters="allocated").create(host.path(), SIZE, base, backing_format="vmdk")

    assert [call.after("-f") for call in host.run("info") if call.argv[-1] == base] == ["vmdk"]


def test_raw_base_is_not_opened_to_learn_its_size(host: Host) -> None:
    base = host.base(4 * CLUSTER)

    in_format.qcow2(overlay_subclusters="allocated").create(host.path(), SIZE, base, backing_format="raw")

    assert base not in [call.argv[-1] for call in host.run("info")]


def test_base_in_the_last_partial_sector_counts(host: Host) -> None:
    base = host.base(CLUSTER * 4 + 5)

    in_format.qcow2(overlay_subclusters="allocated").create(host.path(), SIZE, base, backing_format="raw")

    assert host.run("create")[0].argv[-1] == str(5 * CLUSTER)


def test_relative_backing_file_is_looked_for_beside_the_overlay(host: Host) -> None:
    host.base(4 * CLUSTER)

    image = in_format.qcow2(overlay_subclusters="allocated").create(host.path(), SIZE, "base", backing_format="raw")

    assert image.backing_file == "base"
    assert host.run("create")[0].argv[-1] == str(4 * CLUSTER)


def test_overlay_that_is_not_in_its_place_yet_is_grown_without_flushes(host: Host) -> None:
    in_format.qcow2(overlay_subclusters="allocated").preallocate(host.overlay())

    assert "cache.no-flush=on" in host.run("resize")[0].argv[-2]


def test_zeros_are_gone_afterwards(host: Host) -> None:
    in_format.qcow2(overlay_subclusters="allocated").preallocate(host.overlay())

    assert host.files == ["base", "disk"]


def test_disk_without_a_backing_file_is_made_in_one_go(host: Host) -> None:
    in_format.qcow2().create(host.path(), SIZE)

    assert host.run("create")[0].argv[-1] == str(SIZE)
    assert host.run("resize") == []


@pytest.mark.parametrize(
    ("mode", "subclusters"), [("metadata", "allocated"), ("falloc", "unallocated"), ("full", "unallocated")]
)
def test_nothing_is_hidden_where_nothing_is_to_be_allocated(
    host: Host, mode: Mode, subclusters: OverlaySubclusters
) -> None:
    strategy = in_format.qcow2(mode, overlay_subclusters=subclusters)

    strategy.create(host.path(), SIZE, host.base(4 * CLUSTER + 512), backing_format="raw")

    assert not any(call.is_over_zeros for call in host.run("resize"))


# create


def test_holes_that_falloc_leaves_in_its_metadata_are_closed(host: Host) -> None:
    image = in_format.qcow2().create(host.path(), SIZE)

    assert host.changes == ["create", "fallocate", "sync"]
    assert image.state == "preallocated"


def test_backing_file_s_format_is_not_guessed(host: Host) -> None:
    # A user's raw image may begin like qcow2, over a file of the host's.
    base = host.qcow2(name="base")

    with pytest.raises(exceptions.FormatNotCertain, match="--backing-format"):
        in_format.qcow2().create(host.path(), SIZE, base)

    assert host.run("info", "create") == []
    assert host.files == ["base"]


def test_backing_file_that_is_not_there_is_named_and_nothing_is_made(host: Host) -> None:
    with pytest.raises(exceptions.BackingFileUnusable, match=host.path("none")):
        in_format.qcow2().create(host.path(), SIZE, host.path("none"), backing_format="raw")

    assert host.files == []


# Where QEMU is too old.


def test_old_qemu_refuses_to_create_an_overlay(host: Host) -> None:
    host.version = "5.1.0"

    with pytest.raises(exceptions.QemuImgTooOld, match=r"5\.2"):
        in_format.qcow2().create(host.path(), SIZE, host.base(SIZE), backing_format="raw")

    assert host.changes == []
    assert host.files == ["base"]


def test_old_qemu_still_creates_disks_without_a_backing_file(host: Host) -> None:
    host.version = "4.2.1"

    assert in_format.qcow2().create(host.path(), SIZE).state == "preallocated"


@pytest.mark.parametrize("existing", ["recreate_blank", "rewrite"])
@pytest.mark.parametrize("mapped", [None, 0.5])
def test_old_qemu_only_reserves_an_overlay_s_space(
    host: Host, logged: Callable[[int], list[str]], mapped: float | None, existing: Existing
) -> None:
    host.version = "5.1.0"
    path = host.overlay(mapped=mapped)

    for _ in range(3):
        image = in_format.qcow2().preallocate(path, existing)

    assert (host.changes, image.state) == (["fallocate"], "reserved")
    warnings = logged(logging.WARNING)
    assert len(warnings) == (1 if mapped is None or existing == "rewrite" else 0)
    assert all(path in line and "5.2" in line for line in warnings)


def test_old_qemu_still_recreates_a_disk_without_a_backing_file(host: Host) -> None:
    host.version = "4.2.1"

    assert in_format.qcow2().preallocate(host.qcow2()).state == "preallocated"
    assert "create" in host.changes


# What must not be replaced.


@pytest.mark.parametrize(
    ("disk", "reason"),
    [
        ({"mapped": 0.5, "snapshots": 1}, "qemu-img snapshot -d"),
        ({"mapped": 0.5, "bitmaps": 1}, "qemu-img bitmap --remove"),
        ({"mapped": 0.5, "backing_file": "base"}, "backing file's format"),
        ({"mapped": None, "backing_file": "base"}, "backing file's format"),
    ],
)
def test_what_a_copy_would_lose_keeps_a_disk_from_being_replaced(
    host: Host, logged: Callable[[int], list[str]], disk: dict[str, Any], reason: str
) -> None:
    host.base(SIZE)
    path = host.qcow2(SIZE, **disk)

    image = in_format.qcow2().preallocate(path, existing="rewrite")

    assert (host.changes, image.state) == (["fallocate"], "reserved")
    [warning] = logged(logging.WARNING)
    assert reason in warning
    assert path in warning


@pytest.mark.parametrize("more", [{"snapshots": 1}, {"bitmaps": 1}])
def test_disk_without_clusters_but_with_more_to_it_is_not_made_anew(host: Host, more: dict[str, Any]) -> None:
    path = host.qcow2(SIZE, **more)

    assert in_format.qcow2().preallocate(path).state == "reserved"
    assert host.changes == ["fallocate"]


@pytest.mark.parametrize("mapped", [None, 0.5])
@pytest.mark.parametrize("beyond", [65536, 0, -1000])
def test_disk_is_not_replaced_under_a_guessed_format(host: Host, mapped: float | None, beyond: int) -> None:
    # A guest can write a qcow2 header to its raw disk (CVE-2024-32498), and let it end where it likes.
    path = with_its_end(host, beyond, mapped=mapped)
    before = host.content(path)

    with pytest.raises(exceptions.FormatNotCertain, match="--disk-format raw"):
        Preallocator().preallocate(path, existing="rewrite")

    assert host.changes == []
    assert host.content(path) == before


@pytest.mark.parametrize("beyond", [65536, 0, -1000])
def test_disk_without_anything_in_it_is_only_reserved_under_a_guessed_format(
    host: Host, logged: Callable[[int], list[str]], beyond: int
) -> None:
    path = with_its_end(host, beyond)
    before = host.content(path)

    for _ in range(2):
        assert Preallocator().preallocate(path).state == "reserved"

    assert host.changes == ["fallocate"]
    assert host.content(path) == before
    if beyond <= 0:
        [warning] = logged(logging.WARNING)
        assert "--disk-format" in warning


@pytest.mark.parametrize("existing", ["recreate_blank", "rewrite"])
def test_file_that_the_caller_says_is_qcow2_is_one_whatever_stands_behind_it(host: Host, existing: Existing) -> None:
    path = with_its_end(host, 65536, mapped=0.5)

    in_format.qcow2().preallocate(path, existing)

    assert bool(host.run("convert")) == (existing == "rewrite")


def with_its_end(host: Host, beyond: int, **disk: Any) -> str:
    """Lay down a disk whose file goes on for some bytes beyond its image's end, or ends before it."""
    path = host.qcow2(SIZE, **disk)
    end = os.path.getsize(path)
    os.truncate(path, end + max(beyond, 0))
    host.amend["check"] = lambda answer: answer.update({"image-end-offset": end + min(beyond, 0)})
    return path


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"encrypted": True}, exceptions.UnsupportedFormat),
        ({"data_file": True}, exceptions.UnsupportedFormat),
        ({"corrupt": True}, exceptions.BrokenImage),
    ],
)
@pytest.mark.parametrize("mapped", [None, 0.5, 1.0])
@pytest.mark.parametrize("verb", ["preallocate", "resize"])
def test_disk_that_cannot_be_understood_is_left_alone(
    host: Host, more: dict[str, Any], error: type[Exception], mapped: float | None, verb: str
) -> None:
    path = host.qcow2(SIZE, mapped=mapped, **more)

    with pytest.raises(error):
        getattr(in_format.qcow2(), verb)(path, *([2 * SIZE] if verb == "resize" else []))

    assert host.changes == []


@pytest.mark.parametrize("link", ["symbolic", "hard"])
@pytest.mark.parametrize("mapped", [None, 0.5])
def test_link_is_not_replaced(host: Host, link: str, mapped: float | None) -> None:
    target = host.qcow2(SIZE, name="elsewhere", mapped=mapped)
    (os.symlink if link == "symbolic" else os.link)(target, host.path())

    with pytest.raises(exceptions.DiskIsLink, match="link"):
        in_format.qcow2().preallocate(host.path(), existing="rewrite")

    assert host.changes == []
    assert host.files == ["disk", "elsewhere"]


# Copy on write.


@pytest.mark.parametrize("mapped", [1.0, 0.5])
def test_on_btrfs_a_disk_that_copies_on_write_is_refused(host: Host, mapped: float) -> None:
    host.filesystem = BTRFS

    with pytest.raises(exceptions.UnsupportedFilesystem, match="copy on write"):
        in_format.qcow2().preallocate(host.qcow2(SIZE, mapped=mapped))

    assert host.changes == []


@pytest.mark.parametrize("mapped", [None, 1.0, 0.5])
def test_on_btrfs_a_disk_that_may_be_rewritten_is_made_anew_with_nocow(host: Host, mapped: float | None) -> None:
    host.filesystem = BTRFS

    image = in_format.qcow2().preallocate(host.overlay(SIZE, mapped=mapped), existing="rewrite")

    [call] = host.run("create", "convert")
    assert call.options["nocow"] == "on"
    assert image.state == "preallocated"


def test_on_btrfs_mode_metadata_asks_for_no_more_than_the_map(host: Host) -> None:
    host.filesystem = BTRFS

    assert in_format.qcow2("metadata").preallocate(host.qcow2(mapped=1.0)).state == "mapped"
    assert host.changes == []


@pytest.mark.parametrize("existing", ["recreate_blank", "rewrite"])
@pytest.mark.parametrize(("mapped", "fallback"), [(1.0, "metadata"), (1.0, "full"), (0.5, "metadata"), (0.5, "full")])
def test_on_zfs_no_space_is_set_aside(host: Host, mapped: float, fallback: str, existing: Existing) -> None:
    host.filesystem = ZFS

    image = in_format.qcow2(on_unsupported=fallback).preallocate(host.qcow2(mapped=mapped), existing)

    # And a disk that is mapped is not copied for nothing.
    assert bool(host.run("convert")) == (mapped == 0.5 and existing == "rewrite")
    assert image.state == ("mapped" if mapped == 1.0 or existing == "rewrite" else "thin")


# Without fallocate.


@pytest.mark.parametrize(
    ("mapped", "changes", "state"),
    [(None, ["create", "sync"], "mapped"), (0.5, [], "thin"), (1.0, [], "preallocated")],
)
def test_fallback_metadata_maps_what_can_be_mapped(
    host: Host, mapped: float | None, changes: list[str], state: str
) -> None:
    host.filesystem = NFS

    image = in_format.qcow2().preallocate(host.qcow2(mapped=mapped))

    assert (host.changes, image.state) == (changes, state)


def test_fallback_full_fills_the_holes_of_a_mapped_disk_with_zeros(host: Host) -> None:
    host.filesystem = NFS

    image = in_format.qcow2(on_unsupported="full").preallocate(host.qcow2(mapped=1.0, held=0))

    assert set(host.changes) == {"zeros"}
    assert image.state == "preallocated"


def test_no_zeros_are_written_to_a_mapped_disk_in_use(host: Host, opened: Callable[[str], object]) -> None:
    host.filesystem = NFS
    path = host.qcow2(mapped=1.0, held=0)
    opened(path)

    with pytest.raises(exceptions.ImageInUse):
        in_format.qcow2("full").preallocate(path)

    assert host.changes == []


# resize


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_disk_without_a_backing_file_grows_plainly(host: Host, mode: Mode) -> None:
    image = in_format.qcow2(mode).resize(host.qcow2(mapped=1.0), 2 * SIZE)

    [call] = host.run("resize")
    assert call.after("-f") == "qcow2"
    assert f"--preallocation={mode}" in call.argv
    assert (image.virtual_size, image.state) == (2 * SIZE, "preallocated")


def subclustered(host: Host, size: int, **more: Any) -> str:
    return host.overlay(
        size, **{"mapped": 1.0, "extended_l2": True, "cluster_size": CLUSTER, "allocated": True, **more}
    )


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_overlay_grows_under_zeros(host: Host, mode: Mode) -> None:
    image = in_format.qcow2(mode).resize(subclustered(host, SIZE), 2 * SIZE)

    [call] = host.run("resize")
    assert call.is_over_zeros
    assert f"--preallocation={mode}" in call.argv
    assert (image.virtual_size, image.backing_file, image.state) == (2 * SIZE, host.path("base"), "preallocated")
    assert host.files == ["base", "disk"]


@pytest.mark.parametrize("subclusters", ["unallocated", "allocated", "copied"])
def test_overlay_without_allocated_subclusters_grows_without_them(host: Host, subclusters: OverlaySubclusters) -> None:
    path = subclustered(host, SIZE, allocated=False)

    in_format.qcow2(overlay_subclusters=subclusters).resize(path, 2 * SIZE)

    [call] = host.run("resize")
    assert not call.is_over_zeros
    assert "--preallocation=falloc" in call.argv


def test_overlay_in_its_place_is_grown_with_flushes(host: Host) -> None:
    in_format.qcow2().resize(subclustered(host, SIZE), 2 * SIZE)

    assert "no-flush" not in host.run("resize")[0].argv[-2]


def test_overlay_that_ends_within_a_cluster_grows_in_one_step_over_what_that_cluster_shows(host: Host) -> None:
    # Under zeros alone, it would no longer show the base; in two steps, a kill could leave a size between the two.
    size = SIZE - CLUSTER + 512

    in_format.qcow2().resize(subclustered(host, size), 2 * SIZE)

    [copied], [grown] = host.run("convert"), host.run("resize")
    shown = csv(copied.argv[-1])
    assert (shown["offset"], shown["size"]) == (str(SIZE - CLUSTER), "512")
    assert (grown.argv[-1], grown.is_over_zeros) == (str(2 * SIZE), True)


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_last_cluster_that_may_be_compressed_is_written_anew_before_a_growth(host: Host, mode: Mode) -> None:
    # QEMU would move it, and leave the marks of its subclusters as they are: none.
    path = subclustered(host, SIZE - CLUSTER + 512, compressed=1, allocated=False)

    in_format.qcow2(mode).resize(path, 2 * SIZE)

    copied, written = host.run("convert")[:2]
    assert [csv(image)["size"] for image in copied.argv[-2:] + written.argv[-2:]] == ["512"] * 4
    assert csv(written.argv[-1])["file.driver"] == "qcow2"
    assert written.after("-t") == "writethrough"
    assert host.changes.index("convert") < host.changes.index("resize")
    assert host.files == ["base", "disk"]


@pytest.mark.parametrize(
    ("size", "more"),
    [(SIZE, {"compressed": 1}), (SIZE - 512, {}), (SIZE - 512, {"compressed": 1, "extended_l2": False})],
    ids=["it ends with its last cluster", "nothing is compressed", "it has no subclusters"],
)
def test_last_cluster_that_qemu_does_not_lose_is_not_written_anew(host: Host, size: int, more: dict[str, Any]) -> None:
    in_format.qcow2("metadata").resize(subclustered(host, size, **{"allocated": False, **more}), 2 * SIZE)

    assert [call for call in host.run("convert") if csv(call.argv[-1])["file.driver"] == "qcow2"] == []


def test_growth_whose_last_cluster_cannot_be_written_anew_leaves_the_disk_as_it_was(host: Host) -> None:
    path = subclustered(host, SIZE - CLUSTER + 512, compressed=1, allocated=False)
    host.ends("convert", 1, f"qemu-img: {ENOSPC}")

    with pytest.raises(exceptions.NoSpace):
        in_format.qcow2().resize(path, 2 * SIZE)

    assert host.files == ["base", "disk"]
    assert host.run("resize") == []


@pytest.mark.parametrize("size", [SIZE - CLUSTER + 1024, SIZE])
def test_overlay_that_grows_within_its_last_cluster_needs_no_zeros(host: Host, size: int) -> None:
    in_format.qcow2().resize(subclustered(host, SIZE - CLUSTER + 512), size)

    [call] = host.run("resize")
    assert not call.is_over_zeros


def test_in_mode_metadata_every_disk_grows_under_zeros(host: Host) -> None:
    # QEMU maps freed clusters again, and shows what was in them.
    for number, path in enumerate((subclustered(host, SIZE), host.qcow2(name="other", mapped=1.0))):
        image = in_format.qcow2("metadata").resize(path, 2 * SIZE)

        assert host.run("resize")[number].is_over_zeros
        assert image.mapped


def test_in_mode_metadata_a_disk_that_cannot_mark_zeros_grows_thin_with_a_warning(
    host: Host, logged: Callable[[int], list[str]]
) -> None:
    path = host.qcow2(mapped=1.0)
    with open(path, "r+b") as file:
        file.seek(4)
        file.write((2).to_bytes(4, "big"))

    image = in_format.qcow2("metadata").resize(path, 2 * SIZE)

    [call] = host.run("resize")
    assert "--preallocation=off" in call.argv
    assert image.state == "thin"
    assert len(logged(logging.WARNING)) == 1


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_growth_whose_stand_in_cannot_be_written_leaves_the_disk_as_it_was(host: Host, mode: Mode) -> None:
    path = subclustered(host, SIZE - CLUSTER + 512)
    host.ends("convert", 1, f"qemu-img: {ENOSPC}")

    with pytest.raises(exceptions.NoSpace):
        in_format.qcow2(mode).resize(path, 2 * SIZE)

    assert host.files == ["base", "disk"]
    assert host.run("resize") == []


def test_growth_that_ends_in_between_says_how_large_the_disk_is_and_the_next_one_goes_on(host: Host) -> None:
    path = host.qcow2(mapped=1.0)
    grow = host.answers["resize"]

    def limited(call: Call) -> str:
        grow(dataclasses.replace(call, argv=(*call.argv[:-1], str(SIZE + CLUSTER))))
        raise failure(call, 1, ENOSPC)

    host.answers["resize"] = limited

    told = rf"It has .*\({SIZE + CLUSTER} bytes\) now of .*\({2 * SIZE} bytes\).*give the command again"
    with pytest.raises(exceptions.NoSpace, match=told):
        in_format.qcow2().resize(path, 2 * SIZE)

    host.answers["resize"] = grow
    assert in_format.qcow2().resize(path, 2 * SIZE).virtual_size == 2 * SIZE


def test_zeros_are_there_before_the_first_step_so_that_their_lack_leaves_the_disk_as_it_was(host: Host) -> None:
    path = subclustered(host, SIZE - CLUSTER + 512)

    real = os.truncate

    def full(target: int | str, length: int) -> None:
        if isinstance(target, int) and os.readlink(f"/proc/self/fd/{target}").endswith("-zeros"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "zeros")
        real(target, length)

    with fixtures.MockPatchObject(os, "truncate", full), pytest.raises(exceptions.NoSpace):
        in_format.qcow2().resize(path, 2 * SIZE)

    assert host.run("resize") == []


def test_growth_whose_file_cannot_be_filled_says_that_the_disk_has_its_size_and_what_does_the_rest(host: Host) -> None:
    path = host.qcow2(mapped=1.0)

    def with_a_hole() -> None:
        host.disk().held -= 4096

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    host.then["resize"] = with_a_hole

    told = rf"It has the 32 MiB \({2 * SIZE} bytes\) that it was to have.* allocate does"
    with fixtures.MockPatchObject(fallocate, "reserve", full), pytest.raises(exceptions.NoSpace, match=told):
        in_format.qcow2().resize(path, 2 * SIZE)

    assert in_format.qcow2().preallocate(path, "reserve").state == "preallocated"


def test_growth_that_is_given_again_when_it_was_done_removes_what_a_kill_has_left(host: Host) -> None:
    path = host.qcow2(mapped=1.0)
    with open(host.path(".disk.imgprealloc-zeros"), "wb") as left:
        os.fchmod(left.fileno(), 0o1600)

    with pytest.raises(exceptions.InvalidSize, match="imgprealloc allocate"):
        in_format.qcow2().resize(path, SIZE)

    assert host.files == ["disk"]


def with_stray_bytes(host: Host) -> tuple[str, int]:
    """Lay down a disk whose file goes on after its image, as a growth that was cut short leaves it."""
    path = host.qcow2(SIZE, mapped=0.5)
    end = os.path.getsize(path)
    os.truncate(path, end + units.Mi)
    host.amend["check"] = lambda answer: answer.update({"image-end-offset": end})
    host.then["resize"] = host.amend.clear
    return path, end


def test_what_a_growth_that_was_cut_short_has_left_is_cut_off_first(host: Host) -> None:
    path, end = with_stray_bytes(host)
    lengths: list[int] = []
    grow = host.answers["resize"]

    def watched(call: Call) -> str:
        lengths.append(os.path.getsize(path))
        return grow(call)

    host.answers["resize"] = watched

    in_format.qcow2().resize(path, 2 * SIZE)

    assert lengths == [end]


def test_no_guest_may_write_while_something_is_cut_off(host: Host) -> None:
    path, _ = with_stray_bytes(host)
    locks: list[int] = []
    real = os.truncate

    def watched(target: int | str, length: int) -> None:
        if isinstance(target, int) and os.path.samestat(os.fstat(target), os.stat(path)) and not locks:
            with open(path, "rb") as guest:
                # 201: "nobody else may write".
                locks.append(standing_lock(guest.fileno(), 201))
        real(target, length)

    with fixtures.MockPatchObject(os, "truncate", watched):
        in_format.qcow2().resize(path, 2 * SIZE)

    assert locks == [fcntl.F_RDLCK]


def test_nothing_is_cut_off_a_disk_written_to_since_it_was_read(host: Host) -> None:
    path, end = with_stray_bytes(host)
    host.then["check"] = lambda: os.utime(path)

    with pytest.raises(exceptions.ImageInUse):
        in_format.qcow2().resize(path, 2 * SIZE)

    assert host.changes == []
    assert os.path.getsize(path) == end + units.Mi


def test_disk_is_not_grown_under_a_guessed_format(host: Host) -> None:
    path, end = with_stray_bytes(host)

    with pytest.raises(exceptions.FormatNotCertain, match="--disk-format raw"):
        Preallocator().resize(path, 2 * SIZE)

    assert host.changes == []
    assert os.path.getsize(path) == end + units.Mi


def test_reserved_disk_is_reserved_again_when_it_has_grown(host: Host) -> None:
    path = host.qcow2(mapped=0.5)
    in_format.qcow2().preallocate(path)

    image = in_format.qcow2().resize(path, 2 * SIZE)

    assert (image.state, image.virtual_size) == ("reserved", 2 * SIZE)


@pytest.mark.parametrize(("mapped", "held", "state"), [(0.5, None, "thin"), (1.0, 0, "mapped")])
def test_growing_does_not_make_more_of_a_disk_than_it_was(
    host: Host, mapped: float, held: int | None, state: str
) -> None:
    path = host.qcow2(mapped=mapped, held=held)
    host.then["fallocate"] = lambda: setattr(host.disk(path), "held", 0)

    assert in_format.qcow2().resize(path, 2 * SIZE).state == state


def test_preallocated_disk_that_is_less_when_it_has_grown_is_an_error(host: Host) -> None:
    path = host.qcow2(mapped=1.0)
    host.then["resize"] = lambda: setattr(host.disk(path), "shared", 4096)

    with pytest.raises(exceptions.NotPreallocated):
        in_format.qcow2().resize(path, 2 * SIZE)


# Space.


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize(
    ("work", "needed"),
    [
        pytest.param(lambda p, host: p.create(host.path("new"), SIZE), SIZE, id="create"),
        pytest.param(lambda p, host: p.preallocate(host.overlay()), SIZE, id="blank"),
        pytest.param(
            lambda p, host: p.preallocate(host.overlay(mapped=0.5), existing="rewrite"), SIZE // 2, id="rewrite"
        ),
        pytest.param(lambda p, host: p.preallocate(host.overlay(mapped=0.5)), SIZE // 2, id="reserve"),
        pytest.param(lambda p, host: p.preallocate(host.qcow2(mapped=1.0, held=0)), SIZE, id="mapped"),
        pytest.param(lambda p, host: p.resize(host.qcow2(mapped=1.0), 2 * SIZE), SIZE, id="resize"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_runs(
    host: Host, work: Callable[[InFormat, Host], object], needed: int, mode: Mode
) -> None:
    host.available = needed - 1

    with pytest.raises(exceptions.NoSpace):
        work(in_format.qcow2(mode), host)

    assert host.changes == []
    assert not {"new", ".disk.imgprealloc", ".disk.imgprealloc-zeros"} & set(host.files)


def test_disk_without_room_for_its_copy_is_reserved_with_a_warning(
    host: Host, logged: Callable[[int], list[str]]
) -> None:
    host.available = SIZE - 1

    image = in_format.qcow2().preallocate(host.overlay(mapped=0.5), existing="rewrite")

    assert image.state == "reserved"
    assert len(logged(logging.WARNING)) == 1


@pytest.mark.parametrize("existing", ["recreate_blank", "rewrite"])
def test_blank_disk_whose_space_is_held_asks_for_no_more_on_a_full_filesystem(host: Host, existing: Existing) -> None:
    # As stock Nova leaves a swap disk that is never used: its instance has to start.
    path = host.overlay(SIZE, held=2 * SIZE)
    with open(path, "r+b") as disk, contextlib.suppress(OSError):
        # FALLOC_FL_KEEP_SIZE
        fallocate._fallocate(disk.fileno(), 1, 0, 2 * SIZE)
    if os.stat(path).st_blocks * 512 < 2 * SIZE:
        pytest.skip("this filesystem holds no space past the end of a file")
    host.available = 0

    assert in_format.qcow2().preallocate(path, existing).state == "reserved"
    assert host.changes == []


@pytest.mark.parametrize("mapped", [None, 0.5])
def test_mode_metadata_asks_for_no_space(host: Host, mapped: float | None) -> None:
    host.available = 0

    assert in_format.qcow2("metadata").preallocate(host.overlay(mapped=mapped), existing="rewrite").mapped


@pytest.mark.parametrize(
    ("subclusters", "program"),
    [
        ("unallocated", "create"),
        ("unallocated", "fallocate"),
        ("unallocated", "convert"),
        ("allocated", "create"),
        ("allocated", "resize"),
        ("allocated", "convert"),
        ("copied", "convert"),
        ("copied", "resize"),
    ],
)
def test_space_that_runs_out_half_way_leaves_the_old_disk_and_nothing_beside_it(
    host: Host, program: str, subclusters: OverlaySubclusters
) -> None:
    path = host.overlay(mapped=0.5 if program == "convert" else None)
    with open(path, "rb") as disk:
        before = (os.stat(path).st_ino, disk.read())
    host.ends(program, 1, f"{program}: {ENOSPC}")

    with pytest.raises(exceptions.NoSpace):
        in_format.qcow2(overlay_subclusters=subclusters).preallocate(path, existing="rewrite")

    with open(path, "rb") as disk:
        assert (os.stat(path).st_ino, disk.read()) == before
    assert host.files == ["base", "disk"]


# Others at work on it.


@pytest.mark.parametrize("mapped", [None, 0.5])
def test_disk_in_use_is_not_replaced(host: Host, opened: Callable[[str], object], mapped: float | None) -> None:
    path = host.overlay(mapped=mapped)
    opened(path)

    with pytest.raises(exceptions.ImageInUse):
        in_format.qcow2().preallocate(path, existing="rewrite")

    assert host.changes == []
    assert host.files == ["base", "disk"]


@pytest.mark.parametrize(("mapped", "state"), [(1.0, "preallocated"), (0.5, "reserved")])
def test_disk_in_use_gets_its_space(host: Host, opened: Callable[[str], object], mapped: float, state: str) -> None:
    path = host.qcow2(mapped=mapped, held=0)
    opened(path)

    assert in_format.qcow2().preallocate(path).state == state


def test_blank_disk_that_another_host_s_guest_may_have_stays_the_same_file(host: Host) -> None:
    # As a swap disk that its guest has not come to yet, on NFS that is mounted with nolock.
    path = host.overlay()
    inode = os.stat(path).st_ino

    with fixtures.MockPatchObject(lock, "may_be_used_unseen", lambda fd: True):
        plan = Preallocator().plan(path, format="qcow2")
        image = in_format.qcow2().preallocate(path)

    assert (plan.treatment, plan.state) == ("reserve", "reserved")
    assert (image.state, os.stat(path).st_ino) == ("reserved", inode)


@pytest.mark.parametrize("existing", ["rewrite", "just_made"])
def test_blank_disk_is_made_anew_there_where_the_caller_answers_for_it(host: Host, existing: Existing) -> None:
    path = host.overlay()

    with fixtures.MockPatchObject(lock, "may_be_used_unseen", lambda fd: True):
        assert in_format.qcow2().preallocate(path, existing).state == "preallocated"


@pytest.mark.parametrize(("mapped", "reader"), [(None, "--version"), (0.5, "check")])
def test_disk_written_to_since_it_was_read_is_not_replaced(host: Host, mapped: float | None, reader: str) -> None:
    path = host.overlay(mapped=mapped)
    host.then[reader] = lambda: os.utime(path)

    with pytest.raises(exceptions.ImageInUse, match="written to"):
        in_format.qcow2().preallocate(path, existing="rewrite")

    assert host.changes == []
    assert host.files == ["base", "disk"]


def test_raw_disk_is_not_taken_for_qcow2(host: Host) -> None:
    path = host.raw()

    with pytest.raises(exceptions.FormatMismatch):
        in_format.qcow2().preallocate(path)

    assert host.changes == []
    assert in_format.raw().preallocate(path).state == "preallocated"


def test_no_room_for_a_small_hole_is_no_space_too(host: Host) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_once = fixtures.MockPatchObject(fallocate, "AT_ONCE", units.Mi)
    filled = fixtures.MockPatchObject(fallocate, "_fallocate", full)
    with at_once, filled, pytest.raises(exceptions.NoSpace) as caught:
        in_format.qcow2().create(host.path(), SIZE)

    assert (caught.value.path, caught.value.stderr) == (host.path(), os.strerror(errno.ENOSPC))
    assert host.files == []


# Damaged, and so not empty.


@pytest.mark.parametrize("existing", ["recreate_blank", "rewrite"])
def test_disk_whose_clusters_nothing_points_to_is_not_an_empty_one(
    host: Host, logged: Callable[[int], list[str]], existing: Existing
) -> None:
    # One wrong bit in the L1 table's offset: all data could be had back by mending it.
    path = host.qcow2(leaks=100)
    host.ends("check", 3)
    before = host.content(path)

    image = in_format.qcow2().preallocate(path, existing)

    assert (host.changes, image.state) == (["fallocate"], "reserved")
    assert host.content(path) == before
    if existing == "rewrite":
        [warning] = logged(logging.WARNING)
        assert "100 clusters of it are in use by nothing" in warning


@pytest.mark.parametrize("existing", ["reserve", "recreate_blank", "rewrite"])
@pytest.mark.parametrize("damage", [{"errors": 1}, {"corruptions": 1}])
def test_disk_that_does_not_pass_its_check_is_reported_and_not_made_anew(
    host: Host, existing: Existing, damage: dict[str, Any]
) -> None:
    path = host.qcow2(**damage)
    before = host.content(path)

    with pytest.raises(exceptions.BrokenImage, match="finds 1 errors"):
        in_format.qcow2().preallocate(path, existing)

    assert host.changes == []
    assert host.content(path) == before


def test_only_a_disk_that_was_just_made_is_taken_for_empty_by_its_header(host: Host) -> None:
    assert in_format.qcow2().preallocate(host.overlay(), "just_made").state == "preallocated"

    # Those of the new one, before it gets its place.
    assert [".disk.imgprealloc" in call.shown[-1] for call in host.run("check")] == [True]
    assert host.changes[0] == "create"


@pytest.mark.parametrize(
    ("mode", "existing", "synced"),
    [
        # As stock Nova leaves it.
        ("falloc", "just_made", 0),
        ("metadata", "just_made", 0),
        ("full", "just_made", 1),
        ("falloc", "recreate_blank", 1),
    ],
)
def test_disk_that_was_just_made_waits_for_the_storage_only_where_it_is_written(
    host: Host, mode: Mode, existing: Existing, synced: int
) -> None:
    in_format.qcow2(mode).preallocate(host.overlay(), existing)

    assert len(host.run("sync")) == synced


def test_disk_that_was_just_made_is_checked_where_a_glance_does_not_tell(host: Host) -> None:
    in_format.qcow2().preallocate(host.overlay(), "just_made")

    assert len(host.run("check")) == 1


def test_disk_that_was_just_made_and_has_data_is_rewritten(host: Host) -> None:
    assert in_format.qcow2().preallocate(host.overlay(mapped=0.5), "just_made").state == "preallocated"
    assert host.changes[0] == "convert"


@pytest.mark.parametrize("name", ["nbd://host/export", "json:{}", "fat:/etc"])
def test_backing_file_that_is_named_by_a_protocol_is_not_opened(host: Host, name: str) -> None:
    with pytest.raises(exceptions.UnsupportedFormat, match="named by a protocol"):
        in_format.qcow2().create(host.path(), SIZE, name, backing_format="raw")

    assert host.run("info", "create") == []


@pytest.mark.parametrize("mapped", [None, 0.5])
@pytest.mark.parametrize("existing", ["recreate_blank", "rewrite"])
def test_disk_over_a_pipe_is_not_waited_for(host: Host, mapped: float | None, existing: Existing) -> None:
    os.mkfifo(host.path("pipe"))
    path = host.qcow2(SIZE, mapped=mapped, backing_file="pipe", backing_format="raw")
    before = host.content(path)

    if mapped is None or existing == "rewrite":
        with pytest.raises(exceptions.BackingFileUnusable, match="neither a file nor a block device"):
            in_format.qcow2().preallocate(path, existing)
    else:
        in_format.qcow2().preallocate(path, existing)

    assert not host.run("create", "convert", "resize")
    assert host.content(path) == before
    assert host.files == ["disk", "pipe"]


def test_overlay_over_a_relative_base_is_grown_and_keeps_that_name(host: Host) -> None:
    # In its folder, which its name in /proc does not tell.
    host.base(SIZE // 2)
    path = host.overlay(mapped=1.0, extended_l2=True, cluster_size=CLUSTER, backing_file="base")

    image = in_format.qcow2().resize(path, SIZE + 512)

    assert (image.virtual_size, image.backing_file) == (SIZE + 512, "base")


def test_growth_that_whoever_was_told_has_ended_is_recovered_as_one_that_failed(host: Host) -> None:
    path = host.qcow2(mapped=1.0)
    recovered: list[str] = []

    def ended() -> None:
        raise LookupError("enough")

    host.then["resize"] = ended
    with (
        fixtures.MockPatchObject(Qcow2, "recover", lambda self, file: recovered.append(file.path)),
        pytest.raises(LookupError, match="enough"),
    ):
        Preallocator().resize(path, 2 * SIZE, format="qcow2")

    assert recovered == [path]
