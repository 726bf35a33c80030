# SPDX-License-Identifier: Apache-2.0
"""What can be promised for a disk on the filesystem it is on, and whether there is room for it."""

from __future__ import annotations

import dataclasses
import time
from typing import Optional

from oslo_utils import units

from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc import log
from imgprealloc import mounts
from imgprealloc import os_errors
from imgprealloc import pace
from imgprealloc import qemu_img
from imgprealloc import sizes
from imgprealloc.disk_file import DiskFile
from imgprealloc.disk_file import Place
from imgprealloc.image import State
from imgprealloc.pace import Pace
from imgprealloc.settings import Mode
from imgprealloc.settings import OnUnsupported

# Seconds, in which a filesystem that frees space has freed some.
_PAUSE = 0.5
# Seconds that it may go on; others wait meanwhile.
_PATIENCE = 20


@dataclasses.dataclass(frozen=True)
class Promise:
    """The mode that can be kept, and the filesystem that keeps it.

    :param mode: the one that was asked for, or its fallback
    :param keep_free: what others are left of it; see sizes.part()
    :param paced: whether qemu-img writes no zeros, which it does as fast as it
        can, because we do that afterwards at the pace that is to be kept
    """

    mode: Mode
    filesystem: filesystem.Filesystem
    keep_free: int | str = 0
    paced: bool = False

    @property
    def of_qemu(self) -> Mode:
        """The mode that qemu-img is asked for."""
        return "falloc" if self.paced and self.mode == "full" else self.mode

    @property
    def holds_space(self) -> bool:
        """Whether space can be promised, and not only tried for."""
        return self.mode != "metadata" and self.filesystem.fallocate

    @property
    def nocow(self) -> dict[str, str]:
        """The qemu-img option that stops copy on write, where there is one."""
        return {"nocow": "on"} if self.filesystem.type == "btrfs" else {}

    @property
    def file_options(self) -> dict[str, str]:
        """What qemu-img is told of a new file on this filesystem.

        With the extent size hint of 1 MiB that it gives each file else, XFS
        wants as much free to zero a sector, and a full one has none.
        """
        has_hint = self.filesystem.type == "xfs" and qemu_img.version() >= qemu_img.EXTENT_SIZE_HINT
        return {**self.nocow, **({"extent_size_hint": "0"} if has_hint else {})}

    @property
    def states(self) -> tuple[State, ...]:
        """The states that a disk may have of which this is kept."""
        return ("preallocated",) if self.holds_space else ("preallocated", "mapped")

    @property
    def rounding(self) -> int:
        """The bytes by which a file may get more than was asked for: whole mebibytes on XFS, by qemu-img's hint."""
        return units.Mi if self.filesystem.type == "xfs" else 0

    @property
    def state(self) -> State:
        """The state that a disk has which is made anew."""
        return "mapped" if self.mode == "metadata" else "preallocated"

    def room(self, fd: int) -> int:
        """Return the bytes that a disk may take where an open file or folder is; less than 0 where others lack some."""
        return filesystem.room(fd, self.keep_free)

    def lacking(self, path: str, needed: int, available: int) -> exceptions.NoSpace:
        """Say that a disk needs more bytes than there are for it."""
        return lacking(path, f"it needs {sizes.exact(needed)} more", available, self.keep_free)

    def require_space(self, place: Place, needed: int, fd: Optional[int] = None) -> None:
        """Refuse what cannot fit before anything runs.

        A fallocate that fails half way has filled the filesystem for everybody.

        :param fd: the file that it is needed for; None for a new one in the folder
        :raises: NoSpace
        """
        fd = place.folder_fd if fd is None else fd
        available = filesystem.available(fd)
        deadline = time.monotonic() + _PATIENCE
        while needed > available:
            before = available
            if not filesystem.is_plain(fd) and time.monotonic() < deadline:
                # XFS and btrfs take their time to free what has been removed, and
                # what they answer meanwhile grows. A fallocate would wait for it.
                time.sleep(_PAUSE)
                available = filesystem.available(fd)
            if available <= before:
                raise self.lacking(place.path, needed, self.room(fd) if filesystem.keeps(self.keep_free) else available)
        self.require_kept_free(place, needed, fd)

    def require_kept_free(self, place: Place, needed: int, fd: int) -> None:
        """Refuse what is there and has to be left to others; nobody waits for that.

        :raises: NoSpace
        """
        if filesystem.keeps(self.keep_free) and self.room(fd) < needed <= filesystem.available(fd):
            raise self.lacking(place.path, needed, self.room(fd))


def lacking(path: str, reason: str, available: int, keep_free: int | str) -> exceptions.NoSpace:
    """Say that there is less on a filesystem than a disk needs."""
    kept = f" beside what is to be kept free ({keep_free})" if filesystem.keeps(keep_free) else ""
    return os_errors.no_space(
        path,
        f"{reason}, and the filesystem has {sizes.exact(max(0, available))}{kept}",
        "Free space on the filesystem, or let less be kept free (keep_free)." if kept else None,
    )


def made(place: Place, mode: Mode, on_unsupported: OnUnsupported, keep_free: int | str = 0) -> Promise:
    """Find out what can be promised on the filesystem that a disk is on.

    :raises: UnsupportedFilesystem
    """
    under = _under(place)
    kept = pace.current()
    if under.fallocate or mode != "falloc":
        return _made(place, Promise(mode, under, keep_free), kept)
    if on_unsupported == "error":
        raise exceptions.UnsupportedFilesystem(
            place.path,
            f"the {under.described} cannot set space aside (mode falloc)",
            "Use another filesystem, or set on_unsupported to metadata or full.",
        )
    log.warn_once(
        "no fallocate",
        place.folder,
        f"the {under.described} cannot set space aside; "
        f"disks in this folder get mode {on_unsupported} instead of falloc",
    )
    return _made(place, Promise(on_unsupported, under, keep_free), kept)


def _made(place: Place, promise: Promise, kept: Optional[Pace]) -> Promise:
    under = promise.filesystem
    if promise.mode == "full" and not under.fallocate and kept is not None and kept.rate is not None:
        raise exceptions.UnsupportedFilesystem(
            place.path,
            f"mode full keeps no rate on the {under.described}, where qemu-img alone can write all space",
            "Leave the rate out (--rate).",
        )
    return dataclasses.replace(promise, paced=kept is not None and under.fallocate)


def _under(place: Place) -> filesystem.Filesystem:
    if isinstance(place, DiskFile) and mounts.identifier(place.fd) != mounts.identifier(place.folder_fd):
        # The file alone is mounted there (mount --bind).
        return filesystem.of_file(place.fd)
    try:
        return filesystem.under(place.folder)
    except PermissionError:
        # A disk there can get its space all the same.
        return filesystem.under_read_only(place.folder)
