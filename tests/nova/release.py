# SPDX-License-Identifier: Apache-2.0
"""Test the Nova of this environment, whichever it is, in each mode that its nova-compute has.

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
THREADING = {"eventlet": "false", "threads": "true"}

# Of Nova's own suite _stock() runs more, and once is enough.
_PART_OF_STOCK = "tests/nova/test_stock_suite.py::test_novas_own_tests_pass_but_for_those_that_assert_the_bug"

# Nova 32 has native threads for its API and scheduler, but its libvirt driver
# goes through eventlet's tpool in whatever mode; before 32 there are none at all.
_PROBE = """
import warnings
warnings.simplefilter("ignore")
import nova.cmd.compute, nova.utils, nova.virt.libvirt.host
is_in_threads = getattr(nova.utils, "concurrency_mode_threading", lambda: False)
needs_eventlet = hasattr(nova.virt.libvirt.host, "tpool")
print("threads" if is_in_threads() and not needs_eventlet else "eventlet")
"""


def main() -> int:
    """Run all, print a line for each part, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    version = metadata.version("nova")
    results: dict[str, Any] = {
        "nova": version,
        "requires_python": metadata.metadata("nova")["Requires-Python"],
        "python": platform.python_version(),
        "qemu": _qemu_version(),
        "modes": {},
    }
    good = True
    for mode in modes():
        results["modes"][mode] = {}
        for part, run in (("integration", _integration), ("stock", _stock)):
            counts, passed = run(_environment(mode))
            results["modes"][mode][part] = {**counts, "good": passed}
            good = good and passed
            told = ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "skipped"))
            print(f"Nova {version}, {mode}, {part}: {'good' if passed else 'FAILED'}: {told}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=2)
    return int(not good)


def modes() -> list[str]:
    """Return those of THREADING that this release's nova-compute can run in.

    :raises: CalledProcessError for a nova-compute that cannot even be imported
    """
    found = []
    for mode in THREADING:
        command = [sys.executable, "-c", _PROBE]
        done = subprocess.run(command, env=_environment(mode), cwd="/", stdout=subprocess.PIPE, text=True, check=True)
        if done.stdout.split()[-1] == mode:
            found.append(mode)
    return found


def _environment(mode: str) -> dict[str, str]:
    return {**os.environ, "OS_NOVA_DISABLE_EVENTLET_PATCHING": THREADING[mode]}


def _qemu_version() -> str:
    done = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True)
    return str(re.findall(r"version (\d[\d.]*)", done.stdout)[0])


def _integration(env: dict[str, str]) -> tuple[dict[str, Any], bool]:
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/nova"]
    command += ["--deselect", _PART_OF_STOCK]
    done = subprocess.run(command, env=env, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    counts = closing_counts(done.stdout)
    good = done.returncode == 0 and counts["passed"] > 0 and not counts["skipped"]
    if not good:
        # All of it, because the first failure may be why the others are there.
        print(done.stdout, done.stderr[-2000:])
    return counts, good


def closing_counts(output: str) -> dict[str, int]:
    """Read pytest's last line; an error, as in a fixture, counts as a failure."""
    last = (output.splitlines() or [""])[-1]
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    failed = found.get("failed", 0) + found.get("error", 0)
    return {"passed": found.get("passed", 0), "failed": failed, "skipped": found.get("skipped", 0)}


def _stock(env: dict[str, str]) -> tuple[dict[str, Any], bool]:
    command = [sys.executable, "-W", "ignore", os.path.join(_HERE, "stock_suite.py")]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=False)
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-20000:])
    counts = json.loads(last) if last.startswith("{") else {"passed": 0, "failed": 0, "skipped": 0}
    return counts, done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
