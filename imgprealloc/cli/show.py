# SPDX-License-Identifier: Apache-2.0
"""imgprealloc show."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import log
from imgprealloc import mounts
from imgprealloc import replacement
from imgprealloc import sizes
from imgprealloc import storage
from imgprealloc import zeros
from imgprealloc.cli import abreast
from imgprealloc.cli import disks
from imgprealloc.cli import working
from imgprealloc.image import DiskImage
from imgprealloc.preallocator import Preallocator

_NOT_PREALLOCATED = 3


class Show(disks.Disks):
    """Show how far disks are preallocated, and what the filesystem may still be asked for."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--check", action="store_true", help=f"exit with {_NOT_PREALLOCATED} if a disk is not preallocated"
        )
        working.add_paths(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Read the disks, as many at a time as there are CPUs; nothing is written, also of a running instance."""
        paths = self.named(parsed_args.paths)

        def look(path: str) -> DiskImage:
            # Also where a crash has come before there was a disk.
            _tell_leftovers(path)
            image = Preallocator().inspect(path, format=parsed_args.disk_format)
            if image.held:
                _tell_thin_storage(path)
            return image

        outcomes = self.each(paths, look, at_once=abreast.cpus())
        states = {outcome.image.state for outcome in outcomes if outcome.image}
        if parsed_args.check and states - {"preallocated"} and not self.status:
            self.status = _NOT_PREALLOCATED
        return self.shown(outcomes, parsed_args)


def _nothing_to_tell() -> contextlib.suppress:
    # Of a disk that cannot be looked at, the look itself tells.
    return contextlib.suppress(exceptions.PreallocationError, OSError, ValueError)


def _tell_thin_storage(path: str) -> None:
    """Warn, once a filesystem, of storage that does not hold what a disk on it has set aside and not written."""
    with _nothing_to_tell(), disk_file.opened(path) as file:
        thin = storage.thin_below(file.fd)
        if thin and zeros.has_unwritten(file.fd, more_than=zeros.MOST_OF_METADATA):
            mount = mounts.of(file.fd)
            log.warn_once(
                "thin storage",
                path if mount is None else mount.point,
                f"thin storage below: {thin}; what mode falloc sets aside is not held there, what mode full writes is",
            )


def _tell_leftovers(path: str) -> None:
    """Warn of what an imgprealloc that was killed has left beside a disk."""
    with _nothing_to_tell(), disk_file.place(os.path.realpath(path)) as place:
        for left in replacement.leftovers(place):
            log.warn_once(
                "left",
                left.path,
                f"left by an imgprealloc that was killed, {sizes.exact(left.size)}; "
                f"imgprealloc allocate {path}, or the instance's next start, removes it",
            )
