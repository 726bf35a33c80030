# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as one shallow tree.

Every error names the disk, says what was found, and tells the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
import os
from typing import Any, Optional

from oslo_concurrency import processutils

from imgprealloc.image import DiskImage


class PreallocationError(Exception):
    """A disk could not be read or preallocated; the base of all our errors but IncompatibleNova.

    :param path: the disk's file
    :param reason: what was found, without a full stop
    :param remedy: what to do next, as a sentence
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)
        self.path = os.fspath(path)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return on_one_line(f"{self.path}: {self.reason}. {self.remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Python would call __init__ with these three alone, and some need more.
        return _made_again, (type(self), self.args, vars(self))


def _made_again(kind: type[PreallocationError], args: tuple[Any, ...], state: dict[str, Any]) -> PreallocationError:
    """Make a copy of an error, in another process perhaps."""
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


def on_one_line(text: str) -> str:
    """Escape what would end the line, or speak to the terminal; a file's name may have it."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


class DiskNotFound(PreallocationError):
    """There is no regular file at the path."""


class DiskExists(PreallocationError):
    """A file is in the way of a disk that was to be created."""


class DiskIsLink(PreallocationError):
    """The disk is a link, or has a second name, and would have to be replaced."""


class OwnerNotKept(PreallocationError):
    """The disk would have to be replaced, and the new one could not have its owner, mode, ACL or label."""


class FileInTheWay(PreallocationError):
    """Somebody's file has the name that our temporary file beside the disk would have."""


class InvalidSize(PreallocationError):
    """The size asked for cannot be had: not positive, or smaller than the disk."""


class FileError(PreallocationError):
    """The operating system has refused something with the file or its folder.

    :param errno: its reason
    """

    def __init__(self, path: str, reason: str, remedy: str, errno: int | None) -> None:
        super().__init__(path, reason, remedy)
        self.errno = errno


class ImageInUse(PreallocationError):
    """Another process has the image open, or is replacing it.

    :param image: the disk as it is, where all was done but what nobody may have
        it open for; else None
    """

    def __init__(self, path: str, reason: str, remedy: str, image: Optional[DiskImage] = None) -> None:
        super().__init__(path, reason, remedy)
        self.image = image


class UnsupportedFormat(PreallocationError):
    """The image's format, or a feature of it, cannot be preallocated."""


class FormatMismatch(UnsupportedFormat):
    """The file is not in the format that the caller named."""


class FormatNotCertain(PreallocationError):
    """The format is known by nobody's word, and the disk would have to be changed under a guess.

    :param guess: the format that its first bytes look like; empty where nobody has
        looked, because it is a backing file's
    """

    def __init__(self, path: str, reason: str, remedy: str, guess: str) -> None:
        super().__init__(path, reason, remedy)
        self.guess = guess


class BackingFileUnusable(PreallocationError):
    """A backing file is not there, or is nothing that QEMU could be let near."""


class BrokenImage(PreallocationError):
    """The image is corrupt or empty, or qemu-img says, or has made of it, what cannot be."""


class UnsupportedFilesystem(PreallocationError):
    """The filesystem cannot do what is asked of it.

    As to hold space, where on_unsupported is "error" or each overwrite takes new
    space; to give it back; to keep a rate; or to tell where bytes are.
    """


class ProgramMissing(PreallocationError):
    """qemu-img, or another program that is needed, is not installed.

    :param program: its name
    """

    def __init__(self, path: str, reason: str, remedy: str, program: str) -> None:
        super().__init__(path, reason, remedy)
        self.program = program


class QemuImgTooOld(PreallocationError):
    """This qemu-img cannot do what was asked."""


class ProgramKilled(PreallocationError):
    """A program reached its limit of time or memory.

    An image that a guest has written can be made so that reading it takes
    forever (CVE-2015-5162), and a filesystem may never answer; the limits are
    there for that.
    """


class NotPreallocated(PreallocationError):
    """The disk, read again afterwards, is not what was promised.

    :param image: the disk as it was found
    """

    def __init__(self, path: str, reason: str, remedy: str, image: DiskImage) -> None:
        super().__init__(path, reason, remedy)
        self.image = image


class IncompatibleNova(Exception):
    """Nova is not as the integration knows it, so that nothing of it was changed.

    :param faults: a line for each place that differs
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(faults)
        self.faults = tuple(faults)

    def __str__(self) -> str:
        return (
            f"This Nova cannot be used with imgprealloc: {'; '.join(self.faults)}. "
            "Install a release of imgprealloc that knows it, or set compute_driver = libvirt.LibvirtDriver."
        )


class CommandFailed(PreallocationError, processutils.ProcessExecutionError):
    """A program ended with an error.

    It is a ProcessExecutionError too, because that is what Nova expects of a
    failed build before it tries the next host.

    :param cmd: the command line
    :param exit_code: its exit status
    :param stdout: the end of what it has printed, as stderr; None where no program
        was run (NoSpace)
    """

    def __init__(
        self,
        path: str,
        reason: str,
        remedy: str,
        *,
        cmd: str | None = None,
        exit_code: int | None = None,
        stdout: str | None = None,
        stderr: str | None = None,
    ) -> None:
        PreallocationError.__init__(self, path, reason, remedy)
        self.cmd = cmd
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr
        self.description = reason


class NoSpace(CommandFailed):
    """The filesystem, or a quota on it, has not the space that was asked for."""
