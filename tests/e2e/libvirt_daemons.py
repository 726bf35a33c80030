# SPDX-License-Identifier: Apache-2.0
"""The real libvirt at qemu:///system, with a configuration and a state of its own.

To be used in a mount namespace of one's own (isolation.py), because it hides
the folders of the system's libvirt there.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import pathlib
import subprocess
import time

import libvirt

DAEMONS = ("virtlogd", "libvirtd")

# What libvirt keeps, and has compiled in where it keeps it.
_FOLDERS = ("/etc/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt")

_CONFIGURATION = {
    # No polkit, and no systemd to open the sockets.
    "libvirtd.conf": 'auth_unix_ro = "none"\nauth_unix_rw = "none"\nlog_outputs = "2:stderr"\n',
    "virtlogd.conf": 'log_outputs = "2:stderr"\n',
    # Nothing that a container does not let us have. As root, because the
    # disks are in folders that nobody else may enter. Without the attributes
    # in which libvirt remembers a disk's owner: on a full ext4 it could not
    # set them, and the guest would not start at all.
    "qemu.conf": (
        'user = "root"\ngroup = "root"\nsecurity_driver = "none"\nnamespaces = []\ncgroup_controllers = []\n'
        "remember_owner = 0\n"
    ),
}

_PATIENCE = 60


@contextlib.contextmanager
def running(directory: pathlib.Path) -> Iterator[None]:
    """Start virtlogd and libvirtd, and stop them by their process ids.

    :param directory: an empty folder, for all that they write
    """
    for folder in _FOLDERS:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        own = directory / folder.replace("/", "_")
        own.mkdir()
        subprocess.run(["mount", "--bind", own, folder], check=True)
    # Also hides the sockets of D-Bus, by which libvirt would talk to systemd.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "run", "/run"], check=True)
    for name, content in _CONFIGURATION.items():
        pathlib.Path("/etc/libvirt", name).write_text(content)
    with contextlib.ExitStack() as stack:
        for daemon in DAEMONS:
            stack.enter_context(_started(daemon, directory / f"{daemon}.log"))
        yield


def destroy_all_domains() -> None:
    """Destroy all guests, which would outlive the daemons."""
    connection = libvirt.open("qemu:///system")
    for domain in connection.listAllDomains():
        if domain.isActive():
            domain.destroy()
    connection.close()


@contextlib.contextmanager
def _started(daemon: str, log: pathlib.Path) -> Iterator[None]:
    argv = [daemon, "--config", f"/etc/libvirt/{daemon}.conf", "--pid-file", f"/run/{daemon}.pid"]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        _wait_for(pathlib.Path("/run/libvirt", f"{daemon.replace('libvirtd', 'libvirt')}-sock"), process, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(socket: pathlib.Path, process: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    until = time.monotonic() + _PATIENCE
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{process.args!r} does not open {socket}: {log.read_text()}")
        time.sleep(0.05)
