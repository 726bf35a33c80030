# SPDX-License-Identifier: Apache-2.0
"""The pictures of "How it works", as SVG. Run it to draw them anew into doc/source/pictures/."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
import pathlib
from xml.etree import ElementTree

FOLDER = pathlib.Path(__file__).parent / "source" / "pictures"

_WIDTH = 800

# Distinct for those who are colour-blind, too (Okabe and Ito).
_OURS = "#0072b2"
_HELD = "#9fcbe6"
_PALE = "#e4f1f9"
_NOVAS = "#e6e6e6"
_SHORT = "#d55e00"
_BASE = "#f3d28a"
_INK = "#222222"
_GREY = "#666666"
_NOTHING = "#ffffff"


class Picture:
    """A canvas with what these pictures are made of. Coordinates are pixels from the top left."""

    def __init__(self, height: int, title: str) -> None:
        self._root = ElementTree.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "viewBox": f"0 0 {_WIDTH} {height}",
                "width": str(_WIDTH),
                "height": str(height),
                "font-family": "Helvetica, Arial, sans-serif",
            },
        )
        self._add("title").text = title
        # Not transparent, or it would be black on black where a page is dark.
        self._add("rect", width=_WIDTH, height=height, fill=_NOTHING)

    def __str__(self) -> str:
        ElementTree.indent(self._root)
        return ElementTree.tostring(self._root, encoding="unicode") + "\n"

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = _INK, *, dashed: bool = False
    ) -> None:
        """Draw a rectangle."""
        dashes = {"stroke-dasharray": "4 3"} if dashed else {}
        self._add("rect", x=x, y=y, width=width, height=height, fill=fill, stroke=stroke, **dashes)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 13,
        anchor: str = "start",
        colour: str = _INK,
        bold: bool = False,
    ) -> None:
        """Write a line, whose foot is at y."""
        style = {"text-anchor": anchor, "font-size": size, "font-weight": "bold" if bold else "normal"}
        self._add("text", x=x, y=y, fill=colour, **style).text = text

    def label(self, x: float, y: float, width: float, height: float, lines: Sequence[str], fill: str) -> None:
        """Draw a box with lines of text in its middle."""
        self.box(x, y, width, height, fill)
        top = y + height / 2 - (len(lines) - 1) * 8 + 4
        colour = _NOTHING if fill == _OURS else _INK
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + number * 16, line, anchor="middle", colour=colour)

    def cells(self, x: float, y: float, width: float, height: float, fills: Sequence[str], stroke: str = _INK) -> None:
        """Draw boxes side by side."""
        each = width / len(fills)
        for number, fill in enumerate(fills):
            self.box(x + number * each, y, each, height, fill, stroke)

    def arrow(self, x1: float, y1: float, x2: float, y2: float, colour: str = _INK) -> None:
        """Draw an arrow, across or down."""
        self._add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour)
        if x1 == x2:
            points = f"{x2 - 4},{y2 - 7} {x2 + 4},{y2 - 7} {x2},{y2}"
        else:
            points = f"{x2 - 7},{y2 - 4} {x2 - 7},{y2 + 4} {x2},{y2}"
        self._add("polygon", points=points, fill=colour)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = _INK) -> None:
        """Draw a line."""
        self._add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour)

    def _add(self, tag: str, **attributes: object) -> ElementTree.Element:
        return ElementTree.SubElement(self._root, tag, {name: _short(value) for name, value in attributes.items()})


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def promise() -> Picture:
    """Draw what stock Nova's preallocation leaves out."""
    picture = Picture(330, "Stock Nova's preallocated overlay, and imgprealloc's")
    left, right, width = 124, 478, 240
    for x, head, sub in (
        (left, "stock Nova", "fallocate of the virtual size"),
        (right, "imgprealloc", "qemu-img preallocates"),
    ):
        picture.text(x, 24, head, size=16, bold=True)
        picture.text(x, 42, sub, colour=_GREY)
    for y, name in ((78, "the guest's disk"), (138, "cluster map"), (208, "the file"), (296, "all is full:")):
        picture.text(left - 10, y, name, anchor="end")
    picture.cells(left, 60, width, 26, [_NOTHING] * 12)
    picture.cells(right, 60, width, 26, [_NOTHING] * 12)
    picture.cells(left, 120, width, 26, [_NOTHING] * 12, _GREY)
    picture.text(left, 162, "empty: each first write allocates", size=12, colour=_SHORT)
    picture.cells(right, 120, width, 26, [_OURS] * 12)
    picture.text(right, 162, "each cluster has its place", size=12, colour=_OURS)
    picture.box(left, 190, width, 26, _HELD)
    picture.box(left + width, 190, 45, 26, _NOTHING, _SHORT, dashed=True)
    picture.text(left, 232, "the virtual size", size=12, colour=_GREY)
    picture.text(left + width + 45, 232, "the map: no space", size=12, anchor="end", colour=_SHORT)
    picture.box(right, 190, 45, 26, _OURS)
    picture.cells(right + 45, 190, width, 26, [_HELD] * 12)
    picture.text(right, 232, "map", size=12, colour=_OURS)
    picture.text(right + 45, 232, "and disk, in order: all space is held", size=12, colour=_GREY)
    picture.text(left, 290, "the last writes fail; the guest is paused,", colour=_SHORT)
    picture.text(left, 307, "and Nova says ACTIVE", colour=_SHORT)
    picture.text(right, 290, "every write of the guest succeeds;", colour=_OURS)
    picture.text(right, 307, "the next build fails instead", colour=_OURS)
    picture.line(450, 14, 450, 316, "#cccccc")
    return picture


def states() -> Picture:
    """Draw the two questions, and the four answers."""
    picture = Picture(350, "The four states of a disk")
    left, top, width, height = 200, 66, 280, 130
    picture.text(left + width / 2, 34, "not all clusters mapped", anchor="middle", bold=True)
    picture.text(left + width * 1.5 + 20, 34, "all clusters mapped", anchor="middle", bold=True)
    picture.text(left + width / 2, 52, "first writes allocate", size=12, anchor="middle", colour=_GREY)
    picture.text(left + width * 1.5 + 20, 52, "first writes find their place", size=12, anchor="middle", colour=_GREY)
    rows = (
        (top, "the file has holes,", "shares, or can grow", "a full host", "stops the guest"),
        (top + height + 10, "all of its space", "is held", "a full host", "does not matter"),
    )
    for y, first, second, third, fourth in rows:
        picture.text(left - 14, y + 40, first, anchor="end", bold=True)
        picture.text(left - 14, y + 57, second, anchor="end", bold=True)
        picture.text(left - 14, y + 80, third, size=12, anchor="end", colour=_GREY)
        picture.text(left - 14, y + 95, fourth, size=12, anchor="end", colour=_GREY)
    some = [_OURS, _NOTHING, _OURS, _NOTHING, _NOTHING, _NOTHING, _OURS, _NOTHING]
    _state(picture, left, top, "thin", some, held=False)
    _state(picture, left + width + 20, top, "mapped", [_OURS] * 8, held=False)
    _state(picture, left, top + height + 10, "reserved", some, held=True)
    _state(picture, left + width + 20, top + height + 10, "preallocated", [_OURS] * 8, held=True)
    return picture


def _state(picture: Picture, x: float, y: float, name: str, mapped: Sequence[str], *, held: bool) -> None:
    picture.box(x, y, 280, 130, "#fafafa", "#cccccc")
    picture.text(x + 16, y + 28, name, size=17, bold=True, colour=_OURS if held else _SHORT)
    picture.text(x + 16, y + 60, "map", size=12, colour=_GREY)
    picture.cells(x + 60, y + 46, 200, 20, mapped)
    picture.text(x + 16, y + 100, "file", size=12, colour=_GREY)
    if held:
        picture.box(x + 60, y + 86, 200, 20, _HELD)
        return
    for start, width in ((0, 60), (85, 50), (160, 25)):
        picture.box(x + 60 + start, y + 86, width, 20, _HELD)
    for start, width in ((60, 25), (135, 25), (185, 15)):
        picture.box(x + 60 + start, y + 86, width, 20, _NOTHING, _SHORT, dashed=True)


def subclusters() -> Picture:
    """Draw how far an overlay is allocated."""
    picture = Picture(300, "What of an overlay is allocated before its guest writes")
    left, width, half = 140, 384, 192
    picture.text(left - 14, 48, "base image", anchor="end")
    picture.box(left, 32, half, 24, _BASE)
    picture.text(left + half / 2, 49, "its data", size=12, anchor="middle")
    picture.text(left + half + 8, 49, "beyond its end: zeros", size=12, colour=_GREY)
    picture.text(left + width + 24, 49, "a live snapshot copies", bold=True)
    rows = (
        ("unallocated", [_PALE] * 48, "what the guest has written"),
        ("allocated", [_PALE] * 24 + [_OURS] * 24, "that, and all beyond the base"),
        ("copied", [_OURS] * 48, "the whole disk"),
    )
    for number, (name, fills, copies) in enumerate(rows):
        y = 86 + number * 48
        picture.text(left - 14, y + 17, name, anchor="end", bold=True)
        picture.cells(left, y, width, 26, fills, "#88a9bf")
        for cluster in range(13):
            x = left + cluster * width / 12
            picture.line(x, y, x, y + 26)
        picture.box(left, y, width, 26, "none")
        picture.text(left + width + 24, y + 17, copies)
    picture.line(left + half, 26, left + half, 218, _GREY)
    picture.box(left, 242, 14, 14, _PALE, "#88a9bf")
    picture.text(left + 22, 254, "mapped, its space held; the base shows through", size=12)
    picture.box(left, 264, 14, 14, _OURS)
    picture.text(left + 22, 276, "allocated as well: a first write changes no map", size=12)
    picture.text(left + width + 24, 254, "between black lines: a cluster,", size=12, colour=_GREY)
    picture.text(left + width + 24, 270, "here of 4 subclusters (really 32)", size=12, colour=_GREY)
    return picture


def treatments() -> Picture:
    """Draw which treatment a disk gets."""
    picture = Picture(468, "The treatment that a disk gets")
    beside, also = "beside it, preallocated,", "also while the guest runs"
    rows: Sequence[tuple[Sequence[str], Sequence[str]]] = (
        (["Is it preallocated already?"], ["nothing is run beyond the look"]),
        (
            ["Is it raw?"],
            ["unshare what is shared, fallocate the holes", "(mode full: write zeros where none are written)"],
        ),
        (["Is every cluster mapped,", "but the file has holes?"], ["fallocate over its length,", also]),
        (["Is nothing in it yet,", "and may it be replaced?"], [f"qemu-img create {beside}", "then rename over it"]),
        (["There is data in it.", "May it be rewritten?"], [f"qemu-img convert {beside}", "then rename over it"]),
    )
    for number, (question, answer) in enumerate(rows):
        y = 16 + number * 78
        picture.label(40, y, 240, 50, question, _NOVAS)
        picture.arrow(280, y + 25, 380, y + 25)
        picture.text(330, y + 19, "yes", anchor="middle", colour=_GREY)
        picture.label(380, y, 380, 50, answer, _PALE)
        picture.arrow(160, y + 50, 160, y + 78)
        picture.text(170, y + 68, "no", colour=_GREY)
    picture.label(40, 406, 240, 50, ["reserve, in the same file:"], _PALE)
    picture.text(296, 427, "fallocate up to the most that it can grow to,", size=13)
    picture.text(296, 444, also, size=13)
    return picture


def nova() -> Picture:
    """Draw the making of a disk in nova-compute."""
    picture = Picture(330, "An instance's disk is made")
    picture.label(20, 14, 110, 34, ["Nova's"], _NOVAS)
    picture.label(140, 14, 110, 34, ["imgprealloc's"], _OURS)
    picture.box(20, 74, 330, 118, "none", _GREY, dashed=True)
    picture.text(30, 92, "under the base image's lock", size=12, colour=_GREY)
    picture.label(36, 106, 138, 64, ["create_image():", "all checks, and", "a thin disk"], _NOVAS)
    picture.arrow(174, 138, 200, 138)
    picture.label(200, 106, 138, 64, ["resize_image():", "grows one that", "has data"], _OURS)
    picture.arrow(338, 138, 384, 138)
    picture.label(384, 106, 170, 64, ["preallocate,", "read it again,", "compare, rename"], _OURS)
    picture.text(469, 92, "outside of that lock", size=12, anchor="middle", colour=_GREY)
    picture.arrow(554, 138, 588, 138)
    picture.label(588, 106, 200, 64, ["libvirt_info():", "io=native, discard=ignore", "where space is held"], _OURS)
    picture.arrow(469, 170, 469, 226, _SHORT)
    picture.text(478, 204, "no space", colour=_SHORT)
    picture.label(384, 226, 170, 48, ["the build fails;", "Nova tries another host"], _NOVAS)
    picture.arrow(688, 170, 688, 226)
    picture.label(588, 226, 200, 48, ["the guest starts"], _NOVAS)
    picture.text(688, 296, "every heal_interval: holes that it", size=12, anchor="middle", colour=_OURS)
    picture.text(688, 312, "has made are filled again", size=12, anchor="middle", colour=_OURS)
    picture.text(36, 226, "At a start the disk is looked at first:", size=12, colour=_GREY)
    picture.text(36, 244, "one that is preallocated needs no program,", size=12, colour=_GREY)
    picture.text(36, 262, "one that has lost its space gets it again.", size=12, colour=_GREY)
    return picture


PICTURES: Sequence[Callable[[], Picture]] = (promise, states, subclusters, treatments, nova)


def main() -> None:
    """Draw all of them."""
    FOLDER.mkdir(exist_ok=True)
    for draw in PICTURES:
        (FOLDER / f"{draw.__name__}.svg").write_text(str(draw()))


if __name__ == "__main__":
    main()
