# SPDX-License-Identifier: Apache-2.0
"""What may be done to a disk whose guest has to start, or runs; what Nova's driver asks for.

A disk that Nova has just made gets all that was promised, or is refused. One
that was there keeps its guest from nothing: what cannot be done is warned of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any, Optional

from oslo_log import log as logging

from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import log
from imgprealloc import looks
from imgprealloc.format import Existing
from imgprealloc.image import DiskImage
from imgprealloc.preallocator import Preallocator

LOG = logging.getLogger(__name__)

# In these a guest's write needs no new space.
HELD = ("reserved", "preallocated")

# What keeps a disk from being made anew, or written to, and not from having its space set aside.
_NOT_REPLACED = (
    exceptions.ImageInUse,
    exceptions.DiskIsLink,
    exceptions.OwnerNotKept,
    exceptions.FileInTheWay,
)


def without_zeros(strategy: Preallocator) -> Preallocator:
    """Return the strategy for a disk to which somebody else writes: its guest, or QEMU's mirror.

    Zeros cannot be written there, or would be written in vain, but space can be
    set aside.
    """
    return dataclasses.replace(
        strategy,
        mode="falloc" if strategy.mode == "full" else strategy.mode,
        on_unsupported="metadata" if strategy.on_unsupported == "full" else strategy.on_unsupported,
    )


def preallocate_new(
    strategy: Preallocator, path: str, format: str, turn: contextlib.AbstractContextManager[Any]
) -> None:
    """Preallocate a disk that Nova has only just made, and no guest has seen.

    Where it cannot be made anew, as while a backup or a virus scanner reads it, its
    space is set aside as it is: stock Nova's build would go on, too.

    :param turn: held while the disk is treated
    :raises: PreallocationError, also where its space is not held in the end
    """
    with turn:
        try:
            after = strategy.preallocate(path, "just_made", format=format, write_held=False)
        except _NOT_REPLACED as exc:
            after = strategy.preallocate(path, "reserve", format=format, write_held=False)
            if strategy.mode != "metadata" and after.state not in HELD:
                raise
            log.warn_once("not replaced", path, f"not made anew: {exc}")
        looks.remember(after)


def heal(
    strategy: Preallocator,
    path: str,
    format: str,
    existing: Existing,
    turn: contextlib.AbstractContextManager[Any],
    *,
    stock_length: Optional[int] = None,
    greatest: Optional[int] = None,
    copying: bool = True,
    filler: Optional[fallocate.Filler] = None,
    known: Optional[DiskImage] = None,
) -> None:
    """Preallocate a disk that was there, if it can be done; a guest that can start has to start.

    :param existing: what may happen to it
    :param turn: held while the disk is treated, and not while it is looked at
    :param stock_length: bytes that stock Nova would have called fallocate for
    :param greatest: bytes that its virtual size cannot exceed, where its header
        may be its guest's, who could have the host's space set aside by it
    :param copying: whether what it shares with other files may be copied, for
        which a start may have to wait
    :param known: the disk as the caller has just found it, so that it is not
        looked at once more
    :raises: NoSpace where that would have failed, too
    """
    try:
        if known is None:
            known = looks.at(strategy, path, format)
        if greatest is not None and known.virtual_size > greatest:
            log.warn_once("too large", path, f"not preallocated: as {format} it would be larger than Nova has made it")
            return
        is_ours = os.access(path, os.W_OK)
        if not is_ours and filler is not None:
            strategy, existing = without_zeros(strategy), "reserve"
        elif not is_ours:
            if known.state not in HELD and strategy.mode != "metadata":
                log.warn_once("not ours", path, f"not preallocated: it is {known.state}, and not ours to write")
            return
        if not copying and known.shared_bytes:
            LOG.debug("%s: what it shares with other files is left to its next hard reboot", path)
            return
        if not strategy.has_work(path, existing, known, format=format):
            return
        # What was waited for may have taken long; the disk is opened afterwards.
        with turn, fallocate.filling_by(None if is_ours else filler):
            try:
                after = strategy.preallocate(path, existing, format=format, known=known, write_held=False)
            except _NOT_REPLACED as exc:
                if existing == "reserve":
                    raise
                log.warn_once("not replaced", path, f"not made anew: {exc}")
                after = strategy.preallocate(path, "reserve", format=format, known=known, write_held=False)
        looks.remember(after)
    except exceptions.NoSpace as exc:
        if would_lack_space_in_stock_nova(path, stock_length):
            raise
        _warn(path, exc)
    except exceptions.PreallocationError as exc:
        _warn(path, exc)
    except Exception:
        LOG.exception("%s: not preallocated", path)


def _warn(path: str, exc: exceptions.PreallocationError) -> None:
    # One kind of error does not hide another.
    log.warn_once(f"not preallocated: {type(exc).__name__}", path, f"not preallocated: {exc}")


def would_lack_space_in_stock_nova(path: str, length: Optional[int]) -> bool:
    """Whether stock Nova's fallocate of length would have lacked space, too; not if it cannot be told."""
    directory = os.path.dirname(os.path.realpath(path))
    try:
        # Nova, too, does without fallocate where there is none, or where it may not write.
        if not length or not os.access(path, os.W_OK) or not filesystem.under(directory).fallocate:
            return False
        found = fallocate.extents(path)
        held = os.stat(path).st_blocks * 512 if found is None else fallocate.held(found, length)
        return length - held > filesystem.available_to_us(path)
    except Exception:
        LOG.exception("%s: started without preallocation", path)
        return False
