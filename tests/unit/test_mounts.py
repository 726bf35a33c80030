# SPDX-License-Identifier: Apache-2.0
"""How a file's mount is found; tests/functional/test_mounts.py has real ones."""

from __future__ import annotations

import os
import pathlib

import pytest

from imgprealloc import mounts
from imgprealloc.mounts import Mount

PLAIN = "36 25 254:0 / /srv/nova rw,noatime shared:1 master:2 - ext4 /dev/vda1 rw,errors=remount-ro"
OVERLAY = r"47 27 0:39 / /srv/with\040a\134space rw - overlay overlay rw,lowerdir=/l,upperdir=/u\054\040v,workdir=/w"


@pytest.mark.parametrize(
    ("line", "mount"),
    [
        (PLAIN, Mount("/srv/nova", "ext4", "/dev/vda1", {"rw": "", "errors": "remount-ro"})),
        (
            OVERLAY,
            Mount(
                "/srv/with a\\space",
                "overlay",
                "overlay",
                {"rw": "", "lowerdir": "/l", "upperdir": "/u, v", "workdir": "/w"},
            ),
        ),
        # As many kernels show what has no source.
        ("1 1 0:2 / / rw - rootfs  rw", Mount("/", "rootfs", "", {"rw": ""})),
    ],
)
def test_line_of_the_mount_table_is_taken_apart(line: str, mount: Mount) -> None:
    assert mounts._parsed(line + "\n") == mount


def test_path_that_is_no_utf_8_opens_what_it_names(tmp_path: pathlib.Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    line = b"1 1 0:2 / " + folder + b" rw - ext4 none rw\n"

    assert os.path.isdir(mounts._parsed(line.decode("utf-8", "surrogateescape")).point)


def test_file_has_the_mount_that_it_was_opened_through(tmp_path: pathlib.Path) -> None:
    with open(tmp_path / "file", "wb") as file, open("/proc/self/stat", "rb") as other:
        mount = mounts.of(other.fileno())

        assert mount is not None
        assert (mount.point, mount.type) == ("/proc", "proc")
        assert mounts.identifier(file.fileno()) != mounts.identifier(other.fileno())


def test_types_are_told_apart_by_the_number_of_statfs() -> None:
    with open("/proc/self/stat", "rb") as file:
        assert mounts.number(file.fileno()) == 0x9FA0


def test_file_that_is_not_on_overlayfs_is_held_where_it_is(tmp_path: pathlib.Path) -> None:
    with open("/proc/self/stat", "rb") as file, mounts.holding(file.fileno()) as holder:
        assert holder == file.fileno()
