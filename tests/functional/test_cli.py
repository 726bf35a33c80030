# SPDX-License-Identifier: Apache-2.0
"""The command as an operator types it, in a process of its own, on real disks."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import images
import pytest

MiB = 1 << 20

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def imgprealloc(folder: pathlib.Path) -> Command:
    """Give a function that runs the command in the disks' folder."""

    def imgprealloc(*argv: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "imgprealloc.cli", *map(str, argv)],
            capture_output=True, text=True, check=False, cwd=folder, timeout=30,
        )  # fmt: skip

    return imgprealloc


def shown(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return what a command with -f json has shown of its one disk."""
    assert done.returncode == 0, done.stderr
    (disk,) = json.loads(done.stdout)
    return dict(disk)


def test_what_is_shown_of_an_overlay_is_what_qemu_and_the_filesystem_have(
    imgprealloc: Command, folder: pathlib.Path, base: pathlib.Path
) -> None:
    disk = images.qcow2(folder / "disk", 32 * MiB, backing=base)
    images.qemu_io(disk, "write -P 0x5a 3M 1M")

    found = shown(imgprealloc("show", "-f", "json", "disk"))

    assert found.pop("shortfall") > 31 * MiB
    assert found == {
        "instance": None,
        "name": None,
        "path": "disk",
        "format": "qcow2",
        "virtual_size": 32 * MiB,
        "file_size": disk.stat().st_size,
        "allocated_size": images.allocated(disk),
        "backing_file": str(base),
        "clusters": 512,
        "mapped_clusters": 16,
        "fragmented_clusters": 0,
        "shared_bytes": 0,
        "in_use": False,
        "state": "thin",
        "error": None,
    }


def test_create_allocate_and_resize_end_with_preallocated_disks(
    imgprealloc: Command, folder: pathlib.Path, base: pathlib.Path
) -> None:
    images.qcow2(folder / "novas", 32 * MiB, backing=base)

    states = [
        shown(imgprealloc(*argv, "-f", "json"))["state"]
        for argv in (
            ("create", "--backing", base, "--backing-format", "raw", "ours", "26M"),
            ("resize", "--disk-format", "qcow2", "ours", "32M"),
            ("create", "--disk-format", "raw", "raw", "8M"),
            ("allocate", "--disk-format", "qcow2", "novas"),
        )
    ]

    assert states == ["preallocated"] * 4
    assert imgprealloc("show", "--check", "ours", "raw", "novas").returncode == 0
    assert not images.differences(folder / "ours", folder / "novas")


def test_check_of_a_thin_disk_ends_with_3(imgprealloc: Command, folder: pathlib.Path) -> None:
    images.sparse_file(folder / "disk", 8 * MiB)

    done = imgprealloc("show", "--check", "-f", "value", "-c", "state", "disk")

    assert (done.returncode, done.stdout) == (3, "thin\n")


def test_path_that_cannot_be_read_ends_with_1_after_the_rest_is_shown(
    imgprealloc: Command, folder: pathlib.Path
) -> None:
    images.sparse_file(folder / "disk", 8 * MiB)

    os.mkfifo(folder / "fifo")

    done = imgprealloc("show", "--check", "-f", "value", "-c", "path", "-c", "state", "missing", "fifo", "disk")

    assert (done.returncode, done.stdout) == (1, "missing None\nfifo None\ndisk thin\n")


def test_cluster_size_that_there_is_not_ends_with_2(imgprealloc: Command, folder: pathlib.Path) -> None:
    done = imgprealloc("create", "--overlay-cluster-size", "4K", "disk", "8M")

    assert (done.returncode, os.listdir(folder)) == (2, [])


def test_raw_disk_that_a_guest_wrote_a_qcow2_header_to_stays_raw(imgprealloc: Command, folder: pathlib.Path) -> None:
    disk = images.qcow2(folder / "disk", 1024 * MiB)
    os.truncate(disk, 8 * MiB)
    before = images.file_digest(disk)
    (folder / "disk.info").write_text(json.dumps({str(disk): "raw"}))

    found = shown(imgprealloc("allocate", "-f", "json", "disk"))

    assert (found["format"], found["virtual_size"], found["state"]) == ("raw", 8 * MiB, "preallocated")
    assert images.file_digest(disk) == before


@pytest.mark.parametrize("linked", [False, True])
def test_fifo_of_the_name_disk_info_is_not_waited_for(imgprealloc: Command, folder: pathlib.Path, linked: bool) -> None:
    images.sparse_file(folder / "disk", 8 * MiB)
    os.mkfifo(folder / ("fifo" if linked else "disk.info"))
    if linked:
        (folder / "disk.info").symlink_to("fifo")

    assert shown(imgprealloc("show", "-f", "json", "disk"))["format"] == "raw"


@pytest.mark.parametrize("closed", [(2,), (1,), (0, 1, 2)], ids=str)
def test_disk_is_not_opened_as_a_standard_file_that_is_closed(folder: pathlib.Path, closed: tuple[int, ...]) -> None:
    disk = images.sparse_file(folder / "disk", 8 * MiB)

    def close() -> None:
        for fd in closed:
            os.close(fd)

    done = subprocess.run(
        [sys.executable, "-m", "imgprealloc.cli", "allocate", "--mode", "full", "--disk-format", "raw", disk],
        capture_output=True, text=True, check=False, timeout=30, preexec_fn=close,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert images.holes(disk) == 0
    assert images.file_digest(disk) == images.file_digest(images.sparse_file(folder / "zeros", 8 * MiB))


@pytest.mark.parametrize("form", ["table", "value", "csv"])
def test_name_that_is_no_text_is_told_as_it_is(folder: pathlib.Path, form: str) -> None:
    name = b"d\xffsk"
    os.close(os.open(os.fsencode(folder) + b"/" + name, os.O_WRONLY | os.O_CREAT))

    done = subprocess.run(
        [sys.executable, "-m", "imgprealloc.cli", "show", "--disk-format", "raw", "-f", form, name],
        capture_output=True, check=False, timeout=30, cwd=folder,
        # As where the locale is one in UTF-8.
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert name in done.stdout


@pytest.mark.parametrize(
    ("encoding", "told"), [("ascii", b"\\xe9\\u78c1"), ("latin-1", b"\xe9\\u78c1"), ("utf-8", "\u00e9\u78c1".encode())]
)
@pytest.mark.parametrize("form", ["table", "value", "csv"])
def test_name_whose_letters_a_terminal_has_not_is_told_all_the_same(
    folder: pathlib.Path, form: str, encoding: str, told: bytes
) -> None:
    (folder / "\u00e9\u78c1").touch()

    done = subprocess.run(
        [sys.executable, "-m", "imgprealloc.cli", "show", "--disk-format", "raw", "-f", form, "\u00e9\u78c1"],
        capture_output=True, check=False, timeout=30, cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": f"{encoding}:strict"},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert told in done.stdout


@pytest.mark.parametrize("kind", ["btrfs"])
def test_disks_of_two_subvolumes_are_added_up_once(imgprealloc: Command, folder: pathlib.Path, kind: str) -> None:
    disks = []
    for name in ("one", "two"):
        images.run("btrfs", "-q", "subvolume", "create", folder / name)
        disks.append(images.sparse_file(folder / name / "disk", 8 * MiB))

    lines = imgprealloc("show", "--disk-format", "raw", *disks).stdout.splitlines()

    assert len({disk.stat().st_dev for disk in disks}) == 2
    assert [line for line in lines if " available" in line] == lines[-1:]
    assert ": 2 thin; 16 MiB short, " in lines[-1]
