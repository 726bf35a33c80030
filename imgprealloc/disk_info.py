# SPDX-License-Identifier: Apache-2.0
"""disk.info, in which Nova notes the formats of an instance's disks. Only read here; Nova writes it."""

from __future__ import annotations

import json
import os


def format_of(path: str) -> str | None:
    """Return the format that Nova has noted for one of its disks, or None.

    Nova writes disk.info before the guest's first instruction; the disk's own
    header may be the guest's (CVE-2024-40767). It is not written again when a
    resize converts a raw disk to qcow2.
    """
    path = os.path.abspath(path)
    disk_info = os.path.join(os.path.dirname(path), "disk.info")
    # A FIFO would be waited for, for ever.
    if not os.path.isfile(disk_info):
        return None
    try:
        with open(disk_info) as file:
            noted = json.load(file).get(path)
    except (OSError, ValueError, AttributeError):
        return None
    return noted if isinstance(noted, str) else None
