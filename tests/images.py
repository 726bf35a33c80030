# SPDX-License-Identifier: Apache-2.0
"""Images made, and looked at, with qemu's own programs: what our library says of them is not asked here."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time
from typing import Any, BinaryIO, Union

StrPath = Union[str, "os.PathLike[str]"]


def run(*argv: StrPath | int, cwd: StrPath | None = None) -> str:
    """Run a program and return what it printed; its failure is the test's."""
    done = subprocess.run(
        [os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in argv],
        capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(f"{argv} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def random_file(path: StrPath, size: int) -> pathlib.Path:
    """Make a raw image of random bytes, in which nothing reads as zeros."""
    with open(path, "wb") as file:
        for start in range(0, size, 1 << 24):
            file.write(os.urandom(min(1 << 24, size - start)))
    return pathlib.Path(path)


def sparse_file(path: StrPath, size: int) -> pathlib.Path:
    """Make a raw image that is one hole."""
    with open(path, "wb") as file:
        file.truncate(size)
    return pathlib.Path(path)


def qcow2(
    path: StrPath,
    size: int,
    *,
    backing: StrPath | None = None,
    backing_format: str = "raw",
    **options: StrPath | int,
) -> pathlib.Path:
    """Make a thin qcow2 image, as Nova does."""
    backed = [] if backing is None else ["-b", backing, "-F", backing_format]
    chosen = ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *backed, *chosen, path, size)
    return pathlib.Path(path)


@functools.cache
def knows_zstd() -> bool:
    """Whether this QEMU was built with zstd, which Debian's 5.2 was not."""
    with tempfile.TemporaryDirectory(prefix="imgprealloc-zstd-") as scratch:
        disk = os.path.join(scratch, "disk")
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", disk, "1M"]
        done = subprocess.run(create, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "'zstd'" in done.stderr, done.stderr
    return done.returncode == 0


def forget_backing_format(path: StrPath) -> None:
    """Take the backing file's format out of a qcow2 header, which today's qemu-img refuses to leave out."""
    replace_in_header(path, b"\xe2\x79\x2a\xca", b"\x13\x37\x13\x37")


def replace_in_header(path: StrPath, old: bytes, new: bytes) -> None:
    """Put other bytes in the place of those that are found first in a file's first 4 KiB."""
    assert len(old) == len(new)
    with open(path, "r+b") as file:
        offset = file.read(4096).index(old)
        file.seek(offset)
        file.write(new)


def qcow2_of(path: StrPath, source: StrPath, *options: str) -> pathlib.Path:
    """Make a qcow2 image with the content of a raw one."""
    run("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", *options, source, path)
    return pathlib.Path(path)


def qemu_io(path: StrPath, *commands: str, format: str = "qcow2") -> str:
    """Run qemu-io commands on an image, in one process."""
    said = run("qemu-io", "-f", format, *(word for command in commands for word in ("-c", command)), path)
    assert "failed" not in said, said
    return said


def info(path: StrPath, format: str = "qcow2") -> dict[str, Any]:
    """Return what qemu-img info says."""
    return dict(json.loads(run("qemu-img", "info", "-U", "--output=json", "-f", format, path)))


def check(path: StrPath) -> dict[str, Any]:
    """Return what qemu-img check says of a qcow2 image without errors and leaks; its status says that."""
    return dict(json.loads(run("qemu-img", "check", "-U", "--output=json", "-f", "qcow2", path)))


def extents(path: StrPath) -> list[dict[str, Any]]:
    """Return what qemu-img map says, from the first byte to the last."""
    return list(json.loads(run("qemu-img", "map", "-U", "--output=json", "-f", "qcow2", path)))


def allocated_from(path: StrPath) -> int:
    """Return from where on the image itself has all data, so that no backing file is asked and no L2 entry changes."""
    start: int = info(path)["virtual-size"]
    for extent in reversed(extents(path)):
        if extent["depth"] or not extent["data"]:
            break
        start = extent["start"]
    return start


def allocated_in_map(path: StrPath) -> int:
    """Return how many bytes an image itself has data for, which is what a mirror of its top copies."""
    return sum(extent["length"] for extent in extents(path) if not extent["depth"] and extent["data"])


def held(path: StrPath) -> int:
    """Return how many bytes the filesystem has set aside for a file's data."""
    return sum(512 * int(line.split(":")[3]) for line in _filefrag(path))


def holes(path: StrPath) -> int:
    """Return how many bytes of a file the filesystem has not set aside, up to the file's end."""
    end, missing, position = os.stat(path).st_size, 0, 0
    for line in _filefrag(path):
        first, last = (512 * int(number) for number in line.split(":")[1].split(".."))
        missing += max(0, min(first, end) - position)
        position = max(position, last + 512)
    return missing + max(0, end - position)


def unwritten(path: StrPath) -> int:
    """Return how many bytes of a file the filesystem has set aside, but would have to mark as written."""
    return sum(512 * int(line.split(":")[3]) for line in _filefrag(path) if "unwritten" in line)


def shared(path: StrPath) -> int:
    """Return how many bytes of a file belong to another file too."""
    return sum(512 * int(line.split(":")[3]) for line in _filefrag(path) if "shared" in line)


def _filefrag(path: StrPath) -> list[str]:
    # A header of three lines, a line an extent, a summary; -s: after its dirty pages are written.
    return run("filefrag", "-s", "-v", "-b512", path).splitlines()[3:-1]


def differences(path: StrPath, other: StrPath, *, format: str = "qcow2", other_format: str = "qcow2") -> str:
    """Say how the guest would find one image to differ from another; nothing where it would not.

    By comparing and, because that believes the map about what is zero, by
    reading every byte of both.
    """
    if said := _compare(path, other, format, other_format):
        return said
    if digest(path, format) != digest(other, other_format):
        return "qemu-img compare finds them alike, but other bytes are read"
    return ""


def reads_like(path: StrPath, format: str, other: StrPath, other_format: str = "raw") -> bool:
    """Whether qemu-img finds that a guest reads the same from two images; for those too large to read every byte of."""
    return not _compare(path, other, format, other_format)


def _compare(path: StrPath, other: StrPath, format: str, other_format: str) -> str:
    done = subprocess.run(
        ["qemu-img", "compare", "-f", format, "-F", other_format, path, other],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"{done.stdout}{done.stderr}qemu-img compare ended with {done.returncode}" if done.returncode else ""


def digest(path: StrPath, format: str = "qcow2") -> str:
    """Hash all that a guest would read, zeros read too and not inferred."""
    with tempfile.TemporaryDirectory(prefix="imgprealloc-digest-") as scratch:
        target = os.path.join(scratch, "raw")
        run("qemu-img", "dd", "-f", format, "-O", "raw", "bs=1M", f"if={path}", f"of={target}")
        with open(target, "rb") as file:
            return _sha256(file)


def file_digest(path: StrPath) -> str:
    """Hash the bytes of the file itself."""
    with open(path, "rb") as file:
        return _sha256(file)


def _sha256(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 22):
        found.update(block)
    return found.hexdigest()


def identity(path: StrPath) -> tuple[int, ...]:
    """Return what changes in a file's inode when it is replaced, or written, or given space."""
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_blocks


def allocated(path: StrPath) -> int:
    """Return the bytes that the filesystem says the file takes."""
    return os.stat(path).st_blocks * 512


def free(directory: StrPath) -> int:
    """Return the bytes that are free on a filesystem, once it has put everything in its place."""
    run("sync", "-f", directory)
    space = os.statvfs(directory)
    return space.f_bfree * space.f_frsize


@contextlib.contextmanager
def guest(path: StrPath, *, format: str = "qcow2") -> Iterator[str]:
    """Keep a disk open for writing, as a guest's QEMU does; give the address to write to it by."""
    with tempfile.TemporaryDirectory(prefix="imgprealloc-guest-") as scratch:
        socket = os.path.join(scratch, "nbd")
        pid_file = os.path.join(scratch, "pid")
        command = [
            "qemu-nbd", "--fork", "--persistent", f"--pid-file={pid_file}", f"--socket={socket}",
            f"--format={format}", "--cache=none", "--aio=native", os.fspath(path),
        ]  # fmt: skip
        # Not to a pipe, which QEMU 5.2's keeps open, so that it would not come to its end.
        with open(os.path.join(scratch, "said"), "w+b") as said:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=said, check=False)
            said.seek(0)
            assert done.returncode == 0, f"{command} ended with {done.returncode}: {os.fsdecode(said.read())}"
        pid = int(pathlib.Path(pid_file).read_text())
        try:
            yield f"nbd+unix:///?socket={socket}"
        finally:
            end(pid, signal.SIGTERM)


def end(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that we started, and wait until it is gone."""
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}") and "\nState:\tZ" not in _status(pid):
        assert time.monotonic() < deadline, f"process {pid} does not end"
        # Again and again: qemu-nbd forgets a signal that comes just before its main loop.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        time.sleep(0.02)


def _status(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "\nState:\tZ"
