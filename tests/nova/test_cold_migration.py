# SPDX-License-Identifier: Apache-2.0
"""Disks that Nova copies to another host and makes larger: resize, cold migration, and the way back.

One folder stands for both hosts: a copy goes from what Nova has renamed to
the name of before.
"""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import shutil
from typing import Any
from unittest import mock

import compute_host
from compute_host import DISKS
from compute_host import KINDS
from compute_host import Host
from compute_host import all_disks
import nova_disks
from oslo_utils import units
import pytest

import imgprealloc

# Where a copy costs nothing.
CLONES = pytest.mark.parametrize("room", ["xfs"], indirect=True)

# Swap is not copied, but made anew at the destination.
COPIED = ("disk", "disk.eph0")

_SSH = """#!/bin/sh
# Do on this host what is to be done on another, where the folder has not been renamed.
mkdir -p "$FOLDER_OF_THE_OTHER_HOST"
subsystem=
while true; do
    case $1 in
        -o | -l) shift 2 ;;
        -s) subsystem=yes; shift ;;
        -*) shift ;;
        *) break ;;
    esac
done
shift
if [ "$subsystem" ]; then
    exec /usr/lib/openssh/sftp-server
fi
exec sh -c "$*"
"""


@pytest.fixture
def neighbour(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the address of another host, which real scp and rsync reach, though by no network."""
    ssh, scp = tmp_path / "ssh", tmp_path / "scp"
    ssh.write_text(_SSH)
    scp.write_text(f'#!/bin/sh\nexec {shutil.which("scp")} -S {ssh} "$@"\n')
    for program in ssh, scp:
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return "192.0.2.7"


def _migrate(node: Host, instance: compute_host.Instance, transport: str, neighbour: str, flavor: Any) -> str:
    """Copy the disks as Nova does, by scp, rsync, or, where the folder is shared, cp."""
    nova_disks.CONF.set_override(
        "remote_filesystem_transport", "rsync" if transport == "rsync" else "ssh", group="libvirt"
    )
    folder = {"FOLDER_OF_THE_OTHER_HOST": os.path.dirname(node.disk(instance))}
    shared = mock.patch.object(node.driver, "_is_path_shared_with", return_value=transport == "cp")
    with shared, mock.patch.dict(os.environ, folder):
        return node.migrate(instance, flavor, neighbour)


def _copied(node: Host, instance: compute_host.Instance) -> set[str]:
    return {node.inspect(instance, name).state for name in COPIED}


@pytest.mark.parametrize(
    ("room", "transport", "kind", "state"),
    [
        # It writes the zeros that it reads.
        ("ext4", "scp", "qcow2", "preallocated"),
        ("ext4", "scp", "raw", "preallocated"),
        ("ext4", "rsync", "qcow2", "mapped"),
        ("ext4", "rsync", "raw", "thin"),
        # It makes clones, whose extents are shared.
        ("xfs", "cp", "qcow2", "mapped"),
        ("xfs", "cp", "raw", "thin"),
    ],
    indirect=["room"],
    # That of the room, which pytest before 9 does not find by itself.
    scope="session",
)
def test_resize_heals_the_copies_and_grows_them_preallocated(
    host: Callable[..., Host], neighbour: str, transport: str, kind: str, state: str
) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    kept = node.keep(instance)
    assert node.states(instance) == all_disks("preallocated")
    disk_info = _migrate(node, instance, transport, neighbour, compute_host.flavor(root_gb=2))
    assert _copied(node, instance) == {state}
    assert not os.path.exists(node.disk(instance, "disk.swap"))
    del kept["disk.swap"]

    node.finish_migration(instance, disk_info)

    assert node.states(instance) == all_disks("preallocated")
    assert node.inspect(instance).virtual_size == 2 * units.Gi
    assert node.changed(instance, kept) == []


@KINDS
def test_disks_that_arrive_or_grow_take_what_they_need_whatever_is_to_be_kept_free(
    host: Callable[..., Host], neighbour: str, kind: str
) -> None:
    node = host(libvirt__images_type=kind, imgprealloc__keep_free="100%")
    instance = node.spawn(node.instance())
    disk_info = _migrate(node, instance, "rsync", neighbour, compute_host.flavor(root_gb=2))
    assert "preallocated" not in _copied(node, instance)

    node.finish_migration(instance, disk_info)

    assert node.states(instance) == all_disks("preallocated")
    assert node.inspect(instance).virtual_size == 2 * units.Gi


def test_stock_resize_leaves_the_copies_thin(host: Callable[..., Host], neighbour: str) -> None:
    # The control.
    node = host(preallocated=False, libvirt__images_type="qcow2")
    instance = node.spawn(node.instance())
    disk_info = _migrate(node, instance, "rsync", neighbour, compute_host.flavor(root_gb=2))

    node.finish_migration(instance, disk_info)

    assert node.states(instance) == all_disks("thin")


@CLONES
@KINDS
def test_reverted_resize_finds_its_disks_as_they_were(host: Callable[..., Host], neighbour: str, kind: str) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    kept = node.keep(instance)
    before = node.identities(instance)
    disk_info = _migrate(node, instance, "cp", neighbour, compute_host.flavor(root_gb=2))
    node.finish_migration(instance, disk_info)
    node.write(instance)

    node.revert_migration(instance)

    assert node.states(instance) == all_disks("preallocated")
    assert node.identities(instance) == before
    assert node.changed(instance, kept) == []


def _from_raw(host: Callable[..., Host], neighbour: str, flavor: Any, **options: Any) -> Any:
    """Copy raw disks from a host that has such to one that has qcow2."""
    node = host(libvirt__images_type="raw", **options)
    instance = node.spawn(node.instance())
    kept = node.keep(instance)
    disk_info = _migrate(node, instance, "cp", neighbour, flavor)
    del kept["disk.swap"]
    nova_disks.CONF.set_override("images_type", "qcow2", group="libvirt")
    nova_disks.CONF.set_override("use_cow_images", True)
    return node, instance, disk_info, kept


@CLONES
def test_disks_that_a_migration_converts_to_qcow2_are_reserved(host: Callable[..., Host], neighbour: str) -> None:
    node, instance, disk_info, kept = _from_raw(host, neighbour, compute_host.flavor())
    assert _copied(node, instance) == {"thin"}

    node.finish_migration(instance, disk_info)

    assert set(node.formats(instance).values()) == {"qcow2"}
    assert node.states(instance) == all_disks("reserved")
    assert {node.inspect(instance, name).shortfall for name in DISKS} == {0}
    assert node.changed(instance, kept) == []


@CLONES
def test_disks_that_a_migration_converts_to_qcow2_are_rewritten_if_the_operator_asks(
    host: Callable[..., Host], neighbour: str
) -> None:
    node, instance, disk_info, kept = _from_raw(
        host, neighbour, compute_host.flavor(), imgprealloc__existing_disks="rewrite"
    )

    node.finish_migration(instance, disk_info)

    assert node.states(instance) == all_disks("preallocated")
    assert node.changed(instance, kept) == []


@CLONES
def test_flavor_chooses_the_mode_of_converted_disks(host: Callable[..., Host], neighbour: str) -> None:
    flavor = compute_host.flavor(imgprealloc__mode="metadata")
    node, instance, disk_info, kept = _from_raw(host, neighbour, flavor)

    node.finish_migration(instance, disk_info)

    # Of this mode, nothing can be done to a disk with data, short of rewriting it.
    assert node.states(instance) == all_disks("thin")
    assert node.changed(instance, kept) == []


@CLONES
@pytest.mark.parametrize("with_data", [False, True], ids=["blank", "with_data"])
@pytest.mark.parametrize("existing_disks", ["reserve", "rewrite"])
def test_raw_disk_that_its_guest_wrote_a_qcow2_file_to_is_not_taken_for_qcow2(
    host: Callable[..., Host], neighbour: str, existing_disks: str, with_data: bool
) -> None:
    # The root disk's header Nova itself would enlarge.
    node = host(libvirt__images_type="raw", imgprealloc__existing_disks=existing_disks)
    instance = node.spawn(node.instance())
    kept = node.keep(instance)
    del kept["disk.swap"]
    for path in (node.disk(instance, "disk.eph0"), kept["disk.eph0"]):
        compute_host.write_qcow2_to(path, with_data=with_data)
    disk_info = _migrate(node, instance, "cp", neighbour, compute_host.flavor())
    nova_disks.CONF.set_override("images_type", "qcow2", group="libvirt")
    nova_disks.CONF.set_override("use_cow_images", True)

    node.finish_migration(instance, disk_info)

    assert set(node.formats(instance).values()) == {"qcow2"}
    assert node.changed(instance, kept) == []


@CLONES
def test_conversion_makes_no_false_alarm(
    host: Callable[..., Host], neighbour: str, caplog: pytest.LogCaptureFixture
) -> None:
    node, instance, disk_info, _ = _from_raw(host, neighbour, compute_host.flavor())
    caplog.clear()

    node.finish_migration(instance, disk_info)

    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


def test_fault_of_ours_keeps_no_disk_from_growing(
    host: Callable[..., Host], neighbour: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = host(libvirt__images_type="qcow2")
    instance = node.spawn(node.instance())
    disk_info = _migrate(node, instance, "cp", neighbour, compute_host.flavor(root_gb=2))

    fault = mock.Mock(side_effect=RuntimeError("can't start new thread"))
    monkeypatch.setattr(imgprealloc.Preallocator, "resize", fault)
    node.finish_migration(instance, disk_info)

    assert "can't start new thread" in caplog.text
    assert node.inspect(instance).virtual_size == 2 * units.Gi
