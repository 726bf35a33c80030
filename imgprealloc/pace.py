# SPDX-License-Identifier: Apache-2.0
"""How hard long writing may press on the storage, on which guests run meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import contextvars
import dataclasses
from typing import Optional

# By so much may a write take longer that waits for everybody else's.
_PATIENCE = 8


@dataclasses.dataclass(frozen=True)
class Pace:
    """What is done for the sake of others on the same storage.

    Programs get the idle I/O priority, as far as the kernel's scheduler heeds
    that, and what is written does not pile up in the page cache.

    :param rate: bytes a second that are written at the most; None for as many
        as the storage takes
    :raises: TypeError, ValueError for a rate that is none
    """

    rate: Optional[int] = None

    def __post_init__(self) -> None:
        if self.rate is None:
            return
        if isinstance(self.rate, bool) or not isinstance(self.rate, int):
            raise TypeError(f"a rate is an int of bytes a second, not {self.rate!r}")
        if self.rate <= 0:
            raise ValueError(f"a rate is a positive number of bytes a second, not {self.rate}")

    def slowest(self, bytes_a_second: float) -> float:
        """Return how slow a program may be that could write so many bytes a second."""
        return min(bytes_a_second, bytes_a_second if self.rate is None else self.rate) / _PATIENCE


_kept: contextvars.ContextVar[Optional[Pace]] = contextvars.ContextVar("pace", default=None)


@contextlib.contextmanager
def kept(pace: Optional[Pace]) -> Iterator[None]:
    """Keep a pace in the block; None where nobody else has to be thought of."""
    token = _kept.set(pace)
    try:
        yield
    finally:
        _kept.reset(token)


def current() -> Optional[Pace]:
    """Return the pace that is to be kept."""
    return _kept.get()
