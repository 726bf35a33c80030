# SPDX-License-Identifier: Apache-2.0
"""The imgprealloc command: a thin shell around the library, for operators.

Exit status: 0; 1 an error; 2 usage; 3 show --check found a disk that is not
preallocated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterable
from importlib import metadata
import re
import sys
from typing import Any

from cliff import app
from cliff import commandmanager
from cliff import lister
from cliff.columns import FormattableColumn
from oslo_utils import units

from imgprealloc import check_nova
from imgprealloc import disk_info
from imgprealloc import exceptions
from imgprealloc import preallocator
from imgprealloc import qcow2_header
from imgprealloc import terms
from imgprealloc.image import DiskImage

_NOT_PREALLOCATED = 3

_UNITS = {"": 1, "K": units.Ki, "M": units.Mi, "G": units.Gi, "T": units.Ti, "P": units.Pi, "E": units.Ei}
_SIZE = re.compile(r"(\d+)([KMGTPE]?)(?:i?B)?", re.ASCII)

_SIZES = ("virtual_size", "file_size", "allocated_size", "shared_bytes", "shortfall")
_COLUMNS = (
    "path",
    "format",
    "virtual_size",
    "file_size",
    "allocated_size",
    "backing_file",
    "clusters",
    "mapped_clusters",
    "fragmented_clusters",
    "shared_bytes",
    "state",
    "shortfall",
)
# What fits a terminal; --column asks for others.
_TABLE_COLUMNS = (
    "path",
    "format",
    "virtual_size",
    "allocated_size",
    "clusters",
    "mapped_clusters",
    "fragmented_clusters",
    "state",
    "shortfall",
)


class Size(FormattableColumn):  # type: ignore[misc, type-arg]
    """A number of bytes: readable in a table, exact elsewhere."""

    def human_readable(self) -> str:
        """Return the size with four digits and a binary unit."""
        size, unit = float(self._value), "bytes"
        for larger in ("KiB", "MiB", "GiB", "TiB"):
            if size >= units.Ki:
                size, unit = size / units.Ki, larger
        return f"{size:.4g} {unit}"


class _Disks(lister.Lister):
    """A command that works on disks and then shows them."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "--disk-format",
            choices=sorted(preallocator.FORMATS),
            help="the disk's format; else what Nova's disk.info beside it says, else what qemu-img finds",
        )
        return parser

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Show the disks, and return the exit status."""
        self.status = 0
        super().run(parsed_args)
        return self.status

    def each(
        self, paths: Iterable[str], work: Callable[[str], DiskImage], parsed_args: argparse.Namespace
    ) -> tuple[Iterable[str], Iterable[tuple[Any, ...]]]:
        """Work on one disk after the other; an error with one does not keep the rest from it."""
        images = []
        for path in paths:
            try:
                images.append(work(path))
            except (exceptions.PreallocationError, OSError) as exc:
                self.app.LOG.error(exc)
                self.status = 1
        columns: tuple[str, ...] = _COLUMNS
        if parsed_args.formatter == "table" and not parsed_args.columns:
            columns = _TABLE_COLUMNS
        return columns, [tuple(_cell(image, column) for column in columns) for image in images]


class _Allocating(_Disks):
    """A command that preallocates."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--mode", choices=terms.MODES, default="falloc", help="how to preallocate (default: falloc)"
        )
        parser.add_argument(
            "--on-unsupported",
            choices=terms.ON_UNSUPPORTED,
            default="metadata",
            help="instead of falloc, where the filesystem cannot set space aside (default: metadata)",
        )
        parser.add_argument(
            "--overlay-cluster-size",
            type=cluster_size,
            default=preallocator.OVERLAY_CLUSTER_SIZE,
            metavar="SIZE",
            help="of overlays that are made (default: 128K)",
        )
        return parser

    @staticmethod
    def preallocator(parsed_args: argparse.Namespace) -> preallocator.Preallocator:
        return preallocator.Preallocator(
            parsed_args.mode,
            on_unsupported=parsed_args.on_unsupported,
            overlay_cluster_size=parsed_args.overlay_cluster_size,
        )


class Show(_Disks):
    """Show how far disks are preallocated, and what the filesystem may still be asked for."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--check", action="store_true", help=f"exit with {_NOT_PREALLOCATED} if a disk is not preallocated"
        )
        parser.add_argument("paths", nargs="+", metavar="PATH")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Read the disks; nothing is written, also of a running instance."""

        def work(path: str) -> DiskImage:
            image = preallocator.Preallocator().inspect(path, format=parsed_args.disk_format or _in_disk_info(path))
            if parsed_args.check and image.state != "preallocated" and not self.status:
                self.status = _NOT_PREALLOCATED
            return image

        return self.each(parsed_args.paths, work, parsed_args)


class Create(_Allocating):
    """Create a preallocated disk."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--backing", metavar="FILE", help="backing file, absolute or relative to the disk's folder")
        parser.add_argument("--backing-format", metavar="FORMAT", help="its format (default: what qemu-img finds)")
        parser.add_argument("path", metavar="PATH")
        parser.add_argument("size", type=size, metavar="SIZE", help="virtual size: bytes, or with K, M, G, T")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Create the disk; qcow2 unless --disk-format says raw."""

        def work(path: str) -> DiskImage:
            return self.preallocator(parsed_args).create(
                path,
                parsed_args.size,
                parsed_args.backing,
                format=parsed_args.disk_format,
                backing_format=parsed_args.backing_format,
            )

        return self.each([parsed_args.path], work, parsed_args)


class Allocate(_Allocating):
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

        def work(path: str) -> DiskImage:
            return self.preallocator(parsed_args).preallocate(
                path, parsed_args.rewrite, format=parsed_args.disk_format or _in_disk_info(path)
            )

        return self.each(parsed_args.paths, work, parsed_args)


class Resize(_Allocating):
    """Grow a disk, its new part preallocated."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("path", metavar="PATH")
        parser.add_argument("size", type=size, metavar="SIZE", help="new virtual size: bytes, or with K, M, G, T")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Grow the disk."""

        def work(path: str) -> DiskImage:
            return self.preallocator(parsed_args).resize(
                path, parsed_args.size, format=parsed_args.disk_format or _in_disk_info(path)
            )

        return self.each([parsed_args.path], work, parsed_args)


class CheckNova(lister.Lister):
    """Tell whether the Nova in this environment, as configured, preallocates its instances."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "--config-file",
            action="append",
            default=[],
            metavar="FILE",
            help="nova.conf, as given to nova-compute; may be repeated (default: where Nova looks for it)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Look at everything, good or not."""
        self.findings = list(check_nova.check(parsed_args.config_file))
        return ("subject", "good", "detail"), [(found.subject, found.good, found.detail) for found in self.findings]

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Show what was found; 0 only if instances will be preallocated."""
        super().run(parsed_args)
        return int(not all(found.good for found in self.findings))


def size(text: str) -> int:
    """Parse a size as qemu-img does: bytes, or with K, M, G, T, P, E for powers of 1024.

    :raises: argparse.ArgumentTypeError
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 10737418240, 512M or 10G")
    return int(found[1]) * _UNITS[found[2]]


def cluster_size(text: str) -> int:
    """Parse the cluster size of overlays.

    :raises: argparse.ArgumentTypeError
    """
    found = size(text)
    try:
        preallocator.Preallocator(overlay_cluster_size=found)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return found


def _cell(image: DiskImage, column: str) -> Any:
    value = getattr(image, column)
    return Size(value) if column in _SIZES else value


def _in_disk_info(path: str) -> str | None:
    """Return the format that Nova has noted for one of its disks, if we know that one."""
    noted = disk_info.format_of(path)
    if noted == "raw" and qcow2_header.begins(path):
        terms.warn_once(
            path,
            "taken for raw, as in disk.info, but it begins like qcow2: written by its guest, or by Nova, "
            "if that has converted the disk; the instance's XML tells. Then say --disk-format qcow2",
        )
    return noted if noted in preallocator.FORMATS else None


class Imgprealloc(app.App):
    """The command's name, version and sub-commands."""

    def __init__(self) -> None:
        super().__init__(
            description="Preallocated disks for Nova instances: look, create, allocate, resize.",
            version=_version(),
            command_manager=commandmanager.CommandManager("imgprealloc.cli"),
        )


def _version() -> str:
    return metadata.version("imgprealloc")


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    return int(Imgprealloc().run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
