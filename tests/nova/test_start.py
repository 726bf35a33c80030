# SPDX-License-Identifier: Apache-2.0
"""Disks that are there when an instance starts: start, hard reboot."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import tempfile
from typing import Any
from unittest import mock

import compute_host
from compute_host import DISKS
from compute_host import KINDS
from compute_host import Host
from compute_host import all_disks
import images
import loop_filesystem
from nova.virt.libvirt import driver as libvirt_driver
import nova_disks
from oslo_service import loopingcall
from oslo_utils import units
import pytest

import imgprealloc
from imgprealloc import filesystem
from imgprealloc import healing
from imgprealloc import strategies
import imgprealloc.nova

LOST = {"qcow2": "mapped", "raw": "thin"}


@contextlib.contextmanager
def _full(directory: str) -> Iterator[None]:
    """Take all space of the filesystem that a folder is on."""
    filler = os.path.join(directory, "filler")
    try:
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, filesystem.available(directory) - 128 * units.Mi)
        # Goes on where that has ended.
        loop_filesystem.fill(directory)
        yield
    finally:
        os.unlink(filler)


@contextlib.contextmanager
def _filled(directory: str, leave: int) -> Iterator[None]:
    """Take the space of the filesystem that a folder is on, but for so many bytes."""
    filler = os.path.join(directory, "filler")
    try:
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, filesystem.available(directory) - leave)
        yield
    finally:
        os.unlink(filler)


@KINDS
def test_start_fills_the_holes_of_disks_and_replaces_none(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    kept, before = node.keep(instance), node.inodes(instance)
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))
    assert node.states(instance) == all_disks(LOST[kind])

    node.start(instance)

    assert node.states(instance) == all_disks("preallocated")
    assert node.inodes(instance) == before
    assert node.changed(instance, kept) == []


@KINDS
def test_start_leaves_preallocated_disks_alone(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    kept = node.keep(instance)
    before = node.identities(instance)

    node.start(instance)

    assert node.identities(instance) == before
    assert node.changed(instance, kept) == []


@KINDS
def test_disk_that_nothing_was_written_to_is_not_replaced_at_a_start_either(
    host: Callable[..., Host], kind: str
) -> None:
    stock = host(preallocated=False, preallocate_images="none", libvirt__images_type=kind)
    instance = stock.spawn(stock.instance())
    before = stock.inodes(instance)
    node = host(libvirt__images_type=kind)
    node.take_over(stock)

    node.start(instance)

    assert node.states(instance) == all_disks({"qcow2": "reserved", "raw": "preallocated"}[kind])
    assert node.inodes(instance) == before


@pytest.mark.parametrize("existing_disks", ["reserve", "rewrite"])
def test_raw_disk_of_a_host_that_is_switched_to_qcow2_is_not_rewritten(
    host: Callable[..., Host], existing_disks: str
) -> None:
    node = host(libvirt__images_type="raw", imgprealloc__existing_disks=existing_disks)
    instance = node.spawn(node.instance())
    kept = node.keep(instance)
    path = node.disk(instance, "disk.eph0")
    for disk in (path, kept["disk.eph0"]):
        compute_host.write_qcow2_to(disk, with_data=True)
    nova_disks.CONF.set_override("images_type", "qcow2", group="libvirt")
    nova_disks.CONF.set_override("use_cow_images", True)

    # A guest on a raw root disk would not find it, by stock Nova either.
    with contextlib.suppress(Exception):
        node.start(instance)

    assert images.reads_like(path, "raw", kept["disk.eph0"])


@KINDS
def test_base_image_that_is_gone_is_fetched_at_a_start_also_where_no_temporary_file_can_be_made(
    host: Callable[..., Host], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    kept, before = node.keep(instance), node.inodes(instance)
    bases = os.path.join(node.path, "_base")
    names = sorted(os.listdir(bases))
    for name in names:
        # Those that Nova makes itself would not be the same again, by stock Nova either.
        if not name.startswith(("ephemeral", "swap")):
            os.unlink(os.path.join(bases, name))
    monkeypatch.setattr(tempfile, "tempdir", os.path.join(node.path, "full"))

    node.start(instance)

    if kind == "qcow2":
        assert sorted(os.listdir(bases)) == names
    assert node.inodes(instance) == before
    assert node.changed(instance, kept) == []


@pytest.mark.parametrize("root_gb", [1, 0])
@pytest.mark.parametrize("name", list(DISKS))
def test_header_in_a_raw_disk_has_no_more_set_aside_than_the_disk_was_made_with(
    host: Callable[..., Host], name: str, root_gb: int
) -> None:
    node = host(libvirt__images_type="raw")
    instance = node.spawn(node.instance(compute_host.flavor(root_gb)))
    path = node.disk(instance, name)
    compute_host.write_qcow2_to(path, with_data=False, size=20 * units.Gi)
    nova_disks.CONF.set_override("images_type", "qcow2", group="libvirt")
    nova_disks.CONF.set_override("use_cow_images", True)
    before = os.stat(path).st_blocks

    # The other disks are no qcow2, by stock Nova either.
    with contextlib.suppress(Exception):
        node.start(instance)

    assert os.stat(path).st_blocks == before


def test_disk_without_a_backing_file_is_started_on_a_full_host_as_by_stock_nova(
    host: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    # Nova starts such disks without its image backends, and without fallocate.
    node = host(libvirt__images_type="raw")
    instance = node.spawn(node.instance())
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))

    with _full(node.path):
        node.start(instance)

    assert node.states(instance)["disk"] == "thin"
    assert f"{node.disk(instance)}: not preallocated" in caplog.text


@pytest.mark.parametrize(("existing_disks", "state"), [("reserve", "reserved"), ("rewrite", "preallocated")])
def test_disks_of_stock_nova_are_rewritten_at_a_start_only_if_the_operator_asks(
    host: Callable[..., Host], existing_disks: str, state: str
) -> None:
    stock = host(preallocated=False, libvirt__images_type="qcow2")
    instance = stock.spawn(stock.instance())
    kept, before = stock.keep(instance), stock.inodes(instance)
    assert stock.states(instance) == all_disks("thin")
    node = host(libvirt__images_type="qcow2", imgprealloc__existing_disks=existing_disks)
    node.take_over(stock)

    node.start(instance)

    assert node.states(instance) == all_disks(state)
    assert (node.inodes(instance) == before) == (existing_disks == "reserve")
    assert node.changed(instance, kept) == []


@KINDS
def test_trim_is_ignored_from_the_start_that_heals_a_disk(host: Callable[..., Host], kind: str) -> None:
    # Nova describes the guest before it looks after the disks.
    node = host(libvirt__images_type=kind, libvirt__hw_disk_discard="unmap")
    instance = node.spawn(node.instance())
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))

    node.start(instance)

    assert [disk.driver_discard for disk in node.described(instance)] == ["ignore"] * 3


def test_trim_is_let_through_where_nothing_is_held(host: Callable[..., Host]) -> None:
    node = host(libvirt__images_type="raw", libvirt__hw_disk_discard="unmap", imgprealloc__mode="metadata")
    instance = node.spawn(node.instance())

    node.start(instance)

    assert [disk.driver_discard for disk in node.described(instance)] == ["unmap"] * 3


@KINDS
def test_mode_that_there_is_not_in_an_old_flavor_keeps_no_guest_from_starting(
    host: Callable[..., Host], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Nova's API validates extra specs only from its version 2.86 on, and an
    # instance keeps its flavor for life.
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance(compute_host.flavor(imgprealloc__mode="sparse")))

    node.start(instance)

    assert node.states(instance) == all_disks("preallocated")
    assert caplog.text.count("'sparse'") == 1


@KINDS
def test_fault_of_ours_keeps_no_guest_from_starting(
    host: Callable[..., Host], kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())

    def fault(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(imgprealloc.Preallocator, "has_work", fault)
    monkeypatch.setattr(imgprealloc.Preallocator, "inspect", fault)
    node.start(instance)

    assert "can't start new thread" in caplog.text


@KINDS
def test_fault_of_ours_keeps_no_guest_from_being_described(
    host: Callable[..., Host], kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = host(libvirt__images_type=kind, libvirt__hw_disk_discard="unmap")
    instance = node.spawn(node.instance())
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))

    monkeypatch.setattr(imgprealloc.Preallocator, "plan", mock.Mock(side_effect=RuntimeError("can't start new thread")))
    node.start(instance)

    assert "can't start new thread" in caplog.text
    assert {disk.driver_discard for disk in node.described(instance)} == {"unmap"}


@KINDS
def test_disk_that_is_not_ours_to_write_is_told_and_started(
    host: Callable[..., Host], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    compute_host.lose_space(node.disk(instance))
    # Not even root may write to it.
    images.run(*loop_filesystem.AS_ROOT, "chattr", "+i", node.disk(instance))
    try:
        node.start(instance)
    finally:
        images.run(*loop_filesystem.AS_ROOT, "chattr", "-i", node.disk(instance))

    assert node.inspect(instance).state == LOST[kind]
    assert f"{node.disk(instance)}: not preallocated" in caplog.text


@KINDS
def test_start_without_preallocation_looks_at_no_disk_more_than_stock_nova(
    host: Callable[..., Host], kind: str, commands: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    for name in ("stat", "access", "open"):
        original = getattr(os, name)

        def listening(path: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            # Which number an open file has, is chance.
            if not isinstance(path, int):
                looks.append(f"{_name} {os.path.basename(str(path))}")
            return _original(path, *args, **kwargs)

        monkeypatch.setattr(os, name, listening)

    def done_by(node: Host) -> tuple[list[str], list[list[str]]]:
        instance = node.spawn(node.instance())
        commands.clear()
        looks.clear()
        node.start(instance)
        return (
            [look.replace(instance.uuid, "instance").replace(os.path.basename(node.path), "all") for look in looks],
            [[os.path.basename(word) for word in command] for command in commands],
        )

    options = {"libvirt__images_type": kind, "preallocate_images": "none"}

    assert done_by(host(**options)) == done_by(host(preallocated=False, **options))


# Of 100 % nothing may be taken, however much there is.


@KINDS
def test_start_leaves_disks_as_they_are_where_others_are_to_keep_the_space(
    host: Callable[..., Host], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = host(libvirt__images_type=kind, imgprealloc__keep_free="100%")
    instance = node.spawn(node.instance())
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))
    domain = node.domains[instance.uuid]

    for _ in range(2):
        node.start(instance)

    assert node.states(instance) == all_disks(LOST[kind])
    assert node.domains[instance.uuid] is not domain
    assert "beside what is to be kept free (100%)" in caplog.text
    assert [caplog.text.count(f"{node.disk(instance, name)}: not preallocated") for name in DISKS] == [1, 1, 1]


@KINDS
def test_trim_is_let_through_where_others_are_to_keep_the_space(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind, libvirt__hw_disk_discard="unmap", imgprealloc__keep_free="100%")
    instance = node.spawn(node.instance())
    built = [disk.driver_discard for disk in node.described(instance)]
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))

    node.start(instance)

    assert (built, [disk.driver_discard for disk in node.described(instance)]) == (["ignore"] * 3, ["unmap"] * 3)


@KINDS
def test_build_takes_what_it_needs_whatever_is_to_be_kept_free(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind, imgprealloc__keep_free="100%")

    assert node.states(node.spawn(node.instance())) == all_disks("preallocated")


@KINDS
def test_space_is_taken_at_a_start_where_enough_is_left_for_others(host: Callable[..., Host], kind: str) -> None:
    # With 3 GiB free, less than the disks lack.
    node = host(libvirt__images_type=kind, imgprealloc__keep_free="1G")
    instance = node.spawn(node.instance())
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))

    with _filled(node.path, 5 * units.Gi // 2):
        node.start(instance)
        states, available = node.states(instance), filesystem.available(node.path)

    # The first one and swap fit, the other one does not.
    assert sorted(states.values()) == sorted([LOST[kind], "preallocated", "preallocated"])
    assert available >= units.Gi


def _resume(node: Host, instance: compute_host.Instance) -> None:
    xml = node.domains[instance.uuid].xml
    node.driver._get_existing_domain_xml = lambda *_: xml
    node.driver._get_mdevs_from_guest_config = node.driver._attach_mediated_devices = mock.Mock()
    node.driver._attach_pci_devices = node.driver._attach_direct_passthrough_ports = mock.Mock()
    instance.get_pci_devices = mock.Mock(return_value=[])
    node.driver._wait_for_running = mock.Mock(side_effect=loopingcall.LoopingCallDone)
    compute_host._call(
        node.driver.resume, compute_host.CONTEXT, instance, compute_host.NETWORK,
        block_device_info=compute_host.block_devices(), share_info=[],
    )  # fmt: skip


def _unrescue(node: Host, instance: compute_host.Instance) -> None:
    node.rescue(instance)
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))
    node.driver.unrescue(compute_host.CONTEXT, instance)


def _soft_reboot(node: Host, instance: compute_host.Instance) -> None:
    def launch(driver: Any, rebooted: compute_host.Instance) -> bool:
        """Shut the guest down and have libvirt start it again, as it is described already."""
        node.domains[rebooted.uuid] = compute_host.Domain(rebooted.uuid, node.domains[rebooted.uuid].xml)
        return True

    with mock.patch.object(libvirt_driver.LibvirtDriver, "_soft_reboot", launch):
        node.driver.reboot(compute_host.CONTEXT, instance, compute_host.NETWORK, "SOFT")


# Of these Nova lets its image backends know nothing.
PAST_CACHE = pytest.mark.parametrize(
    "start", [Host.boot, _resume, _unrescue, _soft_reboot], ids=["boot", "resume", "unrescue", "soft-reboot"]
)


@PAST_CACHE
@KINDS
def test_holes_are_filled_where_nova_starts_a_guest_without_looking_after_its_disks(
    host: Callable[..., Host], kind: str, start: Callable[..., None]
) -> None:
    # Nothing is copied there that would take its time.
    node = host(libvirt__images_type=kind, imgprealloc__existing_disks="rewrite")
    instance = node.spawn(node.instance())
    kept, before = node.keep(instance), node.inodes(instance)
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))
    assert node.states(instance) == all_disks(LOST[kind])

    start(node, instance)

    assert node.states(instance) == all_disks("preallocated")
    assert node.inodes(instance) == before
    assert node.changed(instance, kept) == []


@PAST_CACHE
@KINDS
def test_such_a_start_takes_nothing_of_what_others_are_to_keep(
    host: Callable[..., Host], kind: str, start: Callable[..., None]
) -> None:
    node = host(libvirt__images_type=kind, imgprealloc__keep_free="100%")
    instance = node.spawn(node.instance())
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))

    start(node, instance)

    assert node.states(instance) == all_disks(LOST[kind])


@PAST_CACHE
def test_such_a_start_is_kept_from_nothing_by_a_fault_of_ours(
    host: Callable[..., Host], start: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    node = host()
    instance = node.spawn(node.instance())
    domain = node.domains[instance.uuid]

    def fault(*_: Any, **__: Any) -> None:
        raise RuntimeError("the database is away")

    monkeypatch.setattr(strategies, "asked_for", fault)
    start(node, instance)

    assert node.domains[instance.uuid] is not domain
    assert "the database is away" in caplog.text


def test_such_a_start_on_a_full_host_goes_on(host: Callable[..., Host], caplog: pytest.LogCaptureFixture) -> None:
    node = host(libvirt__images_type="raw")
    instance = node.spawn(node.instance())
    compute_host.lose_space(node.disk(instance))

    with _full(node.path):
        node.boot(instance)

    assert node.states(instance)["disk"] == "thin"
    assert f"{node.disk(instance)}: not preallocated" in caplog.text


@KINDS
def test_disks_of_which_nova_has_noted_another_format_are_left_alone_then(host: Callable[..., Host], kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))
    noted = os.path.join(node.path, instance.uuid, "disk.info")
    with open(noted) as file:
        content = file.read()
    other = {"raw": "qcow2", "qcow2": "raw"}[kind]
    with open(noted, "w") as file:
        file.write(content.replace(f'"{kind}"', f'"{other}"'))
    before = node.identities(instance)

    imgprealloc.nova._heal_described(node.domains[instance.uuid].xml, instance, is_started=True)

    assert node.identities(instance) == before


@KINDS
def test_disk_that_cache_has_looked_after_is_not_looked_after_again(
    host: Callable[..., Host], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    asked: list[str] = []
    heal = healing.heal

    def listening(strategy: Any, path: str, *args: Any, **kwargs: Any) -> None:
        asked.append(os.path.basename(path))
        heal(strategy, path, *args, **kwargs)

    monkeypatch.setattr(healing, "heal", listening)
    node.start(instance)

    assert sorted(asked) == sorted(DISKS)


def test_trim_is_let_through_where_the_filesystem_can_hold_nothing(
    host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = host(libvirt__images_type="raw", libvirt__hw_disk_discard="unmap")
    instance = node.spawn(node.instance())
    for name in DISKS:
        compute_host.lose_space(node.disk(instance, name))
    monkeypatch.setattr(filesystem, "under", lambda folder: filesystem.Filesystem("ext3", False, False))

    node.start(instance)

    assert [disk.driver_discard for disk in node.described(instance)] == ["unmap"] * 3
