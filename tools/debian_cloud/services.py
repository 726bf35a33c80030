# SPDX-License-Identifier: Apache-2.0
"""Services that run as Debian's units start them, each in a process group of its own, with its output in a log."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import time
from typing import Any

from debian_cloud import units

LOGS = pathlib.Path("/var/log/cloud")

# Many times what a service takes, for when all else on the machine is busy too.
PATIENCE = 300

_TAIL = 4000


class Failure(Exception):
    """Something of the cloud does not do what it has to."""


@contextlib.contextmanager
def running(name: str, is_up: Callable[[], bool]) -> Iterator[None]:
    """Start a service as its unit says, wait until it is up, and stop it in the end.

    :param name: the unit's
    """
    unit = units.of(name)
    for folder in unit.runtime:
        _make_folder(pathlib.Path("/run", folder), unit)
    for command in unit.before:
        run(*command)
    log = LOGS / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            unit.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=os.path.expanduser(unit.folder.replace("~", f"~{unit.user}")),
            env=_environment(unit.user, unit.environment),
            start_new_session=True,
            **_as(unit.user),
        )
    try:
        wait(f"{name} is up", is_up, lambda: _ended(name, process, log))
        yield
    finally:
        _stop(process)


def run(*command: str, user: str = "root", environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end as a user, and return what it says."""
    status, said, complaints = attempted(*command, user=user, environment=environment)
    if status:
        raise Failure(f"{' '.join(command)}: status {status}: {(complaints or said).strip()[-_TAIL:]}")
    return said


def attempted(*command: str, user: str = "root", environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run a command to its end as a user, and return its status, and what it says on both streams."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=_environment(user, environment or {}),
        **_as(user),
    )
    return done.returncode, done.stdout, done.stderr


def wait(fact: str, is_true: Callable[[], bool], complaint: Callable[[], str] = str) -> None:
    """Wait for something to become true, as long as there is nothing to complain of."""
    until = time.monotonic() + PATIENCE
    while not is_true():
        said = complaint()
        if said or time.monotonic() > until:
            raise Failure(said or f"after {PATIENCE} s it is not true that {fact}")
        time.sleep(0.5)


def listens(port: int) -> bool:
    """Whether somebody answers at a port of this host."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def _ended(name: str, process: subprocess.Popen[bytes], log: pathlib.Path) -> str:
    if process.poll() is None:
        return ""
    return f"{name} has ended with {process.returncode}: {log.read_text(errors='replace')[-_TAIL:]}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=PATIENCE // 5)
    # Also what it has left behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _make_folder(folder: pathlib.Path, unit: units.Unit) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.chown(folder, unit.user, unit.group or None)


def _as(user: str) -> dict[str, Any]:
    entry = pwd.getpwnam(user)
    return {
        "user": entry.pw_uid,
        "group": entry.pw_gid,
        "extra_groups": os.getgrouplist(user, entry.pw_gid),
    }


def _environment(user: str, more: Mapping[str, str]) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": pwd.getpwnam(user).pw_dir, "USER": user, **more}
