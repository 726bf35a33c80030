# SPDX-License-Identifier: Apache-2.0
"""Backing files: QEMU is let near none that it would wait for."""

from __future__ import annotations

import os

from oslo_utils import units
import pytest

from imgprealloc import backing
from imgprealloc import disk_file
from imgprealloc import exceptions

from . import qcow2_file
from .host import SIZE
from .host import Host


def virtual_size(host: Host, backing_file: str, backing_format: str) -> int:
    with disk_file.place(host.path()) as place:
        return backing.virtual_size(place, backing_file, backing_format)


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("nbd://host/export", True),
        ("nbd:localhost:10809", True),
        ("json:{}", True),
        ("fat:/etc", True),
        ("a:b", True),
        ("base", False),
        ("/a:b/base", False),
        ("./a:b", False),
        ("", False),
    ],
)
def test_colon_before_any_slash_is_a_protocol(name: str, protocol: bool) -> None:
    assert backing.names_protocol(name) is protocol


@pytest.mark.parametrize(("length", "size"), [(0, 0), (1, 512), (512, 512), (513, 1024), (SIZE, SIZE)])
def test_raw_base_is_as_long_as_its_file_in_whole_sectors(host: Host, length: int, size: int) -> None:
    assert virtual_size(host, host.base(length), "raw") == size
    assert host.calls == []


def test_qcow2_base_is_asked_in_its_format(host: Host) -> None:
    assert virtual_size(host, host.qcow2(3 * units.Mi, name="base"), "qcow2") == 3 * units.Mi
    assert [call.after("-f") for call in host.calls] == ["qcow2"]


def test_relative_name_is_looked_for_beside_the_disk(host: Host) -> None:
    host.base(SIZE)

    assert virtual_size(host, "base", "raw") == SIZE


def test_chain_is_followed_to_its_end(host: Host) -> None:
    host.base(SIZE, name="deepest")
    host.qcow2(name="deeper", backing_file="deepest", backing_format="raw")
    host.qcow2(name="base", backing_file="deeper", backing_format="qcow2")

    assert virtual_size(host, "base", "qcow2") == SIZE


def test_name_in_a_link_s_target_is_looked_for_beside_that(host: Host) -> None:
    os.mkdir(host.path("cache"))
    host.base(SIZE, name="cache/deepest")
    host.qcow2(name="cache/base", backing_file="deepest", backing_format="raw")
    os.symlink("cache/base", host.path("link"))

    assert virtual_size(host, "link", "qcow2") == SIZE


def fifo(path: str) -> None:
    os.mkfifo(path)


def device(path: str) -> None:
    os.symlink("/dev/zero", path)


@pytest.mark.parametrize("kind", [fifo, device, os.mkdir])
@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk"])
def test_what_is_neither_a_file_nor_a_block_device_is_not_opened(host: Host, kind: object, format: str) -> None:
    kind(host.path("base"))  # type: ignore[operator]

    with pytest.raises(exceptions.BackingFileUnusable, match="neither a file nor a block device") as caught:
        virtual_size(host, "base", format)

    assert host.path("base") in caught.value.reason
    assert caught.value.path == host.path()
    assert host.calls == []


@pytest.mark.parametrize("kind", [fifo, device, os.mkdir])
def test_nor_is_one_deep_in_the_chain(host: Host, kind: object) -> None:
    kind(host.path("deepest"))  # type: ignore[operator]
    host.qcow2(name="deeper", backing_file="deepest")
    host.qcow2(name="base", backing_file="deeper")

    with pytest.raises(exceptions.BackingFileUnusable, match=host.path("deepest")):
        virtual_size(host, "base", "qcow2")

    assert host.calls == []


def test_base_that_is_not_there_is_named(host: Host) -> None:
    host.qcow2(name="base", backing_file="gone", backing_format="raw")

    with pytest.raises(exceptions.BackingFileUnusable, match=f"{host.path('gone')} is not there"):
        virtual_size(host, "base", "qcow2")

    assert host.calls == []


@pytest.mark.parametrize("length", [1, 2, 5])
def test_chain_that_bites_its_tail_is_refused(host: Host, length: int) -> None:
    for number in range(length):
        host.qcow2(name=f"base{number}", backing_file=f"base{(number + 1) % length}", backing_format="qcow2")

    with pytest.raises(exceptions.BackingFileUnusable, match=r"comes to .*base0 again"):
        virtual_size(host, "base0", "qcow2")

    assert host.calls == []


def test_chain_that_is_too_long_is_refused(host: Host) -> None:
    for number in range(250):
        qcow2_file.write(host.path(str(number)), units.Mi, backing_file=str(number + 1), backing_format="qcow2")

    with pytest.raises(exceptions.BackingFileUnusable, match="never ends"):
        virtual_size(host, "0", "qcow2")


def test_what_a_raw_file_begins_like_leads_nowhere(host: Host) -> None:
    # The base's guest may have written a header that names the host's files.
    os.mkfifo(host.path("pipe"))
    host.qcow2(name="base", backing_file="pipe", backing_format="raw")

    assert virtual_size(host, "base", "raw") == os.path.getsize(host.path("base"))


def test_chain_that_leads_to_a_server_is_left_to_qemu_under_its_limits(host: Host) -> None:
    host.qcow2(name="base", backing_file="nbd://host/export", backing_format="raw")

    assert virtual_size(host, "base", "qcow2") == SIZE
    assert host.calls[0].limits is not None
