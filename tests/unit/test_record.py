# SPDX-License-Identifier: Apache-2.0
"""Whose word on a disk's format counts."""

from __future__ import annotations

from collections.abc import Callable
import errno
import json
import logging
import os
import pathlib
from typing import Any

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import Preallocator
from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import record
from imgprealloc.record import Note
from imgprealloc.record import Word

from .host import SIZE
from .host import Host

Logged = Callable[[int], list[str]]

NOTHING = Note(exists=False, format=None)
UNKNOWN = Note(exists=True, format=None)


def note(host: Host, noted: object, folder: str = "") -> None:
    """Write Nova's disk.info beside the disk."""
    with open(host.path(os.path.join(folder, "disk.info")), "w") as file:
        json.dump(noted, file)


def said(format: str) -> Note:
    return Note(exists=True, format=format)


def word(path: str, told: str | None = None) -> Word:
    with disk_file.opened(path) as file:
        return record.word(file, told)


# Who comes first.


@pytest.mark.parametrize("noted", ["raw", "qcow2"])
@pytest.mark.parametrize("told", ["raw", "qcow2"])
def test_caller_s_word_comes_before_all_others(host: Host, told: str, noted: str) -> None:
    path = host.qcow2()
    note(host, {path: noted})

    assert word(path, told) == Word(told, "the caller")


@pytest.mark.parametrize("noted", ["raw", "qcow2"])
def test_nova_s_record_comes_before_what_the_disk_looks_like(host: Host, noted: str) -> None:
    path = host.qcow2()
    note(host, {path: noted})

    assert word(path) == Word(noted, "disk.info")
    assert host.calls == []


@pytest.mark.parametrize(("make", "format"), [(Host.raw, "raw"), (Host.qcow2, "qcow2")])
def test_where_nobody_tells_the_first_bytes_are_a_guess(host: Host, make: Callable[[Host], str], format: str) -> None:
    assert word(make(host)) == Word(format, "its first bytes")


@pytest.mark.parametrize(("source", "certain"), [("the caller", True), ("disk.info", True), ("its first bytes", False)])
def test_only_a_guess_is_not_certain(source: Any, certain: bool) -> None:
    assert Word("raw", source).certain is certain


def test_raw_disk_that_begins_like_qcow2_is_told_of_once(host: Host, logged: Logged) -> None:
    path = host.qcow2()
    note(host, {path: "raw"})

    for _ in range(2):
        word(path)

    [warning] = logged(logging.WARNING)
    assert path in warning
    assert "--disk-format qcow2" in warning


# How a record is found: by the file's name.


@pytest.mark.parametrize(
    "key",
    [
        "/var/lib/nova/instances/uuid/disk",
        # state_path=/var/lib/nova/
        "/var/lib/nova//instances/uuid/disk",
        "/elsewhere/disk",
        "disk",
        "//disk",
    ],
)
def test_record_is_found_by_the_disk_s_name_in_whatever_folder_it_was(host: Host, key: str) -> None:
    path = host.raw()
    note(host, {key: "raw"})

    assert record.note(path) == said("raw")


@pytest.mark.parametrize("key", ["/a/disk.local", "/a/disk/", "/a/disk.config", "/disk/a", "", "/a/mydisk"])
def test_another_disk_s_record_says_nothing(host: Host, key: str) -> None:
    note(host, {key: "raw"})

    assert record.note(host.raw()) == NOTHING


def test_disk_without_a_record_beside_it_has_none(host: Host) -> None:
    assert record.note(host.raw()) == NOTHING
    assert record.note(host.path("none/disk")) == NOTHING


def linked_folder(host: Host) -> str:
    os.symlink(host.folder, f"{host.folder}_resize")
    return f"{host.folder}_resize/disk"


def linked_disk(host: Host) -> str:
    os.mkdir(host.path("elsewhere"))
    os.symlink(host.path("disk"), host.path("elsewhere/volume"))
    return host.path("elsewhere/volume")


def roundabout(host: Host) -> str:
    os.mkdir(host.path("elsewhere"))
    return host.path("elsewhere/../disk")


@pytest.mark.parametrize("name", [linked_folder, linked_disk, roundabout])
def test_link_to_a_disk_or_to_its_folder_leads_to_its_record(host: Host, name: Callable[[Host], str]) -> None:
    note(host, {host.raw(): "raw"})

    assert record.note(name(host)) == said("raw")


def test_record_beside_the_link_counts_too(host: Host) -> None:
    host.raw()
    link = linked_disk(host)
    note(host, {"volume": "raw"}, "elsewhere")

    assert record.note(link) == said("raw")


def test_link_whose_two_records_differ_is_of_no_known_format(host: Host) -> None:
    note(host, {host.raw(): "qcow2"})
    link = linked_disk(host)
    note(host, {"volume": "vmdk"}, "elsewhere")

    assert record.note(link) == UNKNOWN


def test_relative_path_finds_its_record(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    note(host, {host.raw(): "raw"})
    monkeypatch.chdir(host.folder)

    assert record.note("disk") == said("raw")


# What it says.


@pytest.mark.parametrize(
    ("noted", "found"),
    [
        ({"/a/disk": "qcow2", "/b/disk": "qcow2"}, said("qcow2")),
        ({"/a/disk": "qcow2", "/b/disk": "raw"}, said("raw")),
        ({"/a/disk": "raw", "/b/disk": "qcow2"}, said("raw")),
        ({"/a/disk": 7, "/b/disk": "raw"}, said("raw")),
        ({"/a/disk": "qcow2", "/b/disk": "vmdk"}, UNKNOWN),
        ({"/a/disk": "qcow2", "/b/disk": None}, UNKNOWN),
        ({"/a/disk": "qcow2", "/b/disk.local": "raw"}, said("qcow2")),
    ],
)
def test_any_record_that_says_raw_wins_and_a_contradiction_says_nothing(
    host: Host, noted: dict[str, object], found: Note
) -> None:
    note(host, noted)

    assert record.note(host.raw()) == found


@pytest.mark.parametrize("format", [None, 7, 1.5, True, ["raw"], {"raw": "raw"}])
def test_format_that_is_no_word_is_unknown(host: Host, format: object) -> None:
    note(host, {"/a/disk": format})

    assert record.note(host.raw()) == UNKNOWN


def test_format_that_is_none_of_ours_is_nova_s_word_too(host: Host) -> None:
    path = host.raw()
    note(host, {path: "ploop"})

    with pytest.raises(exceptions.UnsupportedFormat, match="its format is ploop"):
        Preallocator().inspect(path)


# Every kind of bad disk.info.


def written(content: bytes) -> Callable[[str], None]:
    def write(path: str) -> None:
        with open(path, "wb") as file:
            file.write(content)

    return write


def too_large(path: str) -> None:
    written(json.dumps({"/a/disk": "raw", "/a/x": "x" * units.Mi}).encode())(path)


def loop(path: str) -> None:
    os.symlink("disk.info", path)


BAD = [
    pytest.param(written(b""), id="empty"),
    pytest.param(written(b'{"/a/disk": "qco'), id="damaged"),
    pytest.param(written(b"\xff\xfe\x00{"), id="no UTF-8"),
    pytest.param(written(b"\0" * 4096), id="NULs"),
    pytest.param(written(b"[" * 100_000 + b"]" * 100_000), id="100,000 nested lists"),
    pytest.param(written(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), id="100,000 nested objects"),
    pytest.param(too_large, id="over 1 MiB"),
    pytest.param(written(b'{"/a/disk": "qcow2"}' + b" " * units.Mi), id="blanks over 1 MiB"),
    pytest.param(written(b'["/a/disk", "raw"]'), id="a list"),
    pytest.param(written(b"7"), id="a number"),
    pytest.param(written(b"9" * 100_000), id="a long number"),
    pytest.param(written(b'"raw"'), id="a string"),
    pytest.param(written(b"null"), id="null"),
    pytest.param(written(b'{"/a/disk": 7}'), id="a number for a format"),
    pytest.param(written(b'{"/a/disk": "qcow2", "/b/disk": "vmdk"}'), id="a contradiction"),
    pytest.param(os.mkfifo, id="a pipe"),
    pytest.param(os.mkdir, id="a folder"),
    pytest.param(loop, id="a link to itself"),
    pytest.param(lambda path: os.symlink("/dev/zero", path), id="a device"),
]


@pytest.mark.parametrize("make", BAD)
def test_record_that_cannot_be_believed_counts_as_one_that_says_unknown(
    host: Host, make: Callable[[str], object]
) -> None:
    path = host.qcow2()
    make(host.path("disk.info"))
    before = os.listdir("/proc/self/fd")

    assert record.note(path) == UNKNOWN
    assert word(path) == Word("qcow2", "its first bytes")
    assert not record.agrees(path, "qcow2")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_record_that_cannot_be_opened_is_not_one_that_is_not_there(host: Host, code: int) -> None:
    path = host.qcow2()
    note(host, {path: "qcow2"})
    real = os.open

    def refuse(name: str, *how: Any, **more: Any) -> int:
        if str(name).endswith("disk.info"):
            raise OSError(code, os.strerror(code), name)
        return real(name, *how, **more)

    with fixtures.MockPatchObject(os, "open", refuse):
        assert record.note(path) == UNKNOWN


def test_record_that_cannot_be_read_is_not_one_that_is_not_there(host: Host) -> None:
    path = host.qcow2()
    note(host, {path: "qcow2"})

    class Faulty:
        def __init__(self, *how: Any, **more: Any) -> None:
            pass

        def __enter__(self) -> Faulty:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, size: int) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with fixtures.MockPatch("imgprealloc.record.open", Faulty, create=True):
        assert record.note(path) == UNKNOWN


# What may be done on whose word.


@pytest.mark.parametrize("make", BAD)
def test_no_byte_of_a_disk_is_changed_where_its_record_cannot_be_believed(
    host: Host, make: Callable[[str], object]
) -> None:
    # A raw disk to which its guest has written a qcow2 file.
    path = host.qcow2()
    make(host.path("disk.info"))
    before = host.content(path)

    for existing in ("rewrite", "just_made"):
        with pytest.raises(exceptions.FormatNotCertain):
            Preallocator().preallocate(path, existing)
    with pytest.raises(exceptions.FormatNotCertain):
        Preallocator().resize(path, 2 * SIZE)
    Preallocator().preallocate(path)

    assert set(host.changes) == {"fallocate"}
    assert host.content(path) == before


@pytest.mark.parametrize(("told", "noted"), [("qcow2", None), (None, "qcow2")])
def test_on_a_word_that_counts_a_disk_is_made_anew(host: Host, told: str | None, noted: str | None) -> None:
    path = host.qcow2()
    if noted:
        note(host, {path: noted})

    assert Preallocator().preallocate(path, format=told).state == "preallocated"
    assert "create" in host.changes


@pytest.mark.parametrize(("format", "other"), [("raw", "qcow2"), ("qcow2", "raw")])
def test_who_is_refused_is_told_what_to_say(host: Host, format: str, other: str) -> None:
    with disk_file.opened(host.raw()) as file, pytest.raises(exceptions.FormatNotCertain) as caught:
        record.require_certain(file, Word(format, "its first bytes"), "it is not grown")

    assert caught.value.guess == format
    assert f"--disk-format {format}, or --disk-format {other}" in caught.value.remedy
    assert "it is not grown under a guess" in caught.value.reason


# What the host that a disk comes from has told.


def test_source_host_s_word_counts_as_long_as_the_disk_arrives(host: Host) -> None:
    path = host.qcow2()
    # instances_path is another there.
    elsewhere = f"/srv/nova/{os.path.basename(host.folder)}/disk"

    with record.also_told({elsewhere: "raw"}):
        assert record.told_of(path) == "raw"
        assert record.note(path) == said("raw")
        assert word(path) == Word("raw", "disk.info")

    assert record.told_of(path) is None
    assert record.note(path) == NOTHING


def test_source_host_s_word_is_forgotten_after_an_error_too(host: Host) -> None:
    path = host.qcow2()

    with pytest.raises(ZeroDivisionError), record.also_told({path: "raw"}):
        raise ZeroDivisionError

    assert record.told_of(path) is None


def test_another_instance_s_disk_of_the_same_name_is_another(host: Host) -> None:
    with record.also_told({"/srv/nova/other/disk": "raw"}):
        assert record.note(host.qcow2()) == NOTHING


@pytest.mark.parametrize(
    ("told", "noted", "found"),
    [("raw", "qcow2", said("raw")), ("qcow2", "raw", said("raw")), ("qcow2", "qcow2", said("qcow2")),
     ("vmdk", "qcow2", UNKNOWN)],
)  # fmt: skip
def test_source_host_and_the_record_have_to_agree_unless_one_says_raw(
    host: Host, told: str, noted: str, found: Note
) -> None:
    path = host.qcow2()
    note(host, {path: noted})

    with record.also_told({path: told}):
        assert record.note(path) == found


# Records that Nova has written of what it has not made.


def test_record_that_comes_after_the_disk_is_the_configuration_s_word_and_not_believed(host: Host) -> None:
    path = host.qcow2()
    record.doubt(path)
    note(host, {path: "qcow2"})

    assert record.note(path) == UNKNOWN
    assert word(path) == Word("qcow2", "its first bytes")


def test_record_of_raw_is_believed_all_the_same(host: Host) -> None:
    path = host.qcow2()
    record.doubt(path)
    note(host, {path: "raw"})

    assert record.note(path) == said("raw")


def test_disk_with_a_record_of_its_own_is_not_doubted(host: Host) -> None:
    path = host.qcow2()
    note(host, {path: "qcow2"})
    record.doubt(path)

    assert record.note(path) == said("qcow2")


def test_disk_that_is_made_afterwards_is_not_doubted(host: Host) -> None:
    record.doubt(host.path())
    path = host.qcow2()
    note(host, {path: "qcow2"})

    assert record.note(path) == said("qcow2")


def test_new_disk_in_the_place_of_a_doubted_one_is_not_doubted(host: Host) -> None:
    old = host.qcow2()
    record.doubt(old)
    os.rename(old, host.path("kept"))
    note(host, {host.qcow2(): "qcow2"})

    assert record.note(old) == said("qcow2")


def test_disk_that_nova_has_just_made_is_believed_though_it_has_the_inode_of_a_doubted_one(host: Host) -> None:
    path = host.qcow2()
    record.doubt(path)
    note(host, {path: "qcow2"})

    record.believe(path)

    assert record.note(path) == said("qcow2")


def test_doubts_do_not_grow_without_bound(host: Host) -> None:
    with fixtures.MockPatchObject(record, "_MOST_DOUBTED", 3):
        for number in range(5):
            record.doubt(host.raw(name=str(number)))

        assert len(record._doubted) == 3


def test_looking_for_a_record_writes_nothing(host: Host) -> None:
    path = host.raw()

    record.note(path)
    record.doubt(path)

    assert host.files == ["disk"]


def test_raw_wins_also_over_a_second_entry_of_the_same_key(host: Host) -> None:
    path = host.qcow2()
    with open(host.path("disk.info"), "w") as file:
        file.write(f'{{"{path}": "raw", "{path}": "qcow2"}}')

    assert record.note(path) == said("raw")


def test_copy_of_a_disk_is_not_what_is_told_of_the_disk_itself(tmp_path: pathlib.Path) -> None:
    disk, copy, gone = (tmp_path / name / "instance" / "disk" for name in ("nova", "backup", "elsewhere"))
    for path in (disk, copy):
        path.parent.mkdir(parents=True)
        path.touch()

    with record.also_told({str(disk): "qcow2"}, of_here=True):
        assert [record.told_of(str(path)) for path in (disk, copy)] == ["qcow2", None]
    # As in a container, where libvirt's path is nowhere.
    with record.also_told({str(gone): "qcow2"}, of_here=True):
        assert record.told_of(str(disk)) == "qcow2"
