# SPDX-License-Identifier: Apache-2.0
"""What a format answers for itself, and what all formats share. A new one is a subclass and a row in preallocator."""

from __future__ import annotations

import abc
from collections.abc import Callable
import contextlib
import dataclasses
import os
from typing import ClassVar, Literal, Optional

from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import giving_back
from imgprealloc import log
from imgprealloc import native_thread
from imgprealloc import os_errors
from imgprealloc import sizes
from imgprealloc import zeros
from imgprealloc.disk_file import DiskFile
from imgprealloc.disk_file import Place
from imgprealloc.fallocate import Extent
from imgprealloc.image import DiskImage
from imgprealloc.image import State
from imgprealloc.layout import Layout
from imgprealloc.plan import TreatmentName
from imgprealloc.promise import Promise
from imgprealloc.replacement import NewFile
from imgprealloc.settings import Mode
from imgprealloc.settings import Settings

Existing = Literal["reserve", "recreate_blank", "rewrite", "just_made"]
"""What may happen to a disk that exists. Its content never changes.

* reserve: it stays the same file; its space is set aside.
* recreate_blank: one that holds nothing may be made anew.
* rewrite: one with data, too, may be copied into a new one.
* just_made: as rewrite, and its header is believed, because the caller has made
  it and no guest has seen it.
"""


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What is to be done to a disk. Sizes are bytes.

    :param apply: does it, and returns the disk as it is afterwards
    :param state: what it is then
    :param needed: what the filesystem has to have for it
    :param freed: what it has again afterwards, of the file that was replaced
    :param written: tells what is written or copied for it; for whoever asks,
        because programs may have to be run for that
    :param alone: whether nobody may have the disk open meanwhile
    """

    name: TreatmentName
    promise: Promise
    apply: Callable[[], DiskImage]
    state: State
    needed: int
    freed: int = 0
    written: Callable[[], int] = lambda: 0
    alone: bool = False

    @property
    def replaces(self) -> bool:
        """Whether the disk becomes another file, and is read as its format says; else no byte of it changes."""
        return self.name in ("recreate", "rewrite")

    def where(self, file: DiskFile) -> int:
        """Return what is open, of a disk and its folder, on the filesystem that is to give the space."""
        return file.folder_fd if self.replaces else file.fd


# replacement's new() or replacing(), but for the judge of the new file.
PlaceFor = Callable[[Callable[[NewFile], object]], "contextlib.AbstractContextManager[NewFile]"]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a new file was asked to be; a cluster size of None was left to qemu-img."""

    virtual_size: int
    cluster_size: Optional[int] = None
    backing_file: Optional[str] = None
    backing_format: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """A disk format, with the settings that disks of it are treated by."""

    settings: Settings

    name: ClassVar[str]

    @abc.abstractmethod
    def read(self, file: DiskFile) -> DiskImage:
        """Read a disk; nothing is written.

        :raises: FormatMismatch, UnsupportedFormat, BrokenImage, ProgramMissing,
            ProgramKilled
        """

    @abc.abstractmethod
    def glance(self, file: DiskFile) -> Optional[DiskImage]:
        """Read a disk without starting a program, if it is plainly preallocated; None for all else."""

    @abc.abstractmethod
    def layout(self, file: DiskFile) -> Layout:
        """Find out where the bytes of a disk are, for a picture.

        :raises: FormatMismatch, UnsupportedFormat, UnsupportedFilesystem,
            BrokenImage, OSError
        """

    @abc.abstractmethod
    def is_done(self, image: DiskImage, mode: Mode) -> bool:
        """Whether a disk has all that the mode can give it."""

    @abc.abstractmethod
    def treatment(self, file: DiskFile, image: DiskImage, promise: Promise, existing: Existing) -> Optional[Treatment]:
        """Choose the first treatment that fits a disk; None where there is nothing to do.

        :raises: UnsupportedFilesystem
        """

    @abc.abstractmethod
    def treatment_by_header(self, file: DiskFile, promise: Promise) -> Optional[Treatment]:
        """Choose what to do to a disk that has just been made, where its header tells; None where it has to be read."""

    @abc.abstractmethod
    def make(
        self, place: Place, size: int, promise: Promise, backing_file: Optional[str], backing_format: Optional[str]
    ) -> DiskImage:
        """Create a preallocated disk."""

    @abc.abstractmethod
    def grow(self, file: DiskFile, image: DiskImage, size: int, promise: Promise) -> None:
        """Grow a disk, the new part preallocated."""

    @abc.abstractmethod
    def copy_thin(self, file: DiskFile, image: DiskImage, promise: Promise) -> DiskImage:
        """Copy a disk into a thin one, which takes its place.

        :param promise: of nothing but the filesystem's options
        :raises: UnsupportedFormat where a copy would lose something
        """

    @abc.abstractmethod
    def recover(self, file: DiskFile) -> None:
        """Mend what a growth that failed half way has left, if it has left something that could cost data later."""

    # What they share.

    def put(
        self,
        place_for: PlaceFor,
        asked: Geometry,
        promise: Promise,
        write: Callable[[NewFile], object],
        *,
        quickly: bool = False,
        thin: bool = False,
    ) -> DiskImage:
        """Have a new file written, read it, and let it become the disk if it is what was asked for and promised.

        :param quickly: whether a glance that finds it preallocated is enough
        :param thin: whether nothing was promised
        :raises: BrokenImage, NotPreallocated
        """
        found: list[DiskImage] = []

        def judge(new: NewFile) -> None:
            try:
                image = (self.glance(new) if quickly else None) or self.read(new)
            except exceptions.FormatMismatch as exc:
                raise not_as_asked(new.path, f"a disk in the format {self.name}", "none") from exc
            _refuse_other_than_asked(image, asked)
            found.append(image if thin else self.kept(image, promise, promise.states))

        with place_for(judge) as new:
            write(new)
        return found[0]

    def holding(
        self,
        name: TreatmentName,
        file: DiskFile,
        image: DiskImage,
        promise: Promise,
        states: tuple[State, ...],
        *,
        written: bool = False,
    ) -> Treatment:
        """Return the treatment that sets aside all that a disk may ask for, where it is, and takes back what it shares.

        No byte changes, so that a guest may have it open meanwhile.

        :param written: whether what was never written is to be written too,
            for which no guest may have it open
        """
        # What fill() does where there is no other way.
        alone = written or (promise.mode == "full" and not promise.holds_space)

        def apply() -> DiskImage:
            set_space_aside(file, image, image.worst_case_size, promise, written=written)
            return self.kept(self.read(file), promise, states)

        def count() -> int:
            return image.shared_bytes + (native_thread.run(zeros.unwritten, file.fd) if alone else 0)

        needed = image.shortfall + promise.rounding
        return Treatment(name, promise, apply, states[0], needed, written=count, alone=alone)

    def kept(self, image: DiskImage, promise: Promise, states: tuple[State, ...]) -> DiskImage:
        """Compare a disk as it has just been read with what was promised.

        :param states: those of which the promise is kept
        :raises: NotPreallocated
        """
        if image.state in states or self.is_done(image, promise.mode):
            return image
        short = f"mode {promise.mode} left it {image.state}, {sizes.exact(image.shortfall)} short"
        if promise.holds_space:
            raise exceptions.NotPreallocated(
                image.path, short, "The filesystem does not keep what it promises; see imgprealloc show.", image
            )
        log.warn_once("short", image.path, short)
        return image


def set_space_aside(file: DiskFile, image: DiskImage, length: int, promise: Promise, *, written: bool = False) -> None:
    """Set aside the space of a disk up to length, and take back what it shares; as for Format.holding()."""
    promise.require_space(file, image.shortfall, file.fd)
    shared = fallocate.shared(file.program_name)
    if shared:
        fallocate.unshare(file.path, file.program_name, shared)
    filled = fill(file, length, promise)
    # Whoever has it open keeps us from writing, and has not kept us from setting aside.
    if written and filled and not image.in_use:
        # Into what is set aside already: where the space runs out, that can be given
        # back, and zeros could not. What was set aside before is nobody's concern here.
        zeros.write(file.path, file.fd, within=filled)


def fill(file: DiskFile, length: int, promise: Promise, start: int = 0) -> list[Extent]:
    """Fill the holes of a file, all or none; with zeros, where there is no other way.

    :returns: what was set aside, in few pieces, which may be held in part before
    """
    if promise.holds_space:
        return _reserve(file, start, start + length)
    if promise.mode == "full":
        zeros.write(file.path, file.fd)
    return []


def given_back(file: DiskFile, shared_bytes: int = 0) -> int:
    """Return the bytes that the filesystem has again once a disk's file is gone."""
    return os.fstat(file.fd).st_blocks * 512 - shared_bytes


def require_space_for_copy(file: DiskFile, promise: Promise, unit: int) -> None:
    """Refuse to copy what there may be no room for, before it has filled the filesystem for everybody.

    What is in the file's written parts may be zeros, which a thin copy leaves out;
    whether it is, the copy alone would tell.

    :param unit: bytes that the copy has written at once
    :raises: NoSpace
    """

    def written() -> int:
        zeros.forget_reads(file.fd)
        return sum(end - first for first, end in zeros.written(file.fd, unit)) * unit

    promise.require_space(file, native_thread.run(written))


def write_out(file: DiskFile, promise: Promise, start: int = 0) -> None:
    """Write from start on what qemu-img was only told to set aside, where that is not what was promised."""
    if promise.of_qemu != promise.mode:
        zeros.write(file.path, file.fd, start=start)


def _reserve(file: DiskFile, start: int, end: int) -> list[Extent]:
    before = fallocate.extents(file.program_name)
    gaps = fallocate.gaps(before, start, end)
    try:
        with os_errors.translated(file.path):
            for gap in gaps:
                fallocate.reserve(file.path, file.program_name, gap.start, gap.length)
    except exceptions.NoSpace:
        # Else nobody on this filesystem could write any more, and nobody would have gained.
        giving_back.give_back(file.path, file.fd, before, start, end)
        raise
    return gaps


def copied_on_write(path: str) -> exceptions.UnsupportedFilesystem:
    """Say that no space can be set aside for a file."""
    return exceptions.UnsupportedFilesystem(
        path,
        "each overwrite of this file takes new space (copy on write), so that none can be set aside for it",
        "Rewrite the disk, so that it is made anew with nocow, and shares nothing with a snapshot.",
    )


def _refuse_other_than_asked(image: DiskImage, asked: Geometry) -> None:
    """Refuse what a program has made that says that it was successful.

    :raises: BrokenImage
    """
    for field in dataclasses.fields(asked):
        wanted, found = getattr(asked, field.name), getattr(image, field.name)
        if found != wanted and not (field.name == "cluster_size" and wanted is None):
            raise not_as_asked(image.path, f"a {field.name} of {wanted!r}", repr(found))


def not_as_asked(path: str, wanted: str, found: str) -> exceptions.BrokenImage:
    """Say that a program has not done what it said that it did."""
    return exceptions.BrokenImage(
        path,
        f"qemu-img was asked for {wanted}, said that it was done, and made {found}",
        "Nothing was changed; see whether this qemu-img works.",
    )
