# SPDX-License-Identifier: Apache-2.0
"""What can be promised for a disk on the filesystem it is on, and whether there is room for it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import errno
import os

from oslo_log import log as logging

from imgprealloc import exceptions
from imgprealloc import filesystem

LOG = logging.getLogger(__name__)

MODES = ("falloc", "full", "metadata")
ON_UNSUPPORTED = ("metadata", "full", "error")

_warned: set[tuple[str, str]] = set()


@dataclasses.dataclass(frozen=True)
class Terms:
    """The mode that can be kept, and the filesystem that keeps it.

    :param mode: the one that was asked for, or its fallback
    """

    mode: str
    filesystem: filesystem.Filesystem

    @property
    def holds_space(self) -> bool:
        """Whether space can be promised, and not only tried for."""
        return self.mode != "metadata" and self.filesystem.fallocate

    @property
    def nocow(self) -> dict[str, str]:
        """The qemu-img option that stops copy on write, where there is one."""
        return {"nocow": "on"} if self.filesystem.type == "btrfs" else {}

    @property
    def states(self) -> tuple[str, ...]:
        """The states that a disk made on these terms may have."""
        return ("preallocated",) if self.holds_space else ("preallocated", "mapped")


def offered(path: str, mode: str, on_unsupported: str) -> Terms:
    """Find out what can be promised on the filesystem under a path.

    :raises: UnsupportedFilesystem
    """
    directory = os.path.dirname(os.path.abspath(path))
    under = filesystem.under(directory)
    if under.fallocate or mode != "falloc":
        return Terms(mode, under)
    if on_unsupported == "error":
        raise exceptions.UnsupportedFilesystem(
            path,
            f"the {under.type} filesystem cannot set space aside (mode falloc)",
            "Use another filesystem, or set on_unsupported to metadata or full.",
        )
    warn_once(
        directory,
        f"the {under.type} filesystem cannot set space aside; "
        f"disks in this folder get mode {on_unsupported} instead of falloc",
    )
    return Terms(on_unsupported, under)


@contextlib.contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Turn what the operating system refuses into our errors, with the disk's name.

    :raises: NoSpace, FileError
    """
    try:
        yield
    except OSError as exc:
        reason = f"{exc.strerror or exc} ({exc.filename or path})"
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(path, reason) from exc
        raise exceptions.FileError(path, reason, _remedy(exc.errno), exc.errno) from exc
    except ValueError as exc:
        # What Python says instead of asking the system: it has no type of its own.
        if "embedded null" not in str(exc):
            raise
        raise exceptions.FileError(
            path, "its path, or its backing file's, has a NUL byte in it", "Check the path.", errno.EINVAL
        ) from exc


def _remedy(code: int | None) -> str:
    if code in (errno.EACCES, errno.EPERM):
        return "Check the permissions of the file and its folder, and who runs this."
    if code in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return "Check the path, and the length of its names."
    if code in (errno.EMFILE, errno.ENFILE):
        return "Raise the limit of open files."
    return "Look into the kernel's log, and at how the filesystem is mounted."


def require_space(path: str, needed: int) -> None:
    """Refuse what cannot fit before anything runs.

    A fallocate that fails half way has filled the filesystem for everybody.

    :raises: NoSpace
    """
    available = filesystem.available(os.path.dirname(os.path.abspath(path)))
    if needed > available:
        raise _no_space(path, f"it needs {needed} bytes more, and the filesystem has {available}")


def _no_space(path: str, reason: str) -> exceptions.NoSpace:
    return exceptions.NoSpace(
        path,
        reason,
        "Free space on the filesystem, or build on another host.",
        exit_code=1,
        stderr=os.strerror(errno.ENOSPC),
    )


def warn_once(subject: str, message: str) -> None:
    """Log a promise that is not kept: a WARNING once a process, DEBUG from then on."""
    level = logging.DEBUG if (subject, message) in _warned else logging.WARNING
    _warned.add((subject, message))
    LOG.log(level, "%s: %s", subject, message)
