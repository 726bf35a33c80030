# SPDX-License-Identifier: Apache-2.0
"""The imgprealloc command: a thin shell around the library, for operators. One module a verb.

Exit status: 0 done as asked; 1 an error, or not done as asked; 2 usage; 3 show
--check found a disk that is not preallocated; 128 + n it was stopped by signal n.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
from typing import Optional

from cliff import app
from cliff import commandmanager

import imgprealloc
from imgprealloc.cli import signals

_AS_IT_IS_OR_ESCAPED = "imgprealloc"


class Imgprealloc(app.App):
    """The command's name, version and sub-commands."""

    def __init__(self) -> None:
        super().__init__(
            description="Preallocated disks for Nova instances: look, create, allocate, resize.",
            version=imgprealloc.__version__,
            command_manager=commandmanager.CommandManager("imgprealloc.cli"),
            # So that VERB --help is the verb's.
            deferred_help=True,
        )

    def configure_logging(self) -> None:
        """Let -v tell what we do, and not what finds the formats of our tables."""
        super().configure_logging()
        logging.getLogger("stevedore").setLevel(logging.WARNING)


def _settle_streams() -> None:
    """Have all three standard files open, and stdout take the names of files as they are.

    In the place of one that is closed a disk would be opened, which programs that we
    start do not get then; and a name need not be text in anybody's encoding, nor one that
    libvirt has on record have its letters in the one of this terminal.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        codecs.register_error(_AS_IT_IS_OR_ESCAPED, _as_it_is_or_escaped)
        sys.stdout.reconfigure(errors=_AS_IT_IS_OR_ESCAPED)


def _as_it_is_or_escaped(exc: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(exc)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(exc)


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command, and return its exit status."""
    _settle_streams()
    try:
        with signals.stopping():
            # Without any, cliff would open a prompt.
            return int(Imgprealloc().run((sys.argv[1:] if argv is None else argv) or ["--help"]))
    except signals.Stopped as stopped:
        print(f"imgprealloc: {stopped}", file=sys.stderr)
        return 128 + stopped.number
