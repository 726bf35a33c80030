# SPDX-License-Identifier: Apache-2.0
"""Whether the storage below a filesystem holds what is set aside on it: what sysfs tells of its devices.

Some storage takes space only as something is written: a loop device on a file
with holes, a thin pool. There a filesystem answers fallocate(2) with success,
and a guest's write can still fail; zeros that are written are held.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import glob
import os
import stat

from imgprealloc import mounts
from imgprealloc import native_thread
from imgprealloc import sizes
from imgprealloc import zeros

_SYSFS = "/sys"

# How the UUIDs end by which LVM and Stratis know their devices, in dm/uuid.
_THIN_POOLS = ("-tpool", "-thin-pool")


def thin_below(fd: int) -> str:
    """Say what it is below an open file, or folder, that takes space only as it is written.

    :returns: nothing where there is none, or none that this process can see
    """
    return native_thread.run(_thin_below, fd, frozenset())


def thin_below_folder(path: str | os.PathLike[str]) -> str:
    """Do the same for a folder that is not open.

    :raises: OSError
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return thin_below(fd)
    finally:
        os.close(fd)


def _thin_below(fd: int, seen: frozenset[str]) -> str:
    # What is not there, or not to be seen, is no finding.
    with contextlib.suppress(OSError), mounts.holding(fd) as holder:
        return next(filter(None, (_thin(device, seen) for device in _devices(holder))), "")
    return ""


def _devices(fd: int) -> list[str]:
    """List the block devices of the filesystem that a file is on, as MAJOR:MINOR."""
    device = os.fstat(fd).st_dev
    if os.major(device):
        return [_numbers(device)]
    # btrfs, which may have several, has a device of its own making in stat(2).
    mount = mounts.of(fd)
    if mount is None:
        return []
    status = os.stat(mount.source)
    if not stat.S_ISBLK(status.st_mode):
        return []
    first = _numbers(status.st_rdev)
    for members in glob.iglob(f"{_SYSFS}/fs/btrfs/*/devices"):
        devices = [_read(members, name, "dev") for name in os.listdir(members)]
        if first in devices:
            return devices
    return [first]


def _numbers(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _thin(device: str, seen: frozenset[str]) -> str:
    """Look at a block device and at all that it stands on.

    :param seen: the loop devices above it
    """
    folder = os.path.realpath(f"{_SYSFS}/dev/block/{device}")
    if _read(folder, "partition"):
        folder = os.path.dirname(folder)
    for part in _standing_on(folder):
        if _read(part, "dm", "uuid").endswith(_THIN_POOLS):
            return f"{_read(part, 'dm', 'name')} is a thin pool"
        found = _thin_loop(part, seen)
        if found:
            return found
    return ""


def _standing_on(folder: str) -> Iterator[str]:
    """List a device's folder in sysfs, and those of all below it: LVM, RAID, multipath, encryption."""
    yield folder
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(os.path.join(folder, "slaves")):
            below = os.path.realpath(os.path.join(folder, "slaves", name))
            yield from _standing_on(os.path.dirname(below) if _read(below, "partition") else below)


def _thin_loop(folder: str, seen: frozenset[str]) -> str:
    """Look at a loop device's file, if it is one."""
    name = os.path.basename(folder)
    path = _read(folder, "loop", "backing_file")
    if not path or name in seen:
        return ""
    status = os.stat(path)
    if not _is_as_large(folder, status.st_size):
        # By this path there is another file here than where the device was set up.
        return ""
    held = status.st_blocks * 512
    if held < status.st_size:
        return f"{name} is the file {path}, which has {sizes.exact(held)} of its {sizes.exact(status.st_size)}"
    # What is set aside in it may not be held by the storage below that.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return _thin_below(fd, seen | {name}) if zeros.has_unwritten(fd) else ""
    finally:
        os.close(fd)


def _is_as_large(folder: str, size: int) -> bool:
    begin, limit = (int(_read(folder, "loop", name) or 0) for name in ("offset", "sizelimit"))
    length = min(size - begin, limit or size)
    return int(_read(folder, "size") or 0) == length // 512


def _read(*path: str) -> str:
    """Read one of sysfs's files; empty where it is not there."""
    try:
        with open(os.path.join(*path), encoding="utf-8", errors="surrogateescape") as file:
            return file.read().removesuffix("\n")
    except OSError:
        return ""
