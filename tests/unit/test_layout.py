# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from oslo_utils import units

from imgprealloc import layout
from imgprealloc.layout import Dot
from imgprealloc.layout import Stretch
from imgprealloc.layout import laid_out

SIZE = layout.COLUMNS * units.Mi


def test_stretches_that_follow_each_other_are_one() -> None:
    found = laid_out(
        SIZE, "in the file", 0, SIZE, (Stretch(at * units.Mi, units.Mi, at * units.Mi, "data") for at in range(100))
    )

    assert found.stretches == (Stretch(0, 100 * units.Mi, 0, "data"),)
    assert (found.pieces, found.dots, found.bare) == (1, frozenset(), frozenset())


def test_what_is_written_half_way_is_one_piece_of_two_kinds() -> None:
    half = SIZE // 2

    found = laid_out(SIZE, "", 0, SIZE, [Stretch(0, half, 0, "data"), Stretch(half, half, half, "unwritten")])

    assert (len(found.stretches), found.pieces) == (2, 1)
    assert found.kinds == frozenset({"data", "unwritten"})


def test_each_place_that_does_not_follow_is_a_piece() -> None:
    backwards = [Stretch(at * units.Mi, units.Mi, SIZE - (at + 1) * units.Mi, "data") for at in range(100)]

    assert laid_out(SIZE, "", 0, SIZE, backwards).pieces == 100


def test_what_is_less_than_a_column_is_a_dot_in_its_place() -> None:
    found = laid_out(
        SIZE, "", 0, SIZE, [Stretch(SIZE - 4096, 4096, 0, "data"), Stretch(SIZE - 8192, 4096, 0, "shared")]
    )

    last = layout.COLUMNS - 1
    assert found.stretches == ()
    assert found.dots == {Dot(last, 0, "data"), Dot(last, 0, "shared")}


def test_dot_is_as_high_as_it_is_long_where_the_file_is_short() -> None:
    found = laid_out(1000 * units.Gi, "", 0, units.Mi, [Stretch(0, units.Mi // 2, 0, "data")])

    assert found.dots == {Dot(0, row, "data") for row in range(layout.ROWS // 2)}


def test_millions_of_stretches_are_no_more_than_a_picture_has_dots() -> None:
    size = 1024 * units.Ti
    scattered = (Stretch(at * units.Mi, 4096, at * 7919 % 100_000 * units.Mi, "data") for at in range(200_000))

    found = laid_out(200_000 * units.Mi, "", 0, 100_000 * units.Mi, scattered)

    assert found.pieces == 200_000
    assert len(found.dots) <= layout.COLUMNS * layout.ROWS
    assert laid_out(size, "", 0, size, [Stretch(0, size, None, "nothing")]).bare == {
        (column, "nothing") for column in range(layout.COLUMNS)
    }


def test_place_beyond_the_end_is_drawn_at_the_end() -> None:
    found = laid_out(SIZE, "", 0, units.Mi, [Stretch(0, 4096, 1 << 60, "data")])

    assert found.dots == {Dot(0, layout.ROWS - 1, "data")}
