# SPDX-License-Identifier: Apache-2.0
"""How a request is shown that is only planned: a row for each disk, a line for each filesystem."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any, Optional

from cliff.columns import FormattableColumn
from oslo_utils import units

from imgprealloc import sizes
from imgprealloc.cli import disks
from imgprealloc.cli.request import Share
from imgprealloc.cli.working import Outcome
from imgprealloc.plan import Plan

# Bytes a second that writing and copying are taken to make, for want of a measurement: more than a hard disk makes,
# less than most SSDs. What is only set aside takes a fraction of a second.
RATE = 200 * units.Mi

COLUMNS = (
    "instance",
    "path",
    "format",
    "state",
    "treatment",
    "state_after",
    "new_space",
    "temporary_space",
    "written",
    "estimated_seconds",
    "filesystem",
    "fits",
    "error",
)
_SHORT_COLUMNS = {
    "instance": "short instance",
    "disk": "disk",
    "treatment": "way",
    "state then": "state_after",
    "new space": "new_space",
    "takes": "estimated_seconds",
}
_LONG_COLUMNS = (
    "path",
    "format",
    "state",
    "treatment",
    "state_after",
    "new_space",
    "temporary_space",
    "estimated_seconds",
    "fits",
)

# What is told of a disk, whether there is a plan for it or not.
_OF_OUTCOME = ("instance", "short instance", "disk", "path", "error")


class Seconds(FormattableColumn):  # type: ignore[misc, type-arg]
    """A time that is estimated: in one unit in a table, in seconds elsewhere."""

    def human_readable(self) -> str:
        """Return it in seconds, minutes or hours; no time for less than one."""
        seconds = self._value
        for unit, length in (("h", 3600), ("min", 60), ("s", 1)):
            if seconds >= 2 * length or (length == 1 and seconds):
                return f"{seconds / length:.0f} {unit}"
        return "no time"


def seconds(plan: Plan, rate: Optional[int]) -> int:
    """Estimate how long a plan takes.

    :param rate: bytes a second that are written at the most
    """
    return -(-plan.written // min(RATE, rate or RATE))


def table(
    outcomes: Iterable[Outcome], shares: Iterable[Share], parsed_args: argparse.Namespace
) -> tuple[Iterable[str], Iterable[tuple[Any, ...]]]:
    """Make a table of plans, for whoever is to read it.

    :param outcomes: of the looks at the disks, in the order of the rows, with what
        will keep them from what was asked for
    """
    columns: dict[str, str] = {name: name for name in COLUMNS}
    if parsed_args.formatter == "table" and not parsed_args.columns:
        columns = {name: name for name in _LONG_COLUMNS} if parsed_args.long else _SHORT_COLUMNS
    cells = {path: found for share in shares for path, found in _cells(share, parsed_args.rate)}
    nothing = {"state": disks.State(None), "state_after": disks.State(None)}

    def row(outcome: Outcome) -> tuple[Any, ...]:
        found = cells.get(outcome.path, nothing)
        return tuple(
            disks.cell(outcome, column) if column in _OF_OUTCOME else found.get(column) for column in columns.values()
        )

    return tuple(columns), [row(outcome) for outcome in outcomes]


def summary(shares: Iterable[Share], keep_free: object) -> Iterator[str]:
    """Say of each filesystem what would be done on it, and whether all of that fits."""
    for share in shares:
        counts = ", ".join(f"{number} {treatment}" for treatment, number in sorted(share.treatments.items())) or "none"
        copies = f" ({sizes.readable(share.peak)} on the way)" if share.peak > max(0, share.space) else ""
        fits = f"{len(share.left_out)} left out, for want of space" if share.left_out else "all fits"
        refused = f", {len(share.refused)} refused" if share.refused else ""
        yield (
            f"{share.mount_point}: {counts}; {sizes.readable(share.space)} of new space{copies}, "
            f"{sizes.readable(share.available)} may be taken (keep free: {keep_free}): {fits}{refused}"
        )


def _cells(share: Share, rate: Optional[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return what a table, or a machine, may have of each plan, by its path."""
    for plan, instead in (
        *((plan, None) for plan in share.order),
        *((plan, "left out") for plan in share.left_out),
        *((plan, "refused") for plan in share.refused),
    ):
        yield (
            plan.path,
            {
                "format": plan.image.format,
                "state": disks.State(plan.image.state),
                "treatment": plan.treatment,
                "way": instead or plan.treatment,
                "state_after": disks.State(plan.image.state if instead else plan.state),
                "new_space": disks.Size(plan.space),
                "temporary_space": disks.Size(plan.temporary),
                "written": disks.Size(plan.written),
                "estimated_seconds": Seconds(seconds(plan, rate)),
                "filesystem": share.mount_point,
                "fits": instead != "left out",
            },
        )
