# SPDX-License-Identifier: Apache-2.0
"""The command on a terminal, as an operator sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time


def argv(*words: object) -> list[str]:
    """Return the command line of the command."""
    return [sys.executable, "-m", "imgprealloc.cli", *map(str, words)]


class Terminal:
    """A terminal of so many columns, on which the command is run; what is not for people goes to a pipe."""

    def __init__(self, *words: object, columns: int = 100) -> None:
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(argv(*words), stdout=subprocess.PIPE, stderr=theirs, text=True)
        os.close(theirs)
        self.shown = ""

    def until(self, pattern: str) -> None:
        """Read until something is shown."""
        deadline = time.monotonic() + 30
        while not re.search(pattern, self.shown):
            assert self._read(), self.shown
            assert time.monotonic() < deadline, self.shown

    def end(self) -> str:
        """Read to the end, and return what the command has written on its standard output."""
        while self._read():
            pass
        os.close(self._fd)
        out, _ = self.process.communicate(timeout=30)
        return out

    @property
    def line(self) -> str:
        """What stands in the place of the bar."""
        return self.shown.rpartition("\r\x1b[K")[2].strip()

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 1)[0]:
            return True
        try:
            self.shown += os.read(self._fd, 65536).decode()
        except OSError:
            # All who could write are gone.
            return False
        return True
