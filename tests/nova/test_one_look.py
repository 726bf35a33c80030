# SPDX-License-Identifier: Apache-2.0
"""How often qemu-img is started for a disk, beside stock Nova: cache() and libvirt_info() of a build and of starts."""

from __future__ import annotations

import collections
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import subprocess
import threading
import time
from typing import Any

import compute_host
from compute_host import KINDS
from nova.compute import utils as compute_utils
from nova.virt.disk import api as disk_api
import nova_disks
from oslo_utils import units
import pytest

import imgprealloc
from imgprealloc import looks
from imgprealloc import qcow2_header

SIZE = units.Gi

_COUNTING = """#!/bin/sh
echo "$1" >> {log}
exec {qemu_img} "$@"
"""


class Counted:
    """The sub-commands that qemu-img was started with."""

    def __init__(self, log: pathlib.Path) -> None:
        self._log = log
        self.clear()

    def clear(self) -> None:
        self._log.write_text("")

    def taken(self) -> collections.Counter[str]:
        """Return what has been counted since the last call."""
        found = collections.Counter(self._log.read_text().split())
        self.clear()
        return found


@pytest.fixture
def qemu_img(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Put a qemu-img on the PATH that notes each start, whoever it is that starts it."""
    log, wrapper = tmp_path / "started", tmp_path / "bin" / "qemu-img"
    wrapper.parent.mkdir()
    wrapper.write_text(_COUNTING.format(log=log, qemu_img=shutil.which("qemu-img")))
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    return Counted(log)


def _described(image: Any) -> Any:
    return image.libvirt_info("none", {})


def _started(disks: nova_disks.Disks, built: Any, base: str, kind: str) -> Any:
    """Do what a hard reboot does: describe the guest, then look after its disk by another object."""
    folder = os.path.basename(os.path.dirname(built.path))
    instance = type("Instance", (), {"uuid": folder, "flavor": None, "name": "instance-1"})()
    config = _described(disks.image(instance, image_type=kind))
    disks.cache(disks.image(instance, image_type=kind), base, SIZE)
    return config


def _fresh(image: Any) -> None:
    """Let time pass after the last change of a disk, so that a next one would show in its inode."""
    os.utime(image.path, ns=(0, 0))
    threading.Event().wait(0.05)


@KINDS
def test_start_of_a_preallocated_disk_runs_no_qemu_img_that_stock_nova_s_does_not(
    disks: Callable[..., nova_disks.Disks], small_base: str, qemu_img: Counted, kind: str
) -> None:
    counts = {}
    for preallocated in (False, True):
        made = disks(preallocated=preallocated)
        built = made.spawn(small_base, SIZE, image_type=kind)
        # As a new process would.
        looks.forget()
        imgprealloc.nova._base_sizes.clear()
        starts = []
        for _ in range(2):
            qemu_img.clear()
            config = _started(made, built, small_base, kind)
            starts.append(qemu_img.taken())
        counts[preallocated] = starts
        assert config.driver_io == "native"

    assert [ours - stock for stock, ours in zip(counts[False], counts[True])] == [collections.Counter()] * 2
    # The control: stock Nova does look.
    assert counts[False][0].total() > 0


@KINDS
def test_description_of_a_disk_that_was_just_built_runs_no_qemu_img(
    disks: Callable[..., nova_disks.Disks], small_base: str, qemu_img: Counted, kind: str
) -> None:
    made = disks()
    for _ in range(2):
        built = made.spawn(small_base, SIZE, image_type=kind)
        assert qemu_img.taken().total() > 0

        assert _described(built).driver_io == "native"

        assert qemu_img.taken() == collections.Counter()


def test_growth_starts_qemu_img_no_more_often_than_stock_nova_s(
    disks: Callable[..., nova_disks.Disks], small_base: str, qemu_img: Counted
) -> None:
    counts = {}
    for preallocated in (False, True):
        made = disks(preallocated=preallocated)
        built = made.spawn(small_base, SIZE)
        qemu_img.clear()
        made.cache(made.image_at(built.path), small_base, 2 * SIZE)
        counts[preallocated] = qemu_img.taken()
        assert qcow2_header.virtual_size(built.path) == 2 * SIZE

    assert counts[True]["resize"] == counts[False]["resize"] == 1
    assert counts[True].total() <= counts[False].total()


@pytest.mark.parametrize("preallocated", [True, False], ids=["ours", "stock"])
@pytest.mark.parametrize("is_told", [True, False])
def test_nova_grows_the_filesystem_inside_where_it_is_told_to(
    disks: Callable[..., nova_disks.Disks],
    small_base: str,
    monkeypatch: pytest.MonkeyPatch,
    preallocated: bool,
    is_told: bool,
) -> None:
    looked_into = []
    monkeypatch.setattr(disk_api, "is_image_extendable", lambda image: looked_into.append(image.path))
    made = disks(preallocated=preallocated)
    built = made.spawn(small_base, SIZE)
    nova_disks.CONF.set_override("resize_fs_using_block_device", is_told)
    looked_into.clear()

    made.cache(made.image_at(built.path), small_base, 2 * SIZE)

    assert looked_into == ([built.path] if is_told else [])
    assert qcow2_header.virtual_size(built.path) == 2 * SIZE


@pytest.mark.parametrize("mode", ["falloc", "metadata"])
def test_start_of_a_disk_of_stock_nova_s_looks_once_and_the_next_not_at_all(
    disks: Callable[..., nova_disks.Disks], small_base: str, qemu_img: Counted, mode: str
) -> None:
    # reserved in one mode, thin in the other.
    stock = disks(preallocated=False, preallocate_images="none")
    built = stock.spawn(small_base, SIZE)
    qemu_img.clear()
    _started(stock, built, small_base, "qcow2")
    by_stock = qemu_img.taken()
    made = disks(imgprealloc__mode=mode)
    made.instances_path = stock.instances_path
    nova_disks.CONF.set_override("instances_path", stock.instances_path)

    _started(made, built, small_base, "qcow2")
    first = qemu_img.taken() - by_stock
    _fresh(built)
    _started(made, built, small_base, "qcow2")
    changed = qemu_img.taken() - by_stock
    _started(made, built, small_base, "qcow2")
    last = qemu_img.taken() - by_stock

    # A second check proves what was done by the first start.
    assert first["check"] == {"falloc": 2, "metadata": 1}[mode]
    assert changed["check"] == 1
    assert last == collections.Counter()


def test_nothing_is_looked_at_for_a_description_that_does_not_depend_on_it(
    disks: Callable[..., nova_disks.Disks], small_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = disks()
    built = made.spawn(small_base, SIZE)
    seen: list[str] = []
    monkeypatch.setattr(looks, "at", lambda strategy, path, format: seen.append(path))

    assert built.libvirt_info("writeback", {}).driver_io is None
    assert seen == []

    # The control.
    built.libvirt_info("none", {})
    assert seen == [built.path]


@contextlib.contextmanager
def _taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Let other disk operations have all turns (max_concurrent_disk_ops)."""
    semaphore = threading.BoundedSemaphore(1)
    monkeypatch.setattr(compute_utils, "disk_ops_semaphore", semaphore)
    semaphore.acquire()
    try:
        yield semaphore
    finally:
        semaphore.release()


@KINDS
def test_start_of_a_preallocated_disk_waits_for_no_other_disk_s_operation(
    disks: Callable[..., nova_disks.Disks], small_base: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = disks()
    built = made.spawn(small_base, SIZE, image_type=kind)
    with _taken(monkeypatch):
        start = threading.Thread(target=_started, args=(made, built, small_base, kind), daemon=True)
        start.start()
        start.join(60)

        assert not start.is_alive()


@KINDS
def test_start_that_has_something_to_do_to_a_disk_waits_for_its_turn(
    disks: Callable[..., nova_disks.Disks], small_base: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The control.
    made = disks()
    built = made.spawn(small_base, SIZE, image_type=kind)
    compute_host.lose_space(built.path)
    with _taken(monkeypatch):
        start = threading.Thread(target=_started, args=(made, built, small_base, kind), daemon=True)
        start.start()
        # Not join(2), which eventlet lets end with its own Timeout on Python 3.13.
        time.sleep(2)
        assert start.is_alive()
    start.join(60)

    assert not start.is_alive()
    assert imgprealloc.Preallocator().inspect(built.path, format=kind).state == "preallocated"


@pytest.mark.parametrize("room", ["xfs"], indirect=True)
def test_copy_that_shares_a_disk_s_extents_is_noticed_though_its_inode_is_as_it_was(
    disks: Callable[..., nova_disks.Disks], small_base: str
) -> None:
    made = disks()
    built = made.spawn(small_base, SIZE, image_type="raw")
    _fresh(built)
    strategy = imgprealloc.Preallocator()
    assert looks.at(strategy, built.path, "raw").state == "preallocated"
    before = os.stat(built.path)

    subprocess.run(["cp", "--reflink=always", built.path, f"{built.path}.copy"], check=True)

    after = os.stat(built.path)
    assert (before.st_ctime_ns, before.st_mtime_ns) == (after.st_ctime_ns, after.st_mtime_ns)
    assert looks.at(strategy, built.path, "raw").shared_bytes > 0
