# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
import contextlib
import os
import struct
import tracemalloc
from typing import Any

from oslo_utils import units
import pytest

from imgprealloc import exceptions
from imgprealloc import qcow2_header

from . import qcow2_file


@pytest.fixture
def path(tmp_path: os.PathLike[str]) -> str:
    return os.path.join(tmp_path, "disk")


@pytest.mark.parametrize("version", [2, 3])
def test_new_image_holds_nothing(path: str, version: int) -> None:
    qcow2_file.write(path, 3 * units.Gi, version=version)

    blank = qcow2_header.blank(path)

    assert blank is not None
    assert (blank.virtual_size, blank.cluster_size) == (3 * units.Gi, 65536)
    assert (blank.backing_file, blank.backing_format) == (None, None)


@pytest.mark.parametrize("version", [2, 3])
def test_new_overlay_tells_its_backing_file_and_format(path: str, version: int) -> None:
    qcow2_file.write(path, version=version, backing_file="/var/lib/nova/_base/0a1b", backing_format="raw")

    blank = qcow2_header.blank(path)

    assert blank is not None
    assert (blank.backing_file, blank.backing_format) == ("/var/lib/nova/_base/0a1b", "raw")


def test_backing_file_without_a_format_has_none(path: str) -> None:
    qcow2_file.write(path, backing_file="base")

    blank = qcow2_header.blank(path)

    assert blank is not None
    assert (blank.backing_file, blank.backing_format) == ("base", None)


def test_backing_file_s_name_need_not_be_text(path: str) -> None:
    qcow2_file.write(path, backing_file=os.fsdecode(b"/base/\xff\xfe"), backing_format="raw")

    blank = qcow2_header.blank(path)

    assert blank is not None
    assert os.fsencode(blank.backing_file or "") == b"/base/\xff\xfe"


@pytest.mark.parametrize(("backing_file", "backing_format"), [("ba\0se", "raw"), ("base", "r\0w")])
def test_name_that_no_file_and_no_format_can_have_is_a_fault_and_not_blank(
    path: str, backing_file: str, backing_format: str
) -> None:
    # No program can be started with a NUL among its words.
    qcow2_file.write(path, backing_file=backing_file, backing_format=backing_format)

    assert qcow2_header.blank(path) is None


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 17, 21])
def test_cluster_size_is_read(path: str, cluster_bits: int) -> None:
    qcow2_file.write(path, units.Mi, cluster_bits=cluster_bits)

    blank = qcow2_header.blank(path)

    assert blank is not None
    assert blank.cluster_size == 1 << cluster_bits


def test_subclusters_alone_hold_nothing(path: str) -> None:
    qcow2_file.write(path, incompatible=qcow2_file.EXTENDED_L2)

    assert qcow2_header.blank(path) is not None


def test_lazy_refcounts_alone_hold_nothing(path: str) -> None:
    qcow2_file.write(path, compatible=1)

    assert qcow2_header.blank(path) is not None


@pytest.mark.parametrize("entry", [0, 1, 63])
def test_one_l2_table_is_enough_to_hold_something(path: str, entry: int) -> None:
    # It may stand for clusters that the guest has zeroed, which no qemu-img check counts.
    qcow2_file.write(path, 32 * units.Gi, l1_filled=entry)

    assert qcow2_header.blank(path) is None


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"snapshots": 1}, id="a snapshot"),
        pytest.param({"encryption": 1}, id="AES"),
        pytest.param({"encryption": 2}, id="LUKS"),
        pytest.param({"incompatible": qcow2_file.DIRTY}, id="dirty refcounts"),
        pytest.param({"incompatible": qcow2_file.CORRUPT}, id="marked corrupt"),
        pytest.param({"incompatible": qcow2_file.DATA_FILE}, id="an external data file"),
        pytest.param({"incompatible": qcow2_file.COMPRESSION_TYPE}, id="another compression"),
        pytest.param({"incompatible": 1 << 5}, id="a feature of the future"),
        pytest.param({"autoclear": qcow2_file.AUTOCLEAR_BITMAPS}, id="dirty bitmaps"),
        pytest.param({"version": 1}, id="version 1"),
        pytest.param({"version": 4}, id="version 4"),
        pytest.param({"magic": b"QFI\xfa"}, id="another magic"),
    ],
)
def test_image_with_more_to_it_is_not_blank(path: str, more: dict[str, Any]) -> None:
    qcow2_file.write(path, **more)

    assert qcow2_header.blank(path) is None


@pytest.mark.parametrize("cluster_bits", [8, 22, 64])
def test_cluster_size_that_qemu_refuses_is_not_believed(path: str, cluster_bits: int) -> None:
    qcow2_file.write(path)
    qcow2_file.patch(path, 20, struct.pack(">I", cluster_bits))

    assert qcow2_header.blank(path) is None


@pytest.mark.parametrize("length", [0, 3, 71, 100])
def test_file_that_ends_within_its_header_is_not_blank(path: str, length: int) -> None:
    qcow2_file.write(path)
    os.truncate(path, length)

    assert qcow2_header.blank(path) is None


def test_file_that_ends_within_its_l1_table_is_not_blank(path: str) -> None:
    qcow2_file.write(path, 32 * units.Gi)
    os.truncate(path, os.path.getsize(path) - 1)

    assert qcow2_header.blank(path) is None


def test_l1_table_that_would_fill_the_memory_is_not_read(path: str) -> None:
    qcow2_file.write(path)
    qcow2_file.patch(path, 36, struct.pack(">I", 2**32 - 1))

    assert qcow2_header.blank(path) is None


@pytest.mark.parametrize("l1_entries", [0, 1])
def test_l1_table_too_small_for_the_disk_is_a_fault_and_not_blank(path: str, l1_entries: int) -> None:
    # qemu-img: "L1 table is too small". 1 GiB needs two entries.
    qcow2_file.write(path, units.Gi, l1_entries=l1_entries)

    assert qcow2_header.blank(path) is None


@pytest.mark.parametrize(
    ("incompatible", "l1_entries", "is_blank"),
    [(0, 1, False), (0, 2, True), (qcow2_file.EXTENDED_L2, 3, False), (qcow2_file.EXTENDED_L2, 4, True)],
)
def test_subclusters_need_an_l1_table_twice_as_long(
    path: str, incompatible: int, l1_entries: int, is_blank: bool
) -> None:
    qcow2_file.write(path, units.Gi, incompatible=incompatible, l1_entries=l1_entries)

    assert (qcow2_header.blank(path) is not None) is is_blank


def test_backing_file_s_name_beyond_the_first_4096_bytes_is_not_guessed(path: str) -> None:
    qcow2_file.write(path, backing_file="base", backing_format="raw")
    qcow2_file.patch(path, 8, struct.pack(">Q", 5000))

    assert qcow2_header.blank(path) is None


@pytest.mark.parametrize(("offset", "length"), [(2 * units.Mi, 4), (2**40, 4), (2**64 - 1, 4), (65534, 4), (512, 1024)])
def test_backing_file_s_name_where_qemu_has_none_is_a_fault_and_not_blank(path: str, offset: int, length: int) -> None:
    # What stands there instead would become the new disk's base.
    qcow2_file.write(path, backing_file="base", backing_format="raw")
    qcow2_file.patch(path, min(offset, 2 * units.Mi), b"x" * length)
    qcow2_file.patch(path, 8, struct.pack(">QI", offset, length))

    assert qcow2_header.blank(path) is None


def test_name_s_length_without_a_place_is_no_backing_file(path: str) -> None:
    # As QEMU reads it: offset 0 means that there is none.
    qcow2_file.write(path)
    qcow2_file.patch(path, 8, struct.pack(">QI", 0, 40))

    blank = qcow2_header.blank(path)

    assert blank is None or blank.backing_file is None


def test_unknown_extension_before_the_format_is_passed_over(path: str) -> None:
    qcow2_file.write(path, backing_file="base", backing_format="raw")
    extensions = qcow2_file.extension(0x12345678, b"five!") + qcow2_file.extension(qcow2_file.BACKING_FORMAT, b"qcow2")
    name_at = 112 + len(extensions) + 8
    qcow2_file.patch(path, 112, extensions + qcow2_file.extension(qcow2_file.END) + b"base")
    qcow2_file.patch(path, 8, struct.pack(">Q", name_at))

    blank = qcow2_header.blank(path)

    assert blank is not None
    assert (blank.backing_file, blank.backing_format) == ("base", "qcow2")


def test_what_stands_behind_the_last_extension_is_not_one(path: str) -> None:
    qcow2_file.write(path)
    end = qcow2_file.extension(qcow2_file.END)
    qcow2_file.patch(path, 112, end + qcow2_file.extension(qcow2_file.BACKING_FORMAT, b"raw"))

    blank = qcow2_header.blank(path)

    assert blank is not None
    assert blank.backing_format is None


def test_extension_that_never_ends_is_given_up(path: str) -> None:
    qcow2_file.write(path, backing_file="base")
    qcow2_file.patch(path, 112, struct.pack(">II", 0x12345678, 2**32 - 1))

    blank = qcow2_header.blank(path)

    assert blank is not None
    assert blank.backing_format is None


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("size", [512, 100_000_256, 7 * units.Ti])
def test_virtual_size_is_read_from_the_header(path: str, version: int, size: int) -> None:
    qcow2_file.write(path, size, version=version, l1_entries=1)

    assert qcow2_header.virtual_size(path) == size


@pytest.mark.parametrize("content", [b"", b"QFI", b"QFI\xfb" + bytes(67), bytes(72)])
def test_file_without_a_header_has_no_virtual_size_in_it(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)

    with pytest.raises(exceptions.FormatMismatch, match=path):
        qcow2_header.virtual_size(path)


@pytest.mark.parametrize("read", [qcow2_header.blank, qcow2_header.backing, qcow2_header.begins])
def test_header_is_read_by_name_or_through_what_is_open(path: str, read: Callable[[Any], object]) -> None:
    qcow2_file.write(path, backing_file="base", backing_format="raw")

    with open(path, "rb") as file:
        assert read(path) == read(file.fileno())


@pytest.mark.parametrize(
    ("more", "named"),
    [({}, (None, None)), ({"backing_file": "base"}, ("base", None)),
     ({"backing_file": "base", "backing_format": "raw"}, ("base", "raw"))],
)  # fmt: skip
@pytest.mark.parametrize("version", [2, 3])
def test_backing_file_is_told_as_the_header_has_it(
    path: str, version: int, more: dict[str, Any], named: tuple[str | None, str | None]
) -> None:
    qcow2_file.write(path, version=version, **more)

    assert qcow2_header.backing(path) == named


def test_file_without_a_header_has_no_backing_file(path: str) -> None:
    with open(path, "wb") as file:
        file.write(bytes(4096))

    assert qcow2_header.backing(path) == (None, None)


# All of it.


def header(path: str) -> qcow2_header.Header:
    with open(path, "rb") as file:
        return qcow2_header.read(path, file.fileno())


def test_header_is_told_as_it_stands(path: str) -> None:
    qcow2_file.write(
        path, 3 * units.Gi + 7, cluster_bits=17, refcount_order=3, snapshots=2, bitmaps=5,
        incompatible=qcow2_file.EXTENDED_L2, autoclear=qcow2_file.AUTOCLEAR_BITMAPS,
        backing_file="base", backing_format="raw",
    )  # fmt: skip

    found = header(path)

    assert (found.version, found.virtual_size, found.cluster_size) == (3, 3 * units.Gi + 7, 131072)
    assert (found.refcount_bits, found.extended_l2, found.snapshots, found.bitmaps) == (8, True, 2, 5)
    assert (found.backing_file, found.backing_format) == ("base", "raw")
    assert (found.corrupt, found.encrypted, found.has_data_file, found.has_lost_bitmaps) == (False,) * 4


@pytest.mark.parametrize(
    ("more", "mark"),
    [({"incompatible": qcow2_file.DATA_FILE}, "has_data_file"), ({"incompatible": qcow2_file.CORRUPT}, "corrupt"),
     ({"incompatible": qcow2_file.EXTENDED_L2}, "extended_l2"), ({"encryption": 1}, "encrypted"),
     ({"encryption": 2}, "encrypted"), ({"autoclear": qcow2_file.AUTOCLEAR_BITMAPS}, "has_lost_bitmaps")],
)  # fmt: skip
def test_mark_in_the_header_is_read_as_that_and_no_other(path: str, more: dict[str, Any], mark: str) -> None:
    qcow2_file.write(path, **more)

    marks = ("has_data_file", "corrupt", "extended_l2", "encrypted", "has_lost_bitmaps")
    assert [name for name in marks if getattr(header(path), name)] == [mark]


def test_version_2_has_16_bits_for_a_refcount_and_none_of_the_marks(path: str) -> None:
    # What stands where version 3 has its marks is something else.
    qcow2_file.write(path, version=2, backing_file="base", backing_format="raw")
    qcow2_file.patch(path, 72 + 16, b"\xff" * 24)

    found = header(path)

    assert (found.version, found.refcount_bits, found.incompatible, found.autoclear) == (2, 16, 0, 0)


@pytest.mark.parametrize("content", [b"", b"QFI", b"QFI\xfb" + bytes(67), bytes(512), b"QFI\xfb\0\0\0\3" + bytes(90)])
def test_file_without_a_whole_header_is_not_read_as_one(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)

    with pytest.raises(exceptions.FormatMismatch, match=path):
        header(path)


def test_no_header_makes_another_error_than_ours_or_takes_memory(path: str) -> None:
    # Each field in turn has each value that could hurt.
    fields = {4: 4, 8: 8, 16: 4, 20: 4, 24: 8, 32: 4, 36: 4, 40: 8, 60: 4, 72: 8, 88: 8, 96: 4, 100: 4, 112: 4, 116: 4}
    tracemalloc.start()
    try:
        for offset, width in fields.items():
            for value in (0, 1, 2**31, 2 ** (8 * width - 1), 2 ** (8 * width) - 1):
                qcow2_file.write(path, units.Mi, backing_file="base", backing_format="raw")
                qcow2_file.patch(path, offset, (value % 2 ** (8 * width)).to_bytes(width, "big"))
                with contextlib.suppress(exceptions.BrokenImage, exceptions.FormatMismatch):
                    found = header(path)
                    assert found.cluster_size <= 2 * units.Mi
                    assert len(found.backing_file or "") < 1024
                qcow2_header.blank(path)
        assert tracemalloc.get_traced_memory()[1] < 16 * units.Mi
    finally:
        tracemalloc.stop()


def test_extensions_without_number_are_passed_over(path: str) -> None:
    # 260,000 of no length, each of a kind of its own.
    qcow2_file.write(path, cluster_bits=21)
    many = b"".join(struct.pack(">II", kind, 0) for kind in range(1, 262_000))
    qcow2_file.patch(path, 112, many)

    tracemalloc.start()
    try:
        assert header(path).bitmaps is None
        assert tracemalloc.get_traced_memory()[1] < 8 * units.Mi
    finally:
        tracemalloc.stop()


def test_extension_is_found_wherever_it_stands_in_the_first_cluster(path: str) -> None:
    # Bitmaps that are not seen would be lost in a copy.
    qcow2_file.write(path, autoclear=qcow2_file.AUTOCLEAR_BITMAPS)
    before = qcow2_file.extension(0x12345678, bytes(20_000))
    bitmaps = qcow2_file.extension(qcow2_file.BITMAPS, struct.pack(">IIQQ", 3, 0, 96, 65536))
    qcow2_file.patch(path, 112, before + bitmaps + qcow2_file.extension(qcow2_file.END))

    assert header(path).bitmaps == 3


def test_backing_file_s_name_is_no_extension(path: str) -> None:
    # QEMU looks for extensions up to the name, and a guest's name may look like one.
    name = os.fsdecode(qcow2_file.extension(qcow2_file.BACKING_FORMAT, b"vmdk"))
    qcow2_file.write(path, backing_file=name)
    with open(path, "rb") as file:
        last = file.read().index(os.fsencode(name)) - 8
    # In the place of the mark of their end.
    qcow2_file.patch(path, last, qcow2_file.extension(0x12345678))

    assert header(path).backing_file == name
    assert header(path).backing_format is None


def test_of_two_backing_formats_the_last_counts_as_for_qemu(path: str) -> None:
    qcow2_file.write(path, backing_file="base")
    formats = b"".join(qcow2_file.extension(qcow2_file.BACKING_FORMAT, name) for name in (b"raw", b"qcow2"))
    qcow2_file.patch(path, 112, formats + qcow2_file.extension(qcow2_file.END) + b"base")
    qcow2_file.patch(path, 8, struct.pack(">Q", 112 + len(formats) + 8))

    assert qcow2_header.backing(path) == ("base", "qcow2")


@pytest.mark.parametrize(
    ("content", "begins"),
    [(b"", False), (b"QFI\xfb", False), (bytes(4096), False), (b"QFI\xfb\0\0\0\1" + bytes(64), False),
     (b"QFI\xfb\0\0\0\2" + bytes(64), True), (b"QFI\xfb\0\0\0\x09" + bytes(64), True)],
)  # fmt: skip
def test_file_begins_like_qcow2_or_does_not(path: str, content: bytes, begins: bool) -> None:
    with open(path, "wb") as file:
        file.write(content)

    assert qcow2_header.begins(path) is begins


def test_file_that_cannot_be_read_does_not_begin_like_qcow2(path: str) -> None:
    assert qcow2_header.begins(f"{path}/none") is False


def test_pipe_in_the_place_of_a_file_is_not_waited_for(path: str) -> None:
    os.mkfifo(path)

    assert qcow2_header.begins(path) is False


@pytest.mark.parametrize(("autoclear", "lost"), [(0, False), (qcow2_file.AUTOCLEAR_BITMAPS, True)])
def test_bitmaps_that_the_header_does_not_place_are_lost(path: str, autoclear: int, lost: bool) -> None:
    qcow2_file.write(path, autoclear=autoclear)

    assert qcow2_header.has_lost_bitmaps(path) is lost


def test_backing_file_s_name_is_read_wherever_it_stands_in_the_first_cluster(path: str) -> None:
    # A chain with a FIFO in it must not hide behind the first 4096 bytes.
    qcow2_file.write(path, backing_file="base", backing_format="raw")
    qcow2_file.patch(path, 8, struct.pack(">Q", 8000))
    qcow2_file.patch(path, 8000, b"else")

    assert qcow2_header.backing(path) == ("else", "raw")


# What kind of image it is.


@pytest.mark.parametrize(
    ("written", "options"),
    [
        ({}, {}),
        ({"version": 2}, {"compat": "0.10"}),
        ({"refcount_order": 0}, {"refcount_bits": "1"}),
        ({"refcount_order": 6}, {"refcount_bits": "64"}),
        ({"compatible": 1}, {"lazy_refcounts": "on"}),
        ({"incompatible": qcow2_file.COMPRESSION_TYPE}, {"compression_type": "zstd"}),
        ({"incompatible": qcow2_file.EXTENDED_L2}, {"extended_l2": "on"}),
        # What qemu-img does unasked, or what is but a mark of the moment.
        ({"refcount_order": 4, "incompatible": qcow2_file.DIRTY}, {}),
    ],
)
def test_options_that_an_image_was_made_with_are_told(
    path: str, written: dict[str, Any], options: dict[str, str]
) -> None:
    qcow2_file.write(path, **written)

    with open(path, "rb") as file:
        assert qcow2_header.read(path, file.fileno()).options == options


def test_blank_image_tells_its_options(path: str) -> None:
    qcow2_file.write(path, version=2)

    blank = qcow2_header.blank(path)

    assert blank is not None
    assert blank.options == {"compat": "0.10"}


@pytest.mark.parametrize("kind", [0x6803F857, 0x0537BE77, 0x44415441, qcow2_file.BITMAPS, qcow2_file.BACKING_FORMAT])
def test_extension_of_qemus_is_known(path: str, kind: int) -> None:
    qcow2_file.write(path)
    qcow2_file.patch(path, 112, qcow2_file.extension(kind, bytes(24)) + qcow2_file.extension(qcow2_file.END))

    assert not qcow2_header.has_unknown(path)


@pytest.mark.parametrize("first", [b"", qcow2_file.extension(qcow2_file.BACKING_FORMAT, b"raw")])
def test_another_extension_is_not_known(path: str, first: bytes) -> None:
    qcow2_file.write(path)
    qcow2_file.patch(
        path, 112, first + qcow2_file.extension(0x12345678, b"five!") + qcow2_file.extension(qcow2_file.END)
    )

    assert qcow2_header.has_unknown(path)


def test_what_stands_behind_the_last_extension_is_not_unknown(path: str) -> None:
    qcow2_file.write(path)
    qcow2_file.patch(path, 112, qcow2_file.extension(qcow2_file.END) + qcow2_file.extension(0x12345678, b"five!"))

    assert not qcow2_header.has_unknown(path)


@pytest.mark.parametrize(
    ("written", "unknown"),
    [
        ({"compatible": 1}, False),
        ({"compatible": 2}, True),
        ({"compatible": 1 << 63}, True),
        ({"autoclear": 3}, False),
        ({"autoclear": 4}, True),
        ({"version": 2}, False),
    ],
)
def test_features_that_need_not_be_known_are_told(path: str, written: dict[str, Any], unknown: bool) -> None:
    qcow2_file.write(path, **written)

    assert qcow2_header.has_unknown(path) is unknown
