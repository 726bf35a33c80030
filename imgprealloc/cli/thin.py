# SPDX-License-Identifier: Apache-2.0
"""imgprealloc thin."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import os
from typing import Any, ClassVar, Optional

from imgprealloc.cli import disks
from imgprealloc.cli import working
from imgprealloc.cli.examples import Example
from imgprealloc.cli.working import Outcome
from imgprealloc.image import DiskImage
from imgprealloc.preallocator import Preallocator


class Thin(disks.Paced):
    """Give back what of disks' space no one has written to: the way back from allocate. What guests read stays.

    Nobody may have the disk open. In place no byte of its file changes: a raw
    disk is thin afterwards; a qcow2 one keeps its cluster map, and is mapped,
    or thin if it was reserved. Zeros that were really written, as mode full
    does, stay, unless the disk is rewritten. Where nova.conf has imgprealloc
    preallocate disks, the instance's next start sets the space aside again.
    """

    examples = (
        Example(
            "Give back what an instance that is shut off has not written to",
            "imgprealloc thin /var/lib/nova/instances/5b1c7f42*/disk",
        ),
        Example(
            "The same for one that was made in mode full",
            "imgprealloc thin --rewrite /var/lib/nova/instances/5b1c7f42*/disk",
        ),
    )

    # Nobody has one in use that is treated, and the last column needs the room.
    short_columns: ClassVar[Mapping[str, str]] = {
        title: column for title, column in disks.SHORT_COLUMNS.items() if title != "in use"
    }

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--rewrite",
            action="store_true",
            help="copy each disk into a thin one, without zeros and empty clusters, and let that take its place; needs "
            "room for what it holds",
        )
        # Not all disks of a host by mistake.
        parser.add_argument("paths", nargs="+", metavar="PATH", help=working.GIVEN_PATHS)
        return parser

    def columns(self, parsed_args: argparse.Namespace) -> Sequence[str]:
        return (*super().columns(parsed_args), "given_back")

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Thin one disk after the other."""
        paths = list(dict.fromkeys(working.first_names(self.named(parsed_args.paths)).values()))
        bar = self.progress_bar(len(paths))
        self._before: dict[str, int] = {}

        def work(path: str) -> DiskImage:
            with bar.of(path) as progress:
                # What cannot be looked at, the verb itself tells.
                with contextlib.suppress(OSError):
                    self._before[path] = os.stat(path).st_blocks * 512
                return Preallocator().thin(
                    path,
                    rewrite=parsed_args.rewrite,
                    format=parsed_args.disk_format,
                    progress=progress,
                    pace=self.pace(parsed_args),
                )

        return self.shown(self.each(paths, work, lack=self._lack), parsed_args)

    def shown(
        self, outcomes: list[Outcome], parsed_args: argparse.Namespace
    ) -> tuple[Iterable[str], Iterable[tuple[Any, ...]]]:
        """Show also how many bytes each has given back."""
        columns, rows = super().shown(outcomes, parsed_args)
        name = "given back" if parsed_args.formatter == "table" and not parsed_args.columns else "given_back"
        given = [None if outcome.image is None else disks.Size(self._given(outcome.image)) for outcome in outcomes]
        return (*columns, name), [(*row, size) for row, size in zip(rows, given)]

    def _given(self, image: DiskImage) -> int:
        return max(0, self._before[image.path] - image.allocated_size)

    def _lack(self, image: DiskImage) -> Optional[str]:
        if image.state != "preallocated" or self._given(image):
            return None
        return (
            "nothing was given back: all of it has been written, by its guest or in mode full. --rewrite copies it "
            "without its zeros."
        )
