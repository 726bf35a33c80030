# SPDX-License-Identifier: Apache-2.0
"""imgprealloc check-nova."""

from __future__ import annotations

import argparse
from typing import Any

from cliff import lister

from imgprealloc import check_nova
from imgprealloc.cli import examples
from imgprealloc.cli.examples import Example


class CheckNova(lister.Lister):
    """Tell whether the Nova in this environment, as configured, preallocates its instances."""

    examples = (
        Example("Ask as the user of nova-compute, who may see less", "sudo -u nova imgprealloc check-nova"),
        Example(
            "Ask where nothing tells how nova-compute is started", "imgprealloc check-nova --config-file ./nova.conf"
        ),
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument(
            "--config-file",
            action="append",
            default=[],
            metavar="FILE",
            help="nova.conf, as given to nova-compute; may be repeated (default: what this host's nova-compute was "
            "started with; else what its service would start it with; else where Nova looks for it)",
        )
        parser.add_argument("--long", action="store_true", help="list every place in Nova that was compared, too")
        examples.add(parser, self.examples)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        """Look at everything; people are told the answer first, then what is not good, then the rest."""
        self.findings = list(check_nova.check(parsed_args.config_file))
        shown = self.findings
        if parsed_args.formatter == "table":
            bad = sum(not found.good for found in self.findings)
            answer = "will be preallocated"
            if bad:
                answer = f"will NOT be preallocated as promised: {bad} of these are not good"
            elif any(found.wants_restart for found in self.findings):
                answer = "will be preallocated once nova-compute has been restarted"
            self.app.stdout.write(f"Instances {answer}.\n")
            shown = sorted(self.findings, key=lambda found: found.good)
            if not parsed_args.long:
                shown = [found for found in shown if not (found.good and found.is_one_of_many)]
        return ("subject", "good", "detail"), [(found.subject, found.good, found.detail) for found in shown]

    def run(self, parsed_args: argparse.Namespace) -> int:
        """Show what was found; 0 only if instances will be preallocated."""
        super().run(parsed_args)
        return int(not all(found.good for found in self.findings))
