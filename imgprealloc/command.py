# SPDX-License-Identifier: Apache-2.0
"""The one place that starts a program and turns its failure into our errors.

What the programs are and what they are asked is in qemu_img, fallocate, zeros
and replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import subprocess

from oslo_concurrency import processutils
from oslo_utils import units

from imgprealloc import exceptions
from imgprealloc import os_errors
from imgprealloc import pace
from imgprealloc import progress

# Neither qemu-img nor fallocate(1) tells these two by its exit status, and
# both print strerror(3): under LC_ALL=C this is all that there is to go by.
_NO_SPACE = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))

_ENVIRONMENT = {
    "LC_ALL": "C",
    # Else each thread of QEMU's takes 64 MiB of the address space that it may have.
    "MALLOC_ARENA_MAX": "1",
}

# What QEMU prints as it closes an image, when its exit status is settled: what it has
# not written is lost (qcow2.c, qcow2_inactivate).
_LOST_AT_THE_END = "Failed to flush the "

# Seconds for what takes a fraction of one: a filesystem may never answer, and
# an image may name what does not.
WALL_TIME = 600.0
# Bytes a second, for what writes: slower than any disk that guests run on.
SLOWEST = 4 * units.Mi
# Seconds between two looks at how far a program has come.
_BETWEEN_LOOKS = 0.2
# Seconds from the request to end to the end.
_GRACE = 10

# Of coreutils' timeout.
_TIMED_OUT = 124
_KILLED = 128 + signal.SIGKILL
_NOT_STARTED = (126, 127)

# What is kept of what a program prints. A check of an image that a guest has
# made for it prints gigabytes.
MOST_PRINTED = units.Mi
# Of that, what an error's text has room for.
_MOST_TOLD = 2000

_PR_SET_PDEATHSIG = 1
# Found now, because nothing may be imported between fork(2) and execve(2).
_LIBC = ctypes.CDLL(None, use_errno=True)


def run(
    path: str,
    *argv: str,
    limits: processutils.ProcessLimits | None = None,
    exit_codes: Sequence[int] = (0,),
    work: int = 0,
    stdin: int | None = None,
    meanwhile: Callable[[], object] | None = None,
    told: progress.Work | None = None,
) -> str:
    """Run a program that works on the disk at path, and return what it printed.

    It ends with this process, however that ends, and with an exception that is
    raised here, as by a signal's handler.

    :param path: the disk, for the error's text
    :param argv: all paths in it absolute, because it is run in /: Python would
        import modules from the folder that it is started in
    :param limits: oslo.concurrency's ProcessLimits to run under
    :param exit_codes: the exit statuses that are no failure
    :param work: bytes that it may have to write, which take their time
    :param stdin: an open file that the program gets as its standard input
    :param meanwhile: called once the program has been started, without a
        thread, which eventlet may never wake again
    :param told: of which whoever asked for progress is told; None where nobody did
    :raises: NoSpace, ProgramMissing, ProgramKilled, CommandFailed (the first and the
        last also for QEMU's loss of writes with status 0), and what meanwhile raises
    """
    raised: list[Exception] = []
    started: list[subprocess.Popen[bytes]] = []
    kept = pace.current() if work else None
    seconds = WALL_TIME + work / (SLOWEST if kept is None else kept.slowest(SLOWEST))

    def begin(process: subprocess.Popen[bytes]) -> None:
        started.append(process)
        try:
            if meanwhile is not None:
                meanwhile()
        except Exception as exc:
            # Not before the program has ended.
            raised.append(exc)
        try:
            _tell(process, printed, told)
        except Exception as exc:
            # Whoever is told may end it.
            _end(process)
            raised.append(exc)

    # util-linux' prlimit, because oslo.concurrency's is a Python, which takes
    # longer to start than most looks at a disk.
    limited = [] if limits is None else ["prlimit", *limits.prlimit_args()]
    if kept is not None and shutil.which("ionice") is not None:
        # Where there is no such priority (-t), nobody's work fails for that.
        limited = ["ionice", "-c", "3", "-t", *limited]

    with _Printed(stdin, is_limited=limits is not None) as printed:
        try:
            # coreutils' timeout, because oslo.concurrency's own came late and leaves the program running.
            piped, stderr = processutils.execute(
                "timeout", "--foreground", f"--kill-after={_GRACE}", f"{seconds:.3f}", *limited, *argv,
                check_exit_code=list(exit_codes),
                cwd="/",
                env_variables={**os.environ, **_ENVIRONMENT},
                on_execute=begin,
                preexec_fn=printed.take_over,
            )  # fmt: skip
            if _LOST_AT_THE_END in (stderr or "") + printed.stderr and not raised:
                raise processutils.ProcessExecutionError(piped, stderr, 0, " ".join(argv))
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.EACCES, errno.ENOEXEC):
                raise
            raise _missing(path, str(exc.filename or "timeout"), exc.strerror or str(exc)) from exc
        except processutils.ProcessExecutionError as exc:
            if raised:
                raise raised[0] from None
            raise _failure(path, argv, limits, seconds, exc, printed) from exc
        except BaseException:
            for process in started:
                _end(process)
            raise
        if raised:
            raise raised[0]
        if told is not None:
            progress.tell(told.total, told.total)
        # Nothing comes through a pipe from a program that is really run.
        return str(piped) + printed.stdout


def _tell(process: subprocess.Popen[bytes], printed: _Printed, told: progress.Work | None) -> None:
    """Say how far a program has come, until it ends."""
    if told is None:
        return
    progress.tell(0, told.total)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_BETWEEN_LOOKS)
            return
        done = told.done(printed.stdout_so_far)
        if done is not None:
            progress.tell(done, told.total)


class _Printed:
    """What a program prints, as far as it is kept: files in memory that cannot grow."""

    def __init__(self, stdin: int | None = None, *, is_limited: bool = False) -> None:
        self.stdin = stdin
        self._is_limited = is_limited
        self._parent = os.getpid()

    def __enter__(self) -> _Printed:
        self._files = [os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for name in ("stdout", "stderr")]
        for fd in self._files:
            os.truncate(fd, MOST_PRINTED)
            # What would go beyond is refused, and programs do not care.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._files:
            os.close(fd)

    def take_over(self) -> None:
        """Put the files in the place of the pipes; called in the new process."""
        # Of the thread that waits for the program, and so of the process.
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != self._parent:
            # It has ended before it could be asked for.
            os._exit(_KILLED)
        # See _end().
        os.setpgid(0, 0)
        if self._is_limited:
            # A check prints a line for each cluster that is leaked, to any
            # number of them: what is too long is refused, and the answer comes.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for fd, standard in zip(self._files, (1, 2)):
            os.dup2(fd, standard)
        if self.stdin is not None:
            os.dup2(self.stdin, 0)

    @property
    def stdout(self) -> str:
        return os.fsdecode(self.stdout_so_far)

    @property
    def stdout_so_far(self) -> bytes:
        return self._read(self._files[0])

    @property
    def stderr(self) -> str:
        return os.fsdecode(self._read(self._files[1]))

    @staticmethod
    def _read(fd: int) -> bytes:
        # The program's position is ours.
        return os.pread(fd, min(os.lseek(fd, 0, os.SEEK_CUR), MOST_PRINTED), 0)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program that nobody waits for any more.

    By its process group: a timeout(1) that gets a signal while it starts the
    program ends, and leaves it running (317 of 3000 in the first 3 ms).
    """
    # Whoever has ended already has no number of their own any more.
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(2 * _GRACE)
    except subprocess.TimeoutExpired:
        # It hangs in the kernel; it ends as soon as that lets it.
        os.killpg(process.pid, signal.SIGKILL)


def _missing(path: str, program: str, said: str) -> exceptions.ProgramMissing:
    return exceptions.ProgramMissing(
        path,
        f"{program} could not be started: {said}",
        f"Install {program} (Debian: qemu-utils, util-linux, coreutils).",
        program,
    )


def _failure(
    path: str,
    argv: Sequence[str],
    limits: processutils.ProcessLimits | None,
    seconds: float,
    exc: processutils.ProcessExecutionError,
    printed: _Printed,
) -> exceptions.PreallocationError:
    stderr = (exc.stderr or "") + printed.stderr
    said = os_errors.shown(stderr.strip())
    if len(said) > _MOST_TOLD:
        # Programs say what is wrong at the end.
        said = f"... {said[-_MOST_TOLD:]}"
    status = int(exc.exit_code or 0)
    # A part of ours is called by its name.
    name = argv[argv.index("-m") + 1] if "-m" in argv else " ".join(argv[:2])
    # Some of prlimit's releases end with 1 where the program is missing, as the
    # program itself might.
    for program in (argv[0],) if limits is None else ("prlimit", argv[0]):
        if (status in _NOT_STARTED or (limits is not None and status == 1)) and shutil.which(program) is None:
            return _missing(path, program, said)
    if status in (_TIMED_OUT, _KILLED):
        return exceptions.ProgramKilled(
            path,
            f"{name} was ended, because it was not done after {seconds:.0f} s",
            "See whether the filesystem answers, then try again.",
        )
    if limits is not None and status < 0:
        return exceptions.ProgramKilled(
            path,
            f"{name} was ended by signal {-status} under its limits of "
            f"{limits.cpu_time} s of CPU time and {limits.address_space} bytes of memory, or of what it may print",
            "The image may be damaged or made to exhaust the host; look at it on another machine.",
        )
    failed = exceptions.CommandFailed
    remedy = "See the message and try again."
    if any(text in said for text in _NO_SPACE):
        failed = exceptions.NoSpace
        remedy = "Free space on the filesystem or raise the quota, or build on another host."
    return failed(
        path,
        f"{name} failed with status {status}: {said}",
        remedy,
        cmd=os_errors.shown(" ".join(argv)),
        exit_code=status,
        stdout=(str(exc.stdout or "") + printed.stdout)[:_MOST_TOLD],
        stderr=said,
    )
