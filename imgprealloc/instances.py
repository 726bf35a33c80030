# SPDX-License-Identifier: Apache-2.0
"""Where Nova keeps the disks of its instances, and which of the files there are such disks."""

from __future__ import annotations

import os
import re
from typing import Optional

from oslo_config import cfg

# Root, ephemeral and swap disks. Not kernel and ramdisk, config drives, rescue
# disks, nor what is yet to be invented.
_DISK = re.compile(r"disk(\.local|\.swap|\.eph\d+)?")

# An instance's folder; during a resize, the one of before has a suffix.
_FOLDER = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(_resize)?")

# As Nova has them; what they are by default, distributions say.
_OPTIONS = (
    cfg.StrOpt("state_path", default="/var/lib/nova"),
    cfg.StrOpt("instances_path", default="$state_path/instances"),
)


def is_disk(path: str) -> bool:
    """Whether a file in an instance's folder is, by its name, one of the disks that are preallocated."""
    return bool(_DISK.fullmatch(os.path.basename(path)))


def instance_of(path: str) -> Optional[str]:
    """Return the UUID of the instance that a disk belongs to, by the name of its folder."""
    found = _FOLDER.fullmatch(os.path.basename(os.path.dirname(os.path.abspath(path))))
    return found[1] if found else None


def disks_below(folder: str) -> list[str]:
    """List the disks in a folder, and in the folders of instances in it, in the order of their names.

    :raises: OSError
    """
    found = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if _FOLDER.fullmatch(name) and os.path.isdir(path):
            found += [os.path.join(path, disk) for disk in sorted(os.listdir(path)) if is_disk(disk)]
        elif is_disk(name) and not os.path.isdir(path):
            found.append(path)
    return found


def configured_path() -> str:
    """Return instances_path, as nova.conf has it in the places where Nova looks for that.

    :raises: oslo_config.cfg.Error
    """
    conf = cfg.ConfigOpts()
    conf.register_opts(_OPTIONS)
    conf([], project="nova", prog="nova-compute")
    return str(conf.instances_path)
