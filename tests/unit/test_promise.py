# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
import contextlib
import errno
import itertools
import logging
import os
from typing import Any, get_args

import fixtures
from oslo_concurrency import processutils
import pytest

from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc import promise
from imgprealloc.filesystem import Filesystem
from imgprealloc.promise import Promise
from imgprealloc.settings import Mode
from imgprealloc.settings import OnUnsupported

from .host import Host

EXT4 = Filesystem("ext4", fallocate=True, copy_on_write=False)
NFS = Filesystem("nfs", fallocate=False, copy_on_write=False)
BTRFS = Filesystem("btrfs", fallocate=True, copy_on_write=True)
ZFS = Filesystem("zfs", fallocate=False, copy_on_write=True)


def made(path: str, mode: Mode, on_unsupported: OnUnsupported) -> Promise:
    with disk_file.place(path) as place:
        return promise.made(place, mode, on_unsupported)


def require_space(path: str, needed: int) -> None:
    with disk_file.place(path) as place:
        Promise("falloc", EXT4).require_space(place, needed)


@pytest.mark.parametrize("on_unsupported", get_args(OnUnsupported))
@pytest.mark.parametrize("mode", get_args(Mode))
def test_filesystem_that_holds_space_is_asked_for_the_mode_itself(
    host: Host, mode: Mode, on_unsupported: OnUnsupported
) -> None:
    assert made(host.path(), mode, on_unsupported) == Promise(mode, EXT4)


@pytest.mark.parametrize("on_unsupported", get_args(OnUnsupported))
@pytest.mark.parametrize("mode", ["full", "metadata"])
def test_modes_that_need_no_fallocate_have_no_fallback(host: Host, mode: Mode, on_unsupported: OnUnsupported) -> None:
    host.filesystem = NFS

    assert made(host.path(), mode, on_unsupported) == Promise(mode, NFS)


@pytest.mark.parametrize("fallback", ["metadata", "full"])
@pytest.mark.parametrize("under", [NFS, ZFS])
def test_falloc_falls_back_where_the_filesystem_cannot_hold_space(host: Host, under: Filesystem, fallback: Any) -> None:
    host.filesystem = under

    assert made(host.path(), "falloc", fallback) == Promise(fallback, under)


def test_falloc_is_refused_where_it_cannot_be_kept_and_no_fallback_is_wanted(host: Host) -> None:
    host.filesystem = NFS

    with pytest.raises(exceptions.UnsupportedFilesystem, match="nfs filesystem"):
        made(host.path(), "falloc", "error")


def test_fallback_is_one_warning_a_folder_and_debug_from_then_on(
    host: Host, logged: Callable[[int], list[str]]
) -> None:
    host.filesystem = NFS

    for name in ("disk", "disk.local", "disk.swap"):
        made(host.path(name), "falloc", "metadata")

    assert len(logged(logging.WARNING)) == 1
    assert len(logged(logging.DEBUG)) == 2
    assert host.folder in logged(logging.WARNING)[0]
    assert "metadata instead of falloc" in logged(logging.WARNING)[0]


def test_folder_has_one_warning_by_whatever_name_it_is_called(host: Host, logged: Callable[[int], list[str]]) -> None:
    host.filesystem = NFS
    os.symlink(host.folder, f"{host.folder}-link")

    for folder in (host.folder, f"{host.folder}/", f"{host.folder}-link"):
        made(os.path.join(folder, "disk"), "falloc", "metadata")

    assert len(logged(logging.WARNING)) == 1


def test_another_folder_gets_a_warning_of_its_own(host: Host, logged: Callable[[int], list[str]]) -> None:
    host.filesystem = NFS

    for folder in ("a", "b"):
        os.mkdir(host.path(folder))
        made(host.path(f"{folder}/disk"), "falloc", "metadata")

    assert len(logged(logging.WARNING)) == 2


@pytest.mark.parametrize(
    ("mode", "under", "holds"),
    [
        ("falloc", EXT4, True),
        ("full", EXT4, True),
        ("metadata", EXT4, False),
        ("full", NFS, False),
        ("metadata", NFS, False),
        ("falloc", BTRFS, True),
        ("full", ZFS, False),
    ],
)
def test_space_is_promised_only_where_the_filesystem_can_hold_it(mode: Mode, under: Filesystem, holds: bool) -> None:
    assert Promise(mode, under).holds_space is holds
    assert ("mapped" in Promise(mode, under).states) is not holds


@pytest.mark.parametrize(("under", "nocow"), [(EXT4, {}), (BTRFS, {"nocow": "on"}), (ZFS, {})])
def test_nocow_is_asked_for_where_there_is_such_a_thing(under: Filesystem, nocow: dict[str, str]) -> None:
    assert Promise("falloc", under).nocow == nocow


def test_what_just_fits_is_not_refused(host: Host) -> None:
    host.available = 1000

    require_space(host.path(), 1000)


@pytest.mark.parametrize(
    ("plain", "answers", "fits"),
    [
        (False, [100, 600, 1000], True),
        (False, [100, 600, 600], False),
        (False, [100, 100, 1000], False),
        # ext4 has freed all that it will.
        (True, [100, 1000], False),
    ],
)
def test_filesystem_that_is_still_freeing_space_is_waited_for(
    host: Host, plain: bool, answers: list[int], fits: bool
) -> None:
    told = iter(answers)
    with (
        fixtures.MockPatchObject(filesystem, "available", lambda directory: next(told)),
        fixtures.MockPatchObject(filesystem, "is_plain", lambda fd: plain),
        contextlib.nullcontext() if fits else pytest.raises(exceptions.NoSpace),
    ):
        require_space(host.path(), 1000)


def test_filesystem_that_frees_space_without_end_is_not_waited_for_as_long(host: Host) -> None:
    grows = itertools.count(1)
    with (
        fixtures.MockPatchObject(promise, "_PATIENCE", 0),
        fixtures.MockPatchObject(filesystem, "available", lambda directory: next(grows)),
        fixtures.MockPatchObject(filesystem, "is_plain", lambda fd: False),
        pytest.raises(exceptions.NoSpace),
    ):
        require_space(host.path(), 10**9)


def test_what_does_not_fit_is_refused_in_the_words_of_a_failed_program(host: Host) -> None:
    host.available = 999

    with pytest.raises(exceptions.NoSpace) as caught:
        require_space(host.path(), 1000)

    assert isinstance(caught.value, processutils.ProcessExecutionError)
    assert (caught.value.exit_code, caught.value.stderr) == (1, os.strerror(errno.ENOSPC))
    assert "it needs 1000 bytes more, and the filesystem has 999 bytes" in str(caught.value)
