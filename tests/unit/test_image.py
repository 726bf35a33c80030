# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Any

from oslo_utils import units
import pytest

from imgprealloc import DiskImage
from imgprealloc.image import FileStamp

WORST_CASE = 2 * units.Gi

STAMP = FileStamp(device=1, inode=2, size=3, modified=4, changed=5)


def image(**facts: Any) -> DiskImage:
    values: dict[str, Any] = {
        "path": "/d/disk",
        "format": "qcow2",
        "virtual_size": units.Gi,
        "file_size": units.Gi,
        "allocated_size": units.Gi,
        "worst_case_size": WORST_CASE,
        "held_size": 0,
        "shared_bytes": 0,
        "copy_on_write": False,
        "stamp": STAMP,
    }
    return DiskImage(**{**values, **facts})


@pytest.mark.parametrize(
    ("clusters", "mapped", "held", "state"),
    [
        pytest.param(10, 0, 0, "thin", id="nothing mapped, nothing held"),
        pytest.param(10, 9, WORST_CASE - 1, "thin", id="one cluster and one byte short"),
        pytest.param(10, 9, WORST_CASE, "reserved", id="one cluster short"),
        pytest.param(10, 10, WORST_CASE - 1, "mapped", id="one byte short"),
        pytest.param(10, 10, WORST_CASE, "preallocated", id="all of it"),
        pytest.param(None, None, WORST_CASE - 1, "thin", id="raw, one byte short"),
        pytest.param(None, None, WORST_CASE, "preallocated", id="raw, all of it"),
    ],
)
def test_state_follows_from_the_map_and_from_the_space(
    clusters: int | None, mapped: int | None, held: int, state: str
) -> None:
    assert image(clusters=clusters, mapped_clusters=mapped, held_size=held).state == state


def test_shortfall_is_what_is_missing_to_the_worst_case() -> None:
    assert image(held_size=WORST_CASE - 4096).shortfall == 4096


def test_shared_space_is_still_to_be_paid_for() -> None:
    disk = image(clusters=1, mapped_clusters=1, held_size=WORST_CASE, shared_bytes=units.Mi)

    assert (disk.shortfall, disk.held, disk.state) == (units.Mi, False, "mapped")


def test_copy_on_write_makes_all_held_space_worthless() -> None:
    disk = image(clusters=1, mapped_clusters=1, held_size=WORST_CASE, copy_on_write=True)

    assert (disk.shortfall, disk.held, disk.state) == (WORST_CASE, False, "mapped")


def test_snapshot_makes_mapped_clusters_copy_on_write_again() -> None:
    disk = image(clusters=10, mapped_clusters=10, held_size=WORST_CASE, snapshots=1)

    assert (disk.mapped, disk.state) == (False, "reserved")


def test_raw_disk_on_a_copy_on_write_filesystem_is_thin() -> None:
    assert image(format="raw", held_size=WORST_CASE, copy_on_write=True).state == "thin"


def test_two_looks_at_one_disk_are_equal_whenever_they_were_taken() -> None:
    assert image() == image(stamp=dataclasses.replace(STAMP, changed=6))


@pytest.mark.parametrize("fact", ["device", "inode", "size", "modified", "changed"])
def test_stamp_tells_another_file_and_another_content(fact: str) -> None:
    assert dataclasses.replace(STAMP, **{fact: 9}) != STAMP


@pytest.mark.parametrize(
    ("image_end", "file_size", "stray"),
    [(65536, 65536, False), (65535, 65536, False), (65536, 65537, True), (1, 65536, False), (0, 1, True)],
)
def test_stray_bytes_are_those_after_the_last_cluster(image_end: int, file_size: int, stray: bool) -> None:
    assert image(cluster_size=65536, image_end=image_end, file_size=file_size).has_stray_bytes is stray


def test_raw_disk_has_no_stray_bytes() -> None:
    assert not image(format="raw", cluster_size=None, file_size=units.Gi).has_stray_bytes
