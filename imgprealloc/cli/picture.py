# SPDX-License-Identifier: Apache-2.0
"""Layouts of disks as a picture, in SVG: across what the guest sees, upwards where that is."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import itertools
from xml.etree import ElementTree

from imgprealloc import exceptions
from imgprealloc import layout
from imgprealloc.cli.disks import Size
from imgprealloc.layout import Kind
from imgprealloc.layout import Layout

BEGINS = "<svg"
"""How a picture begins."""

# In the order in which they are drawn, so that data is never hidden. Distinct
# for those who are colour-blind, too (Okabe and Ito).
_COLOURS: dict[Kind, str] = {
    "nothing": "#bbbbbb",
    "base": "#009e73",
    "unwritten": "#e69f00",
    "shared": "#cc79a7",
    "data": "#0072b2",
}
_LEGEND: dict[Kind, str] = {
    "data": "data",
    "shared": "data in a place that another file has, too (reflink)",
    "unwritten": "has its place, and nothing is written there yet",
    "base": "no place yet; the base image shows",
    "nothing": "no place yet; zeros show",
}

# A column's and a row's.
_DOT = 2
_WIDTH, _HEIGHT = layout.COLUMNS * _DOT, layout.ROWS * _DOT
_LEFT, _RIGHT, _TOP = 86, 24, 58
# What has no place.
_STRIP_TOP, _STRIP = 8, 10
_BELOW = 76
_LINE = 18
_MOST_TICKS = 6
# Of a title, which has the panel's width.
_LONGEST = 76


@dataclasses.dataclass(frozen=True)
class Panel:
    """A disk in a picture.

    :param title: such as its path
    :param described: what it is, in a few words
    """

    title: str
    described: str
    layout: Layout


def svg(panels: Sequence[Panel]) -> str:
    """Draw disks beside each other, with one legend; some hundred KiB a disk at the most, however large it is."""
    present = frozenset(itertools.chain.from_iterable(panel.layout.kinds for panel in panels))
    legend = [kind for kind in _LEGEND if kind in present]
    across = _LEFT + _WIDTH + _RIGHT
    width, bottom = across * len(panels), _TOP + _HEIGHT + _BELOW
    height = bottom + _LINE * len(legend)
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width} {height}",
            "width": str(width),
            "height": str(height),
            "font-family": "sans-serif",
            "font-size": "12",
        },
    )
    _add(root, "title").text = _text(", ".join(panel.title for panel in panels))
    # Not transparent, or it would be black on black where a page is dark.
    _add(root, "rect", width=str(width), height=str(height), fill="#ffffff")
    for number, panel in enumerate(panels):
        group = _add(root, "g", transform=f"translate({number * across + _LEFT} {_TOP})")
        _draw(group, panel)
    for number, kind in enumerate(legend):
        y = bottom + _LINE * number
        _add(root, "rect", x=str(_LEFT), y=str(y - 10), width="10", height="10", fill=_COLOURS[kind])
        _write(root, _LEFT + 18, y, _LEGEND[kind])
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _draw(group: ElementTree.Element, panel: Panel) -> None:
    found = panel.layout
    _write(group, 0, -36, _shortened(panel.title), **{"font-weight": "bold"})
    pieces = "1 piece" if found.pieces == 1 else f"{found.pieces:,} pieces"
    _write(group, 0, -18, f"{panel.described}; {_size(found.virtual_size)}, in {pieces}")
    for at in _ticks(found.virtual_size):
        x = at * _WIDTH / max(1, found.virtual_size)
        _rule(group, x, 0, x, _HEIGHT)
        _write(group, x, _HEIGHT + _STRIP_TOP + _STRIP + 16, _size(at), **{"text-anchor": "middle"})
    # From the lowest on, or what is far out on the storage had the same number everywhere.
    for at in _ticks(found.high - found.low):
        y = _HEIGHT - at * _HEIGHT / max(1, found.high - found.low)
        _rule(group, 0, y, _WIDTH, y)
        _write(group, -8, y + 4, _size(at), **{"text-anchor": "end"})
    _add(group, "rect", width=str(_WIDTH), height=str(_HEIGHT), fill="none", stroke="#888888")
    _write(
        group, _WIDTH / 2, _HEIGHT + _STRIP_TOP + _STRIP + 34, "offset in the guest's disk", **{"text-anchor": "middle"}
    )
    upwards = f"offset {found.places}" + (f", from byte {found.low:,} on" if found.low else "")
    turned = f"translate({12 - _LEFT} {_HEIGHT // 2}) rotate(-90)"
    _write(group, 0, 0, upwards, transform=turned, **{"text-anchor": "middle"})
    for kind, colour in _COLOURS.items():
        drawn = [*_lines(found, kind), *_dots(found, kind)]
        if drawn:
            _add(group, "path", d="".join(drawn), stroke=colour, fill="none", **{"stroke-width": str(_DOT)})
        columns = [column for column, bare in found.bare if bare == kind]
        if columns:
            y = _HEIGHT + _STRIP_TOP + _STRIP / 2
            strip = "".join(f"M{first * _DOT} {y:g}h{(end - first) * _DOT}" for first, end in _runs(columns))
            _add(group, "path", d=strip, stroke=colour, fill="none", **{"stroke-width": str(_STRIP)})
    if found.bare:
        _write(group, -8, _HEIGHT + _STRIP_TOP + _STRIP, "no place", **{"text-anchor": "end"})


def _lines(found: Layout, kind: Kind) -> Iterable[str]:
    """Draw what is long enough to be seen by itself."""
    across, up = _WIDTH / max(1, found.virtual_size), _HEIGHT / max(1, found.high - found.low)
    for start, length, place, each in found.stretches:
        if each == kind and place is not None:
            x, y, end_y = (
                start * across,
                *(min(max(_HEIGHT - (at - found.low) * up, 0), _HEIGHT) for at in (place, place + length)),
            )
            yield f"M{x:.1f} {y:.1f}L{min(x + length * across, _WIDTH):.1f} {end_y:.1f}"


def _dots(found: Layout, kind: Kind) -> Iterable[str]:
    """Draw what is not, those beside each other in one."""
    rows: dict[int, list[int]] = {}
    for dot in found.dots:
        if dot.kind == kind:
            rows.setdefault(dot.row, []).append(dot.column)
    for row, columns in sorted(rows.items()):
        y = _HEIGHT - row * _DOT - _DOT // 2
        for first, end in _runs(columns):
            yield f"M{first * _DOT} {y}h{(end - first) * _DOT}"


def _runs(numbers: Iterable[int]) -> Iterable[tuple[int, int]]:
    """Put numbers that follow each other together: the first, and the one after the last."""
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        yield members[0], members[-1] + 1


def _ticks(end: int) -> range:
    """Choose round numbers of bytes up to an end."""
    step = 1
    while end // step > _MOST_TICKS:
        step *= 2
    return range(0, end + 1, step)


def _size(bytes: int) -> str:
    return Size(bytes).human_readable()


def _shortened(title: str) -> str:
    """Keep the end of a path that is too long."""
    return title if len(title) <= _LONGEST else f"…{title[1 - _LONGEST :]}"


def _text(text: str) -> str:
    # XML cannot carry each name that a file may have.
    return exceptions.on_one_line(text)


def _write(parent: ElementTree.Element, x: float, y: float, text: str, **attributes: str) -> None:
    _add(parent, "text", x=f"{x:g}", y=f"{y:g}", **attributes).text = _text(text)


def _rule(parent: ElementTree.Element, x1: float, y1: float, x2: float, y2: float) -> None:
    _add(parent, "line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", stroke="#dddddd")


def _add(root: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    return ElementTree.SubElement(root, tag, attributes)
