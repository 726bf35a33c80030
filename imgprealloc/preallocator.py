# SPDX-License-Identifier: Apache-2.0
"""The strategy: what to do to a disk so that its guest never waits for space.

Preallocator has the verbs: looking first, choosing a treatment, and telling
what was done. What a format answers for itself is in raw and qcow2, whose word
on the format counts in record, what a filesystem can promise in promise.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import os
import stat
import time
from typing import Optional, Union

from oslo_log import log as logging

from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import lock
from imgprealloc import log
from imgprealloc import native_thread
from imgprealloc import os_errors
from imgprealloc import pace as paces
from imgprealloc import progress as progresses
from imgprealloc import promise as promises
from imgprealloc import punching
from imgprealloc import record
from imgprealloc import replacement
from imgprealloc import sizes
from imgprealloc import zeros
from imgprealloc.disk_file import DiskFile
from imgprealloc.disk_file import Place
from imgprealloc.format import Existing
from imgprealloc.format import Format
from imgprealloc.format import Treatment
from imgprealloc.image import DiskImage
from imgprealloc.layout import Layout
from imgprealloc.pace import Pace
from imgprealloc.plan import Plan
from imgprealloc.progress import Progress
from imgprealloc.promise import Promise
from imgprealloc.qcow2 import Qcow2
from imgprealloc.raw import Raw
from imgprealloc.reading import SECTOR
from imgprealloc.record import Word
from imgprealloc.settings import Mode
from imgprealloc.settings import Settings

LOG = logging.getLogger(__name__)

Path = Union[str, bytes, "os.PathLike[str]"]
"""What a verb takes for a disk's path."""

# One row a format; a new one is a class and a row.
FORMATS: dict[str, type[Format]] = {format.name: format for format in (Raw, Qcow2)}


@dataclasses.dataclass(frozen=True)
class Preallocator(Settings):
    """Create, preallocate and grow disks in one mode, whatever their format.

    The format is the caller's where a verb gets one, else Nova's record beside
    the disk, and only then what the disk's first bytes look like.

    :param mode: qemu-img's word: "falloc" holds space, "full" writes it,
        "metadata" only maps the clusters and holds nothing
    :param on_unsupported: instead of mode falloc, where the filesystem has no
        fallocate: "metadata", "full" or "error"
    :param overlay_subclusters: what of an overlay is allocated before its guest
        writes: "unallocated", "allocated" (beyond the base) or "copied" (all)
    :param overlay_cluster_size: bytes, for overlays that are made anew
    :param keep_free: what is left available to others on a filesystem: bytes, or
        words as "10G", "5%", or "1%,10G" for the least of both; what would take
        more is refused (NoSpace)
    :raises: ValueError for a value that is not one of a setting's
    """

    def with_mode(self, mode: Mode) -> Preallocator:
        """Return the same strategy in another mode."""
        return dataclasses.replace(self, mode=mode)

    def inspect(self, path: Path, *, format: Optional[str] = None) -> DiskImage:
        """Read a disk, also one in use; nothing is written.

        :raises: DiskNotFound, FileError, UnsupportedFormat, FormatMismatch,
            BrokenImage, ProgramMissing, ProgramKilled, CommandFailed
        """
        path = disk_file.named(path)
        with os_errors.translated(path), disk_file.opened(path) as file:
            return self._format(file, record.word(file, format)).read(file)

    def layout(self, path: Path, *, format: Optional[str] = None) -> Layout:
        """Find out where the bytes of a disk are, also of one in use, for a picture; nothing is written.

        :raises: UnsupportedFilesystem, and what inspect() raises
        """
        path = disk_file.named(path)
        with os_errors.translated(path), disk_file.opened(path) as file:
            return self._format(file, record.word(file, format)).layout(file)

    def holds_space(self, path: Path) -> bool:
        """Whether the space of a disk in that place is really set aside in this mode.

        :raises: DiskNotFound, FileError, UnsupportedFilesystem
        """
        path = disk_file.named(path)
        with os_errors.translated(path), disk_file.place(path) as place:
            return self._promise(place).holds_space

    def has_work(self, path: Path, existing: Existing, known: DiskImage, *, format: Optional[str] = None) -> bool:
        """Whether preallocate() would do anything to a disk; for whoever has others wait while it does.

        :param known: the disk as a look before has found it
        :raises: UnsupportedFilesystem, NoSpace where what it would take is to be
            kept free, and what inspect() raises
        """
        path = disk_file.named(path)
        with os_errors.translated(path), disk_file.opened(path) as file:
            if replacement.leftovers(file):
                return True
            word = record.word(file, format)
            strategy = self._format(file, word)
            before = _looked_at(strategy, file, known)
            treatment = self._treatment(strategy, word, file, before, existing, write_held=False)
            if treatment is not None:
                treatment.promise.require_kept_free(file, treatment.needed, treatment.where(file))
            return treatment is not None

    def plan(
        self,
        path: Path,
        existing: Existing = "recreate_blank",
        *,
        format: Optional[str] = None,
        known: Optional[DiskImage] = None,
        write_held: bool = True,
    ) -> Plan:
        """Say what preallocate() would do to a disk, also one in use; nothing is written.

        But for a nameless file of 1 MiB, by which a filesystem is asked whether it
        can set space aside.

        :param existing: as for preallocate()
        :param known: as for preallocate()
        :param write_held: as for preallocate()
        :raises: what inspect() raises; what preallocate() would refuse is in the plan
        """
        path = disk_file.named(path)
        with os_errors.translated(path), disk_file.opened(path) as file:
            word = record.word(file, format)
            strategy = self._format(file, word)
            before = _looked_at(strategy, file, known)
            error = None
            try:
                treatment = self._treatment(strategy, word, file, before, existing, write_held=write_held)
                if treatment is not None:
                    return _planned(file, before, treatment)
            except exceptions.PreallocationError as exc:
                error = exc
            room = max(0, filesystem.room(file.fd, self.keep_free))
            return Plan(before, self.mode, "none", before.state, 0, 0, 0, room, error)

    def create(
        self,
        path: Path,
        size: int,
        backing: Optional[Path] = None,
        *,
        format: Optional[str] = None,
        backing_format: Optional[str] = None,
        progress: Optional[Progress] = None,
        pace: Optional[Pace] = None,
    ) -> DiskImage:
        """Create a new preallocated disk, qcow2 unless told otherwise.

        :param size: virtual size in bytes; rounded up to a multiple of 512
        :param backing: the backing file, absolute or relative to path's folder
        :param backing_format: its format, which nobody but the caller knows
        :param progress: told how far the base's data is copied (overlay_subclusters)
            and zeros are written (mode full), one after the other; what it raises
            ends the call, and nothing is left of the disk
        :param pace: how others on the same storage are thought of; None: not at
            all, as where a guest waits for its disk
        :raises: TypeError, DiskExists, InvalidSize, FormatNotCertain (of the backing
            file), BackingFileUnusable, UnsupportedFilesystem, QemuImgTooOld, NoSpace,
            FileInTheWay, ImageInUse (of the new file), NotPreallocated, and what
            inspect() raises
        """
        path = disk_file.named(path)
        backing = None if backing is None else disk_file.named(backing)
        _require_number(size)
        started = time.monotonic()
        with _at_work(path, progress, pace), disk_file.place(path) as place:
            strategy = self._format(place, Word(format or Qcow2.name, "the caller"))
            _check_size(path, size)
            there = place.stat()
            if there is not None and not stat.S_ISREG(there.st_mode) and not stat.S_ISLNK(there.st_mode):
                raise disk_file.no_regular_file(path)
            if there is not None:
                raise exceptions.DiskExists(path, "there is a file already", "Remove it, or choose another path.")
            promise = self._promise(place)
            after = strategy.make(place, _round_up(size, SECTOR), promise, backing, backing_format)
        return _logged(after, promise, "absent", started)

    def preallocate(
        self,
        path: Path,
        existing: Existing = "recreate_blank",
        *,
        format: Optional[str] = None,
        known: Optional[DiskImage] = None,
        progress: Optional[Progress] = None,
        pace: Optional[Pace] = None,
        write_held: bool = True,
    ) -> DiskImage:
        """Preallocate a disk that exists; what the guest reads never changes.

        A second call runs nothing that writes. Under a guess of the format no
        byte of the file changes.

        :param existing: what may happen to it; see format.Existing
        :param known: the disk as a look before has found it; believed where the
            file has not changed since, but not for replacing it
        :param progress: told how far data is copied, and zeros are written, one
            after the other; what it raises ends the call, and the disk has its
            content
        :param pace: as for create()
        :param write_held: whether mode full writes what is set aside already, too,
            for which nobody may have the disk open; a start does not wait for that
        :raises: ImageInUse, FormatNotCertain, UnsupportedFilesystem, NoSpace,
            NotPreallocated; where it is to be replaced, DiskIsLink, OwnerNotKept,
            FileInTheWay, BackingFileUnusable, QemuImgTooOld; and what inspect() raises
        """
        path = disk_file.named(path)
        started = time.monotonic()
        with _at_work(path, progress, pace), disk_file.claimed(path) as file:
            word = record.word(file, format)
            strategy = self._format(file, word)
            replacement.remove_leftovers(file)
            if existing == "just_made" and word.certain:
                promise = self._promise(file)
                treatment = strategy.treatment_by_header(file, promise)
                if treatment is not None:
                    return _logged(treatment.apply(), promise, "blank", started)
            before = _looked_at(strategy, file, known)
            treatment = self._treatment(strategy, word, file, before, existing, write_held=write_held)
            if treatment is not None and treatment.replaces and before is known:
                before = strategy.read(file)
                treatment = self._treatment(strategy, word, file, before, existing, write_held=write_held)
            if treatment is None:
                LOG.debug("%s: nothing to do in mode %s, it is %s", path, self.mode, before.state)
                return before
            after, promise = treatment.apply(), treatment.promise
            # What was mapped, and has got its space only now.
            is_held = not treatment.replaces and strategy.is_done(after, promise.mode)
            if write_held and promise.mode == "full" and is_held and _has_unwritten(file, after):
                after = _write_held(strategy, file, after)
            return _logged(after, promise, before.state, started)

    def resize(
        self,
        path: Path,
        size: int,
        *,
        format: Optional[str] = None,
        progress: Optional[Progress] = None,
        pace: Optional[Pace] = None,
    ) -> DiskImage:
        """Grow a disk; the new part is preallocated too, the old one is as it was.

        :param size: the new virtual size in bytes; rounded up to a multiple of 512
        :param progress: told how far the new part is, where that can be seen (mode
            full); what it raises ends the call, and the disk has its content
        :param pace: as for create()
        :raises: TypeError, InvalidSize, ImageInUse, FormatNotCertain,
            UnsupportedFilesystem, NoSpace, NotPreallocated, BackingFileUnusable,
            FileInTheWay, QemuImgTooOld, and what inspect() raises
        """
        path = disk_file.named(path)
        _require_number(size)
        started = time.monotonic()
        with _at_work(path, progress, pace), disk_file.claimed(path) as file:
            word = record.word(file, format)
            strategy = self._format(file, word)
            record.require_certain(file, word, "it is not grown")
            # Also where a growth was killed after it had come to its end, and there is nothing left to grow.
            replacement.remove_leftovers(file)
            before = strategy.read(file)
            _check_size(path, size)
            size = _round_up(size, SECTOR)
            if size <= before.virtual_size:
                raise exceptions.InvalidSize(
                    path,
                    f"{sizes.exact(size)} is not more than the {sizes.exact(before.virtual_size)} that it has",
                    "A disk can only grow; shrinking would cut off data. What it may lack of its space, "
                    "imgprealloc allocate sets aside.",
                )
            promise = self._promise(file)
            lock.refuse_users(path, file.fd)
            file.refuse_changed(before.stamp)
            try:
                # Within, for what the system refuses half way, too.
                with os_errors.translated(path):
                    after = self._grown(strategy, file, before, size, promise)
            except Exception as exc:
                # Also where whoever was told how far it is has ended it.
                if file.stamp() != before.stamp:
                    with contextlib.suppress(exceptions.PreallocationError):
                        strategy.recover(file)
                    if isinstance(exc, exceptions.PreallocationError):
                        exc.remedy += f" {_cut_short(strategy, file, before, size)}"
                raise
            return _logged(after, promise, before.state, started)

    def thin(
        self,
        path: Path,
        *,
        rewrite: bool = False,
        format: Optional[str] = None,
        progress: Optional[Progress] = None,
        pace: Optional[Pace] = None,
    ) -> DiskImage:
        """Give back what of a disk's space nobody has written to; what the guest reads never changes.

        In place no byte of the file changes, whatever its format is: a raw disk
        is thin afterwards, a qcow2 one keeps its cluster map, and so is mapped at
        the least. Zeros that were written stay.

        :param rewrite: copy the disk into one that is thin, without its zeros and
            its empty clusters; there has to be room for what it holds
        :param progress: told how far it is; what it raises ends the call, and the
            disk has its content
        :param pace: as for create()
        :raises: ImageInUse, UnsupportedFilesystem; where it is to be rewritten,
            FormatNotCertain, NoSpace, DiskIsLink, OwnerNotKept, FileInTheWay,
            BackingFileUnusable, QemuImgTooOld; and what inspect() raises
        """
        path = disk_file.named(path)
        started = time.monotonic()
        with _at_work(path, progress, pace), disk_file.claimed(path) as file:
            word = record.word(file, format)
            strategy = self._format(file, word)
            replacement.remove_leftovers(file)
            before = strategy.read(file)
            lock.refuse_users(path, file.fd)
            file.refuse_changed(before.stamp)
            if rewrite:
                record.require_certain(file, word, "it is not rewritten")
                after = strategy.copy_thin(file, before, promises.made(file, "metadata", "metadata"))
            elif _has_to_give(file, before):
                punching.give_back(path, file.fd)
                after = strategy.read(file)
            else:
                after = before
            LOG.info(
                "%s: %s before, %s now, %s given back, %.2f s",
                path, before.state, after.state, sizes.exact(max(0, before.allocated_size - after.allocated_size)),
                time.monotonic() - started,
            )  # fmt: skip
            return after

    @staticmethod
    def _grown(strategy: Format, file: DiskFile, before: DiskImage, size: int, promise: Promise) -> DiskImage:
        """Grow a disk, and see what has become of it."""
        strategy.grow(file, before, size, promise)
        # Before, qemu-img has found no fault in it; now a glance will do, where the disk is all that it is to be.
        after = strategy.glance(file) or strategy.read(file)
        if after.virtual_size != size:
            raise exceptions.BrokenImage(
                file.path,
                f"qemu-img said that it has grown the disk to {sizes.exact(size)}, "
                f"and it has {sizes.exact(after.virtual_size)}",
                "See whether this qemu-img works, then try again.",
            )
        kept = (before.state, *promise.states)
        if before.state == "thin":
            kept += ("reserved", "mapped")
        return strategy.kept(after, promise, kept)

    def _treatment(
        self,
        strategy: Format,
        word: Word,
        file: DiskFile,
        before: DiskImage,
        existing: Existing,
        *,
        write_held: bool,
    ) -> Optional[Treatment]:
        """Choose what is to be done to a disk that was looked at, as the word on its format allows; None for nothing.

        :param write_held: as for preallocate()
        :raises: UnsupportedFilesystem, FormatNotCertain
        """
        if strategy.is_done(before, self.mode):
            return self._writing(strategy, file, before) if write_held and self.mode == "full" else None
        promise = self._promise(file)
        treatment = strategy.treatment(file, before, promise, existing)
        if treatment is not None and treatment.replaces and not word.certain:
            if existing != "recreate_blank":
                record.require_certain(file, word, "it is not rewritten")
            log.warn_once(
                "format guessed", file.path, f"not made anew, because nobody tells that it is {word.format}; "
                "say so (--disk-format) if it is"
            )  # fmt: skip
            treatment = strategy.treatment(file, before, promise, "reserve")
        elif (
            treatment is not None and treatment.replaces and existing == "recreate_blank" and _may_be_used(file, before)
        ):
            # One that may be made anew may stay what it is, too.
            treatment = strategy.treatment(file, before, promise, "reserve")
        if treatment is not None and treatment.name == "fill" and write_held and promise.mode == "full":
            # What has its space then is written, too; see preallocate().
            treatment = dataclasses.replace(
                treatment,
                written=lambda: before.shared_bytes + native_thread.run(zeros.unwritten, file.fd),
                alone=True,
            )
        return treatment

    def _writing(self, strategy: Format, file: DiskFile, before: DiskImage) -> Optional[Treatment]:
        """Return the treatment of a disk whose space is held, but is to be written."""
        if not _has_unwritten(file, before):
            return None
        return Treatment(
            "write",
            self._promise(file),
            functools.partial(_write_held, strategy, file, before),
            before.state,
            needed=0,
            written=lambda: native_thread.run(zeros.unwritten, file.fd),
            alone=True,
        )

    def _format(self, place: Place, word: Word) -> Format:
        """Return what knows a format, with these settings.

        :raises: UnsupportedFormat
        """
        if word.format not in FORMATS:
            raise exceptions.UnsupportedFormat(
                place.path,
                f"its format is {word.format}, not {' or '.join(FORMATS)}",
                "Convert it with qemu-img convert first.",
            )
        return FORMATS[word.format](self)

    def _promise(self, place: Place) -> Promise:
        return promises.made(place, self.mode, self.on_unsupported, self.keep_free)


def _planned(file: DiskFile, before: DiskImage, treatment: Treatment) -> Plan:
    """Say what a treatment takes, and whether it would be refused."""
    promise = treatment.promise
    room = max(0, promise.room(treatment.where(file)))
    written, error = 0, None
    try:
        if treatment.replaces:
            replacement.refuse_links(file)
            replacement.refuse_foreign(file)
        if treatment.alone:
            lock.refuse_users(file.path, file.fd)
        written = treatment.written()
        if treatment.needed > room:
            raise promise.lacking(file.path, treatment.needed, room)
    except exceptions.PreallocationError as exc:
        error = exc
    # Whoever has it open keeps us from writing, and not from setting aside.
    is_in_use = isinstance(error, exceptions.ImageInUse)
    is_held = treatment.name == "fill" and is_in_use and promise.holds_space and treatment.needed <= room
    return Plan(
        before,
        promise.mode,
        treatment.name,
        treatment.state if error is None or is_held else before.state,
        space=treatment.needed - treatment.freed,
        temporary=treatment.freed,
        written=written,
        available=room,
        error=error,
    )


def _looked_at(strategy: Format, file: DiskFile, known: Optional[DiskImage]) -> DiskImage:
    """Return the disk as it is: as a look before has found it, where it has not changed since."""
    return known if known is not None and known.stamp == file.stamp() else strategy.read(file)


@contextlib.contextmanager
def _at_work(path: str, progress: Optional[Progress], pace: Optional[Pace]) -> Iterator[None]:
    """Let a caller be told, others be thought of, and the system's errors be ours."""
    with progresses.told_to(progress), paces.kept(pace), os_errors.translated(path):
        yield


def _may_be_used(file: DiskFile, image: DiskImage) -> bool:
    """Whether a guest has a disk open, or may have it on another host without our seeing it."""
    return image.in_use or lock.may_be_used_unseen(file.fd)


def _write_held(strategy: Format, file: DiskFile, image: DiskImage) -> DiskImage:
    """Write what a preallocated disk has set aside and nobody has written.

    :raises: ImageInUse, and what zeros.write() raises
    """
    if image.in_use:
        raise exceptions.ImageInUse(
            file.path,
            "its space is held, but was never written, as mode full has it, and QEMU has the image open for writing",
            "Stop the instance, then try again; or leave it so, the space is there.",
            image,
        )
    zeros.write(file.path, file.fd)
    return strategy.read(file)


def _has_unwritten(file: DiskFile, image: DiskImage) -> bool:
    """Whether there is more in a file that nobody has written than what a format's own tables leave."""
    little = 0 if image.clusters is None else zeros.MOST_OF_METADATA

    def look() -> bool:
        if not image.in_use:
            zeros.forget_reads(file.fd)
        return zeros.has_unwritten(file.fd, more_than=little)

    return native_thread.run(look)


def _has_to_give(file: DiskFile, image: DiskImage) -> bool:
    """Whether a disk has space that nobody has written to, in its file or past the end of that."""
    if _has_unwritten(file, image):
        return True
    extents = fallocate.extents(file.program_name)
    return extents is not None and bool(extents) and extents[-1].end - image.file_size > zeros.MOST_OF_METADATA


def _logged(after: DiskImage, promise: Promise, before: str, started: float) -> DiskImage:
    """Log what a verb has done; the one line that a disk gets."""
    seconds = time.monotonic() - started
    LOG.info("%s: mode %s, %s before, %s now, %.2f s", after.path, promise.mode, before, after.state, seconds)
    return after


def _cut_short(strategy: Format, file: DiskFile, before: DiskImage, size: int) -> str:
    """Say how large a disk is whose growth to size has failed, and what to do about it."""
    try:
        found = strategy.read(file).virtual_size
    except (exceptions.PreallocationError, OSError):
        return "Its growth was cut short, and it cannot be read now; see qemu-img check."
    if found == before.virtual_size:
        return f"It still has {sizes.exact(found)}, and what it holds is as it was."
    if found == size:
        return (
            f"It has the {sizes.exact(found)} that it was to have all the same, and what it holds is as it was; what "
            "is left to be done, imgprealloc allocate does."
        )
    return (
        f"It has {sizes.exact(found)} now of {sizes.exact(size)}, and what it holds is as it was; give the command "
        "again."
    )


def _require_number(size: object) -> None:
    """Refuse what is no number of bytes before anything is looked at.

    :raises: TypeError
    """
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"a size is an int of bytes, as 40 * 2**30, not {size!r}")


def _check_size(path: str, size: int) -> None:
    if size <= 0:
        raise exceptions.InvalidSize(path, f"{size} bytes are no size for a disk", "Give a positive number of bytes.")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
