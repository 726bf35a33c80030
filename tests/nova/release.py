# SPDX-License-Identifier: Apache-2.0
"""Test the Nova of this environment, whichever it is, on native threads and under eventlet.

    python tests/nova/release.py [--json FILE]

Runs the integration's tests, and Nova's own disk tests on our classes; ends
with 0 only if nothing is unexpected. FILE gets the counts, for
tools/nova_releases.py.
"""

from __future__ import annotations

import argparse
from importlib import metadata
import json
import os
import platform
import re
import subprocess
import sys
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
_REPOSITORY = os.path.dirname(os.path.dirname(_HERE))

# The value that Nova's services are told by to leave eventlet alone, or not.
THREADING = {"threads": "true", "eventlet": "false"}


def main() -> int:
    """Run all, print a line for each part, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"nova": metadata.version("nova"), "python": platform.python_version()}
    good = True
    for threading, disabled in THREADING.items():
        env = {**os.environ, "OS_NOVA_DISABLE_EVENTLET_PATCHING": disabled}
        for part, run in (("integration", _integration), ("stock", _stock)):
            counts, passed = run(env)
            results[f"{part}_{threading}"] = counts
            good = good and passed
            print(f"Nova {results['nova']}, {threading}, {part}: {counts}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=2)
    return int(not good)


def _integration(env: dict[str, str]) -> tuple[dict[str, Any], bool]:
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/nova"]
    command += ["--ignore", "tests/nova/test_stock_suite.py"]
    done = subprocess.run(command, env=env, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    if done.returncode:
        print(done.stdout[-20000:], done.stderr[-2000:])
    return counts, done.returncode == 0 and not counts.get("skipped")


def _stock(env: dict[str, str]) -> tuple[dict[str, Any], bool]:
    command = [sys.executable, "-W", "ignore", os.path.join(_HERE, "stock_suite.py")]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=False)
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-20000:])
    return (json.loads(last) if last.startswith("{") else {}), done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
