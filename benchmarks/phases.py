# SPDX-License-Identifier: Apache-2.0
"""The phases of a disk's life, in the order in which a guest goes through them, and how it asks for each.

A disk's first half lies over its base image, which is full of data, its second
half beyond. Each half has parts for random and for sequential writes and for
small ones, so that every phase finds what it is named after.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Optional

KIB = 1024

Place = Literal["over the base", "beyond the base"]

PLACES: tuple[Place, ...] = ("over the base", "beyond the base")


@dataclasses.dataclass(frozen=True)
class Load:
    """How a guest waits for its disk.

    :param depth: requests under way at a time
    :param flushes: whether each write is followed by a flush
    """

    title: str
    depth: int
    flushes: bool


FSYNC = Load("fsync", 1, True)
QD16 = Load("QD16", 16, False)
LOADS = (FSYNC, QD16)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of each half of a disk, in eighths of the half."""

    first: int
    length: int


RANDOM = Part(0, 6)
SEQUENTIAL = Part(6, 1)
SMALL = Part(7, 1)


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a guest does, one part of its disk at a time.

    :param pattern: in fio's words
    :param block: bytes a request
    :param share: how much of the part may be written in all turns together:
        of stock Nova's clusters, or of the blocks where they follow each other
    """

    title: str
    part: Part
    pattern: Literal["randwrite", "write", "randread"]
    block: int
    share: Optional[float] = None


# As long as no more than a third of its clusters is there, stock Nova's disk mostly allocates.
FIRST = Phase("first writes", RANDOM, "randwrite", 4 * KIB, 1 / 3)
SEQUENTIAL_FIRST = Phase("64k, sequential", SEQUENTIAL, "write", 64 * KIB, 1.0)
LATER = Phase("later writes", RANDOM, "randwrite", 4 * KIB)
SMALL_FIRST = Phase("512 bytes", SMALL, "randwrite", 512)
OVERWRITES = Phase("overwrites", SEQUENTIAL, "randwrite", 4 * KIB)
READS = Phase("reads", RANDOM, "randread", 4 * KIB)

PHASES = (FIRST, SEQUENTIAL_FIRST, LATER, SMALL_FIRST, OVERWRITES, READS)

# What QEMU and stock Nova have: of each such cluster one block is written before the later writes.
STOCK_CLUSTER = 64 * KIB


def area(part: Part, place: Place, size: int) -> tuple[int, int]:
    """Return where a part of a disk begins, and its length, in bytes.

    :param size: the disk's, of which the base has half
    """
    half = size // 2
    return PLACES.index(place) * half + half * part.first // 8, half * part.length // 8


def requests(phase: Phase, load: Load, size: int, turns: int, most: int) -> int:
    """Return how many requests make a turn.

    :param size: the disk's, in bytes
    :param turns: how many there will be
    :param most: one at a time; more only where the phase has to have all of its part
    """
    # So that 16 at a time take as long, or else their start is all that there is.
    wanted = most if load.depth == 1 else 4 * most
    if phase.share is None:
        return wanted
    length = area(phase.part, "over the base", size)[1]
    if phase.pattern == "write":
        return int(length // phase.block * phase.share) // turns
    # A random write is mostly the first one of its cluster.
    return max(1, min(wanted, int(length // STOCK_CLUSTER * phase.share) // turns))
