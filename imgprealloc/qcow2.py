# SPDX-License-Identifier: Apache-2.0
"""qcow2: clusters, found by a map that has to be filled before the guest needs it."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import os
from typing import Optional

from oslo_utils import units

from imgprealloc import backing
from imgprealloc import exceptions
from imgprealloc import format
from imgprealloc import glance
from imgprealloc import lock
from imgprealloc import log
from imgprealloc import placement
from imgprealloc import qcow2_header
from imgprealloc import qemu_img
from imgprealloc import reading
from imgprealloc import refcounts
from imgprealloc import replacement
from imgprealloc import subclusters
from imgprealloc import worst_case
from imgprealloc.disk_file import DiskFile
from imgprealloc.disk_file import Place
from imgprealloc.format import Existing
from imgprealloc.format import Geometry
from imgprealloc.format import Treatment
from imgprealloc.image import DiskImage
from imgprealloc.image import FileStamp
from imgprealloc.layout import Layout
from imgprealloc.promise import Promise
from imgprealloc.qcow2_header import Blank
from imgprealloc.replacement import NewFile
from imgprealloc.settings import Mode
from imgprealloc.settings import OverlaySubclusters

# qemu-img's own choice, in bytes.
_CLUSTER_SIZE = 64 * units.Ki

_TOO_OLD = "this qemu-img cannot preallocate an overlay (5.2 or later can)"
_PROTOCOL = "is named by a protocol of QEMU's"
_NO_ROOM = "there is no room for a new disk beside it"
_WAITS = "it was not closed well, and its refcounts wait for their repair, which QEMU does at its instance's next start"
_NOT_REPLACED = "it is not made anew, and at the most its space is reserved"


class Qcow2(format.Format):
    """QEMU's format, with or without a backing file."""

    name = "qcow2"

    def read(self, file: DiskFile) -> DiskImage:
        return reading.qcow2(file)

    def glance(self, file: DiskFile) -> Optional[DiskImage]:
        return glance.qcow2(file)

    def layout(self, file: DiskFile) -> Layout:
        return placement.qcow2(file)

    def is_done(self, image: DiskImage, mode: Mode) -> bool:
        return image.mapped if mode == "metadata" else image.state == "preallocated"

    def treatment(self, file: DiskFile, image: DiskImage, promise: Promise, existing: Existing) -> Optional[Treatment]:
        if self.is_done(image, promise.mode):
            return None
        if image.mapped and not image.copy_on_write:
            return self.holding("fill", file, image, promise, promise.states)
        if image.mapped and not promise.nocow:
            return None
        blank = qcow2_header.blank(file.fd) if existing != "reserve" and _holds_nothing(image) else None
        if blank is not None or existing in ("rewrite", "just_made"):
            obstacle = _obstacle(file, image) or self._lack_of_room(file, image, promise)
            if obstacle is None:
                if blank is not None:
                    return self._recreation(file, blank, image.stamp, promise)
                return self._rewriting(file, image, promise)
            log.warn_once("not replaced", file.path, f"{obstacle}; {_NOT_REPLACED}")
        if not promise.holds_space:
            return None
        if image.copy_on_write:
            raise format.copied_on_write(file.path)
        if image.held:
            return None
        return self.holding("reserve", file, image, promise, ("reserved", "preallocated"))

    def treatment_by_header(self, file: DiskFile, promise: Promise) -> Optional[Treatment]:
        stamp = file.stamp()
        blank = qcow2_header.blank(file.fd)
        if blank is None or not blank.virtual_size or _obstacle_in_header(file, blank) is not None:
            return None
        recreation = self._recreation(file, blank, stamp, promise, just_made=True)
        if promise.holds_space and promise.room(file.folder_fd) < recreation.needed:
            # A look may tell that the space that is short is its own.
            return None
        return recreation

    def make(
        self, place: Place, size: int, promise: Promise, backing_file: Optional[str], backing_format: Optional[str]
    ) -> DiskImage:
        if backing_file is not None:
            if qemu_img.version(place.path) < qemu_img.OVERLAY_PREALLOCATION:
                raise exceptions.QemuImgTooOld(place.path, _TOO_OLD, "Install QEMU 5.2 or later.")
            if backing.names_protocol(backing_file):
                raise exceptions.UnsupportedFormat(
                    place.path, f"its backing file {_PROTOCOL}: {backing_file}", "Name a file."
                )
            if backing_format is None:
                raise exceptions.FormatNotCertain(
                    place.path,
                    f"nobody has told the format of its backing file {backing_file}, and a header in that "
                    "may have been written by whoever filled it",
                    "Say which it is: --backing-format raw, or qcow2 (backing_format= in Python).",
                    "",
                )
        blank = Blank(size, None, backing_file, backing_format)
        return self._put_blank(functools.partial(replacement.new, place), place, blank, promise)

    def grow(self, file: DiskFile, image: DiskImage, size: int, promise: Promise) -> None:
        if qcow2_header.has_lost_bitmaps(file.fd):
            raise exceptions.BrokenImage(
                file.path,
                "its header says that it has bitmaps, and not where; qemu-img would mark it corrupt as it grows",
                "Nothing was changed; copy it with qemu-img convert, and take the copy.",
            )
        if image.waits_for_repair:
            raise exceptions.BrokenImage(
                file.path, _WAITS, "Nothing was changed; start it, or run qemu-img check -r all, then try again."
            )
        if promise.mode != "metadata":
            promise.require_space(file, size - image.virtual_size, file.fd)
        self._clear_end(file, image)
        self._decompress_last_cluster(file, image)
        file_size = os.fstat(file.fd).st_size
        aligned = _round_up(image.virtual_size, image.cluster_size or 1)
        # In mode metadata QEMU maps clusters that were freed before, and shows
        # the guest what was in them, and what a shrink has left in the last
        # cluster, unless it has to hide a backing file.
        preallocation = "off" if promise.mode == "metadata" else promise.of_qemu
        if promise.mode == "metadata":
            over_zeros = qcow2_header.can_zero_clusters(file.fd)
        else:
            over_zeros = size > aligned and self._has_allocated_subclusters(file, image)
        if not over_zeros:
            self._resize(file, image, size, preallocation)
        else:
            with replacement.zeros(file, size) as zeros:
                self._show_last_cluster(file, image, zeros)
                qemu_img.resize_over_zeros(
                    file.path, file.program_name, size, zeros.program_name, promise.of_qemu,
                    grown=size - image.virtual_size,
                )  # fmt: skip
        format.fill(file, os.fstat(file.fd).st_size - file_size, promise, start=file_size)
        format.write_out(file, promise, start=file_size)
        if image.state == "reserved" and promise.holds_space:
            grown = self.read(file)
            format.set_space_aside(file, grown, grown.worst_case_size, promise)

    @staticmethod
    def _clear_end(file: DiskFile, image: DiskImage) -> None:
        """Remove what a growth that was cut short has left at the end, over which qemu-img would stumble.

        The format is no guess, or nothing would be grown.
        """
        beyond = refcounts.end_beyond(file.fd, image.file_size)
        if not beyond and not image.has_stray_bytes:
            return
        image_end, stamp = image.image_end, image.stamp
        with lock.no_writer(file.path, file.fd):
            file.refuse_changed(stamp)
            if beyond:
                # For qemu-img to see that nothing is in these clusters.
                os.truncate(file.fd, beyond)
        if beyond:
            # Which keeps others out by itself, and would be kept out by us.
            qemu_img.repair(file.path, file.program_name)
            stamp = file.stamp()
            check = qemu_img.check(file.path, file.program_name, "qcow2")
            image_end = qemu_img.number(file.path, check, "image-end-offset")
        with lock.no_writer(file.path, file.fd):
            # Whoever has had it open meanwhile may have data there.
            file.refuse_changed(stamp)
            os.truncate(file.fd, _round_up(image_end, image.cluster_size or 1))

    @staticmethod
    def _has_allocated_subclusters(file: DiskFile, image: DiskImage) -> bool:
        """Whether an overlay has been made with its subclusters allocated, and so is to grow like that."""
        if not image.extended_l2 or image.backing_file is None:
            return False
        base_size = 0
        if image.backing_format is not None and not backing.names_protocol(image.backing_file):
            base_size = backing.virtual_size(file, image.backing_file, image.backing_format)
        cluster_size = image.cluster_size or 1
        start, end = _round_up(base_size, cluster_size), image.virtual_size // cluster_size * cluster_size
        # Where no cluster lies beyond the base, only those of its own part can tell.
        return subclusters.mostly_allocated(file.fd, start if start < end else 0, end)

    def copy_thin(self, file: DiskFile, image: DiskImage, promise: Promise) -> DiskImage:
        obstacle = _obstacle(file, image)
        if obstacle is None and image.compressed_clusters:
            obstacle = f"it has {image.compressed_clusters} compressed clusters, which take more in a copy"
        if obstacle is not None:
            raise exceptions.UnsupportedFormat(
                file.path, obstacle, "Give back what nobody has written to, without copying it (imgprealloc thin)."
            )
        format.require_space_for_copy(file, promise, image.cluster_size or 1)
        base: Optional[_Base] = None
        if image.backing_file is not None:
            base = _Base.of(file, image.backing_file, str(image.backing_format))
        kept = qcow2_header.read(file.path, file.fd).options
        options = {**kept, **promise.file_options, "cluster_size": str(image.cluster_size)}
        size = image.virtual_size

        def write(new: NewFile) -> None:
            names = (file.path, file.program_name, new.program_name)
            if base is None:
                qemu_img.convert(*names, size, "qcow2", options)
                return
            over = {"backing_file": base.path, "backing_format": base.format}
            qemu_img.convert_thin(*names, size, options, **over)
            base.put_under(new, base.path)

        asked = Geometry(size, image.cluster_size, image.backing_file, image.backing_format)
        place_for = functools.partial(replacement.replacing, file, image.stamp)
        return self.put(place_for, asked, promise, write, thin=True)

    def recover(self, file: DiskFile) -> None:
        check = qemu_img.check(file.path, file.program_name, "qcow2")
        if qemu_img.count(file.path, check, "corruptions"):
            # Clusters in use that count as free would be given to the next write.
            qemu_img.repair(file.path, file.program_name)

    @staticmethod
    def _resize(file: DiskFile, image: DiskImage, size: int, preallocation: str) -> None:
        name, over = Qcow2._over_backing(file, image)
        grown = size - image.virtual_size
        qemu_img.resize(file.path, name, size, "qcow2", preallocation, grown=grown, **over)

    @staticmethod
    def _show_last_cluster(file: DiskFile, image: DiskImage, stand_in: DiskFile) -> None:
        """Put into what stands in for a backing file what the disk reads as in a last cluster that it ends within."""
        start = _start_of_last_cluster(image)
        if image.backing_file is not None and start < image.virtual_size:
            name, over = Qcow2._over_backing(file, image)
            qemu_img.copy_out(file.path, name, stand_in.program_name, start, image.virtual_size, **over)

    @staticmethod
    def _decompress_last_cluster(file: DiskFile, image: DiskImage) -> None:
        """Write a last cluster anew that may be compressed, where QEMU would lose it as it grows the disk.

        QEMU gives a cluster that a disk ends within another place, and leaves
        the marks of its subclusters as they are; a compressed cluster has none,
        so that nothing of its data would count (qcow2-cluster.c,
        qcow2_alloc_cluster_link_l2; 5.2 to 11.1).
        """
        start = _start_of_last_cluster(image)
        if not image.extended_l2 or not image.compressed_clusters or start == image.virtual_size:
            return
        name, over = Qcow2._over_backing(file, image)
        with replacement.zeros(file, image.virtual_size) as copy:
            stamp = file.stamp()
            qemu_img.copy_out(file.path, name, copy.program_name, start, image.virtual_size, **over)
            # What somebody has written there meanwhile is not in the copy.
            file.refuse_changed(stamp)
            qemu_img.copy_back(file.path, copy.program_name, name, start, image.virtual_size, **over)

    @staticmethod
    def _over_backing(file: DiskFile, image: DiskImage) -> tuple[str, dict[str, str]]:
        """Return the name by which a program opens a disk, and its backing file as far as we name that."""
        if image.backing_file is None:
            return file.program_name, {}
        is_file = not backing.names_protocol(image.backing_file)
        if image.backing_format is None or not is_file:
            if is_file:
                backing.look_at_chain(file, file.beside(image.backing_file), None)
            # QEMU alone knows what it is; the name that it finds it by is the disk's own.
            return file.real_path, {}
        backing.virtual_size(file, image.backing_file, image.backing_format)
        over = {"backing_file": file.beside(image.backing_file), "backing_format": image.backing_format}
        return file.program_name, over

    def _recreation(
        self, file: DiskFile, blank: Blank, stamp: FileStamp, promise: Promise, *, just_made: bool = False
    ) -> Treatment:
        # What a guest flushes of a file that was only allocated takes the file's
        # name with it, in the filesystem's journal; of one that is written, it may not.
        durably = promise.mode == "full" or not just_made
        place_for = functools.partial(replacement.replacing, file, stamp, durably=durably)
        # As QEMU sees it, in whole sectors.
        blank = dataclasses.replace(blank, virtual_size=blank.virtual_size // reading.SECTOR * reading.SECTOR)
        options = self._options(promise, blank.backing_file, blank.cluster_size, blank.options)
        needed = self._needed_blank(blank, options, promise)

        def count() -> int:
            copied = 0
            if blank.backing_file is not None and self.settings.overlay_subclusters == "copied":
                copied = _Base.of(file, blank.backing_file, str(blank.backing_format)).size
            return max(needed if promise.mode == "full" else 0, min(copied, blank.virtual_size))

        return Treatment(
            "recreate",
            promise,
            functools.partial(self._put_blank, place_for, file, blank, promise, quickly=just_made),
            promise.state,
            needed=needed,
            freed=format.given_back(file),
            written=count,
            alone=True,
        )

    def _put_blank(
        self, place_for: format.PlaceFor, place: Place, blank: Blank, promise: Promise, *, quickly: bool = False
    ) -> DiskImage:
        _tell_version(place, blank.options, blank.backing_file)
        options = self._options(promise, blank.backing_file, blank.cluster_size, blank.options)
        asked = Geometry(
            blank.virtual_size,
            int(options["cluster_size"]) if "cluster_size" in options else None,
            blank.backing_file,
            blank.backing_format,
        )
        return self.put(
            place_for, asked, promise, lambda new: self._write(place, new, blank, options, promise), quickly=quickly
        )

    def _write(self, place: Place, new: NewFile, blank: Blank, options: dict[str, str], promise: Promise) -> None:
        """Fill a new file with a disk that holds nothing."""
        size = blank.virtual_size
        _require_space(place, self._needed_blank(blank, options, promise), promise)
        if blank.backing_file is None:
            qemu_img.create(new.path, new.program_name, size, "qcow2", options)
        else:
            base = _Base.of(place, blank.backing_file, str(blank.backing_format))
            self._write_overlay(place, new, base, size, options, promise)
        format.fill(new, os.fstat(new.fd).st_size, promise)
        format.write_out(new, promise)

    def _write_overlay(
        self, place: Place, new: NewFile, base: _Base, size: int, options: dict[str, str], promise: Promise
    ) -> None:
        kind = self._subclusters(promise)
        # From anything but nothing, growing would leave a gap of a cluster.
        first_size = 0 if kind == "unallocated" else self._size_over(base, size)
        if kind == "copied" and base.size:
            copied_size = min(size, base.size)
            qemu_img.copy_in(new.path, base.path, base.format, new.program_name, copied_size, options)
            base.put_under(new, None)
            _refuse_other_size(new, copied_size)
            if copied_size < first_size:
                qemu_img.resize(
                    new.path, new.program_name, first_size, "qcow2", promise.of_qemu,
                    backing_file=base.path, backing_format=base.format,
                )  # fmt: skip
        else:
            qemu_img.create(
                new.path, new.program_name, first_size, "qcow2", options,
                backing_file=base.name, backing_format=base.format,
            )  # fmt: skip
        self._grow_new(place, new, first_size, size, promise, allocated=kind != "unallocated")

    def _subclusters(self, promise: Promise) -> OverlaySubclusters:
        """Return how far the subclusters of an overlay go; growing without space allocates none."""
        kind = self.settings.overlay_subclusters
        return "unallocated" if kind == "allocated" and promise.mode == "metadata" else kind

    def _size_over(self, base: _Base, size: int) -> int:
        """Return how far a disk is made over its base before the rest is made by growing.

        The cluster with the base's last bytes has to be there before: grown, it
        would read as zeros.
        """
        return min(size, _round_up(max(base.size, 1), self.settings.overlay_cluster_size))

    @staticmethod
    def _grow_new(place: Place, new: NewFile, first_size: int, size: int, promise: Promise, *, allocated: bool) -> None:
        """Grow an overlay that nobody has yet, by growing because that waits for no disk, as qemu-img create does.

        :param allocated: whether the subclusters of what is new are to be
            allocated; QEMU does that where it hides a backing file
        """
        _refuse_other_size(new, first_size)
        if first_size < size:
            with replacement.zeros(place, size if allocated else 0) as zeros:
                qemu_img.resize_over_zeros(
                    new.path, new.program_name, size, zeros.program_name, promise.of_qemu,
                    grown=size - first_size, flush=False,
                )  # fmt: skip

    def _rewriting(self, file: DiskFile, image: DiskImage, promise: Promise) -> Treatment:
        copied = self._copied(image)
        options = self._options_of(file, image, promise)
        needed = self._needed(promise, image.virtual_size, options, copied)
        return Treatment(
            "rewrite",
            promise,
            functools.partial(self._rewrite, file, image, promise, needed),
            promise.state,
            needed=needed,
            freed=format.given_back(file, image.shared_bytes),
            # With preallocation in mode full zeros are written first, everywhere.
            written=lambda: copied + (needed if promise.mode == "full" else 0),
            alone=True,
        )

    def _copied(self, image: DiskImage) -> int:
        """Return the bytes of data that a copy of a disk gets."""
        if image.backing_file is not None and self.settings.overlay_subclusters == "copied":
            return image.virtual_size
        return (image.cluster_size or 1) * ((image.mapped_clusters or 0) + image.compressed_clusters)

    def _rewrite(self, file: DiskFile, image: DiskImage, promise: Promise, needed: int) -> DiskImage:
        options = self._options_of(file, image, promise)
        _tell_version(file, qcow2_header.read(file.path, file.fd).options, image.backing_file)
        _require_space(file, needed, promise)
        base: Optional[_Base] = None
        if image.backing_file is not None:
            base = _Base.of(file, image.backing_file, str(image.backing_format))

        def write(new: NewFile) -> None:
            if base is None:
                qemu_img.convert(file.path, file.program_name, new.program_name, image.virtual_size, "qcow2", options)
            else:
                self._rewrite_overlay(file, image, new, base, options, promise)
            format.fill(new, os.fstat(new.fd).st_size, promise)
            format.write_out(new, promise)

        asked = Geometry(image.virtual_size, int(options["cluster_size"]), image.backing_file, image.backing_format)
        return self.put(functools.partial(replacement.replacing, file, image.stamp), asked, promise, write)

    def _rewrite_overlay(
        self, file: DiskFile, image: DiskImage, new: NewFile, base: _Base, options: dict[str, str], promise: Promise
    ) -> None:
        kind = self._subclusters(promise)
        names, size = (file.path, file.program_name, new.program_name), image.virtual_size
        over = {"backing_file": base.path, "backing_format": base.format}
        first_size = self._size_over(base, size)
        if kind == "copied":
            qemu_img.copy_in(file.path, file.program_name, "qcow2", new.program_name, first_size, options, **over)
            base.put_under(new, None)
        else:
            qemu_img.convert(*names, size, "qcow2", options, **over)
            base.put_under(new, base.path)
        if kind == "unallocated":
            _mark_zeros(file, image, new, base)
            return
        if kind == "allocated" and first_size < size:
            qemu_img.shrink(file.path, new.program_name, first_size, **over)
        self._grow_new(file, new, first_size, size, promise, allocated=True)
        if first_size < size:
            qemu_img.copy_tail(*names, first_size, size, **over)

    def _options_of(self, file: DiskFile, image: DiskImage, promise: Promise) -> dict[str, str]:
        """Return what qemu-img is told of a disk that takes another one's place."""
        kept = qcow2_header.read(file.path, file.fd).options
        return self._options(promise, image.backing_file, image.cluster_size, kept)

    def _options(
        self, promise: Promise, backing_file: Optional[str], cluster_size: Optional[int], kept: Mapping[str, str]
    ) -> dict[str, str]:
        """Return what qemu-img is told of a new disk.

        :param kept: what it is to have of the one whose place it takes, as Header.options
        """
        options = {**kept, **promise.file_options, "preallocation": promise.of_qemu}
        if backing_file is not None:
            # Only subclusters can be mapped and still let the base show
            # through, and version 2 has none. The base's own cluster size has no say in it.
            options.pop("compat", None)
            return {**options, "cluster_size": str(self.settings.overlay_cluster_size), "extended_l2": "on"}
        return options if cluster_size is None else {**options, "cluster_size": str(cluster_size)}

    def _needed_blank(self, blank: Blank, options: dict[str, str], promise: Promise) -> int:
        """Return the bytes that a new disk takes that holds nothing yet."""
        is_copied = blank.backing_file is not None and self.settings.overlay_subclusters == "copied"
        return self._needed(promise, blank.virtual_size, options, blank.virtual_size if is_copied else 0)

    @staticmethod
    def _needed(promise: Promise, size: int, options: dict[str, str], copied: int) -> int:
        """Return the bytes that a new disk of a virtual size takes, made with these options.

        :param copied: the data that it gets
        """
        cluster_size = int(options.get("cluster_size", _CLUSTER_SIZE))
        length = worst_case.length(
            size,
            cluster_size,
            extended_l2=options.get("extended_l2") == "on",
            refcount_bits=int(options.get("refcount_bits", qcow2_header.REFCOUNT_BITS)),
        )
        if promise.mode == "metadata":
            return length - size + min(copied, size) + promise.rounding
        return length

    def _lack_of_room(self, file: DiskFile, image: DiskImage, promise: Promise) -> Optional[str]:
        """Say that there is no room for one more disk, where what this one lacks can still be held.

        As stock Nova leaves a swap disk that was never used: the space that is
        short for a second one is its own.
        """
        options = self._options_of(file, image, promise)
        needed = self._needed(promise, image.virtual_size, options, 0)
        room = promise.room(file.folder_fd)
        return _NO_ROOM if promise.holds_space and image.shortfall <= room < needed else None


@dataclasses.dataclass(frozen=True)
class _Base:
    """An overlay's backing file.

    :param name: as the header has it
    :param path: absolute
    :param size: its virtual size, in bytes
    """

    name: str
    path: str
    format: str
    size: int

    @classmethod
    def of(cls, place: Place, name: str, format: str) -> _Base:
        """Look at it, and at its own.

        :raises: BackingFileUnusable, and what backing.virtual_size() raises
        """
        return cls(name, place.beside(name), format, backing.virtual_size(place, name, format))

    def put_under(self, new: NewFile, made_over: Optional[str]) -> None:
        """Write its name into a new disk.

        :param made_over: what the program that has made it was told to name, its
            absolute path or nothing
        :raises: BrokenImage where that is not what the header names
        """
        named = (made_over, None if made_over is None else self.format)
        found = qcow2_header.backing(new.fd)
        for field, was_wanted, was_found in zip(("backing_file", "backing_format"), named, found):
            if was_found != was_wanted:
                raise format.not_as_asked(new.path, f"a {field} of {was_wanted!r}", repr(was_found))
        if self.name != made_over:
            qemu_img.name_backing_file(new.path, new.program_name, self.name, self.format)


def _require_space(place: Place, needed: int, promise: Promise) -> None:
    """Refuse a new disk for which there is no space; where none is set aside, only what others are to keep counts.

    :raises: NoSpace
    """
    if promise.mode == "metadata":
        promise.require_kept_free(place, needed, place.folder_fd)
    else:
        promise.require_space(place, needed)


def _mark_zeros(file: DiskFile, image: DiskImage, new: NewFile, base: _Base) -> None:
    """Mark in a copy what its original had marked as zeros, which the copy has as data.

    Without it a snapshot would copy these zeros.
    """
    over = {"backing_file": base.path, "backing_format": base.format}
    end = min(base.size, image.virtual_size)
    stretches = list(qemu_img.zeros(file.path, file.program_name, image.cluster_size or 1, end, **over))
    try:
        qemu_img.mark_zeros(file.path, new.program_name, stretches, **over)
    except exceptions.ProgramMissing as exc:
        log.warn_once("zeros", file.path, f"snapshots of it copy some zeros: {exc}")


def _holds_nothing(image: DiskImage) -> bool:
    """Whether a disk that QEMU has opened and checked has nothing in it, nor had before a table was damaged."""
    in_it = image.mapped_clusters or image.compressed_clusters or image.leaked_clusters
    return bool(image.virtual_size) and not in_it and not image.has_stray_bytes


def _tell_version(place: Place, kept: Mapping[str, str], backing_file: Optional[str]) -> None:
    """Tell of what an overlay cannot keep that is made anew; kept as for Qcow2._options()."""
    if backing_file is not None and "compat" in kept:
        log.warn_once(
            "version",
            place.path,
            "made anew, it is of version 3 (compat=1.1), because an overlay of version 2 cannot be preallocated",
        )


def _obstacle(file: DiskFile, image: DiskImage) -> Optional[str]:
    """Say why a disk cannot be replaced by a copy, if it cannot."""
    if image.waits_for_repair:
        return f"{_WAITS} (qemu-img check -r all)"
    if image.snapshots:
        return "it has internal snapshots, which a copy would lose (qemu-img snapshot -d deletes them)"
    if image.bitmaps:
        return "it has dirty bitmaps, which a copy would lose (qemu-img bitmap --remove; then make a full backup)"
    # A crash leaks a few clusters; a damaged table loses sight of most.
    if image.leaked_clusters and image.leaked_clusters >= (image.mapped_clusters or 0):
        return (
            f"{image.leaked_clusters} clusters of it are in use by nothing (qemu-img check), as if one of its tables "
            "were damaged, and what is in them could still be had back. If the guest reads what it should, run "
            "qemu-img check -r leaks on it"
        )
    return _obstacle_in_header(file, image)


def _obstacle_in_header(file: DiskFile, image: DiskImage | Blank) -> Optional[str]:
    if image.backing_file is not None:
        if image.backing_format is None:
            return "its header does not name its backing file's format"
        if backing.names_protocol(image.backing_file):
            return f"its backing file {_PROTOCOL}"
        if qemu_img.version(file.path) < qemu_img.OVERLAY_PREALLOCATION:
            return _TOO_OLD
    if qcow2_header.has_unknown(file.fd):
        return "its header has an extension or a feature that is not known here, and that a copy would lose"
    return None


def _refuse_other_size(file: DiskFile, size: int) -> None:
    """Refuse what a program has made in the first of two steps, before the second hides it.

    :raises: BrokenImage
    """
    try:
        found = qcow2_header.virtual_size(file.path, file.fd)
    except exceptions.FormatMismatch as exc:
        raise format.not_as_asked(file.path, "a disk in the format qcow2", "none") from exc
    if found != size:
        raise format.not_as_asked(file.path, f"a virtual_size of {size}", str(found))


def _start_of_last_cluster(image: DiskImage) -> int:
    """Return where the cluster begins that a disk ends within, in bytes; its end, if it ends with one."""
    return image.virtual_size - image.virtual_size % (image.cluster_size or 1)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
