# SPDX-License-Identifier: Apache-2.0
"""Run tests as a user without privileges, as nova-compute runs.

    python tools/as_user.py [--user NAME] [pytest's arguments]

Root, who has to start this, does for them what libvirt, sudo and an operator do on
a compute node, and no more: mounts filesystems, gives disks to another user, starts
Nova's privsep daemon; see tools/as_root.py. The user gets by setpriv(1) and not by a
setresuid(2) of ours, after which the kernel would not let the programs that are
started open what is in /proc/PID/fd.

All in a mount namespace of its own, in which the user reaches what the tests need, and
after which nothing is left mounted. Without arguments all of tests/nova is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import contextlib
import ctypes
import os
import pathlib
import pwd
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile

import as_root

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# linux/sched.h
_CLONE_NEWNS = 0x00020000
# sys/mount.h
_MS_BIND, _MS_REC = 0x1000, 0x4000

_PLACE = pathlib.Path("/mnt")
_FUSE = pathlib.Path("/dev/fuse")
_FUSE_NUMBER = os.makedev(10, 229)

_LIBC = ctypes.CDLL(None, use_errno=True)


def main(arguments: list[str]) -> int:
    """Run them, and return pytest's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", default="nobody", help="nobody by default")
    options, chosen = parser.parse_known_args(arguments)
    if os.geteuid():
        parser.error("only root can become somebody else")
    user = pwd.getpwnam(options.user)
    _leave_mounts()
    # As timeout(1) and a CI's end would have it: the tests end, and what is below does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _place(user) as place, as_root.serving(str(place / "root"), user.pw_uid):
        _let_reach(user, _REPOSITORY, sys.prefix, sys.base_prefix)
        _let_use_fuse(place)
        return _run(_command(user, chosen or ["tests/nova"]), _environment(place, place / "root"))


def _leave_mounts() -> None:
    """Go on in a mount namespace of its own, of which nobody else sees anything."""
    if _LIBC.unshare(_CLONE_NEWNS):
        raise _os_error("unshare")
    _mount("--make-rprivate", "/")


@contextlib.contextmanager
def _place(user: pwd.struct_passwd) -> Iterator[pathlib.Path]:
    """Give a folder of the user's, by a short name, because sockets' names are made there."""
    kept = pathlib.Path(tempfile.mkdtemp(prefix="imgprealloc-user-"))
    try:
        kept.chmod(0o755)
        os.chown(kept, user.pw_uid, user.pw_gid)
        _mount("--bind", kept, _PLACE)
        yield _PLACE
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def _let_reach(user: pwd.struct_passwd, *paths: str | pathlib.Path) -> None:
    """Leave of folders that nobody else may search, as /root is one, nothing but these."""
    opened = {path: os.open(path, os.O_PATH) for path in {os.path.realpath(path) for path in paths}}
    for path in opened:
        for folder in reversed(pathlib.Path(path).parents):
            status = folder.stat()
            if not status.st_mode & stat.S_IXOTH and status.st_uid != user.pw_uid:
                _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", folder)
                break
    for path, fd in opened.items():
        if not os.path.exists(path):
            os.makedirs(path)
            # By what is open, which has no other name any more; mount(8) would look for it by that.
            source = f"/proc/self/fd/{fd}"
            if _LIBC.mount(source.encode(), path.encode(), None, ctypes.c_ulong(_MS_BIND | _MS_REC), None):
                raise _os_error(path)
        os.close(fd)


def _let_use_fuse(place: pathlib.Path) -> None:
    """Let everybody mount by FUSE, as udev does on a host that has it."""
    if not _FUSE.stat().st_mode & stat.S_IWOTH:
        node = place / "fuse"
        os.mknod(node, stat.S_IFCHR, _FUSE_NUMBER)
        node.chmod(0o666)
        _mount("--bind", node, _FUSE)


def _mount(*arguments: str | pathlib.Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _os_error(name: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), name)


def _command(user: pwd.struct_passwd, chosen: list[str]) -> list[str]:
    become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--inh-caps=-all"]
    return [*become, sys.executable, "-B", "-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider", *chosen]


def _environment(place: pathlib.Path, socket: pathlib.Path) -> dict[str, str]:
    ask = [sys.executable, "-B", str(_REPOSITORY / "tools" / "as_root.py"), str(socket)]
    # Nova 27 to 33 would patch the whole interpreter for eventlet otherwise.
    threads = {"OS_NOVA_DISABLE_EVENTLET_PATCHING": os.environ.get("OS_NOVA_DISABLE_EVENTLET_PATCHING", "true")}
    places = {"HOME": str(place), "TMPDIR": str(place)}
    return {**os.environ, **threads, **places, "IMGPREALLOC_AS_ROOT": shlex.join(ask)}


def _run(command: list[str], environment: dict[str, str]) -> int:
    with subprocess.Popen(command, env=environment, cwd=_REPOSITORY) as tests:
        try:
            return tests.wait()
        except BaseException:
            tests.terminate()
            raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
