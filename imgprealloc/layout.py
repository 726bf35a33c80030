# SPDX-License-Identifier: Apache-2.0
"""Where a disk's bytes are, as values that a picture can be made of. How they are found out is in placement."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
from typing import Literal, NamedTuple, Optional

Kind = Literal["data", "shared", "unwritten", "base", "nothing"]
"""What there is to a stretch of a disk.

* data: it has a place, which was written.
* shared: it has a place, which is another file's, too.
* unwritten: it has a place, in which nothing was written yet; the backing file
  or zeros show.
* base: it has no place; the backing file shows.
* nothing: it has no place; zeros show.
"""

# What a picture can show, across and up. More could not be told apart, and so
# few bound its size, however large or fragmented the disk is.
COLUMNS, ROWS = 240, 200


class Stretch(NamedTuple):
    """A stretch of a disk that is in one piece. All in bytes; a tuple, because there may be millions.

    :param start: where the guest sees it
    :param place: where it is, in what Layout.places names; None for no place
    """

    start: int
    length: int
    place: Optional[int]
    kind: Kind


class Dot(NamedTuple):
    """One of COLUMNS times ROWS, in which there is something that is too small to be drawn by itself."""

    column: int
    row: int
    kind: Kind


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a disk's bytes are, as exactly as COLUMNS and ROWS can show. Sizes and offsets are bytes.

    :param virtual_size: what the guest sees
    :param places: what places are offsets in, as "in the file" or "on the storage"
    :param low: the lowest place
    :param high: where the highest ends
    :param stretches: those that are at least a column long
    :param dots: what is shorter
    :param bare: which columns have something without a place, and what shows there
    :param pieces: how many stretches there are that do not follow the one before
        them, neither for the guest nor in their place
    """

    virtual_size: int
    places: str
    low: int
    high: int
    stretches: tuple[Stretch, ...]
    dots: frozenset[Dot]
    bare: frozenset[tuple[int, Kind]]
    pieces: int

    @property
    def kinds(self) -> frozenset[Kind]:
        """What there is in it."""
        long, small, bare = (
            {stretch.kind for stretch in self.stretches},
            {dot.kind for dot in self.dots},
            {kind for _, kind in self.bare},
        )
        return frozenset(long | small | bare)


def laid_out(virtual_size: int, places: str, low: int, high: int, stretches: Iterable[Stretch]) -> Layout:
    """Merge stretches, in the order in which the guest sees them, to what can be shown of them."""
    long: list[Stretch] = []
    # From row to row.
    bars: set[tuple[int, int, int, Kind]] = set()
    bare: set[tuple[int, Kind]] = set()
    pieces, end, end_place = 0, -1, -1
    width, height = max(1, virtual_size), max(1, high - low)
    for stretch in _joined(stretches):
        start, length, place, kind = stretch
        first = min(start * COLUMNS // width, COLUMNS - 1)
        if place is None:
            last = min((start + length - 1) * COLUMNS // width, COLUMNS - 1)
            bare.update((column, kind) for column in range(first, last + 1))
            continue
        if (start, place) != (end, end_place):
            pieces += 1
        end, end_place = start + length, place + length
        if length * COLUMNS >= width:
            long.append(stretch)
        else:
            bottom, top = (min(max(at - low, 0) * ROWS // height, ROWS - 1) for at in (place, end_place - 1))
            bars.add((first, bottom, top, kind))
    dots = frozenset(Dot(column, row, kind) for column, bottom, top, kind in bars for row in range(bottom, top + 1))
    return Layout(virtual_size, places, low, high, tuple(long), dots, frozenset(bare), pieces)


def _joined(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    """Join those that only their source has in parts."""
    begun: Optional[Stretch] = None
    for stretch in stretches:
        if begun is not None:
            start, length, place, kind = begun
            follows = stretch.place is None if place is None else stretch.place == place + length
            if follows and stretch.kind == kind and stretch.start == start + length:
                begun = Stretch(start, length + stretch.length, place, kind)
                continue
            yield begun
        begun = stretch
    if begun is not None:
        yield begun
