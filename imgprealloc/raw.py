# SPDX-License-Identifier: Apache-2.0
"""raw: the file is the disk, byte for byte, and has no map."""

from __future__ import annotations

import functools
from typing import Optional

from imgprealloc import exceptions
from imgprealloc import format
from imgprealloc import glance
from imgprealloc import placement
from imgprealloc import qemu_img
from imgprealloc import reading
from imgprealloc import replacement
from imgprealloc.disk_file import DiskFile
from imgprealloc.disk_file import Place
from imgprealloc.format import Existing
from imgprealloc.format import Geometry
from imgprealloc.format import Treatment
from imgprealloc.image import DiskImage
from imgprealloc.layout import Layout
from imgprealloc.promise import Promise
from imgprealloc.replacement import NewFile
from imgprealloc.settings import Mode

# raw has no metadata, and qemu-img refuses the word for it.
_PREALLOCATION = {"falloc": "falloc", "full": "full", "metadata": "off"}

# By qemu-img convert, which leaves out zeros of that length.
_WRITTEN_AT_ONCE = 4096


class Raw(format.Format):
    """The format without a header."""

    name = "raw"

    def read(self, file: DiskFile) -> DiskImage:
        return reading.raw(file)

    def glance(self, file: DiskFile) -> Optional[DiskImage]:
        return glance.raw(file)

    def layout(self, file: DiskFile) -> Layout:
        return placement.raw(file)

    def is_done(self, image: DiskImage, mode: Mode) -> bool:
        return mode == "metadata" or image.held

    def treatment(self, file: DiskFile, image: DiskImage, promise: Promise, existing: Existing) -> Optional[Treatment]:
        if self.is_done(image, promise.mode):
            return None
        if not image.copy_on_write:
            return self.holding("fill", file, image, promise, promise.states, written=promise.mode == "full")
        if not promise.nocow:
            return None
        if existing not in ("rewrite", "just_made"):
            raise format.copied_on_write(file.path)
        return Treatment(
            "rewrite",
            promise,
            functools.partial(self._copy, file, image, promise),
            promise.state,
            needed=image.virtual_size,
            freed=format.given_back(file, image.shared_bytes),
            written=lambda: image.virtual_size if promise.mode == "full" else image.held_size,
            alone=True,
        )

    def treatment_by_header(self, file: DiskFile, promise: Promise) -> Optional[Treatment]:
        return None

    def make(
        self, place: Place, size: int, promise: Promise, backing_file: Optional[str], backing_format: Optional[str]
    ) -> DiskImage:
        if backing_file is not None:
            raise exceptions.UnsupportedFormat(place.path, "a raw disk has no backing file", "Create it as qcow2.")
        if promise.mode != "metadata":
            promise.require_space(place, size)
        options = {**promise.file_options, "preallocation": _PREALLOCATION[promise.of_qemu]}

        def write(new: NewFile) -> None:
            qemu_img.create(new.path, new.program_name, size, "raw", options)
            format.write_out(new, promise)

        return self.put(functools.partial(replacement.new, place), Geometry(size), promise, write)

    def grow(self, file: DiskFile, image: DiskImage, size: int, promise: Promise) -> None:
        if promise.mode != "metadata":
            promise.require_space(file, size - image.virtual_size, file.fd)
        qemu_img.resize(
            file.path, file.program_name, size, "raw", _PREALLOCATION[promise.of_qemu], grown=size - image.virtual_size
        )
        format.write_out(file, promise, start=image.file_size)

    def copy_thin(self, file: DiskFile, image: DiskImage, promise: Promise) -> DiskImage:
        format.require_space_for_copy(file, promise, _WRITTEN_AT_ONCE)
        place_for = functools.partial(replacement.replacing, file, image.stamp)
        return self.put(
            place_for, Geometry(image.virtual_size), promise,
            lambda new: qemu_img.convert(
                file.path, file.program_name, new.program_name, image.virtual_size, "raw", promise.file_options
            ),
            thin=True,
        )  # fmt: skip

    def recover(self, file: DiskFile) -> None:
        pass

    def _copy(self, file: DiskFile, image: DiskImage, promise: Promise) -> DiskImage:
        promise.require_space(file, image.virtual_size)
        options = {**promise.file_options, "preallocation": _PREALLOCATION[promise.of_qemu]}
        size = image.virtual_size

        def write(new: NewFile) -> None:
            qemu_img.convert(file.path, file.program_name, new.program_name, size, "raw", options)
            format.write_out(new, promise)

        return self.put(functools.partial(replacement.replacing, file, image.stamp), Geometry(size), promise, write)
