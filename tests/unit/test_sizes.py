# SPDX-License-Identifier: Apache-2.0
"""Sizes in words. How the command's arguments are read is in test_cli."""

from __future__ import annotations

from typing import Any

from oslo_utils import units
import pytest

from imgprealloc import sizes


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1024, "1 KiB (1024 bytes)"),
        (3 * units.Gi // 2 + 1, "1.5 GiB (1610612737 bytes)"),
        (-5 * units.Mi, "-5 MiB (-5242880 bytes)"),
        (16 * units.Pi, "16384 TiB (18014398509481984 bytes)"),
        (2**63 - 1, "8388608 TiB (9223372036854775807 bytes)"),
    ],
)
def test_error_tells_a_size_as_a_table_does_and_to_the_byte(size: int, told: str) -> None:
    assert sizes.exact(size) == told
    assert told.startswith(sizes.readable(size))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (0, 0),
        ("0", 0),
        (4096, 4096),
        ("10G", 10 * units.Gi),
        ("5%", 5 * units.Gi),
        ("0.5%", units.Gi // 2),
        ("100%", 100 * units.Gi),
        ("1%,10G", units.Gi),
        ("50%, 10G", 10 * units.Gi),
        # What there is not cannot be kept, and so all is.
        ("200G", 200 * units.Gi),
    ],
)
def test_part_of_a_filesystem_is_a_size_a_percentage_or_the_least_of_them(asked: Any, expected: int) -> None:
    assert sizes.part(asked, 100 * units.Gi) == expected


@pytest.mark.parametrize(
    "asked", ["", "%", "1%,", "-1%", "101%", "much", "-1", -1, True, None, 1.5, "1%10G", "\u0661%"]
)
def test_part_that_makes_no_sense_is_refused_with_what_would(asked: Any) -> None:
    with pytest.raises(ValueError, match=r"neither a size such as 10G nor a part such as 5%|more than there is"):
        sizes.part(asked, units.Gi)
