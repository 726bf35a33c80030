# SPDX-License-Identifier: Apache-2.0
"""The strategy: what to do to a disk so that its guest never waits for space.

Preallocator has the verbs and what all formats share: looking first, choosing
a treatment, reading the disk again, keeping the promise or saying so. Its
subclasses know one format each. How a disk is read is in reading, what its
filesystem can promise in terms, how programs are called in qemu_img and
fallocate.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import os
import time
from typing import Any, ClassVar, Optional, TypeVar, cast

from oslo_log import log as logging
from oslo_utils import units

from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import lock
from imgprealloc import qcow2_header
from imgprealloc import qemu_img
from imgprealloc import reading
from imgprealloc import replacement
from imgprealloc import terms
from imgprealloc.image import DiskImage
from imgprealloc.qcow2_header import Blank
from imgprealloc.terms import Terms

LOG = logging.getLogger(__name__)

# 4 KiB subclusters, so that a guest's 4 KiB write copies nothing from the base.
OVERLAY_CLUSTER_SIZE = 128 * units.Ki
_LEAST_OVERLAY_CLUSTER_SIZE = 16 * units.Ki
_GREATEST_CLUSTER_SIZE = 2 * units.Mi

# The unit of all virtual sizes.
_SECTOR = 512

# raw has no metadata, and qemu-img refuses the word for it.
_RAW_PREALLOCATION = {"falloc": "falloc", "full": "full", "metadata": "off"}


_TOO_OLD = "this qemu-img cannot preallocate an overlay (5.2 or later can)"
_MAY_BE_RAW = "it has bytes after the end of the image, and may be a raw disk that a guest wrote a header to"
_NO_FILE = "is named by a protocol of QEMU's"
_NO_ROOM = "there is no room for a new disk beside it"
_NOT_REPLACED = "it is not made anew, and at the most its space is reserved"


# What to do to a disk with data; returns the disk as it is afterwards.
Treatment = Callable[[], DiskImage]

_Verb = TypeVar("_Verb", bound=Callable[..., DiskImage])


def _told(verb: _Verb) -> _Verb:
    """Have a verb tell what the operating system refuses as an error of ours."""

    @functools.wraps(verb)
    def telling(self: Preallocator, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> DiskImage:
        with terms.os_errors(os.fspath(path)):
            return verb(self, path, *args, **kwargs)

    return cast(_Verb, telling)


class Preallocator:
    """Create, preallocate and grow disks in one mode, whatever their format.

    The format is the caller's where the verb gets one, and else what
    qemu-img info finds. A subclass is a Preallocator for its one format.

    :param mode: qemu-img's word: "falloc" holds space, "full" writes it,
        "metadata" only maps the clusters and holds nothing
    :param on_unsupported: instead of mode falloc, where the filesystem has no
        fallocate: "metadata", "full" or "error"
    :param overlay_cluster_size: bytes, for overlays that are made anew
    :raises: ValueError for a mode, a fallback or a cluster size there is not
    """

    format: ClassVar[Optional[str]] = None

    def __init__(
        self,
        mode: str = "falloc",
        *,
        on_unsupported: str = "metadata",
        overlay_cluster_size: int = OVERLAY_CLUSTER_SIZE,
    ) -> None:
        if mode not in terms.MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(terms.MODES)}")
        if on_unsupported not in terms.ON_UNSUPPORTED:
            raise ValueError(f"on_unsupported {on_unsupported!r} is not one of {', '.join(terms.ON_UNSUPPORTED)}")
        in_range = _LEAST_OVERLAY_CLUSTER_SIZE <= overlay_cluster_size <= _GREATEST_CLUSTER_SIZE
        if not in_range or overlay_cluster_size & (overlay_cluster_size - 1):
            raise ValueError(f"overlay_cluster_size {overlay_cluster_size} is not a power of two from 16 KiB to 2 MiB")
        self.mode = mode
        self.on_unsupported = on_unsupported
        self.overlay_cluster_size = overlay_cluster_size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.mode!r})"

    @_told
    def inspect(self, path: str | os.PathLike[str], *, format: str | None = None) -> DiskImage:
        """Read a disk, also one in use; nothing is written.

        :raises: DiskNotFound, UnsupportedFormat, FormatMismatch, BrokenImage,
            QemuImgMissing, QemuImgKilled
        """
        path = os.fspath(path)
        return self._of(path, format or self.format or reading.detected_format(path))._read(path)

    @_told
    def create(
        self,
        path: str | os.PathLike[str],
        size: int,
        backing: str | None = None,
        *,
        format: str | None = None,
        backing_format: str | None = None,
    ) -> DiskImage:
        """Create a new preallocated disk, qcow2 unless told otherwise.

        :param size: virtual size in bytes
        :param backing: the backing file, absolute or relative to path's folder
        :param backing_format: its format; detected if not given
        :raises: DiskExists, InvalidSize, NoSpace, and what inspect() raises
        """
        path = os.fspath(path)
        strategy = self._of(path, format or self.format or Qcow2Preallocator.format)
        _check_size(path, size)
        if os.path.lexists(path):
            raise exceptions.DiskExists(path, "there is a file already", "Remove it, or choose another path.")
        size = _round_up(size, _SECTOR)
        started = time.monotonic()
        offer = terms.offered(path, self.mode, self.on_unsupported)
        after = strategy._make(path, size, offer, backing, backing_format)
        return _logged(after, offer, "absent", started)

    @_told
    def preallocate(
        self,
        path: str | os.PathLike[str],
        rewrite: bool = False,
        *,
        in_place: bool = False,
        format: str | None = None,
    ) -> DiskImage:
        """Preallocate a disk that exists; what the guest reads never changes.

        A second call runs nothing that writes.

        :param rewrite: whether a disk with data may be copied into a
            preallocated one; else the space for its worst case is reserved
        :param in_place: whether it has to stay the same file, also where
            nothing is in it; goes before rewrite
        :raises: ImageInUse, NoSpace, NotPreallocated, and what inspect() raises
        """
        path = os.fspath(path)
        started = time.monotonic()
        named = format or self.format
        strategy = self._of(path, named or reading.detected_format(path))
        blank = None if in_place else strategy._blank(path, certain=named is not None)
        if blank is not None:
            offer = terms.offered(path, self.mode, self.on_unsupported)
            return _logged(strategy._recreate(path, blank, offer), offer, "blank", started)
        before = strategy._read(path)
        if strategy._is_done(before, self.mode):
            LOG.debug("%s: nothing to do in mode %s, it is %s", path, self.mode, before.state)
            return before
        offer = terms.offered(path, self.mode, self.on_unsupported)
        replace = rewrite and not in_place
        treatment = strategy._treatment(before, offer, rewrite=replace, certain=named is not None)
        if treatment is None:
            LOG.debug("%s: left %s in mode %s", path, before.state, offer.mode)
            return before
        return _logged(treatment(), offer, before.state, started)

    @_told
    def resize(self, path: str | os.PathLike[str], size: int, *, format: str | None = None) -> DiskImage:
        """Grow a disk; the new part is preallocated too, the old one is as it was.

        :param size: the new virtual size in bytes
        :raises: InvalidSize, ImageInUse, NoSpace, NotPreallocated, and what
            inspect() raises
        """
        path = os.fspath(path)
        started = time.monotonic()
        named = format or self.format
        strategy = self._of(path, named or reading.detected_format(path))
        before = strategy._read(path)
        if named is None and _has_stray_bytes(before):
            raise exceptions.UnsupportedFormat(path, _MAY_BE_RAW, "Say which it is.")
        _check_size(path, size)
        size = _round_up(size, _SECTOR)
        if size <= before.virtual_size:
            raise exceptions.InvalidSize(
                path,
                f"{size} bytes are not more than the {before.virtual_size} that it has",
                "A disk can only grow; shrinking would cut off data.",
            )
        offer = terms.offered(path, self.mode, self.on_unsupported)
        lock.refuse_writer(path)
        strategy._grow(before, size, offer)
        kept = (before.state, *offer.states)
        if before.state == "thin":
            kept += ("reserved", "mapped")
        return _logged(strategy._promised(strategy._read(path), offer, kept), offer, before.state, started)

    # What each format answers for itself.

    def _read(self, path: str) -> DiskImage:
        raise NotImplementedError

    def _is_done(self, image: DiskImage, mode: str) -> bool:
        """Whether a disk has all that the mode can give it."""
        raise NotImplementedError

    def _treatment(self, image: DiskImage, offer: Terms, *, rewrite: bool, certain: bool) -> Treatment | None:
        """Choose the first treatment that fits a disk with data; None where there is nothing to do.

        :param certain: whether the format is the caller's word, not a guess
        """
        raise NotImplementedError

    def _blank(self, path: str, *, certain: bool) -> Blank | None:
        """Return what is to be made anew of a disk that holds nothing, or None."""
        return None

    def _recreate(self, path: str, blank: Blank, offer: Terms) -> DiskImage:
        """Put a preallocated disk in the place of one that holds nothing."""
        raise NotImplementedError

    def _make(self, path: str, size: int, offer: Terms, backing: str | None, backing_format: str | None) -> DiskImage:
        """Create a preallocated disk at path."""
        raise NotImplementedError

    def _grow(self, image: DiskImage, size: int, offer: Terms) -> None:
        """Grow a disk, the new part preallocated."""
        raise NotImplementedError

    @staticmethod
    def _virtual_size(path: str, format: str | None) -> int:
        """Return the virtual size, in bytes, of a backing file, whatever its format."""
        return reading.virtual_size(path, format)

    # What they share.

    def _of(self, path: str, format: str | None) -> Preallocator:
        """Return the strategy for a format, configured like this one."""
        if format not in FORMATS or self.format not in (None, format):
            expected = self.format or " or ".join(FORMATS)
            raise exceptions.UnsupportedFormat(
                path, f"its format is {format}, not {expected}", "Convert it with qemu-img convert first."
            )
        if self.format == format:
            return self
        return FORMATS[format](
            self.mode, on_unsupported=self.on_unsupported, overlay_cluster_size=self.overlay_cluster_size
        )

    def _put(self, path: str, offer: Terms, write: Callable[[str], None]) -> DiskImage:
        """Have a new file written beside path, read it, and let it become the disk if it is what was promised.

        :raises: NotPreallocated
        """
        found: list[DiskImage] = []

        def judge(new: str) -> None:
            image = dataclasses.replace(self._read(new), path=path)
            found.append(self._promised(image, offer, offer.states))

        with replacement.new_disk(os.path.abspath(path), judge) as new:
            write(new)
        return found[0]

    def _hold(
        self, image: DiskImage, length: int, offer: Terms, states: tuple[str, ...], *, zeros: bool = False
    ) -> DiskImage:
        """Set aside the space of a disk up to length, where it is.

        :param zeros: whether what was never written is to be written, too
        """
        _hold(image, length, offer, zeros=zeros)
        return self._promised(self._read(image.path), offer, states)

    def _promised(self, after: DiskImage, offer: Terms, states: tuple[str, ...]) -> DiskImage:
        """Compare a disk as it has just been read with what was promised.

        :raises: NotPreallocated
        """
        if after.state in states or self._is_done(after, offer.mode):
            return after
        short = f"mode {offer.mode} left it {after.state}, {after.shortfall} bytes short"
        if offer.holds_space:
            raise exceptions.NotPreallocated(
                after.path, short, "The filesystem does not keep what it promises; see imgprealloc show.", after
            )
        terms.warn_once(after.path, short)
        return after


class RawPreallocator(Preallocator):
    """raw: the file is the disk, byte for byte, and has no map."""

    format = "raw"

    def _read(self, path: str) -> DiskImage:
        return reading.raw(path)

    def _is_done(self, image: DiskImage, mode: str) -> bool:
        return mode == "metadata" or image.held

    @staticmethod
    def _virtual_size(path: str, format: str | None) -> int:
        if not os.path.isfile(path):
            # Such as a block device, whose length stat(2) does not tell.
            return reading.virtual_size(path, format)
        # Its length, in whole sectors; no need to ask qemu-img.
        return _round_up(os.path.getsize(path), _SECTOR)

    def _treatment(self, image: DiskImage, offer: Terms, *, rewrite: bool, certain: bool) -> Treatment | None:
        if self._is_done(image, offer.mode):
            return None
        if not image.copy_on_write:
            zeros = offer.mode == "full"
            return functools.partial(self._hold, image, image.file_size, offer, offer.states, zeros=zeros)
        if not offer.nocow:
            return None
        if not rewrite:
            raise _copied_on_write(image.path)
        return functools.partial(self._copy, image, offer)

    def _copy(self, image: DiskImage, offer: Terms) -> DiskImage:
        path = os.path.abspath(image.path)
        terms.require_space(path, image.virtual_size)

        def write(new: str) -> None:
            replacement.refuse_changed(path, image.modified)
            qemu_img.convert(path, new, "raw", {**offer.nocow, "preallocation": _RAW_PREALLOCATION[offer.mode]})

        return self._put(image.path, offer, write)

    def _make(self, path: str, size: int, offer: Terms, backing: str | None, backing_format: str | None) -> DiskImage:
        if backing is not None:
            raise exceptions.UnsupportedFormat(path, "a raw disk has no backing file", "Create it as qcow2.")
        if offer.mode != "metadata":
            terms.require_space(path, size)
        options = {**offer.nocow, "preallocation": _RAW_PREALLOCATION[offer.mode]}
        return self._put(path, offer, lambda new: qemu_img.create(new, size, "raw", options))

    def _grow(self, image: DiskImage, size: int, offer: Terms) -> None:
        path = os.path.abspath(image.path)
        if offer.mode != "metadata":
            terms.require_space(path, size - image.virtual_size)
        qemu_img.resize(path, size, "raw", _RAW_PREALLOCATION[offer.mode])


class Qcow2Preallocator(Preallocator):
    """qcow2: clusters, found by a map that has to be filled before the guest needs it."""

    format = "qcow2"

    def _read(self, path: str) -> DiskImage:
        return reading.qcow2(path)

    def _is_done(self, image: DiskImage, mode: str) -> bool:
        return image.mapped if mode == "metadata" else image.state == "preallocated"

    def _treatment(self, image: DiskImage, offer: Terms, *, rewrite: bool, certain: bool) -> Treatment | None:
        if self._is_done(image, offer.mode):
            return None
        if image.mapped and not image.copy_on_write:
            return functools.partial(self._hold, image, image.file_size, offer, offer.states)
        if image.mapped and not offer.nocow:
            return None
        if rewrite:
            obstacle = self._obstacle(image, certain)
            if obstacle is None and self._lacks_room(image.path, image.virtual_size) and self._could_be_held(image):
                obstacle = _NO_ROOM
            if obstacle is None:
                return functools.partial(self._rewrite, image, offer)
            terms.warn_once(image.path, f"{obstacle}; {_NOT_REPLACED}")
        if not offer.holds_space:
            return None
        if image.copy_on_write:
            raise _copied_on_write(image.path)
        if image.held:
            return None
        return functools.partial(self._hold, image, image.worst_case_size, offer, ("reserved", "preallocated"))

    def _blank(self, path: str, *, certain: bool) -> Blank | None:
        status = reading.regular_file(path)
        blank = qcow2_header.blank(path)
        if blank is None or not blank.virtual_size:
            return None
        obstacle = _obstacle_in_header(blank)
        if not certain and status.st_size > _round_up(blank.end, blank.cluster_size):
            obstacle = _MAY_BE_RAW
        elif self._lacks_room(path, blank.virtual_size) and self._could_be_held(self._read(path)):
            # As stock Nova leaves a swap disk that was never used: the space
            # that is short for a second one is its own.
            obstacle = _NO_ROOM
        if obstacle is None:
            return blank
        terms.warn_once(path, f"{obstacle}; {_NOT_REPLACED}")
        return None

    def _lacks_room(self, path: str, size: int) -> bool:
        """Whether the filesystem has too little space for one more disk."""
        if filesystem.available(os.path.dirname(os.path.abspath(path))) >= size:
            return False
        return terms.offered(path, self.mode, self.on_unsupported).holds_space

    @staticmethod
    def _could_be_held(image: DiskImage) -> bool:
        return image.shortfall <= filesystem.available(os.path.dirname(os.path.abspath(image.path)))

    @staticmethod
    def _obstacle(image: DiskImage, certain: bool) -> str | None:
        """Say why a disk with data cannot be replaced by a copy, if it cannot."""
        if image.snapshots:
            return "it has internal snapshots, which a copy would lose"
        if image.bitmaps:
            return "it has dirty bitmaps, which a copy would lose"
        if not certain and _has_stray_bytes(image):
            return _MAY_BE_RAW
        return _obstacle_in_header(image)

    def _make(self, path: str, size: int, offer: Terms, backing: str | None, backing_format: str | None) -> DiskImage:
        if backing is not None:
            if qemu_img.version() < qemu_img.OVERLAY_PREALLOCATION:
                raise exceptions.QemuImgTooOld(path, _TOO_OLD, "Install QEMU 5.2 or later.")
            if _names_protocol(backing):
                raise exceptions.UnsupportedFormat(path, f"its backing file {_NO_FILE}: {backing}", "Name a file.")
            backing_format = backing_format or reading.detected_format(_beside(path, backing))
        return self._put(path, offer, lambda new: self._write(path, new, size, offer, backing, backing_format))

    def _recreate(self, path: str, blank: Blank, offer: Terms) -> DiskImage:
        def write(new: str) -> None:
            replacement.refuse_changed(path, blank.modified)
            self._write(
                path, new, blank.virtual_size, offer, blank.backing_file, blank.backing_format, blank.cluster_size
            )

        return self._put(path, offer, write)

    def _write(
        self,
        path: str,
        new: str,
        size: int,
        offer: Terms,
        backing_file: str | None,
        backing_format: str | None,
        cluster_size: int | None = None,
    ) -> None:
        """Fill the new file beside path with a disk that holds nothing."""
        if offer.mode != "metadata":
            terms.require_space(path, size)
        options = self._options(offer, backing_file, cluster_size)
        first_size = size
        if backing_file is not None and offer.mode != "metadata":
            # What lies beyond the base's end is made by growing. The cluster
            # with the base's last bytes has to be there before: grown, it
            # would read as zeros.
            asked = FORMATS.get(str(backing_format), Preallocator)
            base_size = asked._virtual_size(_beside(path, backing_file), backing_format)
            first_size = min(size, _round_up(max(base_size, 1), self.overlay_cluster_size))
        qemu_img.create(new, first_size, "qcow2", options, backing_file=backing_file, backing_format=backing_format)
        if first_size < size:
            with replacement.zeros(os.path.abspath(path), size) as zeros:
                qemu_img.resize_over_zeros(new, size, zeros, offer.mode, flush=False)
        _fill(new, os.path.getsize(new), offer)

    def _rewrite(self, image: DiskImage, offer: Terms) -> DiskImage:
        path = os.path.abspath(image.path)
        if offer.mode != "metadata":
            terms.require_space(path, image.virtual_size)
        options = self._options(offer, image.backing_file, image.cluster_size)

        def write(new: str) -> None:
            replacement.refuse_changed(path, image.modified)
            qemu_img.convert(
                path, new, "qcow2", options, backing_file=image.backing_file, backing_format=image.backing_format
            )
            _fill(new, os.path.getsize(new), offer)

        return self._put(image.path, offer, write)

    def _options(self, offer: Terms, backing_file: str | None, cluster_size: int | None) -> dict[str, str]:
        options = {**offer.nocow, "preallocation": offer.mode}
        if backing_file is not None:
            # Only subclusters can be mapped and still let the base show
            # through. The base's own cluster size has no say in it.
            return {**options, "cluster_size": str(self.overlay_cluster_size), "extended_l2": "on"}
        return options if cluster_size is None else {**options, "cluster_size": str(cluster_size)}

    def _grow(self, image: DiskImage, size: int, offer: Terms) -> None:
        path = os.path.abspath(image.path)
        if offer.mode != "metadata":
            terms.require_space(path, size - image.virtual_size)
        if _has_stray_bytes(image):
            # Left by a growth that was cut short; qemu-img would stumble over it.
            with lock.no_writer(path):
                replacement.refuse_changed(path, image.modified)
                os.truncate(path, _round_up(image.image_end, image.cluster_size or 1))
        file_size = os.path.getsize(path)
        aligned = _round_up(image.virtual_size, image.cluster_size or 1)
        # In mode metadata QEMU maps clusters that were freed before, and shows
        # the guest what was in them, unless it has to hide a backing file.
        mode = "off" if offer.mode == "metadata" else offer.mode
        if offer.mode == "metadata":
            over_zeros = qcow2_header.can_zero_clusters(path)
        else:
            over_zeros = image.extended_l2 and image.backing_file is not None
        if not over_zeros or size <= aligned:
            qemu_img.resize(path, size, "qcow2", mode)
        else:
            if aligned > image.virtual_size:
                qemu_img.resize(path, aligned, "qcow2", mode)
            with replacement.zeros(path, size) as zeros:
                qemu_img.resize_over_zeros(path, size, zeros, offer.mode)
        _fill(path, os.path.getsize(path) - file_size, offer, start=file_size)
        if image.state == "reserved" and offer.holds_space:
            grown = self._read(image.path)
            _hold(grown, grown.worst_case_size, offer)


# One row a format; a new one is a class and a row.
FORMATS: dict[str, type[Preallocator]] = {
    "raw": RawPreallocator,
    "qcow2": Qcow2Preallocator,
}


def _logged(after: DiskImage, offer: Terms, before: str, started: float) -> DiskImage:
    """Log what a verb has done; the one line that a disk gets."""
    seconds = time.monotonic() - started
    LOG.info("%s: mode %s, %s before, %s now, %.2f s", after.path, offer.mode, before, after.state, seconds)
    return after


def _hold(image: DiskImage, length: int, offer: Terms, *, zeros: bool = False) -> None:
    """Set aside the space of a disk up to length, and take back what it shares.

    :param zeros: whether what was never written is to be written, too
    """
    path = os.path.abspath(image.path)
    terms.require_space(path, image.shortfall)
    _unshare(path)
    if zeros:
        fallocate.write_zeros(path)
    _fill(path, length, offer)


def _unshare(path: str) -> None:
    shared = [extent for extent in fallocate.extents(path) or () if extent.shared]
    if shared:
        fallocate.unshare(path, shared)


def _fill(path: str, length: int, offer: Terms, start: int = 0) -> None:
    """Fill the holes of a file; with zeros, where there is no other way."""
    if offer.holds_space:
        for gap in fallocate.gaps(path, start, start + length):
            fallocate.reserve(path, gap.start, gap.length)
    elif offer.mode == "full":
        fallocate.write_zeros(path)


def _has_stray_bytes(image: DiskImage) -> bool:
    """Whether a qcow2 file goes on after the image's last cluster."""
    return bool(image.cluster_size) and image.file_size > _round_up(image.image_end, image.cluster_size or 1)


def _obstacle_in_header(image: DiskImage | Blank) -> str | None:
    if image.backing_file is not None and image.backing_format is None:
        return "its header does not name its backing file's format"
    if image.backing_file is not None and _names_protocol(image.backing_file):
        return f"its backing file {_NO_FILE}"
    if image.backing_file is not None and qemu_img.version() < qemu_img.OVERLAY_PREALLOCATION:
        return _TOO_OLD
    return None


def _beside(path: str, backing_file: str) -> str:
    """Resolve a backing file's name as QEMU does, from the folder of the overlay."""
    return os.path.join(os.path.dirname(os.path.abspath(path)), backing_file)


def _names_protocol(backing_file: str) -> bool:
    """Whether QEMU takes a name for more than a file's, as in nbd://host or json:{}: a colon before any slash."""
    return ":" in backing_file.partition("/")[0]


def _check_size(path: str, size: int) -> None:
    if size <= 0:
        raise exceptions.InvalidSize(path, f"{size} bytes are no size for a disk", "Give a positive number of bytes.")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _copied_on_write(path: str) -> exceptions.UnsupportedFilesystem:
    return exceptions.UnsupportedFilesystem(
        path,
        "each overwrite of this file takes new space (copy on write), so that none can be set aside for it",
        "Rewrite the disk, so that it is made anew with nocow.",
    )
