# SPDX-License-Identifier: Apache-2.0
"""One instance disk, made twice by real Nova's image backend: as stock Nova does, and with imgprealloc.

Each is made on a small filesystem of its own. Then all that is left there is
filled, and the whole disk is written as a guest may write it: 4 KiB at a time,
in random order, past the host's page cache. tools/demo prepares all that this needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import errno
import importlib.metadata
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import TypeVar
import warnings

import loop_filesystem
import psutil

from imgprealloc import Layout
from imgprealloc import PreallocationError
from imgprealloc import Preallocator
from imgprealloc.cli import new_file
from imgprealloc.cli import picture

_MIB = 1024**2
_BASE_SIZE = 64 * _MIB
_DISK_SIZE = 512 * _MIB
_FILESYSTEM_SIZE = 1024 * _MIB
# One filesystem at a time, the base image, and what the guest will have written.
_SPACE_NEEDED = _FILESYSTEM_SIZE + _BASE_SIZE + _DISK_SIZE
_WRITE = 4096
_WRITES = _DISK_SIZE // _WRITE

_T = TypeVar("_T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(Exception):
    """The demo could not be run here; nothing is said about the disks."""


@dataclasses.dataclass(frozen=True)
class Guest:
    """What the guest writes, each 4 KiB a byte of its own, and what the disk has to hold afterwards."""

    script: str
    content: str

    @classmethod
    def prepare(cls, directory: str) -> Guest:
        """Write the script for qemu-io, and the disk as it has to read afterwards."""
        numbers = random.Random(1510328)
        pattern = [numbers.randrange(1, 256) for _ in range(_WRITES)]
        guest = cls(os.path.join(directory, "script"), os.path.join(directory, "content"))
        with open(guest.content, "wb") as content:
            for byte in pattern:
                content.write(bytes([byte]) * _WRITE)
        with open(guest.script, "w", encoding="ascii") as script:
            for block in numbers.sample(range(_WRITES), _WRITES):
                script.write(f"write -q -P {pattern[block]} {block * _WRITE} {_WRITE}\n")
        return guest

    def write(self, path: str) -> int:
        """Write to the disk as this guest, and return how many writes got ENOSPC."""
        with open(self.script, "rb") as script:
            # Not past the first error alone: a guest goes on after it is resumed.
            done = subprocess.run(
                ["qemu-io", "-f", "qcow2", "-t", "none", path],
                stdin=script, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        failed = done.stdout.count("write failed: ")
        no_space = done.stdout.count(f"write failed: {os.strerror(errno.ENOSPC)}")
        # It also ends with 1 where no more than a write has failed.
        if failed != no_space or (done.returncode and not failed):
            raise DemoError(f"qemu-io failed with status {done.returncode}: {(done.stderr or done.stdout)[-300:]}")
        return no_space


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one disk."""

    name: str
    reads_like_base: bool
    shortfall: int
    clusters: int
    mapped_clusters: int
    failed_writes: int
    fragmented_clusters: int
    reads_as_written: bool
    layout: Layout


def observe(name: str, preallocated: bool, kind: str, base: str, guest: Guest) -> Outcome:
    """Make one disk on a new filesystem, fill that, let the guest write, and look."""
    # Only now: Nova is slow to import, and prints a warning when it is.
    import nova_disks

    reader = Preallocator()
    print(f"\n{name}:")
    with whole(loop_filesystem.mounted(kind, _FILESYSTEM_SIZE)) as mount_point:
        try:
            instances_path = os.path.join(mount_point, "instances")
            os.mkdir(instances_path)
            _say(f"Nova makes a disk of {_DISK_SIZE // _MIB} MiB over an image of {_BASE_SIZE // _MIB} MiB")
            path = nova_disks.Disks(instances_path, preallocated=preallocated).spawn(base, _DISK_SIZE).path
            before = reader.inspect(path)
            reads_like_base = _same(path, base)
            _say(f"other files fill the rest of the {kind}")
            loop_filesystem.fill(mount_point)
            _say(f"the guest writes the whole disk, {_WRITES:,} times {_WRITE} bytes in random order")
            failed_writes = guest.write(path)
            after = reader.inspect(path)
            return Outcome(
                name,
                reads_like_base,
                before.shortfall,
                before.clusters or 0,
                before.mapped_clusters or 0,
                failed_writes,
                after.fragmented_clusters or 0,
                _same(path, guest.content),
                reader.layout(path),
            )
        finally:
            _end_children()


def _same(path: str, raw: str) -> bool:
    """Whether a qcow2 disk reads like a raw one, and like zeros after its end."""
    compare = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", path, raw]
    done = subprocess.run(compare, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise DemoError(f"qemu-img compare failed with status {done.returncode}: {done.stderr.strip()}")
    return done.returncode == 0


def table(outcomes: list[Outcome]) -> str:
    """Lay out what was found, a disk a column."""
    rows: list[tuple[str, Callable[[Outcome], str]]] = [
        ("", lambda disk: disk.name),
        ("Before the guest's first write", lambda disk: ""),
        ("  reads like the image", lambda disk: _yes(disk.reads_like_base)),
        ("  bytes short", lambda disk: f"{disk.shortfall:,}"),
        ("  clusters mapped", lambda disk: _share(disk.mapped_clusters, disk.clusters)),
        ("After random writes, filesystem full", lambda disk: ""),
        ("  clusters fragmented", lambda disk: _share(disk.fragmented_clusters, disk.clusters)),
        ("  writes failed", lambda disk: f"{disk.failed_writes:,} of {_WRITES:,}"),
        ("  what the guest saw", lambda disk: "ENOSPC" if disk.failed_writes else "no error"),
        ("  reads back as written", lambda disk: _yes(disk.reads_as_written)),
    ]
    cells = [[title, *(cell(disk) for disk in outcomes)] for title, cell in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(outcomes)), *lines[1:]])


def draw(outcomes: list[Outcome]) -> str:
    """Draw where the bytes of the disks are in their files, a disk a panel."""
    return picture.svg(
        [
            picture.Panel(
                f"{disk.name}, after the guest's writes",
                f"{_share(disk.fragmented_clusters, disk.clusters)} clusters fragmented",
                disk.layout,
            )
            for disk in outcomes
        ]
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole:.2f} %)"


def _yes(fact: bool) -> str:
    return "yes" if fact else "NO"


def verdict(stock: Outcome, ours: Outcome) -> list[str]:
    """Return what was expected and did not come about; nothing is good."""
    expected = {
        "the stock disk got no ENOSPC, so that this run proves nothing": stock.failed_writes > 0,
        "imgprealloc's disk does not read like its image": ours.reads_like_base,
        "imgprealloc's disk is short of space": ours.shortfall == 0,
        "imgprealloc's disk has clusters that are not mapped": ours.mapped_clusters == ours.clusters,
        "imgprealloc's disk got ENOSPC": ours.failed_writes == 0,
        "imgprealloc's disk does not read back as written": ours.reads_as_written,
    }
    return [failure for failure, came_about in expected.items() if not came_about]


def demonstrate(kind: str, directory: str, picture_path: str) -> int:
    """Run the demo below a directory; return the exit status."""
    nova = f"stock Nova {importlib.metadata.version('nova')}"
    print(f"{nova} and imgprealloc {importlib.metadata.version('imgprealloc')} side by side, by {_qemu_version()},")
    print(f"each on {kind} of {_FILESYSTEM_SIZE // _MIB} MiB in {directory}, with preallocate_images = space")
    with whole(tempfile.TemporaryDirectory(prefix="imgprealloc-demo-")) as files:
        base = os.path.join(files, "image.raw")
        with open(base, "wb") as file:
            file.write(random.Random(0).randbytes(_BASE_SIZE))
        guest = Guest.prepare(files)
        stock = observe(nova, False, kind, base, guest)
        ours = observe("imgprealloc", True, kind, base, guest)
    print(f"\n{table([stock, ours])}\n")
    new_file.write_whole(picture_path, draw([stock, ours]), picture.BEGINS)
    print(f"Where the bytes of both are in their files: {picture_path}, for a browser.")
    failures = verdict(stock, ours)
    for failure in failures:
        print(f"FAILED: {failure}.")
    if not failures:
        print("Both were preallocated, says Nova. Only one of them was.")
    return 1 if failures else 0


def _qemu_version() -> str:
    done = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True)
    return "QEMU " + done.stdout.split()[2]


def _say(what: str) -> None:
    print(f"  {what}")


def _require_room(directory: str) -> None:
    if os.geteuid():
        raise DemoError("mounting a filesystem needs root; run tools/demo, which asks sudo for it")
    free = shutil.disk_usage(directory).free
    if free < _SPACE_NEEDED:
        needed = f"{_SPACE_NEEDED // _MIB} MiB are needed and {free // _MIB} are free"
        raise DemoError(f"{needed} in {directory}; name another folder with --directory")


def _end_children() -> None:
    """End what is still running of ours, so that the filesystem can be unmounted."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        child.terminate()
    for child in psutil.wait_procs(children, timeout=5)[1]:
        child.kill()


@contextlib.contextmanager
def whole(context: contextlib.AbstractContextManager[_T]) -> Iterator[_T]:
    """Enter and leave a context undisturbed: a signal that comes meanwhile takes effect afterwards."""
    with contextlib.ExitStack() as stack:
        with _signals_held_back():
            entered = stack.enter_context(context)
        try:
            yield entered
        finally:
            with _signals_held_back():
                stack.close()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    # The programs that are started meanwhile, such as umount, inherit this.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _stop(number: int, _: object) -> None:
    # The cleanup, and the programs that it runs, shall not be stopped by a second Ctrl-C.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    print("\nstopped; cleaning up", file=sys.stderr)
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/demo",
        description="Make the same instance disk with stock Nova and with imgprealloc, fill the filesystem, "
        "write the whole disk in random order, and compare.",
        epilog="Ends with 0 if the stock disk ran out of space and imgprealloc's did not, 1 if not, "
        "2 if the demo cannot run here. NOVA_VERSION and PYTHON choose the Nova and the Python to use.",
    )
    parser.add_argument("--filesystem", choices=loop_filesystem.COMMON, default="ext4", help="default: %(default)s")
    # Not /tmp, which is memory on many systems.
    parser.add_argument("--directory", default="/var/tmp", help="for its files while it runs; default: %(default)s")
    parser.add_argument(
        "--picture",
        metavar="FILE",
        help="where both disks are drawn, as SVG; default: imgprealloc-demo.svg in that folder",
    )
    args = parser.parse_args()
    tempfile.tempdir = os.path.abspath(args.directory)
    # Nova 34 does without eventlet but still imports it, and eventlet warns of itself.
    warnings.simplefilter("ignore")
    for number in _SIGNALS:
        signal.signal(number, _stop)
    try:
        _require_room(args.directory)
        picture_path = args.picture or os.path.join(args.directory, "imgprealloc-demo.svg")
        return demonstrate(args.filesystem, args.directory, picture_path)
    except PreallocationError as exc:
        print(f"FAILED: {exc}")
        return 1
    except (DemoError, new_file.InTheWay, OSError, RuntimeError) as exc:
        print(f"tools/demo: {exc}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
