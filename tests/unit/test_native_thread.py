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
