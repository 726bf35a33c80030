# SPDX-License-Identifier: Apache-2.0
"""imgprealloc resize."""

from __future__ import annotations

import argparse
from typing import Any

from imgprealloc.cli import disks
from imgprealloc.cli.examples import Example
from imgprealloc.image import DiskImage


class Resize(disks.Allocating):
    """Grow a disk, its new part preallocated."""

    examples = (
        Example(
            "An instance's disk, while it is shut off", "imgprealloc resize /var/lib/nova/instances/5b1c7f42*/disk 300M"
        ),
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("path", metavar="PATH")
        parser.add_argument("size", type=disks.size, metavar="SIZE", help="new virtual size: bytes, or with K, M, G, T")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Grow the disk."""

        def work(path: str) -> DiskImage:
            with self.progress_bar(1).of(path) as progress:
                return self.preallocator(parsed_args).resize(
                    path,
                    parsed_args.size,
                    format=parsed_args.disk_format,
                    progress=progress,
                    pace=self.pace(parsed_args),
                )

        return self.shown(self.each([parsed_args.path], work), parsed_args)
