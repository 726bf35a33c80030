# SPDX-License-Identifier: Apache-2.0
"""imgprealloc metrics: for Prometheus, by way of node_exporter's textfile collector."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, get_args

from imgprealloc.cli import new_file
from imgprealloc.cli import working
from imgprealloc.cli.examples import Example
from imgprealloc.image import State

if TYPE_CHECKING:
    import prometheus_client

_BEGINS = "# HELP imgprealloc_"
"""How a file of metrics begins."""


class Metrics(working.Working):
    """Print what Prometheus can collect: disks by state, and what filesystems are short of."""

    examples = (
        Example("See them", "imgprealloc metrics"),
        Example(
            "Have node_exporter collect them, from a timer",
            "imgprealloc metrics -o /var/lib/prometheus/node-exporter/imgprealloc.prom",
        ),
    )

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "-o",
            "--output",
            metavar="FILE",
            help="write FILE, and let it appear only when it is whole; older metrics are replaced, and nothing else. "
            "node_exporter wants its name to end in .prom",
        )
        working.add_paths(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        """Look at all disks; 0 if all could be read, and the file written."""
        # It reads of this process what it can as it is imported, and cliff imports this module for every verb.
        import prometheus_client

        outcomes = self.look_at(parsed_args)
        text = prometheus_client.generate_latest(_registry(outcomes, self.unread(outcomes))).decode()
        if parsed_args.output is None:
            self.app.stdout.write(text)
            return self.status
        try:
            new_file.write_whole(parsed_args.output, text, _BEGINS)
        except new_file.InTheWay as exc:
            self._tell(exc)
        except OSError as exc:
            self._tell(f"{parsed_args.output}: {exc.strerror}. Check the folder and its permissions.")
        return self.status


def _registry(outcomes: list[working.Outcome], unread: int) -> prometheus_client.CollectorRegistry:
    """Make metrics of what was found.

    :param unread: how many disks, and folders, could not be read
    """
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()

    def gauge(name: str, help: str, *labels: str) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(f"imgprealloc_{name}", help, labels, registry=registry)

    disks = gauge("disks", "Disks of instances, by what their space is worth.", "filesystem", "state")
    short = gauge("short_bytes", "Bytes that the disks of a filesystem may still ask it for.", "filesystem")
    available = gauge("available_bytes", "Bytes that a filesystem has for them.", "filesystem")
    for found in working.by_filesystem(outcomes):
        for state in get_args(State):
            disks.labels(found.mount_point, state).set(found.states[state])
        short.labels(found.mount_point).set(found.short)
        available.labels(found.mount_point).set(found.available)
    errors = gauge("errors", "Disks that could not be read, and folders that could not be looked into for disks.")
    errors.set(unread)
    gauge("look_timestamp_seconds", "When the disks were looked at.").set_to_current_time()
    return registry
