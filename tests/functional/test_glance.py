# SPDX-License-Identifier: Apache-2.0
"""The quick look beside qemu-img's: what it calls preallocated is that, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import subprocess

import images
import pytest

from imgprealloc import DiskImage
from imgprealloc import Preallocator
from imgprealloc import cluster_map
from imgprealloc import disk_file
from imgprealloc import glance

MiB = 1 << 20
SIZE = 64 * MiB

FILESYSTEMS = pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])


def _glance(path: pathlib.Path, format: str) -> DiskImage | None:
    with disk_file.opened(str(path)) as file:
        return {"raw": glance.raw, "qcow2": glance.qcow2}[format](file)


def _same(path: pathlib.Path, format: str) -> None:
    """Compare what a quick look says of a preallocated disk with what qemu-img says; it alone counts fragments."""
    found, asked = _glance(path, format), Preallocator().inspect(path, format=format)
    assert asked.state == "preallocated"
    assert found is not None
    fields = set(DiskImage.__dataclass_fields__) - {"stamp", "fragmented_clusters"}
    assert {name: getattr(found, name) for name in fields} == {name: getattr(asked, name) for name in fields}


@FILESYSTEMS
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 * MiB])
def test_preallocated_disk_is_seen_to_be_one(folder: pathlib.Path, cluster_size: int) -> None:
    # In small clusters there are many tables; the last one is used in part.
    path = images.qcow2(folder / "disk", SIZE + 3 * 512, cluster_size=cluster_size)
    Preallocator().preallocate(path, format="qcow2")

    _same(path, "qcow2")


@FILESYSTEMS
@pytest.mark.parametrize("cluster_size", [16384, 131072, 2 * MiB])
@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_preallocated_overlay_is_seen_to_be_one(
    folder: pathlib.Path, base: pathlib.Path, cluster_size: int, mode: str
) -> None:
    path = folder / "disk"
    strategy = Preallocator(mode, overlay_cluster_size=cluster_size)  # type: ignore[arg-type]
    strategy.create(path, SIZE, str(base), backing_format="raw")
    images.qemu_io(path, "write -P 7 1M 100k", "write -P 7 40M 512")

    _same(path, "qcow2")


@FILESYSTEMS
@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_preallocated_raw_disk_is_seen_to_be_one(folder: pathlib.Path, mode: str) -> None:
    path = folder / "disk"
    Preallocator(mode).create(path, SIZE, format="raw")  # type: ignore[arg-type]
    images.qemu_io(path, "write -P 7 1M 100k", format="raw")

    _same(path, "raw")


def _preallocated(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "disk"
    Preallocator().create(path, SIZE)
    assert _glance(path, "qcow2") is not None
    return path


def _entry(path: pathlib.Path, number: int) -> int:
    """Return where in the file the entry of a cluster is in the first L2 table."""
    with path.open("rb") as file:
        file.seek(40)
        file.seek(int.from_bytes(file.read(8), "big"))
        return (int.from_bytes(file.read(8), "big") & 0x00FFFFFFFFFFFE00) + number * 8


def _write(path: pathlib.Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def _edited(offset: int, content: bytes) -> Callable[[pathlib.Path], None]:
    return lambda path: _write(path, offset, content)


def _entry_edited(number: int, position: int, content: bytes) -> Callable[[pathlib.Path], None]:
    return lambda path: _write(path, _entry(path, number) + position, content)


def _l1_offset(path: pathlib.Path) -> int:
    with path.open("rb") as file:
        file.seek(40)
        return int.from_bytes(file.read(8), "big")


# SIZE has 1024 clusters of 64 KiB.
@pytest.mark.parametrize(
    "spoil",
    [
        _entry_edited(0, 0, bytes(8)),
        _entry_edited(1023, 0, bytes(8)),
        # Not COPIED: a snapshot's too.
        _entry_edited(500, 0, b"\x00"),
        # Compressed.
        _entry_edited(500, 0, b"\xc0"),
        # Reads as zeros.
        _entry_edited(500, 7, b"\x01"),
        # Without a place.
        _entry_edited(500, 1, bytes(6)),
        # Beyond the file's end.
        _entry_edited(500, 1, b"\x7f"),
        lambda path: _write(path, _l1_offset(path), bytes(8)),
        lambda path: _write(path, _l1_offset(path), b"\x00"),
        lambda path: _write(path, _l1_offset(path) + 1, b"\xff" * 6),
        # Dirty, corrupt, with a data file, compressed by zstd, unknown.
        *(_edited(79, bytes([1 << bit])) for bit in (0, 1, 2, 3, 5)),
        # Bitmaps.
        _edited(95, b"\x01"),
        # Encrypted; a snapshot.
        _edited(35, b"\x01"),
        _edited(63, b"\x01"),
        # Its size: none, larger than the file, all there is; its clusters.
        _edited(24, bytes(8)),
        _edited(24, (2 * SIZE).to_bytes(8, "big")),
        _edited(24, b"\xff" * 8),
        _edited(20, b"\xff" * 4),
        _edited(20, (8).to_bytes(4, "big")),
        # The L1 table: none, too short, elsewhere, nowhere.
        _edited(36, bytes(4)),
        _edited(40, b"\xff" * 8),
        _edited(40, b"\x7f" + b"\xff" * 7),
        # Another version, another format, half a header.
        _edited(4, (4).to_bytes(4, "big")),
        _edited(0, b"QFI\x00"),
        lambda path: os.truncate(path, 90),
        # Space given back.
        lambda path: images.run("fallocate", "-p", "-o", 32 * MiB, "-l", 4096, path),
        lambda path: images.qemu_io(path, "discard 32M 64k"),
        lambda path: images.qemu_io(path, "write -z -u 32M 64k"),
        lambda path: images.run("qemu-img", "snapshot", "-c", "one", path),
        lambda path: images.run("qemu-img", "resize", "-q", "-f", "qcow2", path, 2 * SIZE),
    ],
)  # fmt: skip
def test_whatever_is_odd_is_left_to_qemu_img(folder: pathlib.Path, spoil: Callable[[pathlib.Path], object]) -> None:
    path = _preallocated(folder)

    spoil(path)

    assert _glance(path, "qcow2") is None


@pytest.mark.parametrize("kind", ["ext4"])
def test_header_that_promises_more_than_there_can_be_has_nothing_read(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Terabytes, in clusters of 512 bytes, in a file that is as long, and empty.
    path = images.qcow2(folder / "disk", SIZE, cluster_size=512)
    os.truncate(path, 1 << 43)
    _write(path, 24, (1 << 42).to_bytes(8, "big"))
    _write(path, 36, b"\xff" * 4)
    reads: list[int] = []
    pread = os.pread

    def listening(fd: int, length: int, offset: int) -> bytes:
        reads.append(length)
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", listening)

    assert _glance(path, "qcow2") is None
    # The header, once.
    assert reads == [4096]


def test_tables_of_more_than_a_bound_are_not_read(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _preallocated(folder)
    monkeypatch.setattr(cluster_map, "_MOST_TABLES", 8 * 1023)

    assert _glance(path, "qcow2") is None


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_thin_disk_is_not_preallocated(folder: pathlib.Path, format: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", format, folder / "disk", str(SIZE)], check=True)

    assert _glance(folder / "disk", format) is None


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_of_stock_nova_is_not_preallocated(folder: pathlib.Path, format: str) -> None:
    path = folder / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", format, path, str(SIZE)], check=True)
    subprocess.run(["fallocate", "-n", "-l", str(SIZE), path], check=True)

    # Of a raw one it is.
    assert (_glance(path, format) is None) == (format == "qcow2")


def test_raw_disk_that_is_no_multiple_of_a_sector_is_left_to_qemu_img(folder: pathlib.Path) -> None:
    path = images.random_file(folder / "disk", MiB + 1)

    assert _glance(path, "raw") is None


@pytest.mark.parametrize("kind", ["xfs"])
def test_shared_extent_is_seen(folder: pathlib.Path) -> None:
    path = images.random_file(folder / "disk", MiB)
    assert _glance(path, "raw") is not None

    subprocess.run(["cp", "--reflink=always", path, folder / "copy"], check=True)

    assert _glance(path, "raw") is None


@pytest.mark.parametrize("kind", ["btrfs"])
def test_disk_that_is_copied_on_write_is_not_held(folder: pathlib.Path) -> None:
    path = images.random_file(folder / "disk", MiB)

    assert _glance(path, "raw") is None


@pytest.mark.parametrize("kind", ["tmpfs"])
def test_filesystem_that_cannot_tell_is_left_to_qemu_img(folder: pathlib.Path) -> None:
    path = images.random_file(folder / "disk", MiB)

    assert _glance(path, "raw") is None
