# SPDX-License-Identifier: Apache-2.0
"""What the verbs share that show disks: the table, its columns and sizes, and the options of the settings."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import io
import os
from typing import Any, ClassVar

from cliff import lister
from cliff.columns import FormattableColumn
from oslo_utils import units

from imgprealloc import disk_file
from imgprealloc import exceptions
from imgprealloc import log
from imgprealloc import mounts
from imgprealloc import settings
from imgprealloc import sizes
from imgprealloc import storage
from imgprealloc import zeros
from imgprealloc.cli import working
from imgprealloc.cli.progress_bar import ProgressBar
from imgprealloc.cli.working import Outcome
from imgprealloc.image import DiskImage
from imgprealloc.pace import Pace
from imgprealloc.preallocator import Preallocator

_SIZES = ("virtual_size", "file_size", "allocated_size", "shared_bytes", "shortfall")
_COLUMNS = (
    "instance",
    "name",
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
    "in_use",
    "state",
    "shortfall",
    "error",
)
# What fits 80 characters: as people name it, and what it is.
SHORT_COLUMNS = {
    "instance": "short instance",
    "disk": "disk",
    "size": "virtual_size",
    "state": "state",
    "shortfall": "shortfall",
    "in use": "in_use",
}
_LONG_COLUMNS = (
    "name",
    "path",
    "format",
    "virtual_size",
    "allocated_size",
    "clusters",
    "mapped_clusters",
    "fragmented_clusters",
    "in_use",
    "state",
    "shortfall",
)
# Of an instance's UUID, in a short table.
_SHORT_UUID = 8


class Size(FormattableColumn):  # type: ignore[misc, type-arg]
    """A number of bytes: readable in a table, exact elsewhere."""

    def human_readable(self) -> str:
        """Return the size with four digits and a binary unit."""
        return sizes.readable(self._value)


class State(FormattableColumn):  # type: ignore[misc, type-arg]
    """A disk's state; nothing of one that could not be read, for which a table has a word."""

    def human_readable(self) -> str:
        """Return the state, or that there was an error."""
        return str(self._value or "error")


class Disks(working.Working, lister.Lister):
    """A command that works on disks and then shows them."""

    # Its oldest releases cannot, where a disk has nothing in a column.
    need_sort_by_cliff = False

    short_columns: ClassVar[Mapping[str, str]] = SHORT_COLUMNS

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("--long", action="store_true", help="show paths, clusters and allocated sizes in the table")
        return parser

    def columns(self, parsed_args: argparse.Namespace) -> Sequence[str]:
        """List the columns that there are, by the names that machines get."""
        return _COLUMNS

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Show the disks, and return the exit status."""
        self._require_columns(parsed_args)
        self.status = 0
        self.summary: list[str] = []
        super().run(parsed_args)
        if parsed_args.formatter == "table":
            for line in self.summary:
                self.app.stdout.write(f"{line}\n")
        return self.status

    def _require_columns(self, parsed_args: argparse.Namespace) -> None:
        """Refuse a column that there is not; cliff leaves it out without a word, or fails once all is done."""
        known = {_plain(column): column for column in self.columns(parsed_args)}
        for column in parsed_args.columns:
            if _plain(column) not in known:
                self._parser.error(f"there is no column {column!r}; there are: {', '.join(known.values())}")
        # Its oldest releases know no other spelling.
        parsed_args.columns = [known[_plain(column)] for column in parsed_args.columns]

    def produce_output(
        self, parsed_args: argparse.Namespace, column_names: Sequence[str], data: Iterable[Sequence[Any]]
    ) -> Any:
        """Sort the table as it is asked for, and show it."""
        names, rows = tuple(column_names), list(data)
        places = {_plain(name): place for place, name in reversed(list(enumerate(names)))}
        is_downwards = getattr(parsed_args, "sort_direction", None) == "desc"
        for place in (places.get(_plain(column)) for column in reversed(parsed_args.sort_columns)):
            if place is not None:
                rows.sort(key=lambda row: _order(row[place]), reverse=is_downwards)
        return super().produce_output(parsed_args, names, rows)

    def shown(
        self, outcomes: list[Outcome], parsed_args: argparse.Namespace
    ) -> tuple[Iterable[str], Iterable[tuple[Any, ...]]]:
        """Make a table of what became of disks, for whoever is to read it."""
        self.summary = list(_summary(outcomes))
        columns: Mapping[str, str] = {name: name for name in _COLUMNS}
        if parsed_args.formatter == "table" and not parsed_args.columns:
            columns = {name: name for name in _LONG_COLUMNS} if parsed_args.long else self.short_columns
        rows = [tuple(self._cell(outcome, column) for column in columns.values()) for outcome in outcomes]
        return tuple(columns), rows

    def _cell(self, outcome: Outcome, column: str) -> Any:
        """Return what a table, or a machine, is to have of a disk."""
        if column != "name":
            return cell(outcome, column)
        domain = self.domains.get(outcome.instance or "")
        # Whoever owns the instance may have called it anything.
        return exceptions.on_one_line(domain.name) if domain is not None and domain.name is not None else None


class Paced(Disks):
    """A command that may write much, and thinks of the others on the same storage."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--rate",
            type=_rate,
            metavar="SIZE",
            help="bytes a second that copies and zeros (mode full) are written at the most; they pass the page cache "
            "by and have the idle I/O priority in any case, as far as the system has these (default: no limit)",
        )
        return parser

    def progress_bar(self, count: int) -> ProgressBar:
        """Return what tells on stderr how far the work on so many disks is."""
        stream = self.app.stderr if self.app.options.verbose_level else io.StringIO()
        return ProgressBar(stream, count, lambda size: Size(size).human_readable())

    @staticmethod
    def pace(parsed_args: argparse.Namespace) -> Pace:
        """Return how others are thought of."""
        return Pace(parsed_args.rate)


class Allocating(Paced):
    """A command that preallocates, and so has an option for each setting."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        for field in settings.fields():
            choices, summary = field.metadata["choices"], field.metadata["help"].strip().splitlines()[0]
            default: Any = self.default(field)
            if choices is None:
                parser.add_argument(
                    f"--{field.name.replace('_', '-')}",
                    type=part,
                    default=default,
                    metavar="SIZE",
                    help=f"{summary} (default: {default})".replace("%", "%%"),
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
                help=f"{summary} (default: {shown})",
            )
        return parser

    def shown(
        self, outcomes: list[Outcome], parsed_args: argparse.Namespace
    ) -> tuple[Iterable[str], Iterable[tuple[Any, ...]]]:
        """Warn also of what is not held below the filesystem."""
        for image in working.read(outcomes):
            tell_thin_storage(image)
        return super().shown(outcomes, parsed_args)

    @staticmethod
    def default(field: dataclasses.Field[Any]) -> Any:
        """Return what a setting is where nothing else is asked for."""
        return field.default

    @staticmethod
    def preallocator(parsed_args: argparse.Namespace) -> Preallocator:
        """Return the strategy that the options describe."""
        return Preallocator(**{field.name: getattr(parsed_args, field.name) for field in settings.fields()})


def nothing_to_tell() -> contextlib.suppress:
    """Keep to oneself what cannot be found out about a disk only to warn of it."""
    # Of a disk that cannot be looked at, the look itself tells.
    return contextlib.suppress(exceptions.PreallocationError, OSError, ValueError)


def tell_thin_storage(image: DiskImage) -> None:
    """Warn, once a filesystem, of storage that does not hold what a disk on it has set aside and not written."""
    if not image.held:
        return
    with nothing_to_tell(), disk_file.opened(image.path) as file:
        thin = storage.thin_below(file.fd)
        if thin and zeros.has_unwritten(file.fd, more_than=zeros.MOST_OF_METADATA):
            mount = mounts.of(file.fd)
            log.warn_once(
                "thin storage",
                image.path if mount is None else mount.point,
                f"thin storage below: {thin}; what mode falloc sets aside is not held there, what mode full writes is",
            )


def size(text: str) -> int:
    """Parse an argument that is a size, as sizes.parse() does.

    :raises: argparse.ArgumentTypeError
    """
    try:
        return sizes.parse(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _order(cell: Any) -> tuple[bool, Any]:
    """Return what a cell is sorted by; those with nothing in them come last, but for a state there is a word."""
    value = cell
    if isinstance(cell, FormattableColumn):
        value = cell.human_readable() if isinstance(cell, State) else cell.machine_readable()
    return value is None, value


def _plain(column: str) -> str:
    """Return a column's name as it may be given, too."""
    return column.lower().replace("_", " ")


def part(text: str) -> str:
    """Parse an argument that is a part of a filesystem, as sizes.part() does.

    :raises: argparse.ArgumentTypeError
    """
    try:
        sizes.part(text, 0)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return text


def _rate(text: str) -> int:
    """Parse a number of bytes a second."""
    rate = size(text)
    if not rate:
        raise argparse.ArgumentTypeError("at 0 bytes a second nothing would ever be done")
    return rate


def cell(outcome: Outcome, column: str) -> Any:
    """Return what a table, or a machine, is to have of a disk."""
    if column == "instance":
        return outcome.instance
    if column == "short instance":
        return outcome.instance and outcome.instance[:_SHORT_UUID]
    if column == "disk":
        return os.path.basename(outcome.path) if outcome.instance else outcome.path
    if column in ("path", "error"):
        return getattr(outcome, column)
    value = outcome.image and getattr(outcome.image, column)
    if column == "state":
        return State(value)
    return Size(value) if column in _SIZES and value is not None else value


def _summary(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """Say of each filesystem what its disks are, and whether it has what they are short of."""
    for found in working.by_filesystem(outcomes):
        counts = ", ".join(f"{number} {state}" for state, number in found.states.most_common())
        short, available = sizes.readable(found.short), sizes.readable(found.available)
        yield f"{found.mount_point}: {counts}; {short} short, {available} available"
