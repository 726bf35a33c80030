# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import pathlib

import fixtures
import pytest

from imgprealloc.cli import new_file

OLD, NEW = "<svg>old</svg>", "<svg>new</svg>"


def test_file_is_written(tmp_path: pathlib.Path) -> None:
    new_file.write_whole(str(tmp_path / "new.svg"), NEW, "<svg")

    assert os.listdir(tmp_path) == ["new.svg"]
    assert (tmp_path / "new.svg").read_text() == NEW


def test_older_one_is_replaced_by_another_file(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "old.svg"
    target.write_text(OLD)
    before = target.stat().st_ino

    new_file.write_whole(str(target), NEW, "<svg")

    assert (target.read_text(), os.listdir(tmp_path)) == (NEW, ["old.svg"])
    assert target.stat().st_ino != before


@pytest.mark.parametrize("content", [b"QFI\xfb" + bytes(100), bytes(512), b""], ids=["qcow2", "raw", "empty"])
def test_disk_that_is_named_by_mistake_stays(tmp_path: pathlib.Path, content: bytes) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(content)

    with pytest.raises(new_file.InTheWay, match="may be a disk"):
        new_file.write_whole(str(disk), NEW, "<svg")

    assert (disk.read_bytes(), os.listdir(tmp_path)) == (content, ["disk"])


def test_fifo_is_not_waited_for(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    with pytest.raises(new_file.InTheWay):
        new_file.write_whole(str(tmp_path / "fifo"), NEW, "<svg")


def test_failure_leaves_the_older_one_and_nothing_beside_it(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "old.svg"
    target.write_text(OLD)

    def fail(fd: int) -> None:
        raise OSError(28, os.strerror(28))

    with fixtures.MockPatchObject(os, "fsync", fail), pytest.raises(OSError, match="No space"):
        new_file.write_whole(str(target), NEW, "<svg")

    assert (target.read_text(), os.listdir(tmp_path)) == (OLD, ["old.svg"])
