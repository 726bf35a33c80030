# SPDX-License-Identifier: Apache-2.0
"""imgprealloc allocate."""

from __future__ import annotations

import argparse
from typing import Any, Optional

from imgprealloc.cli import disks
from imgprealloc.cli import working
from imgprealloc.format import Existing
from imgprealloc.image import DiskImage
from imgprealloc.preallocator import Preallocator


class Allocate(disks.Allocating):
    """Preallocate disks that exist; what their guests read stays the same."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--rewrite",
            action="store_true",
            help="copy disks that have data into preallocated ones, instead of only reserving their space",
        )
        working.add_paths(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Preallocate one disk after the other."""
        existing: Existing = "rewrite" if parsed_args.rewrite else "recreate_blank"
        paths = self.named(parsed_args.paths)
        strategy, bar = self.preallocator(parsed_args), self.progress_bar(len(paths))

        def work(path: str) -> DiskImage:
            with bar.of(path) as progress:
                return strategy.preallocate(
                    path, existing, format=parsed_args.disk_format, progress=progress, pace=self.pace(parsed_args)
                )

        def lack(image: DiskImage) -> Optional[str]:
            return _lack(strategy, image, is_rewritten=parsed_args.rewrite)

        return self.shown(self.each(paths, work, lack=lack), parsed_args)


def _lack(strategy: Preallocator, image: DiskImage, *, is_rewritten: bool) -> Optional[str]:
    """Say what of a request is not done to a disk that had no error, and what would do it."""
    wanted = "reserved"
    if not strategy.holds_space(image.path):
        wanted = "mapped" if image.format == "qcow2" else "thin"
    elif is_rewritten or strategy.mode == "full":
        wanted = "preallocated"
    if image.state in (wanted, "preallocated"):
        return None
    if is_rewritten:
        return f"it is {image.state}, and was not rewritten. See the warning for what kept it, then try again."
    return (
        f"mode {strategy.mode} left it {image.state}, because it has data in it. With the instance shut off, --rewrite "
        "copies it into a disk that is all that."
    )
