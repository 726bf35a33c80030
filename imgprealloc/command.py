# SPDX-License-Identifier: Apache-2.0
"""The one place that starts a program and turns its failure into our errors.

What the programs are and what they are asked is in qemu_img, fallocate and
replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import errno
import os
import shutil

from oslo_concurrency import processutils

from imgprealloc import exceptions

# Neither qemu-img nor fallocate(1) tells these two by its exit status, and
# both print strerror(3): under LC_ALL=C this is all that there is to go by.
_NO_SPACE = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))

_ENVIRONMENT = {
    "LC_ALL": "C",
    # Else each thread of QEMU's takes 64 MiB of the address space that it may have.
    "MALLOC_ARENA_MAX": "1",
}


def run(
    path: str,
    *argv: str,
    limits: processutils.ProcessLimits | None = None,
    exit_codes: Sequence[int] = (0,),
    meanwhile: Callable[[], object] | None = None,
) -> str:
    """Run a program that works on the disk at path, and return what it printed.

    :param path: the disk, for the error's text
    :param argv: all paths in it absolute, because it is run in /: Python would
        import modules from the folder that it is started in
    :param limits: oslo.concurrency's ProcessLimits to run under
    :param exit_codes: the exit statuses that are no failure
    :param meanwhile: called once the program has been started, without a
        thread, which eventlet may never wake again; what the program prints
        has to fit into a pipe until it returns
    :raises: NoSpace, QemuImgMissing, QemuImgKilled, CommandFailed, and what
        meanwhile raises
    """
    raised: list[Exception] = []

    def started(_: object) -> None:
        try:
            if meanwhile is not None:
                meanwhile()
        except Exception as exc:
            # Not before the program has ended.
            raised.append(exc)

    try:
        stdout, _ = processutils.execute(
            *argv,
            check_exit_code=list(exit_codes),
            cwd="/",
            env_variables={**os.environ, **_ENVIRONMENT},
            prlimit=limits,
            on_execute=started,
        )
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.EACCES, errno.ENOEXEC):
            raise
        raise exceptions.QemuImgMissing(
            path,
            f"{argv[0]} could not be started: {exc.strerror}",
            f"Install {argv[0]} (Debian: qemu-utils, util-linux, coreutils).",
        ) from exc
    except processutils.ProcessExecutionError as exc:
        if raised:
            raise raised[0] from None
        raise _failure(path, argv, limits, exc) from exc
    if raised:
        raise raised[0]
    return str(stdout)


def _failure(
    path: str,
    argv: Sequence[str],
    limits: processutils.ProcessLimits | None,
    exc: processutils.ProcessExecutionError,
) -> exceptions.PreallocationError:
    said = (exc.stderr or "").strip()
    status = int(exc.exit_code or 0)
    # Under limits the program is started by oslo.concurrency's wrapper, which
    # ends with 1 where the program is missing, as the program itself might.
    if limits is not None and shutil.which(argv[0]) is None:
        return exceptions.QemuImgMissing(
            path, f"{argv[0]} could not be started: {said}", f"Install {argv[0]} (Debian: qemu-utils)."
        )
    if limits is not None and status < 0:
        return exceptions.QemuImgKilled(
            path,
            f"{' '.join(argv[:2])} was ended by signal {-status} under its limits of "
            f"{limits.cpu_time} s of CPU time and {limits.address_space} bytes of memory",
            "The image may be damaged or made to exhaust the host; look at it on another machine.",
        )
    failed = exceptions.CommandFailed
    remedy = "The disk is as it was; see the message and try again."
    if any(text in said for text in _NO_SPACE):
        failed = exceptions.NoSpace
        remedy = "Free space on the filesystem or raise the quota, or build on another host."
    return failed(
        path,
        f"{' '.join(argv[:2])} failed with status {status}: {said}",
        remedy,
        cmd=str(exc.cmd),
        exit_code=status,
        stdout=exc.stdout,
        stderr=exc.stderr,
    )
