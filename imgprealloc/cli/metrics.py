# SPDX-License-Identifier: Apache-2.0
"""imgprealloc metrics: for Prometheus, by way of node_exporter's textfile collector."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, get_args

from imgprealloc.cli import working
from imgprealloc.cli.examples import Example
from imgprealloc.image import State

if TYPE_CHECKING:
    import prometheus_client


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
            help="write FILE, and let it appear only when it is whole; its name ends in .prom",
        )
        working.add_paths(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        """Look at all disks; 0 if all could be read, and the file written."""
        # It reads of this process what it can as it is imported, and cliff imports this module for every verb.
        import prometheus_client

        registry = _registry(self.look_at(parsed_args))
        if parsed_args.output is None:
            self.app.stdout.write(prometheus_client.generate_latest(registry).decode())
            return self.status
        try:
            prometheus_client.write_to_textfile(parsed_args.output, registry)
        except OSError as exc:
            self.app.LOG.error("%s: %s. Check the folder and its permissions.", parsed_args.output, exc.strerror)
            return 1
        return self.status


def _registry(outcomes: list[working.Outcome]) -> prometheus_client.CollectorRegistry:
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
    errors = gauge("errors", "Disks that could not be read.")
    errors.set(sum(outcome.image is None for outcome in outcomes))
    gauge("look_timestamp_seconds", "When the disks were looked at.").set_to_current_time()
    return registry
