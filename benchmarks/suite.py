# SPDX-License-Identifier: Apache-2.0
"""Measure everything, one part after the other, and tell what of the goals is met.

In full it takes hours on a small machine, in its short form some minutes. Each
part is a program of its own, too. Needs root, fio, and 35 GiB under TMPDIR (in its
short form 10 GiB).
"""

from __future__ import annotations

from collections.abc import Sequence
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import Any

import costs
import goals
import ground
import guest_io
import operations
import page

_BUILD_TIME = os.path.join(os.path.dirname(os.path.abspath(__file__)), "build_time.py")
_CLUSTER_SIZES = ["--cluster-sizes", "64K,128K,256K,512K,1M,2M", "--phase", "first writes", "--phase", "later writes"]

PARTS = {
    "guest_io": (guest_io.main, []),
    "cluster_sizes": (guest_io.main, _CLUSTER_SIZES),
    "operations": (operations.main, []),
    "costs": (costs.main, []),
}
BUILDS = "builds"


def measure(part: str, short: bool) -> Any:
    """Run a part, which prints its table, and return what it measured."""
    if part == BUILDS:
        return [{"filesystem": kind, **build} for kind in ground.FILESYSTEMS for build in _builds(kind, short)]
    program, arguments = PARTS[part]
    with tempfile.NamedTemporaryFile(suffix=".json") as results:
        program([*arguments, "--json", results.name, *(["--short"] if short else [])])
        return next(value for key, value in json.load(results).items() if key != "facts")


def _builds(kind: str, short: bool) -> Any:
    command = [sys.executable, _BUILD_TIME, "--json", "--filesystem", kind, *(["--pairs", "3"] if short else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.communicate()[0]
        finally:
            if process.poll() is None:
                # It unmounts then.
                process.send_signal(signal.SIGINT)
    if process.returncode:
        raise RuntimeError(f"build_time.py ended with status {process.returncode}")
    # The rest is facts.
    return next(value for value in json.loads(said).values() if isinstance(value, list))


def main(arguments: Sequence[str]) -> int:
    parser = ground.parser(__doc__, "fewer disks, and smaller ones: some minutes")
    parser.add_argument(
        "--part", action="append", choices=(*PARTS, BUILDS), help="default: all; in short not cluster_sizes"
    )
    args = parser.parse_args(arguments)
    parts = args.part or [part for part in (*PARTS, BUILDS) if not (args.short and part == "cluster_sizes")]
    found: dict[str, Any] = {"facts": ground.facts(), "form": "in its short form" if args.short else "in full"}
    for part in parts:
        print(f"\n== {part}", flush=True)
        found[part] = measure(part, args.short)
        if args.json:
            # After each, because the next one may take an hour.
            pathlib.Path(args.json).write_text(json.dumps(found) + "\n")
    results = page.read(json.dumps(found))
    print("\n== goals")
    for goal in goals.all_goals(results.guest_io, results.all_operations):
        worst = f"; worst: {goal.worst.ratio}, {goal.worst.disk}, {goal.worst.where}" if goal.cases else ""
        print(f"{goal.verdict:24}{goal.title}{worst}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
