# SPDX-License-Identifier: Apache-2.0
"""What the verbs that work on disks share: the table, its columns, sizes, errors and signals."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import decimal
import os
import re
from typing import Any, Optional

from cliff import lister
from cliff.columns import FormattableColumn
from oslo_config import cfg
from oslo_utils import units

from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc import instances
from imgprealloc import settings
from imgprealloc.cli import abreast
from imgprealloc.cli import signals
from imgprealloc.image import DiskImage
from imgprealloc.image import FileStamp
from imgprealloc.preallocator import FORMATS
from imgprealloc.preallocator import Preallocator

_UNITS = {"": 1, "K": units.Ki, "M": units.Mi, "G": units.Gi, "T": units.Ti, "P": units.Pi, "E": units.Ei}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGTPE]?)(?:i?B)?", re.ASCII | re.IGNORECASE)

_SIZES = ("virtual_size", "file_size", "allocated_size", "shared_bytes", "shortfall")
_COLUMNS = (
    "instance",
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
_SHORT_COLUMNS = {
    "instance": "short instance",
    "disk": "disk",
    "size": "virtual_size",
    "state": "state",
    "shortfall": "shortfall",
    "in use": "in_use",
}
_LONG_COLUMNS = (
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
PATHS = "a disk, or a folder with disks, or with instances, in it (default: all instances of this host, by nova.conf)"

# Of an instance's UUID, in a short table.
_SHORT_UUID = 8


class Size(FormattableColumn):  # type: ignore[misc, type-arg]
    """A number of bytes: readable in a table, exact elsewhere."""

    def human_readable(self) -> str:
        """Return the size with four digits and a binary unit."""
        size, unit = float(self._value), "bytes"
        for larger in ("KiB", "MiB", "GiB", "TiB"):
            if size >= units.Ki:
                size, unit = size / units.Ki, larger
        return f"{size:.4g} {unit}"


class State(FormattableColumn):  # type: ignore[misc, type-arg]
    """A disk's state; nothing of one that could not be read, for which a table has a word."""

    def human_readable(self) -> str:
        """Return the state, or that there was an error."""
        return str(self._value or "error")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one disk that was asked for.

    :param image: as it is now; None where it could not be read
    :param error: why what was asked for is not done
    """

    path: str
    image: Optional[DiskImage]
    error: Optional[str]

    def cell(self, column: str) -> Any:
        """Return what a table, or a machine, is to have of it."""
        if column == "path":
            return self.path
        if column == "error":
            return self.error
        instance = instances.instance_of(self.path)
        if column == "instance":
            return instance
        if column == "short instance":
            return instance and instance[:_SHORT_UUID]
        if column == "disk":
            return os.path.basename(self.path) if instance else self.path
        if column == "state":
            return State(self.image and self.image.state)
        value = self.image and getattr(self.image, column)
        return Size(value) if column in _SIZES and value is not None else value


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
        parser.add_argument("--long", action="store_true", help="show paths, clusters and allocated sizes in the table")
        return parser

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Show the disks, and return the exit status."""
        self.status = 0
        self._outcomes: list[Outcome] = []
        super().run(parsed_args)
        if parsed_args.formatter == "table":
            for line in _summary(self._outcomes):
                self.app.stdout.write(f"{line}\n")
        return self.status

    def named(self, paths: Sequence[str]) -> list[str]:
        """List the disks that paths name: files, and folders with disks, or with instances, in them.

        :param paths: none stands for all disks of all instances of this host
        """
        found: list[str] = []
        try:
            for path in paths or [instances.configured_path()]:
                below = instances.disks_below(path) if os.path.isdir(path) else [path]
                if not below:
                    self.app.LOG.warning("%s: there is no disk of an instance in it", path)
                found += below
        except OSError as exc:
            self.app.LOG.error("%s: %s. Check the path and its permissions.", exc.filename, exc.strerror)
            self.status = 1
        except cfg.Error as exc:
            self.app.LOG.error("nova.conf does not tell where instances are: %s. Name a folder.", exc)
            self.status = 1
        return found

    def each(
        self,
        paths: Sequence[str],
        work: Callable[[str], DiskImage],
        parsed_args: argparse.Namespace,
        at_once: int = 1,
        lack: Callable[[DiskImage], Optional[str]] = lambda image: None,
    ) -> tuple[Iterable[str], Iterable[tuple[Any, ...]]]:
        """Work on the disks; an error with one does not keep the rest from it.

        :param at_once: how many may be worked on at the same time
        :param lack: says of a disk that has been worked on what of the request is
            not done
        """
        with contextlib.closing(abreast.in_order(work, paths, min(at_once, len(paths)))) as results:
            for path in paths:
                before = _stamp(path)
                try:
                    image = next(results)()
                    error = lack(image)
                    if error is not None:
                        error = f"{path}: {error}"
                        self._tell(error)
                    self._outcomes.append(Outcome(path, image, error))
                except (exceptions.PreallocationError, OSError) as exc:
                    self._tell(exc)
                    self._outcomes.append(Outcome(path, None, str(exc)))
                except signals.Stopped as stopped:
                    stopped.notes.append(f"{path} {_became(before, _stamp(path))}")
                    raise
        columns: dict[str, str] = {name: name for name in _COLUMNS}
        if parsed_args.formatter == "table" and not parsed_args.columns:
            columns = {name: name for name in _LONG_COLUMNS} if parsed_args.long else _SHORT_COLUMNS
        return tuple(columns), [tuple(map(outcome.cell, columns.values())) for outcome in self._outcomes]

    def _tell(self, error: object) -> None:
        self.status = 1
        self.app.LOG.error(error, exc_info=self.app.options.debug)


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
    bytes = decimal.Decimal(found[1]) * _UNITS[found[2].upper()] if found else decimal.Decimal("NaN")
    if bytes != bytes.to_integral_value():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 10737418240, 512M or 1.5G")
    return int(bytes)


def _summary(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """Say of each filesystem what its disks are, and whether it has what they are short of."""
    of_device: dict[int, list[DiskImage]] = {}
    for outcome in outcomes:
        if outcome.image is not None:
            of_device.setdefault(outcome.image.stamp.device, []).append(outcome.image)
    for images in of_device.values():
        folder = os.path.dirname(os.path.realpath(images[0].path))
        states = collections.Counter(image.state for image in images)
        with contextlib.suppress(OSError):
            counts = ", ".join(f"{number} {state}" for state, number in states.most_common())
            short, available = sum(image.shortfall for image in images), filesystem.available(folder)
            yield (
                f"{_mount_point(folder)}: {counts}; {Size(short).human_readable()} short, "
                f"{Size(available).human_readable()} available"
            )


def _mount_point(folder: str) -> str:
    while not os.path.ismount(folder):
        folder = os.path.dirname(folder)
    return folder


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
