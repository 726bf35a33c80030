# SPDX-License-Identifier: Apache-2.0
"""Processes that a test has started, and what they have started in turn, found by a mark in their environment."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time

MARK = "IMGPREALLOC_STARTED_BY_TEST"


def running(mark: str) -> list[str]:
    """List the command lines of the processes that have the mark and are there."""
    wanted = os.fsencode(f"{MARK}={mark}")
    found = []
    for process in pathlib.Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            # It may be gone by now.
            with contextlib.suppress(OSError):
                if wanted in (process / "environ").read_bytes().split(b"\0"):
                    words = (process / "cmdline").read_bytes().split(b"\0")
                    found.append(b" ".join(words).decode(errors="replace"))
    return found


def left_running(mark: str, seconds: float = 5) -> list[str]:
    """List those that do not end by themselves, now that what started them is over."""
    deadline = time.monotonic() + seconds
    while (found := running(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
