# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
import errno
import json
import os
import pathlib
from typing import Any

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import command
from imgprealloc import exceptions
from imgprealloc import pace as paces
from imgprealloc import qemu_img
from imgprealloc.pace import Pace

from . import host as hosts
from .host import Host
from .host import Programs
from .host import limited

DISK = "/instances/1/disk"
# What a program gets.
NAME = "/proc/1/fd/7"
# Any file that is there, and no block device.
BASE = __file__


def said(answer: Any) -> Callable[..., str]:
    return lambda call: answer if isinstance(answer, str) else json.dumps(answer)


# What reads an image.


@pytest.mark.parametrize(
    ("name", "read"),
    [("info", lambda: qemu_img.info(DISK, NAME, "qcow2")), ("check", lambda: qemu_img.check(DISK, NAME, "qcow2"))],
)
def test_image_is_read_in_its_format_under_limits_also_while_a_guest_has_it(
    programs: Programs, name: str, read: Callable[[], object]
) -> None:
    programs.answers[name] = said({})

    read()

    [call] = programs.calls
    assert call.argv[:2] == ("qemu-img", name)
    assert call.after("-f") == "qcow2"
    assert "--output=json" in call.argv
    assert "-U" in call.argv
    assert call.limits == (f"--as={(2 if name == 'check' else 1) * units.Gi}", "--cpu=30", f"--fsize={units.Mi}")
    assert call.kwargs["env_variables"]["LC_ALL"] == "C"


def test_check_leaves_the_backing_file_alone(programs: Programs) -> None:
    programs.answers["check"] = said({})

    qemu_img.check(DISK, NAME, "qcow2")

    kind, _, image = programs.calls[0].argv[-1].partition(":")
    assert kind == "json"
    assert json.loads(image) == {
        "driver": "qcow2",
        "backing": None,
        "file": {"driver": "file", "filename": NAME},
    }


def test_only_an_image_of_unknown_format_is_looked_at_without_one(programs: Programs) -> None:
    programs.answers["info"] = said({"format": "qcow2"})

    qemu_img.info(DISK, NAME)

    assert "-f" not in programs.calls[0].argv
    assert programs.calls[0].limits == limited(qemu_img.LIMITS)


@pytest.mark.parametrize("status", [2, 3])
def test_check_answers_for_corrupt_and_for_leaking_images_too(programs: Programs, status: int) -> None:
    programs.answers["check"] = said({"corruptions": 1})
    programs.ends("check", status)

    assert qemu_img.check(DISK, NAME, "qcow2") == {"corruptions": 1}


@pytest.mark.parametrize("status", [1, 63])
def test_check_that_could_not_be_made_is_a_failure(programs: Programs, status: int) -> None:
    programs.ends("check", status)

    with pytest.raises(exceptions.CommandFailed):
        qemu_img.check(DISK, NAME, "qcow2")


@pytest.mark.parametrize(
    "printed",
    ["", "image: disk\nfile format: raw", '{"format": "raw"', "[]", "null", "3", '"raw"'],
    ids=["nothing", "no JSON", "half of it", "a list", "null", "a number", "a string"],
)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("info", lambda: qemu_img.info(DISK, NAME, "raw")),
        ("check", lambda: qemu_img.check(DISK, NAME, "qcow2")),
    ],
)
def test_answer_that_is_no_json_object_is_an_error_that_names_the_disk(
    programs: Programs, name: str, read: Callable[[], object], printed: str
) -> None:
    programs.answers[name] = said(printed)

    with pytest.raises(exceptions.BrokenImage, match="no JSON that can be read") as caught:
        read()

    assert caught.value.path == DISK


def test_flood_of_nonsense_is_not_quoted_in_full(programs: Programs) -> None:
    programs.answers["info"] = said("x" * 100_000)

    with pytest.raises(exceptions.BrokenImage) as caught:
        qemu_img.info(DISK, NAME, "raw")

    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("wrong", [None, -1, "1", 1.0, True, [1], {}])
def test_number_is_a_count_and_nothing_else(wrong: object) -> None:
    with pytest.raises(exceptions.BrokenImage, match=r"as 'a\.b'") as caught:
        qemu_img.number(DISK, {"a": {"b": wrong}}, "a", "b")

    assert caught.value.path == DISK


def test_zero_is_a_number() -> None:
    assert qemu_img.number(DISK, {"a": 0}, "a") == 0


@pytest.mark.parametrize("answer", [{}, {"a": {}}, {"a": None}, {"a": "text"}, {"a": ["b"]}])
def test_missing_value_is_an_error_and_not_none(answer: dict[str, object]) -> None:
    with pytest.raises(exceptions.BrokenImage, match=r"lacks 'a\.b'") as caught:
        qemu_img.value(DISK, answer, "a", "b")

    assert caught.value.path == DISK


# What writes one.


def test_create_names_the_format_and_the_backing_file_s(programs: Programs) -> None:
    qemu_img.create(DISK, NAME, 512, "qcow2", {"preallocation": "falloc"}, backing_file="/b/base", backing_format="raw")

    [call] = programs.calls
    assert (call.after("-f"), call.after("-b"), call.after("-F")) == ("qcow2", "/b/base", "raw")
    assert call.argv[-2:] == (NAME, "512")


def test_create_without_a_backing_file_or_options_gives_neither(programs: Programs) -> None:
    qemu_img.create(DISK, NAME, 512, "raw", {})

    assert not {"-b", "-F", "-o"} & set(programs.calls[0].argv)


def test_convert_names_the_format_of_both_ends_and_keeps_the_backing_file(programs: Programs) -> None:
    qemu_img.convert(DISK, NAME, "/new", 512, "qcow2", {"extended_l2": "on"}, backing_file=BASE, backing_format="raw")

    [call] = programs.calls
    assert call.after("-O") == "qcow2"
    assert call.after("-B") == BASE
    assert call.options == {"extended_l2": "on", "backing_fmt": "raw"}
    # Which it is opened over, whatever its header says.
    assert hosts.csv(call.argv[-2]) == {
        "driver": "qcow2",
        "file.driver": "file",
        "file.filename": NAME,
        "backing.driver": "raw",
        "backing.file.driver": "file",
        "backing.file.filename": BASE,
    }
    assert call.argv[-1] == "/new"


def test_convert_names_the_backing_file_s_format_in_words_that_qemu_5_2_knows(programs: Programs) -> None:
    qemu_img.convert(DISK, NAME, "/new", 512, "qcow2", {}, backing_file=BASE, backing_format="raw")

    [call] = programs.calls
    assert "-F" not in call.argv
    assert call.options == {"backing_fmt": "raw"}


def test_convert_without_a_backing_file_names_the_format_of_both_ends(programs: Programs) -> None:
    qemu_img.convert(DISK, NAME, "/new", 512, "raw", {})

    [call] = programs.calls
    assert (call.after("-f"), call.after("-O")) == ("raw", "raw")
    assert call.argv[-2:] == (NAME, "/new")
    assert not {"-B", "-o", "-S", "--image-opts"} & set(call.argv)


def test_convert_keeps_clusters_mapped_that_read_as_zeros_over_a_backing_file(programs: Programs) -> None:
    backing = {"backing_file": BASE, "backing_format": "raw"}

    qemu_img.convert(DISK, NAME, "/new", 512, "qcow2", {"preallocation": "falloc"}, **backing)

    assert programs.calls[0].after("-S") == "0"


def test_block_device_is_opened_as_one(programs: Programs) -> None:
    with fixtures.MockPatch("stat.S_ISBLK", lambda mode: True), fixtures.MockPatch("os.stat"):
        qemu_img.resize(DISK, NAME, 1024, "qcow2", "off", backing_file="/dev/base", backing_format="raw")

    assert hosts.csv(programs.calls[0].argv[-2])["backing.file.driver"] == "host_device"


def test_backing_file_gets_another_name_without_being_opened(programs: Programs) -> None:
    qemu_img.name_backing_file(DISK, NAME, "base", "raw")

    [call] = programs.calls
    assert call.argv[:2] == ("qemu-img", "rebase")
    assert "-u" in call.argv
    assert (call.after("-f"), call.after("-b"), call.after("-F"), call.argv[-1]) == ("qcow2", "base", "raw", NAME)


@pytest.mark.parametrize(
    ("work", "size"),
    [
        (lambda: qemu_img.create(DISK, NAME, units.Ti, "raw", {}), units.Ti),
        (lambda: qemu_img.convert(DISK, NAME, "/new", units.Ti, "raw", {}), 2 * units.Ti),
        (lambda: qemu_img.resize(DISK, NAME, units.Ti, "raw", "full"), units.Ti),
        (lambda: qemu_img.resize_over_zeros(DISK, NAME, units.Ti, BASE, "full"), units.Ti),
        (lambda: qemu_img.info(DISK, NAME), 0),
    ],
)
def test_what_writes_much_has_the_time_for_it(programs: Programs, work: Callable[[], object], size: int) -> None:
    programs.answers["info"] = said({})

    work()

    assert programs.calls[0].seconds == command.WALL_TIME + size / command.SLOWEST


def test_resize_names_format_and_preallocation_and_never_shrinks(programs: Programs) -> None:
    qemu_img.resize(DISK, NAME, 1024, "raw", "full")

    [call] = programs.calls
    assert call.after("-f") == "raw"
    assert "--preallocation=full" in call.argv
    assert "--shrink" not in call.argv


def test_growing_over_zeros_puts_them_in_the_backing_file_s_place(host: Host) -> None:
    zeros = host.raw(64 * units.Mi, name=f".disk{hosts.ZEROS}")
    disk = host.overlay(32 * units.Mi, mapped=1.0, extended_l2=True)

    qemu_img.resize_over_zeros(disk, disk, 64 * units.Mi, zeros, "falloc")

    [call] = host.calls
    assert "--image-opts" in call.argv
    assert "-f" not in call.argv
    assert (host.disk(disk).virtual_size, host.disk(disk).backing_file) == (64 * units.Mi, host.path("base"))


@pytest.mark.parametrize(("flush", "no_flush"), [(True, 0), (False, 2)])
def test_only_a_disk_that_is_not_in_its_place_yet_is_grown_without_flushes(
    programs: Programs, flush: bool, no_flush: int
) -> None:
    qemu_img.resize_over_zeros(DISK, NAME, 1024, BASE, "falloc", flush=flush)

    assert programs.calls[0].argv[-2].count("cache.no-flush=on") == no_flush


def test_commas_in_names_do_not_end_them(programs: Programs, tmp_path: pathlib.Path) -> None:
    zeros = tmp_path / "c,,d"
    zeros.touch()

    qemu_img.resize_over_zeros(DISK, "/a,b/disk", 1024, str(zeros), "falloc")

    image = programs.calls[0].argv[-2]
    assert "file.filename=/a,,b/disk,backing.driver=raw," in image
    assert image.endswith("/c,,,,d")


def test_commas_in_option_values_do_not_end_them(programs: Programs) -> None:
    qemu_img.create(DISK, NAME, 512, "qcow2", {"data_file": "a,b", "nocow": "on"})

    assert programs.calls[0].after("-o") == "data_file=a,,b,nocow=on"


def test_commas_in_plain_arguments_stay_as_they_are(programs: Programs) -> None:
    qemu_img.create("/a,b/disk", "/a,b/disk", 512, "qcow2", {}, backing_file="/c,d/base", backing_format="raw")

    [call] = programs.calls
    assert (call.argv[-2], call.after("-b")) == ("/a,b/disk", "/c,d/base")


# Its version.


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022", (7, 2, 22)),
        ("qemu-img version 10.0.0-rc2 (v10.0.0-rc2)", (10, 0, 0)),
        ("qemu-img version 5.2.0(qemu-kvm-5.2.0-16.module_el8)", (5, 2, 0)),
        ("qemu-img version 5.1, Copyright (c)", (5, 1, 0)),
    ],
)
def test_version_is_read_as_numbers(programs: Programs, printed: str, version: tuple[int, ...]) -> None:
    programs.answers["--version"] = said(printed)

    assert qemu_img.version() == version


@pytest.mark.parametrize(
    ("printed", "enough"),
    [("4.2.1", False), ("5.1.0", False), ("5.2.0", True), ("5.2", True), ("6.2.0", True), ("10.0.0", True)],
)
def test_overlays_can_be_preallocated_since_qemu_5_2(programs: Programs, printed: str, enough: bool) -> None:
    programs.answers["--version"] = said(f"qemu-img version {printed}\n")

    assert (qemu_img.version() >= qemu_img.OVERLAY_PREALLOCATION) is enough


def test_version_is_asked_once_a_process(programs: Programs) -> None:
    programs.answers["--version"] = said("qemu-img version 7.2.22")

    qemu_img.version()
    qemu_img.version()

    assert len(programs.calls) == 1


def test_program_without_a_version_is_too_old(programs: Programs) -> None:
    programs.answers["--version"] = said("BusyBox")

    with pytest.raises(exceptions.QemuImgTooOld, match="BusyBox"):
        qemu_img.version()


def test_version_that_could_not_be_had_is_asked_for_again(programs: Programs) -> None:
    programs.answers["--version"] = said("qemu-img version 7.2.22")
    programs.ends("--version", 1)
    with pytest.raises(exceptions.CommandFailed):
        qemu_img.version()

    programs.ends("--version", 0)

    assert qemu_img.version() == (7, 2, 22)


# At a pace.


def copied(tmp_path: pathlib.Path, pace: Pace | None) -> None:
    """Copy a disk on a filesystem that lets the page cache be passed by, or not."""
    for name in ("source", "target"):
        (tmp_path / name).touch()
    with paces.kept(pace):
        qemu_img.convert(DISK, str(tmp_path / "source"), str(tmp_path / "target"), 1 << 30, "raw", {})


def passed_by(tmp_path: pathlib.Path, *, possible: bool) -> fixtures.MockPatchObject:
    """Play a filesystem that has, or has not, direct I/O."""
    real = os.open

    def opened(path: str, flags: int, *more: Any, **where: Any) -> int:
        if flags & os.O_DIRECT:
            if not possible:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
            flags &= ~os.O_DIRECT
        return real(path, flags, *more, **where)

    return fixtures.MockPatchObject(os, "open", opened)


def test_copy_that_keeps_a_pace_passes_the_page_cache_by_and_is_limited(
    programs: Programs, tmp_path: pathlib.Path
) -> None:
    programs.answers["--version"] = lambda call: "qemu-img version 5.2.0"
    with passed_by(tmp_path, possible=True):
        copied(tmp_path, Pace(10 * units.Mi))

    [call] = programs.run("convert")
    assert (call.after("-t"), call.after("-T"), call.after("-r")) == ("none", "none", str(10 * units.Mi))
    assert call.is_idle


def test_copy_without_a_rate_needs_no_qemu_that_keeps_one(programs: Programs, tmp_path: pathlib.Path) -> None:
    with passed_by(tmp_path, possible=True):
        copied(tmp_path, Pace())

    [call] = programs.calls
    assert (call.after("-t"), call.after("-r")) == ("none", None)


def test_copy_uses_the_page_cache_where_the_filesystem_has_no_other_way(
    programs: Programs, tmp_path: pathlib.Path
) -> None:
    with passed_by(tmp_path, possible=False):
        copied(tmp_path, Pace())

    [call] = programs.calls
    assert not {"-t", "-T"} & set(call.argv)


def test_copy_for_a_guest_that_waits_is_as_it_was(programs: Programs, tmp_path: pathlib.Path) -> None:
    with passed_by(tmp_path, possible=True):
        copied(tmp_path, None)

    [call] = programs.calls
    assert call.argv[2:] == (
        "-q", "-f", "raw", "-O", "raw", str(tmp_path / "source"), str(tmp_path / "target"),
    )  # fmt: skip
    assert not call.is_idle


def test_qemu_img_that_keeps_no_rate_copies_nothing(programs: Programs, tmp_path: pathlib.Path) -> None:
    programs.answers["--version"] = lambda call: "qemu-img version 5.1.0"

    with pytest.raises(exceptions.QemuImgTooOld, match="leave the rate out"):
        copied(tmp_path, Pace(1))

    assert programs.run("convert") == []


def test_base_s_page_cache_is_left_to_the_guests_that_read_it(programs: Programs, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "target"
    target.touch()
    with passed_by(tmp_path, possible=True), paces.kept(Pace()):
        qemu_img.copy_in(DISK, BASE, "raw", str(target), 512, {})
        qemu_img.convert(DISK, NAME, str(target), 512, "qcow2", {}, backing_file=BASE, backing_format="raw")

    assert [(call.after("-t"), call.after("-T")) for call in programs.calls] == [("none", None)] * 2
