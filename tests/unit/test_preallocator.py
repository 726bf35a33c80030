# SPDX-License-Identifier: Apache-2.0
"""What all formats share: which strategy is taken, what it promises, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
import logging
import os
import pathlib
from typing import Any

import fixtures
import pytest

import imgprealloc
from imgprealloc import DiskImage
from imgprealloc import Mode
from imgprealloc import Pace
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc import lock
from imgprealloc import qemu_img
from imgprealloc import sizes
from imgprealloc.filesystem import Filesystem

from . import in_format
from .host import SIZE
from .host import Call
from .host import Host
from .host import limited

NFS = Filesystem("nfs", fallocate=False, copy_on_write=False)
ZFS = Filesystem("zfs", fallocate=False, copy_on_write=True)

# How it is configured.


def test_it_holds_space_unless_told_otherwise() -> None:
    made = Preallocator()

    assert (made.mode, made.on_unsupported, made.overlay_cluster_size) == ("falloc", "metadata", 131072)


@pytest.mark.parametrize("mode", ["off", "space", "", None, "FALLOC"])
def test_mode_that_does_not_exist_is_refused_at_once(mode: Any) -> None:
    with pytest.raises(ValueError, match="is not one of falloc, full, metadata"):
        Preallocator(mode)


@pytest.mark.parametrize("fallback", ["falloc", "warn", "", None])
def test_fallback_that_does_not_exist_is_refused_at_once(fallback: Any) -> None:
    with pytest.raises(ValueError, match="is not one of metadata, full, error"):
        Preallocator(on_unsupported=fallback)


@pytest.mark.parametrize("size", [0, -16384, 8192, 16383, 100000, 131073, 4 << 20])
def test_cluster_size_that_qemu_would_refuse_is_refused_at_once(size: int) -> None:
    with pytest.raises(ValueError, match=f"overlay_cluster_size {size} is not one of 16384, .*2097152"):
        Preallocator(overlay_cluster_size=size)


@pytest.mark.parametrize("size", [16 << 10, 64 << 10, 2 << 20])
def test_every_cluster_size_that_subclusters_can_have_is_accepted(size: int) -> None:
    assert Preallocator(overlay_cluster_size=size).overlay_cluster_size == size


def test_every_public_name_is_there() -> None:
    assert all(hasattr(imgprealloc, name) for name in imgprealloc.__all__)


# Which format is taken.


def test_caller_s_format_wins_over_what_the_file_looks_like(host: Host) -> None:
    # A raw disk to which its guest has written a qcow2 header.
    path = host.qcow2()

    image = Preallocator().preallocate(path, format="raw")

    assert image.format == "raw"
    assert host.run("info", "check") == []


@pytest.mark.parametrize("verb", ["inspect", "preallocate"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_format_is_detected_only_where_none_is_named(host: Host, verb: str, format: str) -> None:
    path = host.raw() if format == "raw" else host.qcow2(mapped=1.0)

    assert getattr(Preallocator(), verb)(path).format == format

    # Once, and not by QEMU where the magic tells; from then on it is named.
    asked = [(call.after("-f"), call.limits) for call in host.run("info")]
    assert asked == ([(None, limited(qemu_img.LIMITS))] if format == "raw" else [])


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_is_not_grown_under_a_format_that_was_only_detected(host: Host, format: str) -> None:
    path = host.raw() if format == "raw" else host.qcow2(mapped=1.0)
    before = host.content(path)

    with pytest.raises(exceptions.FormatNotCertain, match=f"--disk-format {format}") as caught:
        Preallocator().resize(path, 2 * SIZE)

    assert (caught.value.path, caught.value.guess) == (path, format)
    assert host.changes == []
    assert host.content(path) == before


def test_format_that_is_named_is_not_looked_for(host: Host) -> None:
    assert in_format.raw().inspect(host.qcow2()).format == "raw"
    assert all(call.after("-f") == "raw" for call in host.calls)


@pytest.mark.parametrize("format", ["vmdk", "luks", "qed", ""])
def test_format_that_is_not_ours_is_refused_before_anything_runs(host: Host, format: str) -> None:
    path = host.raw()

    with pytest.raises(exceptions.UnsupportedFormat, match="raw or qcow2"):
        Preallocator().create(host.path("new"), SIZE, format=format or "none")
    with pytest.raises(exceptions.UnsupportedFormat, match="raw or qcow2"):
        Preallocator().preallocate(path, format=format or "none")

    assert host.calls == []


def test_detected_format_that_is_not_ours_is_refused(host: Host) -> None:
    path = host.raw()
    host.amend["info"] = lambda answer: answer.update(format="vmdk")

    with pytest.raises(exceptions.UnsupportedFormat, match="its format is vmdk"):
        Preallocator().preallocate(path)

    assert host.changes == []


def test_strategy_for_a_format_is_configured_like_the_one_that_was_asked(host: Host) -> None:
    host.filesystem = NFS
    path = host.overlay()

    Preallocator("falloc", on_unsupported="full", overlay_cluster_size=65536).preallocate(path, format="qcow2")

    [create] = host.run("create")
    assert (create.options["preallocation"], create.options["cluster_size"]) == ("full", "65536")


def test_new_disk_is_qcow2_unless_told_otherwise(host: Host) -> None:
    assert Preallocator().create(host.path(), SIZE).format == "qcow2"
    assert in_format.raw().create(host.path("other"), SIZE).format == "raw"


@pytest.mark.parametrize("verb", ["inspect", "preallocate"])
def test_path_may_be_a_path_object(host: Host, verb: str) -> None:
    path = host.raw(held=SIZE)

    assert getattr(Preallocator(), verb)(pathlib.Path(path)).path == path


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_relative_path_works_and_stays_as_it_was_named(
    host: Host, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.chdir(host.folder)

    created = Preallocator().create("disk", SIZE, format=format)
    resized = Preallocator().resize("disk", 2 * SIZE, format=format)

    assert (created.path, resized.path) == ("disk", "disk")
    assert (created.state, resized.state) == ("preallocated", "preallocated")


# Sizes.


@pytest.mark.parametrize("size", [0, -1, -SIZE])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_without_a_size_is_refused_before_anything_runs(host: Host, format: str, size: int) -> None:
    with pytest.raises(exceptions.InvalidSize, match=f"{size} bytes are no size"):
        Preallocator().create(host.path(), size, format=format)

    assert host.calls == []
    assert host.files == []


@pytest.mark.parametrize("size", [SIZE, SIZE - 1, 1, 0, -1])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_can_only_grow(host: Host, format: str, size: int) -> None:
    path = host.raw() if format == "raw" else host.qcow2(mapped=1.0)

    with pytest.raises(exceptions.InvalidSize):
        Preallocator().resize(path, size, format=format)

    assert host.changes == []


@pytest.mark.parametrize("odd", [1, 511, 513])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_grows_to_whole_sectors(host: Host, format: str, odd: int) -> None:
    path = host.raw(held=SIZE) if format == "raw" else host.qcow2(mapped=1.0)

    image = Preallocator().resize(path, SIZE + odd, format=format)

    assert image.virtual_size == SIZE + -(-odd // 512) * 512


@pytest.mark.parametrize("odd", [1, 511, 513])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_new_disk_has_whole_sectors(host: Host, format: str, odd: int) -> None:
    image = Preallocator().create(host.path(), SIZE + odd, format=format)

    assert (image.virtual_size, image.state) == (SIZE + -(-odd // 512) * 512, "preallocated")


@pytest.mark.parametrize("odd", [1, 511, 513])
def test_new_overlay_has_whole_sectors(host: Host, odd: int) -> None:
    image = Preallocator().create(host.path(), SIZE + odd, host.base(SIZE // 2), backing_format="raw")

    assert (image.virtual_size, image.state) == (SIZE + -(-odd // 512) * 512, "preallocated")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_create_overwrites_nothing(host: Host, format: str) -> None:
    path = host.raw(held=SIZE)

    with pytest.raises(exceptions.DiskExists, match=path):
        Preallocator().create(path, SIZE, format=format)

    assert host.calls == []


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "FIFO"])
def test_create_does_not_advise_to_remove_what_is_no_disk(host: Host, make: Callable[[str], None]) -> None:
    make(host.path())

    with pytest.raises(exceptions.DiskNotFound, match="it is not a regular file"):
        Preallocator().create(host.path(), SIZE)

    assert host.calls == []


def test_create_follows_no_link_to_nowhere(host: Host) -> None:
    os.symlink(host.path("nowhere"), host.path())

    with pytest.raises(exceptions.DiskExists):
        Preallocator().create(host.path(), SIZE)

    assert host.files == ["disk"]


# What the system refuses.


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda path: Preallocator().inspect(path), id="inspect"),
        pytest.param(lambda path: Preallocator().create(path, SIZE), id="create"),
        pytest.param(lambda path: Preallocator().preallocate(path), id="preallocate"),
        pytest.param(lambda path: Preallocator().resize(path, SIZE), id="resize"),
    ],
)
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_every_verb_tells_what_the_system_refuses_by_the_disk_s_name(
    host: Host, work: Callable[[object], object], kind: Callable[[str], object]
) -> None:
    # A file where a folder should be.
    path = os.path.join(host.raw(), "disk")

    with pytest.raises(exceptions.FileError, match="Not a directory") as caught:
        work(kind(path))

    assert caught.value.path == path


# A disk that is in use.


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_in_use_is_not_grown(host: Host, opened: Callable[[str], object], format: str) -> None:
    path = host.raw() if format == "raw" else host.qcow2(mapped=1.0)
    opened(path)

    with pytest.raises(exceptions.ImageInUse):
        Preallocator().resize(path, 2 * SIZE, format=format)

    assert host.changes == []


# What it does by itself, and what it says.


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_second_call_runs_nothing_that_writes(host: Host, format: str, mode: Mode) -> None:
    path = host.raw() if format == "raw" else host.overlay()
    first = Preallocator(mode).preallocate(path, format=format)
    host.calls.clear()

    second = Preallocator(mode).preallocate(path, format=format)

    assert host.changes == []
    assert second == first


def test_second_look_at_a_preallocated_disk_asks_nothing_of_the_filesystem(host: Host) -> None:
    path = host.qcow2(mapped=1.0)
    host.filesystem = NFS

    image = Preallocator(on_unsupported="error").preallocate(path)

    assert image.state == "preallocated"


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_what_comes_back_is_what_was_found_and_not_what_was_asked_for(host: Host, format: str) -> None:
    path = host.path()

    image = Preallocator().create(path, SIZE, format=format)

    assert image == Preallocator().inspect(path, format=format)
    assert isinstance(image, DiskImage)


def test_one_line_tells_what_was_done_to_a_disk(host: Host, logged: Callable[[int], list[str]]) -> None:
    path = host.overlay()

    in_format.qcow2().preallocate(path)

    [line] = logged(logging.INFO)
    assert line.startswith(f"{path}: mode falloc, thin before, preallocated now, ")
    assert logged(logging.WARNING) == []


@pytest.mark.parametrize(
    ("work", "before"),
    [
        (lambda host: Preallocator().create(host.path("new"), SIZE), "absent before"),
        (lambda host: in_format.qcow2().preallocate(host.overlay(), "just_made"), "blank before"),
        (lambda host: Preallocator().preallocate(host.qcow2(mapped=1.0, held=0)), "mapped before"),
        (lambda host: in_format.raw().resize(host.raw(held=SIZE), 2 * SIZE), "preallocated before"),
    ],
)
def test_line_tells_how_the_disk_was_before(
    host: Host, logged: Callable[[int], list[str]], work: Callable[[Host], object], before: str
) -> None:
    work(host)

    [line] = logged(logging.INFO)
    assert before in line


def test_nothing_done_is_nothing_said(host: Host, logged: Callable[[int], list[str]]) -> None:
    Preallocator().preallocate(host.qcow2(mapped=1.0))

    assert logged(logging.INFO) == []
    assert logged(logging.WARNING) == []


# A promise that is not kept.


def test_filesystem_that_breaks_its_word_is_found_out(host: Host) -> None:
    host.honest = False

    with pytest.raises(exceptions.NotPreallocated) as caught:
        Preallocator().create(host.path(), SIZE)

    assert (caught.value.image.path, caught.value.path) == (host.path(), host.path())
    assert (caught.value.image.state, caught.value.image.shortfall > SIZE) == ("mapped", True)
    assert f"{sizes.exact(caught.value.image.shortfall)} short" in caught.value.reason
    assert host.files == []


def test_disk_is_not_replaced_by_one_that_is_not_what_was_promised(host: Host) -> None:
    path = host.overlay()
    before = os.stat(path)
    host.honest = False

    with pytest.raises(exceptions.NotPreallocated):
        in_format.qcow2().preallocate(path)

    assert os.stat(path) == before
    assert host.files == ["base", "disk"]


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda host: in_format.raw().preallocate(host.raw()), id="raw"),
        pytest.param(lambda host: in_format.qcow2().preallocate(host.overlay()), id="blank overlay"),
        pytest.param(lambda host: in_format.qcow2().preallocate(host.qcow2(mapped=1.0, held=0)), id="mapped"),
        pytest.param(lambda host: in_format.qcow2().preallocate(host.qcow2(mapped=0.5)), id="reserve"),
        pytest.param(
            lambda host: in_format.qcow2().preallocate(host.qcow2(mapped=0.5), existing="rewrite"), id="rewrite"
        ),
        pytest.param(lambda host: in_format.qcow2().resize(host.qcow2(mapped=1.0), 2 * SIZE), id="grow"),
        pytest.param(lambda host: in_format.raw().resize(host.raw(held=SIZE), 2 * SIZE), id="grow raw"),
    ],
)
def test_whatever_was_done_is_looked_at_again(host: Host, work: Callable[[Host], object]) -> None:
    host.honest = False

    with pytest.raises(exceptions.NotPreallocated):
        work(host)


def test_filesystem_that_promised_nothing_gives_a_warning_and_no_error(
    host: Host, logged: Callable[[int], list[str]]
) -> None:
    host.filesystem = ZFS

    for name in ("disk", "disk.local"):
        image = in_format.raw("full").create(host.path(name), SIZE)

    assert image.state == "thin"
    assert [line.startswith(host.path("disk")) for line in logged(logging.WARNING)] == [True, True]


def test_same_disk_falling_short_again_is_no_second_warning(host: Host, logged: Callable[[int], list[str]]) -> None:
    host.filesystem = ZFS
    in_format.raw("full").create(host.path(), SIZE)
    os.unlink(host.path())

    in_format.raw("full").create(host.path(), SIZE)

    assert len(logged(logging.WARNING)) == 1


# A filesystem without fallocate.


@pytest.mark.parametrize("under", [NFS, ZFS], ids=["nfs", "zfs"])
def test_on_unsupported_metadata_maps_the_clusters_and_warns_once(
    host: Host, logged: Callable[[int], list[str]], under: Filesystem
) -> None:
    host.filesystem = under

    images = [Preallocator().create(host.path(name), SIZE) for name in ("disk", "disk.local")]

    assert [image.state for image in images] == ["mapped", "mapped"]
    assert {call.options["preallocation"] for call in host.run("create")} == {"metadata"}
    assert len(logged(logging.WARNING)) == 1
    assert host.run("fallocate", "zeros") == []


def test_on_unsupported_full_writes_the_zeros_itself(host: Host) -> None:
    host.filesystem = NFS

    image = Preallocator(on_unsupported="full").create(host.path(), SIZE)

    assert image.state == "preallocated"
    assert host.run("create")[0].options["preallocation"] == "full"
    assert host.run("fallocate") == []


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda host: Preallocator(on_unsupported="error").create(host.path("new"), SIZE), id="create"),
        pytest.param(lambda host: Preallocator(on_unsupported="error").preallocate(host.raw()), id="raw"),
        pytest.param(lambda host: in_format.qcow2(on_unsupported="error").preallocate(host.overlay()), id="blank"),
        pytest.param(
            lambda host: in_format.qcow2(on_unsupported="error").preallocate(host.qcow2(mapped=0.5)), id="data"
        ),
        pytest.param(lambda host: in_format.raw(on_unsupported="error").resize(host.raw(), 2 * SIZE), id="resize"),
    ],
)
def test_on_unsupported_error_changes_nothing(host: Host, work: Callable[[Host], object]) -> None:
    host.filesystem = NFS

    with pytest.raises(exceptions.UnsupportedFilesystem):
        work(host)

    assert host.changes == []
    assert not {"new", ".disk.imgprealloc"} & set(host.files)


# How programs are called.


def test_every_program_speaks_c_and_every_look_is_limited_and_names_the_format(host: Host) -> None:
    host.raw(SIZE, name="copied", held=SIZE, shared=4096)
    Preallocator().preallocate(host.path("copied"), format="raw")
    Preallocator().preallocate(host.overlay(name="new"), format="qcow2")
    Preallocator().resize(host.path("new"), 2 * SIZE, format="qcow2")
    Preallocator().preallocate(host.overlay(mapped=0.5), existing="rewrite", format="qcow2")
    in_format.raw("full").preallocate(host.raw(name="written"))

    assert {call.name for call in host.calls} >= {
        "check", "create", "convert", "resize", "fallocate", "unshare", "zeros", "sync",
    }  # fmt: skip
    assert all(call.kwargs["env_variables"]["LC_ALL"] == "C" for call in host.calls)
    assert all(call.limits == limited(qemu_img.CHECK_LIMITS) for call in host.run("check"))
    assert all(call.after("-f") for call in host.run("check"))
    assert host.run("info") == []


@pytest.mark.parametrize("program", ["qemu-img", "fallocate", "sync"])
def test_missing_program_leaves_nothing_half_made(host: Host, program: str) -> None:
    host.uninstall(program)

    with pytest.raises(exceptions.ProgramMissing, match=f"{program} could not be started"):
        Preallocator().create(host.path(), SIZE)

    assert host.files == []


@pytest.mark.parametrize("folder", ["a,b", "ä ö", "-x", "a=b", "it's"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_odd_names_work(host: Host, folder: str, format: str) -> None:
    host.folder = host.path(folder)
    os.mkdir(host.folder)
    path = host.path("disk,1")
    host.base(SIZE // 2, name="base,1")

    backing = None if format == "raw" else host.path("base,1")
    created = Preallocator().create(path, SIZE, backing, format=format, backing_format=backing and "raw")
    resized = Preallocator().resize(path, 2 * SIZE, format=format)

    assert (created.state, resized.state) == ("preallocated", "preallocated")
    assert host.files == ["base,1", "disk,1"]


def test_programs_are_given_what_was_opened_and_no_names_that_others_can_move(host: Host) -> None:
    in_format.raw().preallocate(host.raw(SIZE, name="copied", held=SIZE, shared=4096))
    in_format.raw("full").preallocate(host.raw(name="written"))
    in_format.qcow2().preallocate(host.overlay(name="new"))
    in_format.qcow2().resize(host.path("new"), 2 * SIZE)
    in_format.qcow2().preallocate(host.overlay(name="kept", mapped=0.5), existing="rewrite")

    opened = f"/proc/{os.getpid()}/fd/"
    own = [host.path(name) for name in ("copied", "written", "new", "kept")]
    for call in host.calls:
        if call.name == "zeros":
            # Gets it as its standard input, and the disk's name for the text of an error.
            assert call.stdin is not None
            assert os.path.samestat(call.stdin, os.stat(host.path("written")))
            continue
        words = call.argv
        if call.name != "--version":
            assert any(opened in word for word in words), call.argv
        assert not [word for word in words for name in own if name in word], call.argv


# A program that says that it has done it.


def doing_nothing(host: Host, name: str) -> None:
    host.answers[name] = lambda call: ""


@pytest.mark.parametrize(
    ("ask", "wanted"),
    [
        (lambda host: in_format.raw().create(host.path("new"), SIZE), f"a virtual_size of {SIZE}, .* and made 0"),
        (
            lambda host: in_format.qcow2().create(host.path("new"), SIZE),
            "a disk in the format qcow2, .* and made none",
        ),
        (lambda host: in_format.qcow2().preallocate(host.overlay()), "a disk in the format qcow2, .* and made none"),
    ],
)
def test_create_that_did_nothing_becomes_no_disk(host: Host, ask: Callable[[Host], object], wanted: str) -> None:
    doing_nothing(host, "create")
    doing_nothing(host, "resize")

    with pytest.raises(exceptions.BrokenImage, match=wanted):
        ask(host)

    assert not [name for name in host.files if name == "new" or "imgprealloc" in name]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"virtual_size": SIZE // 2}, "virtual_size"),
        ({"backing_file": None}, "backing_file"),
        ({"backing_format": "qcow2"}, "backing_format"),
        ({"cluster_size": 65536}, "cluster_size"),
    ],
)
@pytest.mark.parametrize("program", ["create", "convert"])
def test_disk_that_is_not_what_was_asked_for_does_not_become_the_disk(
    host: Host, program: str, change: dict[str, object], field: str
) -> None:
    path = host.overlay(mapped=0.5 if program == "convert" else None, base=SIZE)
    before = (os.stat(path).st_ino, host.content(path))
    make = host.answers[program]

    def another(call: Call) -> str:
        said = make(call)
        for name, value in change.items():
            path = call.argv[-1] if program == "convert" else call.argv[-2]
            setattr(host.disk(path), name, value)
            host.rewrite_header(path)
        return said

    host.answers[program] = another

    with pytest.raises(exceptions.BrokenImage, match=f"was asked for a {field} of .*, said that it was done"):
        in_format.qcow2().preallocate(path, existing="rewrite")

    assert (os.stat(path).st_ino, host.content(path)) == before
    assert host.files == ["base", "disk"]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_resize_that_did_nothing_is_an_error(host: Host, format: str) -> None:
    path = host.raw(held=SIZE) if format == "raw" else host.qcow2(mapped=1.0)
    doing_nothing(host, "resize")

    with pytest.raises(exceptions.BrokenImage, match=rf"{2 * SIZE} bytes\), and it has .*\({SIZE} bytes\)"):
        Preallocator().resize(path, 2 * SIZE, format=format)


# What a crash has left beside a disk.


def leave(host: Host, name: str = "disk") -> str:
    path = host.path(f".{name}.imgprealloc")
    with open(path, "wb") as file:
        os.fchmod(file.fileno(), 0o1600)
    return path


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda host: in_format.raw().preallocate(host.raw()), id="preallocate"),
        pytest.param(lambda host: in_format.raw().preallocate(host.raw(held=SIZE)), id="nothing to do"),
        pytest.param(lambda host: in_format.raw("metadata").preallocate(host.raw()), id="metadata"),
        pytest.param(lambda host: in_format.qcow2().preallocate(host.qcow2(mapped=1.0), "reserve"), id="reserve"),
        pytest.param(lambda host: Preallocator().preallocate(host.raw()), id="under a guess"),
        pytest.param(lambda host: in_format.qcow2().preallocate(host.qcow2(), "just_made"), id="just made"),
        pytest.param(lambda host: in_format.raw().resize(host.raw(held=SIZE), 2 * SIZE), id="resize"),
        pytest.param(lambda host: in_format.raw().create(host.path(), SIZE), id="create"),
    ],
)
def test_every_verb_that_writes_removes_what_a_crash_has_left(host: Host, work: Callable[[Host], object]) -> None:
    leave(host)

    work(host)

    assert host.files == ["disk"]


def test_look_removes_nothing(host: Host) -> None:
    left = leave(host)

    in_format.raw().inspect(host.raw())

    assert os.path.exists(left)


# Two at one disk.


@pytest.mark.parametrize("verb", ["preallocate", "resize"])
def test_disk_that_another_call_works_on_is_refused(host: Host, verb: str) -> None:
    path = host.raw()
    refused: list[exceptions.ImageInUse] = []

    def second() -> None:
        with pytest.raises(exceptions.ImageInUse, match="another imgprealloc") as caught:
            getattr(in_format.raw(), verb)(path, *([2 * SIZE] if verb == "resize" else []))
        refused.append(caught.value)

    host.then["fallocate"] = second

    assert in_format.raw().preallocate(path).state == "preallocated"
    assert len(refused) == 1


def test_disk_that_comes_into_being_while_one_is_made_is_not_overwritten(host: Host) -> None:
    host.then["create"] = lambda: host.raw(512)

    with pytest.raises(exceptions.DiskExists, match="meanwhile"):
        in_format.qcow2().create(host.path(), SIZE)

    assert os.path.getsize(host.path()) == 512
    assert host.files == ["disk"]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_that_is_open_without_a_lock_is_not_grown(host: Host, format: str) -> None:
    # A guest that is being restored.
    path = host.raw() if format == "raw" else host.qcow2(mapped=1.0)

    with (
        fixtures.MockPatchObject(lock, "_PAUSE", 0),
        open(path, "rb"),
        pytest.raises(exceptions.ImageInUse, match="has the file open"),
    ):
        Preallocator().resize(path, 2 * SIZE, format=format)

    assert host.changes == []


# What a caller may give.


@pytest.mark.parametrize("size", ["40G", True, 1.5, None])
@pytest.mark.parametrize("verb", ["create", "resize"])
def test_size_that_is_no_number_of_bytes_is_a_type_error_before_anything_is_looked_at(
    host: Host, verb: str, size: Any
) -> None:
    with pytest.raises(TypeError, match="a size is an int of bytes"):
        getattr(Preallocator(), verb)(host.path(), size)

    assert host.calls == []


VERBS: list[Callable[[Any], DiskImage]] = [
    lambda path: Preallocator().inspect(path, format="raw"),
    lambda path: Preallocator().preallocate(path, format="raw"),
    lambda path: Preallocator().resize(path, 2 * SIZE, format="raw"),
    lambda path: Preallocator().create(path, SIZE, format="raw"),
    lambda path: Preallocator().thin(path, format="raw"),
]


@pytest.mark.parametrize("verb", VERBS[:4])
def test_path_of_bytes_is_a_path(host: Host, verb: Callable[[Any], DiskImage]) -> None:
    path = host.path("dïsk") if verb is VERBS[3] else host.raw(name="dïsk")

    image = verb(os.fsencode(path))

    assert image.path == path


@pytest.mark.parametrize("path", [7, None, True])
@pytest.mark.parametrize("verb", VERBS)
def test_path_that_is_none_is_a_type_error(host: Host, verb: Callable[[Any], DiskImage], path: Any) -> None:
    with pytest.raises(TypeError, match=f"not {type(path).__name__}"):
        verb(path)


def test_backing_file_of_bytes_is_one(host: Host) -> None:
    image = Preallocator().create(host.path(), SIZE, os.fsencode(host.base(SIZE)), backing_format="raw")

    assert image.backing_file == host.path("base")


def test_every_error_and_every_word_that_is_taken_is_exported() -> None:
    errors = {
        name
        for name, found in vars(exceptions).items()
        if isinstance(found, type) and issubclass(found, Exception) and found.__module__ == exceptions.__name__
    }
    words = {"Mode", "OnUnsupported", "OverlaySubclusters", "Existing", "State", "Progress", "Pace"}

    assert errors | words <= set(imgprealloc.__all__)
    assert all(hasattr(imgprealloc, name) for name in imgprealloc.__all__)


# At a pace.


def test_zeros_are_written_by_ourselves_where_a_pace_is_kept_because_qemu_img_keeps_none(host: Host) -> None:
    Preallocator("full").create(host.path(), SIZE, format="raw", pace=Pace(10 << 20))

    assert host.run("create")[0].options["preallocation"] == "falloc"
    [zeros] = host.run("zeros")
    assert zeros.argv[-1] == str(10 << 20)
    assert zeros.is_idle


def test_zeros_are_qemu_img_s_where_no_pace_is_kept(host: Host) -> None:
    Preallocator("full").create(host.path(), SIZE, format="raw")

    assert host.run("create")[0].options["preallocation"] == "full"
    assert host.run("zeros") == []


@pytest.mark.parametrize("pace", [None, Pace()])
def test_pace_asks_for_nothing_else_in_mode_falloc(host: Host, pace: Pace | None) -> None:
    Preallocator().create(host.path(), SIZE, format="raw", pace=pace)

    assert host.run("create")[0].options["preallocation"] == "falloc"
    assert host.run("zeros") == []


def test_rate_is_refused_where_qemu_img_alone_can_write_all_space(host: Host) -> None:
    host.filesystem = NFS

    with pytest.raises(exceptions.UnsupportedFilesystem, match="--rate"):
        Preallocator("full").create(host.path(), SIZE, format="raw", pace=Pace(1))
    Preallocator("full").create(host.path(), SIZE, format="raw", pace=Pace())

    assert host.run("create")[0].options["preallocation"] == "full"


# What is set aside already, in mode full.


@pytest.mark.parametrize("existing", ["recreate_blank", "rewrite", "reserve", "just_made"])
def test_start_writes_nothing_to_what_is_set_aside(host: Host, existing: Any) -> None:
    path = host.raw(SIZE, held=SIZE)

    Preallocator("full").preallocate(path, existing, format="raw", write_held=False)

    assert host.changes == []
