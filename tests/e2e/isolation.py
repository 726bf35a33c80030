# SPDX-License-Identifier: Apache-2.0
"""Run each test by a pytest of its own, in mount and process namespaces that end with it.

Nova's services leave threads behind that may never end, libvirt has one
place for its state, and a guest outlives its libvirt. All of that goes with
the namespaces: nothing is left on the machine, whatever went wrong. Knows
nothing of what the tests do.
"""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

# Set inside: where the reports go.
_REPORTS = "IMGPREALLOC_E2E_REPORTS"

# Many times what a test takes, for when all else on the machine is busy too.
_TIME_LIMIT = 480
_TIME_TO_SAY_WHERE = 20

_NAMESPACE = (
    # So that they end with this process too.
    "setpriv", "--pdeathsig", "KILL",
    "unshare", "--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child", "--mount-proc",
    # The first process of a namespace inherits the others, and has to notice
    # when they end. A shell does, Python does not.
    "sh", "-c", '"$@"; exit $?', "sh",
)  # fmt: skip

_TAIL = 8000


def is_inside() -> bool:
    """Whether this is the pytest that runs one test."""
    return _REPORTS in os.environ


def write(config: pytest.Config, report: pytest.TestReport) -> None:
    """Hand a report to the outer pytest."""
    data = config.hook.pytest_report_to_serializable(config=config, report=report)
    with open(os.environ[_REPORTS], "a") as file:
        file.write(json.dumps(data) + "\n")


def reports_of(item: pytest.Item) -> Iterator[pytest.TestReport]:
    """Run a test, and return what it reported."""
    with tempfile.TemporaryDirectory(prefix="e2e-", ignore_cleanup_errors=True) as directory:
        reports = pathlib.Path(directory, "reports")
        output = pathlib.Path(directory, "output")
        ended = _run(item, directory, reports, output)
        # A last line without an end is of a process that was stopped as it wrote.
        lines = reports.read_text().split("\n")[:-1] if reports.exists() else []
        found = [
            item.config.hook.pytest_report_from_serializable(config=item.config, data=json.loads(line))
            for line in lines
        ]
        yield from found
        if not any(report.when == "teardown" for report in found):
            said = output.read_text(errors="replace")[-_TAIL:]
            yield pytest.TestReport(
                item.nodeid, item.location, {}, "failed", f"{ended}, and before that it said:\n{said}", "call"
            )


def _run(item: pytest.Item, directory: str, reports: pathlib.Path, output: pathlib.Path) -> str:
    argv = [
        *_NAMESPACE, sys.executable, "-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider",
        "-o", f"faulthandler_timeout={_TIME_LIMIT - _TIME_TO_SAY_WHERE}", f"--rootdir={item.config.rootpath}",
        "-o", "log_level=INFO", "--log-disable=placement.requestlog", str(item.config.rootpath / item.nodeid),
    ]  # fmt: skip
    environment = {**os.environ, _REPORTS: str(reports), "TMPDIR": directory}
    with output.open("wb") as file:
        # Not in the checkout, so that what is installed is tested, and not what lies there.
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, cwd=directory
        )
        try:
            return f"it ended with {process.wait(timeout=_TIME_LIMIT)}"
        except subprocess.TimeoutExpired:
            return f"it had not ended after {_TIME_LIMIT} s"
        finally:
            # With unshare go the namespaces and all that is in them.
            process.kill()
            process.wait()
