# SPDX-License-Identifier: Apache-2.0
"""Small real filesystems on loop devices, for the tests, the demo and the benchmarks.

Needs root, or in the environment's IMGPREALLOC_AS_ROOT what has a command run by
root (sudo).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import os
import shlex
import subprocess
import tempfile

# What goes before a command that root has to run.
AS_ROOT = tuple(shlex.split(os.environ.get("IMGPREALLOC_AS_ROOT", "")))

_MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "ext2": ["mkfs.ext2", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}

# What makes them, as programs that have to be there.
TOOLS = tuple(command[0] for command in _MKFS.values())

# What compute hosts have under their instances.
COMMON = ("ext4", "xfs")


@contextlib.contextmanager
def mounted(
    kind: str,
    size: int,
    *,
    sector_size: int = 512,
    reserved: int = 0,
    features: Sequence[str] = (),
    options: str = "",
) -> Iterator[str]:
    """Make a filesystem, mount it, and unmount and remove it afterwards.

    :param kind: "ext4", "ext2", "xfs", "btrfs" or "tmpfs"
    :param size: bytes; XFS wants 300 MiB, btrfs 110 MiB at the least
    :param sector_size: bytes, of the device that it is on
    :param reserved: percent that ext4 keeps for root; mkfs's own choice is 5
    :param features: what mkfs is told beside
    :param options: what mount(8) is told beside, with commas between
    :returns: the mount point
    :raises: RuntimeError, with what was said, where that cannot be had
    """
    with (
        tempfile.TemporaryDirectory(prefix=f"imgprealloc-{kind}-") as directory,
        contextlib.ExitStack() as stack,
    ):
        mount_point = os.path.join(directory, "mnt")
        os.mkdir(mount_point)
        if kind == "tmpfs":
            what = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        else:
            image = os.path.join(directory, "image")
            with open(image, "wb") as file:
                file.truncate(size)
            device = image if sector_size == 512 else stack.enter_context(_attached(image, sector_size))
            kept = ["-m", str(reserved)] if kind in ("ext4", "ext2") else []
            _run([*_MKFS[kind], *kept, *features, device])
            # -t, because ext4's driver would mount ext2 otherwise.
            told = ["rw", *(["loop"] if device == image else []), *filter(None, [options])]
            what = ["-t", kind, "-o", ",".join(told), device]
        with _mounted(what, mount_point):
            yield mount_point


@contextlib.contextmanager
def _attached(image: str, sector_size: int) -> Iterator[str]:
    device = _run([*AS_ROOT, "losetup", "--find", "--show", "--sector-size", str(sector_size), image]).strip()
    try:
        yield device
    finally:
        _run([*AS_ROOT, "losetup", "--detach", device])


@contextlib.contextmanager
def overlaid(folder: str) -> Iterator[str]:
    """Mount an overlayfs that puts what is written into a folder, and unmount it afterwards.

    :returns: the mount point, which is in the folder, too
    """
    parts = {name: os.path.join(folder, name) for name in ("lowerdir", "upperdir", "workdir")}
    mount_point = os.path.join(folder, "merged")
    for path in (*parts.values(), mount_point):
        os.mkdir(path)
    options = ",".join(f"{name}={path}" for name, path in parts.items())
    with _mounted(["-t", "overlay", "-o", options, "overlay"], mount_point):
        yield mount_point


@contextlib.contextmanager
def bound(source: str, target: str) -> Iterator[None]:
    """Let a folder or a file be found at another place, too (mount --bind)."""
    with _mounted(["--bind", source], target):
        yield


@contextlib.contextmanager
def _mounted(what: list[str], mount_point: str) -> Iterator[None]:
    _run([*AS_ROOT, "mount", *what, mount_point])
    try:
        if AS_ROOT:
            _run([*AS_ROOT, "chown", f"{os.geteuid()}:{os.getegid()}", mount_point])
        yield
    finally:
        refused = subprocess.run([*AS_ROOT, "umount", mount_point], check=False).returncode
        if refused and os.path.ismount(mount_point):
            # Something still has a file open there; it goes when that ends.
            _run([*AS_ROOT, "umount", "-l", mount_point])


def fill(mount_point: str, *, leave: int = 0) -> None:
    """Take all free space of a filesystem, down to its last block.

    :param leave: bytes to leave free
    """
    path = os.path.join(mount_point, "filler")
    with open(path, "ab", buffering=0) as file:
        for step in (1 << 26, 1 << 20, 1 << 16, 1 << 12, 512):
            block = os.urandom(step)
            with contextlib.suppress(OSError):
                while _free(mount_point) - step >= leave or not leave:
                    file.write(block)
        os.fsync(file.fileno())


def _free(mount_point: str) -> int:
    space = os.statvfs(mount_point)
    # Less than f_bfree on ext4, which keeps some blocks for its own needs.
    return space.f_bavail * space.f_frsize


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
