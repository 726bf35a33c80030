# SPDX-License-Identifier: Apache-2.0
"""That a long look at a fragmented disk stops no green thread; eventlet is in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
import os
import pathlib
import subprocess
import sys

import loop_filesystem
from oslo_utils import units
import pytest

import imgprealloc

# Each other block of a sparse file is set aside, so that each is an extent.
_EXTENTS = 1_000_000
_BLOCK = 4096

# What is asked of the disk, by a process that is patched as nova-compute is; its answer is the longest time, in
# seconds, for which a green thread had to wait that wanted to run each 5 ms.
_LONGEST_GAP = """
import warnings
warnings.simplefilter("ignore")
import eventlet
eventlet.monkey_patch()
import sys, time
{before}
from imgprealloc import fallocate

gaps = [0.0]
def tick():
    last = time.monotonic()
    while True:
        eventlet.sleep(0.005)
        gaps.append(time.monotonic() - last)
        last = time.monotonic()

ticker = eventlet.spawn(tick)
eventlet.sleep(0.05)
gaps.clear()
found = fallocate.extents(sys.argv[1])
fallocate.held(found, 2**40)
fallocate.gaps(found, 0, 2**40)
eventlet.sleep(0.05)
assert len(found) >= {extents}, len(found)
print(max(gaps))
"""

_CALLED_DIRECTLY = "import imgprealloc.native_thread as n; n.run = lambda function, *args: function(*args)"


@pytest.fixture
def fragmented() -> Iterator[str]:
    """Give a disk on a filesystem that goes as a whole; to remove the file takes minutes where the host trims."""
    with loop_filesystem.mounted("ext4", 12 * units.Gi) as mount_point:
        path = os.path.join(mount_point, "disk")
        with open(path, "wb") as file:
            for number in range(_EXTENTS):
                os.posix_fallocate(file.fileno(), number * 2 * _BLOCK, _BLOCK)
        yield path


def _longest_gap(disk: str, before: str = "") -> float:
    code = _LONGEST_GAP.format(before=before, extents=_EXTENTS)
    path = os.pathsep.join([str(pathlib.Path(imgprealloc.__file__ or "").parents[1]), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", code, disk],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return float(ended.stdout)


def test_green_threads_go_on_while_the_extents_of_a_fragmented_disk_are_counted(fragmented: str) -> None:
    # A stall is what this is about, and not speed: the control, which calls the same directly, waits for all of it.
    stalled = _longest_gap(fragmented, _CALLED_DIRECTLY)

    assert _longest_gap(fragmented) < stalled / 4
