# SPDX-License-Identifier: Apache-2.0
"""What the tables of faults do to a disk: each verb on each kind of disk, and what has to be true afterwards."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import hashlib
import os
import pathlib
import subprocess
import tempfile
from typing import Any, Optional

import images

from imgprealloc import DiskImage
from imgprealloc import PreallocationError
from imgprealloc import Preallocator

MiB = 1 << 20

SIZE = 4 * MiB
GROWN = 6 * MiB
NEW_SIZE = 5 * MiB

# No multiples of a cluster, so that a growth under zeros finds a last cluster that shows the base in part.
ODD_SIZE = 4 * MiB - 3 * 512
ODD_GROWN = 6 * MiB + 5 * 512

BASE_SIZE = 2 * MiB

# The names of files beside a disk that a verb is at work on.
TEMPORARY = ".{}.imgprealloc"
ZEROS = ".{}.imgprealloc-zeros"


@dataclasses.dataclass(frozen=True)
class Verb:
    """One thing that is done to a disk.

    :param disk: the kind of disk that is there before, or None where it is made
    :param format: its format
    :param size: what its virtual size is asked to be afterwards
    :param act: does it, to a path
    :param command: the arguments of the command line that does the same, before the path
    :param overlay: whether the disk has a backing file afterwards
    """

    name: str
    disk: Optional[str]
    format: str
    size: int
    act: Callable[[Preallocator, str], DiskImage]
    command: tuple[str, ...]
    overlay: bool = True

    def __str__(self) -> str:
        return self.name

    def argv(self, path: object) -> list[str]:
        """Return the arguments of the command line for a disk."""
        sizes = [str(self.size)] if self.command[0] in ("create", "resize") else []
        return [*self.command, "--disk-format", self.format, str(path), *sizes]


class Disks:
    """A disk of each kind, made once and copied for each use, in a folder with their base.

    :param folder: where they are made; the base stays there
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.base = images.random_file(folder / "base", BASE_SIZE)
        self._made = folder
        for name in ("used", "blank"):
            images.qcow2(folder / name, SIZE, backing=self.base)
        images.qemu_io(folder / "used", "write -P 0x5a 1M 300k", "write -P 0xa5 3M 64k", "write -z 1536k 64k")
        allocated = Preallocator(overlay_subclusters="allocated")
        allocated.create(folder / "odd", ODD_SIZE, str(self.base), backing_format="raw")
        images.qemu_io(folder / "odd", "write -P 0x5a 1M 300k", "write -P 0xa5 3M 64k", "write -z 1536k 64k")
        images.random_file(folder / "raw", MiB)
        os.truncate(folder / "raw", SIZE)
        self._contents = {name: content(folder / name, format) for name, format in _FORMATS.items()}
        self._contents[""] = content(self.base, "raw")

    def put(self, kind: str, path: pathlib.Path) -> None:
        """Put a fresh disk of a kind at a path."""
        path.unlink(missing_ok=True)
        # With its holes, or there is nothing to fill.
        images.run("cp", "--reflink=never", "--sparse=always", self._made / kind, path)

    def made(self, kind: str) -> pathlib.Path:
        """Return the disk of a kind that is copied."""
        return self._made / kind

    def verbs(self) -> tuple[Verb, ...]:
        """Return what can be done."""
        base = str(self.base)
        backing = ("--backing", base, "--backing-format", "raw")
        return (
            Verb("reserve", "used", "qcow2", SIZE, _preallocate("reserve", "qcow2"), ("allocate",)),
            Verb("rewrite", "used", "qcow2", SIZE, _preallocate("rewrite", "qcow2"), ("allocate", "--rewrite")),
            Verb("recreate", "blank", "qcow2", SIZE, _preallocate("recreate_blank", "qcow2"), ("allocate",)),
            Verb("fill", "raw", "raw", SIZE, _preallocate("reserve", "raw"), ("allocate",)),
            Verb("grow", "used", "qcow2", GROWN, lambda by, path: by.resize(path, GROWN, format="qcow2"), ("resize",)),
            Verb("grow_raw", "raw", "raw", GROWN, lambda by, path: by.resize(path, GROWN, format="raw"), ("resize",)),
            Verb(
                "create", None, "qcow2", NEW_SIZE, lambda by, path: by.create(path, NEW_SIZE), ("create",),
                overlay=False,
            ),
            Verb(
                # In which most is done, one step after the other.
                "create_overlay", None, "qcow2", NEW_SIZE,
                lambda by, path: dataclasses.replace(by, overlay_subclusters="copied").create(
                    path, NEW_SIZE, base, backing_format="raw"
                ),
                ("create", "--overlay-subclusters", "copied", *backing),
            ),
            Verb(
                "create_raw", None, "raw", NEW_SIZE, lambda by, path: by.create(path, NEW_SIZE, format="raw"),
                ("create",), overlay=False,
            ),
        )  # fmt: skip

    def odd_growth(self) -> Verb:
        """Return a growth from an odd size to an odd size."""
        return Verb(
            "grow_odd", "odd", "qcow2", ODD_GROWN, lambda by, path: by.resize(path, ODD_GROWN, format="qcow2"),
            ("resize",),
        )  # fmt: skip

    def prepare(self, verb: Verb, path: pathlib.Path) -> None:
        """Put at path what is there before a verb."""
        path.unlink(missing_ok=True)
        if verb.disk is not None:
            self.put(verb.disk, path)

    def require_kept(self, verb: Verb, path: pathlib.Path) -> None:
        """Require that what was there before a verb reads the same, whether it is grown or not."""
        if verb.disk is None:
            return
        assert path.is_file(), "the disk is gone"
        found = examined(path, verb.format)
        assert found.content == self._contents[verb.disk], "the disk reads different"
        assert found.faults == "", found.faults

    def require_done(self, verb: Verb, path: pathlib.Path) -> None:
        """Require that a disk is what a verb was asked for, by QEMU's own word."""
        self.require_kept(verb, path)
        assert path.is_file(), "there is no disk"
        found = examined(path, verb.format)
        assert found.size == verb.size, f"its virtual size is {found.size}"
        base = (str(self.base), "raw") if verb.overlay and verb.format == "qcow2" else (None, None)
        assert found.backing == base, f"its backing file is {found.backing}"
        if verb.disk is None:
            assert found.content == (self._contents[""] if base[0] else _trimmed(b"")), "a new disk reads different"
            assert found.faults == "", found.faults


def attempt(verb: Verb, path: pathlib.Path, strategy: Preallocator | None = None) -> PreallocationError | None:
    """Do it, in mode falloc if nothing else is asked for; return what was in the way."""
    try:
        verb.act(strategy or Preallocator(), str(path))
    except PreallocationError as exc:
        return exc
    return None


def require_told(failed: PreallocationError | None, path: pathlib.Path) -> None:
    """Require that an error names the disk, tells a way out, and can be read."""
    if failed is not None:
        told = str(failed)
        assert told.startswith(f"{path}: "), f"the error does not name the disk: {told[:300]}"
        assert failed.remedy, f"the error tells no way out: {told[:300]}"
        assert len(told) < 8192, f"the error has {len(told)} characters"


@dataclasses.dataclass(frozen=True)
class Examined:
    """What QEMU's own programs say of a disk.

    :param content: a hash of what the guest reads, without the zeros at the
        end, by which a disk may have grown
    :param faults: what is worse than a leaked cluster
    """

    content: str
    size: int
    backing: tuple[Optional[str], Optional[str]]
    faults: str


# By the file's bytes, because most of a table's cases come to the same.
_examined: dict[tuple[str, str], Examined] = {}


def examined(path: pathlib.Path, format: str) -> Examined:
    """Look at a disk that nobody has open."""
    key = images.file_digest(path), format
    if key not in _examined:
        info = images.info(path, format)
        _examined[key] = Examined(
            content(path, format),
            info["virtual-size"],
            (info.get("backing-filename"), info.get("backing-filename-format")),
            "" if format == "raw" else _faults(path),
        )
    return _examined[key]


_FORMATS = {"used": "qcow2", "blank": "qcow2", "odd": "qcow2", "raw": "raw"}


def _preallocate(existing: str, format: str) -> Callable[[Preallocator, str], DiskImage]:
    def act(by: Preallocator, path: str) -> DiskImage:
        preallocate: Any = by.preallocate
        found: DiskImage = preallocate(path, existing, format=format)
        return found

    return act


def content(path: pathlib.Path, format: str) -> str:
    """Hash what a guest reads, without the zeros at the end, by which a disk may have grown."""
    if format == "raw":
        return _trimmed(path.read_bytes())
    # Elsewhere: where the disk is there may be no room.
    with tempfile.TemporaryDirectory(prefix="imgprealloc-content-") as scratch:
        target = pathlib.Path(scratch, "raw")
        images.run("qemu-img", "convert", "-f", format, "-O", "raw", path, target)
        return _trimmed(target.read_bytes())


def _trimmed(read: bytes) -> str:
    return hashlib.sha256(read.rstrip(b"\0")).hexdigest()


def _faults(path: pathlib.Path) -> str:
    argv = ["qemu-img", "check", "-f", "qcow2", "--output=json", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode in (0, 3):
        return ""
    return f"qemu-img check ends with {done.returncode}: {' '.join(done.stdout.split())} {done.stderr.strip()}"
