# SPDX-License-Identifier: Apache-2.0
"""imgprealloc allocate."""

from __future__ import annotations

import argparse
from typing import Any

from imgprealloc.cli.disks import Allocating
from imgprealloc.format import Existing
from imgprealloc.image import DiskImage


class Allocate(Allocating):
    """Preallocate disks that exist; what their guests read stays the same."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--rewrite",
            action="store_true",
            help="copy disks that have data into preallocated ones, instead of only reserving their space",
        )
        parser.add_argument("paths", nargs="+", metavar="PATH")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Preallocate one disk after the other."""
        existing: Existing = "rewrite" if parsed_args.rewrite else "recreate_blank"

        def work(path: str) -> DiskImage:
            return self.preallocator(parsed_args).preallocate(path, existing, format=parsed_args.disk_format)

        return self.each(parsed_args.paths, work, parsed_args)
