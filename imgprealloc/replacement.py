# SPDX-License-Identifier: Apache-2.0
"""New files beside a disk: the next disk, renamed over it once it is whole, and scratch.

A crash leaves the disk as it was and a file with a known name beside it, which
the next run replaces. What goes into the new file is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os

from imgprealloc import command
from imgprealloc import exceptions
from imgprealloc import lock

# O_NOFOLLOW is implied by O_EXCL.
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

SUFFIX = ".imgprealloc"
ZEROS_SUFFIX = ".imgprealloc-zeros"

_ACL = "system.posix_acl_access"


@contextlib.contextmanager
def new_disk(path: str, judge: Callable[[str], object] = lambda new: None) -> Iterator[str]:
    """Give the name of an empty file that becomes path when the block ends well.

    The new file is on stable storage before it gets its name. A disk that
    stands at path hands down its mode, owner and extended attributes, and must
    not be opened by QEMU for writing meanwhile.

    :param judge: called with the new file's name when the block has ended; if
        it raises, the file does not become path
    :raises: ImageInUse, UnsupportedFormat (a link, whose other names would
        keep the old disk), CommandFailed
    """
    with contextlib.ExitStack() as stack:
        existed = os.path.lexists(path)
        if existed:
            _refuse_links(path)
            stack.enter_context(lock.no_writer(path))
            modified = os.stat(path).st_mtime_ns
        # Who may read the disk is known once its attributes are copied.
        fd = stack.enter_context(_claimed(path, path + SUFFIX, 0o600 if existed else 0o644))
        temporary = path + SUFFIX
        if existed:
            _copy_attributes(path, fd)
        try:
            yield temporary
            # sync(1) and not os.fsync(): after mode full there may be minutes of
            # writing to wait for, and eventlet has only this one thread.
            command.run(path, "sync", temporary, meanwhile=lambda: judge(temporary))
        except exceptions.PreallocationError as exc:
            # The disk is what the caller knows.
            exc.path = path if exc.path == temporary else exc.path
            raise
        if not _is(fd, temporary):
            raise exceptions.ImageInUse(
                path, "another program has removed or replaced the new file", "Nothing was changed; try again."
            )
        if existed:
            # Not every writer heeds QEMU's lock.
            refuse_changed(path, modified)
            os.replace(temporary, path)
        else:
            _publish(temporary, path)
        _sync_directory(os.path.dirname(path))


def refuse_changed(path: str, modified: int) -> None:
    """Refuse to replace a disk that has been written to since it was read.

    :param modified: its mtime then, in nanoseconds
    :raises: ImageInUse
    """
    if os.stat(path).st_mtime_ns != modified:
        raise exceptions.ImageInUse(path, "it was written to while it was looked at", "Stop the instance, try again.")


@contextlib.contextmanager
def zeros(path: str, size: int) -> Iterator[str]:
    """Give the name of a sparse file of size bytes beside path, for as long as the block runs."""
    with _claimed(path, path + ZEROS_SUFFIX, 0o644) as fd:
        os.truncate(fd, size)
        yield path + ZEROS_SUFFIX


@contextlib.contextmanager
def _claimed(path: str, temporary: str, mode: int) -> Iterator[int]:
    """Create an empty file that is ours alone; remove it afterwards, if it is still there."""
    while True:
        try:
            fd = os.open(temporary, _NEW, mode)
        except FileExistsError:
            _remove_stale(path, temporary)
            continue
        try:
            # Lost, if another one took the new file for a stale one meanwhile.
            if not lock.try_exclusive(fd) or not _is(fd, temporary):
                continue
            try:
                yield fd
            finally:
                if _is(fd, temporary):
                    os.unlink(temporary)
            return
        finally:
            os.close(fd)


def _sync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_stale(path: str, temporary: str) -> None:
    """Remove what a crash has left: nobody holds its lock, no guest has it, and its content is unknown.

    :raises: ImageInUse
    """
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not lock.try_exclusive(fd):
            raise exceptions.ImageInUse(
                path, "another imgprealloc is at work on it", "Wait until that has ended, then try again."
            )
        # Somebody's disk may have this name, and a qemu-img may outlive us.
        if lock.has_writer(fd):
            raise exceptions.ImageInUse(
                path,
                f"QEMU has {temporary} open for writing, where the new file would be made",
                "Wait until that has ended, or move the file away; then try again.",
            )
        if _is(fd, temporary):
            os.unlink(temporary)
    finally:
        os.close(fd)


def _is(file: int | str, path: str) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _refuse_links(path: str) -> None:
    is_link = os.path.islink(path)
    if not is_link and _is(path, path + SUFFIX):
        # A crash came between the two halves of _publish().
        _remove_stale(path, path + SUFFIX)
    if is_link or os.stat(path).st_nlink > 1:
        raise exceptions.UnsupportedFormat(
            path,
            "the disk is a link, or has a second name, and would have to be replaced",
            "Name the file itself, or remove the other names.",
        )


def _copy_attributes(path: str, fd: int) -> None:
    status = os.stat(path)
    if (status.st_uid, status.st_gid) != (os.fstat(fd).st_uid, os.fstat(fd).st_gid):
        os.fchown(fd, status.st_uid, status.st_gid)
    if _ACL in os.listxattr(fd) and _ACL not in os.listxattr(path):
        # From a default ACL of the folder: others could read the new disk, and
        # the mode would set the ACL's mask.
        os.removexattr(fd, _ACL)
    os.fchmod(fd, status.st_mode & 0o7777)
    present = {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
    for name in os.listxattr(path):
        value = os.getxattr(path, name)
        # SELinux and the like label a new file by themselves, mostly rightly,
        # and may not let us do it.
        if present.get(name) != value:
            os.setxattr(fd, name, value)


def _publish(temporary: str, path: str) -> None:
    try:
        # Not a rename, which would silently replace what has come meanwhile.
        os.link(temporary, path)
    except FileExistsError as exc:
        raise exceptions.DiskExists(
            path, "the file has come into being meanwhile", "It was left as it is; choose another path."
        ) from exc
    os.unlink(temporary)
