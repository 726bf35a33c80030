# SPDX-License-Identifier: Apache-2.0
"""Write doc/source/releases.rst from what tests/nova/release.py found with each Nova.

    python tools/nova_releases.py FILE...

FILE is what release.py --json wrote.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

_DOC = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "doc", "source", "releases.rst")

_HEAD = """\
=============
Nova releases
=============

Every supported release, tested by ``tox -e nova-27`` to ``nova-34``: the
integration's own tests, and Nova's own tests of all that has to do with disks, on
our classes in the place of its Flat and Qcow2. This table is written by
``tools/nova_releases.py`` from such a run.

"""

_FOOT = """
"passed" counts the tests that passed, or were skipped by Nova itself. "expected to
fail" are the two named ``test_prealloc_image``, of Flat and of Qcow2, which assert
the one ``fallocate`` of the virtual size that is the bug.
"""

_COLUMNS = (
    "Nova",
    "Python",
    "threads: ours",
    "threads: Nova's",
    "eventlet: ours",
    "eventlet: Nova's",
    "expected to fail",
)


def row(result: dict[str, Any]) -> tuple[str, ...]:
    """Make a row of the table from one file."""
    cells = [result["nova"], result["python"]]
    failed = set()
    for threading in ("threads", "eventlet"):
        ours, stock = result[f"integration_{threading}"], result[f"stock_{threading}"]
        wrong = ours.get("failed", 0) + ours.get("error", 0)
        cells.append(f"{ours.get('passed', 0)} passed" + (f", {wrong} FAILED" if wrong else ""))
        odd = len(stock.get("unexpected_failures", "?")) + len(stock.get("unexpected_successes", "?"))
        passed = stock.get("run", 0) - stock.get("failed", 0)
        cells.append(f"{passed} passed" + (f", {odd} ODD" if odd else ""))
        failed.add(stock.get("failed", 0))
    return (*cells, ", ".join(map(str, sorted(failed))))


def main(files: list[str]) -> int:
    """Write the page; 0 if there is a row for each file."""
    rows = []
    for name in files:
        with open(name) as file:
            rows.append(row(json.load(file)))
    rows.sort()
    table = [_COLUMNS, *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    lines = [rule, lines[0], rule, *lines[1:], rule]
    with open(_DOC, "w") as file:
        file.write(_HEAD + "\n".join(lines) + "\n" + _FOOT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
