# SPDX-License-Identifier: Apache-2.0
"""Ratios of what was measured side by side: of each pair one ratio, of all ratios the median and the quartiles.

A machine that is slow for seconds at a time is slow for both of a pair, which
is why this is not the ratio of two medians.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import statistics


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of what was measured, with what half of it lies between."""

    low: float
    median: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles.

    :raises: ValueError for no values
    """
    if not values:
        raise ValueError("there is nothing to take the median of")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high, len(values))


def ratio(dividends: Sequence[float], divisors: Sequence[float]) -> Spread:
    """Return the spread of the ratios of pairs.

    :param dividends: in the order in which they were measured
    :param divisors: what was measured beside them, in the same order
    :raises: ValueError unless each has its partner
    """
    if len(dividends) != len(divisors):
        raise ValueError(f"{len(dividends)} and {len(divisors)} values make no pairs")
    return spread([dividend / divisor for dividend, divisor in zip(dividends, divisors)])
