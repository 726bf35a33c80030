# SPDX-License-Identifier: Apache-2.0
"""Add up what tests/nova/release.py found with each Nova, and write doc/source/releases.rst from it.

    python tools/nova_releases.py [--page] FILE...

FILE is what release.py --json wrote; one that is missing counts as a failure.
With --page the page is written, unless a file is missing. The last line printed
has the sums.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import pathlib
import re
import sys
import textwrap
from typing import Any, Optional

import rst

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
_PAGE = _REPOSITORY / "doc" / "source" / "releases.rst"
_RELEASES = _REPOSITORY / "tests" / "nova" / "releases"

_MODES = {"eventlet": "eventlet", "threads": "native threads"}

_TITLE = """\
=============
Nova releases
=============

"""

# All in braces is read from the results, from tests/nova/releases/ or from setup.cfg.
_TEXT = """\
Nova {first} to {last}, by ``tools/test-releases``, which has
also written this page. It tests each release in each mode that its
``nova-compute`` can run in, with two sets of tests:

* "ours" is ``tests/nova/``: this release's image backends and libvirt driver with
  imgprealloc, on real qemu-img and a real filesystem, and the patch in ``contrib/``;
* "Nova's own" are Nova's tests of all that has to do with disks, by Nova's own
  runner, on our classes in the place of its Flat and Qcow2.

``tools/test-releases {oldest} {newest}`` tests two of them, and ``tox -e nova-{oldest}``
one. QEMU was {qemu}.

{results}

"expected" are those of Nova's tests that have to fail on our classes; the run
fails if one of them passes, or if any other does not:

{expected}

"skipped" are tests of Nova's, none of ours, that Nova itself marks as failing, or
leaves out with these words::

{skipped}

Python
======

imgprealloc needs Python {least}; each Nova says what it needs itself. Beside that,
some libraries have become too new for older releases, and pip would choose them;
the last column is for Nova itself and its tests, and is in ``tests/nova/releases/``.

{environments}
"""


def main(arguments: list[str]) -> int:
    """Print the sums, write the page; 0 if all there is has been tested, and is good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("files", nargs="+", metavar="FILE")
    options = parser.parse_args(arguments)
    results = [json.loads(pathlib.Path(name).read_text()) for name in options.files if os.path.exists(name)]
    missing = len(options.files) - len(results)
    if options.page and not missing:
        _PAGE.write_text(page(results))
    sums = [sum(counts) for counts in zip(*map(_counts, results))] or [0, 0, 0]
    sums[1] += missing
    print("releases: {} passed, {} failed, {} skipped".format(*sums))
    return int(bool(sums[1]))


def _counts(result: dict[str, Any]) -> tuple[int, int, int]:
    parts = [part for mode in result["modes"].values() for part in mode.values()]
    return (
        sum(part["passed"] for part in parts),
        sum(map(_failures, parts)),
        sum(part["skipped"] for part in parts),
    )


def _failures(part: dict[str, Any]) -> int:
    # A run that ended early, and a test that ought to have failed, have no number of their own.
    return int(part["failed"] or not part["good"])


def page(results: list[dict[str, Any]]) -> str:
    """Make the page from the results of all releases."""
    results = sorted(results, key=lambda result: [int(number) for number in result["nova"].split(".")])
    setup = configparser.ConfigParser()
    setup.read(_REPOSITORY / "setup.cfg")
    expected = {
        test: reason
        for result in results
        for mode in result["modes"].values()
        for test, reason in mode["stock"].get("expected_failures", {}).items()
    }
    reasons = {
        " ".join(reason.split())
        for result in results
        for mode in result["modes"].values()
        for reason in mode["stock"].get("skip_reasons", ())
    }
    text = _TEXT.format(
        first=_named(results[0]),
        last=_named(results[-1]),
        oldest=_number(results[0]),
        newest=_number(results[-1]),
        qemu=" or ".join(sorted({result["qemu"] for result in results})),
        least=setup["metadata"]["python_requires"],
        results=rst.table(
            ("Nova", "mode", "ours", "Nova's own", "skipped", "expected"),
            [_row(result, mode) for result in results for mode in _MODES],
        ),
        expected="\n".join(
            f"* ``{'.'.join(test.split('.')[-3:])}``\n  {reason}" for test, reason in sorted(expected.items())
        ),
        skipped="\n".join(_quoted(reason) for reason in sorted(reasons)),
        environments=rst.table(
            ("Nova", "series", "it needs Python", "tested with", "older than pip would choose"),
            [_environment(result) for result in results],
        ),
    )
    return _TITLE + text


def _quoted(reason: str) -> str:
    return textwrap.fill(reason, 80, initial_indent="    ", subsequent_indent="      ")


def _number(result: dict[str, Any]) -> str:
    return str(result["nova"]).split(".")[0]


def _named(result: dict[str, Any]) -> str:
    return f"{result['nova']} ({_requirements(result)[0]})"


def _row(result: dict[str, Any], mode: str) -> tuple[str, ...]:
    found: Optional[dict[str, Any]] = result["modes"].get(mode)
    if found is None:
        return result["nova"], _MODES[mode], "its nova-compute has no such mode", "", "", ""
    ours, stock = found["integration"], found["stock"]
    expected = str(len(stock.get("expected_failures", ())))
    return result["nova"], _MODES[mode], _passed(ours), _passed(stock), str(stock["skipped"]), expected


def _passed(part: dict[str, Any]) -> str:
    failures = _failures(part)
    return f"{part['passed']} passed" + (f", {failures} FAILED" if failures else "")


def _environment(result: dict[str, Any]) -> tuple[str, ...]:
    series, pins = _requirements(result)
    return result["nova"], series, result["requires_python"], result["python"], ", ".join(pins)


def _requirements(result: dict[str, Any]) -> tuple[str, list[str]]:
    """Return a release's series and what its environment needs beside it, from tests/nova/releases."""
    lines = (_RELEASES / f"nova-{_number(result)}.txt").read_text().splitlines()
    series = re.findall(r"\d{4}\.\d", lines[0])[0]
    return series, [line for line in lines if not line.startswith(("#", "nova=="))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
