# SPDX-License-Identifier: Apache-2.0
"""Warnings that are worth one line and not one a minute."""

from __future__ import annotations

import collections
import threading
from typing import Any

from oslo_log import log as logging

LOG = logging.getLogger("imgprealloc")

# A host has hundreds of disks; whoever is pushed out is warned of once more.
_MOST_REMEMBERED = 10_000

# Disks are looked at in several threads.
_lock = threading.Lock()
_warned: collections.OrderedDict[tuple[str, str], None] = collections.OrderedDict()


def warn_once(kind: str, subject: str, message: Any) -> None:
    """Log a promise that is not kept: a WARNING once for a subject and kind in a process, DEBUG from then on.

    :param kind: what is wrong, as a word that stays the same where the
        message has numbers in it
    :param subject: the disk, folder or option that it is about
    """
    with _lock:
        level = logging.DEBUG if (subject, kind) in _warned else logging.WARNING
        _warned[subject, kind] = None
        if len(_warned) > _MOST_REMEMBERED:
            _warned.popitem(last=False)
    LOG.log(level, "%s: %s", subject, message)


def forget_one(kind: str, subject: str) -> None:
    """Warn of it anew the next time, because it was mended meanwhile."""
    with _lock:
        _warned.pop((subject, kind), None)


def forget() -> None:
    """Warn of everything once more, as a new process would."""
    _warned.clear()
