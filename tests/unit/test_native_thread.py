# SPDX-License-Identifier: Apache-2.0
"""That a long system call stops no green thread; eventlet is in a process of its own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

import imgprealloc
from imgprealloc import native_thread

# Each other block of a sparse file is written, so that each is an extent.
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
fallocate.gaps(sys.argv[1], 0, 2**40)
eventlet.sleep(0.05)
assert len(found) >= {extents}, len(found)
print(max(gaps))
"""

_CALLED_DIRECTLY = "import imgprealloc.native_thread as n; n.run = lambda function, *args: function(*args)"


@pytest.fixture(scope="module")
def fragmented(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("fragmented") / "disk"
    with path.open("wb") as file:
        for number in range(_EXTENTS):
            os.pwrite(file.fileno(), b"x", number * 2 * _BLOCK)
        os.fsync(file.fileno())
    return str(path)


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
    pytest.importorskip("eventlet")

    stalled = _longest_gap(fragmented, _CALLED_DIRECTLY)

    assert _longest_gap(fragmented) < stalled / 4


def test_without_eventlet_a_function_is_just_called() -> None:
    assert native_thread.run(lambda a, b: (a, b, os.getpid()), 1, 2) == (1, 2, os.getpid())


def test_eventlet_that_has_patched_nothing_is_not_used() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore'); import eventlet, sys, threading;"
        "from imgprealloc import native_thread;"
        "assert native_thread.run(threading.get_ident) == threading.get_ident(); "
        "assert 'eventlet.tpool' not in sys.modules or not sys.modules['eventlet.tpool']._threads"
    )
    pytest.importorskip("eventlet")
    path = os.pathsep.join([str(pathlib.Path(imgprealloc.__file__ or "").parents[1]), *sys.path])

    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)


def test_forked_process_waits_for_no_thread_that_it_does_not_have() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore'); import eventlet; eventlet.monkey_patch();"
        "import os; from imgprealloc import native_thread; native_thread.run(os.getpid); pid = os.fork();"
        "pid or os._exit(native_thread.run(os.getpid) != os.getpid());"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    pytest.importorskip("eventlet")
    path = os.pathsep.join([str(pathlib.Path(imgprealloc.__file__ or "").parents[1]), *sys.path])

    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=60)
