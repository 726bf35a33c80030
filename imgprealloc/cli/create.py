# SPDX-License-Identifier: Apache-2.0
"""imgprealloc create."""

from __future__ import annotations

import argparse
from typing import Any

from imgprealloc.cli import disks
from imgprealloc.cli.examples import Example
from imgprealloc.image import DiskImage


class Create(disks.Allocating):
    """Create a preallocated disk."""

    examples = (
        Example("A qcow2 disk", "imgprealloc create data.qcow2 512M"),
        Example("A raw one, all of it written", "imgprealloc create --disk-format raw --mode full data.raw 64M"),
        Example(
            "An overlay, as Nova's are",
            "imgprealloc create --backing /var/lib/nova/instances/_base/base --backing-format raw root.qcow2 256M",
        ),
    )

    format_help = "the disk's format (default: qcow2)"

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--backing", metavar="FILE", help="backing file, absolute or relative to the disk's folder")
        parser.add_argument("--backing-format", metavar="FORMAT", help="its format; has to be said, it is not guessed")
        parser.add_argument("path", metavar="PATH")
        parser.add_argument("size", type=disks.size, metavar="SIZE", help="virtual size: bytes, or with K, M, G, T")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Create the disk; qcow2 unless --disk-format says raw."""
        if parsed_args.backing is None and parsed_args.backing_format is not None:
            self._parser.error("--backing-format is that of a backing file: name it, by --backing FILE")

        def work(path: str) -> DiskImage:
            with self.progress_bar(1).of(path) as progress:
                return self.preallocator(parsed_args).create(
                    path,
                    parsed_args.size,
                    parsed_args.backing,
                    format=parsed_args.disk_format,
                    backing_format=parsed_args.backing_format,
                    progress=progress,
                    pace=self.pace(parsed_args),
                )

        return self.shown(self.each([parsed_args.path], work), parsed_args)
