# SPDX-License-Identifier: Apache-2.0
"""Run functional tests with another QEMU's programs, add up what was found, and write doc/source/qemu.rst from it.

    python tools/qemu_versions.py run --programs FOLDER --package TEXT --json FILE [-- pytest's arguments]
    python tools/qemu_versions.py sum [--page] FILE...

FILE is what run writes; for sum, one that is missing counts as a failure. The
page is not written then. The last line that sum prints has the sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from typing import Any

import junit
import rst

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
_PAGE = _REPOSITORY / "doc" / "source" / "qemu.rst"
_EVERYTHING = ["tests/functional"]

MiB = 1 << 20

_TITLE = """\
=============
QEMU versions
=============

"""

# All in braces is read from the results.
_TEXT = """\
``tools/test-qemu`` has run functional tests with these QEMUs, from Debian's packages,
and has written this page. The programs are qemu-img, qemu-io, qemu-nbd and
qemu-storage-daemon; kernel and filesystems are the same for all ({kernels}).

{versions}

"Given back" is what a guest's WRITE ZEROES with unmap of 1 MiB takes from a
preallocated disk with ``discard=ignore``, in KiB. :ref:`guests-that-give-space-back`
says what that means.

Tests that passed, by file of ``tests/functional/`` ({tests} of them):

{files}
{skips}"""


def main(arguments: Sequence[str]) -> int:
    """Do one of the two; 0 if all there is has been tested, and is good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("run")
    verb.add_argument("--programs", required=True, metavar="FOLDER")
    verb.add_argument("--package", required=True, metavar="TEXT")
    verb.add_argument("--json", required=True, metavar="FILE")
    verb.add_argument("tests", nargs="*", default=_EVERYTHING)
    verb.set_defaults(do=_run)
    verb = verbs.add_parser("sum")
    verb.add_argument("--page", action="store_true")
    verb.add_argument("files", nargs="+", metavar="FILE")
    verb.set_defaults(do=_sum)
    options = parser.parse_args(arguments)
    return int(not options.do(options))


def _run(options: argparse.Namespace) -> bool:
    os.environ["PATH"] = f"{options.programs}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(prefix="imgprealloc-qemu-") as scratch:
        given_back = {format: _given_back(pathlib.Path(scratch), format) for format in ("raw", "qcow2")}
        report = pathlib.Path(scratch, "report.xml")
        command = [sys.executable, "-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run([*command, *options.tests], cwd=_REPOSITORY, check=False)
        result = junit.counted(report.read_text() if report.exists() else "<testsuites/>")
    result = {
        "qemu": _version(),
        "package": options.package,
        "kernel": platform.release(),
        "tests": options.tests,
        "given_back": given_back,
        **result,
        "good": done.returncode == 0,
    }
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return bool(result["good"])


def _version() -> str:
    said = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout
    return str(re.findall(r"version (\d[\d.]*)", said)[0])


def _given_back(folder: pathlib.Path, format: str) -> int:
    """Return how many bytes of a preallocated disk WRITE ZEROES with unmap gives back under discard=ignore."""
    disk = folder / f"disk.{format}"
    create = ["qemu-img", "create", "-q", "-f", format, "-o", "preallocation=falloc", str(disk), str(8 * MiB)]
    subprocess.run(create, check=True)
    before = _held(disk, format)
    zero = f"write -q -z -u {2 * MiB} {MiB}"
    subprocess.run(["qemu-io", "-d", "ignore", "-f", format, "-c", zero, disk], check=True)
    return before - _held(disk, format)


def _held(disk: pathlib.Path, format: str) -> int:
    if format == "raw":
        return disk.stat().st_blocks * 512
    # Also a cluster whose space is still held is lost, if the map has forgotten it.
    said = subprocess.run(
        ["qemu-img", "check", "--output=json", "-f", format, disk], stdout=subprocess.PIPE, check=True
    )
    return int(json.loads(said.stdout).get("allocated-clusters", 0)) * 65536


def _sum(options: argparse.Namespace) -> bool:
    results = [json.loads(pathlib.Path(name).read_text()) for name in options.files if os.path.exists(name)]
    missing = len(options.files) - len(results)
    if options.page and not missing:
        _PAGE.write_text(page(results))
    sums = dict.fromkeys(junit.OUTCOMES, 0)
    sums["failed"] = missing
    for result in results:
        told = ", ".join(f"{number} {word}" for word, number in _counts(result).items())
        print(f"QEMU {result['qemu']}: {told}")
        for test, message in result["failures"].items():
            print(f"    {test}: {message}")
        for word, number in _counts(result).items():
            sums[word] += number
    print("qemu: " + ", ".join(f"{number} {word}" for word, number in sums.items()))
    return not sums["failed"] and all(result["good"] for result in results)


def _counts(result: dict[str, Any]) -> dict[str, int]:
    counts = {word: sum(file[word] for file in result["files"].values()) for word in junit.OUTCOMES}
    # A run that ended early has no number of its own.
    counts["failed"] = counts["failed"] or int(not result["good"])
    return counts


def page(results: Sequence[dict[str, Any]]) -> str:
    """Make the page from the results of all versions."""
    results = sorted(results, key=_number)
    files = sorted({file for result in results for file in result["files"]})
    is_all = all(result["tests"] == _EVERYTHING for result in results)
    return _TITLE + _TEXT.format(
        kernels=" or ".join(sorted({f"Linux {result['kernel'].partition('-')[0]}" for result in results})),
        tests="all" if is_all else "some",
        versions=rst.table(
            ("QEMU", "Debian's package", "passed", "failed", "skipped", "given back, raw", "given back, qcow2"),
            [_row(result) for result in results],
        ),
        files=rst.table(
            ("file", *(result["qemu"] for result in results)),
            [(f"``{file}``", *(_cell(result["files"].get(file)) for result in results)) for file in files],
        ),
        skips="".join(
            f"\n* skipped with {result['qemu']}: {reason}\n" for result in results for reason in result["skips"]
        ),
    )


def _number(result: dict[str, Any]) -> list[int]:
    return [int(number) for number in result["qemu"].split(".")]


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    given_back = (str(result["given_back"][format] // 1024) for format in ("raw", "qcow2"))
    return result["qemu"], result["package"], *map(str, _counts(result).values()), *given_back


def _cell(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "not run"
    return f"{counts['passed']}" + (f", {counts['failed']} FAILED" if counts["failed"] else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
