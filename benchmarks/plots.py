# SPDX-License-Identifier: Apache-2.0
"""Plots as SVG: ratios as dots with their spread, and growth as lines; both on logarithmic axes."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from xml.etree import ElementTree

from pairs import Spread

# Distinct for those who are colour-blind, too (Okabe and Ito).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000", "#999999")

_WIDTH = 860
_LEFT = 230
_RIGHT = 20
_TOP = 34
_LINE = 9
_LEGEND = 16


@dataclasses.dataclass(frozen=True)
class Scale:
    """A logarithmic axis: where a value is drawn."""

    lowest: float
    highest: float
    start: float
    end: float

    def position(self, value: float) -> float:
        """Return the coordinate of a value; one beyond the axis is drawn at its end."""
        value = min(max(value, self.lowest), self.highest)
        part = math.log(value / self.lowest) / math.log(self.highest / self.lowest)
        return self.start + part * (self.end - self.start)

    def ticks(self, base: int) -> list[float]:
        """List the powers of a base that are on the axis."""
        first = math.ceil(math.log(self.lowest, base) - 1e-9)
        last = math.floor(math.log(self.highest, base) + 1e-9)
        return [float(base) ** power for power in range(first, last + 1)]


def scale(values: Sequence[float], base: int, start: float, end: float) -> Scale:
    """Make an axis that has all values on it, from one power of the base to another."""
    lowest = math.floor(math.log(min(values), base) + 1e-9)
    highest = math.ceil(math.log(max(values), base) - 1e-9)
    return Scale(float(base) ** lowest, float(base) ** max(highest, lowest + 1), start, end)


def dots(title: str, rows: Mapping[str, Mapping[str, Spread]]) -> str:
    """Draw ratios to what is drawn as 1: a row a case, in it a dot a disk, with a line from quartile to quartile.

    :param rows: by the names of rows and of disks
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    everything = [each for row in rows.values() for spread in row.values() for each in (spread.low, spread.high)]
    height = _TOP + len(rows) * (len(names) + 1) * _LINE + 30 + _legend_height(names)
    root = _canvas(title, height)
    bottom = _TOP + len(rows) * (len(names) + 1) * _LINE
    axis = scale([1.0, *everything], 2, _LEFT, _WIDTH - _RIGHT)
    for tick in axis.ticks(2):
        _line(root, axis.position(tick), _TOP, axis.position(tick), bottom, "#000000" if tick == 1 else "#dddddd")
        _text(root, axis.position(tick), bottom + 14, f"{tick:g}", "middle")
    y = float(_TOP)
    for row, found in rows.items():
        _text(root, _LEFT - 8, y + (len(names) + 1) * _LINE / 2 + 4, row, "end")
        for number, name in enumerate(names):
            y += _LINE
            if name in found:
                _dot(root, axis, y, found[name], _COLOURS[number % len(_COLOURS)])
        y += _LINE
        _line(root, 8, y, _WIDTH - _RIGHT, y, "#eeeeee")
    _legend(root, names, bottom + 26)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def lines(title: str, unit: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draw seconds over counts.

    :param unit: what is counted
    """
    counts = [count for points in curves.values() for count, _ in points]
    seconds = [taken for points in curves.values() for _, taken in points]
    bottom = _TOP + 260
    root = _canvas(title, bottom + 44 + _legend_height(list(curves)))
    across = scale(counts, 10, 70, _WIDTH - _RIGHT)
    up = scale(seconds, 10, bottom, _TOP)
    for tick in across.ticks(10):
        _line(root, across.position(tick), _TOP, across.position(tick), bottom, "#dddddd")
        _text(root, across.position(tick), bottom + 14, f"{tick:,.0f}", "middle")
    for tick in up.ticks(10):
        _line(root, 70, up.position(tick), _WIDTH - _RIGHT, up.position(tick), "#dddddd")
        _text(root, 62, up.position(tick) + 4, f"{tick:g} s", "end")
    _text(root, (70 + _WIDTH - _RIGHT) / 2, bottom + 28, unit, "middle")
    for number, points in enumerate(curves.values()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [(across.position(count), up.position(taken)) for count, taken in points]
        _add(root, "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), fill="none", stroke=colour)
        for x, y in places:
            _add(root, "circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3", fill=colour)
    _legend(root, list(curves), bottom + 40)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _canvas(title: str, height: int) -> ElementTree.Element:
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {_WIDTH} {height}",
            "width": str(_WIDTH),
            "height": str(height),
            "font-family": "sans-serif",
            "font-size": "11",
        },
    )
    # Not transparent, or it would be black on black where a page is dark.
    _add(root, "rect", width=str(_WIDTH), height=str(height), fill="#ffffff")
    _text(root, 8, 18, title, "start")
    return root


def _dot(root: ElementTree.Element, axis: Scale, y: float, spread: Spread, colour: str) -> None:
    _line(root, axis.position(spread.low), y, axis.position(spread.high), y, colour)
    _add(root, "circle", cx=f"{axis.position(spread.median):.1f}", cy=f"{y:.1f}", r="3.5", fill=colour)


def _legend_height(names: Sequence[str]) -> int:
    return -(-len(names) // 2) * _LEGEND + 8


def _legend(root: ElementTree.Element, names: Sequence[str], top: float) -> None:
    """Name the colours, in two columns."""
    for number, name in enumerate(names):
        x, y = 20 + number % 2 * _WIDTH // 2, top + number // 2 * _LEGEND
        _add(root, "circle", cx=str(x), cy=f"{y:.1f}", r="3.5", fill=_COLOURS[number % len(_COLOURS)])
        _text(root, x + 10, y + 4, name, "start")


def _line(root: ElementTree.Element, x1: float, y1: float, x2: float, y2: float, colour: str) -> None:
    _add(root, "line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", stroke=colour)


def _text(root: ElementTree.Element, x: float, y: float, text: str, anchor: str) -> None:
    element = _add(root, "text", x=f"{x:.1f}", y=f"{y:.1f}", **{"text-anchor": anchor})
    element.text = text


def _add(root: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    return ElementTree.SubElement(root, tag, attributes)
