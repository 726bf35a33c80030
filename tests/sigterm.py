# SPDX-License-Identifier: Apache-2.0
"""End on SIGTERM as on Ctrl-C, so that timeout(1) and a CI runner leave no mounts and no files; a plugin of pytest."""

import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    default = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def restore() -> None:
        signal.signal(signal.SIGTERM, default)

    config.add_cleanup(restore)
