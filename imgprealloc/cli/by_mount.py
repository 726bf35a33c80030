# SPDX-License-Identifier: Apache-2.0
"""Which disks are on one filesystem, so that its space is counted once."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
import contextlib
import os
from typing import Optional, TypeVar

from imgprealloc import mounts
from imgprealloc.image import DiskImage

T = TypeVar("T")


def together(found: Iterable[T], image_of: Callable[[T], DiskImage]) -> list[tuple[str, list[T]]]:
    """Put what is on one filesystem together, in the order that it came in, with the mount point for a name."""
    mounted: dict[int, Optional[mounts.Mount]] = {}
    groups: dict[str | int, tuple[str, list[T]]] = {}
    for one in found:
        image = image_of(one)
        device = image.stamp.device
        folder = os.path.dirname(os.path.realpath(image.path))
        if device not in mounted:
            mounted[device] = _mount(folder)
        mount = mounted[device]
        # The subvolumes of a btrfs, each with a number of its own in stat(2), are one filesystem.
        key = mount.source if mount is not None and os.path.isabs(mount.source) else device
        groups.setdefault(key, (folder if mount is None else mount.point, []))[1].append(one)
    return list(groups.values())


def _mount(folder: str) -> Optional[mounts.Mount]:
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return mounts.of(fd)
        finally:
            os.close(fd)
    return None
