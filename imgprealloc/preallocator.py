# SPDX-License-Identifier: Apache-2.0
"""The strategy: what to do to a disk so that its guest never waits for space.

Preallocator has the verbs: looking first, choosing a treatment, and telling
what was done. What a format answers for itself is in raw and qcow2, whose word
on the format counts in record, what a filesystem can promise in promise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import Optional

from oslo_log import log as logging

from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import lock
from imgprealloc import log
from imgprealloc import os_errors
from imgprealloc import progress as progresses
from imgprealloc import promise as promises
from imgprealloc import record
from imgprealloc import replacement
from imgprealloc.disk_file import DiskFile
from imgprealloc.disk_file import Place
from imgprealloc.format import Existing
from imgprealloc.format import Format
from imgprealloc.format import Treatment
from imgprealloc.image import DiskImage
from imgprealloc.layout import Layout
from imgprealloc.progress import Progress
from imgprealloc.promise import Promise
from imgprealloc.qcow2 import Qcow2
from imgprealloc.raw import Raw
from imgprealloc.reading import SECTOR
from imgprealloc.record import Word
from imgprealloc.settings import Mode
from imgprealloc.settings import Settings

LOG = logging.getLogger(__name__)

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
    :raises: ValueError for a value that is not one of a setting's
    """

    def with_mode(self, mode: Mode) -> Preallocator:
        """Return the same strategy in another mode."""
        return dataclasses.replace(self, mode=mode)

    def inspect(self, path: str | os.PathLike[str], *, format: Optional[str] = None) -> DiskImage:
        """Read a disk, also one in use; nothing is written.

        :raises: DiskNotFound, FileError, UnsupportedFormat, FormatMismatch,
            BrokenImage, ProgramMissing, ProgramKilled
        """
        path = os.fspath(path)
        with os_errors.translated(path), disk_file.opened(path) as file:
            return self._format(file, record.word(file, format)).read(file)

    def layout(self, path: str | os.PathLike[str], *, format: Optional[str] = None) -> Layout:
        """Find out where the bytes of a disk are, also of one in use, for a picture; nothing is written.

        :raises: UnsupportedFilesystem, and what inspect() raises
        """
        path = os.fspath(path)
        with os_errors.translated(path), disk_file.opened(path) as file:
            return self._format(file, record.word(file, format)).layout(file)

    def holds_space(self, path: str | os.PathLike[str]) -> bool:
        """Whether the space of a disk in that place is really set aside in this mode.

        :raises: DiskNotFound, FileError, UnsupportedFilesystem
        """
        path = os.fspath(path)
        with os_errors.translated(path), disk_file.place(path) as place:
            return self._promise(place).holds_space

    def has_work(
        self, path: str | os.PathLike[str], existing: Existing, known: DiskImage, *, format: Optional[str] = None
    ) -> bool:
        """Whether preallocate() would do anything to a disk; for whoever has others wait while it does.

        :param known: the disk as a look before has found it
        :raises: UnsupportedFilesystem, and what inspect() raises
        """
        path = os.fspath(path)
        with os_errors.translated(path), disk_file.opened(path) as file:
            if replacement.leftovers(file):
                return True
            word = record.word(file, format)
            strategy = self._format(file, word)
            before = known if known.stamp == file.stamp() else strategy.read(file)
            if strategy.is_done(before, self.mode):
                return False
            return _chosen(strategy, word, file, before, self._promise(file), existing) is not None

    def create(
        self,
        path: str | os.PathLike[str],
        size: int,
        backing: Optional[str] = None,
        *,
        format: Optional[str] = None,
        backing_format: Optional[str] = None,
        progress: Optional[Progress] = None,
    ) -> DiskImage:
        """Create a new preallocated disk, qcow2 unless told otherwise.

        :param size: virtual size in bytes
        :param backing: the backing file, absolute or relative to path's folder
        :param backing_format: its format, which nobody but the caller knows
        :param progress: told how far the base's data is copied (overlay_subclusters);
            what it raises ends the call, and nothing is left of the disk
        :raises: DiskExists, InvalidSize, FormatNotCertain, NoSpace, and what
            inspect() raises
        """
        path = os.fspath(path)
        started = time.monotonic()
        with progresses.told_to(progress), os_errors.translated(path), disk_file.place(path) as place:
            strategy = self._format(place, Word(format or Qcow2.name, "the caller"))
            _check_size(path, size)
            if place.stat() is not None:
                raise exceptions.DiskExists(path, "there is a file already", "Remove it, or choose another path.")
            promise = self._promise(place)
            after = strategy.make(place, _round_up(size, SECTOR), promise, backing, backing_format)
        return _logged(after, promise, "absent", started)

    def preallocate(
        self,
        path: str | os.PathLike[str],
        existing: Existing = "recreate_blank",
        *,
        format: Optional[str] = None,
        known: Optional[DiskImage] = None,
        progress: Optional[Progress] = None,
    ) -> DiskImage:
        """Preallocate a disk that exists; what the guest reads never changes.

        A second call runs nothing that writes. Under a guess of the format no
        byte of the file changes.

        :param existing: what may happen to it; see format.Existing
        :param known: the disk as a look before has found it; believed where the
            file has not changed since, but not for replacing it
        :param progress: told how far data is copied, where it is, one copy after
            the other; what it raises ends the call, and the disk is as it was
        :raises: ImageInUse, FormatNotCertain, NoSpace, NotPreallocated, and
            what inspect() raises
        """
        path = os.fspath(path)
        started = time.monotonic()
        with progresses.told_to(progress), os_errors.translated(path), disk_file.claimed(path) as file:
            word = record.word(file, format)
            strategy = self._format(file, word)
            replacement.remove_leftovers(file)
            if existing == "just_made" and word.certain:
                promise = self._promise(file)
                treatment = strategy.treatment_by_header(file, promise)
                if treatment is not None:
                    return _logged(treatment.apply(), promise, "blank", started)
            before = known if known is not None and known.stamp == file.stamp() else strategy.read(file)
            if strategy.is_done(before, self.mode):
                LOG.debug("%s: nothing to do in mode %s, it is %s", path, self.mode, before.state)
                return before
            promise = self._promise(file)
            treatment = _chosen(strategy, word, file, before, promise, existing)
            if treatment is None:
                return before
            if treatment.replaces and before is known:
                before = strategy.read(file)
                treatment = _chosen(strategy, word, file, before, promise, existing)
                if treatment is None:
                    return before
            return _logged(treatment.apply(), promise, before.state, started)

    def resize(self, path: str | os.PathLike[str], size: int, *, format: Optional[str] = None) -> DiskImage:
        """Grow a disk; the new part is preallocated too, the old one is as it was.

        :param size: the new virtual size in bytes
        :raises: InvalidSize, ImageInUse, FormatNotCertain, NoSpace,
            NotPreallocated, and what inspect() raises
        """
        path = os.fspath(path)
        started = time.monotonic()
        with os_errors.translated(path), disk_file.claimed(path) as file:
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
                    f"{size} bytes are not more than the {before.virtual_size} that it has",
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
            except exceptions.PreallocationError as exc:
                if file.stamp() != before.stamp:
                    with contextlib.suppress(exceptions.PreallocationError):
                        strategy.recover(file)
                    exc.remedy += f" {_cut_short(strategy, file, before, size)}"
                raise
            return _logged(after, promise, before.state, started)

    @staticmethod
    def _grown(strategy: Format, file: DiskFile, before: DiskImage, size: int, promise: Promise) -> DiskImage:
        """Grow a disk, and see what has become of it."""
        strategy.grow(file, before, size, promise)
        # Before, qemu-img has found no fault in it; now a glance will do, where the disk is all that it is to be.
        after = strategy.glance(file) or strategy.read(file)
        if after.virtual_size != size:
            raise exceptions.BrokenImage(
                file.path,
                f"qemu-img said that it has grown the disk to {size} bytes, and it has {after.virtual_size}",
                "See whether this qemu-img works, then try again.",
            )
        kept = (before.state, *promise.states)
        if before.state == "thin":
            kept += ("reserved", "mapped")
        return strategy.kept(after, promise, kept)

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
        return promises.made(place, self.mode, self.on_unsupported)


def _chosen(
    strategy: Format, word: Word, file: DiskFile, before: DiskImage, promise: Promise, existing: Existing
) -> Optional[Treatment]:
    """Choose the treatment of a disk that the word on its format allows."""
    treatment = strategy.treatment(file, before, promise, existing)
    if treatment is not None and treatment.replaces and not word.certain:
        if existing != "recreate_blank":
            record.require_certain(file, word, "it is not rewritten")
        log.warn_once(
            "format guessed", file.path, f"not made anew, because nobody tells that it is {word.format}; "
            "say so (--disk-format) if it is"
        )  # fmt: skip
        treatment = strategy.treatment(file, before, promise, "reserve")
    elif treatment is not None and treatment.replaces and existing == "recreate_blank" and before.in_use:
        # One that may be made anew may stay what it is, too.
        treatment = strategy.treatment(file, before, promise, "reserve")
    if treatment is None:
        LOG.debug("%s: left %s in mode %s", file.path, before.state, promise.mode)
    return treatment


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
        return f"It still has {found} bytes, and what it holds is as it was."
    if found == size:
        return (
            f"It has the {found} bytes that it was to have all the same, and what it holds is as it was; what is left "
            "to be done, imgprealloc allocate does."
        )
    return f"It has {found} bytes now of {size}, and what it holds is as it was; give the command again."


def _check_size(path: str, size: int) -> None:
    if size <= 0:
        raise exceptions.InvalidSize(path, f"{size} bytes are no size for a disk", "Give a positive number of bytes.")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
