# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
import errno
import logging
import os

from oslo_concurrency import processutils
import pytest

from imgprealloc import exceptions
from imgprealloc import terms
from imgprealloc.filesystem import Filesystem
from imgprealloc.terms import Terms

from .host import Host

EXT4 = Filesystem("ext4", fallocate=True, copy_on_write=False)
NFS = Filesystem("nfs", fallocate=False, copy_on_write=False)
BTRFS = Filesystem("btrfs", fallocate=True, copy_on_write=True)
ZFS = Filesystem("zfs", fallocate=False, copy_on_write=True)


@pytest.mark.parametrize("on_unsupported", terms.ON_UNSUPPORTED)
@pytest.mark.parametrize("mode", terms.MODES)
def test_a_filesystem_that_holds_space_is_asked_for_the_mode_itself(host: Host, mode: str, on_unsupported: str) -> None:
    assert terms.offered(host.path(), mode, on_unsupported) == Terms(mode, EXT4)


@pytest.mark.parametrize("on_unsupported", terms.ON_UNSUPPORTED)
@pytest.mark.parametrize("mode", ["full", "metadata"])
def test_modes_that_need_no_fallocate_have_no_fallback(host: Host, mode: str, on_unsupported: str) -> None:
    host.filesystem = NFS

    assert terms.offered(host.path(), mode, on_unsupported) == Terms(mode, NFS)


@pytest.mark.parametrize("fallback", ["metadata", "full"])
@pytest.mark.parametrize("under", [NFS, ZFS])
def test_falloc_falls_back_where_the_filesystem_cannot_hold_space(host: Host, under: Filesystem, fallback: str) -> None:
    host.filesystem = under

    assert terms.offered(host.path(), "falloc", fallback) == Terms(fallback, under)


def test_falloc_is_refused_where_it_cannot_be_kept_and_no_fallback_is_wanted(host: Host) -> None:
    host.filesystem = NFS

    with pytest.raises(exceptions.UnsupportedFilesystem, match="nfs filesystem"):
        terms.offered(host.path(), "falloc", "error")


def test_the_fallback_is_one_warning_a_folder_and_debug_from_then_on(
    host: Host, logged: Callable[[int], list[str]]
) -> None:
    host.filesystem = NFS

    for name in ("disk", "disk.local", "disk.swap"):
        terms.offered(host.path(name), "falloc", "metadata")

    assert len(logged(logging.WARNING)) == 1
    assert len(logged(logging.DEBUG)) == 2
    assert host.folder in logged(logging.WARNING)[0]
    assert "metadata instead of falloc" in logged(logging.WARNING)[0]


def test_another_folder_gets_a_warning_of_its_own(host: Host, logged: Callable[[int], list[str]]) -> None:
    host.filesystem = NFS

    terms.offered("/a/disk", "falloc", "metadata")
    terms.offered("/b/disk", "falloc", "metadata")

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
def test_space_is_promised_only_where_the_filesystem_can_hold_it(mode: str, under: Filesystem, holds: bool) -> None:
    assert Terms(mode, under).holds_space is holds
    assert ("mapped" in Terms(mode, under).states) is not holds


@pytest.mark.parametrize(("under", "nocow"), [(EXT4, {}), (BTRFS, {"nocow": "on"}), (ZFS, {})])
def test_nocow_is_asked_for_where_there_is_such_a_thing(under: Filesystem, nocow: dict[str, str]) -> None:
    assert Terms("falloc", under).nocow == nocow


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_system_call_without_space_fails_like_a_program_without_space(code: int) -> None:
    with pytest.raises(exceptions.NoSpace) as caught, terms.os_errors("/d/disk"):
        raise OSError(code, os.strerror(code), "/d/disk.imgprealloc")

    assert (caught.value.path, caught.value.exit_code) == ("/d/disk", 1)
    assert "/d/disk.imgprealloc" in caught.value.reason


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
def test_any_other_refusal_of_the_system_is_told_with_its_number(code: int) -> None:
    with pytest.raises(exceptions.FileError, match=os.strerror(code)) as caught, terms.os_errors("/d/disk"):
        raise OSError(code, os.strerror(code))

    assert (caught.value.path, caught.value.errno) == ("/d/disk", code)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EACCES, "permissions"),
        (errno.EPERM, "permissions"),
        (errno.ENOENT, "path"),
        (errno.ENOTDIR, "path"),
        (errno.ENAMETOOLONG, "path"),
        (errno.EMFILE, "open files"),
        (errno.ENFILE, "open files"),
        (errno.EIO, "kernel's log"),
        (errno.EROFS, "kernel's log"),
    ],
)
def test_what_to_do_next_fits_what_the_system_has_refused(code: int, remedy: str) -> None:
    with pytest.raises(exceptions.FileError) as caught, terms.os_errors("/d/disk"):
        raise OSError(code, os.strerror(code))

    assert remedy in caught.value.remedy
    assert ("permissions" in caught.value.remedy) is (remedy == "permissions")


def test_a_nul_in_a_path_is_an_error_with_the_disk_s_name() -> None:
    with pytest.raises(exceptions.FileError, match="NUL") as caught, terms.os_errors("/d/a\0b"):
        os.stat("/d/a\0b")

    assert (caught.value.path, caught.value.errno) == ("/d/a\0b", errno.EINVAL)


def test_a_nul_in_a_program_s_words_is_an_error_with_the_disk_s_name() -> None:
    with pytest.raises(exceptions.FileError, match="NUL") as caught, terms.os_errors("/d/disk"):
        processutils.execute("true", "/d/ba\0se")

    assert caught.value.path == "/d/disk"


def test_any_other_value_that_is_wrong_is_not_taken_for_the_system_s_refusal() -> None:
    with pytest.raises(ValueError, match="invalid literal"), terms.os_errors("/d/disk"):
        int("many")


def test_our_own_errors_pass_through_untouched() -> None:
    error = exceptions.CommandFailed("/d/disk", "qemu-img failed", "Look.")

    with pytest.raises(exceptions.CommandFailed) as caught, terms.os_errors("/elsewhere"):
        raise error

    assert caught.value is error


def test_what_just_fits_is_not_refused(host: Host) -> None:
    host.available = 1000

    terms.require_space(host.path(), 1000)


def test_what_does_not_fit_is_refused_in_the_words_of_a_failed_program(host: Host) -> None:
    host.available = 999

    with pytest.raises(exceptions.NoSpace) as caught:
        terms.require_space(host.path(), 1000)

    assert isinstance(caught.value, processutils.ProcessExecutionError)
    assert (caught.value.exit_code, caught.value.stderr) == (1, os.strerror(errno.ENOSPC))
    assert "1000 bytes more, and the filesystem has 999" in str(caught.value)
