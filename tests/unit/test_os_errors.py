# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import pathlib

from oslo_concurrency import processutils
import pytest

from imgprealloc import exceptions
from imgprealloc import os_errors


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_system_call_without_space_fails_like_a_program_without_space(code: int) -> None:
    with pytest.raises(exceptions.NoSpace) as caught, os_errors.translated("/d/disk"):
        raise OSError(code, os.strerror(code), "/d/.disk.imgprealloc")

    assert (caught.value.path, caught.value.exit_code) == ("/d/disk", 1)
    assert "/d/.disk.imgprealloc" in caught.value.reason


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
def test_any_other_refusal_of_the_system_is_told_with_its_number(code: int) -> None:
    with pytest.raises(exceptions.FileError, match=os.strerror(code)) as caught, os_errors.translated("/d/disk"):
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
    with pytest.raises(exceptions.FileError) as caught, os_errors.translated("/d/disk"):
        raise OSError(code, os.strerror(code))

    assert remedy in caught.value.remedy
    assert ("permissions" in caught.value.remedy) is (remedy == "permissions")


def test_nul_in_a_path_is_an_error_with_the_disk_s_name() -> None:
    with pytest.raises(exceptions.FileError, match="NUL") as caught, os_errors.translated("/d/a\0b"):
        os.stat("/d/a\0b")

    assert (caught.value.path, caught.value.errno) == ("/d/a\0b", errno.EINVAL)


def test_nul_in_a_program_s_words_is_an_error_with_the_disk_s_name() -> None:
    with pytest.raises(exceptions.FileError, match="NUL") as caught, os_errors.translated("/d/disk"):
        processutils.execute("true", "/d/ba\0se")

    assert caught.value.path == "/d/disk"


def test_any_other_value_that_is_wrong_is_not_taken_for_the_system_s_refusal() -> None:
    with pytest.raises(ValueError, match="invalid literal"), os_errors.translated("/d/disk"):
        int("many")


def test_our_own_errors_pass_through_untouched() -> None:
    error = exceptions.CommandFailed("/d/disk", "qemu-img failed", "Look.")

    with pytest.raises(exceptions.CommandFailed) as caught, os_errors.translated("/elsewhere"):
        raise error

    assert caught.value is error


def test_call_on_an_open_file_is_told_with_the_disk_and_not_with_a_number() -> None:
    with pytest.raises(exceptions.FileError) as caught, os_errors.translated("/d/disk"):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), 17)

    assert caught.value.reason == f"{os.strerror(errno.EOPNOTSUPP)} (/d/disk)"


def test_name_that_is_no_utf_8_can_be_told() -> None:
    with pytest.raises(exceptions.FileError) as caught, os_errors.translated("/d/disk"):
        raise OSError(errno.EIO, os.strerror(errno.EIO), b"/d/\xff")

    assert os.fsencode(caught.value.reason).endswith(b"(/d/\xff)")


def test_names_of_files_stand_where_programs_were_given_what_is_open(tmp_path: pathlib.Path) -> None:
    disk, other = tmp_path / "disk", tmp_path / "disk 2"
    with disk.open("wb") as first, other.open("wb") as second:
        names = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (first, second)]

        said = os_errors.shown(f"qemu-img: {names[0]}: no; '{names[1]}': neither")

    assert said == f"qemu-img: {disk}: no; '{other}': neither"


@pytest.mark.parametrize(
    "text", ["", "qemu-img: no", "/proc/1/fd/3", f"/proc/{os.getpid()}/fd/987654", f"/proc/{os.getpid()}/fd/"]
)
def test_what_stands_for_no_open_file_is_left_as_it_is(text: str) -> None:
    assert os_errors.shown(text) == text


def test_there_is_no_space_in_the_words_that_nova_knows() -> None:
    error = os_errors.no_space("/d/disk", "it needs more")

    assert isinstance(error, processutils.ProcessExecutionError)
    assert (error.exit_code, error.stderr) == (1, os.strerror(errno.ENOSPC))
