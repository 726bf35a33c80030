# SPDX-License-Identifier: Apache-2.0
"""Give an instance disk all of its space and metadata before its guest needs them."""

from imgprealloc.exceptions import PreallocationError
from imgprealloc.image import DiskImage
from imgprealloc.preallocator import Preallocator
from imgprealloc.preallocator import Qcow2Preallocator
from imgprealloc.preallocator import RawPreallocator

__all__ = (
    "DiskImage",
    "PreallocationError",
    "Preallocator",
    "Qcow2Preallocator",
    "RawPreallocator",
)
