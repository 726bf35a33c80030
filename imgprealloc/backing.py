# SPDX-License-Identifier: Apache-2.0
"""A disk's backing files: whether they can be opened, and how large the first one is.

QEMU opens what a header names: a pipe, for which it waits for ever, or a
server. So each file of the chain is looked at before QEMU is let near it.
"""

from __future__ import annotations

import os
import stat

from imgprealloc import exceptions
from imgprealloc import qcow2_header
from imgprealloc import reading
from imgprealloc.disk_file import Place

# QEMU itself gives up somewhere there.
_LONGEST_CHAIN = 200


def names_protocol(backing_file: str) -> bool:
    """Whether QEMU takes a name for more than a file's, as in nbd://host or json:{}: a colon before any slash."""
    return ":" in backing_file.partition("/")[0]


def virtual_size(place: Place, backing_file: str, backing_format: str) -> int:
    """Return the virtual size, in bytes, of a disk's backing file, once all of its chain has been looked at.

    :raises: BackingFileUnusable, FileError, BrokenImage, ProgramMissing,
        ProgramKilled
    """
    path = place.beside(backing_file)
    look_at_chain(place, path, backing_format)
    status = os.stat(path)
    if backing_format == "raw" and stat.S_ISREG(status.st_mode):
        # Its length, in whole sectors; no need to ask qemu-img.
        return -(-status.st_size // reading.SECTOR) * reading.SECTOR
    return reading.virtual_size(place.path, path, backing_format)


def look_at_chain(place: Place, path: str, format: str | None) -> None:
    """Refuse a chain of backing files that QEMU could wait for, or would not come to the end of.

    :param path: the first of them
    :param format: its format; None where its first bytes tell it, as QEMU does
    :raises: BackingFileUnusable
    """
    seen: set[tuple[int, int]] = set()
    while True:
        try:
            status = os.stat(path)
        except FileNotFoundError as exc:
            raise _unusable(place, f"its backing file {path} is not there") from exc
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise _unusable(place, f"its backing file {path} is neither a file nor a block device")
        if (status.st_dev, status.st_ino) in seen or len(seen) >= _LONGEST_CHAIN:
            raise _unusable(place, f"its chain of backing files comes to {path} again, or never ends")
        seen.add((status.st_dev, status.st_ino))
        if format not in (None, "qcow2"):
            return
        next_file, next_format = qcow2_header.backing(path)
        if next_file is None:
            return
        if names_protocol(next_file):
            # Where it leads is QEMU's to find out, under a limit of time.
            return
        path, format = os.path.join(os.path.dirname(os.path.realpath(path)), next_file), next_format


def _unusable(place: Place, reason: str) -> exceptions.BackingFileUnusable:
    return exceptions.BackingFileUnusable(
        place.path, reason, "Put the backing file back where it was, or name the right one (qemu-img rebase -u)."
    )
