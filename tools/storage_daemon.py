# SPDX-License-Identifier: Apache-2.0
"""QEMU's block layer without a guest, in qemu-storage-daemon: the mirror of live snapshots and block migrations."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
from typing import Any

# Of a job.
_PATIENCE = 120


class StorageDaemon:
    """A running qemu-storage-daemon, by its monitor."""

    def __init__(self, monitor: socket.socket) -> None:
        self._monitor = monitor.makefile("rw")
        json.loads(self._monitor.readline())
        self.run("qmp_capabilities")

    def run(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command; underscores in its arguments' names stand for hyphens."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        json.dump({"execute": command, "arguments": words}, self._monitor)
        self._monitor.write("\n")
        self._monitor.flush()
        while True:
            answer = json.loads(self._monitor.readline())
            if "error" in answer:
                raise AssertionError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def open(self, node: str, path: str, format: str = "qcow2", **more: Any) -> None:
        """Open an image, with its backing files, as a guest's QEMU does."""
        file = {"driver": "file", "filename": path, "aio": "native", "cache": {"direct": True}}
        self.run("blockdev-add", driver=format, node_name=node, file=file, **more)

    def serve(self, node: str, path: str) -> None:
        """Let others write to an image by NBD, at a socket."""
        self.run("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
        self.run("block-export-add", type="nbd", id="export", node_name=node, name="disk", writable=True)

    def mirror(self, node: str, target: str, sync: str) -> int:
        """Copy an image until both are alike, then let go of the copy.

        :param sync: "top" for what the image itself has, "full" for all that it shows
        :returns: bytes that were copied
        """
        self.run("blockdev-mirror", job_id="mirror", device=node, target=target, sync=sync, copy_mode="background")
        deadline = time.monotonic() + _PATIENCE
        while True:
            [job] = self.run("query-block-jobs")
            assert job["io-status"] == "ok", job
            assert time.monotonic() < deadline, job
            if job["ready"]:
                break
            time.sleep(0.01)
        # As Nova does: what the guest writes from now on is not part of it.
        self.run("block-job-cancel", device="mirror")
        while self.run("query-block-jobs"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return int(job["offset"])

    def mirror_shallow(self, disk: str, delta: str, format: str = "qcow2") -> int:
        """Do to a disk what a live snapshot does: what it has itself goes into a delta over the same base.

        :returns: bytes that were copied
        """
        self.open("disk", disk, format)
        self.open("delta", delta, backing=None)
        return self.mirror("disk", "delta", "top")


@contextlib.contextmanager
def running() -> Iterator[StorageDaemon]:
    """Start a daemon, and end it afterwards."""
    with tempfile.TemporaryDirectory(prefix="imgprealloc-daemon-") as scratch:
        path = os.path.join(scratch, "monitor")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen(1)
            daemon = subprocess.Popen(
                ["qemu-storage-daemon", "--chardev", f"socket,id=monitor,path={path}", "--monitor", "chardev=monitor"]
            )
            try:
                listening.settimeout(30)
                monitor, _ = listening.accept()
                with monitor:
                    yield StorageDaemon(monitor)
            finally:
                daemon.terminate()
                daemon.wait()
