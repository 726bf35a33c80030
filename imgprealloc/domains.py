# SPDX-License-Identifier: Apache-2.0
"""What libvirt has on record of this host's instances, read from its files: nothing is connected to.

libvirt writes there what Nova has told it, and no guest does. The files are
root's as a rule; whoever may not read them knows as much less.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import os
from typing import Optional
from xml.etree import ElementTree

from oslo_utils import units

# Of those that run, and of all; where one tells both, the first counts.
_FOLDERS = ("/run/libvirt/qemu", "/etc/libvirt/qemu")

# That of ten disks has some 10 KiB.
_GREATEST = units.Mi


@dataclasses.dataclass(frozen=True)
class Domain:
    """An instance, as libvirt knows it.

    :param uuid: the instance's
    :param name: what its owner calls it; None where nobody has noted it
    :param formats: by the paths of its disks, as what QEMU opens them
    """

    uuid: str
    name: Optional[str]
    formats: Mapping[str, str]


def known() -> dict[str, Domain]:
    """Return what can be read of this host's instances, by their UUIDs."""
    found: dict[str, Domain] = {}
    for folder in _FOLDERS:
        # Not there, or not for us.
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(folder)):
                domain = _read(os.path.join(folder, name)) if name.endswith(".xml") else None
                if domain is not None:
                    found.setdefault(domain.uuid, domain)
    return found


def _read(path: str) -> Optional[Domain]:
    try:
        # A FIFO would be waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            content = file.read(_GREATEST + 1)
        root = ElementTree.fromstring(content) if len(content) <= _GREATEST else None
    except (OSError, ElementTree.ParseError):
        return None
    # What is told of one that runs has it within.
    domain = root if root is None or root.tag == "domain" else root.find("domain")
    uuid = None if domain is None else domain.findtext("uuid")
    if domain is None or not uuid:
        return None
    # "nova" is a prefix of Nova's, with a version in its name.
    return Domain(uuid, domain.findtext("metadata/{*}instance/{*}name"), dict(_formats(domain, uuid)))


def _formats(domain: ElementTree.Element, uuid: str) -> Iterator[tuple[str, str]]:
    """List the files in the instance's own folder that are its disks; volumes are elsewhere."""
    for disk in domain.iterfind("devices/disk[@device='disk'][@type='file']"):
        source, driver = disk.find("source"), disk.find("driver")
        path = "" if source is None else source.get("file", "")
        format = "" if driver is None else driver.get("type", "")
        if format and os.path.basename(os.path.dirname(path)) == uuid:
            yield path, format
