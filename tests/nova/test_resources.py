# SPDX-License-Identifier: Apache-2.0
"""What a host tells the scheduler of its disk space: as with stock Nova."""

from __future__ import annotations

from collections.abc import Callable
import os
import shutil
from typing import Any
from unittest import mock

from compute_host import DISKS
from compute_host import KINDS
from compute_host import Host
import images
from oslo_utils import units
import pytest

from nova import objects


@pytest.fixture(autouse=True)
def _no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects.InstanceList, "get_by_filters", lambda *_, **__: [])
    monkeypatch.setattr(objects.BlockDeviceMappingList, "bdms_by_instance_uuid", lambda *_, **__: {})


def _over_committed(node: Host) -> int:
    return int(node.driver._get_disk_over_committed_size_total())


@KINDS
def test_preallocated_disks_over_commit_nothing(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind)
    node.write(node.spawn(node.instance()))

    # A raw disk's file may take more than its length, for the filesystem's own tables.
    assert -units.Mi < _over_committed(node) <= 0


@KINDS
def test_disks_over_commit_as_much_as_with_stock_nova(host: Callable[..., Host], kind: str) -> None:
    def by(node: Host) -> int:
        node.spawn(node.instance())
        return _over_committed(node)

    ours = by(host(libvirt__images_type=kind))
    stock = by(host(preallocated=False, libvirt__images_type=kind))

    assert ours == stock


@KINDS
def test_disks_over_commit_as_much_as_with_stock_nova_where_preallocation_is_off(
    host: Callable[..., Host], kind: str
) -> None:
    def by(node: Host) -> int:
        node.spawn(node.instance())
        return _over_committed(node)

    ours = by(host(libvirt__images_type=kind, preallocate_images="none"))
    stock = by(host(preallocated=False, libvirt__images_type=kind, preallocate_images="none"))

    assert ours > units.Gi
    assert ours == stock


@KINDS
def test_disk_available_least_is_that_of_stock_nova_less_the_metadata(host: Callable[..., Host], kind: str) -> None:
    def told_by(node: Host) -> tuple[int, float]:
        instance = node.spawn(node.instance())
        # The filesystem keeps more for what has no place yet.
        images.run("sync", "-f", node.path)
        told = _available(node)
        assert node.driver.delete_instance_files(instance)
        shutil.rmtree(os.path.join(node.path, "_base"))
        return told["local_gb"], told["disk_available_least"] * units.Gi

    ours = told_by(host(libvirt__images_type=kind))
    stock = told_by(host(preallocated=False, libvirt__images_type=kind))

    assert ours[0] == stock[0]
    # A cluster's map and count take 397,312 bytes per GiB; the rest is the filesystem's own.
    assert abs(stock[1] - ours[1]) < 2 * units.Mi


def test_thin_disks_are_counted_at_their_full_size(host: Callable[..., Host]) -> None:
    # The control: without preallocation the same method counts what guests may still take.
    node = host(libvirt__images_type="qcow2", preallocate_images="none")
    before = _available(node)["disk_available_least"]

    node.spawn(node.instance())

    taken = (before - _available(node)["disk_available_least"]) * units.Gi
    assert taken == pytest.approx(sum(DISKS.values()), rel=0.1)


def _available(node: Host) -> dict[str, Any]:
    """Ask the real driver; what has nothing to do with disks is left out."""
    others = {
        "_get_instance_capabilities": [],
        "_get_vcpu_available": [],
        "_get_vcpu_used": 0,
        "_get_cpu_info": {},
        "_get_pci_passthrough_devices": "[]",
        "_get_host_numa_topology": None,
        "get_host_uptime": "",
    }
    mocks = {name: mock.Mock(return_value=value) for name, value in others.items()}
    with mock.patch.multiple(node.driver, **mocks):
        return dict(node.driver.get_available_resource("node"))
