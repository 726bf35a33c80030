# SPDX-License-Identifier: Apache-2.0
"""What the unit tests share: a host whose programs are played, and a clean memory."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import logging
import os

import pytest

from imgprealloc import log
from imgprealloc import looks
from imgprealloc import qemu_img
from imgprealloc import record
from imgprealloc import refilling

from .host import Host
from .host import Programs
from .host import opened_by_qemu


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Forget what the library remembers for the life of a process."""
    qemu_img.forget()
    log.forget()
    looks.forget()
    record.forget()
    refilling.forget()
    yield
    qemu_img.forget()
    log.forget()
    looks.forget()
    record.forget()
    refilling.forget()


@pytest.fixture
def programs() -> Iterator[Programs]:
    """Give a fake processutils.execute."""
    with Programs() as fake:
        yield fake


@pytest.fixture
def host(tmp_path: os.PathLike[str]) -> Iterator[Host]:
    """Give a fake host, whose disks are in a folder of their own."""
    folder = os.path.join(tmp_path, "instance")
    os.mkdir(folder)
    with Host(folder) as fake:
        yield fake


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[str]]:
    """Give a function that returns what was logged at a level."""
    caplog.set_level(logging.DEBUG, logger="imgprealloc")
    return lambda level: [record.getMessage() for record in caplog.records if record.levelno == level]


@pytest.fixture
def opened() -> Iterator[Callable[[str], object]]:
    """Give a function that opens an image for writing as QEMU does, until the test is over."""
    with contextlib.ExitStack() as guests:
        yield lambda path: guests.enter_context(opened_by_qemu(path))
