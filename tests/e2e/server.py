# SPDX-License-Identifier: Apache-2.0
"""A server in the cloud, by what Nova's API says of it, what libvirt says, and what its guest says on its console."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import os
import pathlib
import re
import time
from typing import Any
from xml.etree import ElementTree

import images
import libvirt

import imgprealloc

_PATIENCE = 240


@dataclasses.dataclass(frozen=True)
class Launch:
    """One start of a guest: what it was about to be started with, and its console.

    :param disks: by the names that the guest sees, as they were before
    """

    disks: dict[str, imgprealloc.DiskImage]
    console: pathlib.Path

    def said(self) -> list[str]:
        """Return what the guest reports of its disks."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return re.findall(r"e2e: (.*?)\s*$", text, re.MULTILINE)


class Server:
    """One server.

    :param api: Nova's client
    :param directory: for the consoles, on a filesystem that does not get full
    :param before_launch: what is to happen between the making of the disks
        and the guest's first instruction
    """

    def __init__(self, api: Any, directory: pathlib.Path, before_launch: Callable[[], None]) -> None:
        self._api = api
        self._directory = directory
        self._before_launch = before_launch
        self._libvirt: Any = None
        self.uuid = ""
        self.launches: list[Launch] = []

    @property
    def launch(self) -> Launch:
        """The latest one."""
        return self.launches[-1]

    def console(self) -> str:
        """Name a file for what the guest of the next launch says."""
        return str(self._directory / f"console-{len(self.launches)}")

    def about_to_launch(self, xml: str) -> None:
        """Look at the disks before the guest has run its first instruction."""
        tree = ElementTree.fromstring(xml)
        log = tree.find("./devices/serial/log")
        assert log is not None
        self.launches.append(Launch(_look(tree), pathlib.Path(log.attrib["file"])))
        self._before_launch()

    def disks(self) -> dict[str, imgprealloc.DiskImage]:
        """Look at the disks as they are now."""
        return _look(ElementTree.fromstring(self.domain().XMLDesc()))

    def domain(self) -> Any:
        """Return libvirt's domain."""
        if self._libvirt is None:
            self._libvirt = libvirt.open("qemu:///system")
        return self._libvirt.lookupByUUIDString(self.uuid)

    def no_space(self) -> list[str]:
        """Name the disks for which libvirt has paused the guest, because there was no space."""
        state, reason = self.domain().state()
        if (state, reason) != (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR):
            return []
        errors = self.domain().diskErrors()
        return [disk for disk, error in errors.items() if error == libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE]

    def is_running(self) -> bool:
        """Whether libvirt says so."""
        return bool(self.domain().state()[0] == libvirt.VIR_DOMAIN_RUNNING)

    def status(self) -> str:
        """Return what Nova says; while it is still at work, that."""
        server = self._api.get_server(self.uuid)
        if server["status"] == "ERROR":
            raise AssertionError(server.get("fault"))
        return str(server["OS-EXT-STS:task_state"] or server["status"])

    def wait_for(self, status: str) -> None:
        """Wait until Nova has finished, and says this."""
        _wait_until(lambda: f"not {status}, but {self.status()}", lambda: self.status() == status)

    def wait_for_guest(self) -> list[str]:
        """Wait until the guest has done its work or cannot go on, and return what it said."""

        def has_ended() -> bool:
            return any(line.startswith("done") for line in self.launch.said()) or not self.is_running()

        _wait_until(lambda: f"the guest is at work: {self.launch.said()}", has_ended)
        return self.launch.said()

    def wait_until_without_holes(self) -> None:
        """Wait until the filesystem has all of the disks' files."""

        def holes() -> dict[str, int]:
            found = {name: images.holes(disk.path) for name, disk in self.disks().items()}
            return {name: size for name, size in found.items() if size}

        _wait_until(lambda: f"there are holes: {holes()}", lambda: not holes())

    def wait_until_not_short(self) -> None:
        """Wait until none of the disks may ask its filesystem for anything."""

        def short() -> dict[str, int]:
            return {name: disk.shortfall for name, disk in self.disks().items() if disk.shortfall}

        _wait_until(lambda: f"disks are short: {short()}", lambda: not short())

    def act(self, status: str, **action: Any) -> dict[str, Any]:
        """Ask Nova for an action, wait for the status in which it has to end, and return the answer."""
        answer = self._api.post_server_action(self.uuid, action)
        self.wait_for(status)
        return dict(answer or {})


def _look(tree: ElementTree.Element) -> dict[str, imgprealloc.DiskImage]:
    found = {}
    for disk in tree.iterfind("./devices/disk[@device='disk']"):
        target, source, driver = disk.find("target"), disk.find("source"), disk.find("driver")
        assert target is not None
        assert source is not None
        assert driver is not None
        found[target.attrib["dev"]] = imgprealloc.Preallocator().inspect(
            os.path.realpath(source.attrib["file"]), format=driver.attrib["type"]
        )
    return found


def _wait_until(complaint: Callable[[], str], fact: Callable[[], bool]) -> None:
    until = time.monotonic() + _PATIENCE
    while not fact():
        if time.monotonic() > until:
            raise AssertionError(f"after {_PATIENCE} s, {complaint()}")
        time.sleep(0.3)
