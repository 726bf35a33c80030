# SPDX-License-Identifier: Apache-2.0
"""What the run of a release counts, and in which modes it runs."""

from __future__ import annotations

from importlib import metadata

import release


def test_release_is_run_in_each_mode_that_its_nova_compute_has() -> None:
    # Nova's own admin guide: nova-compute has had native threads since 33.0.0.
    has_threads = int(metadata.version("nova").split(".")[0]) >= 33

    assert release.modes() == (["eventlet", "threads"] if has_threads else ["eventlet"])


def test_errors_count_as_failures() -> None:
    output = "noise, 7 passed\n1 failed, 2 passed, 3 skipped, 4 warnings, 5 errors in 6.01s"

    assert release.closing_counts(output) == {"passed": 2, "failed": 6, "skipped": 3}


def test_output_that_was_cut_counts_nothing_as_passed() -> None:
    assert release.closing_counts("") == {"passed": 0, "failed": 0, "skipped": 0}
