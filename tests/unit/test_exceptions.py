# SPDX-License-Identifier: Apache-2.0
"""Each error, as the library itself comes to raise it."""

from __future__ import annotations

from collections.abc import Callable
import copy
import errno
import inspect
import os
import pickle

import fixtures
from oslo_concurrency import processutils
import pytest

from imgprealloc import PreallocationError
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc import replacement
from imgprealloc.filesystem import Filesystem

from . import in_format
from .host import ENOSPC
from .host import SIZE
from .host import Host
from .host import opened_by_qemu


def not_found(host: Host) -> None:
    Preallocator().inspect(host.path())


def is_link(host: Host) -> None:
    host.overlay(name="elsewhere")
    os.symlink(host.path("elsewhere"), host.path())
    in_format.qcow2().preallocate(host.path())


def foreign(host: Host) -> None:
    path = host.overlay()
    ours = os.stat(path).st_uid + 1
    with (
        fixtures.MockPatchObject(os, "geteuid", lambda: ours),
        fixtures.MockPatchObject(replacement, "_owner_of_new_files", lambda place: ours),
    ):
        in_format.qcow2().preallocate(path)


def in_the_way(host: Host) -> None:
    with open(host.path(".disk.imgprealloc"), "w") as file:
        file.write("somebody's")
    Preallocator().create(host.path(), SIZE)


def not_certain(host: Host) -> None:
    Preallocator().resize(host.raw(), 2 * SIZE)


def exists(host: Host) -> None:
    Preallocator().create(host.raw(), SIZE)


def invalid_size(host: Host) -> None:
    Preallocator().resize(host.raw(), SIZE, format="raw")


def refused(host: Host) -> None:
    Preallocator().create(host.path("disk/none/disk"), SIZE)


def in_use(host: Host) -> None:
    path = host.overlay()
    with opened_by_qemu(path):
        in_format.qcow2().preallocate(path, "rewrite")


def unsupported_format(host: Host) -> None:
    Preallocator().inspect(host.qcow2(encrypted=True))


def mismatch(host: Host) -> None:
    in_format.qcow2().inspect(host.raw())


def no_base(host: Host) -> None:
    Preallocator().create(host.path(), SIZE, host.path("none"), backing_format="raw")


def broken(host: Host) -> None:
    Preallocator().inspect(host.qcow2(corruptions=1))


def unsupported_filesystem(host: Host) -> None:
    host.filesystem = Filesystem("nfs", fallocate=False, copy_on_write=False)
    Preallocator(on_unsupported="error").create(host.path(), SIZE)


def missing(host: Host) -> None:
    host.uninstall("qemu-img")
    Preallocator().create(host.path(), SIZE)


def too_old(host: Host) -> None:
    host.version = "5.1.0"
    Preallocator().create(host.path(), SIZE, host.base(SIZE), backing_format="raw")


def killed(host: Host) -> None:
    path = host.qcow2(mapped=0.5)
    host.ends("check", -9)
    in_format.qcow2().inspect(path)


def not_preallocated(host: Host) -> None:
    host.honest = False
    Preallocator().create(host.path(), SIZE)


def failed(host: Host) -> None:
    host.ends("create", 1, "qemu-img: Permission denied\n")
    Preallocator().create(host.path(), SIZE)


def no_space(host: Host) -> None:
    path = host.raw()
    host.ends("fallocate", 1, f"fallocate: fallocate failed: {ENOSPC}\n")
    Preallocator().preallocate(path)


def no_room_for_a_file(host: Host) -> None:
    real = os.open

    def full(path: str, flags: int, *mode: int, **how: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return real(path, flags, *mode, **how)

    with fixtures.MockPatchObject(os, "open", full):
        Preallocator().create(host.path(), SIZE)


def no_space_foreseen(host: Host) -> None:
    host.available = 0
    Preallocator().create(host.path(), SIZE)


ERRORS: list[tuple[type[PreallocationError], Callable[[Host], None]]] = [
    (exceptions.DiskNotFound, not_found),
    (exceptions.DiskExists, exists),
    (exceptions.DiskIsLink, is_link),
    (exceptions.OwnerNotKept, foreign),
    (exceptions.FileInTheWay, in_the_way),
    (exceptions.FormatNotCertain, not_certain),
    (exceptions.InvalidSize, invalid_size),
    (exceptions.FileError, refused),
    (exceptions.ImageInUse, in_use),
    (exceptions.UnsupportedFormat, unsupported_format),
    (exceptions.FormatMismatch, mismatch),
    (exceptions.BackingFileUnusable, no_base),
    (exceptions.BrokenImage, broken),
    (exceptions.UnsupportedFilesystem, unsupported_filesystem),
    (exceptions.ProgramMissing, missing),
    (exceptions.QemuImgTooOld, too_old),
    (exceptions.ProgramKilled, killed),
    (exceptions.NotPreallocated, not_preallocated),
    (exceptions.CommandFailed, failed),
    (exceptions.NoSpace, no_space),
    (exceptions.NoSpace, no_space_foreseen),
    (exceptions.NoSpace, no_room_for_a_file),
]

each_error = pytest.mark.parametrize(("kind", "provoke"), ERRORS, ids=lambda value: value.__name__)


def raised(kind: type[PreallocationError], provoke: Callable[[Host], None], host: Host) -> PreallocationError:
    with pytest.raises(kind) as caught:
        provoke(host)
    return caught.value


def test_every_error_of_a_disk_is_provoked_here() -> None:
    tree = {
        value
        for _, value in inspect.getmembers(exceptions, inspect.isclass)
        if issubclass(value, PreallocationError) and value is not PreallocationError
    }

    assert {kind for kind, _ in ERRORS} == tree


@each_error
def test_error_is_exactly_of_its_kind(
    host: Host, kind: type[PreallocationError], provoke: Callable[[Host], None]
) -> None:
    assert type(raised(kind, provoke, host)) is kind


@each_error
def test_error_names_the_disk_what_was_found_and_a_way_out(
    host: Host, kind: type[PreallocationError], provoke: Callable[[Host], None]
) -> None:
    error = raised(kind, provoke, host)

    # Also of what goes wrong with the new file beside it.
    assert error.path.startswith(host.path())
    assert str(error) == f"{error.path}: {error.reason}. {error.remedy}"
    assert not error.reason.endswith(".")
    assert error.remedy.endswith(".")
    assert error.remedy[0].isupper()
    assert "None" not in str(error)


@each_error
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"]
)
def test_error_comes_whole_into_another_process(
    host: Host,
    kind: type[PreallocationError],
    provoke: Callable[[Host], None],
    copied: Callable[[PreallocationError], PreallocationError],
) -> None:
    error = raised(kind, provoke, host)

    found = copied(error)

    assert (type(found), str(found), vars(found)) == (kind, str(error), vars(error))


@each_error
def test_error_is_what_the_caller_of_the_library_catches(
    host: Host, kind: type[PreallocationError], provoke: Callable[[Host], None]
) -> None:
    with pytest.raises(PreallocationError):
        provoke(host)


@pytest.mark.parametrize("provoke", [failed, no_space, no_space_foreseen, no_room_for_a_file])
def test_failed_program_is_the_process_error_that_nova_reschedules_on(
    host: Host, provoke: Callable[[Host], None]
) -> None:
    with pytest.raises(processutils.ProcessExecutionError) as caught:
        provoke(host)

    assert caught.value.exit_code == 1
    assert ("Permission denied" if provoke is failed else ENOSPC) in str(caught.value.stderr)
    assert str(caught.value).startswith(host.path())


@pytest.mark.parametrize(
    ("provoke", "command"),
    [(failed, "qemu-img create -q -f qcow2"), (no_space, "fallocate -n -o 0")],
)
def test_failed_program_is_told_with_its_command(host: Host, provoke: Callable[[Host], None], command: str) -> None:
    with pytest.raises(exceptions.CommandFailed) as caught:
        provoke(host)

    assert str(caught.value.cmd).startswith(command)
    # The disk, or the new one beside it.
    assert str(caught.value.cmd).endswith((host.path(), f"{host.path('.disk.imgprealloc')} {SIZE}"))


@pytest.mark.parametrize("provoke", [failed, missing])
def test_error_of_a_program_keeps_its_cause(host: Host, provoke: Callable[[Host], None]) -> None:
    with pytest.raises(PreallocationError) as caught:
        provoke(host)

    assert isinstance(caught.value.__cause__, (OSError, processutils.ProcessExecutionError))


def test_error_that_nova_shall_not_reschedule_on_is_no_process_error() -> None:
    process_errors: set[type] = {kind for kind, _ in ERRORS if issubclass(kind, processutils.ProcessExecutionError)}

    assert process_errors == {exceptions.CommandFailed, exceptions.NoSpace}


@pytest.mark.parametrize("provoke", [refused, no_room_for_a_file])
def test_what_the_system_refuses_keeps_its_cause(host: Host, provoke: Callable[[Host], None]) -> None:
    with pytest.raises(PreallocationError) as caught:
        provoke(host)

    assert isinstance(caught.value.__cause__, OSError)


def test_what_the_system_refuses_is_told_with_its_reason_and_the_file(host: Host) -> None:
    error = raised(exceptions.FileError, refused, host)

    assert isinstance(error, exceptions.FileError)
    assert error.errno == errno.ENOENT
    assert "No such file or directory" in error.reason


def test_format_mismatch_can_be_caught_as_an_unsupported_format() -> None:
    assert issubclass(exceptions.FormatMismatch, exceptions.UnsupportedFormat)


def test_what_was_found_is_kept_with_the_promise_that_was_broken(host: Host) -> None:
    error = raised(exceptions.NotPreallocated, not_preallocated, host)

    assert isinstance(error, exceptions.NotPreallocated)
    assert (error.image.path, error.image.state) == (host.path(), "mapped")


def test_nova_that_is_not_known_is_told_with_all_its_faults() -> None:
    error = exceptions.IncompatibleNova(["Flat.cache: it is missing", "Qcow2.cache: it is missing"])

    assert error.faults == ("Flat.cache: it is missing", "Qcow2.cache: it is missing")
    assert all(fault in str(error) for fault in error.faults)
    assert "libvirt.LibvirtDriver" in str(error)
    # No disk is at fault, and no caller should carry on as if one were.
    assert not isinstance(error, PreallocationError)


@pytest.mark.parametrize("kind", list(dict.fromkeys(kind for kind, _ in ERRORS)))
def test_error_has_nothing_that_is_not_typed(kind: type[PreallocationError]) -> None:
    annotations = [str(told.annotation) for told in inspect.signature(kind).parameters.values()]

    assert not [told for told in annotations if "Any" in told or told == str(inspect.Parameter.empty)]


def test_error_stays_on_its_line_whatever_the_disk_is_called() -> None:
    error = exceptions.DiskNotFound("/a\nb\x1b[2J\udcff", "there is\nno such file", "Check the path.")

    assert str(error) == r"/a\nb\x1b[2J\udcff: there is\nno such file. Check the path."
