# SPDX-License-Identifier: Apache-2.0
"""What the filesystem under a path can promise. How a disk is laid out on it is not here."""

from __future__ import annotations

import array
import ctypes
import dataclasses
import errno
import fcntl
import os
import tempfile

from oslo_utils import units
import psutil

from imgprealloc import fallocate
from imgprealloc import native_thread

# Each overwrite goes to a new place, so that allocated space is no promise,
# unless the file has nocow, which qemu-img can set on btrfs only.
_COPY_ON_WRITE = frozenset({"btrfs", "bcachefs", "zfs"})
_WITHOUT_NOCOW = _COPY_ON_WRITE - {"btrfs"}

_REMOTE = frozenset({"9p", "afs", "ceph", "cifs", "fuse", "glusterfs", "lustre", "nfs", "nfs4", "ocfs2", "smb3"})

# statfs(2)'s numbers of filesystems on which no file shares its extents with
# another, and no overwrite goes to a new place: ext2 to ext4, tmpfs.
_PLAIN = frozenset({0xEF53, 0x01021994})
_LIBC = ctypes.CDLL(None, use_errno=True)
# Longer than the structure, of which only the first word counts.
_STATFS_LENGTH = 512

_FS_IOC_GETFLAGS = 0x80086601
_FS_COMPR_FL = 0x00000004
_FS_NOCOW_FL = 0x00800000


@dataclasses.dataclass(frozen=True)
class Filesystem:
    """A mounted filesystem.

    :param type: as in /proc/mounts
    :param fallocate: whether fallocate(2) works there and really holds space
    :param copy_on_write: whether an overwrite takes new space, unless nocow
        is set on the file
    :param cause: why it holds no space, where that is not its type alone
    """

    type: str
    fallocate: bool
    copy_on_write: bool
    cause: str = ""

    @property
    def described(self) -> str:
        """Name it for an error's text, and say what it is that keeps it from holding space."""
        return f"{self.type} filesystem{self.cause and f' ({self.cause})'}"


def under(directory: str) -> Filesystem:
    """Look at the filesystem under a directory, with a nameless file of 1 MiB made for it.

    One that is too full for that is taken to have fallocate; what is really
    asked of it will tell.
    """
    try:
        with tempfile.TemporaryFile(dir=directory, prefix=".imgprealloc-probe-") as probe:
            can = native_thread.run(fallocate.supported, probe.fileno(), units.Mi)
    except OSError as exc:
        # A full XFS has no room for another inode.
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        can = True
    return _of_type(mounted_type(directory), directory, can)


def under_read_only(directory: str) -> Filesystem:
    """Return what the filesystem is taken for under a directory in which nothing may be made to try it."""
    return _of_type(mounted_type(directory), directory, True)


def _of_type(kind: str, directory: str, can: bool) -> Filesystem:
    copies = kind in _COPY_ON_WRITE
    if copies and (_attributes(directory) or 0) & _FS_COMPR_FL:
        return Filesystem(kind, False, True, "the folder's files are compressed, chattr +c, which makes nocow void")
    return Filesystem(kind, can and kind not in _WITHOUT_NOCOW, copies)


def is_plain(fd: int) -> bool:
    """Whether an open file is on a filesystem for sure where a file's space is its own, and where it is stays.

    Elsewhere another file may share what this one has (cp --reflink), of which
    this one's inode tells nothing.
    """
    return native_thread.run(_number, fd) in _PLAIN


def _number(fd: int) -> int:
    answer = ctypes.create_string_buffer(_STATFS_LENGTH)
    if _LIBC.fstatfs(fd, answer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return ctypes.c_long.from_buffer(answer).value


def copies_on_write(name: str, *, is_shared: bool) -> bool:
    """Whether each overwrite of this file takes new space.

    :param is_shared: whether it has extents in common with another file, as
        with a subvolume's snapshot, whatever its attributes say
    """
    if mounted_type(name) not in _COPY_ON_WRITE:
        return False
    attributes = _attributes(name)
    return is_shared or attributes is None or not attributes & _FS_NOCOW_FL


def _attributes(name: str) -> int | None:
    """Return what lsattr(1) shows; None where there is no such thing."""
    flags = array.array("l", [0])
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
    except OSError:
        return None
    finally:
        os.close(fd)
    return flags[0]


def available(directory: str) -> int:
    """Return the bytes that this process may still take from the filesystem."""
    space = native_thread.run(os.statvfs, directory)
    blocks = space.f_bfree if os.geteuid() == 0 else space.f_bavail
    return blocks * space.f_frsize


def is_remote(path: str) -> bool:
    """Whether other hosts may have the file at path open, of which this one's kernel knows nothing."""
    return mounted_type(path).partition(".")[0] in _REMOTE


def mounted_type(path: str) -> str:
    """Return the type of the filesystem that holds path, by its mount point."""
    return native_thread.run(_mounted_type, path)


def _mounted_type(path: str) -> str:
    mounts: dict[str, str] = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    directory = os.path.realpath(path)
    while directory not in mounts and directory != "/":
        directory = os.path.dirname(directory)
    return mounts.get(directory, "unknown")
