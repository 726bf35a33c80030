# SPDX-License-Identifier: Apache-2.0
"""What an operator does with a server, with one of Nova's two drivers, and what becomes of its disks."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
import os
import pathlib
import re
import shutil
from typing import Any

import loop_filesystem

from debian_cloud import bringup
from debian_cloud.client import cloud
from debian_cloud.client import openstack
from debian_cloud.client import shown
from debian_cloud.services import Failure
from debian_cloud.services import attempted
from debian_cloud.services import run
from debian_cloud.services import wait

MiB = 1 << 20

STOCK = "libvirt.LibvirtDriver"
OURS = "imgprealloc.LibvirtDriver"

# What is left free of a full filesystem, for the guest's console; less than any disk wants.
_CONSOLE = 16384
# What is written when it is filled; the rest is only set aside.
_LAST = 64 * MiB

_DONE = "done, 0 failed"

# Of libvirt's domain, whose guest is paused at first, too.
_NO_SPACE = "paused (I/O error)"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of a step.

    :param good: whether it is what this driver is known for: the promise kept, or, with stock Nova's, not
    """

    step: str
    said: str
    good: bool


class Server:
    """A server in the cloud, by what the operator's client says, and by its files.

    :param image: an image's name
    :param flavor: a flavor's
    """

    def __init__(self, name: str, image: str, flavor: str) -> None:
        created = shown("server", "create", "--image", image, "--flavor", flavor, "--nic", "none", name)
        self.id = str(created["id"])
        wait(f"{name} is started", lambda: self.domain_state().startswith(("running", _NO_SPACE)), self._fault)

    @property
    def folder(self) -> pathlib.Path:
        return bringup.INSTANCES / self.id

    def _fault(self) -> str:
        found = cloud().compute.get_server(self.id)
        return f"the server has failed: {found.fault}" if found.status == "ERROR" else ""

    def wait_for(self, status: str) -> None:
        """Wait until Nova has finished, and says this."""

        def has_ended() -> bool:
            found = cloud().compute.get_server(self.id)
            return bool(found.status == status and not found.task_state)

        wait(f"the server is {status}", has_ended, self._fault)

    def domain_state(self) -> str:
        """Return what libvirt says of its guest, with the reason in brackets, or nothing."""
        try:
            return run("virsh", "-q", "domstate", "--reason", self.id).strip()
        except Failure:
            return ""

    def disks(self) -> dict[str, dict[str, Any]]:
        """Return what nova-compute's user sees of its disks, by their files' names."""
        disks = json.loads(run("imgprealloc", "show", "-f", "json", str(self.folder), user="nova"))
        return {os.path.basename(disk["path"]): disk for disk in disks}

    def owners(self) -> set[str]:
        """Return whose its disks are."""
        return {(self.folder / name).owner() for name in self.disks()}

    def wait_for_guest(self) -> list[str]:
        """Wait until the guest has done its work, or cannot go on, and return what it said."""

        def has_ended() -> bool:
            return "e2e: done" in self._console() or self.domain_state() == _NO_SPACE

        wait("the guest has done its work", has_ended)
        return re.findall(r"e2e: (.*?)\s*$", openstack("console", "log", "show", self.id), re.MULTILINE)

    def _console(self) -> str:
        # What Nova shows as well, which takes some seconds.
        return (self.folder / "console.log").read_text(errors="replace")


def findings(driver: str) -> Iterator[Finding]:
    """Do everything, with nova-compute on this driver."""
    ours = driver == OURS
    yield _check_nova(ours)
    server = Server("first", bringup.IMAGE, "small")
    disks = server.disks()
    yield Finding("``openstack server create``: its disks", _told(disks), _is_held(disks) == ours)
    server.wait_for("ACTIVE")
    owners = server.owners()
    yield Finding("who owns them while the guest runs", ", ".join(sorted(owners)), owners == {"libvirt-qemu"})
    said = server.wait_for_guest()
    yield Finding("the guest writes all of its disk, and reads it", said[-1], said[-1] == _DONE)
    if ours:
        yield _hole(server)
    yield from _stopped_and_started(server, ours)
    yield _snapshot(server)
    openstack("server", "resize", "--flavor", "large", "--wait", server.id)
    disks = server.disks()
    yield Finding("``openstack server resize``: its disks", _told(disks), _is_held(disks) == ours)
    openstack("server", "resize", "confirm", server.id)
    server.wait_for("ACTIVE")
    openstack("server", "delete", "--wait", server.id)
    left = sorted(str(path.relative_to(bringup.INSTANCES)) for path in bringup.INSTANCES.glob("*-*-*"))
    yield Finding("``openstack server delete``: what is left", ", ".join(left) or "nothing", not left)
    yield _full(ours)


def _check_nova(ours: bool) -> Finding:
    """Ask, without saying what nova-compute reads."""
    status, said, _ = attempted("imgprealloc", "check-nova", "-f", "json", user="nova")
    bad = [found["subject"] for found in json.loads(said) if not found["good"]]
    said = f"no: {', '.join(bad)}" if bad else "yes"
    return Finding("``imgprealloc check-nova``, as user nova", said, (not status) == ours)


def _hole(server: Server) -> Finding:
    """Take space from a disk under its guest, as a guest of an older QEMU may, where nothing was written."""
    disk = server.folder / "disk.eph0"
    end = disk.stat().st_size // MiB * MiB
    with disk.open("r+b") as file:
        file.seek(end - 2 * MiB)
        if any(file.read(MiB)):
            raise Failure(f"{disk} has data where it should be empty")
    run("fallocate", "--punch-hole", "--offset", str(end - 2 * MiB), "--length", str(MiB), str(disk))
    short = server.disks()[disk.name]["shortfall"]
    wait("the hole is filled", lambda: not server.disks()[disk.name]["shortfall"])
    said = f"short of {short // 1024} KiB, which nova-compute has set aside again"
    return Finding("a MiB taken from a disk under its guest", said, short > 0 and disk.owner() == "libvirt-qemu")


def _stopped_and_started(server: Server, ours: bool) -> Iterator[Finding]:
    openstack("server", "stop", server.id)
    server.wait_for("SHUTOFF")
    disks = server.disks()
    owners = ", ".join(sorted(server.owners()))
    yield Finding("``openstack server stop``: its disks", f"{_told(disks)}; {owners}", _is_held(disks) == ours)
    openstack("server", "start", server.id)
    server.wait_for("ACTIVE")
    said = server.wait_for_guest()
    read = next((line for line in said if "reads back" in line), "nothing is read back")
    good = "round 2" in read and said[-1] == _DONE
    yield Finding("``openstack server start``: the guest reads what it wrote", f"{read}; {said[-1]}", good)


def _snapshot(server: Server) -> Finding:
    image = shown("server", "image", "create", "--name", "snapshot", "--wait", server.id)
    [path] = pathlib.Path("/var/lib/glance/images").glob(shown("image", "show", image["name"])["id"])
    info = json.loads(run("qemu-img", "info", "--output=json", str(path)))
    said = f"{info['format']}, {path.stat().st_size // MiB} MiB"
    return Finding("``openstack server image create``", said, "backing-filename" not in info)


def _full(ours: bool) -> Finding:
    """Boot another server from the snapshot, and leave its filesystem no space, before the guest has written."""
    # The snapshot's file is larger than the small flavor's disk, by qcow2's own metadata.
    server = Server("second", "snapshot", "large")
    free = shutil.disk_usage(bringup.INSTANCES).free
    filler = bringup.INSTANCES / "most"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - _LAST, 1))
    loop_filesystem.fill(str(bringup.INSTANCES), leave=_CONSOLE)
    said = server.wait_for_guest()
    server.wait_for("ACTIVE")
    found = f"the guest: {said[-1]}; libvirt: {server.domain_state()}; Nova: ACTIVE"
    openstack("server", "delete", "--wait", server.id)
    for name in (filler, bringup.INSTANCES / "filler"):
        name.unlink()
    openstack("image", "delete", "snapshot")
    return Finding("the same guest, from the snapshot, on a full filesystem", found, (said[-1] == _DONE) == ours)


def _told(disks: dict[str, dict[str, Any]]) -> str:
    return ", ".join(
        f"{name}: {disk['state']}" + (f" (short of {disk['shortfall'] // 1024} KiB)" if disk["shortfall"] else "")
        for name, disk in sorted(disks.items())
    )


def _is_held(disks: dict[str, dict[str, Any]]) -> bool:
    return {disk["state"] for disk in disks.values()} == {"preallocated"}
