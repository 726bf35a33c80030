# SPDX-License-Identifier: Apache-2.0
"""A guest's QEMU as far as its disk goes: qemu-storage-daemon has it open, and copies it as libvirt has QEMU do."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
from typing import Any

_NODE = "disk"
_TARGET = "target"
_JOB = "mirror"


class Guest:
    """What talks to a qemu-storage-daemon."""

    def __init__(self, monitor: socket.socket) -> None:
        self._lines = monitor.makefile("rw")
        self._read()
        self._execute("qmp_capabilities")

    def mirror(self, target: Mapping[str, Any]) -> None:
        """Copy what is allocated in the disk itself, not in its base image, and stop once both are the same.

        :param target: a block device, in QEMU's words
        :raises: RuntimeError when QEMU cannot
        """
        self._execute("blockdev-add", {**target, "node-name": _TARGET})
        self._execute("blockdev-mirror", {"job-id": _JOB, "device": _NODE, "target": _TARGET, "sync": "top"})
        self._wait("BLOCK_JOB_READY")
        self._execute("block-job-cancel", {"device": _JOB})
        self._wait("BLOCK_JOB_COMPLETED")
        self._execute("blockdev-del", {"node-name": _TARGET})

    def _execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> None:
        self._lines.write(json.dumps({"execute": command, "arguments": arguments or {}}) + "\n")
        self._lines.flush()
        while True:
            said = self._read()
            if "error" in said:
                raise RuntimeError(f"{command}: {said['error']['desc']}")
            if "return" in said:
                return

    def _wait(self, event: str) -> None:
        while True:
            said = self._read()
            if said.get("event") == event:
                return
            if said.get("event") in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_ERROR"):
                raise RuntimeError(f"the mirror has ended early: {said['data']}")

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise RuntimeError("qemu-storage-daemon has ended")
        said: dict[str, Any] = json.loads(line)
        return said


@contextlib.contextmanager
def running(path: str) -> Iterator[Guest]:
    """Open a qcow2 disk as Nova has QEMU open it."""
    with tempfile.TemporaryDirectory(prefix="imgprealloc-qmp-") as folder:
        address = os.path.join(folder, "qmp")
        server = subprocess.Popen(
            [
                "qemu-storage-daemon", "--chardev", f"socket,path={address},server=on,wait=off,id=monitor",
                "--monitor", "chardev=monitor", "--blockdev", json.dumps({**qcow2(path), "node-name": _NODE}),
            ]
        )  # fmt: skip
        try:
            with socket.socket(socket.AF_UNIX) as monitor:
                _connect(monitor, address, server)
                yield Guest(monitor)
        finally:
            server.terminate()
            server.wait()


def _connect(monitor: socket.socket, address: str, server: subprocess.Popen[bytes]) -> None:
    while True:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            monitor.connect(address)
            return
        if server.poll() is not None:
            raise RuntimeError(f"qemu-storage-daemon ended with status {server.returncode}")
        time.sleep(0.01)


def qcow2(path: str) -> dict[str, Any]:
    """Describe a qcow2 file to QEMU, as libvirt does for cache=none and io=native."""
    direct = {"direct": True}
    file = {"driver": "file", "filename": path, "aio": "native", "cache": direct}
    return {"driver": "qcow2", "file": file, "cache": direct}


def nbd(address: str) -> dict[str, Any]:
    """Describe a disk of another host to QEMU."""
    return {"driver": "nbd", "server": {"type": "unix", "path": address}}
