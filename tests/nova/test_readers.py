# SPDX-License-Identifier: Apache-2.0
"""Builds beside programs that read all disks: Nova's image cache, imgprealloc metrics, backups, virus scanners."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import subprocess
import threading
from typing import Any, BinaryIO

from compute_host import KINDS
import images
import nova_disks
from oslo_utils import units
import pytest

import imgprealloc
from imgprealloc import healing
from imgprealloc import zeros

SIZE = 256 * units.Mi

MODES = pytest.mark.parametrize("mode", ["falloc", "full"])


def _is_written(path: str) -> bool:
    with open(path, "r+b") as file:
        zeros.forget_reads(file.fileno())
        return not zeros.has_unwritten(file.fileno(), more_than=zeros.MOST_OF_METADATA)


@contextlib.contextmanager
def _looked_at(folder: str) -> Iterator[list[str]]:
    """Have all disks looked at again and again, as Nova's image cache does each 40 minutes of a build that takes hours.

    :returns: the disks, one for each look
    """
    seen: list[str] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.05):
            for name in os.listdir(folder):
                path = os.path.join(folder, name, "disk")
                info = ["qemu-img", "info", "--force-share", path]
                if os.path.exists(path) and not subprocess.run(info, capture_output=True, check=False).returncode:
                    seen.append(path)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


@MODES
@KINDS
def test_build_goes_on_whoever_looks_at_its_disk_meanwhile(
    disks: Callable[..., nova_disks.Disks], small_base: str, kind: str, mode: str
) -> None:
    made = disks(imgprealloc__mode=mode)

    with _looked_at(made.instances_path) as seen:
        path = made.spawn(small_base, SIZE, image_type=kind).path

    assert imgprealloc.Preallocator().inspect(path, format=kind).state == "preallocated"
    assert images.reads_like(path, kind, small_base)
    if mode == "full":
        assert _is_written(path)
        # It was long enough for a look.
        assert path in seen


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BinaryIO]]:
    """Have each disk opened as soon as Nova has made it, and kept open, as by a backup that is slow."""
    opened: list[BinaryIO] = []
    preallocate_new = healing.preallocate_new
    with contextlib.ExitStack() as stack:

        def read(strategy: Any, path: str, *rest: Any) -> None:
            opened.append(stack.enter_context(open(path, "rb")))
            preallocate_new(strategy, path, *rest)

        monkeypatch.setattr(healing, "preallocate_new", read)
        yield opened


@MODES
@KINDS
def test_disk_that_somebody_reads_is_built_where_it_is_and_has_its_space(
    disks: Callable[..., nova_disks.Disks],
    small_base: str,
    readers: list[BinaryIO],
    kind: str,
    mode: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = disks(imgprealloc__mode=mode)

    path = made.spawn(small_base, SIZE, image_type=kind).path

    image = imgprealloc.Preallocator().inspect(path, format=kind)
    assert (image.shortfall, image.state in healing.HELD) == (0, True)
    assert images.reads_like(path, kind, small_base)
    # A raw disk of mode falloc is not made anew.
    assert os.path.samestat(os.stat(path), os.fstat(readers[0].fileno()))
    assert ("not made anew" in caplog.text) == ((kind, mode) != ("raw", "falloc"))


@MODES
def test_disk_that_somebody_reads_and_for_which_there_is_no_space_is_not_built(
    disks: Callable[..., nova_disks.Disks], small_base: str, readers: list[BinaryIO], mode: str
) -> None:
    made = disks(imgprealloc__mode=mode)

    with pytest.raises(imgprealloc.NoSpace):
        made.spawn(small_base, units.Ti)

    assert not os.path.exists(readers[0].name)
