# SPDX-License-Identifier: Apache-2.0
"""How far a copy has come: told to whoever asked a verb for it, wherever the copying is done."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import contextvars
import re
from typing import Optional

Progress = Callable[[int, int], object]
"""Called with the bytes that are done, and those that there are."""

_asked: contextvars.ContextVar[Optional[Progress]] = contextvars.ContextVar("progress", default=None)

# As qemu-img -p prints it, over and over in the same line.
_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")


class _Ended(Exception):
    """What a caller has raised, who was told; none of our errors, and not to be taken for one.

    :param cause: that
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


@contextlib.contextmanager
def told_to(progress: Optional[Progress]) -> Iterator[None]:
    """Tell a caller of all copying in the block; None where nobody asked.

    :raises: what they raise
    """
    token = _asked.set(progress)
    try:
        yield
    except _Ended as ended:
        raise ended.cause from None
    finally:
        _asked.reset(token)


def is_asked_for() -> bool:
    """Whether anybody wants to know."""
    return _asked.get() is not None


def tell(done: int, total: int) -> None:
    """Say how far it has come, in bytes."""
    progress = _asked.get()
    try:
        if progress is not None:
            progress(done, total)
    except Exception as exc:
        raise _Ended(exc) from exc


def tell_printed(printed: bytes, total: int) -> None:
    """Say how far a program has come that prints percents of total bytes."""
    found = _PERCENT.findall(printed)
    if found:
        tell(int(float(found[-1]) / 100 * total), total)
