# SPDX-License-Identifier: Apache-2.0
"""Have a command run by root, for tests that are run as somebody else: in the place of sudo, which not every host has.

    python tools/as_root.py SOCKET COMMAND [ARGUMENT...]

Serving is the other end; it does whatever it is asked, for the one user who may
open its socket. tools/as_user.py starts it, on a host for tests.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from typing import Any


@contextlib.contextmanager
def serving(path: str, uid: int) -> Iterator[None]:
    """Run what one user asks for, one command or several at a time, until the block ends.

    :param path: of the socket
    """
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        os.chown(path, uid, -1)
        os.chmod(path, 0o600)
        listening.listen()
        threading.Thread(target=_serve, args=(listening,), daemon=True).start()
        try:
            yield
        finally:
            os.unlink(path)


def _serve(listening: socket.socket) -> None:
    # Ends when the socket is closed.
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection, connection.makefile("rw") as stream:
        asked = json.loads(stream.readline())
        # Not a pipe: a daemon that is started so keeps it open.
        with tempfile.TemporaryFile() as output:
            try:
                status = subprocess.run(
                    asked["argv"], env=asked["environment"], stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, cwd="/", check=False,
                ).returncode  # fmt: skip
            except OSError as exc:
                status = 127
                output.write(f"{exc}\n".encode())
            output.seek(0)
            stream.write(json.dumps({"status": status, "output": os.fsdecode(output.read())}) + "\n")


def ask(path: str, argv: list[str]) -> dict[str, Any]:
    """Have a command run by who listens at path; return its status and output."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        with connection.makefile("rw") as stream:
            stream.write(json.dumps({"argv": argv, "environment": dict(os.environ)}) + "\n")
            stream.flush()
            return dict(json.loads(stream.readline()))


def _main(path: str, *argv: str) -> int:
    answer = ask(path, list(argv))
    stream = sys.stderr if answer["status"] else sys.stdout
    stream.write(answer["output"])
    return int(answer["status"])


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
