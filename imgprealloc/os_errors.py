# SPDX-License-Identifier: Apache-2.0
"""What the operating system refuses, told as errors of ours, with the disk's name and a way out."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import os

from imgprealloc import exceptions


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn the OSErrors of a block into errors of ours.

    :param path: the disk that the block is about
    :raises: NoSpace, FileError
    """
    try:
        yield
    except OSError as exc:
        # Calls on an open file have its descriptor in the place of a name.
        name = exc.filename if isinstance(exc.filename, (str, bytes)) else path
        reason = f"{exc.strerror or exc} ({shown(os.fsdecode(name))})"
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(path, reason) from exc
        raise exceptions.FileError(path, reason, _remedy(exc.errno), exc.errno) from exc
    except ValueError as exc:
        # What Python says instead of asking the system: it has no type of its own.
        if "embedded null" not in str(exc):
            raise
        raise exceptions.FileError(
            path, "its path, or its backing file's, has a NUL byte in it", "Check the path.", errno.EINVAL
        ) from exc


def shown(text: str) -> str:
    """Put the names of files in the place of those that stand for open files in this process."""
    prefix = f"/proc/{os.getpid()}/fd/"
    first, *rest = text.split(prefix)
    for part in rest:
        number = part[: len(part) - len(part.lstrip("0123456789"))]
        try:
            name = os.readlink(prefix + number)
        except OSError:
            name = prefix + number
        first += name + part[len(number) :]
    return first


def no_space(path: str, reason: str, remedy: str | None = None) -> exceptions.NoSpace:
    """Say that there is no space, in the words of a program that has met that.

    :param remedy: where another one than on a full filesystem helps
    """
    return exceptions.NoSpace(
        path,
        reason,
        remedy or "Free space on the filesystem, or build on another host.",
        exit_code=1,
        stderr=os.strerror(errno.ENOSPC),
    )


def _remedy(code: int | None) -> str:
    if code in (errno.EACCES, errno.EPERM):
        return "Check the permissions of the file and its folder, who runs this, and what AppArmor or SELinux says."
    if code in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return "Check the path, and the length of its names."
    if code in (errno.EMFILE, errno.ENFILE):
        return "Raise the limit of open files."
    return "Look into the kernel's log, and at how the filesystem is mounted."
