# SPDX-License-Identifier: Apache-2.0
"""What would be done to a disk, as values. How it is chosen is the formats' business."""

from __future__ import annotations

import dataclasses
from typing import Literal, Optional

from imgprealloc import exceptions
from imgprealloc.image import DiskImage
from imgprealloc.image import State
from imgprealloc.settings import Mode

TreatmentName = Literal["none", "fill", "write", "reserve", "recreate", "rewrite"]
"""What is done to a disk. Its content never changes.

* none: nothing.
* fill: it stays the same file; its holes are filled, and it gets a copy of its
  own of what it shares with other files.
* write: it stays the same file; what is set aside and was never written is
  written (mode full).
* reserve: as fill, and past the file's end, up to what it can grow to.
* recreate: one that holds nothing is made anew, and takes the old one's name.
* rewrite: it is copied into a new one, which takes its name.
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What Preallocator.preallocate() would do to a disk as it stands. Sizes are bytes.

    :param image: the disk as it was found
    :param mode: the one that was asked for, or what stands in for it on this
        filesystem
    :param treatment: what is done to it; see TreatmentName
    :param state: what the disk is afterwards
    :param space: what it takes more of the filesystem in the end; less than 0
        where a new file is smaller
    :param temporary: what has to be there besides until it is done: the old file
        stays as long
    :param written: what is written or copied for it; all else is only set aside,
        which takes no time
    :param available: what disks may take from the filesystem, without what is to
        be kept free
    :param error: why it would be refused; NoSpace, too
    """

    image: DiskImage
    mode: Mode
    treatment: TreatmentName
    state: State
    space: int
    temporary: int
    written: int
    available: int
    error: Optional[exceptions.PreallocationError] = None

    @property
    def path(self) -> str:
        """The disk, as the caller named it."""
        return self.image.path

    @property
    def refused(self) -> bool:
        """Whether nothing would be done; a disk in use that cannot be written gets its space all the same."""
        return self.error is not None and self.state == self.image.state

    @property
    def needed(self) -> int:
        """What the filesystem has to have for it."""
        return self.space + self.temporary

    @property
    def fits(self) -> bool:
        """Whether the filesystem has that."""
        return self.needed <= self.available
