# SPDX-License-Identifier: Apache-2.0
"""Give an instance disk all of its space and metadata before its guest needs them."""

from importlib import metadata as _metadata

from imgprealloc.exceptions import BackingFileUnusable
from imgprealloc.exceptions import BrokenImage
from imgprealloc.exceptions import CommandFailed
from imgprealloc.exceptions import DiskExists
from imgprealloc.exceptions import DiskIsLink
from imgprealloc.exceptions import DiskNotFound
from imgprealloc.exceptions import FileError
from imgprealloc.exceptions import FileInTheWay
from imgprealloc.exceptions import FormatMismatch
from imgprealloc.exceptions import FormatNotCertain
from imgprealloc.exceptions import ImageInUse
from imgprealloc.exceptions import IncompatibleNova
from imgprealloc.exceptions import InvalidSize
from imgprealloc.exceptions import NoSpace
from imgprealloc.exceptions import NotPreallocated
from imgprealloc.exceptions import OwnerNotKept
from imgprealloc.exceptions import PreallocationError
from imgprealloc.exceptions import ProgramKilled
from imgprealloc.exceptions import ProgramMissing
from imgprealloc.exceptions import QemuImgTooOld
from imgprealloc.exceptions import UnsupportedFilesystem
from imgprealloc.exceptions import UnsupportedFormat
from imgprealloc.format import Existing
from imgprealloc.image import DiskImage
from imgprealloc.image import State
from imgprealloc.layout import Layout
from imgprealloc.pace import Pace
from imgprealloc.plan import Plan
from imgprealloc.plan import TreatmentName
from imgprealloc.preallocator import Preallocator
from imgprealloc.progress import Progress
from imgprealloc.settings import Mode
from imgprealloc.settings import OnUnsupported
from imgprealloc.settings import OverlaySubclusters

__version__ = _metadata.version("imgprealloc")

__all__ = (
    "BackingFileUnusable",
    "BrokenImage",
    "CommandFailed",
    "DiskExists",
    "DiskImage",
    "DiskIsLink",
    "DiskNotFound",
    "Existing",
    "FileError",
    "FileInTheWay",
    "FormatMismatch",
    "FormatNotCertain",
    "ImageInUse",
    "IncompatibleNova",
    "InvalidSize",
    "Layout",
    "Mode",
    "NoSpace",
    "NotPreallocated",
    "OnUnsupported",
    "OverlaySubclusters",
    "OwnerNotKept",
    "Pace",
    "Plan",
    "PreallocationError",
    "Preallocator",
    "ProgramKilled",
    "ProgramMissing",
    "Progress",
    "QemuImgTooOld",
    "State",
    "TreatmentName",
    "UnsupportedFilesystem",
    "UnsupportedFormat",
)
