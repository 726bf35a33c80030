# SPDX-License-Identifier: Apache-2.0
"""A disk behind a socket, opened by qemu-nbd as Nova has QEMU open it for a guest."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import subprocess
import time

# Seconds for a server to end that has nothing more to do.
_PATIENCE = 30


@contextlib.contextmanager
def over_socket(path: str, folder: str, format: str, aio: str) -> Iterator[str]:
    """Serve a disk with cache=none, and QEMU's own caches as they are by default.

    :param folder: where the socket is made; its path has to be short
    :returns: the socket's path
    """
    socket = os.path.join(folder, "nbd")
    server = subprocess.Popen(
        [
            "qemu-nbd", "--persistent", "--shared=4", f"--socket={socket}", f"--format={format}",
            "--cache=none", f"--aio={aio}", "--discard=ignore", path,
        ]
    )  # fmt: skip
    try:
        while not os.path.exists(socket):
            if server.poll() is not None:
                raise RuntimeError(f"qemu-nbd ended with status {server.returncode}")
            time.sleep(0.01)
        yield socket
    finally:
        server.terminate()
        try:
            server.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            # QEMU 7.2.22 was seen to poll for ever, with no client left.
            server.kill()
            server.wait()
