# SPDX-License-Identifier: Apache-2.0
"""A disk's file, opened once: what is looked at through it is what is worked on.

A path can mean another file at each look, by a link, a rename or the letters
of "..". So a verb resolves it once, and from then on works through what it has
opened; programs get that too, by a name in /proc.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import errno
import os
import stat
import time

from imgprealloc import exceptions
from imgprealloc import lock
from imgprealloc.image import FileStamp

_ATTEMPTS = 5
_PAUSE = 0.02


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a disk is or will be: a name in a folder that is open.

    :param path: as the caller named it, for all that is told
    :param folder: the folder, with all links resolved
    :param folder_fd: the folder, open
    :param name: the disk's name in it
    """

    path: str
    folder: str
    folder_fd: int
    name: str

    @property
    def real_path(self) -> str:
        return os.path.join(self.folder, self.name)

    def beside(self, name: str) -> str:
        """Resolve a backing file's name as QEMU does, from the folder of the disk."""
        return os.path.join(self.folder, name)

    def stat(self, name: str | None = None) -> os.stat_result | None:
        """Return what lstat(2) says of the disk's name, or another one in the folder; None if there is no such file.

        :raises: OSError, because a look that failed is no proof of anything
        """
        try:
            return os.stat(self.name if name is None else name, dir_fd=self.folder_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None


@dataclasses.dataclass(frozen=True)
class DiskFile(Place):
    """A disk's file, open.

    :param fd: for reading, and for writing where that is allowed
    """

    fd: int

    @property
    def program_name(self) -> str:
        """The name by which a program opens the very same file."""
        return name_for_programs(self.fd)

    def stamp(self) -> FileStamp:
        """Return what tells this file's content from another's."""
        return FileStamp.from_stat(os.fstat(self.fd))

    def refuse_changed(self, stamp: FileStamp) -> None:
        """Refuse a disk that is no longer what it was when it was looked at.

        :raises: ImageInUse
        """
        self.refuse_replaced()
        if self.stamp() != stamp:
            raise exceptions.ImageInUse(
                self.path, "it was written to while it was looked at", "Stop the instance, try again."
            )

    def refuse_replaced(self) -> None:
        """Refuse a disk whose name another file has by now.

        :raises: ImageInUse
        """
        there = self.stat()
        if there is None or not os.path.samestat(there, os.fstat(self.fd)):
            raise exceptions.ImageInUse(self.path, "it was replaced while it was looked at", "Try again.")


def named(path: str | bytes | os.PathLike[str]) -> str:
    """Return a caller's path as the text that all else has it as, bytes that are none (surrogateescape) included.

    :raises: TypeError for what is no path
    """
    return os.fsdecode(path)


def name_for_programs(fd: int) -> str:
    """Return the name by which a program that we start opens what we have open."""
    return f"/proc/{os.getpid()}/fd/{fd}"


@contextlib.contextmanager
def place(path: str) -> Iterator[Place]:
    """Resolve the folder of a path, once.

    :raises: DiskNotFound, OSError
    """
    directory, name = os.path.split(path)
    if name in ("", ".", ".."):
        raise exceptions.DiskNotFound(path, "it names a folder", "Name an image file in it.")
    with _folder(directory or ".") as (folder, folder_fd):
        yield Place(path, folder, folder_fd, name)


@contextlib.contextmanager
def opened(path: str) -> Iterator[DiskFile]:
    """Open a disk for looking at it.

    :raises: DiskNotFound, OSError
    """
    _require_regular(path)
    directory, name = os.path.split(os.path.realpath(path))
    with _folder(directory) as (folder, folder_fd):
        fd = _open(path, name, folder_fd, os.O_RDONLY)
        try:
            yield DiskFile(path, folder, folder_fd, name, fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def claimed(path: str) -> Iterator[DiskFile]:
    """Open a disk for working on it, as the only imgprealloc that does.

    One that may only be read is opened all the same, because there may be
    nothing to do.

    :raises: DiskNotFound, ImageInUse, OSError
    """
    _require_regular(path)
    directory, name = os.path.split(os.path.realpath(path))
    with _folder(directory) as (folder, folder_fd):
        may_write = True
        try:
            fd = _open(path, name, folder_fd, os.O_RDWR)
        except OSError as exc:
            if exc.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            fd = _open(path, name, folder_fd, os.O_RDONLY)
            may_write = False
        try:
            if may_write and not lock.wait_exclusive(fd):
                raise exceptions.ImageInUse(
                    path, "another imgprealloc is at work on it", "Wait until that has ended, then try again."
                )
            try:
                file = DiskFile(path, folder, folder_fd, name, fd)
                # Another may have put a new file there between our open and our lock.
                file.refuse_replaced()
                yield file
            finally:
                lock.give_up_exclusive(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _folder(directory: str) -> Iterator[tuple[str, int]]:
    folder = os.path.realpath(directory)
    # For names in it alone, for which it need not be readable.
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield folder, fd
    finally:
        os.close(fd)


def _open(path: str, name: str, folder_fd: int, access: int) -> int:
    # Not a link that has come meanwhile, and without waiting for a FIFO.
    try:
        fd = _open_at_once(name, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, folder_fd)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, path) from exc
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise no_regular_file(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_at_once(name: str, flags: int, folder_fd: int) -> int:
    # Refused for the moment in which another imgprealloc asks who has the file open; see lock.
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            return os.open(name, flags, dir_fd=folder_fd)
        time.sleep(_PAUSE)
    return os.open(name, flags, dir_fd=folder_fd)


def _require_regular(path: str) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError as exc:
        raise exceptions.DiskNotFound(path, "there is no such file", "Check the path.") from exc
    if not stat.S_ISREG(status.st_mode):
        raise no_regular_file(path)


def no_regular_file(path: str) -> exceptions.DiskNotFound:
    """Say that what is there can be no disk."""
    return exceptions.DiskNotFound(path, "it is not a regular file", "Name an image file, not a device or a folder.")
