# SPDX-License-Identifier: Apache-2.0
"""A host whose programs are played: processutils.execute answers, and nothing is started.

Programs records what is run and answers as it is told. Host knows disks too: its
qemu-img, fallocate(1) and extent map agree about the small sparse files of a
test, as far as the library looks at them. What qemu-img refuses, Host refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import fcntl
import json
import os
import struct
from typing import Any
from unittest import mock

import fixtures
from oslo_concurrency import processutils
from oslo_utils import units

from imgprealloc import fallocate
from imgprealloc import filesystem
from imgprealloc import os_errors
from imgprealloc import promise
from imgprealloc import subclusters
from imgprealloc import zeros
from imgprealloc.filesystem import Filesystem

from . import qcow2_file

SIZE = 16 * units.Mi
"""The virtual size of a disk, where a test does not care."""

ENOSPC = "No space left on device"
EDQUOT = "Disk quota exceeded"

ZEROS = ".imgprealloc-zeros"
"""How the name of the file ends that a disk is grown over."""

_METADATA = units.Mi
# What falloc leaves out of its own metadata (facts.md: 56 KiB).
_SMALL_HOLES = 56 * units.Ki
_EMPTY_FILE = 256 * units.Ki

_READERS = ("info", "check", "map", "--version")


# By their modules.
_OWN_PROCESSES = {
    "imgprealloc.zeros": "zeros",
    "imgprealloc.fallocate": "unshare",
    "imgprealloc.punching": "punch",
}

# coreutils' timeout, which each program is started by.
_TIMEOUT = ("timeout", "--foreground")


@dataclasses.dataclass(frozen=True)
class Call:
    """A program that was run.

    :param argv: as the program gets it, without the timeout that ends it and the prlimit that limits it
    :param shown: the same, with the names of files for those that stand for
        what this process has open
    :param seconds: after which it would have been ended
    :param stdin: the file that it gets as its standard input
    :param limits: what it runs under, as prlimit's options; None without prlimit
    :param is_over_zeros: whether it grows an image as if its backing file were zeros
    :param is_idle: whether it has the idle I/O priority
    """

    argv: tuple[str, ...]
    kwargs: Mapping[str, Any]
    shown: tuple[str, ...] = ()
    seconds: float = 0.0
    is_over_zeros: bool = False
    stdin: os.stat_result | None = None
    limits: tuple[str, ...] | None = None
    is_idle: bool = False

    @property
    def name(self) -> str:
        """qemu-img's sub-command, what a process of our own does, or the program."""
        if self.argv[0] == "qemu-img":
            return self.argv[1]
        return (
            _OWN_PROCESSES[self.argv[self.argv.index("-m") + 1]]
            if "-m" in self.argv
            else os.path.basename(self.argv[0])
        )

    def after(self, option: str) -> str | None:
        """Return the word after an option, if the option was given."""
        return self.argv[self.argv.index(option) + 1] if option in self.argv else None

    @property
    def options(self) -> dict[str, str]:
        """What was given with -o."""
        return csv(self.after("-o") or "")


def limited(limits: processutils.ProcessLimits) -> tuple[str, ...]:
    """Return what Call.limits is under these limits."""
    return tuple(limits.prlimit_args())


def csv(text: str) -> dict[str, str]:
    """Split QEMU's key=value list; a doubled comma belongs to the value."""
    words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",") if word]
    return dict(word.split("=", 1) for word in words)


class Programs(fixtures.Fixture):
    """In place of processutils.execute: record each call, and answer what the test has laid ready."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.answers: dict[str, Callable[[Call], str]] = {}
        # By name: what happens meanwhile.
        self.then: dict[str, Callable[[], Any]] = {}
        self._ends: dict[str, tuple[int, str]] = {}
        self._missing: set[str] = set()
        # False: a program that is missing ends as it is told to.
        self.fails_to_start = True

    def _setUp(self) -> None:
        self.useFixture(fixtures.MockPatch("oslo_concurrency.processutils.execute", self._execute))
        self.useFixture(fixtures.MockPatch("shutil.which", self._which))

    def ends(self, name: str, status: int, stderr: str = "") -> None:
        """From now on let a program end with a status, negative for a signal."""
        self._ends[name] = (status, stderr)

    def uninstall(self, program: str) -> None:
        """Let a program not be there."""
        self._missing.add(program)

    def run(self, *names: str) -> list[Call]:
        """Return the calls of these programs, in order."""
        return [call for call in self.calls if call.name in names]

    @property
    def changes(self) -> list[str]:
        """The names of the programs that ran, in order, less those that only look."""
        return [call.name for call in self.calls if call.name not in _READERS]

    def _execute(self, *words: str, **kwargs: Any) -> tuple[str, str]:
        assert (words[:2], words[2].partition("=")[0]) == (_TIMEOUT, "--kill-after")
        is_idle = words[4:8] == ("ionice", "-c", "3", "-t")
        limits, argv = _unlimited(words[8:] if is_idle else words[4:])
        stdin = kwargs["preexec_fn"].__self__.stdin
        call = Call(
            argv,
            kwargs,
            tuple(map(os_errors.shown, argv)),
            float(words[3]),
            _is_over_zeros(argv),
            None if stdin is None else os.fstat(stdin),
            limits,
            is_idle,
        )
        self.calls.append(call)
        for program in ("timeout", argv[0]) if limits is None else ("timeout", "prlimit", argv[0]):
            if program in self._missing and self.fails_to_start:
                self._fail_to_start(call, program)
        kwargs["on_execute"](mock.Mock())
        status, stderr = self._ends.get(call.name, (0, ""))
        answer = self.answers.get(call.name)
        stdout = "" if status == 1 or status < 0 or answer is None else answer(call)
        self.then.get(call.name, lambda: None)()
        if status not in kwargs.get("check_exit_code", [0]):
            raise failure(call, status, stderr)
        return stdout, stderr

    def _which(self, program: str, *how: Any, **more: Any) -> str | None:
        return None if program in self._missing else f"/usr/bin/{program}"

    def _fail_to_start(self, call: Call, program: str) -> None:
        if program == "timeout":
            raise FileNotFoundError(2, "No such file or directory", program)
        starter = "timeout" if call.limits is None or program == "prlimit" else "prlimit"
        raise failure(call, 127, f"{starter}: failed to run command '{program}': No such file or directory")


def _unlimited(words: tuple[str, ...]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Take prlimit and its options off a command line."""
    if words[0] != "prlimit":
        return None, words
    end = next(place for place, word in enumerate(words[1:], 1) if not word.startswith("--"))
    return words[1:end], words[end:]


# What is copied into a stand-in is this, whatever it is copied from.
_COPIED = 0xFF


def _is_over_zeros(argv: tuple[str, ...]) -> bool:
    """Whether an image is opened over a stand-in for its backing file, and that is not empty."""
    return "--image-opts" in argv and _stand_in_size(csv(argv[-2])) > 0


def _write_out(path: str, start: int, end: int) -> None:
    """Write zeros between start and end where nothing is written, as in mode full."""
    with open(path, "r+b") as file:
        for hole in zeros.holes(file.fileno(), start):
            os.pwrite(file.fileno(), bytes(max(0, min(hole.end, end) - hole.start)), hole.start)
        # Or the blocks that the file takes would change once more.
        os.fdatasync(file.fileno())


def _stand_in_size(image: Mapping[str, str]) -> int:
    """Return the length of the stand-in for an image's backing file; -1 where it is none."""
    backing_file = image.get("backing.file.filename", "")
    return os.path.getsize(backing_file) if os_errors.shown(backing_file).endswith(ZEROS) else -1


def _shows_last_cluster(image: Mapping[str, str], disk: Disk) -> bool:
    """Whether the stand-in for a backing file has what was copied from the disk's last cluster, and nothing else."""
    length = disk.virtual_size % disk.cluster_size
    with open(image["backing.file.filename"], "rb") as file:
        content = file.read()
    shown = bytes(disk.virtual_size - length) + bytes([_COPIED]) * length
    return content == shown.ljust(len(content), b"\0")


def failure(call: Call, status: int, stderr: str) -> processutils.ProcessExecutionError:
    command = " ".join((*_TIMEOUT, "--kill-after=10", f"{call.seconds:.3f}", *call.argv))
    return processutils.ProcessExecutionError(stdout="", stderr=stderr, exit_code=status, cmd=command)


@dataclasses.dataclass
class Disk:
    """What there is to know about a file, as far as qemu-img and the filesystem tell it."""

    format: str
    virtual_size: int
    cluster_size: int = 64 * units.Ki
    backing_file: str | None = None
    backing_format: str | None = None
    extended_l2: bool = False
    # Of its subclusters, most.
    allocated: bool = False
    mapped: int = 0
    compressed: int = 0
    snapshots: int = 0
    bitmaps: int = 0
    refcount_bits: int = 16
    encrypted: bool = False
    corrupt: bool = False
    data_file: bool = False
    errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    held: int = 0
    shared: int = 0
    nocow: bool = False

    @property
    def clusters(self) -> int:
        return -(-self.virtual_size // self.cluster_size)


class Host(Programs):
    """Disks in one folder, with the programs and the filesystem that go with them."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.filesystem = Filesystem("ext4", fallocate=True, copy_on_write=False)
        self.available = units.Ti
        # The filesystem itself.
        self.size = units.Ti
        # What qemu-img map says of any disk.
        self.map: list[dict[str, Any]] = []
        self.version = "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"
        # False: says yes to fallocate and sets nothing aside.
        self.honest = True
        # By name: changes an answer on its way, as a test likes.
        self.amend: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self._disks: dict[tuple[int, int], Disk] = {}
        self.answers = {
            "--version": lambda call: f"qemu-img version {self.version}\nCopyright (c) 2003-2022 Fabrice Bellard",
            "info": self._told(self._info),
            "check": self._told(self._check),
            "map": lambda call: json.dumps(self.map),
            "create": self._create,
            "convert": self._convert,
            "resize": self._resize,
            "rebase": self._rebase,
            "fallocate": self._fallocate,
            "zeros": self._zeros,
            "unshare": self._unshare,
        }

    def _setUp(self) -> None:
        super()._setUp()
        # No disk of a test has to outlive a crash, and waiting would take most of the time.
        self.useFixture(fixtures.MockPatchObject(os, "fsync", lambda fd: None))
        self.useFixture(fixtures.MockPatchObject(fallocate, "extents", self._extents))
        # What happens without a process could not be seen.
        self.useFixture(fixtures.MockPatchObject(fallocate, "AT_ONCE", 0))
        self.useFixture(fixtures.MockPatchObject(subclusters, "mostly_allocated", self._mostly_allocated))
        self.useFixture(fixtures.MockPatchObject(promise, "_PAUSE", 0))
        self.useFixture(fixtures.MockPatchObject(filesystem, "under", lambda directory: self.filesystem))
        self.useFixture(fixtures.MockPatchObject(filesystem, "copies_on_write", self._copies_on_write))
        self.useFixture(fixtures.MockPatchObject(filesystem, "available", lambda where: self.available))
        self.useFixture(fixtures.MockPatchObject(filesystem, "size", lambda where: self.size))

    # Disks, as a test finds them.

    def path(self, name: str = "disk") -> str:
        return os.path.join(self.folder, name)

    def base(self, size: int, name: str = "base") -> str:
        """Lay down a raw base image."""
        return self.raw(size, name=name, held=size)

    def raw(self, size: int = SIZE, *, name: str = "disk", held: int = 0, shared: int = 0) -> str:
        """Lay down a raw disk."""
        path = self.path(name)
        with open(path, "wb") as file:
            file.truncate(size)
        self._disks[_key(path)] = Disk("raw", -(-size // 512) * 512, held=held, shared=shared)
        return path

    def qcow2(
        self, size: int = SIZE, *, name: str = "disk", mapped: float | None = None, held: int | None = None, **more: Any
    ) -> str:
        """Lay down a qcow2 disk.

        :param mapped: the part of its clusters that is mapped; None for a disk without anything in it
        :param held: bytes that the filesystem has set aside; else the file's length
        """
        path = self.path(name)
        disk = Disk("qcow2", size, **more)
        disk.mapped = int(disk.clusters * (mapped or 0))
        self._write_header(path, disk, filled=mapped is not None)
        os.truncate(path, _EMPTY_FILE if mapped is None else _METADATA + disk.mapped * disk.cluster_size)
        disk.held = os.path.getsize(path) if held is None else held
        self._disks[_key(path)] = disk
        return path

    def overlay(self, size: int = SIZE, *, base: int = SIZE // 2, **more: Any) -> str:
        """Lay down an overlay, and its raw base image unless that is there."""
        if not os.path.exists(self.path("base")):
            self.base(base)
        return self.qcow2(size, **{"backing_file": self.path("base"), "backing_format": "raw", **more})

    def disk(self, path: str | None = None) -> Disk:
        """Return what there is to know about a file."""
        return self._disks[_key(path or self.path())]

    @staticmethod
    def content(path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def rewrite_header(self, path: str) -> None:
        """Let the file say what there is to know about it."""
        size = os.path.getsize(path)
        self._write_header(path, self.disk(path), filled=True)
        os.truncate(path, size)

    @property
    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder))

    # The filesystem.

    def _extents(self, path: str) -> list[fallocate.Extent]:
        disk = self._disks.get(_key(path))
        if disk is None:
            return []
        extents = [fallocate.Extent(0, disk.shared, shared=True)] if disk.shared else []
        return [*extents, fallocate.Extent(disk.shared, disk.held - disk.shared)]

    def _mostly_allocated(self, fd: int, start: int, end: int) -> bool:
        return self._disks[_key(fd)].allocated

    def _copies_on_write(self, fd: int, *, is_shared: bool) -> bool:
        return self.filesystem.copy_on_write and (is_shared or not self._disks[_key(fd)].nocow)

    def _take(self, call: Call, disk: Disk, end: int) -> None:
        """Set space aside up to end, as far as there is any."""
        more = max(0, end - disk.held)
        if more > self.available:
            raise failure(call, 1, f"{call.argv[0]}: fallocate failed: {ENOSPC}")
        self.available -= more
        if self.honest:
            disk.held += more

    # The programs.

    def _told(self, answer: Callable[[Call], dict[str, Any]]) -> Callable[[Call], str]:
        def tell(call: Call) -> str:
            said = answer(call)
            amend: Callable[[dict[str, Any]], Any] = self.amend.get(call.name, lambda _: None)
            amend(said)
            return json.dumps(said, indent=4)

        return tell

    def _info(self, call: Call) -> dict[str, Any]:
        path = call.argv[-1]
        # A file of which nothing is known is raw.
        disk = self._disks.get(_key(path)) or Disk("raw", os.path.getsize(path))
        format = call.after("-f") or disk.format
        if format == "raw":
            size = os.path.getsize(path)
            return {"virtual-size": -(-size // 512) * 512, "filename": path, "format": "raw", "actual-size": disk.held}
        if format != disk.format:
            raise failure(call, 1, f"qemu-img: Could not open '{path}': Image is not in {format} format")
        return {
            "virtual-size": disk.virtual_size,
            "filename": path,
            "cluster-size": disk.cluster_size,
            "format": disk.format,
            "actual-size": disk.held,
            "dirty-flag": False,
        }

    def _check(self, call: Call) -> dict[str, Any]:
        path = json.loads(call.argv[-1].partition(":")[2])["file"]["filename"]
        disk = self._disks[_key(path)]
        check = {
            "image-end-offset": os.path.getsize(path),
            "check-errors": disk.errors,
            "filename": path,
            "format": disk.format,
        }
        # As qemu-img does, without those that are 0.
        counts = {
            "total-clusters": disk.clusters,
            "allocated-clusters": disk.mapped,
            "compressed-clusters": disk.compressed,
            "corruptions": disk.corruptions,
            "leaks": disk.leaks,
        }
        return {**check, **{key: count for key, count in counts.items() if count}}

    def _create(self, call: Call) -> str:
        path, size = call.argv[-2], int(call.argv[-1])
        options = call.options
        self._new(call, path, size, str(call.after("-f")), options, call.after("-b"), call.after("-F"))
        return ""

    def _convert(self, call: Call) -> str:
        # QEMU 5.2 has no such option here.
        assert "-F" not in call.argv
        source, target = call.argv[-2:]
        size = None
        if "--image-opts" in call.argv:
            image = csv(source)
            if image["driver"] == "raw":
                # A part of what is below it.
                offset, size = int(image["offset"]), int(image["size"])
                image = {key[len("file.") :]: value for key, value in image.items() if key.startswith("file.")}
                if not os_errors.shown(name := image["file.filename"]).endswith(ZEROS):
                    assert offset + size <= self._disks[_key(name)].virtual_size
            source = image["file.filename"]
            if "backing.file.filename" in image:
                self._assert_is_base(self._disks[_key(source)], source, image["backing.file.filename"])
        if "-n" in call.argv:
            goal = csv(target)
            assert goal["offset"] == csv(call.argv[-2])["offset"]
            if os_errors.shown(name := goal["file.file.filename"]).endswith(ZEROS):
                with open(name, "r+b") as file:
                    os.pwrite(file.fileno(), bytes([_COPIED]) * int(goal["size"]), int(goal["offset"]))
            return ""
        disk = self._disks[_key(source)]
        self._new(
            call, target, size or disk.virtual_size, str(call.after("-O")), call.options, call.after("-B"),
            call.options.get("backing_fmt"),
        )  # fmt: skip
        return ""

    def _new(
        self,
        call: Call,
        path: str,
        size: int,
        format: str,
        options: Mapping[str, str],
        backing_file: str | None,
        backing_format: str | None,
    ) -> None:
        preallocation = options.get("preallocation", "off")
        size = -(-size // 512) * 512
        if format == "raw" and preallocation == "metadata":
            raise failure(call, 1, f"qemu-img: {path}: Invalid parameter 'metadata'")
        if backing_file and preallocation != "off" and options.get("extended_l2") != "on":
            raise failure(
                call, 1, f"qemu-img: {path}: Backing file and preallocation can only be used at the same time if "
                "extended_l2 is enabled",
            )  # fmt: skip
        disk = Disk(
            format,
            size,
            cluster_size=int(options.get("cluster_size", 64 * units.Ki)),
            backing_file=backing_file,
            backing_format=backing_format,
            extended_l2=options.get("extended_l2") == "on",
            nocow=options.get("nocow") == "on",
        )
        if format == "raw":
            os.truncate(path, size)
        else:
            self._write_header(path, disk, filled=preallocation != "off")
            os.truncate(path, _EMPTY_FILE if preallocation == "off" else size + _METADATA)
        if preallocation != "off":
            disk.mapped = disk.clusters
        if preallocation in ("falloc", "full"):
            end = os.path.getsize(path) - (0 if format == "raw" else _SMALL_HOLES)
            self._take(call, disk, end)
            if preallocation == "full":
                _write_out(path, 0, end)
        self._disks[_key(path)] = disk

    def _resize(self, call: Call) -> str:
        target, size = call.argv[-2], int(call.argv[-1])
        if "--shrink" in call.argv:
            return self._shrink(csv(target)["file.filename"], size)
        preallocation = next(word.partition("=")[2] for word in call.argv if word.startswith("--preallocation="))
        image = csv(target) if "--image-opts" in call.argv else None
        path = target if image is None else image["file.filename"]
        disk = self._disks[_key(path)]
        format = call.after("-f") if image is None else image["driver"]
        if format == "raw" != disk.format:
            # As the caller says; a header in it means nothing.
            disk = self._disks[_key(path)] = Disk("raw", os.path.getsize(path), held=disk.held)
        if size % 512 and disk.format != "raw":
            raise failure(call, 1, "qemu-img: The new size must be a multiple of 512")
        if size <= disk.virtual_size:
            raise failure(call, 1, "qemu-img: Use the --shrink option to perform a shrink operation.")
        if image is not None and (hidden := _stand_in_size(image)) >= 0:
            assert hidden in (0, size)
            # Else the base's last bytes would read as zeros: data lost.
            assert not hidden or not disk.backing_file or _shows_last_cluster(image, disk)
        else:
            if image is not None:
                self._assert_is_base(disk, path, image["backing.file.filename"])
            assert preallocation in ("off", "metadata") or disk.backing_file is None or disk.extended_l2
        clusters, length = disk.clusters, os.path.getsize(path)
        os.truncate(path, size if disk.format == "raw" else length + size - disk.virtual_size)
        disk.virtual_size = size
        if disk.format == "qcow2":
            qcow2_file.patch(path, qcow2_file.SIZE_OFFSET, struct.pack(">Q", size))
        if preallocation != "off":
            disk.mapped += disk.clusters - clusters
        if preallocation in ("falloc", "full"):
            self._take(call, disk, disk.held + os.path.getsize(path) - length)
            if preallocation == "full":
                _write_out(path, length, disk.held)
        return ""

    def _shrink(self, path: str, size: int) -> str:
        disk = self._disks[_key(path)]
        assert size < disk.virtual_size
        disk.virtual_size = size
        disk.mapped = disk.clusters
        os.truncate(path, size + _METADATA)
        disk.held = min(disk.held, size + _METADATA)
        qcow2_file.patch(path, qcow2_file.SIZE_OFFSET, struct.pack(">Q", size))
        return ""

    def _rebase(self, call: Call) -> str:
        # -u: neither is opened, and nothing but the name is written.
        assert "-u" in call.argv
        path = call.argv[-1]
        disk, length = self._disks[_key(path)], os.path.getsize(path)
        disk.backing_file, disk.backing_format = call.after("-b"), call.after("-F")
        self._write_header(path, disk, filled=disk.mapped > 0)
        os.truncate(path, length)
        return ""

    def _assert_is_base(self, disk: Disk, path: str, base: str) -> None:
        """Check that what an image is opened over is what its header names."""
        named = os.path.join(os.path.dirname(os.path.realpath(path)), str(disk.backing_file))
        assert os.path.samefile(named, base)

    def _fallocate(self, call: Call) -> str:
        disk = self._disks[_key(call.argv[-1])]
        start, length = int(call.after("-o") or 0), int(call.after("-l") or 0)
        # -n: the file's length stays.
        assert "-n" in call.argv
        self._take(call, disk, start + length)
        return ""

    def _zeros(self, call: Call) -> str:
        fd = int(call.kwargs["preexec_fn"].__self__.stdin)
        self._take(call, self._disks[_key(fd)], os.fstat(fd).st_size)
        # For real: the disks are small, and the holes are its own to find.
        assert zeros._told(call.argv[call.argv.index("imgprealloc.zeros") + 1 :], fd) == 0
        return ""

    def _unshare(self, call: Call) -> str:
        self._disks[_key(call.argv[call.argv.index("-m") + 2])].shared = 0
        return ""

    @staticmethod
    def _write_header(path: str, disk: Disk, *, filled: bool) -> None:
        qcow2_file.write(
            path,
            disk.virtual_size,
            cluster_bits=disk.cluster_size.bit_length() - 1,
            backing_file=disk.backing_file,
            backing_format=disk.backing_format,
            encryption=2 if disk.encrypted else 0,
            snapshots=disk.snapshots,
            incompatible=(
                (qcow2_file.EXTENDED_L2 if disk.extended_l2 else 0)
                | (qcow2_file.CORRUPT if disk.corrupt else 0)
                | (qcow2_file.DATA_FILE if disk.data_file else 0)
            ),
            autoclear=qcow2_file.AUTOCLEAR_BITMAPS if disk.bitmaps else 0,
            bitmaps=disk.bitmaps,
            refcount_order=disk.refcount_bits.bit_length() - 1,
            l1_filled=0 if filled else None,
        )


def _key(path: str | int) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


# QEMU's side of its lock on an image (block/file-posix.c): byte 100 + n for "I use permission n".
READS, WRITES, RESIZES = 100, 101, 103
# Byte 200 + n for "nobody else may use permission n".
NO_WRITER, NO_RESIZER = 201, 203


def lock_byte(fd: int, byte: int, kind: int = fcntl.F_RDLCK) -> None:
    """Lock one byte, as QEMU does, until the file is closed."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))


def standing_lock(fd: int, byte: int) -> int:
    """Ask for the lock that would be in the way of locking a byte; F_UNLCK where there is none."""
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    return int(struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0])


@contextlib.contextmanager
def opened_by_qemu(path: str, *bytes_: int) -> Iterator[None]:
    """Hold the locks of a QEMU that has the image open for writing, as a running guest does."""
    with open(path, "rb") as file:
        for byte in bytes_ or (READS, WRITES, RESIZES):
            lock_byte(file.fileno(), byte)
        yield
