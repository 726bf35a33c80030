# SPDX-License-Identifier: Apache-2.0
"""What a reservation has got that could not have all is given back.

fallocate(2) fills a file piece by piece, and what it has got when the space runs
out stays: the filesystem is full, for everybody. That space is asked for first
does not help where statvfs(2) counts what cannot be had: a quota that it does not
tell of (qgroups), what btrfs wants for its own tables, what others take meanwhile.

A hole is made only where there was one before, which reads the same, and only
where nobody else has the file open. So nothing is given back of a disk whose
guest runs: between a look at what it has written and the hole it may write there.
"""

from __future__ import annotations

from collections.abc import Sequence
import os

from oslo_log import log as logging
from oslo_utils import units

from imgprealloc import exceptions
from imgprealloc import fallocate
from imgprealloc import lock
from imgprealloc import native_thread
from imgprealloc import sizes
from imgprealloc.fallocate import Extent

LOG = logging.getLogger(__name__)

# So much is done in a moment; whoever wants to open the file is waited for by nobody longer.
_STEP = units.Gi


def give_back(path: str, fd: int, before: Sequence[Extent] | None, start: int, end: int) -> None:
    """Take back what fallocate(2) has set aside of a file between start and end, as far as that is safe.

    Where it is not, or fails, the file keeps it, and nothing is raised: the lack
    of space is what the caller has to tell.

    :param fd: the only descriptor of the file that this process has
    :param before: the file's extents before; None where the filesystem cannot tell
    """
    if before is None:
        return
    had = os.fstat(fd).st_blocks
    try:
        # A reader may be done in a moment.
        lock.refuse_users(path, fd)
        # Whom the kernel lets in because a punch has waited too long (a frozen filesystem),
        # QEMU's locks refuse; whoever has only waited for the lease finds none of them.
        with lock.sole_opener(path, fd, certainly=True) as refuse_others, lock.no_writer(path, fd):
            for extent in fallocate.filled(fd, before, start, end):
                for first in range(extent.start, extent.end, _STEP):
                    refuse_others()
                    native_thread.run(fallocate.punch, fd, first, min(_STEP, extent.end - first))
            refuse_others()
            _cut_off(fd, before, end)
    except (exceptions.ImageInUse, OSError) as exc:
        LOG.debug("%s: not all that it has got is given back: %s", path, exc)
    given = (had - os.fstat(fd).st_blocks) * 512
    if given > 0:
        LOG.info("%s: %s, set aside until the space ran out, are given back", path, sizes.exact(given))


def _cut_off(fd: int, before: Sequence[Extent], end: int) -> None:
    """Give back what lies beyond the file's end, where ext4 makes no holes, if nothing lay there before."""
    size, block = os.fstat(fd).st_size, os.fstatvfs(fd).f_frsize
    if end > size and (not before or before[-1].end < size + block):
        native_thread.run(os.ftruncate, fd, size)
