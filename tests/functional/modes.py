# SPDX-License-Identifier: Apache-2.0
"""The modes of a Preallocator, as tests are parametrized by them."""

from typing import Literal

Mode = Literal["falloc", "full", "metadata"]

MODES: tuple[Mode, ...] = ("falloc", "full", "metadata")
# Those that hold the space.
SPACE_MODES: tuple[Mode, ...] = ("falloc", "full")
