# SPDX-License-Identifier: Apache-2.0
"""Names of files that qemu-img's own syntax would take for something else."""

from __future__ import annotations

import os
import pathlib

import images
import pytest

from imgprealloc import Preallocator

MiB = 1 << 20

NAMES = {
    "comma": "a,b.disk",
    "many commas": ",,a,,,b,",
    "option": "disk,preallocation=off",
    "space": "a disk",
    "colon": "nbd:disk",
    "json": 'json:{"driver":"null-co"}',
    "leading dash": "-disk",
    "percent": "disk%20%s",
    "quotes": 'it\'s "a" disk',
    "equals sign": "file.filename=disk",
    "not ascii": "disk-ä-磁碟",
    "newline": "a\ndisk",
}

HARD = {name: NAMES[name] for name in ("comma", "option", "colon", "json", "leading dash")}

each_name = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


@pytest.mark.parametrize("name", HARD.values(), ids=HARD)
def test_overlay_can_have_any_name(folder: pathlib.Path, base: pathlib.Path, name: str) -> None:
    image = Preallocator().create(folder / name, 32 * MiB, str(base), backing_format="raw")

    assert (image.state, sorted(os.listdir(folder))) == ("preallocated", sorted(["base.raw", name]))


@pytest.mark.parametrize("name", HARD.values(), ids=HARD)
def test_folder_can_have_any_name(folder: pathlib.Path, base: pathlib.Path, name: str) -> None:
    (folder / name).mkdir()

    image = Preallocator().create(folder / name / "disk", 32 * MiB, str(base), backing_format="raw")

    assert (image.state, os.listdir(folder / name)) == ("preallocated", ["disk"])


@each_name
def test_disk_in_the_working_folder_can_have_any_name(
    folder: pathlib.Path, base: pathlib.Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    states = [
        Preallocator().create(name, 26 * MiB, base.name, backing_format="raw").state,
        Preallocator().resize(name, 32 * MiB, format="qcow2").state,
    ]

    assert states == ["preallocated"] * 2


@pytest.mark.parametrize("name", HARD.values(), ids=HARD)
def test_disk_in_the_working_folder_is_looked_at_by_any_name(
    folder: pathlib.Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    images.qcow2(folder / name, 8 * MiB)

    states = Preallocator().inspect(name).state, Preallocator().preallocate(name, format="qcow2").state

    assert states == ("thin", "preallocated")


@pytest.mark.parametrize("name", HARD.values(), ids=HARD)
def test_raw_disk_in_the_working_folder_can_have_any_name(
    folder: pathlib.Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    states = [
        Preallocator().create(name, 8 * MiB, format="raw").state,
        Preallocator().preallocate(name, format="raw").state,
        Preallocator().resize(name, 16 * MiB, format="raw").state,
        Preallocator().inspect(name, format="raw").state,
    ]

    assert states == ["preallocated"] * 4


@pytest.mark.parametrize("name", [name for name in NAMES.values() if ":" not in name])
def test_base_can_have_any_name(folder: pathlib.Path, name: str) -> None:
    images.random_file(folder / name, 8 * MiB)
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=folder / name)

    image = Preallocator().create(folder / "disk", 32 * MiB, name, backing_format="raw")

    assert (image.backing_file, images.differences(folder / "disk", plain)) == (name, "")


@pytest.mark.parametrize("name", HARD.values(), ids=HARD)
def test_base_in_a_folder_can_have_any_name(folder: pathlib.Path, name: str) -> None:
    images.random_file(folder / name, 8 * MiB)
    plain = images.qcow2(folder / "plain", 32 * MiB, backing=folder / name)

    image = Preallocator().create(folder / "disk", 32 * MiB, str(folder / name), backing_format="raw")

    assert (image.backing_file, images.differences(folder / "disk", plain)) == (str(folder / name), "")


@pytest.mark.parametrize("name", ["a,b.raw", "./nbd:base", "a base"])
def test_novas_overlay_keeps_the_name_of_its_base(folder: pathlib.Path, name: str) -> None:
    images.random_file(folder / name, 8 * MiB)
    disk, plain = (images.qcow2(folder / made, 32 * MiB, backing=name) for made in ("disk", "plain"))

    image = Preallocator().preallocate(disk, format="qcow2")

    assert (image.backing_file, image.state, images.differences(disk, plain)) == (name, "preallocated", "")


@pytest.mark.parametrize("name", ["a,b.raw", "./nbd:base", "a base"])
def test_rewritten_overlay_keeps_the_name_of_its_base(folder: pathlib.Path, name: str) -> None:
    images.random_file(folder / name, 8 * MiB)
    disk, plain = (images.qcow2(folder / made, 32 * MiB, backing=name) for made in ("disk", "plain"))
    for either in (disk, plain):
        images.qemu_io(either, "write -P 0x5a 3M 1M")

    image = Preallocator().preallocate(disk, existing="rewrite", format="qcow2")

    assert (image.backing_file, image.state, images.differences(disk, plain)) == (name, "preallocated", "")


def test_base_of_a_disk_named_from_elsewhere_is_found_beside_the_disk(
    folder: pathlib.Path, base: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")

    image = Preallocator().create("../disk", 32 * MiB, base.name, backing_format="raw")

    assert (image.backing_file, image.state) == (base.name, "preallocated")


def test_base_of_a_disk_in_another_folder_is_found_from_there(
    folder: pathlib.Path, base: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "instance").mkdir()
    monkeypatch.chdir(folder)

    image = Preallocator().create("instance/disk", 32 * MiB, f"../{base.name}", backing_format="raw")

    assert (image.backing_file, image.state) == (f"../{base.name}", "preallocated")


def test_path_is_told_as_the_caller_named_it(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)

    assert Preallocator().create("disk", 8 * MiB).path == "disk"


def test_path_may_be_an_object(folder: pathlib.Path) -> None:
    assert Preallocator().create(pathlib.Path(folder) / "disk", 8 * MiB).path == str(folder / "disk")


def test_long_name_is_possible_while_there_is_room_for_the_temporary_ones(
    folder: pathlib.Path, base: pathlib.Path
) -> None:
    name = "d" * (255 - len("." + ".imgprealloc-zeros"))

    assert Preallocator().create(folder / name, 32 * MiB, str(base), backing_format="raw").state == "preallocated"
