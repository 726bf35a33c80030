# SPDX-License-Identifier: Apache-2.0
"""Where Nova keeps the disks of its instances, and which of the files there are such disks."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
import os
import re
from typing import Optional

from oslo_config import cfg

# Root, ephemeral and swap disks. Not kernel and ramdisk, config drives, rescue
# disks, nor what is yet to be invented.
_DISK = re.compile(r"disk(\.local|\.swap|\.eph\d+)?")

# An instance's folder. What a resize has left of before (UUID_resize) is no instance's.
_FOLDER = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

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
    return found[0] if found else None


def disks_below(folder: str) -> Iterator[str]:
    """List the disks in a folder, and in the folders of instances in it, in the order of their names.

    A folder of an instance's that cannot be listed is listed itself, for whoever
    looks at it to say why; one that has just been removed is not.

    :raises: OSError for the folder
    """
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if _FOLDER.fullmatch(name):
            try:
                yield from (os.path.join(path, disk) for disk in sorted(os.listdir(path)) if is_disk(disk))
            except FileNotFoundError:
                continue
            except OSError:
                yield path
        elif is_disk(name) and not os.path.isdir(path):
            yield path


def configured_path(configuration: Sequence[str] = (), prog: str = "nova-compute") -> str:
    """Return instances_path, as nova-compute's configuration has it.

    :param configuration: nova-compute's arguments that name it; none: where Nova looks
        for it
    :param prog: its name, by which Nova looks
    :raises: oslo_config.cfg.Error
    """
    conf = cfg.ConfigOpts()
    conf.register_opts(_OPTIONS)
    conf(list(configuration), project="nova", prog=prog)
    return str(conf.instances_path)
