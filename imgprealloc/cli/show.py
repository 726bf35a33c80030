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
from imgprealloc import replacement
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
        parser.add_argument("paths", nargs="*", metavar="PATH", help=working.PATHS)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Read the disks, as many at a time as there are CPUs; nothing is written, also of a running instance."""
        paths = self.named(parsed_args.paths)

        def look(path: str) -> DiskImage:
            # Also where a crash has come before there was a disk.
            _tell_leftovers(path)
            return Preallocator().inspect(path, format=parsed_args.disk_format)

        outcomes = self.each(paths, look, at_once=abreast.cpus())
        states = {outcome.image.state for outcome in outcomes if outcome.image}
        if parsed_args.check and states - {"preallocated"} and not self.status:
            self.status = _NOT_PREALLOCATED
        return self.shown(outcomes, parsed_args)


def _tell_leftovers(path: str) -> None:
    """Warn of what an imgprealloc that was killed has left beside a disk."""
    nothing_to_tell = contextlib.suppress(exceptions.PreallocationError, OSError, ValueError)
    with nothing_to_tell, disk_file.place(os.path.realpath(path)) as place:
        for left in replacement.leftovers(place):
            log.warn_once(
                "left",
                left.path,
                f"left by an imgprealloc that was killed, {left.size} bytes; "
                f"imgprealloc allocate {path}, or the instance's next start, removes it",
            )
