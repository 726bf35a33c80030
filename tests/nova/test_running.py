# SPDX-License-Identifier: Apache-2.0
"""Disks of guests that run: what they give back is set aside again, by root where nova-compute may not."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
import os
import pathlib
import pwd
import subprocess
import sys
import threading
from typing import Any
from unittest import mock

import compute_host
from compute_host import DISKS
from compute_host import KINDS
from compute_host import Host
from compute_host import all_disks
import images
from nova.compute import task_states
from nova.compute import utils as compute_utils
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
import nova_disks
from oslo_utils import units
import pytest

import imgprealloc
from imgprealloc import looks
from imgprealloc import qemu_img
from imgprealloc import refilling
import imgprealloc.nova
from nova import objects

HOST = "here"


class Node:
    """A compute node with one guest that has given space back, and whose nova-compute has been started."""

    def __init__(self, host: Host, instance: Any, database: list[Any]) -> None:
        self.host = host
        self.instance = instance
        self.database = database

    def round(self) -> None:
        """Let it go round once."""
        assert self.host.driver._rounds is not None
        self.host.driver._rounds.round()

    @property
    def states(self) -> dict[str, str]:
        """Look at all disks anew."""
        looks.forget()
        return self.host.states(self.instance)


@pytest.fixture
def node(host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Node]]:
    """Return how to get such a node; what libvirt and the database do as the service starts is stood in for."""
    started: list[Any] = []
    database: list[Any] = []
    asked = mock.Mock(side_effect=lambda context, name, expected_attrs: [i for i in database if i.host == name])
    monkeypatch.setattr(objects.InstanceList, "get_by_host", asked)
    monkeypatch.setattr(libvirt_driver.LibvirtDriver, "init_host", lambda self, host: None)
    monkeypatch.setattr(libvirt_driver.LibvirtDriver, "cleanup_host", lambda self, host: None)

    def make(kind: str, flavor: Any = None, *, thin: bool = False, **options: Any) -> Node:
        made = host(libvirt__images_type=kind, **options)
        instance = made.spawn(made.instance(flavor))
        made.write(instance)
        database.append(instance)
        driver = made.driver
        driver._host.list_guests.side_effect = lambda only_running: [
            libvirt_guest.Guest(domain) for domain in made.domains.values()
        ]
        driver.init_host(HOST)
        started.append(driver)
        here = Node(made, instance, database)
        if driver._rounds is not None and not thin:
            here.round()
        for name in DISKS:
            compute_host.lose_space(made.disk(instance, name))
        return here

    yield make
    for driver in started:
        driver.cleanup_host(HOST)
    # Some wait for their first round.
    assert all(thread.daemon for thread in _threads())


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == imgprealloc.nova.BACKGROUND]


@KINDS
def test_space_that_a_running_guest_has_given_back_is_set_aside_again(node: Callable[..., Node], kind: str) -> None:
    here = node(kind)
    kept = here.host.keep(here.instance)
    inodes = here.host.inodes(here.instance)
    assert "preallocated" not in here.states.values()

    with compute_host.in_use(here.host.disk(here.instance, "disk.swap"), kind):
        here.round()

    assert here.states == all_disks("preallocated")
    assert here.host.inodes(here.instance) == inodes
    del kept["disk.swap"]
    assert here.host.changed(here.instance, kept) == []


@KINDS
def test_what_others_are_to_keep_is_not_given_to_a_guest_again(
    node: Callable[..., Node], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    here = node(kind, imgprealloc__keep_free="100%")
    before = here.states

    here.round()

    assert here.states == before
    assert "beside what is to be kept free" in caplog.text


@pytest.mark.parametrize("existing_disks", ["reserve", "rewrite"])
def test_disk_of_a_running_guest_is_neither_replaced_nor_longer_afterwards(
    node: Callable[..., Node], existing_disks: str
) -> None:
    here = node("qcow2", imgprealloc__existing_disks=existing_disks)
    paths = [here.host.disk(here.instance, name) for name in DISKS]
    for path in paths:
        # What QEMU before 9.1 makes of a zeroing that may free space: clusters are free, and not to be had twice.
        images.qemu_io(path, "discard 0 60M")
    before = [(os.stat(path).st_ino, os.stat(path).st_size) for path in paths]

    here.round()

    assert [(os.stat(path).st_ino, os.stat(path).st_size) for path in paths] == before
    for path in paths:
        assert 0 <= os.stat(path).st_blocks * 512 - os.stat(path).st_size < 72 * 128 * units.Ki
        assert images.holes(path) == 0


@pytest.mark.parametrize(
    ("qemu", "states"), [((9, 0), {"reserved"}), ((9, 1), {"thin"})], ids=["gives back", "does not"]
)
def test_overlay_of_which_a_guest_has_given_back_clusters_has_what_it_may_ask_for(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, qemu: tuple[int, int], states: set[str]
) -> None:
    monkeypatch.setattr(qemu_img, "version", lambda path="qemu-img": qemu)
    here = node("qcow2")
    paths = [here.host.disk(here.instance, name) for name in DISKS]
    # As QEMU before 9.1 does it for a guest that zeroes, whatever it is told of discards: no hole is made.
    for path in paths:
        disk = f"driver=qcow2,discard=unmap,file.driver=file,file.discard=ignore,file.filename={path}"
        images.run("qemu-io", "-c", "write -z -u 0 20M", "--image-opts", disk)
    assert set(here.states.values()) == {"thin"}

    here.round()

    assert set(here.states.values()) == states
    # Also once it gives back more.
    for path in paths:
        disk = f"driver=qcow2,discard=unmap,file.driver=file,file.discard=ignore,file.filename={path}"
        images.run("qemu-io", "-c", "write -z -u 20M 40M", "--image-opts", disk)
    assert set(here.states.values()) == states


def test_what_is_held_past_a_disk_s_end_is_no_promise(
    room: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_img, "version", lambda path="qemu-img": (9, 0))
    disk = str(pathlib.Path(room, tmp_path.name))
    made = imgprealloc.Preallocator().create(disk, 256 * units.Mi)
    refilling.forget()
    try:
        # Nothing is refused that others are to keep; what is there stays the same.
        assert refilling.refill(imgprealloc.Preallocator(keep_free="100%"), disk, format="qcow2") == 0
        assert refilling.refill(imgprealloc.Preallocator(), disk, format="raw") == 0
        refilling.forget()
        held = refilling.refill(imgprealloc.Preallocator(), disk, format="qcow2")
        assert 0 < held < 72 * 64 * units.Ki
        assert refilling.refill(imgprealloc.Preallocator(), disk, format="qcow2") == 0
        after = imgprealloc.Preallocator().inspect(disk, format="qcow2")
        assert (after.state, after.file_size, after.allocated_size - made.allocated_size) == (
            "preallocated", made.file_size, held
        )  # fmt: skip
    finally:
        os.unlink(disk)


@KINDS
def test_disk_that_was_thin_before_is_left_to_its_next_start(node: Callable[..., Node], kind: str) -> None:
    here = node(kind, thin=True)
    looks.forget()
    refilling.forget()
    before = here.host.identities(here.instance)

    here.round()

    assert here.host.identities(here.instance) == before


def test_what_a_fragmented_disk_has_lost_is_noticed_beside_its_extent_map_s_own_blocks(
    node: Callable[..., Node],
) -> None:
    here = node("raw", thin=True)
    path = here.host.disk(here.instance, "disk.swap")
    images.run("fallocate", "--length", DISKS["disk.swap"], path)
    with open(path, "r+b") as disk:
        for offset in range(0, DISKS["disk.swap"], 8192):
            os.pwrite(disk.fileno(), b"x" * 4096, offset)
        os.fsync(disk.fileno())
    here.round()
    images.run("fallocate", "--punch-hole", "--offset", 4096, "--length", 4096, path)
    assert os.stat(path).st_blocks * 512 > os.stat(path).st_size
    assert images.holes(path) == 4096

    here.round()

    assert images.holes(path) == 0


def test_folder_of_the_instances_may_be_written_otherwise_than_when_the_guest_was_started(
    node: Callable[..., Node],
) -> None:
    # As state_path with a slash at its end has it, here or where the guest has come from.
    here = node("raw")
    nova_disks.CONF.set_override("instances_path", "//".join(os.path.split(here.host.path)))

    here.round()

    assert here.states == all_disks("preallocated")


@KINDS
def test_flavor_that_promises_no_space_gets_none(node: Callable[..., Node], kind: str) -> None:
    here = node(kind, compute_host.flavor(imgprealloc__mode="metadata"))
    before = here.host.identities(here.instance)

    here.round()

    assert here.host.identities(here.instance) == before


@pytest.mark.parametrize(
    "field", [{"task_state": task_states.MIGRATING}, {"host": "there"}], ids=["at-work", "of-another-host"]
)
def test_what_nova_is_at_work_on_is_left_for_the_next_round(node: Callable[..., Node], field: dict[str, str]) -> None:
    here = node("raw")
    before = {name: getattr(here.instance, name) for name in field}
    for name, value in field.items():
        setattr(here.instance, name, value)

    here.round()
    assert "preallocated" not in here.states.values()

    for name, value in before.items():
        setattr(here.instance, name, value)
    here.round()
    assert here.states == all_disks("preallocated")


def test_nova_s_semaphore_is_not_waited_for(node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
    here = node("raw")
    turns = mock.MagicMock(spec=["__enter__", "__exit__"])
    monkeypatch.setattr(compute_utils, "disk_ops_semaphore", turns)

    here.round()

    turns.__enter__.assert_not_called()
    assert here.states == all_disks("preallocated")


@KINDS
def test_round_in_which_nothing_has_changed_starts_no_program(
    node: Callable[..., Node], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = node(kind)
    here.round()
    monkeypatch.setattr(imgprealloc.command, "run", mock.Mock(side_effect=AssertionError("a program")))

    here.round()

    assert imgprealloc.command.run.call_count == 0  # type: ignore[attr-defined]


def test_guest_that_fails_keeps_the_others_from_nothing(
    node: Callable[..., Node], caplog: pytest.LogCaptureFixture
) -> None:
    here = node("raw")
    lost = mock.Mock(uuid="00000000-0000-0000-0000-000000000000", host=HOST, task_state=None)
    here.database.insert(0, lost)
    here.host.domains[lost.uuid] = gone = compute_host.Domain(lost.uuid, "")
    gone.XMLDesc = mock.Mock(side_effect=RuntimeError("no such domain"))  # type: ignore[method-assign]

    here.round()

    assert "no such domain" in caplog.text
    assert here.states == all_disks("preallocated")


def test_guest_that_has_ended_since_the_round_began_is_worth_no_warning(
    node: Callable[..., Node], caplog: pytest.LogCaptureFixture
) -> None:
    here = node("raw")
    libvirt = libvirt_driver.libvirt
    ended = libvirt.libvirtError("Domain not found")
    ended.err = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_FROM_QEMU, "Domain not found", 2)
    xml = mock.Mock(side_effect=ended)
    here.host.domains[here.instance.uuid].XMLDesc = xml  # type: ignore[method-assign]

    here.round()

    assert xml.called
    assert caplog.text == ""


@pytest.mark.parametrize(
    "options",
    [
        {"imgprealloc__heal_interval": 0},
        {"preallocate_images": "none"},
        {"libvirt__hw_disk_discard": "unmap", "imgprealloc__protect_from_discard": False},
    ],
)
def test_nothing_goes_round_where_it_is_switched_off(node: Callable[..., Node], options: dict[str, Any]) -> None:
    before = len(_threads())

    here = node("raw", **options)

    assert here.host.driver._rounds is None
    assert len(_threads()) == before


def test_service_that_is_started_again_has_one_thread(node: Callable[..., Node]) -> None:
    before = len(_threads())
    here = node("raw")

    here.host.driver.init_host(HOST)

    assert len(_threads()) == before + 1


def test_service_starts_also_where_there_is_no_thread_to_be_had(
    node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = node("raw", imgprealloc__heal_interval=0)
    nova_disks.CONF.set_override("heal_interval", 600, group="imgprealloc")
    before = len(_threads())

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        here.host.driver.init_host(HOST)

    assert "can't start new thread" in caplog.text
    here.host.driver.init_host(HOST)
    assert len(_threads()) == before + 1


# The disk of a running guest belongs to libvirt's user, or to root.

_UNPRIVILEGED = """
import ctypes
import os
import sys

import nova.conf
from nova import privsep
from oslo_privsep import priv_context

from imgprealloc import Preallocator
from imgprealloc import refilling
from nova.privsep import imgprealloc as as_root

path, format, uid, filler = sys.argv[1:]
nova.conf.CONF([], project="nova")
if filler == "root":
    # The daemon is Nova's; who starts it (sudo, rootwrap) is the host's.
    privsep.sys_admin_pctxt.start(priv_context.Method.FORK)
# What Python imports at the first use of it, this user may not read.
Preallocator().inspect(path, format=format)
Preallocator().holds_space(path)
os.setgroups([])
os.setresgid(int(uid), int(uid), int(uid))
os.setresuid(int(uid), int(uid), int(uid))
# As in a program that was started as this user: its children may open what is in /proc/PID/fd.
PR_SET_DUMPABLE = 4
assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
assert not os.access(path, os.W_OK)

fill = as_root.fill if filler == "root" else None
try:
    refilling.refill(Preallocator(), path, fill, format=format)
except Exception as exc:
    print(exc)
print(Preallocator().inspect(path, format=format).state)
sys.stdout.flush()
os._exit(0)
"""


def _as_nobody(path: str, format: str, filler: str) -> str:
    nobody = pwd.getpwnam("nobody").pw_uid
    # Where tests have their files, nobody else may look.
    command = ["unshare", "--mount", "sh", "-ec", 'mount --bind "$0" /mnt; exec "$@"', os.path.dirname(path)]
    command += [sys.executable, "-W", "ignore", "-c", _UNPRIVILEGED, f"/mnt/{os.path.basename(path)}"]
    command += [format, str(nobody), filler]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout, done.stderr)
    return done.stdout.split()[-1]


@pytest.fixture
def folder(room: str) -> Iterator[pathlib.Path]:
    """Return an instance's folder, which belongs to the service's user, unlike the disks in it."""
    path = pathlib.Path(room, "of-nobody")
    path.mkdir()
    nobody = pwd.getpwnam("nobody").pw_uid
    os.chown(path, nobody, nobody)
    yield path
    images.run("rm", "-r", path)


@pytest.mark.as_root
@pytest.mark.parametrize("owner", ["games", "root"])
@KINDS
def test_holes_in_a_disk_of_somebody_else_s_are_filled_by_nova_s_privileged_daemon(
    folder: pathlib.Path, kind: str, owner: str
) -> None:
    disk = str(folder / "disk")
    imgprealloc.Preallocator().create(disk, 256 * units.Mi, format=kind)
    compute_host.write(disk, kind)
    images.run("fallocate", "--punch-hole", "--offset", 128 * units.Mi, "--length", 16 * units.Mi, disk)
    os.chown(disk, pwd.getpwnam(owner).pw_uid, 0)
    os.chmod(disk, 0o644)
    before = os.stat(disk)

    with compute_host.in_use(disk, kind):
        # The control: without the daemon it is left as it is.
        assert _as_nobody(disk, kind, "nobody") in ("thin", "mapped")
        assert _as_nobody(disk, kind, "root") == "preallocated"

    after = os.stat(disk)
    assert (after.st_ino, after.st_uid, after.st_gid, after.st_mode) == (
        before.st_ino, before.st_uid, before.st_gid, before.st_mode,
    )  # fmt: skip
    images.qemu_io(disk, "read -P 7 70M 1M", format=kind)
