# SPDX-License-Identifier: Apache-2.0
"""Programs and rights without which a test cannot run."""

from __future__ import annotations

from collections.abc import Iterable
import os
import shutil

import pytest


def require(programs: Iterable[str]) -> None:
    """Skip where one of these programs is missing, or root; in CI that is a failure."""
    missing = [program for program in programs if shutil.which(program) is None]
    if os.geteuid():
        missing.append("root, for mount")
    if missing:
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop(f"needs {', '.join(missing)}")
