# SPDX-License-Identifier: Apache-2.0
"""A whole request, planned for each filesystem before the first disk is touched.

Where not all of it fits, the disks that need least come first, so that as many
as can be get their space; the rest is left out.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
import dataclasses

from imgprealloc import exceptions
from imgprealloc import sizes
from imgprealloc.cli import by_mount
from imgprealloc.plan import Plan
from imgprealloc.plan import TreatmentName


@dataclasses.dataclass(frozen=True)
class Share:
    """What of a request is on one filesystem. Sizes are bytes.

    :param order: the plans that fit, in the order in which they do
    :param left_out: those that do not
    :param refused: those that would be refused, whatever space there is
    """

    mount_point: str
    available: int
    order: tuple[Plan, ...]
    left_out: tuple[Plan, ...]
    refused: tuple[Plan, ...]

    @property
    def treatments(self) -> collections.Counter[TreatmentName]:
        """How many disks are treated in which way."""
        return collections.Counter(plan.treatment for plan in self.order)

    @property
    def space(self) -> int:
        """What it takes more in the end."""
        return sum(plan.space for plan in self.order)

    @property
    def peak(self) -> int:
        """What has to be there at the most, on the way."""
        taken = peak = 0
        for plan in self.order:
            peak = max(peak, taken + plan.needed)
            taken += plan.space
        return peak

    def why_left_out(self, plan: Plan) -> str:
        """Say why a plan is not carried out, and what would help."""
        if plan.error is not None:
            return f"left out: {plan.error.reason}. {plan.error.remedy}"
        return (
            f"left out: it needs {sizes.exact(plan.needed)} more, and disks that need less come first, of "
            f"{sizes.exact(self.available)} that may be taken of {self.mount_point}. Free space, or let less be kept "
            "free (--keep-free)."
        )


def shares(plans: Iterable[Plan]) -> list[Share]:
    """Say for each filesystem what fits, and what does not."""
    return [_shared(mount_point, found) for mount_point, found in by_mount.together(plans, lambda plan: plan.image)]


def _shared(mount_point: str, plans: list[Plan]) -> Share:
    parts: dict[str, list[Plan]] = {"refused": [], "order": [], "left_out": []}
    available, taken = min(plan.available for plan in plans), 0
    # Those that need the same stay in the order that was asked for.
    for plan in sorted(plans, key=lambda plan: plan.needed):
        if plan.refused and not isinstance(plan.error, exceptions.NoSpace):
            parts["refused"].append(plan)
        elif taken + plan.needed > available:
            parts["left_out"].append(plan)
        else:
            parts["order"].append(plan)
            taken += plan.space
    return Share(mount_point, available, **{name: tuple(found) for name, found in parts.items()})
