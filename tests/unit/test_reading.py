# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
import os
from typing import Any

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import qemu_img
from imgprealloc import reading
from imgprealloc.filesystem import Filesystem

from . import host as hosts
from . import qcow2_file
from .host import SIZE
from .host import Host
from .host import limited
from .in_format import guess
from .in_format import read_qcow2
from .in_format import read_raw


def dropping(*keys: str) -> Callable[[dict[str, Any]], None]:
    return putting(None, *keys, drop=True)


def putting(value: object, *keys: str, drop: bool = False) -> Callable[[dict[str, Any]], None]:
    def amend(answer: dict[str, Any]) -> None:
        for key in keys[:-1]:
            answer = answer[key]
        if drop:
            del answer[keys[-1]]
        else:
            answer[keys[-1]] = value

    return amend


# raw


def test_raw_disk_with_all_its_space_is_preallocated(host: Host) -> None:
    image = read_raw(host.raw(SIZE, held=SIZE))

    assert (image.virtual_size, image.file_size, image.state) == (SIZE, SIZE, "preallocated")


def test_raw_disk_with_a_hole_is_thin(host: Host) -> None:
    image = read_raw(host.raw(SIZE, held=SIZE - 4096))

    assert (image.state, image.shortfall) == ("thin", 4096)


def test_raw_disk_that_shares_space_is_thin(host: Host) -> None:
    image = read_raw(host.raw(SIZE, held=SIZE, shared=8192))

    assert (image.state, image.shared_bytes, image.shortfall) == ("thin", 8192, 8192)


def test_raw_disk_on_a_copy_on_write_filesystem_is_thin(host: Host) -> None:
    host.filesystem = Filesystem("btrfs", fallocate=True, copy_on_write=True)

    image = read_raw(host.raw(SIZE, held=SIZE))

    assert (image.state, image.shortfall) == ("thin", SIZE)


def test_space_past_the_end_of_a_raw_disk_is_not_its_own(host: Host) -> None:
    image = read_raw(host.raw(SIZE, held=2 * SIZE))

    assert image.held_size == SIZE


def test_last_sector_of_a_raw_disk_counts_in_full(host: Host) -> None:
    image = read_raw(host.raw(1000, held=1000))

    assert (image.virtual_size, image.file_size, image.shortfall) == (1024, 1000, 24)


def test_raw_disk_is_never_probed(host: Host) -> None:
    # A guest may have written a qcow2 header to it (CVE-2024-32498).
    read_raw(host.qcow2())

    assert host.calls == []


def test_raw_disk_has_no_clusters(host: Host) -> None:
    image = read_raw(host.raw())

    assert (image.clusters, image.mapped_clusters, image.fragmented_clusters) == (None, None, None)


# qcow2


def test_new_overlay_is_thin(host: Host) -> None:
    image = read_qcow2(host.overlay())

    assert (image.state, image.clusters, image.mapped_clusters) == ("thin", 256, 0)
    assert (image.backing_file, image.backing_format) == (host.path("base"), "raw")


def test_disk_with_every_cluster_mapped_and_held_is_preallocated(host: Host) -> None:
    image = read_qcow2(host.qcow2(mapped=1.0))

    assert (image.state, image.shortfall) == ("preallocated", 0)


def test_mapped_disk_grows_no_further_than_its_last_cluster(host: Host) -> None:
    path = host.qcow2(mapped=1.0)
    end = os.path.getsize(path)

    image = read_qcow2(path)

    assert image.worst_case_size == image.image_end == end


def test_mapped_disk_with_a_hole_is_mapped(host: Host) -> None:
    path = host.qcow2(mapped=1.0)
    host.disk().held -= 4096

    image = read_qcow2(path)

    assert (image.state, image.shortfall) == ("mapped", 4096)


def test_mapped_disk_that_shares_space_is_mapped(host: Host) -> None:
    path = host.qcow2(mapped=1.0)
    host.disk().shared = 4096

    assert read_qcow2(path).state == "mapped"


def test_file_longer_than_its_image_has_all_of_its_length_to_hold(host: Host) -> None:
    path = host.qcow2(mapped=1.0)
    host.amend["check"] = putting(units.Mi, "image-end-offset")

    assert read_qcow2(path).worst_case_size == os.path.getsize(path)


def test_disk_with_data_may_grow_by_what_is_unmapped_and_all_of_its_metadata(host: Host) -> None:
    image = read_qcow2(host.qcow2(SIZE, mapped=0.25))

    missing = SIZE - SIZE // 4
    # An L2 table, and a refcount block.
    assert image.worst_case_size == image.image_end + missing + 2 * 65536


def test_disk_with_room_for_its_worst_case_is_reserved(host: Host) -> None:
    path = host.qcow2(mapped=0.25)
    needed = read_qcow2(path).worst_case_size

    host.disk().held = needed
    assert read_qcow2(path).state == "reserved"
    host.disk().held = needed - 1
    assert read_qcow2(path).state == "thin"


def test_snapshot_lets_every_cluster_be_written_to_a_new_place(host: Host) -> None:
    image = read_qcow2(host.qcow2(SIZE, mapped=1.0, snapshots=1))

    assert image.snapshots == 1
    assert image.mapped is False
    assert image.worst_case_size >= image.image_end + SIZE


def test_wider_refcounts_take_more_room(host: Host) -> None:
    path = host.qcow2(units.Gi, mapped=0.5)
    narrow = read_qcow2(path).worst_case_size

    host.disk().refcount_bits = 64
    host.rewrite_header(path)

    assert read_qcow2(path).worst_case_size > narrow


def test_compressed_clusters_are_not_mapped_because_a_write_moves_them(host: Host) -> None:
    image = read_qcow2(host.qcow2(mapped=1.0, compressed=10))

    assert (image.compressed_clusters, image.mapped_clusters, image.mapped) == (10, 246, False)


def test_bitmaps_are_counted(host: Host) -> None:
    assert read_qcow2(host.qcow2(bitmaps=2)).bitmaps == 2


def test_bitmaps_that_are_out_of_date_are_none(host: Host) -> None:
    # As qemu-img info has it: whoever wrote to the disk last did not know of them.
    path = host.qcow2(bitmaps=2)
    qcow2_file.patch(path, qcow2_file.AUTOCLEAR_OFFSET, bytes(8))

    assert read_qcow2(path).bitmaps == 0


def test_look_at_a_disk_is_one_check(host: Host) -> None:
    read_qcow2(host.overlay(mapped=0.5))

    assert [call.name for call in host.calls] == ["check"]


@pytest.mark.parametrize(("size", "seen"), [(SIZE + 1, SIZE), (SIZE + 511, SIZE), (511, 0)])
def test_virtual_size_is_told_in_whole_sectors_as_qemu_has_it(host: Host, size: int, seen: int) -> None:
    path = host.qcow2(size)
    host.amend["check"] = lambda answer: answer.pop("total-clusters", None) if not seen else None

    assert read_qcow2(path).virtual_size == seen


@pytest.mark.parametrize(
    ("offset", "bits"), [(20, 8), (20, 22), (20, 2**32 - 1), (96, 7), (96, 2**32 - 1)], ids=lambda value: str(value)
)
def test_clusters_that_no_image_has_are_refused_and_take_no_memory(host: Host, offset: int, bits: int) -> None:
    path = host.qcow2()
    qcow2_file.patch(path, offset, bits.to_bytes(4, "big"))

    with pytest.raises(exceptions.BrokenImage, match=str(bits)) as caught:
        read_qcow2(path)

    assert caught.value.path == path
    assert host.calls == []


def test_what_qemu_does_not_open_is_refused_whatever_its_header_says(host: Host) -> None:
    path = host.qcow2(mapped=0.5)
    host.ends("check", 1, "qemu-img: Could not open 'disk': Image is too big")

    with pytest.raises(exceptions.CommandFailed, match="Image is too big") as caught:
        read_qcow2(path)

    assert caught.value.path == path


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("allocated-clusters", "mapped_clusters"),
        ("fragmented-clusters", "fragmented_clusters"),
        ("compressed-clusters", "compressed_clusters"),
    ],
)
def test_count_that_qemu_img_leaves_out_is_zero(host: Host, key: str, field: str) -> None:
    host.amend["check"] = lambda answer: answer.pop(key, None)

    assert getattr(read_qcow2(host.qcow2(mapped=1.0)), field) == 0


def test_disk_of_no_size_has_no_clusters(host: Host) -> None:
    # qemu-img leaves total-clusters out then, and only then.
    image = read_qcow2(host.qcow2(0))

    assert (image.clusters, image.mapped_clusters) == (0, 0)


def test_fragmented_clusters_are_counted(host: Host) -> None:
    host.amend["check"] = putting(200, "fragmented-clusters")

    assert read_qcow2(host.qcow2(mapped=1.0)).fragmented_clusters == 200


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("check", ("total-clusters",)),
        ("check", ("image-end-offset",)),
        ("check", ("check-errors",)),
    ],
    ids=lambda value: value if isinstance(value, str) else ".".join(value),
)
def test_answer_that_lacks_something_is_an_error_that_names_disk_and_key(
    host: Host, name: str, keys: tuple[str, ...]
) -> None:
    path = host.qcow2(mapped=0.5)
    host.amend[name] = dropping(*keys)

    with pytest.raises(exceptions.BrokenImage, match=keys[-1]) as caught:
        read_qcow2(path)

    assert caught.value.path == path


@pytest.mark.parametrize("wrong", [None, -1, "65536", 1.5, True, [], {}], ids=repr)
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("check", ("total-clusters",)),
        ("check", ("image-end-offset",)),
        ("check", ("check-errors",)),
    ],
    ids=lambda value: value if isinstance(value, str) else ".".join(value),
)
def test_number_that_is_none_is_an_error_and_never_zero(
    host: Host, name: str, keys: tuple[str, ...], wrong: object
) -> None:
    path = host.qcow2(mapped=0.5)
    host.amend[name] = putting(wrong, *keys)

    with pytest.raises(exceptions.BrokenImage, match=keys[-1]) as caught:
        read_qcow2(path)

    assert caught.value.path == path


@pytest.mark.parametrize("wrong", [None, -1, "3", 1.5, [], {}], ids=repr)
@pytest.mark.parametrize("key", ["allocated-clusters", "compressed-clusters", "fragmented-clusters", "corruptions"])
def test_count_that_may_be_left_out_still_has_to_be_one(host: Host, key: str, wrong: object) -> None:
    path = host.qcow2(mapped=0.5)
    host.amend["check"] = putting(wrong, key)

    with pytest.raises(exceptions.BrokenImage, match=key) as caught:
        read_qcow2(path)

    assert caught.value.path == path


def test_detection_without_a_result_is_an_error(host: Host) -> None:
    path = host.raw()
    host.amend["info"] = dropping("format")

    with pytest.raises(exceptions.BrokenImage, match="format"):
        guess(path)


def test_every_look_is_under_limits_in_the_format_that_was_named(host: Host) -> None:
    read_qcow2(host.qcow2(mapped=0.5))

    [look] = host.run("info", "check")
    assert (look.after("-f"), look.limits) == ("qcow2", limited(qemu_img.CHECK_LIMITS))
    assert all(call.kwargs["env_variables"]["LC_ALL"] == "C" for call in host.calls)


def test_reading_changes_nothing(host: Host) -> None:
    path = host.overlay(mapped=0.5)
    before = (host.files, os.stat(path).st_mtime_ns)

    read_qcow2(path)

    assert host.changes == []
    assert (host.files, os.stat(path).st_mtime_ns) == before


def test_name_that_starts_with_a_dash_or_a_protocol_is_given_as_what_is_open(host: Host) -> None:
    host.raw(name="-f")
    host.raw(name="nbd:localhost:10809")
    here = os.getcwd()
    os.chdir(host.folder)
    try:
        guess("-f")
        guess("nbd:localhost:10809")
    finally:
        os.chdir(here)

    assert [call.shown[-1] for call in host.calls] == [host.path("-f"), host.path("nbd:localhost:10809")]
    assert all(call.argv[-1].startswith(f"/proc/{os.getpid()}/fd/") for call in host.calls)


def test_path_stays_as_the_caller_named_it(host: Host) -> None:
    path = host.raw()
    roundabout = os.path.join(host.folder, "..", os.path.basename(host.folder), "disk")

    assert read_raw(roundabout).path == roundabout != path


# What is not read.


def test_file_that_is_not_there(host: Host) -> None:
    with pytest.raises(exceptions.DiskNotFound, match="no such file"):
        read_raw(host.path("none"))


@pytest.mark.parametrize("read", [read_raw, read_qcow2, guess])
def test_pipe_is_no_disk_and_is_not_waited_for(host: Host, read: Callable[[str], Any]) -> None:
    os.mkfifo(host.path())

    with pytest.raises(exceptions.DiskNotFound, match="not a regular file"):
        read(host.path())

    assert host.calls == []


@pytest.mark.parametrize("read", [read_raw, read_qcow2, guess])
def test_folder_is_no_disk_and_qemu_img_is_not_asked(host: Host, read: Callable[[str], Any]) -> None:
    with pytest.raises(exceptions.DiskNotFound, match="not a regular file"):
        read(host.folder)

    assert host.calls == []


def test_raw_file_is_not_handed_to_qemu_img_as_qcow2(host: Host) -> None:
    path = host.raw()

    with pytest.raises(exceptions.FormatMismatch, match="no qcow2 header"):
        read_qcow2(path)

    assert host.calls == []


@pytest.mark.parametrize("length", [0, 3])
def test_file_too_short_for_a_header_is_not_qcow2(host: Host, length: int) -> None:
    path = host.raw(length)

    with pytest.raises(exceptions.FormatMismatch):
        read_qcow2(path)


@pytest.mark.parametrize(
    ("more", "error", "reason"),
    [
        ({"data_file": True}, exceptions.UnsupportedFormat, "data-file"),
        ({"encrypted": True}, exceptions.UnsupportedFormat, "encrypted"),
        ({"corrupt": True}, exceptions.BrokenImage, "marked corrupt"),
        ({"errors": 1}, exceptions.BrokenImage, "finds 1 errors"),
        ({"corruptions": 2}, exceptions.BrokenImage, "finds 2 errors"),
    ],
)
def test_image_that_cannot_be_preallocated_is_refused(
    host: Host, more: dict[str, Any], error: type[Exception], reason: str
) -> None:
    path = host.qcow2(mapped=0.5, **more)

    with pytest.raises(error, match=reason):
        read_qcow2(path)


def test_leaked_clusters_are_no_fault(host: Host) -> None:
    path = host.qcow2(mapped=1.0, leaks=3)
    host.ends("check", 3)

    assert read_qcow2(path).state == "preallocated"


def test_faults_in_an_image_in_use_may_be_half_of_a_change(host: Host) -> None:
    path = host.qcow2(mapped=0.5, corruptions=1)

    with hosts.opened_by_qemu(path):
        image = read_qcow2(path)

    assert image.in_use is True


def test_mark_of_corruption_counts_also_while_in_use(host: Host) -> None:
    path = host.qcow2(mapped=0.5, corrupt=True)

    with hosts.opened_by_qemu(path), pytest.raises(exceptions.BrokenImage):
        read_qcow2(path)


def test_image_that_exhausts_its_limits_is_given_up(host: Host) -> None:
    path = host.qcow2(mapped=0.5)
    host.ends("check", -24)

    with pytest.raises(exceptions.ProgramKilled) as caught:
        read_qcow2(path)

    assert caught.value.path == path


@pytest.mark.parametrize("more", [{"encrypted": True}, {"corrupt": True}, {"data_file": True}])
def test_what_the_header_forbids_is_refused_before_qemu_opens_it(host: Host, more: dict[str, Any]) -> None:
    # qemu-img check fails on an encrypted image for want of the key.
    with pytest.raises(exceptions.PreallocationError):
        read_qcow2(host.qcow2(**more))

    assert host.calls == []


# Where the filesystem has no extent map.


def test_without_an_extent_map_the_blocks_count(host: Host) -> None:
    path = host.raw(SIZE)
    with open(path, "r+b") as disk:
        disk.write(b"x" * units.Mi)
        os.fdatasync(disk.fileno())

    with fixtures.MockPatchObject(fallocate, "extents", lambda path: None):
        image = read_raw(path)

    assert image.held_size == image.allocated_size
    assert units.Mi <= image.held_size < 2 * units.Mi


def test_without_an_extent_map_no_more_is_held_than_can_be_used(host: Host) -> None:
    path = host.raw(1)
    with open(path, "r+b") as disk:
        disk.write(b"x")
        os.fdatasync(disk.fileno())

    with fixtures.MockPatchObject(fallocate, "extents", lambda path: None):
        image = read_raw(path)

    assert (image.held_size, image.shortfall, image.shared_bytes) == (512, 0, 0)


# Backing files.


def test_size_of_a_backing_file_is_asked_in_its_format(host: Host) -> None:
    assert reading.virtual_size(host.path("overlay"), host.qcow2(SIZE), "qcow2") == SIZE
    assert host.calls[0].after("-f") == "qcow2"


def test_format_of_a_file_is_detected_under_limits(host: Host) -> None:
    assert guess(host.qcow2()) == "qcow2"
    assert guess(host.raw()) == "raw"
    assert [call.limits for call in host.calls] == [limited(qemu_img.LIMITS)]


@pytest.mark.parametrize(
    ("head", "format"),
    [
        (b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(504), "qcow2"),
        # QEMU would open the files that such headers name.
        (b"KDMV" + bytes(508), "vmdk"),
        (b"COWD" + bytes(508), "vmdk"),
        (b'# Disk DescriptorFile\n\nversion=1\nRW 1 FLAT "/etc/shadow" 0\n'.ljust(512), "vmdk"),
    ],
)
def test_what_leads_qemu_to_other_files_is_told_without_it(host: Host, head: bytes, format: str) -> None:
    path = host.raw()
    with open(path, "r+b") as disk:
        disk.write(head)

    assert guess(path) == format
    assert host.calls == []
