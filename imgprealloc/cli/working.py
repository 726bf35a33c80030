# SPDX-License-Identifier: Apache-2.0
"""What the verbs share that work on disks: which disks are meant, what became of each, errors and signals."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import os
from typing import Optional

from cliff import command
from oslo_config import cfg

from imgprealloc import domains
from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc import instances
from imgprealloc import record
from imgprealloc import service
from imgprealloc.cli import abreast
from imgprealloc.cli import by_mount
from imgprealloc.cli import examples
from imgprealloc.cli import signals
from imgprealloc.cli.examples import Example
from imgprealloc.image import DiskImage
from imgprealloc.image import FileStamp
from imgprealloc.image import State
from imgprealloc.preallocator import FORMATS
from imgprealloc.preallocator import Preallocator

GIVEN_PATHS = "a disk, or a folder with disks, or with instances, in it"
_GONE = "cannot be looked at any more"
_PATHS = f"{GIVEN_PATHS} (default: all instances of this host, by nova.conf)"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one disk that was asked for.

    :param image: as it is now; None where it could not be read
    :param error: why what was asked for is not done
    """

    path: str
    image: Optional[DiskImage]
    error: Optional[str]

    @property
    def instance(self) -> Optional[str]:
        """The UUID of the instance that it is of."""
        return instances.instance_of(self.path)


@dataclasses.dataclass(frozen=True)
class Filesystem:
    """The disks of one filesystem.

    :param states: how many disks are in which
    :param short: bytes that they may still ask for
    :param available: bytes that there are
    """

    mount_point: str
    states: collections.Counter[State]
    short: int
    available: int


def add_paths(parser: argparse.ArgumentParser) -> None:
    """Let a command be given the disks that Working.named() lists."""
    parser.add_argument("paths", nargs="*", metavar="PATH", help=_PATHS)


class Working(command.Command):
    """A command that works on disks, one or all that there are."""

    status = 0
    examples: Sequence[Example] = ()
    format_help = (
        "the disk's format; else what Nova's disk.info beside it, or libvirt's record of its instance, says, else a "
        "guess by its first bytes, under which no byte of it is changed"
    )
    # Folders that were meant, and cannot be looked into, or are not even known.
    _unlisted = 0

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        self._parser = parser
        parser.add_argument("--disk-format", choices=sorted(FORMATS), help=self.format_help)
        examples.add(parser, self.examples)
        return parser

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Work, while what libvirt has on record counts as Nova's own record does; return the exit status."""
        self.domains = domains.known()
        formats = {path: format for domain in self.domains.values() for path, format in domain.formats.items()}
        with record.also_told(formats, of_here=True):
            return int(super().run(parsed_args))

    def named(self, paths: Sequence[str]) -> list[str]:
        """List the disks that paths name: files, and folders with disks, or with instances, in them.

        :param paths: none stands for all disks of all instances of this host
        """
        found: list[str] = []
        try:
            meant = paths or [_instances_path()]
        except cfg.Error as exc:
            self._tell(f"nova.conf does not tell where instances are: {exc}. Name a folder.")
            self._unlisted += 1
            return []
        for path in meant:
            try:
                below = list(instances.disks_below(path)) if os.path.isdir(path) else [path]
            except OSError as exc:
                self._tell(f"{path}: {exc.strerror}. Check the path and its permissions.")
                self._unlisted += 1
                continue
            if paths and not below:
                self._tell(f"{path}: there is no disk of an instance in it. Check the path.")
            found += below
        return found

    def each(
        self,
        paths: Sequence[str],
        work: Callable[[str], DiskImage],
        *,
        at_once: int = 1,
        lack: Callable[[DiskImage], Optional[str]] = lambda image: None,
        asked: Optional[int] = None,
    ) -> list[Outcome]:
        """Work on the disks; an error with one does not keep the rest from it.

        :param at_once: how many may be worked on at the same time
        :param lack: says of a disk that has been worked on what of the request is
            not done
        :param asked: how many disks were asked for, where some are left out
        """
        outcomes = []
        with contextlib.closing(abreast.in_order(work, paths, min(at_once, len(paths)))) as results:
            for path in paths:
                before = _stamp(path)
                try:
                    image = next(results)()
                    error = lack(image)
                    if error is None:
                        outcomes.append(Outcome(path, image, None))
                    else:
                        outcomes.append(self.not_done(path, image, f"{path}: {error}"))
                except (exceptions.PreallocationError, OSError) as exc:
                    # One that lacks a part of what was asked for has been read.
                    outcomes.append(self.not_done(path, getattr(exc, "image", None), exc))
                except signals.Stopped as stopped:
                    became = _became(before, _stamp(path))
                    stopped.notes.append(f"{path} {became}")
                    if at_once == 1 and (asked or len(paths)) > 1:
                        done = sum(outcome.error is None for outcome in outcomes)
                        stopped.notes.insert(0, f"{done} of {asked or len(paths)} disks done")
                        stopped.notes += [] if became == _GONE else ["all disks are whole"]
                    raise
        return outcomes

    def look_at(self, parsed_args: argparse.Namespace) -> list[Outcome]:
        """Read the disks that are meant, as many at a time as there are CPUs; also of running instances."""

        def look(path: str) -> DiskImage:
            return Preallocator().inspect(path, format=parsed_args.disk_format)

        return self.each(self.named(parsed_args.paths), look, at_once=abreast.cpus())

    def unread(self, outcomes: Iterable[Outcome]) -> int:
        """Count the disks that could not be read, and the folders that could not be looked into for disks."""
        return sum(outcome.image is None for outcome in outcomes) + self._unlisted

    def not_done(self, path: str, image: Optional[DiskImage], error: object) -> Outcome:
        """Tell why what was asked for is not done to a disk, by the exit status, too."""
        self._tell(error)
        return Outcome(path, image, str(error))

    def _tell(self, error: object) -> None:
        self.status = 1
        self.app.LOG.error(error, exc_info=self.app.options.debug)


def _instances_path() -> str:
    """Return where this host's nova-compute has its instances, by the configuration that it reads.

    :raises: oslo_config.cfg.Error
    """
    started = service.found()
    with started.surroundings():
        return instances.configured_path(started.configuration, started.prog)


def first_names(paths: Iterable[str]) -> dict[str, str]:
    """Return for each path the first that leads to the same disk, which would else be counted twice."""
    found: dict[object, str] = {}
    first = {}
    for path in paths:
        key: object = path
        # Of what cannot be looked at, the look tells.
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            key = status.st_dev, status.st_ino
        first[path] = found.setdefault(key, path)
    return first


def read(outcomes: Iterable[Outcome]) -> list[DiskImage]:
    """List the disks that could be read; one that is named twice is one."""
    images = (outcome.image for outcome in outcomes if outcome.image is not None)
    return list({(image.stamp.device, image.stamp.inode): image for image in images}.values())


def by_filesystem(outcomes: Iterable[Outcome]) -> Iterator[Filesystem]:
    """Add up the disks that could be read, for each filesystem that can be asked."""
    for mount_point, found in by_mount.together(read(outcomes), lambda image: image):
        with contextlib.suppress(OSError):
            yield _filesystem(mount_point, found)


def _filesystem(mount_point: str, images: Sequence[DiskImage]) -> Filesystem:
    fd = os.open(os.path.dirname(os.path.realpath(images[0].path)), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return Filesystem(
            mount_point=mount_point,
            states=collections.Counter(image.state for image in images),
            short=sum(image.shortfall for image in images),
            available=filesystem.available(fd),
        )
    finally:
        os.close(fd)


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
        return _GONE
    if before.inode != after.inode:
        return "is done: the new file has its place, with the same content"
    return (
        "has its content, and is not done: what was under way in it has been cut short; give the command again, or, "
        "where it has grown to its new size already, imgprealloc allocate"
    )
