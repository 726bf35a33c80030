# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the modules in tools/ and beside the tests can be imported."""

import pathlib
import signal
import sys

import pytest

_HERE = pathlib.Path(__file__).parent

sys.path[:0] = [str(_HERE), str(_HERE.parent / "tools")]


def pytest_configure(config: pytest.Config) -> None:
    """End on SIGTERM as on Ctrl-C, so that timeout(1) and a CI runner leave neither mounts nor files behind."""
    default = signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.add_cleanup(lambda: signal.signal(signal.SIGTERM, default))
