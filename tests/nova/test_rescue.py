# SPDX-License-Identifier: Apache-2.0
"""Rescue and unrescue: the rescue disk is none of ours, and the instance's own disks stay as they are."""

from __future__ import annotations

from collections.abc import Callable
import os

import compute_host
from compute_host import KINDS
from compute_host import Host
from compute_host import all_disks
from oslo_utils import units

import imgprealloc


@KINDS
def test_rescue_disk_is_as_stock_nova_makes_it_and_the_instances_disks_untouched(
    host: Callable[..., Host], kind: str
) -> None:
    stock = host(preallocated=False, libvirt__images_type=kind)
    by_stock = stock.spawn(stock.instance())
    stock.rescue(by_stock)
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    kept = node.keep(instance)
    before = node.identities(instance)

    node.rescue(instance)

    assert _size(node.disk(instance, "disk.rescue")) == _size(stock.disk(by_stock, "disk.rescue"))
    assert [os.path.basename(disk.source_path) for disk in node.described(instance)] == ["disk.rescue", "disk"]
    assert node.identities(instance) == before
    node.driver.unrescue(compute_host.CONTEXT, instance)
    assert node.changed(instance, kept) == []


def test_rescue_overlay_is_thin(host: Callable[..., Host]) -> None:
    node = host(libvirt__images_type="qcow2")
    instance = node.spawn(node.instance())

    node.rescue(instance)

    rescue = imgprealloc.Preallocator().inspect(node.disk(instance, "disk.rescue"), format="qcow2")
    assert (rescue.state, rescue.mapped_clusters, rescue.extended_l2) == ("thin", 0, False)
    assert rescue.allocated_size < units.Mi


@KINDS
def test_unrescue_goes_back_to_disks_that_are_as_they_were(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    kept = node.keep(instance)
    before = node.identities(instance)
    node.rescue(instance)

    node.driver.unrescue(compute_host.CONTEXT, instance)

    assert not os.path.exists(node.disk(instance, "disk.rescue"))
    assert node.identities(instance) == before
    assert node.states(instance) == all_disks("preallocated")
    assert node.changed(instance, kept) == []


def _size(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_blocks
