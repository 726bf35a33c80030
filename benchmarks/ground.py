# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks stand on: a large, quiet filesystem of their own, a base image, one way to ask and to tell."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any
import warnings

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tools"))

import loop_filesystem

FILESYSTEMS = loop_filesystem.COMMON

# Nova 34 does without eventlet but still imports it, and eventlet warns of itself.
warnings.filterwarnings("ignore", message="\\s*Eventlet is deprecated")


@contextlib.contextmanager
def mounted(kind: str, size: int) -> Iterator[str]:
    """Mount a sparse filesystem under TMPDIR that does nothing in the background and caches nothing twice.

    :param size: bytes, of which only what is written takes room on the host
    """
    with loop_filesystem.mounted(kind, size) as mount_point:
        device = _output("findmnt", "-n", "-o", "SOURCE", mount_point)
        if kind == "ext4":
            # It would fill its inode tables while we measure.
            _output("mount", "-o", "remount,noinit_itable", mount_point)
        with contextlib.suppress(subprocess.CalledProcessError):
            # Some filesystems under TMPDIR, such as tmpfs, cannot do it.
            _output("losetup", "--direct-io=on", device)
        yield mount_point


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark may be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filesystem", choices=loop_filesystem.COMMON, default="ext4", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print all that was measured as JSON instead of a table")
    return parser


def tell(facts: Mapping[str, Any], results: Mapping[str, Any], table: str, *, as_json: bool) -> None:
    """Print where something was measured, and what."""
    if as_json:
        print(json.dumps({**facts, **results}, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in facts.items()))
        print(table)


def await_space(mount_point: str, size: int) -> None:
    """Wait until what was removed is free again, which XFS does in the background.

    :raises: RuntimeError when it does not come
    """
    deadline = time.monotonic() + 60
    while True:
        space = os.statvfs(mount_point)
        if space.f_bavail * space.f_frsize >= size:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{mount_point} lacks space: it has {space.f_bavail * space.f_frsize} bytes")
        time.sleep(0.1)


def parser(description: str | None, short: str) -> argparse.ArgumentParser:
    """Return a parser of what each part of the suite may be told, and let SIGTERM unmount what is mounted.

    :param short: what the short form is
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--short", action="store_true", help=short)
    made.add_argument("--json", metavar="FILE", help="write all that was measured there")
    return made


def filesystems(made: argparse.ArgumentParser) -> None:
    """Let a part be told where to measure."""
    made.add_argument("--filesystem", action="append", choices=FILESYSTEMS, help="default: all")


def run_part(
    arguments: Sequence[str],
    description: str | None,
    short: str,
    measure: Callable[[str, bool], Sequence[Any]],
    table: Callable[[Sequence[Any]], str],
    name: str,
) -> int:
    """Measure a part of the suite on each filesystem that is asked for, print its table, and save what was found.

    :param short: what the short form is
    :param measure: given a filesystem's type, and whether the short form is wanted; returns dataclasses
    :param name: of the part, in what is saved
    """
    made = parser(description, short)
    filesystems(made)
    args = made.parse_args(arguments)
    found = [one for kind in args.filesystem or FILESYSTEMS for one in measure(kind, args.short)]
    print(table(found))
    if args.json:
        save(args.json, **{name: [dataclasses.asdict(one) for one in found]})
    return 0


def save(path: str, **results: Any) -> None:
    """Write all that was measured, and on what."""
    with open(path, "w") as file:
        json.dump({"facts": facts(), **results}, file, indent=1)
        file.write("\n")


def write_out(mount_point: str) -> None:
    """Write to all of a filesystem once, so that the file it lives in is not allocated while we measure."""
    path = os.path.join(mount_point, "all")
    zeros = ["dd", "if=/dev/zero", f"of={path}", "bs=4M", "oflag=direct", "status=none"]
    # It ends when the filesystem is full.
    subprocess.run(zeros, capture_output=True, check=False)
    os.unlink(path)
    settle(mount_point)


def written(mount_point: str) -> int:
    """Return the bytes that have been written to a filesystem's device since it is there."""
    device = os.path.basename(_output("findmnt", "-n", "-o", "SOURCE", mount_point))
    with open(f"/sys/block/{device}/stat") as file:
        return int(file.read().split()[6]) * 512


def base_image(path: str, size: int) -> str:
    """Write a raw image without holes, which repeats a MiB that does not compress."""
    block = random.Random(0).randbytes(1024**2)
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    return path


def settle(mount_point: str) -> None:
    """Write out what earlier runs have left behind, so that the next one does not wait for it."""
    _output("sync", "-f", mount_point)


def size(text: str) -> int:
    """Return the bytes that 64K, 2M, 10G or 4T are.

    :raises: ValueError
    """
    units = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def facts() -> dict[str, str]:
    """Say what was measured, and on what."""
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) // 1024**2
    return {
        **versions(),
        "fio": _output("fio", "--version").removeprefix("fio-"),
        "cpus": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory} GiB",
        # Of one minute; above 1 somebody else was at work.
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def versions() -> dict[str, str]:
    """Say what was measured."""
    import importlib.metadata

    return {
        "nova": importlib.metadata.version("nova"),
        "imgprealloc": importlib.metadata.version("imgprealloc"),
        "qemu": _output("qemu-img", "--version").split()[2],
        "kernel": os.uname().release,
    }


def _output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
