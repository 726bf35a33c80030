# SPDX-License-Identifier: Apache-2.0
"""imgprealloc allocate."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any, Optional

from imgprealloc import sizes
from imgprealloc.cli import abreast
from imgprealloc.cli import disks
from imgprealloc.cli import plans
from imgprealloc.cli import request
from imgprealloc.cli import working
from imgprealloc.cli.examples import Example
from imgprealloc.cli.request import Share
from imgprealloc.cli.working import Outcome
from imgprealloc.format import Existing
from imgprealloc.image import DiskImage
from imgprealloc.image import State
from imgprealloc.plan import Plan
from imgprealloc.plan import TreatmentName
from imgprealloc.preallocator import Preallocator

# As they are told, and in this order.
_DONE: Mapping[TreatmentName, str] = {
    "recreate": "made anew",
    "rewrite": "rewritten",
    "reserve": "reserved",
    "fill": "filled",
    "write": "written",
    "none": "left as they were",
}


class Allocate(disks.Allocating):
    """Preallocate disks that exist; what their guests read stays the same.

    A disk with data in it stays the same file, unless --rewrite is given; a qcow2
    disk that nothing was ever written to, and that nobody has open, is made anew.
    All of it is planned first, for each filesystem. What does not fit is left
    out: the disks that need least come first, so that most get their space.
    """

    examples = (
        Example(
            "See what would be done to all disks of this host's instances, and whether it fits",
            "imgprealloc allocate --dry-run",
        ),
        Example(
            "Do it, also while they run, and leave others a twentieth of each filesystem",
            "imgprealloc allocate --keep-free 5%",
        ),
        Example(
            "Copy a disk of an instance that is shut off, at a rate that its neighbours bear",
            "imgprealloc allocate --rewrite --rate 100M /var/lib/nova/instances/0d7a2c1e*/disk",
        ),
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--rewrite",
            action="store_true",
            help="copy disks that have data into preallocated ones, instead of only reserving their space",
        )
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="only tell what would be done: to each disk, with the space and roughly the time that it takes (at "
            f"{sizes.readable(plans.RATE)} a second, where something is written), and whether it all fits",
        )
        working.add_paths(parser)
        return parser

    def columns(self, parsed_args: argparse.Namespace) -> Sequence[str]:
        return plans.COLUMNS if parsed_args.dry_run else super().columns(parsed_args)

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Plan for all disks, then preallocate one after the other."""
        existing: Existing = "rewrite" if parsed_args.rewrite else "recreate_blank"
        strategy, format = self.preallocator(parsed_args), parsed_args.disk_format
        planned: dict[str, Plan] = {}

        def look(path: str) -> DiskImage:
            planned[path] = strategy.plan(path, existing, format=format)
            return planned[path].image

        def work(path: str) -> DiskImage:
            with bar.of(path) as progress:
                return strategy.preallocate(
                    path, existing, format=format, known=planned[path].image, progress=progress,
                    pace=self.pace(parsed_args),
                )  # fmt: skip

        def lack(image: DiskImage) -> Optional[str]:
            return _lack(strategy, image, image.state, is_rewritten=parsed_args.rewrite, is_done=True)

        asked = self.named(parsed_args.paths)
        first = working.first_names(asked)
        paths = list(dict.fromkeys(first.values()))
        outcomes = {outcome.path: outcome for outcome in self.each(paths, look, at_once=abreast.cpus())}
        shares = request.shares(planned[path] for path in paths if path in planned)
        for share in shares:
            for plan in share.left_out:
                outcomes[plan.path] = self.not_done(plan.path, plan.image, f"{plan.path}: {share.why_left_out(plan)}")
            for plan in share.refused:
                outcomes[plan.path] = self.not_done(plan.path, plan.image, str(plan.error))
        if parsed_args.dry_run:
            for plan in _in_order(shares):
                lacking = _lack(strategy, plan.image, plan.state, is_rewritten=parsed_args.rewrite, is_done=False)
                if plan.error is not None or lacking is not None:
                    error = f"{plan.path}: {lacking}" if plan.error is None else str(plan.error)
                    outcomes[plan.path] = self.not_done(plan.path, plan.image, error)
            self.summary = list(plans.summary(shares, parsed_args.keep_free))
            return plans.table([outcomes[first[path]] for path in asked], shares, parsed_args)
        order = [plan.path for plan in _in_order(shares)]
        bar = self.progress_bar(len(order))
        done = self.each(order, work, lack=lack, asked=len(outcomes))
        outcomes.update((outcome.path, outcome) for outcome in done)
        shown = self.shown([outcomes[first[path]] for path in asked], parsed_args)
        self.summary.append(_summary(outcomes.values(), done, planned, shares))
        return shown

    @staticmethod
    def default(field: dataclasses.Field[Any]) -> Any:
        """Return what a setting is for disks that exist."""
        for_existing = field.metadata["for_existing"]
        return field.default if for_existing is None else for_existing


def _in_order(shares: Iterable[Share]) -> list[Plan]:
    return [plan for share in shares for plan in share.order]


def _lack(
    strategy: Preallocator, image: DiskImage, state: State, *, is_rewritten: bool, is_done: bool
) -> Optional[str]:
    """Say what of a request is not done to a disk that had no error, and what would do it.

    :param state: in which it is then
    :param is_done: whether it has been treated already
    """
    if state == "preallocated":
        # Whatever the filesystem could do for others.
        return None
    wanted = "reserved"
    if not strategy.holds_space(image.path):
        wanted = "mapped" if image.format == "qcow2" else "thin"
    elif is_rewritten or strategy.mode == "full":
        wanted = "preallocated"
    if state == wanted:
        return None
    if is_rewritten:
        found = f"it is {state}, and was not rewritten" if is_done else f"it would be {state}, and not rewritten"
        return f"{found}. See the warning for what keeps it from that, then try again."
    return (
        f"mode {strategy.mode} leaves it {state}, because it has data in it. With the instance shut off, --rewrite "
        "copies it into a disk that is all that."
    )


def _summary(
    outcomes: Iterable[Outcome], done: Iterable[Outcome], planned: Mapping[str, Plan], shares: Iterable[Share]
) -> str:
    """Say how many disks were treated in which way, what that has taken, and how many were not."""
    worked = [outcome for outcome in done if outcome.image is not None]
    ways = collections.Counter(planned[outcome.path].treatment for outcome in worked)
    left_out = sum(len(share.left_out) for share in shares)
    failed = sum(outcome.error is not None for outcome in outcomes) - left_out
    more = sum(_held(outcome.image) - _held(planned[outcome.path].image) for outcome in worked if outcome.image)
    counts = [f"{ways[name]} {told}" for name, told in _DONE.items() if ways[name]]
    counts += [f"{number} {told}" for number, told in ((left_out, "left out"), (failed, "failed")) if number]
    return f"{', '.join(counts) or 'No disk'}; {sizes.readable(more)} more held than before."


def _held(image: DiskImage) -> int:
    """Return the bytes that a disk has for itself."""
    return image.held_size - image.shared_bytes
