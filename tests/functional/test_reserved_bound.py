# SPDX-License-Identifier: Apache-2.0
"""What a reserved disk may grow to: no guest's writes make its file longer than was told.

A guest writes, zeroes and discards at random, then its whole disk in random
order. Where it gives clusters back and writes more than one at a time, there is
no such bound: there the file grows by no more than was given back on top of it.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import os
import pathlib
import random
import subprocess
from typing import Any

import images
import loop_filesystem
import pytest

from imgprealloc import Preallocator
from imgprealloc import qcow2_header
from imgprealloc import worst_case

KiB, MiB = 1 << 10, 1 << 20

SECTOR = 512
CLUSTER_SIZES = tuple(1 << bits for bits in range(9, 22))
REFCOUNT_BITS = (16, 64, 1)

# What a guest does: gives nothing back; or does, and writes in one cluster at a
# time; or in as many as it likes.
KEEPS, PIECES, ANYHOW = "keeps", "pieces", "anyhow"
GUESTS = (KEEPS, PIECES, ANYHOW)

SEEDS = range(80)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A disk of the fuzz, with the guest that it gets. Sizes are bytes."""

    seed: int
    guest: str

    @property
    def cluster_size(self) -> int:
        return CLUSTER_SIZES[self.seed % len(CLUSTER_SIZES)]

    @property
    def refcount_bits(self) -> int:
        return REFCOUNT_BITS[(self.seed // 13 + self.seed // 39) % len(REFCOUNT_BITS)]

    @property
    def extended_l2(self) -> bool:
        return self.cluster_size >= 16 * KiB and self.seed % 2 == 0

    @property
    def has_base(self) -> bool:
        return self.seed // 2 % 2 == 0

    @property
    def size(self) -> int:
        chosen = random.Random(f"size {self.seed}")
        clusters = chosen.randint(60, 700)
        if self.cluster_size < 2 * KiB:
            # What the refcount table describes as long as it is of one cluster; past that it has to move. How far
            # that leads past the end shows where the disk ends just there.
            described = self.cluster_size // 8 * self.cluster_size * 8 // self.refcount_bits
            with_its_metadata = 1 + 8 / self.cluster_size + self.refcount_bits / 8 / self.cluster_size
            edge = int(described / with_its_metadata)
            clusters = edge + chosen.randint(-40, 20) if edge < 20000 else chosen.randint(2000, 6000)
        # Mostly with a last cluster that is none in full.
        return min(max(clusters * self.cluster_size, MiB), 48 * MiB) + SECTOR * chosen.randint(0, 5)

    def make(self, path: pathlib.Path, base: pathlib.Path) -> None:
        """Make it thin, as it was made before imgprealloc came."""
        options: dict[str, Any] = {"cluster_size": self.cluster_size, "refcount_bits": self.refcount_bits}
        if self.has_base:
            images.sparse_file(base, self.size // 2)
        if self.extended_l2:
            options["extended_l2"] = "on"
        images.qcow2(path, self.size, backing=base if self.has_base else None, **options)


class Guest:
    """Writes to a disk, by qemu-io, and knows what it has given back.

    :param given_back: clusters that were its own, each as often as it has given it back
    :param host_discards: whether the host's filesystem gets back what the guest gives back, "unmap" or "ignore"
    """

    def __init__(self, shape: Shape, path: pathlib.Path, host_discards: str = "unmap") -> None:
        self.shape = shape
        self.path = path
        self._discards = f"discard={'ignore' if shape.guest == KEEPS else 'unmap'},file.discard={host_discards}"
        self.given_back = 0
        self._random = random.Random(f"guest {shape.guest} {shape.seed}")
        self._own: set[int] = set()

    def act(self, count: int) -> None:
        """Do so many things at random."""
        self._run([self._anything() for _ in range(count)])

    def write_all(self) -> None:
        """Write the whole disk, in random order."""
        step = self.shape.cluster_size
        if self.shape.guest != PIECES:
            step *= self._random.choice((1, 3, 7))
        starts = list(range(0, self.shape.size, step))
        self._random.shuffle(starts)
        self._run([self._write(start, min(step, self.shape.size - start)) for start in starts])

    def _anything(self) -> str:
        size, cluster_size = self.shape.size, self.shape.cluster_size
        most = self._random.choice((SECTOR, cluster_size, 4 * cluster_size, 64 * cluster_size))
        length = min(self._random.randint(1, most // SECTOR) * SECTOR, 8 * MiB, size)
        start = self._random.randint(0, (size - length) // SECTOR) * SECTOR
        if self.shape.guest == PIECES:
            length = min(length, cluster_size - start % cluster_size)
        choice = self._random.randrange(6)
        if choice < 3:
            return self._write(start, length)
        if choice == 3:
            self._touch(start, length)
            return f"write -z {start} {length}"
        if self.shape.guest == KEEPS:
            return f"discard {start} {length}"
        return self._give_back(start, length, "discard" if choice == 4 else "write -z -u")

    def _write(self, start: int, length: int) -> str:
        self._touch(start, length)
        return f"write -P {self._random.randint(1, 255)} {start} {length}"

    def _touch(self, start: int, length: int) -> None:
        cluster_size = self.shape.cluster_size
        self._own.update(range(start // cluster_size, -(-(start + length) // cluster_size)))

    def _give_back(self, start: int, length: int, command: str) -> str:
        """Give back whole clusters, because of a part of one the rest would have to be written."""
        first, last = start // self.shape.cluster_size, -(-(start + length) // self.shape.cluster_size)
        clusters = self._own.intersection(range(first, last))
        self.given_back += len(clusters)
        self._own -= clusters
        start = first * self.shape.cluster_size
        return f"{command} {start} {min(last * self.shape.cluster_size, self.shape.size) - start}"

    def _run(self, commands: list[str]) -> None:
        words = [word for line in commands for word in ("-c", line)]
        disk = f"driver=qcow2,{self._discards},file.driver=file,file.filename={self.path}"
        # Without waiting for the disk, as QEMU does for each refcount block otherwise.
        argv = ["qemu-io", "-t", "unsafe", *words, "--image-opts", disk]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "failed" not in done.stdout, done.stdout[-1000:]


def end(path: pathlib.Path) -> int:
    """Return where a file ends, or its last cluster, whichever is farther."""
    return max(path.stat().st_size, int(images.check(path)["image-end-offset"]))


def with_given_back(path: pathlib.Path, given_back: int) -> int:
    """Return the length that a disk can grow to that gives back so many clusters of its own."""
    check = images.check(path)
    with open(path, "rb") as file:
        header = qcow2_header.read(str(path), file.fileno())
    clusters = check["total-clusters"]
    growing = clusters - check.get("allocated-clusters", 0) + given_back
    return worst_case.size(header, check["image-end-offset"], clusters, growing)


@pytest.fixture
def kind() -> str:
    """Name the filesystem that folder is on."""
    return "tmpfs"


@pytest.mark.parametrize("seed", SEEDS)
def test_file_ends_where_was_told_whatever_its_guest_writes(folder: pathlib.Path, seed: int) -> None:
    shape = Shape(seed, GUESTS[seed % len(GUESTS)])
    path = folder / "disk"
    shape.make(path, folder / "base")
    guest = Guest(shape, path)
    guest.act(20)
    before = guest.given_back
    told = Preallocator().inspect(path, format="qcow2").worst_case_size
    at_first = folder / "at-first"
    images.run("cp", "--sparse=always", path, at_first)

    for _ in range(2):
        guest.act(150)
        if shape.guest != ANYHOW:
            assert end(path) <= told
    guest.write_all()

    if shape.guest == ANYHOW:
        told = with_given_back(at_first, guest.given_back - before)
    assert end(path) <= told


def test_guest_that_gives_back_and_writes_longer_requests_grows_its_file_past_that(folder: pathlib.Path) -> None:
    """The control: there is no bound that could be told for it. If this fails, QEMU fills gaps by now."""
    shape = Shape(20, ANYHOW)
    shape.make(folder / "disk", folder / "base")
    guest = Guest(shape, folder / "disk")
    guest.act(20)
    told = Preallocator().inspect(folder / "disk", format="qcow2").worst_case_size

    guest.act(300)
    guest.write_all()

    assert end(folder / "disk") > told + MiB
    # And what it can become from here on is told anew.
    assert Preallocator().inspect(folder / "disk", format="qcow2").worst_case_size >= end(folder / "disk")


@pytest.mark.parametrize("cluster_size", [64 * KiB, 128 * KiB])
@pytest.mark.parametrize("request_size", ["64k", "1M", "7M"])
def test_disk_that_its_guest_has_zeroed_is_not_held_twice(
    folder: pathlib.Path, cluster_size: int, request_size: str
) -> None:
    path = folder / "disk"
    images.qcow2(path, 112 * MiB, cluster_size=cluster_size, preallocation="falloc")
    at_first = path.stat().st_size
    # As QEMU before 9.1 does it for a guest, whatever it is told of discards; what is left is at the end.
    disk = f"driver=qcow2,discard=unmap,file.driver=file,file.discard=ignore,file.filename={path}"
    images.run("qemu-io", "-c", "write -z -u 0 105M", "--image-opts", disk)
    assert images.check(path)["allocated-clusters"] == 7 * MiB // cluster_size

    told = Preallocator().preallocate(path, "reserve", format="qcow2")

    assert told.state == "reserved"
    assert told.worst_case_size <= at_first + 72 * cluster_size
    requests = [f"write -P 5 {start} {request_size}" for start in range(0, 112 * MiB, _bytes(request_size))]
    images.run("qemu-io", "-t", "unsafe", "-f", "qcow2", *(word for line in requests for word in ("-c", line)), path)
    assert end(path) <= told.worst_case_size


@pytest.mark.parametrize("part", [0.6, 0.9])
def test_compressed_clusters_keep_the_clusters_that_they_end_in(folder: pathlib.Path, part: float) -> None:
    path, cluster_size, half = folder / "disk", 64 * KiB, 320
    content = folder / "content"
    content.write_bytes(os.urandom(int(part * cluster_size)).ljust(cluster_size, b"\0"))
    images.qcow2(path, 2 * half * cluster_size, cluster_size=cluster_size)
    # By turns in each half, so that there is no whole cluster that is free once the second is written anew.
    places = (place for number in range(half) for place in (number, half + number))
    images.qemu_io(path, *(f"write -c -s {content} {place * cluster_size} {cluster_size}" for place in places))
    images.qemu_io(path, f"write {half * cluster_size} {half * cluster_size}")

    told = Preallocator().inspect(path, format="qcow2").worst_case_size
    images.qemu_io(path, f"write 0 {half * cluster_size}")

    assert end(path) <= told


def _bytes(size: str) -> int:
    return int(size[:-1]) * {"k": KiB, "M": MiB}[size[-1]]


@pytest.fixture(scope="module")
def ext4() -> Iterator[pathlib.Path]:
    with loop_filesystem.mounted("ext4", 128 * MiB) as mount_point:
        yield pathlib.Path(mount_point)


@pytest.mark.parametrize("guest", [KEEPS, PIECES])
@pytest.mark.parametrize("seed", [0, 1, 3, 7, 8, 12, 20, 39])
def test_no_write_fails_on_a_filesystem_that_is_full_but_for_what_was_reserved(
    folder: pathlib.Path, ext4: pathlib.Path, seed: int, guest: str
) -> None:
    shape, path = Shape(seed, guest), ext4 / "disk"
    shape.make(path, folder / "base")
    # Of what the host gets back, nothing is held any more.
    writer = Guest(shape, path, host_discards="ignore")
    writer.act(20)
    try:
        reserved = Preallocator().preallocate(path, "reserve", format="qcow2")
        assert reserved.state == "reserved"
        images.run("fallocate", "-l", images.free(ext4) - 8 * MiB, ext4 / "filler")
        loop_filesystem.fill(str(ext4))

        for _ in range(2):
            writer.act(150)
        writer.write_all()

        assert end(path) <= reserved.worst_case_size
        assert os.statvfs(ext4).f_bavail * SECTOR < MiB
    finally:
        for left in (path, ext4 / "filler"):
            left.unlink(missing_ok=True)
