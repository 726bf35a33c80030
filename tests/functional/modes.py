# SPDX-License-Identifier: Apache-2.0
"""The modes of a Preallocator, as tests are parametrized by them."""

from typing import get_args

from imgprealloc import Mode

MODES: tuple[Mode, ...] = get_args(Mode)
# Those that hold the space.
SPACE_MODES: tuple[Mode, ...] = ("falloc", "full")
