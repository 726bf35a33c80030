# SPDX-License-Identifier: Apache-2.0
"""Disks that Nova makes anew: spawn, rebuild, and a build that fails."""

from __future__ import annotations

from collections.abc import Callable
import functools
import os
from unittest import mock

import compute_host
from compute_host import DISKS
from compute_host import KINDS
from compute_host import Host
from compute_host import all_disks
import images
from nova.compute import manager as compute_manager
from nova.compute import utils as compute_utils
from oslo_utils import units
import pytest

from nova import exception


@KINDS
def test_spawn_preallocates_root_ephemeral_and_swap(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind)

    instance = node.spawn(node.instance())

    assert node.states(instance) == all_disks("preallocated")
    assert {name: node.inspect(instance, name).virtual_size for name in DISKS} == DISKS
    assert images.reads_like(node.disk(instance), kind, node.images[compute_host.IMAGE])


def test_stock_spawn_does_not(host: Callable[..., Host]) -> None:
    # The control: if this fails, Nova has been cured.
    node = host(preallocated=False, libvirt__images_type="qcow2")

    instance = node.spawn(node.instance())

    assert node.states(instance) == all_disks("thin")


@KINDS
def test_spawn_with_root_gb_0_preallocates_to_the_images_size(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind)

    instance = node.spawn(node.instance(compute_host.flavor(root_gb=0)))

    assert node.states(instance) == all_disks("preallocated")
    assert node.inspect(instance).virtual_size == os.path.getsize(node.images[compute_host.IMAGE])


@KINDS
def test_rebuild_preallocates_the_new_disks_and_keeps_nothing_of_the_old(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    node.write(instance)
    before = {name: os.stat(node.disk(instance, name)).st_mtime_ns for name in DISKS}
    assert node.driver.delete_instance_files(instance)

    node.spawn(instance)

    assert node.states(instance) == all_disks("preallocated")
    assert all(os.stat(node.disk(instance, name)).st_mtime_ns > before[name] for name in DISKS)
    assert images.reads_like(node.disk(instance), kind, node.images[compute_host.IMAGE])


@KINDS
def test_evacuated_instance_gets_its_disks_back_as_they_were(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    kept = node.keep(instance)
    before = node.identities(instance)
    assert node.states(instance) == all_disks("preallocated")

    # On shared storage the disks are there when the new host spawns.
    node.spawn(instance)

    assert node.identities(instance) == before
    assert node.states(instance) == all_disks("preallocated")
    assert node.changed(instance, kept) == []


@KINDS
def test_evacuation_heals_disks_of_a_host_without_us_and_rewrites_none(host: Callable[..., Host], kind: str) -> None:
    stock = host(preallocated=False, libvirt__images_type=kind)
    instance = stock.spawn(stock.instance())
    kept = stock.keep(instance)
    for name in DISKS:
        compute_host.lose_space(stock.disk(instance, name))
    assert stock.states(instance) == all_disks("thin")
    before = stock.inodes(instance)
    node = host(libvirt__images_type=kind)
    node.take_over(stock)

    node.spawn(instance)

    assert node.states(instance) == all_disks("reserved" if kind == "qcow2" else "preallocated")
    assert node.inodes(instance) == before
    assert node.changed(instance, kept) == []


@pytest.mark.parametrize(("mode", "state"), [("metadata", "mapped"), ("falloc", "preallocated")])
def test_flavor_chooses_the_mode_of_all_its_disks(host: Callable[..., Host], mode: str, state: str) -> None:
    node = host(libvirt__images_type="qcow2", imgprealloc__mode="falloc" if mode == "metadata" else "metadata")

    instance = node.spawn(node.instance(compute_host.flavor(imgprealloc__mode=mode)))

    assert node.states(instance) == all_disks(state)


@pytest.mark.parametrize(
    ("subclusters", "start"), [("unallocated", units.Gi), ("allocated", 64 * units.Mi), ("copied", 0)]
)
def test_flavor_chooses_how_far_its_subclusters_go(host: Callable[..., Host], subclusters: str, start: int) -> None:
    node = host(
        libvirt__images_type="qcow2",
        imgprealloc__overlay_subclusters="copied" if subclusters == "unallocated" else "unallocated",
    )

    instance = node.spawn(node.instance(compute_host.flavor(imgprealloc__overlay_subclusters=subclusters)))

    assert node.states(instance) == all_disks("preallocated")
    assert images.allocated_from(node.disk(instance)) == start


@KINDS
def test_build_without_space_is_rescheduled_and_leaves_no_file(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.instance(compute_host.flavor(root_gb=500))

    with pytest.raises(exception.RescheduledException, match=r"No space left|needs .* bytes\) more"):
        _build(node, instance)

    assert not os.path.exists(os.path.dirname(node.disk(instance)))


def _build(node: Host, instance: compute_host.Instance) -> None:
    """Build an instance by Nova's real compute manager, as far as it has to do with the driver."""
    real = compute_manager.ComputeManager
    manager = mock.MagicMock(spec=real, driver=node.driver, host="here")
    for collaborator in ("network_api", "reportclient", "rt", "share_manager", "virtapi"):
        setattr(manager, collaborator, mock.MagicMock())
    for method in ("_build_resources", "_shutdown_instance"):
        setattr(manager, method, functools.partial(getattr(real, method), manager))
    manager._build_networks_for_instance.return_value = compute_host.NETWORK
    manager._prep_block_device.return_value = compute_host.block_devices()
    manager._get_instance_block_device_info.return_value = compute_host.block_devices()
    notifications = {name: mock.DEFAULT for name in dir(compute_utils) if name.startswith("notify_about_")}
    with mock.patch.multiple(compute_utils, **notifications):
        real._build_and_run_instance(
            manager, compute_host.CONTEXT, instance, {"name": "image"}, [], None, None, None, [], "node", None, None
        )
