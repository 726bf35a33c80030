# SPDX-License-Identifier: Apache-2.0
"""imgprealloc show."""

from __future__ import annotations

import argparse
import os
from typing import Any, get_args

from imgprealloc import backing
from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import log
from imgprealloc import presence
from imgprealloc import replacement
from imgprealloc import sizes
from imgprealloc.cli import abreast
from imgprealloc.cli import disks
from imgprealloc.cli import new_file
from imgprealloc.cli import picture
from imgprealloc.cli import working
from imgprealloc.cli.examples import Example
from imgprealloc.image import DiskImage
from imgprealloc.image import State
from imgprealloc.preallocator import Preallocator

_NOT_PREALLOCATED = 3


class Show(disks.Disks):
    """Show how far disks are preallocated, and what the filesystem may still be asked for."""

    examples = (
        Example(
            "All disks of this host's instances, those that lack most first",
            "imgprealloc show --sort-column shortfall --sort-descending",
        ),
        Example("Those that are thin, for a script", "imgprealloc show --state thin -f value -c path"),
        Example(
            "A picture of where a disk's bytes are",
            "imgprealloc show --layout /var/lib/nova/instances/5b1c7f42*/disk -o disk.svg",
        ),
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--check", action="store_true", help=f"exit with {_NOT_PREALLOCATED} if a disk is not preallocated"
        )
        parser.add_argument(
            "--state",
            action="append",
            choices=(*get_args(State), "error"),
            help="show the disks in this state alone; may be repeated",
        )
        parser.add_argument(
            "--layout",
            action="store_true",
            help="draw, too, where the bytes of one disk are: a qcow2 disk's in its file, a raw disk's on the storage",
        )
        parser.add_argument(
            "-o",
            "--output",
            metavar="FILE",
            help="where the picture goes, as SVG; an older picture is replaced, and nothing else",
        )
        working.add_paths(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Read the disks, as many at a time as there are CPUs; nothing is written, also of a running instance."""
        if parsed_args.layout != (parsed_args.output is not None):
            self._parser.error("a picture has both, --layout and its file: imgprealloc show --layout DISK -o FILE.svg")
        paths = self.named(parsed_args.paths)
        if parsed_args.layout and len(paths) > 1:
            self._parser.error(f"--layout draws one disk, and {len(paths)} are meant, from {paths[0]} on; name one")

        def look(path: str) -> DiskImage:
            # Also where a crash has come before there was a disk.
            _tell_leftovers(path)
            image = Preallocator().inspect(path, format=parsed_args.disk_format)
            disks.tell_thin_storage(image)
            if image.backing_file is not None:
                _tell_missing_base(path, image.backing_file)
            return image

        outcomes = self.each(paths, look, at_once=abreast.cpus())
        states = {outcome.image.state for outcome in outcomes if outcome.image}
        if parsed_args.check and states - {"preallocated"} and not self.status:
            self.status = _NOT_PREALLOCATED
        if parsed_args.layout:
            self._draw(outcomes, parsed_args.output)
        if parsed_args.state:
            outcomes = [outcome for outcome in outcomes if _state(outcome) in parsed_args.state]
        return self.shown(outcomes, parsed_args)

    def _draw(self, outcomes: list[working.Outcome], target: str) -> None:
        """Draw the disk, if it could be read."""
        for image in (outcome.image for outcome in outcomes if outcome.image):
            try:
                found = Preallocator().layout(image.path, format=image.format)
                panel = picture.Panel(image.path, f"{image.format}, {image.state}", found)
                new_file.write_whole(target, picture.svg([panel]), picture.BEGINS)
            except (exceptions.PreallocationError, new_file.InTheWay) as exc:
                self._tell(exc)
            except OSError as exc:
                self._tell(f"{target}: {exc.strerror}. Check the folder and its permissions.")


def _state(outcome: working.Outcome) -> str:
    return outcome.image.state if outcome.image else "error"


def _tell_missing_base(path: str, backing_file: str) -> None:
    """Warn of a backing file that is not there. It is not opened: a guest may have written its name."""
    with disks.nothing_to_tell(), disk_file.opened(path) as file:
        if not backing.names_protocol(backing_file) and not presence.is_there(file.beside(backing_file)):
            log.warn_once(
                "missing base",
                path,
                f"its backing file {backing_file} is not there, so that no guest can start from it; put it back where "
                "it was, or name the right one (qemu-img rebase -u)",
            )


def _tell_leftovers(path: str) -> None:
    """Warn of what an imgprealloc that was killed has left beside a disk."""
    with disks.nothing_to_tell(), disk_file.place(os.path.realpath(path)) as place:
        for left in replacement.leftovers(place):
            log.warn_once(
                "left",
                left.path,
                f"left by an imgprealloc that was killed, {sizes.exact(left.size)}; "
                f"imgprealloc allocate {path}, or the instance's next start, removes it",
            )
