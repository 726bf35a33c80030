# SPDX-License-Identifier: Apache-2.0
"""Snapshots: what Glance gets is an image like any other, and nothing on the way to it is preallocated."""

from __future__ import annotations

from collections.abc import Callable
import importlib
import os
import subprocess
from typing import Any

import compute_host
from compute_host import KINDS
from compute_host import Host
import images
from nova.compute import power_state
from oslo_utils import units
import pytest

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

    def mirror(delta: str) -> None:
        deltas.append(imgprealloc.Preallocator().inspect(delta, format="qcow2"))
        # As QEMU's: into the file that is there, what stands over its base.
        copy = ["qemu-img", "convert", "-n", "-f", kind, "-O", "qcow2", node.disk(instance), delta]
        subprocess.run(copy, check=True)

    node.domains[instance.uuid].on_mirror = mirror

    uploaded = node.snapshot(instance)

    (delta,) = deltas
    assert (delta.state, delta.mapped_clusters, delta.extended_l2) == ("thin", 0, False)
    assert delta.allocated_size < units.Mi
    assert _extended_l2(uploaded) is False
    assert _is_safe(uploaded)
    assert images.reads_like(node.disk(instance), kind, uploaded, "qcow2")
    assert node.identities(instance) == before


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
