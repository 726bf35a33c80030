# SPDX-License-Identifier: Apache-2.0
"""A file that the command was asked to write: whole, or as it was. Never over a disk."""

from __future__ import annotations

import contextlib
import os
import stat


class InTheWay(Exception):
    """There is something that is not to be replaced."""


def write_whole(path: str, content: str, begins: str) -> None:
    """Write a text to a file beside the one that may be there, and put it in its place.

    :param begins: how a file begins that may be replaced, so that a disk that is
        named by mistake is not
    :raises: InTheWay, OSError
    """
    _refuse_others(path, begins)
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f".{name}.{os.getpid()}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _refuse_others(path: str, begins: str) -> None:
    try:
        # A FIFO would be waited for.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.read(fd, len(begins)) != begins.encode():
            raise InTheWay(
                f"{path}: what is there does not begin with {begins}, and may be a disk. Nothing was written; choose "
                "another name."
            )
    finally:
        os.close(fd)
