# SPDX-License-Identifier: Apache-2.0
"""A thread of the kernel for what would stop all green ones: long system calls, and long walks over their answers.

Under eventlet, as in nova-compute up to Nova 33, all threads of a service are
one to the kernel, which waits for a disk in the name of all.
"""

from __future__ import annotations

from collections.abc import Callable
import os
import sys
from typing import Any, TypeVar

Answer = TypeVar("Answer")


# Eventlet's threads are not there in a forked process, and it does not notice.
_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_note_fork)


def run(function: Callable[..., Answer], *args: Any) -> Answer:
    """Call a function that takes no locks and logs nothing: those of eventlet's are for green threads.

    It is called in a thread of the kernel's if this process is patched by
    eventlet, and not forked from one that is; where that is not so, eventlet is
    not imported.
    """
    patcher = sys.modules.get("eventlet.patcher")
    if _is_forked or patcher is None or not patcher.is_monkey_patched("os"):
        return function(*args)
    from eventlet import tpool

    answer: Answer = tpool.execute(function, *args)
    return answer
