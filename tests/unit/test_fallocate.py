# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import errno
import os
import pathlib
import struct
import sys
from types import SimpleNamespace

import fixtures
from oslo_utils import units
import pytest

from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc.fallocate import Extent

from .host import ENOSPC
from .host import Programs

DISK = "/instances/1/disk"
# What a program gets.
NAME = "/proc/1/fd/7"

# linux/fiemap.h
LAST, UNKNOWN, DELALLOC, UNWRITTEN, MERGED, SHARED = 0x1, 0x2, 0x4, 0x800, 0x1000, 0x2000


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "disk"
    path.touch()
    return path


# The programs.


def test_reserving_fills_holes_and_keeps_the_length(programs: Programs, file: pathlib.Path) -> None:
    fallocate.reserve(DISK, str(file), 4096, units.Gi)

    [call] = programs.calls
    assert call.argv[0] == "fallocate"
    assert "-n" in call.argv
    assert (call.after("-o"), call.after("-l"), call.argv[-1]) == ("4096", str(units.Gi), str(file))
    # Nothing that would change what the file reads as.
    assert not {"-p", "-z", "-c", "-i", "-x", "-d"} & set(call.argv)


def test_small_stretch_is_reserved_without_a_process(programs: Programs, file: pathlib.Path) -> None:
    file.write_bytes(b"data")

    fallocate.reserve(DISK, str(file), 0, 128 * units.Ki)

    assert programs.calls == []
    assert file.read_bytes() == b"data"
    assert os.stat(file).st_blocks * 512 >= 128 * units.Ki


def test_stretch_is_filled_by_who_may_write_the_file_by_its_real_name(
    programs: Programs, file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    filled: list[tuple[object, ...]] = []
    link = tmp_path / "link"
    link.symlink_to(file)
    status = file.stat()

    with fallocate.filling_by(lambda *stretch: filled.append(stretch)):
        fallocate.reserve(str(link), str(file), 4096, units.Gi)
        fallocate.reserve(str(link), str(file), 0, 4096)

    named = (str(file), status.st_dev, status.st_ino)
    assert filled == [(*named, 4096, units.Gi), (*named, 0, 4096)]
    assert programs.calls == []
    assert file.stat().st_blocks == 0
    # The control, and that it is over.
    fallocate.reserve(str(link), str(file), 0, 4096)
    assert file.stat().st_blocks > 0


def test_failing_of_who_may_write_is_one_of_our_errors_and_the_system_s_stays_what_it_is(file: pathlib.Path) -> None:
    def fail(error: Exception) -> fallocate.Filler:
        def filler(*_: object) -> None:
            raise error

        return filler

    with (
        fallocate.filling_by(fail(RuntimeError("no daemon"))),
        pytest.raises(exceptions.FileError, match="no daemon") as caught,
    ):
        fallocate.reserve(str(file), str(file), 0, 4096)
    assert caught.value.path == str(file)
    full = OSError(errno.ENOSPC, ENOSPC)
    with fallocate.filling_by(fail(full)), pytest.raises(OSError, match=ENOSPC):
        fallocate.reserve(str(file), str(file), 0, 4096)


def test_file_that_was_meant_is_filled_and_keeps_its_length_and_content(file: pathlib.Path) -> None:
    file.write_bytes(b"data")
    status = file.stat()

    fallocate.fill_named(str(file), status.st_dev, status.st_ino, 0, 128 * units.Ki)

    assert file.read_bytes() == b"data"
    assert file.stat().st_blocks * 512 >= 128 * units.Ki


@pytest.mark.parametrize(("device", "inode"), [(0, 1), (1, 0)])
def test_file_that_was_not_meant_is_left(file: pathlib.Path, device: int, inode: int) -> None:
    status = file.stat()

    with pytest.raises(OSError, match="Stale") as caught:
        fallocate.fill_named(str(file), status.st_dev + device, status.st_ino + inode, 0, 8192)

    assert caught.value.errno == errno.ESTALE
    assert file.stat().st_blocks == 0


def test_what_is_kept_for_root_is_not_for_disks(file: pathlib.Path) -> None:
    status = file.stat()
    space = SimpleNamespace(f_bfree=100, f_bavail=1, f_frsize=4096)

    with (
        fixtures.MockPatchObject(os, "fstatvfs", lambda fd: space),
        pytest.raises(OSError, match=ENOSPC) as caught,
    ):
        fallocate.fill_named(str(file), status.st_dev, status.st_ino, 0, 8192)

    assert caught.value.errno == errno.ENOSPC
    assert file.stat().st_blocks == 0


def test_stretch_of_many_holes_wants_no_more_than_these_have(file: pathlib.Path) -> None:
    with open(file, "wb") as disk:
        os.posix_fallocate(disk.fileno(), 0, 32768)
        fallocate.punch(disk.fileno(), 8192, 4096)
    if fallocate.extents(str(file)) is None:
        pytest.skip("this filesystem does not tell of extents")
    status = file.stat()

    for available, filled in ((0, 7), (1, 8)):
        space = SimpleNamespace(f_bfree=100, f_bavail=available, f_frsize=4096)
        with fixtures.MockPatchObject(os, "fstatvfs", lambda fd, space=space: space), contextlib.suppress(OSError):
            fallocate.fill_named(str(file), status.st_dev, status.st_ino, 0, 32768)
        assert file.stat().st_blocks * 512 == filled * 4096


def test_link_to_the_file_that_was_meant_is_not_followed(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    status = file.stat()

    with pytest.raises(OSError, match="symbolic") as caught:
        fallocate.fill_named(str(link), status.st_dev, status.st_ino, 0, 8192)

    assert caught.value.errno == errno.ELOOP


def test_gaps_are_what_is_not_set_aside_also_past_the_last_extent() -> None:
    found = [Extent(0, 4096), Extent(8192, 4096)]

    assert fallocate.gaps(found, 2048, 20000) == [Extent(4096, 4096), Extent(12288, 7712)]
    assert fallocate.gaps(found, 0, 4096) == []


def test_filesystem_that_cannot_tell_has_one_gap() -> None:
    assert fallocate.gaps(None, 512, 4096) == [Extent(512, 3584)]


def test_very_many_gaps_are_taken_together() -> None:
    found = [Extent(number * 8192 + 4096, 4096) for number in range(5000)]

    gaps = fallocate.gaps(found, 0, 5000 * 8192)

    assert len(gaps) <= 500
    assert (gaps[0].start, gaps[-1].end) == (0, 4999 * 8192 + 4096)


def test_very_many_gaps_with_much_between_them_stay_apart() -> None:
    # By twos, two would be taken together that have all the rest of the file between them.
    starts = [number * 8192 for number in range(501)] + [units.Gi]
    ends = [start + 4096 for start in starts]
    found = [Extent(end, start - end) for end, start in zip(ends, starts[1:])]

    gaps = fallocate.gaps(found, 0, ends[-1])

    assert len(gaps) <= 500
    assert gaps[-1] == Extent(units.Gi, 4096)
    assert max(gap.length for gap in gaps[:-1]) == 4096 + 2 * 8192


def test_file_that_we_may_not_write_is_told_of_before_a_program_would(programs: Programs, file: pathlib.Path) -> None:
    with (
        fixtures.MockPatchObject(os, "access", lambda name, mode: (name, mode) != (str(file), os.W_OK)),
        pytest.raises(PermissionError) as caught,
    ):
        fallocate.reserve(DISK, str(file), 0, units.Gi)

    assert (caught.value.filename, programs.calls) == (DISK, [])


def test_reserving_on_a_full_filesystem_is_told_apart(programs: Programs, file: pathlib.Path) -> None:
    programs.ends("fallocate", 1, f"fallocate: fallocate failed: {ENOSPC}")

    with pytest.raises(exceptions.NoSpace, match=DISK):
        fallocate.reserve(DISK, str(file), 0, units.Gi)


def test_unsharing_runs_in_a_process_of_its_own(programs: Programs) -> None:
    fallocate.unshare(DISK, NAME, [Extent(0, 4096, shared=True), Extent(8192, 512, shared=True)])

    [call] = programs.calls
    assert call.argv == (sys.executable, "-W", "ignore", "-m", "imgprealloc.fallocate", NAME, "0:4096", "8192:512")


def test_unsharing_thousands_of_extents_keeps_below_the_limit_of_a_command_line(programs: Programs) -> None:
    extents = [Extent(number * 8192, 4096) for number in range(2500)]

    fallocate.unshare(DISK, NAME, extents)

    stretches = [call.argv[6:] for call in programs.calls]
    assert max(map(len, stretches)) <= 1000
    assert [word for words in stretches for word in words] == [f"{extent.start}:4096" for extent in extents]


def test_nothing_to_unshare_runs_nothing(programs: Programs) -> None:
    fallocate.unshare(DISK, NAME, [])

    assert programs.calls == []


# The process behind unshare().


def test_process_unshares_every_stretch(file: pathlib.Path) -> None:
    seen: list[tuple[int, int, int]] = []
    with fixtures.MockPatchObject(fallocate, "_fallocate", lambda fd, *arguments: seen.append(arguments)):
        status = fallocate._main(str(file), "0:4096", "8192:512")

    # FALLOC_FL_UNSHARE_RANGE and FALLOC_FL_KEEP_SIZE of linux/falloc.h
    assert seen == [(0x41, 0, 4096), (0x41, 8192, 512)]
    assert status == 0


def test_process_says_in_the_words_of_strerror_what_went_wrong(
    file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with fixtures.MockPatchObject(fallocate, "_fallocate", full):
        status = fallocate._main(str(file), "0:4096")

    assert status == 1
    assert ENOSPC in capsys.readouterr().err


# The extent map.


class Fiemap(fixtures.Fixture):
    """A kernel that answers FS_IOC_FIEMAP with these extents, as (start, length, flags)."""

    def __init__(self, extents: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.extents = extents
        self.calls = 0
        self.flags: set[int] = set()

    def _setUp(self) -> None:
        self.useFixture(fixtures.MockPatchObject(fallocate, "_ioctl", self._ioctl))

    def _ioctl(self, fd: int, request: int, buffer: bytearray) -> None:
        assert request == 0xC020660B
        self.calls += 1
        start, length, flags, _, room, _ = struct.unpack_from("=QQIIII", buffer)
        self.flags.add(flags)
        inside = [extent for extent in self.extents if extent[0] + extent[1] > start and extent[0] < start + length]
        for number, (logical, size, flags) in enumerate(inside[:room]):
            struct.pack_into("=QQQQQIIII", buffer, 32 + 56 * number, logical, logical, size, 0, 0, flags, 0, 0, 0)
        struct.pack_into("=I", buffer, 20, len(inside[:room]))


def test_extents_tell_shared_from_own(file: pathlib.Path) -> None:
    with Fiemap([(0, 4096, SHARED), (8192, 4096, UNWRITTEN), (16384, 512, DELALLOC | LAST)]):
        extents = fallocate.extents(str(file))

    assert list(extents or ()) == [Extent(0, 4096, shared=True), Extent(8192, 4096), Extent(16384, 512)]


def test_extents_that_touch_are_one_unless_one_is_shared(file: pathlib.Path) -> None:
    # A guest decides how many there are; 26 million took 4.6 GB of nova-compute.
    count = 1500
    many = [(number * 4096, 4096, UNWRITTEN if number % 2 else 0) for number in range(count)]
    many += [(count * 4096, 4096, SHARED), ((count + 1) * 4096, 4096, LAST)]

    with Fiemap(many):
        extents = fallocate.extents(str(file))

    assert list(extents or ()) == [
        Extent(0, count * 4096),
        Extent(count * 4096, 4096, shared=True),
        Extent((count + 1) * 4096, 4096),
    ]


def test_file_without_extents_has_none(file: pathlib.Path) -> None:
    with Fiemap([]):
        extents = fallocate.extents(str(file))

    assert extents is not None
    assert list(extents) == []


def test_more_extents_than_one_call_gives_are_all_seen_once(file: pathlib.Path) -> None:
    count = 1500
    many = [(number * 8192, 4096, LAST if number == count - 1 else 0) for number in range(count)]

    with Fiemap(many) as kernel:
        extents = fallocate.extents(str(file))

    assert [(extent.start, extent.length) for extent in extents or ()] == [extent[:2] for extent in many]
    assert kernel.calls == 3


def test_extents_can_be_taken_by_their_number(file: pathlib.Path) -> None:
    with Fiemap([(0, 4096, 0), (8192, 4096, 0), (16384, 512, SHARED | LAST)]):
        extents = fallocate.extents(str(file)) or ()

    assert (extents[0], extents[-1]) == (Extent(0, 4096), Extent(16384, 512, shared=True))
    assert extents[1:] == [Extent(8192, 4096), Extent(16384, 512, shared=True)]
    with pytest.raises(IndexError):
        extents[3]


# What a reservation has filled.


def filled(file: pathlib.Path, before: list[Extent], now: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    with Fiemap(now) as kernel, file.open("rb") as opened:
        found = fallocate.filled(opened.fileno(), before, 4096, 64 * 1024)
    # FIEMAP_FLAG_SYNC: what is dirty is called unwritten until it is written out.
    assert kernel.flags == {1}
    return [(extent.start, extent.length) for extent in found]


def test_what_was_a_hole_and_is_unwritten_now_has_been_filled(file: pathlib.Path) -> None:
    assert filled(file, [], [(0, 128 * 1024, UNWRITTEN | MERGED | LAST)]) == [(4096, 60 * 1024)]


def test_what_was_set_aside_before_has_not_been_filled_however_extents_lie_now(file: pathlib.Path) -> None:
    before = [Extent(8192, 4096), Extent(20480, 8192)]
    now = [(0, 10240, UNWRITTEN), (10240, 22528, UNWRITTEN), (32768, 4096, UNWRITTEN | LAST)]

    assert filled(file, before, now) == [(4096, 4096), (12288, 8192), (28672, 4096), (32768, 4096)]


@pytest.mark.parametrize("flags", [0, DELALLOC, UNWRITTEN | SHARED, UNWRITTEN | UNKNOWN, UNWRITTEN | 0x100000])
def test_what_may_have_something_in_it_has_not_been_filled(file: pathlib.Path, flags: int) -> None:
    now = [(4096, 4096, UNWRITTEN), (8192, 4096, flags), (12288, 4096, UNWRITTEN | LAST)]

    assert filled(file, [], now) == [(4096, 4096), (12288, 4096)]


def test_more_that_has_been_filled_than_one_call_gives_is_all_listed(file: pathlib.Path) -> None:
    count = 1500
    now = [(number * 8, 4, UNWRITTEN | (LAST if number == count - 1 else 0)) for number in range(count)]

    assert filled(file, [], now) == [(start, length) for start, length, _ in now if start >= 4096]


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS])
def test_filesystem_without_an_extent_map_is_not_an_empty_one(file: pathlib.Path, code: int) -> None:
    with fixtures.MockPatchObject(fallocate, "_ioctl", raises(code)):
        assert fallocate.extents(str(file)) is None


def test_any_other_fault_of_the_extent_map_is_an_error(file: pathlib.Path) -> None:
    with fixtures.MockPatchObject(fallocate, "_ioctl", raises(errno.EIO)), pytest.raises(OSError, match="error"):
        fallocate.extents(str(file))


def test_kernel_s_refusal_of_an_extent_map_becomes_an_oserror(file: pathlib.Path) -> None:
    with file.open("rb") as opened, pytest.raises(OSError, match="Inappropriate ioctl"):
        fallocate._ioctl(opened.fileno(), 0x1234, bytearray(4096))


@pytest.mark.parametrize(
    ("end", "held"),
    [(0, 0), (100, 100), (4096, 4096), (6000, 4096), (9000, 4904), (1_000_000, 8192)],
)
def test_only_space_before_the_end_counts(end: int, held: int) -> None:
    assert fallocate.held([Extent(0, 4096), Extent(8192, 4096)], end) == held


# Whether the filesystem keeps its word.


def raises(code: int) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def supported(file: pathlib.Path, answer: Callable[..., None]) -> bool:
    with fixtures.MockPatchObject(fallocate, "_fallocate", answer), file.open("r+b") as probe:
        return fallocate.supported(probe.fileno(), units.Mi)


def test_space_that_is_really_there_is_believed(file: pathlib.Path) -> None:
    def write(fd: int, mode: int, offset: int, length: int) -> None:
        os.pwrite(fd, b"x" * length, offset)
        os.fsync(fd)

    assert supported(file, write) is True


def test_yes_that_sets_nothing_aside_is_a_no(file: pathlib.Path) -> None:
    # As on ZFS.
    assert supported(file, lambda *arguments: None) is False


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_filesystem_that_says_no_is_believed(file: pathlib.Path, code: int) -> None:
    assert supported(file, raises(code)) is False


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_filesystem_that_knows_fallocate_is_not_one_without_it(file: pathlib.Path, code: int) -> None:
    assert supported(file, raises(code)) is True


def test_fault_is_not_an_answer(file: pathlib.Path) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        supported(file, raises(errno.EIO))


def test_probe_is_left_at_its_length(file: pathlib.Path) -> None:
    modes: list[int] = []

    supported(file, lambda fd, mode, offset, length: modes.append(mode))

    # FALLOC_FL_KEEP_SIZE
    assert modes == [1]


def test_c_library_s_error_becomes_an_oserror(file: pathlib.Path) -> None:
    with file.open("rb") as unwritable, pytest.raises(OSError, match="Bad file descriptor"):
        fallocate._fallocate(unwritable.fileno(), 0, 0, 4096)
