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
from imgprealloc.promise import require_space
from imgprealloc.settings import Mode

# raw has no metadata, and qemu-img refuses the word for it.
_PREALLOCATION = {"falloc": "falloc", "full": "full", "metadata": "off"}


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
            return Treatment(False, functools.partial(self._hold, file, image, promise))
        if not promise.nocow:
            return None
        if existing not in ("rewrite", "just_made"):
            raise format.copied_on_write(file.path)
        return Treatment(True, functools.partial(self._copy, file, image, promise))

    def treatment_by_header(self, file: DiskFile, promise: Promise) -> Optional[Treatment]:
        return None

    def make(
        self, place: Place, size: int, promise: Promise, backing_file: Optional[str], backing_format: Optional[str]
    ) -> DiskImage:
        if backing_file is not None:
            raise exceptions.UnsupportedFormat(place.path, "a raw disk has no backing file", "Create it as qcow2.")
        if promise.mode != "metadata":
            require_space(place, size)
        options = {**promise.file_options, "preallocation": _PREALLOCATION[promise.mode]}
        return self.put(
            functools.partial(replacement.new, place),
            Geometry(size),
            promise,
            lambda new: qemu_img.create(new.path, new.program_name, size, "raw", options),
        )

    def grow(self, file: DiskFile, image: DiskImage, size: int, promise: Promise) -> None:
        if promise.mode != "metadata":
            require_space(file, size - image.virtual_size, file.fd)
        qemu_img.resize(file.path, file.program_name, size, "raw", _PREALLOCATION[promise.mode])

    def recover(self, file: DiskFile) -> None:
        pass

    def _hold(self, file: DiskFile, image: DiskImage, promise: Promise) -> DiskImage:
        written = promise.mode == "full"
        return self.hold(file, image, image.file_size, promise, promise.states, written=written)

    def _copy(self, file: DiskFile, image: DiskImage, promise: Promise) -> DiskImage:
        require_space(file, image.virtual_size)
        options = {**promise.file_options, "preallocation": _PREALLOCATION[promise.mode]}
        return self.put(
            functools.partial(replacement.replacing, file, image.stamp),
            Geometry(image.virtual_size),
            promise,
            lambda new: qemu_img.convert(
                file.path, file.program_name, new.program_name, image.virtual_size, "raw", options
            ),
        )
