# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterable
import random
import re
from xml.etree import ElementTree

from oslo_utils import units

from imgprealloc.cli import picture
from imgprealloc.layout import Layout
from imgprealloc.layout import Stretch
from imgprealloc.layout import laid_out

SVG = "{http://www.w3.org/2000/svg}"
SIZE = units.Gi
CLUSTER = 64 * units.Ki


def of(stretches: Iterable[Stretch]) -> Layout:
    return laid_out(SIZE, "in the file", 0, SIZE, stretches)


def straight() -> Layout:
    return of([Stretch(0, SIZE, 0, "data")])


def fragmented() -> Layout:
    places = random.Random(1).sample(range(SIZE // CLUSTER), SIZE // CLUSTER)
    return of(Stretch(at * CLUSTER, CLUSTER, place * CLUSTER, "data") for at, place in enumerate(places))


def draw(layout: Layout, title: str = "disk", described: str = "qcow2, thin") -> ElementTree.Element:
    return ElementTree.fromstring(picture.svg([picture.Panel(title, described, layout)]))


def segments(drawn: ElementTree.Element) -> int:
    """Count the lines that the data is drawn with."""
    return sum(str(path.get("d")).count("M") for path in drawn.iter(f"{SVG}path"))


def texts(drawn: ElementTree.Element) -> list[str]:
    return ["".join(each.itertext()) for each in drawn.iter(f"{SVG}text")]


def test_straight_disk_is_one_line_from_corner_to_corner() -> None:
    (path,) = draw(straight()).iter(f"{SVG}path")

    assert path.get("d") == "M0.0 400.0L480.0 0.0"


def test_fragmented_disk_is_drawn_in_more_segments_than_a_straight_one() -> None:
    assert segments(draw(fragmented())) > 1000 * segments(draw(straight()))


def test_picture_has_a_title_units_on_its_axes_and_a_legend_of_what_is_in_it() -> None:
    half = SIZE // 2
    written = texts(
        draw(of([Stretch(0, half, 0, "data"), Stretch(half, half, None, "base")]), "/a/disk", "qcow2, thin")
    )

    assert "/a/disk" in written
    assert "qcow2, thin; 1 GiB, in 1 piece" in written
    assert {"offset in the guest's disk", "offset in the file", "512 MiB", "1 GiB", "no place"} <= set(written)
    assert [line for line in written if line in picture._LEGEND.values()] == [
        "data",
        "no place yet; the base image shows",
    ]


def test_places_that_are_far_out_are_told_from_the_lowest_on() -> None:
    far = 118 * units.Gi

    written = texts(draw(laid_out(SIZE, "on the storage", far, far + SIZE, [Stretch(0, SIZE, far, "data")])))

    assert f"offset on the storage, from byte {far:,} on" in written
    assert written.count("512 MiB") == 2


def test_each_kind_has_its_colour() -> None:
    kinds = list(picture._LEGEND)
    part = SIZE // len(kinds)
    stretches = [
        Stretch(at * part, part, None if kind in ("base", "nothing") else at * part, kind)
        for at, kind in enumerate(kinds)
    ]

    colours = [path.get("stroke") for path in draw(of(stretches)).iter(f"{SVG}path")]

    assert len(colours) == len(set(colours)) == len(kinds)


def test_picture_is_bounded_however_fragmented_a_disk_is() -> None:
    every_other = (Stretch(2 * at * 4096, 4096, at * 104729 * 4096 % SIZE, "data") for at in range(SIZE // 8192))

    assert len(picture.svg([picture.Panel("disk", "raw, thin", of(every_other))])) < units.Mi


def test_name_that_xml_cannot_carry_is_escaped() -> None:
    drawn = draw(straight(), title="di\x1b[2Jsk\udcff<&>")

    assert "di\\x1b[2Jsk\\udcff<&>" in texts(drawn)


def test_nothing_is_drawn_outside() -> None:
    beyond = laid_out(SIZE, "in the file", 0, CLUSTER, [Stretch(0, SIZE // 2, 1 << 60, "data")])

    (path,) = draw(beyond).iter(f"{SVG}path")

    assert all(0 <= float(number) <= 480 for number in re.findall(r"[\d.]+", str(path.get("d"))))


def test_disk_of_no_size_is_drawn() -> None:
    assert segments(draw(laid_out(0, "in the file", 0, 0, []))) == 0


def test_disks_are_drawn_beside_each_other_with_one_legend() -> None:
    panels = [picture.Panel(name, "qcow2, thin", straight()) for name in ("stock", "ours")]

    drawn = ElementTree.fromstring(picture.svg(panels))

    groups = list(drawn.iter(f"{SVG}g"))
    assert len({group.get("transform") for group in groups}) == 2
    assert texts(drawn).count("data") == 1
