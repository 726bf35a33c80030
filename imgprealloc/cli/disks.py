# SPDX-License-Identifier: Apache-2.0
"""What the verbs that work on disks share: the table, its columns, sizes, errors and signals."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import contextlib
import os
import re
from typing import Any, Optional

from cliff import lister
from cliff.columns import FormattableColumn
from oslo_utils import units

from imgprealloc import exceptions
from imgprealloc import settings
from imgprealloc.cli import abreast
from imgprealloc.cli import signals
from imgprealloc.image import DiskImage
from imgprealloc.image import FileStamp
from imgprealloc.preallocator import FORMATS
from imgprealloc.preallocator import Preallocator

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


class Disks(lister.Lister):
    """A command that works on disks and then shows them."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "--disk-format",
            choices=sorted(FORMATS),
            help="the disk's format; else what Nova's disk.info beside it says, else a guess by its first bytes, "
            "under which no byte of it is changed",
        )
        return parser

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Show the disks, and return the exit status."""
        self.status = 0
        super().run(parsed_args)
        return self.status

    def each(
        self, paths: Sequence[str], work: Callable[[str], DiskImage], parsed_args: argparse.Namespace, at_once: int = 1
    ) -> tuple[Iterable[str], Iterable[tuple[Any, ...]]]:
        """Work on the disks; an error with one does not keep the rest from it.

        :param at_once: how many may be worked on at the same time
        """
        columns: tuple[str, ...] = _COLUMNS
        if parsed_args.formatter == "table" and not parsed_args.columns:
            columns = _TABLE_COLUMNS
        rows = []
        with contextlib.closing(abreast.in_order(work, paths, min(at_once, len(paths)))) as results:
            for path in paths:
                before = _stamp(path)
                try:
                    image = next(results)()
                    rows.append(tuple(_cell(image, column) for column in columns))
                except (exceptions.PreallocationError, OSError) as exc:
                    self.app.LOG.error(exc)
                    self.status = 1
                except signals.Stopped as stopped:
                    stopped.notes.append(f"{path} {_became(before, _stamp(path))}")
                    raise
        return columns, rows


class Allocating(Disks):
    """A command that preallocates, and so has an option for each setting."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        for field in settings.fields():
            choices = field.metadata["choices"]
            default: Any = field.default
            if isinstance(default, bool):
                parser.add_argument(
                    f"--{field.name.replace('_', '-')}",
                    action=argparse.BooleanOptionalAction,
                    default=default,
                    help=field.metadata["help"].strip().splitlines()[0],
                )
                continue
            is_size = isinstance(default, int)
            shown = f"{default // units.Ki}K" if is_size else default
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=size if is_size else str,
                choices=tuple(choices),
                default=default,
                metavar="SIZE" if is_size else None,
                help=f"{field.metadata['help'].strip().splitlines()[0]} (default: {shown})",
            )
        return parser

    @staticmethod
    def preallocator(parsed_args: argparse.Namespace) -> Preallocator:
        """Return the strategy that the options describe."""
        return Preallocator(**{field.name: getattr(parsed_args, field.name) for field in settings.fields()})


def size(text: str) -> int:
    """Parse a size as qemu-img does: bytes, or with K, M, G, T, P, E for powers of 1024.

    :raises: argparse.ArgumentTypeError
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 10737418240, 512M or 10G")
    return int(found[1]) * _UNITS[found[2]]


def _cell(image: DiskImage, column: str) -> Any:
    value = getattr(image, column)
    return Size(value) if column in _SIZES else value


def _stamp(path: str) -> Optional[FileStamp]:
    try:
        return FileStamp.from_stat(os.stat(path))
    except (OSError, ValueError):
        return None


def _became(before: Optional[FileStamp], after: Optional[FileStamp]) -> str:
    """Say what has become of a disk that was being worked on."""
    if before == after:
        return "was not made" if after is None else "is as it was"
    if before is None:
        return "is made, and whole"
    if after is None:
        return "cannot be looked at any more"
    if before.inode != after.inode:
        return "is done: the new file has its place, with the same content"
    return "has its content, and is not done: what was under way in it has been cut short; give the command again"
