# SPDX-License-Identifier: Apache-2.0
"""The pace of long writing."""

from __future__ import annotations

from typing import Any

import pytest

from imgprealloc import Pace
from imgprealloc import pace


@pytest.mark.parametrize("rate", ["10M", 1.5, True])
def test_rate_that_is_no_number_of_bytes_is_a_type_error(rate: Any) -> None:
    with pytest.raises(TypeError, match=repr(rate)):
        Pace(rate)


@pytest.mark.parametrize("rate", [0, -1])
def test_rate_at_which_nothing_would_be_done_is_refused(rate: int) -> None:
    with pytest.raises(ValueError, match=str(rate)):
        Pace(rate)


def test_nobody_else_is_thought_of_by_default_and_after_the_block() -> None:
    before = pace.current()
    with pace.kept(Pace(1)):
        within = pace.current()

    assert (before, within, pace.current()) == (None, Pace(1), None)


@pytest.mark.parametrize(("rate", "as_slow_as"), [(None, 4000), (8000, 4000), (800, 800)])
def test_program_may_be_slower_the_slower_it_is_told_to_be(rate: int | None, as_slow_as: int) -> None:
    # It waits for all others besides.
    assert Pace(rate).slowest(4000) < as_slow_as
    assert Pace(rate).slowest(4000) == Pace(as_slow_as).slowest(1 << 40)
