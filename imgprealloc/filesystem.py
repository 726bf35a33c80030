# SPDX-License-Identifier: Apache-2.0
"""What the filesystem under a path can promise. How a disk is laid out on it is not here."""

from __future__ import annotations

import array
import dataclasses
import errno
import fcntl
import os
import tempfile

from oslo_utils import units

from imgprealloc import fallocate
from imgprealloc import mounts
from imgprealloc import native_thread
from imgprealloc import sizes

# What statfs(2) tells types apart by.
_BTRFS = 0x9123683E
_EXT = 0xEF53
_TMPFS = 0x01021994
# Of those on whose type something depends.
_NAMES = {_BTRFS: "btrfs", 0xCA451A4E: "bcachefs", 0x2FC12FC1: "zfs", 0x58465342: "xfs"}

# Each overwrite goes to a new place, so that allocated space is no promise,
# unless the file has nocow, which qemu-img can set on btrfs only.
_COPY_ON_WRITE = frozenset({"btrfs", "bcachefs", "zfs"})
_WITHOUT_NOCOW = _COPY_ON_WRITE - {"btrfs"}

_REMOTE = frozenset({"9p", "afs", "ceph", "cifs", "fuse", "glusterfs", "lustre", "nfs", "nfs4", "ocfs2", "smb3"})

# On these no file shares its extents with another, and no overwrite goes to a
# new place. Not overlayfs, whose files may be on two filesystems.
_PLAIN = frozenset({_EXT, _TMPFS})

# What a filesystem may take for itself as disks take space: bytes at once, and one for so many.
_BOOKS = 64 * units.Ki
_BOOKED_PART = 1024

_FS_IOC_GETFLAGS = 0x80086601
_FS_COMPR_FL = 0x00000004
_FS_NOCOW_FL = 0x00800000


@dataclasses.dataclass(frozen=True)
class Filesystem:
    """A mounted filesystem.

    :param type: as in /proc/mounts; on overlayfs that of the one where it puts
        what is written
    :param fallocate: whether fallocate(2) works there and really holds space
    :param copy_on_write: whether an overwrite takes new space, unless nocow
        is set on the file
    :param cause: why it holds no space, where that is not its type alone
    :param overlay: whether it is reached through overlayfs
    """

    type: str
    fallocate: bool
    copy_on_write: bool
    cause: str = ""
    overlay: bool = False

    @property
    def name(self) -> str:
        """Its type, what it is reached through, and what it is that keeps it from holding space."""
        return f"{self.type}{' below overlayfs' if self.overlay else ''}{self.cause and f' ({self.cause})'}"

    @property
    def described(self) -> str:
        """Name it for an error's text."""
        kind, _, rest = self.name.partition(" ")
        return f"{kind} filesystem{rest and f' {rest}'}"


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
    return _of_directory(directory, can)


def under_read_only(directory: str) -> Filesystem:
    """Return what the filesystem is taken for under a directory in which nothing may be made to try it."""
    return _of_directory(directory, True)


def of_file(fd: int) -> Filesystem:
    """Return what the filesystem of an open file is taken for, where it may be another than its folder's."""
    return _of(fd, True)


def _of_directory(directory: str, can: bool) -> Filesystem:
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _of(fd, can)
    finally:
        os.close(fd)


def _of(fd: int, can: bool) -> Filesystem:
    kind, overlay = native_thread.run(_named, fd)
    copies = kind in _COPY_ON_WRITE
    if copies and (_attributes(fd) or 0) & _FS_COMPR_FL:
        cause = "the folder's files are compressed, chattr +c, which makes nocow void"
        return Filesystem(kind, False, True, cause, overlay)
    return Filesystem(kind, can and kind not in _WITHOUT_NOCOW, copies, overlay=overlay)


def _named(fd: int) -> tuple[str, bool]:
    """Tell the type of the filesystem that holds a file, and whether it is below overlayfs."""
    number = _number(fd)
    is_overlay = mounts.number(fd) == mounts.OVERLAYFS
    if number in _NAMES:
        return _NAMES[number], is_overlay
    with mounts.holding(fd) as holder:
        mount = mounts.of(holder)
    return "unknown" if mount is None else mount.type, is_overlay and number != mounts.OVERLAYFS


def _number(fd: int) -> int:
    """Return what tells the type of the filesystem that holds a file, also below overlayfs."""
    with mounts.holding(fd) as holder:
        number = mounts.number(holder)
    # Where that is hidden from us: overlayfs counts as the one below it does,
    # and btrfs counts no inodes.
    if number == mounts.OVERLAYFS and not os.statvfs(fd).f_files:
        return _BTRFS
    return number


def is_plain(fd: int) -> bool:
    """Whether an open file is on a filesystem for sure where a file's space is its own, and where it is stays.

    Elsewhere another file may share what this one has (cp --reflink), of which
    this one's inode tells nothing.
    """
    return native_thread.run(mounts.number, fd) in _PLAIN


def copies_on_write(fd: int, *, is_shared: bool) -> bool:
    """Whether each overwrite of this file takes new space.

    :param is_shared: whether it has extents in common with another file, as
        with a subvolume's snapshot, whatever its attributes say
    """
    if _NAMES.get(native_thread.run(_number, fd)) not in _COPY_ON_WRITE:
        return False
    attributes = _attributes(fd)
    return is_shared or attributes is None or not attributes & _FS_NOCOW_FL


def _attributes(fd: int) -> int | None:
    """Return what lsattr(1) shows; None where there is no such thing."""
    flags = array.array("l", [0])
    # Once more, because a folder is open for no more than its names.
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(again, _FS_IOC_GETFLAGS, flags)
    except OSError:
        return None
    finally:
        os.close(again)
    return flags[0]


def available(where: int | str) -> int:
    """Return the bytes that disks may still take from the filesystem of a folder, or of what is open.

    What is kept for root (ext4, 5 % by default) is not for disks, whoever we are:
    without it everybody else's writes fail.
    """
    space = native_thread.run(os.statvfs, where)
    return space.f_bavail * space.f_frsize


def size(where: int | str) -> int:
    """Return the bytes that the filesystem of a folder, or of what is open, has in all."""
    space = native_thread.run(os.statvfs, where)
    return space.f_blocks * space.f_frsize


def room(where: int | str, keep_free: int | str) -> int:
    """Return the bytes that disks may take where others are to keep some; less than 0 where they lack some already.

    A part is for the filesystem's own books: an extent that is added may cost it
    a block, and a file an inode.

    :param keep_free: what stays available(); see sizes.part()
    """
    if not keeps(keep_free):
        return available(where)
    rest = available(where) - sizes.part(keep_free, size(where)) - _BOOKS
    return rest - rest // _BOOKED_PART


def keeps(keep_free: int | str) -> bool:
    """Whether anything is to be kept free at all, of a filesystem with anything on it."""
    return bool(sizes.part(keep_free, units.Ei))


def available_to_us(where: int | str) -> int:
    """Return the bytes that this process's own fallocate could have there: to root also what is kept for it."""
    space = native_thread.run(os.statvfs, where)
    blocks = space.f_bfree if os.geteuid() == 0 else space.f_bavail
    return blocks * space.f_frsize


def is_remote(fd: int) -> bool:
    """Whether other hosts may have an open file open, too, of which this one's kernel knows nothing."""
    return type_of(fd).partition(".")[0] in _REMOTE


def type_of(fd: int) -> str:
    """Return the type of the filesystem that holds an open file, as in /proc/mounts."""
    return native_thread.run(_named, fd)[0]
