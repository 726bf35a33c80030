# SPDX-License-Identifier: Apache-2.0
"""Disks that Nova makes from a snapshot and then puts on their old base image: unshelve, resize to another cell."""

from __future__ import annotations

from collections.abc import Callable
import os
import shutil
from typing import Any
from unittest import mock

import compute_host
from compute_host import Host
from compute_host import all_disks
import images
from nova.compute import task_states
from nova.compute import vm_states
from nova.virt.libvirt import utils as libvirt_utils
import pytest

SNAPSHOT = "70a599e0-31e7-49b7-b260-868f441e862b"

ARRIVALS = pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"vm_state": vm_states.SHELVED_OFFLOADED}, id="unshelve"),
        pytest.param(
            {
                "vm_state": vm_states.ACTIVE,
                "task_state": task_states.RESIZE_FINISH,
                "migration_context": mock.Mock(is_cross_cell_move=lambda: True),
            },
            id="cross-cell resize",
        ),
    ],
)


def _snapshot(node: Host) -> str:
    """Offer an image that differs from the original one within and beyond it."""
    path = os.path.join(node.path, "snapshot")
    shutil.copyfile(node.images[compute_host.IMAGE], path)
    os.truncate(path, 100 << 20)
    compute_host.write(path, "raw", "32M")
    compute_host.write(path, "raw", "80M")
    node.images[SNAPSHOT] = path
    return path


@ARRIVALS
@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_disks_are_preallocated_and_read_like_the_snapshot(
    host: Callable[..., Host], fields: dict[str, Any], kind: str
) -> None:
    node = host(libvirt__images_type=kind)
    snapshot = _snapshot(node)

    instance = node.spawn(node.instance(image_ref=SNAPSHOT, **fields))

    assert node.states(instance) == all_disks("preallocated")
    assert images.reads_like(node.disk(instance), kind, snapshot)


@ARRIVALS
def test_overlay_is_back_on_its_original_image(host: Callable[..., Host], fields: dict[str, Any]) -> None:
    node = host(libvirt__images_type="qcow2")
    _snapshot(node)
    original = node.spawn(node.instance())

    instance = node.spawn(node.instance(image_ref=SNAPSHOT, **fields))

    assert _base(node, instance) == _base(node, original)


@ARRIVALS
def test_overlay_whose_original_image_is_gone_stands_alone_and_is_preallocated(
    host: Callable[..., Host], fields: dict[str, Any]
) -> None:
    node = host(libvirt__images_type="qcow2")
    snapshot = _snapshot(node)
    del node.images[compute_host.IMAGE]

    instance = node.spawn(node.instance(image_ref=SNAPSHOT, **fields))

    assert _base(node, instance) is None
    assert node.states(instance) == all_disks("preallocated")
    assert images.reads_like(node.disk(instance), "qcow2", snapshot)


def test_disk_that_stands_alone_is_healed_at_the_next_start(host: Callable[..., Host]) -> None:
    node = host(libvirt__images_type="qcow2")
    snapshot = _snapshot(node)
    del node.images[compute_host.IMAGE]
    instance = node.spawn(node.instance(image_ref=SNAPSHOT, vm_state=vm_states.SHELVED_OFFLOADED))
    compute_host.lose_space(node.disk(instance))
    assert node.inspect(instance).state == "mapped"

    node.start(instance)

    assert node.states(instance) == all_disks("preallocated")
    assert images.reads_like(node.disk(instance), "qcow2", snapshot)


def _base(node: Host, instance: compute_host.Instance) -> str | None:
    found = libvirt_utils.get_disk_backing_file(node.disk(instance), format="qcow2")
    return None if found is None else str(found)
