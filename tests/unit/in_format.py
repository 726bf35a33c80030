# SPDX-License-Identifier: Apache-2.0
"""The verbs and the look for a caller who knows a disk's format."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

from imgprealloc import DiskImage
from imgprealloc import Existing
from imgprealloc import Preallocator
from imgprealloc import disk_file
from imgprealloc import reading
from imgprealloc import settings


@dataclasses.dataclass(frozen=True)
class InFormat:
    """Preallocator's verbs, with the format named."""

    strategy: Preallocator
    format: str

    def inspect(self, path: str) -> DiskImage:
        return self.strategy.inspect(path, format=self.format)

    def create(
        self, path: str, size: int, backing: Optional[str] = None, *, backing_format: Optional[str] = None
    ) -> DiskImage:
        return self.strategy.create(path, size, backing, format=self.format, backing_format=backing_format)

    def preallocate(self, path: str, existing: Existing = "recreate_blank") -> DiskImage:
        return self.strategy.preallocate(path, existing, format=self.format)

    def resize(self, path: str, size: int) -> DiskImage:
        return self.strategy.resize(path, size, format=self.format)


def raw(mode: settings.Mode = "falloc", **more: Any) -> InFormat:
    """Return a strategy for raw disks."""
    return InFormat(Preallocator(mode, **more), "raw")


def qcow2(mode: settings.Mode = "falloc", **more: Any) -> InFormat:
    """Return a strategy for qcow2 disks."""
    return InFormat(Preallocator(mode, **more), "qcow2")


def read_raw(path: str) -> DiskImage:
    """Read a disk as raw."""
    with disk_file.opened(path) as file:
        return reading.raw(file)


def read_qcow2(path: str) -> DiskImage:
    """Read a disk as qcow2."""
    with disk_file.opened(path) as file:
        return reading.qcow2(file)


def guess(path: str) -> str:
    """Return the format that a disk looks like."""
    with disk_file.opened(path) as file:
        return reading.guessed_format(file)
