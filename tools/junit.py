# SPDX-License-Identifier: Apache-2.0
"""What a run of pytest has to say, from its report in JUnit's XML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

OUTCOMES = ("passed", "failed", "skipped")


def counted(report: str) -> dict[str, Any]:
    """Count the tests in a report of pytest (JUnit XML), by file; name what has failed and why some were skipped."""
    files: dict[str, dict[str, int]] = {}
    failures: dict[str, str] = {}
    skips: list[str] = []
    for name, file, outcome, message in _cases(report):
        counts = files.setdefault(file, dict.fromkeys(OUTCOMES, 0))
        counts[outcome] += 1
        if outcome == "failed":
            failures[f"{file}::{name}"] = message
        if outcome == "skipped":
            skips.append(message)
    return {"files": files, "failures": failures, "skips": sorted(set(skips))}


def _cases(report: str) -> Iterator[tuple[str, str, str, str]]:
    for case in ElementTree.fromstring(report).iter("testcase"):
        outcome, message = "passed", ""
        for child in case:
            # An error is that of a fixture, or of a whole file.
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                message = (child.get("message") or "").partition("\n")[0]
        # A file that cannot be imported has no class.
        file = (case.get("classname") or case.get("name") or "").rpartition(".")[2]
        yield case.get("name") or "", file, outcome, message
