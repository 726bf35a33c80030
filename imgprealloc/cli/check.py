# SPDX-License-Identifier: Apache-2.0
"""imgprealloc check: for monitoring, in one line, as monitoring plugins speak.

Source of the form: Monitoring Plugins Development Guidelines.
"""

from __future__ import annotations

import argparse
import collections
from typing import get_args

from imgprealloc import healing
from imgprealloc import sizes
from imgprealloc.cli import working
from imgprealloc.cli.examples import Example
from imgprealloc.image import State

_OK, _WARNING, _CRITICAL, _UNKNOWN = range(4)
_NAMES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")

_GOOD = {"held": set(healing.HELD), "preallocated": {"preallocated"}}


class Check(working.Working):
    """Tell monitoring in one line whether all disks have their space: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.

    A warning: some have not, or are not all that --level asks for. Critical: a
    filesystem has less than its disks may still ask for. Unknown: some disks
    cannot be read.
    """

    examples = (
        Example("All disks of this host's instances, for a monitoring agent", "imgprealloc check"),
        Example("A host on which old disks are to be rewritten, too", "imgprealloc check --level preallocated"),
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--level",
            choices=tuple(_GOOD),
            default="held",
            help="what a good disk is: its space is held (reserved, preallocated), or its clusters are mapped as well "
            "(default: held)",
        )
        working.add_paths(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        """Look at all disks, and return the exit status."""
        outcomes = self.look_at(parsed_args)
        states = collections.Counter(image.state for image in working.read(outcomes))
        errors = self.unread(outcomes)
        found = list(working.by_filesystem(outcomes))
        full = [each for each in found if each.short > each.available]
        if full:
            status = _CRITICAL
        elif self.status:
            status = _UNKNOWN
        else:
            status = _WARNING if states.keys() - _GOOD[parsed_args.level] else _OK
        said = [f"{number} {state}" for state, number in states.most_common()]
        said += [f"{errors} cannot be read"] if errors else []
        said += [
            f"{each.mount_point} has {sizes.readable(each.available)}, and its disks are "
            f"{sizes.readable(each.short)} short"
            for each in full
        ]
        data = {"short": f"{sum(each.short for each in found)}B", "errors": errors}
        data.update({state: states[state] for state in get_args(State)})
        values = " ".join(f"{name}={value}" for name, value in data.items())
        self.app.stdout.write(f"DISKS {_NAMES[status]}: {', '.join(said) or 'no disk'} | {values}\n")
        return status
