# SPDX-License-Identifier: Apache-2.0
"""Block live migration: how much Nova takes it for, the targets, and what QEMU's mirror has left of them."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import threading
from typing import Any
from unittest import mock

import compute_host
from compute_host import DISKS
from compute_host import KINDS
from compute_host import Host
from compute_host import all_disks
import images
from nova.compute import utils as compute_utils
from oslo_concurrency import processutils
from oslo_utils import units
import pytest

import imgprealloc
from imgprealloc import healing
from imgprealloc import strategies
from imgprealloc import subclusters
import imgprealloc.nova


def _source(host: Callable[..., Host], **options: Any) -> tuple[compute_host.Instance, str]:
    """Return an instance on another host, and what that says of its disks."""
    node = host(**options)
    instance = node.spawn(node.instance())
    return instance, node.driver.get_instance_disk_info(instance, compute_host.block_devices())


@KINDS
def test_targets_are_preallocated_before_the_guest_is_sent(host: Callable[..., Host], kind: str) -> None:
    instance, disk_info = _source(host, libvirt__images_type=kind)
    node = host(libvirt__images_type=kind)

    node.expect(instance, disk_info)

    states = {name: _inspect(node, instance, name, kind).state for name in DISKS}
    assert states == all_disks("preallocated")
    assert {name: _inspect(node, instance, name, kind).virtual_size for name in DISKS} == DISKS


@KINDS
def test_stock_targets_are_not(host: Callable[..., Host], kind: str) -> None:
    # The control; also for raw, which Nova makes past its image backends.
    instance, disk_info = _source(host, libvirt__images_type=kind)
    node = host(preallocated=False, libvirt__images_type=kind)

    node.expect(instance, disk_info)

    assert {name: _inspect(node, instance, name, kind).state for name in DISKS} == all_disks("thin")


def test_targets_without_a_backing_file_are_preallocated_too(host: Callable[..., Host]) -> None:
    # As an unshelving or a conversion leaves them.
    instance, disk_info = _source(host, libvirt__images_type="qcow2")
    flat = json.dumps([{**info, "backing_file": ""} for info in json.loads(disk_info)])
    node = host(libvirt__images_type="qcow2")

    node.expect(instance, flat)

    assert {name: _inspect(node, instance, name, "qcow2").state for name in DISKS} == all_disks("preallocated")


def test_fault_of_ours_keeps_no_target_without_a_backing_file_from_being_made(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    instance, disk_info = _source(host, libvirt__images_type="raw")
    node = host(libvirt__images_type="raw")

    fault = mock.Mock(side_effect=RuntimeError("can't start new thread"))
    monkeypatch.setattr(imgprealloc.Preallocator, "preallocate", fault)
    node.expect(instance, disk_info)

    assert "can't start new thread" in caplog.text
    assert {name: _inspect(node, instance, name, "raw").state for name in DISKS} == all_disks("thin")


@KINDS
def test_flavor_chooses_the_mode_of_the_targets(host: Callable[..., Host], kind: str) -> None:
    instance, disk_info = _source(host, libvirt__images_type=kind)
    instance.flavor = compute_host.flavor(imgprealloc__mode="metadata")
    node = host(libvirt__images_type=kind)

    node.expect(instance, disk_info)

    state = "mapped" if kind == "qcow2" else "thin"
    assert {name: _inspect(node, instance, name, kind).state for name in DISKS} == all_disks(state)


@pytest.mark.parametrize("subclusters", ["allocated", "copied"])
def test_nothing_is_allocated_in_targets_but_by_the_mirror(host: Callable[..., Host], subclusters: str) -> None:
    instance, disk_info = _source(host, libvirt__images_type="qcow2")
    instance.flavor = compute_host.flavor(imgprealloc__overlay_subclusters=subclusters)
    node = host(libvirt__images_type="qcow2")

    node.expect(instance, disk_info)

    assert {name: images.allocated_in_map(node.disk(instance, name)) for name in DISKS} == dict.fromkeys(DISKS, 0)


@KINDS
def test_destination_without_space_refuses_before_the_guest_is_sent(host: Callable[..., Host], kind: str) -> None:
    instance, disk_info = _source(host, libvirt__images_type=kind)
    huge = json.dumps([{**info, "virt_disk_size": 500 * 2**30} for info in json.loads(disk_info)])
    node = host(libvirt__images_type=kind)

    with pytest.raises(processutils.ProcessExecutionError):
        node.expect(instance, huge)


def _arriving(host: Callable[..., Host], kind: str, **options: Any) -> tuple[Host, compute_host.Instance]:
    """Return a guest whose disks the mirror has been through."""
    node = host(libvirt__images_type=kind, **options)
    instance = node.spawn(node.instance())
    node.write(instance)
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))
    return node, instance


@KINDS
def test_disks_that_arrive_take_what_they_need_whatever_is_to_be_kept_free(
    host: Callable[..., Host], kind: str
) -> None:
    node, instance = _arriving(host, kind, imgprealloc__keep_free="100%")

    node.arrived(instance)

    assert node.states(instance) == all_disks("preallocated")


# By which Nova is patient with a migration, and slow to let its guest stand still for longer.
GIB = 3


def _to_send(node: Host, instance: compute_host.Instance) -> float:
    """Return what Nova has to send, in GiB, beside the least that it counts of a guest's memory."""
    count = node.driver._live_migration_data_gb
    return float(count(instance, [node.disk(instance)]) - count(instance, []))


def _large(host: Callable[..., Host], **options: Any) -> tuple[Host, compute_host.Instance]:
    """Return a node with an instance whose disk is larger than the least that Nova counts, and has little in it."""
    node = host(**{"libvirt__images_type": "qcow2", **options})
    instance = node.spawn(node.instance(compute_host.flavor(root_gb=GIB)))
    node.write(instance)
    return node, instance


@pytest.mark.parametrize("mode", ["falloc", "metadata"])
def test_no_more_is_to_be_sent_than_of_stocks_disk(host: Callable[..., Host], mode: str) -> None:
    stock = _to_send(*_large(host, preallocated=False))

    node, instance = _large(host, imgprealloc__mode=mode)

    assert os.path.getsize(node.disk(instance)) > GIB * units.Gi
    assert _to_send(node, instance) == stock < GIB


def test_what_the_operator_has_had_allocated_is_to_be_sent(host: Callable[..., Host]) -> None:
    # The base image has 64 MiB.
    assert _to_send(*_large(host, imgprealloc__overlay_subclusters="allocated")) > GIB - 0.1


def test_all_of_a_raw_disk_is_to_be_sent_as_with_stock_nova(host: Callable[..., Host]) -> None:
    assert _to_send(*_large(host, libvirt__images_type="raw")) == GIB


@pytest.mark.parametrize("fault", [RuntimeError("a fault"), PermissionError("not ours to read")])
def test_fault_of_ours_keeps_no_guest_from_being_sent(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    node, instance = _large(host)
    monkeypatch.setattr(subclusters, "allocated", mock.Mock(side_effect=fault))

    assert _to_send(node, instance) == os.path.getsize(node.disk(instance)) / units.Gi


def test_disk_that_is_gone_is_left_to_nova(host: Callable[..., Host]) -> None:
    node, instance = _large(host)
    os.unlink(node.disk(instance))

    assert _to_send(node, instance) == 0


@pytest.mark.parametrize("mode", ["falloc", "full"])
@KINDS
def test_holes_that_the_mirror_made_are_filled_while_the_guest_runs(
    host: Callable[..., Host], kind: str, mode: str
) -> None:
    node, instance = _arriving(host, kind)
    instance.flavor = compute_host.flavor(imgprealloc__mode=mode)
    kept = node.keep(instance)
    before = node.inodes(instance)
    assert "preallocated" not in node.states(instance).values()

    with compute_host.in_use(node.disk(instance, "disk.swap"), kind):
        node.arrived(instance)

    assert node.states(instance) == all_disks("preallocated")
    assert node.inodes(instance) == before
    del kept["disk.swap"]
    assert node.changed(instance, kept) == []


@pytest.mark.parametrize("existing_disks", ["reserve", "rewrite"])
def test_disk_of_a_running_guest_is_never_replaced(host: Callable[..., Host], existing_disks: str) -> None:
    stock = host(preallocated=False, libvirt__images_type="qcow2")
    instance = stock.spawn(stock.instance())
    stock.write(instance)
    node = host(libvirt__images_type="qcow2", imgprealloc__existing_disks=existing_disks)
    node.take_over(stock)
    before = os.stat(node.disk(instance)).st_ino

    with compute_host.in_use(node.disk(instance), "qcow2"):
        node.arrived(instance)

    assert os.stat(node.disk(instance)).st_ino == before


@pytest.mark.parametrize("existing_disks", ["reserve", "rewrite"])
def test_disk_of_a_running_guest_is_not_replaced_where_qemu_sets_no_locks(
    host: Callable[..., Host], existing_disks: str
) -> None:
    stock = host(preallocated=False, preallocate_images="none", libvirt__images_type="qcow2")
    instance = stock.spawn(stock.instance())
    # The others hold nothing.
    compute_host.write(stock.disk(instance), "qcow2")
    node = host(libvirt__images_type="qcow2", imgprealloc__existing_disks=existing_disks)
    node.take_over(stock)
    before = node.inodes(instance)

    node.arrived(instance)

    assert node.states(instance) == all_disks("reserved")
    assert node.inodes(instance) == before


def test_zeros_are_not_written_where_a_guest_may_write(host: Callable[..., Host]) -> None:
    node = host(imgprealloc__mode="full", imgprealloc__on_unsupported="full")

    strategy = healing.without_zeros(strategies.asked_for(node.instance()))

    assert (strategy.mode, strategy.on_unsupported) == ("falloc", "metadata")


@KINDS
def test_migration_that_is_over_is_not_failed_by_a_disk(
    host: Callable[..., Host], kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node, instance = _arriving(host, kind)

    def fault(*_: Any, **__: Any) -> None:
        raise imgprealloc.exceptions.NoSpace("disk", "there is no space", "Free some.")

    monkeypatch.setattr(imgprealloc.Preallocator, "preallocate", fault)
    node.arrived(instance)

    assert "there is no space" in caplog.text


@KINDS
def test_migration_that_is_over_is_not_failed_by_a_flavor_that_cannot_be_had(
    host: Callable[..., Host], kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node, instance = _arriving(host, kind)

    def fault(*_: Any, **__: Any) -> None:
        raise RuntimeError("the database is away")

    monkeypatch.setattr(strategies, "asked_for", fault)
    node.arrived(instance)

    assert "the database is away" in caplog.text


@KINDS
def test_answer_to_the_source_waits_for_no_disk_operation(
    host: Callable[..., Host], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, instance = _arriving(host, kind)
    turns = threading.BoundedSemaphore(1)
    monkeypatch.setattr(compute_utils, "disk_ops_semaphore", turns)
    answered = threading.Event()

    def answer() -> None:
        node.arrived(instance, join=False)
        answered.set()

    with turns:
        threading.Thread(target=answer, daemon=True).start()
        assert answered.wait(60)
        [healer] = [thread for thread in threading.enumerate() if thread.name == imgprealloc.nova.BACKGROUND]
        # Nova stops all the same.
        assert healer.daemon
        assert "preallocated" not in node.states(instance).values()
    healer.join()

    assert node.states(instance) == all_disks("preallocated")


@KINDS
def test_targets_are_not_written_full_because_the_mirror_overwrites_them(
    host: Callable[..., Host], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    instance, disk_info = _source(host, libvirt__images_type=kind)
    node = host(libvirt__images_type=kind, imgprealloc__mode="full")

    node.expect(instance, disk_info)

    found = {name: _inspect(node, instance, name, kind) for name in DISKS}
    assert {name: image.state for name, image in found.items()} == all_disks("preallocated")
    # Of a qcow2 its metadata alone.
    assert all(_written(image.path) < image.virtual_size // 4 for image in found.values())
    assert caplog.text.count("falloc instead of full") == 1


@KINDS
def test_disks_that_are_built_are_written_full(host: Callable[..., Host], kind: str) -> None:
    # The control.
    node = host(libvirt__images_type=kind, imgprealloc__mode="full")
    instance = node.spawn(node.instance(compute_host.flavor(root_gb=1)))

    image = _inspect(node, instance, "disk.swap", kind)
    assert _written(image.path) >= image.virtual_size


def _written(path: str) -> int:
    return os.path.getsize(path) - images.unwritten(path)


def _inspect(node: Host, instance: compute_host.Instance, name: str, format: str) -> imgprealloc.DiskImage:
    return imgprealloc.Preallocator().inspect(node.disk(instance, name), format=format)
