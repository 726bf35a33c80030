# SPDX-License-Identifier: Apache-2.0
"""Whether a disk's file is in use, and how others are kept from it. The only place that asks.

QEMU locks single bytes of an image with F_OFD_SETLK (block/file-posix.c,
RAW_LOCK_PERM_BASE): byte 100 + n says "I use permission n", byte 200 + n
says "nobody else may use permission n". Permission 1 is writing, 3 is
resizing. Where a filesystem has no such locks, QEMU does without, and so do we.

Not all users set them: a guest that is being restored has its disk open
already, and a loop device never tells. A write lease (F_SETLEASE) is refused by
the kernel while anybody else has the file open, whoever that is.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import fcntl
import glob
import os
import signal
import struct
import time

from imgprealloc import exceptions
from imgprealloc import filesystem
from imgprealloc import mounts

_WRITES, _RESIZES = 101, 103
_NO_WRITER, _NO_RESIZER = 201, 203
# Outside QEMU's bytes, so that qemu-img can work on what we have locked.
_OURS = 300

_FLOCK = struct.Struct("hhqqi4x")
# The last is Lustre's, unless it is mounted with flock.
_NO_LOCKS_HERE = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

# Of NFS, Lustre and CIFS, as /proc/self/mountinfo has them.
_LOCKS_STAY_HERE = frozenset(
    {("nolock", ""), ("local_lock", "all"), ("local_lock", "posix"), ("localflock", ""), ("nobrl", "")}
)

_PAUSE = 0.1

# Seconds in which QEMU comes from a file's opening to its locks, on a busy machine too.
_COMING_TO_LOCKS = 5

# Half a second, for a busy machine; of another imgprealloc, too, which has the file open meanwhile.
_ATTEMPTS = 10
_BETWEEN_ATTEMPTS = 0.05

# Seconds that a reader may take. Longer than that, or of two that come at once neither would be let in.
_PATIENCE = 1.0


def _fcntl(fd: int, command: int, kind: int, byte: int) -> int:
    """Set or ask for a lock on one byte; return the kind of lock that stands."""
    try:
        return _locked(fd, command, kind, byte)
    except OSError as exc:
        if exc.errno in _NO_LOCKS_HERE:
            return fcntl.F_UNLCK
        raise


def _locked(fd: int, command: int, kind: int, byte: int) -> int:
    answer = fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0])


def _is_locked(fd: int, *bytes_: int) -> bool:
    return any(_fcntl(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK for byte in bytes_)


def has_writer(fd: int) -> bool:
    """Whether QEMU has an open file open for writing too."""
    return _is_locked(fd, _WRITES, _RESIZES)


def may_be_used_unseen(fd: int) -> bool:
    """Whether a guest of another host may have an open file open, of whose QEMU nothing is to be seen here.

    On a filesystem that other hosts have, too, and to which locks are not carried:
    it has none, or is mounted so that they are this host's alone.
    """
    if not filesystem.is_remote(fd):
        return False
    with mounts.holding(fd) as holder:
        mount = mounts.of(holder)
    if mount is not None and _LOCKS_STAY_HERE & set(mount.options.items()):
        return True
    try:
        _locked(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, _WRITES)
    except OSError as exc:
        if exc.errno in _NO_LOCKS_HERE:
            return True
        raise
    return False


def refuse_users(path: str, fd: int, *, patience: float = _PATIENCE) -> None:
    """Refuse a disk that may not be written to, grown or replaced, because somebody else has it open.

    :param path: the disk, for the error's text
    :param fd: the only descriptor of it that this process has
    :param patience: seconds that a reader may take to be done
    :raises: ImageInUse
    """
    _refuse_qemu(path, fd)
    deadline = time.monotonic() + patience
    while _is_open_elsewhere(fd):
        if time.monotonic() > deadline:
            break
        time.sleep(_PAUSE)
    else:
        return
    raise _open_elsewhere(path)


@contextlib.contextmanager
def no_writer(path: str, fd: int) -> Iterator[None]:
    """Keep QEMU from opening an image for writing, while it is copied or replaced.

    :raises: ImageInUse where QEMU itself could not get permission to write to
        the image and to resize it
    """
    # First forbid, then look, as QEMU does: of two that come at once, at
    # least one sees the other.
    for byte in (_NO_WRITER, _NO_RESIZER):
        _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
    try:
        _refuse_qemu(path, fd)
        yield
    finally:
        for byte in (_NO_WRITER, _NO_RESIZER):
            _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)


def outlast_openers(fd: int) -> None:
    """Wait while somebody else still has a file open that has just lost its name, as far as the kernel can tell.

    To be called within no_writer(), which such a QEMU then runs into: it may have
    opened the file before, and not have come to its locks. A guest that ran on
    it would lose all that it writes. Whoever has not come to them in 5 seconds
    only reads.
    """
    deadline = time.monotonic() + _COMING_TO_LOCKS
    while _is_open_elsewhere(fd) and time.monotonic() < deadline:
        time.sleep(_PAUSE)


def _refuse_qemu(path: str, fd: int) -> None:
    if has_writer(fd):
        raise exceptions.ImageInUse(path, "QEMU has the image open for writing", "Stop the instance, then try again.")
    if _is_locked(fd, _NO_WRITER, _NO_RESIZER):
        raise exceptions.ImageInUse(
            path,
            "QEMU has the image open, and lets nobody write to it; a running instance's snapshot may stand on it",
            "Stop the instance that uses it, then try again.",
        )


def try_exclusive(fd: int) -> bool:
    """Take the lock that one imgprealloc alone can have; False if another has it."""
    try:
        _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, _OURS)
    except OSError as exc:
        # Not EACCES, which POSIX allows for it, and by which AppArmor and SELinux forbid all locks.
        if exc.errno == errno.EAGAIN:
            return False
        raise
    return True


def wait_exclusive(fd: int) -> bool:
    """Take that lock, also where one that was killed still has it; False if another has it for half a second.

    One that was killed has it until also a process is gone that it was just starting.
    """
    for _ in range(_ATTEMPTS):
        if try_exclusive(fd):
            return True
        time.sleep(_BETWEEN_ATTEMPTS)
    return try_exclusive(fd)


def give_up_exclusive(fd: int) -> None:
    """Let go of that lock, before the file is closed.

    A process that another thread starts just then still has the file open
    until it becomes another program, and the lock with it.
    """
    _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, _OURS)


@contextlib.contextmanager
def sole_opener(path: str, fd: int, *, certainly: bool = False) -> Iterator[Callable[[], None]]:
    """Let whoever wants to open a file wait until the block ends, as far as the kernel can tell of them.

    :param certainly: whether to refuse a file also where the kernel cannot tell
    :returns: what has to be called often, and raises ImageInUse when somebody waits
    :raises: ImageInUse
    """
    if certainly and filesystem.is_remote(fd):
        # OCFS2 grants a lease also while another host has the file open.
        raise _open_elsewhere(path)
    try:
        _take_lease(fd)
    except OSError as exc:
        if certainly or (exc.errno == errno.EAGAIN and not filesystem.is_remote(fd)):
            raise _open_elsewhere(path) from exc
        # Another's file, or a filesystem without leases.
        yield lambda: None
        return

    def refuse_others() -> None:
        if fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_WRLCK:
            raise _open_elsewhere(path)

    try:
        yield refuse_others
    finally:
        # The kernel has taken it where somebody has waited too long.
        with contextlib.suppress(BlockingIOError):
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def is_exclusive(fd: int) -> bool:
    """Whether another imgprealloc has that lock."""
    return _is_locked(fd, _OURS)


def _is_open_elsewhere(fd: int) -> bool:
    try:
        _take_lease(fd)
    except OSError as exc:
        # NFS answers so where its server has given it no delegation.
        if exc.errno == errno.EAGAIN and not filesystem.is_remote(fd):
            return True
        # Another's file, or a filesystem without leases: nobody tells.
        return _backs_loop_device(fd)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _take_lease(fd: int) -> None:
    # Whoever opens the file just now makes the kernel send us a signal: SIGIO,
    # which ends a process, if it is not told to take one that is ignored.
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)


def _open_elsewhere(path: str) -> exceptions.ImageInUse:
    return exceptions.ImageInUse(
        path,
        "another program, or a loop device, has the file open",
        f"fuser -v {path}, or losetup --list, tells which; end that, then try again.",
    )


def _backs_loop_device(fd: int) -> bool:
    status = os.fstat(fd)
    for attribute in glob.glob("/sys/block/loop*/loop/backing_file"):
        # A loop device may go away meanwhile, and its file have another name by now.
        with contextlib.suppress(OSError), open(attribute, "rb") as file:
            if os.path.samestat(status, os.stat(file.read().rstrip(b"\n"))):
                return True
    return False
