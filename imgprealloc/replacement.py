# SPDX-License-Identifier: Apache-2.0
"""New files beside a disk: the next disk, renamed over it once it is whole, and scratch.

A crash leaves the disk as it was and a file beside it whose name and mark tell
whose it is; the next run removes that. A file that has the name without the
mark is somebody's, and is never touched. What goes into the new file is the
caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import os
import stat
import struct
import tempfile

from imgprealloc import command
from imgprealloc import exceptions
from imgprealloc import lock
from imgprealloc import log
from imgprealloc import mounts
from imgprealloc import native_thread
from imgprealloc.disk_file import DiskFile
from imgprealloc.disk_file import Place
from imgprealloc.image import FileStamp

# O_NOFOLLOW is implied by O_EXCL.
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

# Hidden, so that nobody's pattern for disks finds it.
_SUFFIX = ".imgprealloc"
_ZEROS_SUFFIX = ".imgprealloc-zeros"

# The mark of our own, which means nothing on a file, and which nobody sets there.
_MARK = stat.S_ISVTX

# Seconds for somebody's look at the disk, at the end of what may have taken an hour.
_PATIENCE = 30

_ACL = "system.posix_acl_access"
_COMPRESSION = "btrfs.compression"
_NO_ATTRIBUTES = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

# linux/fs.h
_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
# struct fsxattr: flags, hint of an extent's size, extents, project, another hint
_FSXATTR = struct.Struct("=IIIII8x")
# FS_XFLAG_SYNC, _NOATIME and _NODUMP; the others are a filesystem's own, or forbid to replace the file.
_KEPT_FLAGS = 0x20 | 0x40 | 0x80
# FS_XFLAG_PROJINHERIT
_INHERITED_PROJECT = 0x200
_RENAME_NOREPLACE = 1
_NO_SUCH_RENAME = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

# Of a folder where there is no such thing as its fsync.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)

_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class NewFile(DiskFile):
    """A file of ours that is not the disk yet, if it ever becomes that."""


@dataclasses.dataclass(frozen=True)
class Leftover:
    """A file of ours that a crash has left beside a disk.

    :param size: the bytes that it takes
    """

    path: str
    size: int


@contextlib.contextmanager
def new(place: Place, judge: Callable[[NewFile], object]) -> Iterator[NewFile]:
    """Give an empty file that becomes a disk, where there is none, when the block ends well.

    It is on stable storage before it gets its name.

    :param judge: called with the new file when the block has ended; if it
        raises, the file does not become the disk
    :raises: DiskExists, ImageInUse, FileInTheWay, CommandFailed
    """
    with _claimed(place, _SUFFIX) as file:
        yield file
        _settle(file, judge)
        mode = 0o644 & ~_umask()
        _set_mode(file.fd, mode)
        _publish(place, file)
        _take_mark_off(file, mode)
        _sync_folder(place)


@contextlib.contextmanager
def replacing(
    disk: DiskFile, stamp: FileStamp, judge: Callable[[NewFile], object], *, durably: bool = True
) -> Iterator[NewFile]:
    """Give an empty file that takes the place of a disk when the block ends well.

    It is on stable storage before it gets its name, and has the disk's mode,
    owner and extended attributes. Nobody may have the disk open meanwhile.

    :param stamp: of the disk as it was when it was decided to replace it
    :param judge: as for new()
    :param durably: not for a disk that has just been made and that nobody has
        written to: that is not on stable storage either, and what its guest
        flushes takes the rest with it
    :raises: ImageInUse, DiskIsLink, OwnerNotKept, FileInTheWay, CommandFailed
    """
    refuse_links(disk)
    refuse_foreign(disk)
    lock.refuse_users(disk.path, disk.fd)
    tried: list[bool] = []

    def is_all_that_there_is() -> bool:
        return bool(tried) and disk.stat() is None

    with lock.no_writer(disk.path, disk.fd), _claimed(disk, _SUFFIX, keep=is_all_that_there_is) as file:
        disk.refuse_changed(stamp)
        yield file
        if durably:
            _settle(file, judge)
        else:
            judge(file)
            _refuse_other(file)
        try:
            _copy_attributes(disk.path, disk.fd, file.fd, disk.folder_fd)
        except PermissionError as exc:
            raise _owner_not_kept(disk.path, "its owner, mode, ACL or label") from exc
        # Not every writer heeds QEMU's lock. A reader is worth waiting for, now
        # that the work is done.
        lock.refuse_users(disk.path, disk.fd, patience=_PATIENCE)
        disk.refuse_changed(stamp)
        tried.append(True)
        _rename_over(disk, file)
        _take_mark_off(file, stat.S_IMODE(os.fstat(disk.fd).st_mode))
        if durably:
            _sync_folder(disk)
            lock.outlast_openers(disk.fd)


@contextlib.contextmanager
def zeros(place: Place, size: int) -> Iterator[NewFile]:
    """Give a sparse file of size bytes beside a disk, for as long as the block runs."""
    with _claimed(place, _ZEROS_SUFFIX) as file:
        os.truncate(file.fd, size)
        yield file


def leftovers(place: Place) -> list[Leftover]:
    """List what a crash has left beside a disk; nothing is changed."""
    found = []
    for name in _names(place):
        try:
            status = place.stat(name)
        except OSError as exc:
            # Nothing has a name that cannot be had.
            if exc.errno != errno.ENAMETOOLONG:
                raise
            continue
        if status is not None and _is_ours(status) and not _is_claimed(place, name):
            found.append(Leftover(os.path.join(place.folder, name), status.st_blocks * 512))
    return found


def remove_leftovers(place: Place) -> None:
    """Give back the space of what a crash has left beside a disk, as far as that can be done."""
    for name in _names(place):
        try:
            status = place.stat(name)
            if status is not None and _is_ours(status):
                _remove(place, name)
        except exceptions.PreallocationError:
            # The next run sees to it.
            continue
        except OSError as exc:
            if exc.errno != errno.ENAMETOOLONG:
                log.warn_once("left", place.path, f"what an imgprealloc that was killed has left stays: {exc}")


def _names(place: Place) -> tuple[str, str]:
    return _temporary_name(place, _SUFFIX), _temporary_name(place, _ZEROS_SUFFIX)


def _temporary_name(place: Place, suffix: str) -> str:
    return f".{place.name}{suffix}"


@contextlib.contextmanager
def _claimed(place: Place, suffix: str, keep: Callable[[], bool] = lambda: False) -> Iterator[NewFile]:
    """Create an empty file that is ours alone; remove it afterwards, if it is still there.

    :param keep: asked then, whether it is all that there is of the disk
    """
    name = _temporary_name(place, suffix)
    while True:
        try:
            fd = os.open(name, _NEW, _MARK | stat.S_IRUSR | stat.S_IWUSR, dir_fd=place.folder_fd)
        except FileExistsError:
            _remove(place, name)
            continue
        try:
            # Lost, if another one took the new file for a crash's remains meanwhile.
            if not lock.try_exclusive(fd) or not _is_named(place, name, fd):
                continue
            try:
                yield NewFile(place.path, place.folder, place.folder_fd, name, fd)
            finally:
                # What cannot be removed now is removed by the next run; what is
                # being raised, or is done, matters more.
                with contextlib.suppress(OSError):
                    if _is_named(place, name, fd) and not keep():
                        os.unlink(name, dir_fd=place.folder_fd)
            return
        finally:
            lock.give_up_exclusive(fd)
            os.close(fd)


def _settle(file: NewFile, judge: Callable[[NewFile], object]) -> None:
    """Judge the new file while it is brought to stable storage."""
    # sync(1) and not os.fsync(): after mode full there may be minutes of
    # writing to wait for, and eventlet has only this one thread.
    size = os.fstat(file.fd).st_size
    command.run(file.path, "sync", file.program_name, work=size, meanwhile=lambda: judge(file))
    # There is no more to wait for; but what could not be written is told to each descriptor
    # once, and not to one that is opened when another has heard of it (Linux, errseq_t).
    # QEMU may hear of it as it closes the file, and not tell.
    native_thread.run(os.fsync, file.fd)
    _refuse_other(file)


def _refuse_other(file: NewFile) -> None:
    """Refuse a new file whose name another has by now.

    :raises: ImageInUse
    """
    if not _is_named(file, file.name, file.fd):
        raise exceptions.ImageInUse(
            file.path, "another program has removed or replaced the new file", "Nothing was changed; try again."
        )


def _remove(place: Place, name: str) -> None:
    """Remove what a crash has left: nobody holds its lock, no guest has it, and its content is unknown.

    :raises: FileInTheWay where it is not ours, ImageInUse
    """
    path = os.path.join(place.folder, name)
    status = place.stat(name)
    if status is None:
        return
    if not _is_ours(status):
        raise exceptions.FileInTheWay(
            place.path,
            f"{path} has the name that the new file would have, and is not of imgprealloc's making",
            "Move it away, then try again.",
        )
    try:
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place.folder_fd)
    except FileNotFoundError:
        return
    try:
        if not lock.wait_exclusive(fd):
            raise exceptions.ImageInUse(
                place.path, "another imgprealloc is at work on it", "Wait until that has ended, then try again."
            )
        # A qemu-img may outlive us where a kernel does not end it.
        if lock.has_writer(fd):
            raise exceptions.ImageInUse(
                place.path,
                f"QEMU has {path} open for writing, where the new file would be made",
                "Wait until that has ended; then try again.",
            )
        # Another may have taken its place since it was looked at.
        if _is_ours(os.fstat(fd)) and _is_named(place, name, fd):
            os.unlink(name, dir_fd=place.folder_fd)
    finally:
        os.close(fd)


def _is_ours(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and bool(status.st_mode & _MARK)


def _is_claimed(place: Place, name: str) -> bool:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place.folder_fd)
    except OSError:
        return False
    try:
        return lock.is_exclusive(fd)
    finally:
        os.close(fd)


def _is_named(place: Place, name: str, fd: int) -> bool:
    """Whether a name in the folder is still that of an open file."""
    status = place.stat(name)
    return status is not None and os.path.samestat(os.fstat(fd), status)


def refuse_links(disk: DiskFile) -> None:
    """Refuse to replace a disk that has more names than one, or is mounted from where it has another.

    :raises: DiskIsLink
    """
    if os.path.islink(disk.path) or os.fstat(disk.fd).st_nlink > 1:
        raise exceptions.DiskIsLink(
            disk.path,
            "the disk is a link, or has a second name, and would have to be replaced",
            "Name the file itself, or remove the other names.",
        )
    if mounts.identifier(disk.fd) != mounts.identifier(disk.folder_fd):
        # Over which nothing can be renamed.
        raise exceptions.DiskIsLink(
            disk.path,
            "the disk is a file that is mounted there by itself (mount --bind), and would have to be replaced",
            "Name the file where it is from (findmnt tells), or let its space be set aside as it is.",
        )


def refuse_foreign(disk: DiskFile) -> None:
    """Refuse, before any work is done, a disk that may be ours to write, as by an ACL, and is another's."""
    owner = os.fstat(disk.fd).st_uid
    if os.geteuid() not in (0, owner) and _owner_of_new_files(disk) != owner:
        raise _owner_not_kept(disk.path, f"its owner (user ID {owner})")


def _owner_of_new_files(place: Place) -> int | None:
    """Return whose a new file would be, which is not us on each filesystem (NFS with all_squash, CIFS with uid=)."""
    try:
        with tempfile.TemporaryFile(dir=place.folder, prefix=".imgprealloc-probe-") as probe:
            return os.fstat(probe.fileno()).st_uid
    except OSError:
        # Nobody can tell where nothing can be made.
        return None


def _owner_not_kept(path: str, what: str) -> exceptions.OwnerNotKept:
    return exceptions.OwnerNotKept(
        path,
        f"it would have to be replaced, and the new disk could not keep {what}",
        "Do it as root, or as that user; its space can be set aside as it is.",
    )


def _copy_attributes(path: str, source: int, target: int, folder_fd: int) -> None:
    """Give the new file all that the disk's inode has beside its content, and leave our mark on it.

    That is its mode, owner and extended attributes, its project, for quotas, and
    what chattr(1) has set.

    :param path: the disk, for what is told
    """
    status = os.fstat(source)
    if (status.st_uid, status.st_gid) != (os.fstat(target).st_uid, os.fstat(target).st_gid):
        os.fchown(target, status.st_uid, status.st_gid)
    attributes = _attributes(source)
    if _ACL in _attributes(target) and _ACL not in attributes:
        # From a default ACL of the folder: others could read the new disk, and
        # the mode would set the ACL's mask.
        os.removexattr(target, _ACL)
    _set_mode(target, stat.S_IMODE(status.st_mode))
    present = _attributes(target)
    for name, value in attributes.items():
        # SELinux and the like label a new file by themselves, mostly rightly,
        # and may not let us do it.
        if present.get(name) != value:
            _set_attribute(path, target, name, value)
    _copy_project_and_flags(source, target, folder_fd)


def _copy_project_and_flags(source: int, target: int, folder_fd: int) -> None:
    old, new, folder = _fsxattr(source), _fsxattr(target), _fsxattr(folder_fd)
    if old is None or new is None or folder is None:
        return
    flags, _, _, project, _ = old
    others, hint, extents, inherited, other_hint = new
    if folder[0] & _INHERITED_PROJECT:
        # Into such a folder no file of another project can be renamed (EXDEV).
        project = inherited
    wanted = (others & ~_KEPT_FLAGS | flags & _KEPT_FLAGS, hint, extents, project, other_hint)
    if wanted != new:
        fcntl.ioctl(target, _FS_IOC_FSSETXATTR, _FSXATTR.pack(*wanted))


def _fsxattr(fd: int) -> tuple[int, ...] | None:
    """Return what a filesystem has of a file or folder in a struct fsxattr; None where it has no such thing."""
    try:
        # Once more, because a folder is open for no more than its names.
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _FSXATTR.unpack(fcntl.ioctl(again, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))
    except OSError:
        return None
    finally:
        os.close(again)


def _set_attribute(path: str, fd: int, name: str, value: bytes) -> None:
    try:
        os.setxattr(fd, name, value)
    except OSError as exc:
        if name != _COMPRESSION or exc.errno != errno.EINVAL:
            raise
        # btrfs compresses no file that is not copied on write, and no other holds its space.
        log.warn_once("compression", path, "made anew, it is not compressed any more (chattr +c), to hold its space")


def _set_mode(fd: int, mode: int) -> None:
    """Give a new file a mode and leave our mark on it, where it can have one."""
    try:
        os.fchmod(fd, mode | _MARK)
    except OSError:
        # Root alone may set the mark in some systems (FreeBSD's, behind NFS), and some
        # filesystems give all files one mode.
        if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
            os.fchmod(fd, mode)


def _attributes(fd: int) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
    except OSError as exc:
        if exc.errno not in _NO_ATTRIBUTES:
            raise
        return {}


def _publish(place: Place, file: NewFile) -> None:
    """Give the new file the disk's name, unless something has got that meanwhile.

    :raises: DiskExists
    """
    try:
        _rename_to_nothing(place, file)
    except FileExistsError as exc:
        raise exceptions.DiskExists(
            place.path, "the file has come into being meanwhile", "It was left as it is; choose another path."
        ) from exc


def _rename_to_nothing(place: Place, file: NewFile) -> None:
    source, target = os.fsencode(file.name), os.fsencode(place.name)
    if not _LIBC.renameat2(place.folder_fd, source, place.folder_fd, target, _RENAME_NOREPLACE):
        return
    code = ctypes.get_errno()
    if code not in _NO_SUCH_RENAME:
        raise OSError(code, os.strerror(code), place.path)
    # The name is taken first, by an empty file of ours, over which any
    # filesystem can rename.
    try:
        os.close(os.open(place.name, _NEW, _MARK | stat.S_IRUSR | stat.S_IWUSR, dir_fd=place.folder_fd))
    except OSError:
        # It may have been made all the same; a kernel tries again after ESTALE,
        # and finds what it has made. The new file is claimed: no other imgprealloc
        # is at this.
        if not _is_empty_and_ours(place.stat()):
            raise
    try:
        os.replace(file.name, place.name, src_dir_fd=place.folder_fd, dst_dir_fd=place.folder_fd)
    except OSError:
        if _is_empty_and_ours(place.stat()):
            os.unlink(place.name, dir_fd=place.folder_fd)
        raise


def _is_empty_and_ours(status: os.stat_result | None) -> bool:
    return status is not None and _is_ours(status) and not status.st_size


def _rename_over(disk: DiskFile, file: NewFile) -> None:
    """Rename a new file over a disk; also where that takes the disk's name away before it fails (libfuse)."""
    try:
        os.replace(file.name, disk.name, src_dir_fd=disk.folder_fd, dst_dir_fd=disk.folder_fd)
    except OSError:
        if disk.stat() is not None:
            raise
        os.replace(file.name, disk.name, src_dir_fd=disk.folder_fd, dst_dir_fd=disk.folder_fd)


def _take_mark_off(file: NewFile, mode: int) -> None:
    """Give a file that is the disk by now its mode; one that keeps our mark is none the worse."""
    try:
        os.fchmod(file.fd, mode)
    except OSError:
        try:
            os.fchmod(file.fd, mode)
        except OSError as exc:
            log.warn_once("mark", file.path, f"it has the sticky bit, which means nothing on a file: {exc}")


def _sync_folder(place: Place) -> None:
    try:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place.folder_fd)
        try:
            native_thread.run(os.fsync, fd)
        finally:
            os.close(fd)
    except OSError as exc:
        if exc.errno not in _NO_SYNC:
            raise OSError(
                exc.errno, f"{exc.strerror}; the new disk has its name, but may lose it", place.folder
            ) from exc


def _umask() -> int:
    """Return the process's umask; umask(2) itself would have to change it for that."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
