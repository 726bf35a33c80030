# SPDX-License-Identifier: Apache-2.0
"""Whose a disk is, and who may do what to it: as stock Nova leaves it; and disks that are not nova-compute's own.

While a guest runs its disks are libvirt's user's, and after that Nova's again, or
root's (remember_owner = 0 in qemu.conf), or still libvirt's.
"""

from __future__ import annotations

from collections.abc import Callable
import ctypes
import os
import pathlib
import pwd
import stat
import struct
import subprocess
from typing import Any

import compute_host
from compute_host import DISKS
from compute_host import KINDS
from compute_host import Host
from compute_host import all_disks
from functional import faulty_filesystem
import images
import loop_filesystem
import nova_disks
from oslo_utils import units
import pytest

import imgprealloc
import imgprealloc.nova

# For libvirt's, which is not on each host; any other than the one that runs this.
OTHER = "games"

OWNERS = pytest.mark.parametrize("owner", [OTHER, "root"])

_ACL, _DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"


def _acl(*entries: tuple[str, str, str]) -> bytes:
    """Return an ACL as the kernel has it: (user, group, mask or other; a name or nothing; letters)."""
    tags = {("user", False): 1, ("user", True): 2, ("group", False): 4, ("mask", False): 16, ("other", False): 32}
    packed = struct.pack("<I", 2)
    for kind, name, letters in entries:
        number = pwd.getpwnam(name).pw_uid if name else 0xFFFFFFFF
        rights = sum({"r": 4, "w": 2, "x": 1}[letter] for letter in letters)
        packed += struct.pack("<HHI", tags[kind, bool(name)], rights, number)
    return packed


def _attributes(path: str) -> tuple[int, int, str, dict[str, bytes]]:
    """Return owner, group, mode, and all extended attributes with their ACLs."""
    status = os.stat(path)
    extended = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    return status.st_uid, status.st_gid, stat.filemode(status.st_mode), extended


def _of_all_disks(node: Host, instance: compute_host.Instance) -> dict[str, Any]:
    return {name: _attributes(node.disk(instance, name)) for name in DISKS}


def _plain(folder: str) -> None:
    """Leave the folder as it is."""


def _with_a_default_acl(folder: str) -> None:
    entries = [("user", "", "rwx"), ("user", OTHER, "rw"), ("group", "", "rx"), ("mask", "", "rwx"), ("other", "", "")]
    os.setxattr(folder, _DEFAULT_ACL, _acl(*entries))


def _with_a_group_of_its_own(folder: str) -> None:
    images.run(*loop_filesystem.AS_ROOT, "chgrp", str(pwd.getpwnam(OTHER).pw_gid), folder)
    images.run(*loop_filesystem.AS_ROOT, "chmod", "2775", folder)


FOLDERS = pytest.mark.parametrize("prepare", [_plain, _with_a_default_acl, _with_a_group_of_its_own])


def _spawned(node: Host, prepare: Callable[[str], None]) -> compute_host.Instance:
    prepare(node.path)
    return node.spawn(node.instance())


@FOLDERS
@KINDS
def test_new_disks_are_whose_they_are_with_stock_nova(
    host: Callable[..., Host], kind: str, prepare: Callable[[str], None]
) -> None:
    def left_by(node: Host) -> dict[str, Any]:
        return _of_all_disks(node, _spawned(node, prepare))

    ours = left_by(host(libvirt__images_type=kind))
    stock = left_by(host(preallocated=False, libvirt__images_type=kind))

    assert ours == stock
    if prepare is _with_a_default_acl:
        assert _ACL in ours["disk"][3]
    if prepare is _with_a_group_of_its_own:
        assert ours["disk"][1] == pwd.getpwnam(OTHER).pw_gid


def _given_rights(path: str) -> None:
    """Change what may be changed of a disk without another owner."""
    os.chmod(path, 0o640)
    entries = [("user", "", "rw"), ("user", OTHER, "rw"), ("group", "", "r"), ("mask", "", "rw"), ("other", "", "")]
    os.setxattr(path, _ACL, _acl(*entries))
    os.setxattr(path, "user.note", b"kept")


@pytest.mark.parametrize("existing_disks", ["reserve", "rewrite"])
@FOLDERS
@KINDS
def test_disks_that_are_started_keep_their_rights(
    host: Callable[..., Host], kind: str, existing_disks: str, prepare: Callable[[str], None]
) -> None:
    stock = host(preallocated=False, libvirt__images_type=kind)
    instance = _spawned(stock, prepare)
    for name in DISKS:
        _given_rights(stock.disk(instance, name))
    before, inodes = _of_all_disks(stock, instance), stock.inodes(instance)
    node = host(libvirt__images_type=kind, imgprealloc__existing_disks=existing_disks)
    node.take_over(stock)

    node.start(instance)

    assert _of_all_disks(node, instance) == before
    # The control: they have been made anew.
    assert (node.inodes(instance) == inodes) == (kind == "raw" or existing_disks == "reserve")


@FOLDERS
@KINDS
def test_disks_that_grow_keep_their_rights(
    host: Callable[..., Host], kind: str, prepare: Callable[[str], None]
) -> None:
    node = host(libvirt__images_type=kind)
    instance = _spawned(node, prepare)
    for name in DISKS:
        _given_rights(node.disk(instance, name))
    before = _of_all_disks(node, instance)

    instance.flavor = instance.new_flavor = compute_host.flavor(root_gb=2)
    node.spawn(instance)

    assert node.inspect(instance).virtual_size == 2 * units.Gi
    assert _of_all_disks(node, instance) == before


# As in a service that was started as its user.


@pytest.mark.as_user
def test_these_tests_run_as_a_service_does() -> None:
    PR_GET_DUMPABLE = 3
    with open("/proc/self/status") as file:
        status = dict(line.split(":\t", 1) for line in file)

    assert os.geteuid() != 0
    assert int(status["CapEff"], 16) == 0
    assert ctypes.CDLL(None).prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 1
    assert int(images.run(*loop_filesystem.AS_ROOT, "id", "-u")) == 0


def _give_to(owner: str, node: Host, instance: compute_host.Instance, *, mode: str = "644") -> None:
    """Let disks be somebody else's, with the rights that Nova's have."""
    for name in DISKS:
        images.run(*loop_filesystem.AS_ROOT, "chown", f"{owner}:", node.disk(instance, name))
        images.run(*loop_filesystem.AS_ROOT, "chmod", mode, node.disk(instance, name))


@pytest.mark.as_user
@pytest.mark.parametrize("existing_disks", ["reserve", "rewrite"])
@pytest.mark.parametrize("mode", ["falloc", "full"])
@OWNERS
@KINDS
def test_holes_in_disks_of_somebody_else_s_are_filled_at_a_start_and_they_stay_theirs(
    host: Callable[..., Host], kind: str, owner: str, mode: str, existing_disks: str
) -> None:
    node = host(libvirt__images_type=kind, imgprealloc__mode=mode, imgprealloc__existing_disks=existing_disks)
    instance = node.spawn(node.instance())
    kept = node.keep(instance)
    for name in DISKS:
        images.run("fallocate", "--punch-hole", "-o", 40 * units.Mi, "-l", 2 * units.Mi, kept[name])
        images.run("fallocate", "--punch-hole", "-o", 40 * units.Mi, "-l", 2 * units.Mi, node.disk(instance, name))
    _give_to(owner, node, instance)
    before, inodes = _of_all_disks(node, instance), node.inodes(instance)
    assert "preallocated" not in node.states(instance).values()

    node.start(instance)

    assert node.states(instance) == all_disks("preallocated")
    assert (_of_all_disks(node, instance), node.inodes(instance)) == (before, inodes)


@pytest.mark.as_user
@OWNERS
@KINDS
def test_stock_s_disks_of_somebody_else_s_are_reserved_at_a_start(
    host: Callable[..., Host], kind: str, owner: str
) -> None:
    stock = host(preallocated=False, preallocate_images="none", libvirt__images_type=kind)
    instance = stock.spawn(stock.instance())
    kept = stock.keep(instance)
    _give_to(owner, stock, instance)
    before = _of_all_disks(stock, instance)
    node = host(libvirt__images_type=kind, imgprealloc__existing_disks="rewrite")
    node.take_over(stock)

    node.start(instance)

    assert node.states(instance) == all_disks({"qcow2": "reserved", "raw": "preallocated"}[kind])
    assert _of_all_disks(node, instance) == before
    assert node.changed(instance, kept) == []


@pytest.mark.as_user
@pytest.mark.parametrize("mode", ["falloc", "full"])
@KINDS
def test_disk_is_built_where_each_file_is_somebody_else_s(
    disks: Callable[..., nova_disks.Disks], small_base: str, kind: str, mode: str
) -> None:
    # NFS with all_squash, or whose users' names are not known; CIFS with uid=.
    made = disks(imgprealloc__mode=mode)
    instance = made.instance()
    below = pathlib.Path(made.instances_path, "below")
    below.mkdir()
    owner = pwd.getpwnam(OTHER).pw_uid
    with faulty_filesystem.mounted(below, pathlib.Path(made.instances_path, instance.uuid), owner=owner):
        image = made.image(instance, "disk", kind)

        made.cache(image, small_base, 256 * units.Mi)

        assert os.stat(image.path).st_uid == owner
        assert imgprealloc.Preallocator().inspect(image.path, format=kind).state == "preallocated"


@pytest.mark.as_user
@KINDS
def test_disk_that_is_ours_to_write_but_not_to_make_anew_is_reserved(host: Callable[..., Host], kind: str) -> None:
    # As in a group with libvirt's user (dynamic_ownership = 0), or by an ACL.
    stock = host(preallocated=False, preallocate_images="none", libvirt__images_type=kind)
    instance = stock.spawn(stock.instance())
    kept = stock.keep(instance)
    _give_to(OTHER, stock, instance, mode="666")
    before = _of_all_disks(stock, instance)
    node = host(libvirt__images_type=kind, imgprealloc__existing_disks="rewrite")
    node.take_over(stock)

    node.start(instance)

    assert node.states(instance) == all_disks({"qcow2": "reserved", "raw": "preallocated"}[kind])
    assert _of_all_disks(node, instance) == before
    assert node.changed(instance, kept) == []


@pytest.mark.as_user
@OWNERS
@KINDS
def test_disk_that_may_not_even_be_read_is_told_and_started(
    host: Callable[..., Host], kind: str, owner: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = host(libvirt__images_type=kind)
    instance = node.spawn(node.instance())
    _give_to(owner, node, instance, mode="600")

    # The host's boot, which asks for no size of a disk.
    node.boot(instance)

    for name in DISKS:
        assert f"{node.disk(instance, name)}: not preallocated" in caplog.text


@pytest.mark.as_user
def test_command_says_of_a_disk_of_somebody_else_s_what_is_to_be_done(host: Callable[..., Host]) -> None:
    node = host(libvirt__images_type="raw")
    instance = node.spawn(node.instance())
    compute_host.lose_space(node.disk(instance))
    _give_to("root", node, instance)

    with pytest.raises(imgprealloc.PreallocationError, match="permissions") as caught:
        imgprealloc.Preallocator().preallocate(node.disk(instance), format="raw")

    assert caught.value.path == node.disk(instance)
    done = subprocess.run(
        [*loop_filesystem.AS_ROOT, "fallocate", "-n", "-l", str(units.Gi), node.disk(instance)], check=False
    )
    assert done.returncode == 0
