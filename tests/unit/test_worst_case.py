# SPDX-License-Identifier: Apache-2.0
"""How long a qcow2 file can become. That no guest gets past it is for functional/test_reserved_bound.py."""

from __future__ import annotations

import dataclasses
import pathlib

from oslo_utils import units
import pytest

from imgprealloc import qcow2_header
from imgprealloc import worst_case
from imgprealloc.qcow2_header import Header

from . import qcow2_file

KiB, MiB, GiB = units.Ki, units.Mi, units.Gi


def header(path: pathlib.Path, cluster_size: int, *, refcount_order: int = 4, incompatible: int = 0) -> Header:
    """Give the header of an image whose refcount table has one cluster."""
    qcow2_file.write(
        str(path / "disk"), cluster_bits=cluster_size.bit_length() - 1, refcount_order=refcount_order,
        incompatible=incompatible,
    )  # fmt: skip
    with open(path / "disk", "rb") as file:
        return qcow2_header.read("disk", file.fileno())


def test_file_whose_clusters_are_all_there_ends_where_it_ends(tmp_path: pathlib.Path) -> None:
    assert worst_case.size(header(tmp_path, 64 * KiB), 5 * MiB + 512, 80, 0) == 5 * MiB + 512


def test_file_grows_by_its_clusters_its_tables_and_their_refcounts(tmp_path: pathlib.Path) -> None:
    # 8192 clusters of 64 KiB are described by an L2 table, 32768 by a refcount block.
    found = worst_case.size(header(tmp_path, 64 * KiB), 256 * KiB, 16 * 1024, 16 * 1024)

    assert found == 256 * KiB + GiB + 2 * 64 * KiB + 64 * KiB


def test_file_that_ends_within_a_cluster_has_the_rest_of_it_before_it_grows(tmp_path: pathlib.Path) -> None:
    shape = header(tmp_path, 64 * KiB)

    assert worst_case.size(shape, 256 * KiB - 1, 16, 16) == worst_case.size(shape, 256 * KiB, 16, 16)


def test_refcount_blocks_describe_each_other_too(tmp_path: pathlib.Path) -> None:
    # 1024 clusters are described by a block of 512 bytes and refcounts of 4 bits: 1022, an
    # L2 table and the first block fill it, so that the second is one for itself.
    shape = header(tmp_path, 512, refcount_order=2)

    assert worst_case.size(shape, 512, 1, 1) == 4 * 512
    assert worst_case.size(shape, 1021 * 512, 1, 1) == 1024 * 512
    assert worst_case.size(shape, 1022 * 512, 1, 1) == 1026 * 512


def test_subclusters_take_twice_the_tables(tmp_path: pathlib.Path) -> None:
    plain = worst_case.size(header(tmp_path, 64 * KiB), 0, 16 * 1024, 16 * 1024)
    extended = worst_case.size(
        header(tmp_path, 64 * KiB, incompatible=qcow2_file.EXTENDED_L2), 0, 16 * 1024, 16 * 1024
    )  # fmt: skip

    assert extended - plain == 2 * 64 * KiB


@pytest.mark.parametrize(
    ("cluster_size", "size", "most"),
    [(64 * KiB, 40 * GiB, 8 * MiB), (64 * KiB, 1024 * GiB, 193 * MiB), (128 * KiB, 40 * GiB, 6 * MiB)],
)
def test_promise_costs_less_than_a_part_in_five_thousand_more(
    tmp_path: pathlib.Path, cluster_size: int, size: int, most: int
) -> None:
    shape = header(tmp_path, cluster_size, incompatible=qcow2_file.EXTENDED_L2 if cluster_size > 64 * KiB else 0)

    assert 0 < worst_case.size(shape, 0, size // cluster_size, size // cluster_size) - size < most


def test_refcount_table_that_is_full_moves_behind_a_gap(tmp_path: pathlib.Path) -> None:
    # 64 blocks of 256 clusters each have their entry in a table of 512 bytes.
    shape = header(tmp_path, 512)
    described = 64 * 256

    fits = worst_case.size(shape, 0, 16000, 16000)
    moves = worst_case.size(shape, 0, 16100, 16100)

    assert fits <= described * 512
    assert moves > (described + 256 + 2) * 512
    assert moves < (described + 3 * 256) * 512


@pytest.mark.parametrize("bits", range(9, 22))
@pytest.mark.parametrize("order", range(7))
def test_more_to_write_never_ends_sooner(tmp_path: pathlib.Path, bits: int, order: int) -> None:
    shape = header(tmp_path, 1 << bits, refcount_order=order)

    found = [worst_case.size(shape, 0, 1 << 24, growing) for growing in range(1, 1 << 24, 99991)]

    assert found == sorted(found)
    assert found[-1] < (1 << bits) * (1 << 24) * 1.4


def test_what_is_free_within_a_file_is_what_is_neither_in_use_nor_may_be_tables(tmp_path: pathlib.Path) -> None:
    shape = header(tmp_path, 64 * KiB)
    # Two L2 tables and a refcount block, a refcount table and an L1 table; and what QEMU may have passed over.
    most_other = 2 + 1 + 1 + 1 + 64

    assert worst_case.reusable(shape, GiB, 16 * 1024, 1000) == 16 * 1024 - 1000 - most_other
    assert worst_case.reusable(shape, (1000 + most_other) * 64 * KiB, 16 * 1024, 1000) == 0
    assert worst_case.reusable(shape, 64 * KiB, 16 * 1024, 0) == 0


def test_nothing_counts_as_free_beside_small_clusters_or_what_a_snapshot_keeps(tmp_path: pathlib.Path) -> None:
    assert worst_case.reusable(header(tmp_path, 8 * KiB), GiB, 16 * 1024, 0) == 0
    kept = dataclasses.replace(header(tmp_path, 64 * KiB), snapshots=1)
    assert worst_case.reusable(kept, GiB, 16 * 1024, 0) == 0


def test_repair_takes_new_refcounts_and_their_table_behind_the_last_cluster(tmp_path: pathlib.Path) -> None:
    shape = header(tmp_path, 64 * KiB)

    found, end = worst_case.repaired(shape, 5 * MiB)

    # A block, and a table that is begun anew as it grows.
    assert (found.refcount_table_clusters, end) == (1, 5 * MiB + 3 * 64 * KiB)


def test_table_is_no_longer_than_it_has_to_be_once_it_was_repaired(tmp_path: pathlib.Path) -> None:
    shape = dataclasses.replace(header(tmp_path, 512), refcount_table_clusters=7)

    found, _ = worst_case.repaired(shape, 4 * MiB)

    assert found.refcount_table_clusters == 1


@pytest.mark.parametrize("cluster_size", [64 * KiB, 128 * KiB, 2 * MiB])
@pytest.mark.parametrize("clusters", [1, 60, 700, 40_000])
@pytest.mark.parametrize("longer", [0, 3, 63, 70, 200])
def test_whatever_a_guest_gives_back_its_file_is_said_to_become_no_longer_than_that(
    tmp_path: pathlib.Path, cluster_size: int, clusters: int, longer: int
) -> None:
    shape = header(tmp_path, cluster_size, incompatible=qcow2_file.EXTENDED_L2)
    end = worst_case.length(clusters * cluster_size, cluster_size, extended_l2=True) + longer * cluster_size

    found = worst_case.after_giving_back(shape, end, clusters)

    told = []
    for free in {0, 1, 63, 64, 65, 70, clusters // 2, clusters}:
        # What is free at the end is not in use, either.
        for image_end in (end, max(4 * cluster_size, end - free * cluster_size)):
            growing = max(0, free - worst_case.reusable(shape, image_end, clusters, clusters - free))
            told += [worst_case.size(shape, image_end, clusters, growing)] if free <= clusters else []
    assert found >= max(told)
    # And not the disk a second time.
    tables = worst_case.size(shape, 0, clusters, clusters) // cluster_size - clusters
    assert found <= end + (64 + 2 * tables + 4) * cluster_size


def test_file_that_has_not_all_clusters_yet_is_none_of_which_any_were_given_back(tmp_path: pathlib.Path) -> None:
    shape = header(tmp_path, 64 * KiB)

    assert worst_case.after_giving_back(shape, 256 * KiB, 16 * 1024) == 256 * KiB
    assert worst_case.after_giving_back(header(tmp_path, 8 * KiB), GiB, 16 * 1024) == GiB
    assert worst_case.after_giving_back(dataclasses.replace(shape, snapshots=1), 2 * GiB, 16 * 1024) == 2 * GiB
