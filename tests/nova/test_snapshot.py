# SPDX-License-Identifier: Apache-2.0
"""Snapshots: what Glance gets is an image like any other, and nothing on the way to it is preallocated."""

from __future__ import annotations

from collections.abc import Callable
import importlib
import os
from typing import Any

import compute_host
from compute_host import KINDS
from compute_host import Host
import images
from nova.compute import power_state
from oslo_utils import units
import pytest
import storage_daemon

import imgprealloc


def _instance(node: Host, state: int) -> compute_host.Instance:
    instance = node.spawn(node.instance())
    node.write(instance)
    node.domains[instance.uuid].state = state
    return instance


@KINDS
def test_uploaded_image_passes_glances_inspector_and_reads_like_the_disk(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind, libvirt__snapshot_image_format="qcow2")
    instance = _instance(node, power_state.SHUTDOWN)
    before = node.identities(instance)

    uploaded = node.snapshot(instance)

    assert _extended_l2(uploaded) is False
    assert _is_safe(uploaded)
    assert images.reads_like(node.disk(instance), kind, uploaded, "qcow2")
    assert node.identities(instance) == before


@KINDS
def test_live_snapshot_does_so_too_and_makes_a_thin_delta(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind, libvirt__snapshot_image_format="qcow2")
    instance = _instance(node, power_state.RUNNING)
    before = node.identities(instance)
    deltas: list[imgprealloc.DiskImage] = []
    node.domains[instance.uuid].on_mirror = lambda delta: deltas.append(
        imgprealloc.Preallocator().inspect(delta, format="qcow2")
    )
    _mirror_by_qemu(node, instance, kind)

    uploaded = node.snapshot(instance)

    (delta,) = deltas
    assert (delta.state, delta.mapped_clusters, delta.extended_l2) == ("thin", 0, False)
    assert delta.allocated_size < units.Mi
    assert _extended_l2(uploaded) is False
    assert _is_safe(uploaded)
    assert images.reads_like(node.disk(instance), kind, uploaded, "qcow2")
    assert node.identities(instance) == before


@pytest.mark.parametrize("mode", ["falloc", "full", "metadata"])
def test_live_snapshot_copies_no_more_than_of_stocks_disk(host: Callable[..., Host], mode: str) -> None:
    copied = {}
    for preallocated in (True, False):
        node = host(preallocated=preallocated, libvirt__images_type="qcow2", imgprealloc__mode=mode)
        instance = _instance(node, power_state.RUNNING)
        counted = _mirror_by_qemu(node, instance, "qcow2")
        node.snapshot(instance)
        (copied[preallocated],) = counted

    assert copied[True] <= copied[False] + 128 * units.Ki


def test_live_snapshot_copies_what_the_operator_has_had_allocated(host: Callable[..., Host]) -> None:
    # The control: the mirror is QEMU's, and would tell.
    node = host(libvirt__images_type="qcow2", imgprealloc__overlay_subclusters="allocated")
    instance = _instance(node, power_state.RUNNING)
    counted = _mirror_by_qemu(node, instance, "qcow2")

    node.snapshot(instance)

    assert counted[0] > units.Gi // 2


def test_nothing_is_left_of_a_snapshot(host: Callable[..., Host]) -> None:
    node = host(libvirt__images_type="qcow2")
    instance = _instance(node, power_state.SHUTDOWN)
    before = set(os.listdir(os.path.dirname(node.disk(instance))))

    node.snapshot(instance)

    assert set(os.listdir(os.path.dirname(node.disk(instance)))) == before
    assert os.listdir(os.path.join(node.path, "snapshots")) == []


def test_inspector_would_refuse_one_of_our_overlays(host: Callable[..., Host]) -> None:
    # The control: a disk must never be uploaded as it is.
    node = host(libvirt__images_type="qcow2")
    instance = node.spawn(node.instance())

    with pytest.raises(Exception, match=r"(?i)safety|feature|backing"):
        assert _is_safe(node.disk(instance)), "safety check failed"


def _mirror_by_qemu(node: Host, instance: compute_host.Instance, kind: str) -> list[int]:
    """Let a snapshot's mirror be QEMU's own, after whatever was to happen then; list the bytes it copies."""
    counted: list[int] = []
    domain = node.domains[instance.uuid]
    before = domain.on_mirror

    def mirror(delta: str) -> None:
        before(delta)
        with storage_daemon.running() as daemon:
            counted.append(daemon.mirror_shallow(node.disk(instance), delta, kind))

    domain.on_mirror = mirror
    return counted


def _is_safe(path: str) -> bool:
    """Ask the inspector that guards Nova and Glance."""
    inspector: Any
    try:
        inspector = importlib.import_module("oslo_utils.imageutils.format_inspector")
    except ImportError:  # before oslo.utils 7.2, Nova has its own
        inspector = importlib.import_module("nova.image.format_inspector")
    found = inspector.detect_file_format(path)
    # Nova's says yes, oslo.utils' says nothing or raises.
    return str(found) == "qcow2" and found.safety_check() in (True, None)


def _extended_l2(path: str) -> Any:
    return images.info(path)["format-specific"]["data"]["extended-l2"]
