# SPDX-License-Identifier: Apache-2.0
"""A filesystem that answers one look, or one write, with an error: what is below it, handed through by FUSE.

It is as poor as many FUSE filesystems are: no extended attributes, no hard
links, no flags of renameat2(2), no map of extents. Nothing is cached, so that
each look arrives. It runs as a process of its own, which is told through a
socket outside the mount what to answer when.

    python faulty_filesystem.py FOLDER MOUNT_POINT SOCKET [OWNER]
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import pathlib
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Optional

# Operations that find out about a file, and such as change it. A lookup is a getattr here.
LOOKS = ("access", "getattr", "open", "opendir", "readdir", "readlink", "statfs")
CHANGES = ("chmod", "chown", "create", "fallocate", "fsync", "fsyncdir", "rename", "truncate", "unlink", "write")

# As many looks are made to fail one by one, and of what comes later one in three;
# all, one by one, if the environment says so.
_ONE_BY_ONE = sys.maxsize if os.environ.get("IMGPREALLOC_EVERY_LOOK") else 30


def after(at: int) -> int:
    """Return the number of the look that is made to fail in the next turn."""
    return at + (1 if at < _ONE_BY_ONE else 3)


@dataclasses.dataclass(frozen=True)
class Operation:
    """What the filesystem was asked: which operation, on which path below the mount point."""

    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What has happened since a fault was prepared.

    :param seen: the operations that it could have struck, in turn
    :param struck: the one that it has struck, if any
    """

    seen: tuple[Operation, ...]
    struck: Optional[Operation]


class FaultyFilesystem:
    """A mounted one.

    :param below: the folder that is handed through, where a test may look past all faults
    :param mount_point: where the faults are
    """

    def __init__(self, below: pathlib.Path, mount_point: pathlib.Path, control: str) -> None:
        self.below = below
        self.mount_point = mount_point
        self._control = control

    def prepare(
        self,
        operations: Sequence[str] = (),
        error: str = "EIO",
        at: int | None = 1,
        by: int | None = None,
        *,
        onwards: bool = False,
    ) -> None:
        """Answer the at-th of these operations from now on with an error; all of them, if at is None.

        :param by: the process whose operations count, if not everybody's do
        :param onwards: whether all that follow of the same process are answered so
        """
        self._ask({"operations": list(operations), "error": error, "at": at, "by": by, "onwards": onwards})

    def files(self) -> list[str]:
        """List what is there, but for removed files that were open, which FUSE hides under other names."""
        return sorted(name for name in os.listdir(self.below) if not name.startswith(".fuse_hidden"))

    def open_files(self) -> list[str]:
        """List what this process has open there, by the names that the kernel tells, also of what is removed."""
        found = []
        for fd in os.listdir("/proc/self/fd"):
            # Of the listing itself.
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
        return sorted(path for path in found if path.startswith(f"{self.mount_point}/"))

    def report(self) -> Report:
        """Tell what has happened, and work without faults from now on."""
        answer = self._ask({"operations": [], "error": "EIO", "at": None, "by": None, "onwards": False})
        struck = answer["struck"]
        return Report(
            tuple(Operation(*found) for found in answer["seen"]), None if struck is None else Operation(*struck)
        )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._control)
            with connection.makefile("rw") as stream:
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                answer: dict[str, Any] = json.loads(stream.readline())
        return answer


@contextlib.contextmanager
def mounted(
    below: pathlib.Path, mount_point: pathlib.Path | None = None, *, owner: int | None = None
) -> Iterator[FaultyFilesystem]:
    """Mount one over a folder, and unmount it afterwards.

    :param below: an empty folder on a filesystem that has what is handed through
    :param mount_point: an empty folder, if it matters which
    :param owner: the user ID that all files are told to have, whoever makes them; None for their own
    """
    with tempfile.TemporaryDirectory(prefix="imgprealloc-fuse-") as scratch:
        control = os.path.join(scratch, "control")
        if mount_point is None:
            mount_point = pathlib.Path(scratch, "mnt")
            mount_point.mkdir()
        with open(os.path.join(scratch, "log"), "w+") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, below, mount_point, control, *([] if owner is None else [str(owner)])],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
            try:
                deadline = time.monotonic() + 20
                while not (os.path.ismount(mount_point) and os.path.exists(control)):
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise RuntimeError(f"the FUSE filesystem is not there: {log.read()}")
                    time.sleep(0.02)
                yield FaultyFilesystem(below, mount_point, control)
            finally:
                unmount = ["fusermount3", "-u", "-z"] if os.geteuid() else ["umount", "-l"]
                subprocess.run([*unmount, mount_point], check=False, stderr=subprocess.DEVNULL)
                try:
                    process.wait(3)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


class _Fault:
    """The one fault that is prepared, and what has been seen since; used by two threads.

    :param caller: tells the process that has asked for an operation
    """

    def __init__(self, caller: Callable[[], int]) -> None:
        self._caller = caller
        self._by: int | None = None
        self._lock = threading.Lock()
        self._operations: frozenset[str] = frozenset()
        self._error = errno.EIO
        self._at: int | None = None
        self._onwards = False
        self._struck_process: int | None = None
        self._seen: list[tuple[str, str]] = []
        self._struck: tuple[str, str] | None = None

    def __call__(self, operation: str, path: str | None) -> None:
        """Raise the error, if this is the operation that it is for."""
        with self._lock:
            if operation not in self._operations:
                return
            # What FUSE does on its own with removed files that are still open is nobody's operation.
            if self._at is not None and (path or "").startswith("/.fuse_hidden"):
                return
            if self._by not in (None, self._caller()):
                return
            self._seen.append((operation, path or "(removed)"))
            if self._strikes():
                self._struck = self._struck or self._seen[-1]
                raise OSError(self._error, os.strerror(self._error))

    def _strikes(self) -> bool:
        """Whether the operation that was seen last is to fail; the first that is decides whose others are, too."""
        if self._at in (None, len(self._seen)):
            if self._onwards:
                self._struck_process = _process_of(self._caller())
            return True
        return self._struck_process is not None and _process_of(self._caller()) == self._struck_process

    def serve(self, control: str) -> None:
        """Take orders, each with a connection of its own."""
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{control}.new")
        server.listen()
        # Not before somebody listens, because whoever sees it connects.
        os.rename(f"{control}.new", control)
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile("rw") as stream:
                request = json.loads(stream.readline())
                with self._lock:
                    answer = {"seen": self._seen, "struck": self._struck}
                    self._operations = frozenset(request["operations"])
                    self._error = getattr(errno, request["error"])
                    self._at, self._by, self._onwards = request["at"], request["by"], request["onwards"]
                    self._seen, self._struck, self._struck_process = [], None, None
                stream.write(json.dumps(answer) + "\n")
                stream.flush()


def _process_of(thread: int) -> int:
    """Return the number of a thread's process; FUSE tells the thread's."""
    told = pathlib.Path(f"/proc/{thread}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in told if line.startswith("Tgid:"))


def _main(below: str, mount_point: str, control: str, owner: str | None = None) -> None:
    import mfusepy

    fault = _Fault(lambda: int(mfusepy.fuse_get_context()[2]))
    libc = ctypes.CDLL(None, use_errno=True)

    def at(path: str) -> str:
        return below + path

    class Passthrough(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def access(self, path: str, amode: int) -> int:
            fault("access", path)
            if not os.access(at(path), amode):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return 0

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            fault("getattr", path)
            status = os.lstat(at(path)) if fh is None else os.fstat(fh)
            told = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_ino", "st_dev", "st_rdev")
            found = {name: getattr(status, name) for name in told}
            times = {f"st_{name}time": getattr(status, f"st_{name}time_ns") for name in "amc"}
            owned = {} if owner is None else {"st_uid": int(owner)}
            return {**found, **times, **owned, "st_blksize": 4096}

        def opendir(self, path: str) -> int:
            fault("opendir", path)
            return os.open(at(path), os.O_RDONLY | os.O_DIRECTORY)

        def readdir(self, path: str, fh: int) -> list[str]:
            fault("readdir", path)
            return [".", "..", *os.listdir(fh)]

        def releasedir(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

        def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
            fault("fsyncdir", path)
            os.fsync(fh)
            return 0

        def readlink(self, path: str) -> str:
            fault("readlink", path)
            return os.readlink(at(path))

        def statfs(self, path: str) -> dict[str, int]:
            fault("statfs", path)
            space = os.statvfs(at(path))
            return {name: getattr(space, name) for name in dir(space) if name.startswith("f_") and name != "f_fsid"}

        def open(self, path: str, flags: int) -> int:
            fault("open", path)
            # What O_DIRECT would ask of the buffers is not handed through.
            return os.open(at(path), flags & ~os.O_DIRECT)

        def create(self, path: str, mode: int, fi: int | None = None) -> int:
            fault("create", path)
            return os.open(at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return os.pread(fh, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            fault("write", path)
            return os.pwrite(fh, data, offset)

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            fault("truncate", path)
            os.truncate(at(path) if fh is None else fh, length)
            return 0

        def fallocate(self, path: str, mode: int, offset: int, length: int, fh: int) -> int:
            fault("fallocate", path)
            done: int = libc.fallocate64(fh, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
            return done and -ctypes.get_errno()

        def flush(self, path: str, fh: int) -> int:
            return 0

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            fault("fsync", path)
            os.fsync(fh)
            return 0

        def unlink(self, path: str) -> int:
            fault("unlink", path)
            os.unlink(at(path))
            return 0

        def rename(self, old: str, new: str) -> int:
            fault("rename", old)
            os.rename(at(old), at(new))
            return 0

        def symlink(self, target: str, source: str) -> int:
            os.symlink(source, at(target))
            return 0

        def mkdir(self, path: str, mode: int) -> int:
            os.mkdir(at(path), mode)
            return 0

        def rmdir(self, path: str) -> int:
            os.rmdir(at(path))
            return 0

        def chmod(self, path: str | None, mode: int) -> int:
            fault("chmod", path)
            if mode & stat.S_ISVTX:
                fault("chmod +t", path)
            os.chmod(at(str(path)), mode)
            return 0

        def chown(self, path: str | None, uid: int, gid: int) -> int:
            fault("chown", path)
            os.chown(at(str(path)), uid, gid)
            return 0

        def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
            if times is None:
                os.utime(at(path))
            else:
                os.utime(at(path), ns=times)
            return 0

        def link(self, target: str, source: str) -> int:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        def listxattr(self, path: str) -> list[str]:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> int:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        def removexattr(self, path: str, name: str) -> int:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    class Fuse(mfusepy.FUSE):  # type: ignore[misc]
        def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
            # mfusepy would rename as if there were none.
            return -errno.EINVAL if flags else int(self.rename_fuse_2(old, new))

    threading.Thread(target=fault.serve, args=(control,), daemon=True).start()
    Fuse(
        Passthrough(), mount_point, foreground=True, nothreads=True, allow_other=not os.geteuid(), attr_timeout=0,
        entry_timeout=0, negative_timeout=0, direct_io=True, use_ino=True,
    )  # fmt: skip


if __name__ == "__main__":
    _main(*sys.argv[1:])
