# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from importlib import metadata
import json
import logging
import os
import pathlib
import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import fixtures
from oslo_config import cfg
from oslo_utils import units
from prometheus_client import parser
import pytest

from imgprealloc import check_nova
from imgprealloc import cli
from imgprealloc import domains
from imgprealloc import instances
from imgprealloc import service
from imgprealloc import sizes
from imgprealloc.cli import abreast
from imgprealloc.cli import disks
from imgprealloc.filesystem import Filesystem
from imgprealloc.image import FileStamp

from .host import SIZE
from .host import Host
from .host import opened_by_qemu

Run = Callable[..., Any]

# As design and documentation promise them to scripts.
KEYS = [
    "instance",
    "name",
    "path",
    "format",
    "virtual_size",
    "file_size",
    "allocated_size",
    "backing_file",
    "clusters",
    "mapped_clusters",
    "fragmented_clusters",
    "shared_bytes",
    "in_use",
    "state",
    "shortfall",
    "error",
]
INSTANCE = "0d7a2c1e-53b7-4e0c-9f52-3b1f0c6d9a11"


@pytest.fixture
def run(host: Host, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Give a function that runs the command in this process, and returns its status, out and err."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)

    def run(*argv: str) -> SimpleNamespace:
        try:
            status = cli.main(list(argv))
        except SystemExit as exc:
            # argparse's.
            status = int(exc.code or 0)
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    yield run
    # cliff adds its own, and never takes them away.
    root.setLevel(level)
    root.handlers[:] = handlers


def note_format(host: Host, noted: object) -> None:
    """Write Nova's disk.info beside the disk."""
    with open(host.path("disk.info"), "w") as file:
        json.dump(noted, file)


# show


def test_show_gives_scripts_exactly_the_documented_keys(host: Host, run: Run) -> None:
    shown = run("show", "-f", "json", host.overlay())

    assert [list(disk) for disk in json.loads(shown.out)] == [KEYS]


def test_show_gives_scripts_plain_bytes_and_counts(host: Host, run: Run) -> None:
    disk = host.overlay(mapped=0.5, held=5 * units.Mi, shared=units.Mi)

    (shown,) = json.loads(run("show", "-f", "json", disk).out)

    assert {key: shown[key] for key in KEYS if key not in ("allocated_size", "shortfall")} == {
        "instance": None,
        "name": None,
        "path": disk,
        "format": "qcow2",
        "virtual_size": SIZE,
        "file_size": 9 * units.Mi,
        "backing_file": host.path("base"),
        "clusters": 256,
        "mapped_clusters": 128,
        "fragmented_clusters": 0,
        "shared_bytes": units.Mi,
        "in_use": False,
        "state": "thin",
        "error": None,
    }
    assert isinstance(shown["shortfall"], int)
    assert shown["allocated_size"] == os.stat(disk).st_blocks * 512


def test_show_leaves_out_nothing_of_a_raw_disk(host: Host, run: Run) -> None:
    disk = host.raw(held=units.Mi)

    (shown,) = json.loads(run("show", "-f", "json", disk).out)

    assert list(shown) == KEYS
    assert (shown["clusters"], shown["mapped_clusters"], shown["backing_file"]) == (None, None, None)
    assert (shown["state"], shown["shortfall"]) == ("thin", SIZE - units.Mi)


def test_show_gives_people_a_table_with_readable_sizes(host: Host, run: Run) -> None:
    shown = run("show", host.raw(3 * units.Gi, held=units.Gi + units.Gi // 2))

    assert shown.out.startswith("+--")
    assert "| 3 GiB " in shown.out
    assert "| 1.5 GiB " in shown.out


def test_disk_that_cannot_be_read_is_a_row_with_its_error(host: Host, run: Run) -> None:
    shown = run("show", "-f", "json", host.path("missing"), host.raw())

    failed, read = json.loads(shown.out)
    assert (failed["path"], failed["state"], failed["virtual_size"]) == (host.path("missing"), None, None)
    assert failed["error"] == f"{host.path('missing')}: there is no such file. Check the path."
    assert (read["state"], read["error"]) == ("thin", None)
    assert "| error " in run("show", host.path("missing")).out


def test_thin_tells_of_a_missing_disk_as_the_others_do(run: Run, host: Host) -> None:
    (shown,) = json.loads(run("thin", "-f", "json", host.path("missing")).out)

    assert shown["error"] == f"{host.path('missing')}: there is no such file. Check the path."


def test_thin_works_once_on_a_disk_that_is_named_twice(run: Run, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = host.raw(held=SIZE)
    monkeypatch.chdir(host.folder)

    told = run("thin", "-f", "json", "--disk-format", "raw", disk, disk, os.path.basename(disk))

    assert len(json.loads(told.out)) == 1


@pytest.mark.parametrize(
    ("options", "sum_"),
    [
        ([], f"1 filled; {sizes.readable(SIZE)} more held than before."),
        (["--dry-run"], f": 1 fill; {sizes.readable(SIZE)} of new space, "),
    ],
    ids=str,
)
def test_space_of_a_disk_that_is_named_twice_is_told_once(
    run: Run, host: Host, monkeypatch: pytest.MonkeyPatch, options: list[str], sum_: str
) -> None:
    disk = host.raw()
    monkeypatch.chdir(host.folder)

    told = run("allocate", *options, "--disk-format", "raw", disk, os.path.basename(disk))

    # A row for each name, and a sum.
    assert len(told.out.splitlines()) == (7 if options else 8)
    assert sum_ in told.out.splitlines()[-1]


def instance_with(host: Host, *names: str) -> str:
    """Make an instance's folder with disks; return it."""
    folder = host.path(INSTANCE)
    os.mkdir(folder)
    for name in names:
        host.raw(name=os.path.join(INSTANCE, name))
    return folder


def test_disk_is_told_with_its_instance(host: Host, run: Run) -> None:
    disk = os.path.join(instance_with(host, "disk"), "disk")

    (shown,) = json.loads(run("show", "-f", "json", disk).out)

    assert (shown["instance"], shown["path"]) == (INSTANCE, disk)


LIBVIRT_XML = """<domain type='kvm'>
  <name>instance-00000001</name>
  <uuid>{uuid}</uuid>
  <metadata>
    <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
      <nova:name>{name}</nova:name>
      <nova:flavor name="m1.small"/>
    </nova:instance>
  </metadata>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='{format}' cache='none'/>
      <source file='{disk}' index='1'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source file='/var/lib/nova/mnt/0d7a/volume-1'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <source file='{disk}.config'/>
    </disk>
    <disk type='network' device='disk'><driver name='qemu' type='raw'/></disk>
  </devices>
</domain>
"""


@pytest.fixture
def libvirt(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Give a folder in which libvirt has its records, of instances that run and of all."""
    for name in ("run", "etc"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(domains, "_FOLDERS", (str(tmp_path / "run"), str(tmp_path / "etc")))
    return tmp_path


def note_domain(file: pathlib.Path, disk: str, *, name: str = "web1", format: str = "raw", uuid: str = INSTANCE) -> str:
    """Write what libvirt does; return it."""
    said = LIBVIRT_XML.format(uuid=uuid, name=name, format=format, disk=disk)
    file.write_text(said if file.parent.name == "etc" else f"<domstatus state='running'>{said}</domstatus>")
    return said


@pytest.mark.parametrize("where", ["run", "etc"])
def test_disk_is_told_with_the_name_of_its_instance(host: Host, run: Run, libvirt: pathlib.Path, where: str) -> None:
    disk = os.path.join(instance_with(host, "disk", "disk.swap"), "disk")
    note_domain(libvirt / where / "instance-00000001.xml", disk, name="web 1\x7f\u202e")

    rows = json.loads(run("show", "-f", "json", host.folder).out)

    assert [row["name"] for row in rows] == ["web 1\\x7f\\u202e"] * 2
    assert "web 1" in run("show", "--long", host.folder).out


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_disk_of_which_nova_has_no_record_is_what_libvirt_has_on_record(
    host: Host, run: Run, libvirt: pathlib.Path, format: str
) -> None:
    folder = os.path.dirname(host.path(os.path.join(INSTANCE, "disk")))
    os.mkdir(folder)
    disk = host.qcow2(name=os.path.join(INSTANCE, "disk"), mapped=0.5)
    # By another path, as from within a container.
    note_domain(libvirt / "etc" / "instance-00000001.xml", f"/var/lib/nova/instances/{INSTANCE}/disk", format=format)

    shown = run("allocate", "--rewrite", "-f", "value", "-c", "format", "-c", "state", disk)

    assert (shown.status, shown.out) == (0, f"{format} preallocated\n")
    assert host.run("info") == []


def test_nova_s_word_that_a_disk_is_raw_weighs_more_than_libvirt_s(host: Host, run: Run, libvirt: pathlib.Path) -> None:
    os.mkdir(host.path(INSTANCE))
    disk = host.qcow2(name=os.path.join(INSTANCE, "disk"), mapped=0.5)
    note_domain(libvirt / "etc" / "instance-00000001.xml", disk, format="qcow2")
    with open(os.path.join(host.path(INSTANCE), "disk.info"), "w") as file:
        json.dump({disk: "raw"}, file)

    assert run("show", "-f", "value", "-c", "format", disk).out == "raw\n"


def test_what_libvirt_says_of_one_that_runs_counts_before_what_it_has_on_file(
    host: Host, run: Run, libvirt: pathlib.Path
) -> None:
    disk = os.path.join(instance_with(host, "disk"), "disk")
    note_domain(libvirt / "run" / "instance-00000001.xml", disk, name="now")
    note_domain(libvirt / "etc" / "instance-00000001.xml", disk, name="before")

    assert run("show", "-f", "value", "-c", "name", disk).out == "now\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"<domain", b"<domain/>", b"<pool><uuid>x</uuid></pool>", b"\xff" * 100, b" " * (2 << 20), None],
    ids=["empty", "cut off", "nobody's", "a pool", "no text", "too long", "a FIFO"],
)
def test_record_of_libvirt_s_that_cannot_be_read_keeps_nobody_from_the_rest(
    host: Host, run: Run, libvirt: pathlib.Path, content: bytes | None
) -> None:
    disk = os.path.join(instance_with(host, "disk"), "disk")
    odd = libvirt / "etc" / "a.xml"
    if content is None:
        os.mkfifo(odd)
    else:
        odd.write_bytes(content)
    note_domain(libvirt / "etc" / "b.xml", disk)

    assert run("show", "-f", "value", "-c", "name", disk).out == "web1\n"


def test_volumes_and_config_drives_are_not_taken_from_libvirt_s_record(libvirt: pathlib.Path) -> None:
    note_domain(libvirt / "etc" / "a.xml", f"/instances/{INSTANCE}/disk")

    assert domains.known()[INSTANCE].formats == {f"/instances/{INSTANCE}/disk": "raw"}


@pytest.mark.parametrize("verb", ["show", "allocate", "check", "metrics"])
def test_empty_file_of_which_nobody_says_what_it_is_is_no_preallocated_disk(host: Host, run: Run, verb: str) -> None:
    disk = host.raw(0)

    told = run(verb, disk)

    assert told.status == (3 if verb == "check" else 1)
    assert f"{disk}: the file is empty, and nobody's word tells its format" in told.err
    assert "preallocated |" not in told.out


def test_empty_file_that_is_said_to_be_raw_is_a_disk_of_no_size(host: Host, run: Run) -> None:
    disk = host.raw(0)

    assert run("show", "--disk-format", "raw", "-f", "value", "-c", "state", disk).out == "preallocated\n"
    note_format(host, {disk: "raw"})
    assert run("show", "-f", "value", "-c", "state", disk).out == "preallocated\n"


@pytest.mark.parametrize("verb", [["allocate"], ["allocate", "--rewrite"], ["show"]], ids=" ".join)
def test_base_that_is_missing_is_told_with_the_disk_s_name(host: Host, run: Run, verb: list[str]) -> None:
    disk = host.overlay()
    os.unlink(host.path("base"))

    told = run(*verb, "--disk-format", "qcow2", disk)

    assert f"{disk}: its backing file {host.path('base')} is not there" in told.err
    assert told.status == (0 if verb == ["show"] else 1)


def test_base_that_is_there_is_not_told_of(host: Host, run: Run) -> None:
    assert run("show", "--disk-format", "qcow2", host.overlay()).err == ""


def test_table_fits_80_characters_and_ends_with_a_sum(host: Host, run: Run) -> None:
    folder = instance_with(host, "disk", "disk.eph0", "disk.swap")
    host.raw(name=os.path.join(INSTANCE, "disk.local"), held=SIZE)

    lines = run("show", folder).out.splitlines()

    assert max(map(len, lines[:-1])) <= 80
    assert [line.split()[1] for line in lines[3:-2]] == [INSTANCE[:8]] * 4
    assert f": 3 thin, 1 preallocated; {disks.Size(3 * SIZE).human_readable()} short, " in lines[-1]
    assert lines[-1].endswith(" available")


def test_long_table_has_paths(host: Host, run: Run) -> None:
    disk = host.raw()

    assert disk in run("show", "--long", disk).out


def test_folder_stands_for_the_disks_in_it_and_nothing_else(host: Host, run: Run) -> None:
    folder = instance_with(host, "disk", "disk.eph10", "disk.config", "disk.info", "disk.rescue", "console.log")
    host.raw(name="disk.swap")
    host.raw(name="base")

    shown = run("show", "-f", "value", "-c", "path", host.folder)

    paths = [os.path.join(folder, "disk"), os.path.join(folder, "disk.eph10"), host.path("disk.swap")]
    assert (shown.status, shown.out.split()) == (0, paths)


@pytest.mark.parametrize("verb", ["show", "allocate"])
def test_without_a_path_all_instances_of_this_host_are_meant(
    host: Host, run: Run, verb: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = instance_with(host, "disk")
    home = tmp_path / "home"
    (home / ".nova").mkdir(parents=True)
    (home / ".nova" / "nova.conf").write_text(
        f"[DEFAULT]\nstate_path = {host.folder}\ninstances_path = $state_path/.\n"
    )
    monkeypatch.setenv("HOME", str(home))

    # Whatever may run on this machine.
    with fixtures.MockPatchObject(service, "found", service.Invocation):
        shown = run(verb, "-f", "value", "-c", "path", "--disk-format", "raw")

    assert (shown.status, os.path.realpath(shown.out.strip())) == (0, os.path.join(folder, "disk"))


def test_host_s_instances_are_where_its_nova_compute_has_been_told_that_they_are(
    host: Host, run: Run, tmp_path: pathlib.Path
) -> None:
    folder = instance_with(host, "disk")
    (tmp_path / "nova-cpu.conf").write_text(f"[DEFAULT]\ninstances_path = {host.folder}\n")
    started = service.Invocation(arguments=("--config-file", "nova-cpu.conf"), environment={}, folder=str(tmp_path))

    with fixtures.MockPatchObject(service, "found", lambda: started):
        shown = run("show", "-f", "value", "-c", "path", "--disk-format", "raw")

    assert shown.out.split() == [os.path.join(folder, "disk")]


def test_folder_without_disks_is_an_error_and_keeps_the_rest_from_nothing(host: Host, run: Run) -> None:
    os.mkdir(host.path("empty"))

    shown = run("show", "--check", "-f", "value", "-c", "path", host.path("empty"), host.raw(held=SIZE))

    assert (shown.status, shown.out.split()) == (1, [host.path()])
    assert host.path("empty") in shown.err


def test_folder_that_cannot_be_listed_is_a_row_and_one_that_has_just_gone_is_not(host: Host, run: Run) -> None:
    folder = instance_with(host, "disk")
    gone, closed = INSTANCE.replace("0d7a", "0000"), INSTANCE.replace("0d7a", "0001")
    for name in (gone, closed):
        os.mkdir(host.path(name))
    listdir = os.listdir

    def list_or_fail(path: str) -> list[str]:
        for name, error in ((gone, FileNotFoundError()), (closed, PermissionError())):
            if os.path.basename(path) == name:
                raise error
        return listdir(path)

    with fixtures.MockPatchObject(os, "listdir", list_or_fail):
        shown = run("show", "-f", "json", host.folder)

    assert [row["path"] for row in json.loads(shown.out)] == [host.path(closed), os.path.join(folder, "disk")]
    assert shown.status == 1


def test_what_a_resize_has_left_is_no_instance_s(host: Host, run: Run) -> None:
    folder = instance_with(host, "disk")
    os.rename(folder, f"{folder}_resize")

    assert run("show", host.folder).status == 1


def test_rows_are_sorted_by_state_also_where_one_has_none(host: Host, run: Run) -> None:
    paths = [host.raw(name="thin"), host.path("missing"), host.raw(held=SIZE)]

    shown = run("show", "--sort-column", "state", "-f", "value", "-c", "path", "-c", "state", *paths)

    assert [line.split()[1] for line in shown.out.splitlines()] == ["None", "preallocated", "thin"]


def test_folder_that_is_not_there_is_an_error(host: Host, run: Run) -> None:
    with fixtures.MockPatchObject(instances, "configured_path", lambda *_: host.path("nowhere")):
        ended = run("show")

    assert ended.status == 1
    assert host.path("nowhere") in ended.err


def test_show_gives_one_word_where_one_is_asked_for(host: Host, run: Run) -> None:
    assert run("show", "-f", "value", "-c", "state", host.raw(held=SIZE)).out == "preallocated\n"


def test_show_writes_nothing(host: Host, run: Run) -> None:
    run("show", "--check", host.overlay(), host.raw(name="raw"))

    assert host.changes == []


def test_show_is_content_with_a_thin_disk_unless_it_is_to_check(host: Host, run: Run) -> None:
    assert run("show", host.raw()).status == 0


def test_check_is_content_with_preallocated_disks(host: Host, run: Run) -> None:
    assert run("show", "--check", host.raw(held=SIZE), host.qcow2(name="other", mapped=1)).status == 0


@pytest.mark.parametrize("order", [1, -1])
def test_check_finds_one_thin_disk_among_others(host: Host, run: Run, order: int) -> None:
    disks = [host.raw(held=SIZE), host.raw(name="thin")]

    assert run("show", "--check", *disks[::order]).status == 3


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_disk_that_cannot_be_read_does_not_keep_the_rest_from_being_shown(host: Host, run: Run, missing: int) -> None:
    paths = [host.raw(), host.raw(name="other")]
    paths.insert(missing, host.path("missing"))

    shown = run("show", "--check", "-f", "value", "-c", "path", *paths)

    # An error weighs more than a disk that is thin.
    assert shown.status == 1
    assert shown.out.split() == paths
    assert f"{host.path('missing')}: there is no such file" in shown.err


@pytest.fixture
def two_cpus() -> Iterator[None]:
    """Let the command have two, whatever the machine has."""
    with fixtures.MockPatchObject(abreast, "cpus", lambda: 2):
        yield


def test_show_looks_at_as_many_disks_at_a_time_as_there_are_cpus(host: Host, run: Run, two_cpus: None) -> None:
    together = threading.Barrier(2, timeout=20)
    host.then["check"] = together.wait
    paths = [host.qcow2(name=f"disk{number}", mapped=1) for number in range(6)]

    shown = run("show", "-f", "value", "-c", "path", *paths)

    assert (shown.status, shown.out.split()) == (0, paths)


def test_show_tells_disks_and_errors_in_the_order_that_was_asked_for(host: Host, run: Run, two_cpus: None) -> None:
    paths = [host.path(f"disk{number}") for number in range(30)]
    for number, path in enumerate(paths):
        if number % 3:
            host.qcow2(name=os.path.basename(path), mapped=1)

    shown = run("show", "--check", "-f", "value", "-c", "path", *paths)

    assert (shown.status, shown.out.split()) == (1, paths)
    assert [line.partition(": ")[0] for line in shown.err.splitlines()] == paths[::3]


@pytest.mark.parametrize("verb", [["allocate"], ["allocate", "--rewrite"]])
def test_what_writes_works_on_one_disk_after_the_other(host: Host, run: Run, two_cpus: None, verb: list[str]) -> None:
    threads: set[int] = set()
    host.then["fallocate"] = lambda: threads.add(threading.get_ident())
    paths = [host.raw(name=f"disk{number}") for number in range(4)]

    assert run(*verb, "--disk-format", "raw", *paths).status == 0

    assert threads == {threading.get_ident()}


def leave(host: Host, name: str, mode: int) -> str:
    with open(host.path(name), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(b"x" * 4096)
        os.fsync(file.fileno())
    return host.path(name)


def test_show_tells_of_what_a_crash_has_left(host: Host, run: Run) -> None:
    disk, left = host.raw(), leave(host, ".disk.imgprealloc", 0o1600)

    shown = run("show", disk)

    assert shown.status == 0
    assert f"{left}: left by an imgprealloc that was killed" in shown.err
    assert f"imgprealloc allocate {disk}" in shown.err
    assert os.path.exists(left)


def test_show_does_not_take_somebody_s_file_for_what_a_crash_has_left(host: Host, run: Run) -> None:
    leave(host, ".disk.imgprealloc", 0o600)

    assert run("show", host.raw()).err == ""


@pytest.mark.parametrize(
    ("states", "shown"),
    [(["thin"], ["thin"]), (["error"], ["missing"]), (["preallocated", "thin"], ["disk", "thin"]), (["mapped"], [])],
    ids=str,
)
def test_disks_in_one_state_are_shown_alone_and_all_are_looked_at(
    host: Host, run: Run, states: list[str], shown: list[str]
) -> None:
    paths = [host.raw(held=SIZE), host.raw(name="thin"), host.path("missing")]

    told = run("show", *(f"--state={state}" for state in states), "-f", "value", "-c", "path", *paths)

    assert [os.path.basename(path) for path in told.out.split()] == shown
    assert told.status == 1
    assert host.path("missing") in told.err


@pytest.mark.parametrize(
    ("column", "order"),
    [
        ("size", "b a missing"),
        ("disk", "a b missing"),
        ("shortfall", "b a missing"),
        ("in use", "b a missing"),
        ("In_Use", "b a missing"),
        ("state", "missing b a"),
        ("no such column", "b missing a"),
    ],
)
def test_table_is_sorted_by_each_of_its_columns_also_where_a_disk_has_nothing_in_it(
    host: Host, run: Run, column: str, order: str
) -> None:
    paths = [host.raw(name="b"), host.path("missing"), host.raw(2 * SIZE, name="a", held=SIZE // 2)]

    told = run("show", "--sort-column", column, *paths)

    assert [os.path.basename(line.split()[3]) for line in told.out.splitlines()[3:6]] == order.split()


def test_rows_for_machines_are_sorted_by_several_columns(host: Host, run: Run) -> None:
    names = {"d": SIZE, "a": 2 * SIZE, "b": SIZE}
    paths = [host.raw(size, name=name) for name, size in names.items()]
    paths.insert(1, host.path("missing"))

    told = run(
        "show", "--sort-column", "virtual_size", "--sort-column", "path", "-f", "value", "-c", "path", "-c",
        "virtual_size", *paths,
    )  # fmt: skip

    assert [os.path.basename(line.split()[0]) for line in told.out.splitlines()] == ["b", "d", "a", "missing"]


@pytest.mark.parametrize(
    "verb",
    [
        ["show"],
        ["allocate", "--disk-format", "raw"],
        ["allocate", "--dry-run"],
        ["resize", "--disk-format", "raw"],
        ["thin", "--disk-format", "raw"],
    ],
    ids=" ".join,
)
def test_column_that_there_is_not_is_refused_before_anything_is_done(host: Host, run: Run, verb: list[str]) -> None:
    size = ["1G"] if verb[0] == "resize" else []

    told = run(*verb, "-c", "path", "-c", "size", host.raw(), *size)

    assert (told.status, told.out) == (2, "")
    assert "there is no column 'size'; there are: instance, " in told.err
    assert host.changes == []


@pytest.mark.parametrize(
    ("verb", "column"),
    [
        (["show"], "In Use"),
        (["thin", "--disk-format", "raw"], "given back"),
        (["allocate", "--disk-format", "raw"], "shortfall"),
        (["allocate", "--disk-format", "raw", "--dry-run"], "new_space"),
    ],
    ids=str,
)
def test_column_of_a_verb_is_shown_also_by_another_spelling(host: Host, run: Run, verb: list[str], column: str) -> None:
    told = run(*verb, "-f", "value", "-c", column, host.raw(held=SIZE))

    assert len(told.out.split()) == 1
    assert "there is no column" not in told.err
    assert f"| {column.lower().replace(' ', '_')} " in run(*verb, "-c", column, host.path()).out


# show --layout


def test_layout_is_drawn_beside_the_look(host: Host, run: Run, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "disk.svg"

    told = run("show", "--layout", "-f", "value", "-c", "state", host.qcow2(), "-o", str(target))

    assert (told.status, told.out) == (0, "thin\n")
    drawn = ElementTree.parse(target).getroot()
    assert {"offset in the file", f"qcow2, thin; {disks.Size(SIZE).human_readable()}, in 0 pieces"} <= {
        text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")
    }


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--layout", "disk"], "--layout and its file"),
        (["-o", "disk.svg", "disk"], "--layout and its file"),
        (["--layout", "-o", "disk.svg", "disk", "other"], "draws one disk, and 2 are meant"),
    ],
    ids=" ".join,
)
def test_layout_of_no_file_or_of_several_disks_is_2_and_draws_nothing(
    host: Host, run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    host.raw()
    host.raw(name="other")
    monkeypatch.chdir(host.folder)

    told = run("show", *argv)

    assert (told.status, host.files) == (2, ["disk", "other"])
    assert said in told.err


def test_layout_of_a_folder_with_one_disk_is_that_disk_s(host: Host, run: Run, tmp_path: pathlib.Path) -> None:
    folder = instance_with(host)
    # Not a raw one: of that tmpfs cannot tell where it is.
    host.qcow2(name=os.path.join(INSTANCE, "disk"))

    assert run("show", "--layout", "--disk-format", "qcow2", "-o", str(tmp_path / "new.svg"), folder).status == 0
    assert (tmp_path / "new.svg").exists()


def test_picture_does_not_take_a_disk_s_place(host: Host, run: Run) -> None:
    disk = host.qcow2()
    before = host.content(disk)

    told = run("show", "--layout", disk, "-o", disk)

    assert told.status == 1
    assert f"{disk}: what is there does not begin with <svg" in told.err
    assert (host.content(disk), host.files) == (before, ["disk"])


def test_picture_that_cannot_be_written_is_an_error(host: Host, run: Run) -> None:
    told = run("show", "--layout", host.qcow2(), "-o", "/nowhere/disk.svg")

    assert told.status == 1
    assert "/nowhere/disk.svg: No such file or directory" in told.err


def test_disk_that_cannot_be_read_is_not_drawn(host: Host, run: Run, tmp_path: pathlib.Path) -> None:
    told = run("show", "--layout", host.path("missing"), "-o", str(tmp_path / "disk.svg"))

    assert (told.status, told.err.count("\n")) == (1, 1)
    assert not (tmp_path / "disk.svg").exists()


# check


@pytest.mark.parametrize(
    ("mapped", "held", "level", "status", "word"),
    [
        (1.0, None, "preallocated", 0, "OK"),
        (0.5, None, "held", 1, "WARNING"),
        (0.5, 30 * units.Mi, "held", 0, "OK"),
        (0.5, 30 * units.Mi, "preallocated", 1, "WARNING"),
    ],
)
def test_check_says_in_one_line_whether_disks_have_their_space(
    host: Host, run: Run, mapped: float, held: int | None, level: str, status: int, word: str
) -> None:
    disk = host.overlay(mapped=mapped, held=held)

    told = run("check", "--level", level, disk)

    assert told.status == status
    assert told.out.startswith(f"DISKS {word}: 1 ")
    assert told.out.count("\n") == 1


def test_check_gives_performance_data(host: Host, run: Run) -> None:
    told = run("check", host.raw(held=SIZE), host.raw(name="thin"))

    assert told.out == (
        f"DISKS WARNING: 1 preallocated, 1 thin | short={SIZE}B errors=0 thin=1 reserved=0 mapped=0 preallocated=1\n"
    )


def test_filesystem_that_cannot_give_what_its_disks_may_ask_for_is_critical(host: Host, run: Run) -> None:
    disk = host.raw(name="thin")
    host.available = SIZE - 1

    told = run("check", disk, host.path("missing"))

    assert told.status == 2
    assert told.out.startswith("DISKS CRITICAL: ")
    assert f"has {sizes.readable(SIZE - 1)}, and its disks are {sizes.readable(SIZE)} short" in told.out


def test_disk_that_is_named_twice_is_short_once(host: Host, run: Run) -> None:
    disk = host.raw()
    host.available = SIZE

    told = run("check", disk, os.path.join(host.folder, ".", "disk"))

    assert told.out.startswith(f"DISKS WARNING: 1 thin | short={SIZE}B ")


def test_disk_that_cannot_be_read_is_unknown(host: Host, run: Run) -> None:
    told = run("check", host.path("missing"), host.raw(held=SIZE))

    assert (told.status, told.out.partition(":")[0]) == (3, "DISKS UNKNOWN")
    assert "1 cannot be read" in told.out


# metrics


def metrics(text: str) -> dict[str, float]:
    """Read them as Prometheus does."""
    families = parser.text_string_to_metric_families(text)
    return {
        f"{sample.name}{''.join(value for _, value in sorted(sample.labels.items())[1:])}": sample.value
        for family in families for sample in family.samples
    }  # fmt: skip


def test_metrics_tell_states_and_bytes_by_filesystem(host: Host, run: Run) -> None:
    host.available = 5 * units.Gi

    told = run("metrics", host.raw(held=SIZE), host.raw(name="thin"), host.path("missing"))

    assert told.status == 1
    found = metrics(told.out)
    assert time.time() - found.pop("imgprealloc_look_timestamp_seconds") < 600
    assert found == {
        "imgprealloc_disksthin": 1,
        "imgprealloc_disksreserved": 0,
        "imgprealloc_disksmapped": 0,
        "imgprealloc_diskspreallocated": 1,
        "imgprealloc_short_bytes": SIZE,
        "imgprealloc_available_bytes": 5 * units.Gi,
        "imgprealloc_errors": 1,
    }


def test_metrics_are_written_to_a_file_that_is_whole_or_as_it_was(host: Host, run: Run, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "imgprealloc.prom"
    target.write_text("# HELP imgprealloc_disks old")
    before = target.stat().st_ino

    told = run("metrics", "-o", str(target), host.raw(held=SIZE))

    assert (told.status, told.out) == (0, "")
    assert metrics(target.read_text())["imgprealloc_diskspreallocated"] == 1
    assert target.stat().st_ino != before
    assert os.listdir(tmp_path).count("imgprealloc.prom") == 1


def test_metrics_that_cannot_be_written_are_an_error(host: Host, run: Run) -> None:
    told = run("metrics", "-o", "/nowhere/imgprealloc.prom", host.raw(held=SIZE))

    assert told.status == 1
    assert "/nowhere/imgprealloc.prom: No such file or directory" in told.err


def test_metrics_do_not_take_a_disk_s_place(host: Host, run: Run) -> None:
    disk = host.qcow2()
    before = host.content(disk)

    told = run("metrics", "-o", disk, disk)

    assert told.status == 1
    assert f"{disk}: what is there does not begin with # HELP imgprealloc_, and may be a disk" in told.err
    assert (host.content(disk), host.files) == (before, ["disk"])


def refused(*_: object) -> None:
    raise PermissionError(13, os.strerror(13))


@pytest.mark.parametrize("named", [True, False], ids=["a folder", "nova.conf"])
def test_what_cannot_be_looked_into_for_disks_is_an_error_in_the_metrics(host: Host, run: Run, named: bool) -> None:
    fault = fixtures.MockPatchObject(instances, "disks_below", refused)
    if not named:
        unreadable = mock.Mock(side_effect=cfg.ConfigFileParseError("nova.conf", "no section"))
        fault = fixtures.MockPatchObject(instances, "configured_path", unreadable)

    with fault:
        told = run("metrics", *([host.folder] if named else []))
        checked = run("check", *([host.folder] if named else []))

    assert (told.status, metrics(told.out)["imgprealloc_errors"]) == (1, 1)
    assert checked.out.startswith("DISKS UNKNOWN: 1 cannot be read | short=0B errors=1 ")


def test_folder_without_disks_is_no_error_in_the_metrics(host: Host, run: Run) -> None:
    assert metrics(run("metrics", host.folder).out)["imgprealloc_errors"] == 0


# check-nova


FINDINGS = [
    check_nova.Finding("Nova", True, "34.0.0"),
    check_nova.Finding("Flat.cache", True, "as expected", is_one_of_many=True),
    check_nova.Finding("Flat.exists", True, "as expected", is_one_of_many=True),
]
MISSING = check_nova.Finding("Qcow2.cache", False, "it is missing", is_one_of_many=True)
RESTART = check_nova.Finding("restart", True, "nova.conf", wants_restart=True)


def subjects(table: str) -> list[str]:
    return [line.split()[1] for line in table.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize(
    ("findings", "long", "status", "answer", "shown"),
    [
        (FINDINGS, [], 0, "Instances will be preallocated.", ["Nova"]),
        (FINDINGS, ["--long"], 0, "Instances will be preallocated.", ["Nova", "Flat.cache", "Flat.exists"]),
        ([*FINDINGS, MISSING], [], 1, "NOT be preallocated as promised: 1 of", ["Qcow2.cache", "Nova"]),
        ([*FINDINGS, RESTART], [], 0, "preallocated once nova-compute has been restarted.", ["Nova", "restart"]),
        ([RESTART, MISSING], [], 1, "NOT be preallocated as promised: 1 of", ["Qcow2.cache", "restart"]),
    ],
)
def test_answer_comes_first_then_what_is_not_good(
    run: Run, findings: list[check_nova.Finding], long: list[str], status: int, answer: str, shown: list[str]
) -> None:
    with fixtures.MockPatchObject(check_nova, "check", lambda files: iter(findings)):
        told = run("check-nova", *long)

    assert told.status == status
    assert answer in told.out.splitlines()[0]
    assert subjects(told.out) == shown


def test_machines_are_told_everything_in_its_order_and_nothing_else(run: Run) -> None:
    with fixtures.MockPatchObject(check_nova, "check", lambda files: iter([*FINDINGS, MISSING])):
        told = run("check-nova", "-f", "json")

    assert [row["subject"] for row in json.loads(told.out)] == ["Nova", "Flat.cache", "Flat.exists", "Qcow2.cache"]


# The others do what they say.


def test_create_makes_a_preallocated_qcow2_disk(host: Host, run: Run) -> None:
    shown = run("create", "-f", "value", "-c", "state", host.path(), "64M")

    assert (shown.status, shown.out) == (0, "preallocated\n")
    assert (host.disk().format, host.disk().virtual_size, host.disk().backing_file) == ("qcow2", 64 * units.Mi, None)


def test_create_makes_a_raw_disk(host: Host, run: Run) -> None:
    run("create", "--disk-format", "raw", host.path(), str(SIZE))

    assert (host.disk().format, host.disk().held) == ("raw", SIZE)


def test_create_makes_an_overlay_with_clusters_of_the_size_that_is_asked_for(host: Host, run: Run) -> None:
    base = host.base(SIZE)

    run("create", "--overlay-cluster-size", "64K", "--backing", base, "--backing-format", "raw", host.path(), "16M")

    assert (host.disk().backing_file, host.disk().backing_format) == (base, "raw")
    assert (host.disk().cluster_size, host.disk().extended_l2) == (64 * units.Ki, True)


def test_create_works_in_the_mode_that_is_asked_for(host: Host, run: Run) -> None:
    shown = run("create", "--mode", "metadata", "-f", "value", "-c", "state", host.path(), "16M")

    assert (shown.status, shown.out) == (0, "mapped\n")


def test_allocate_preallocates_each_disk(host: Host, run: Run) -> None:
    disks = host.raw(), host.overlay(name="overlay")
    note_format(host, {disks[0]: "raw", disks[1]: "qcow2"})

    shown = run("allocate", "-f", "value", "-c", "state", *disks)

    assert (shown.status, shown.out.split()) == (0, ["preallocated", "preallocated"])


def test_allocate_rewrites_nothing_whose_format_nobody_tells(host: Host, run: Run) -> None:
    disk = host.overlay(mapped=0.5)

    ended = run("allocate", "--rewrite", disk)

    assert ended.status == 1
    assert "--disk-format qcow2, or --disk-format raw" in ended.err
    assert host.changes == []


@pytest.mark.parametrize(("rewrite", "state"), [([], "reserved"), (["--rewrite"], "preallocated")])
def test_allocate_rewrites_a_disk_with_data_only_when_it_is_told_to(
    host: Host, run: Run, rewrite: list[str], state: str
) -> None:
    disk = host.overlay(mapped=0.5)

    shown = run("allocate", *rewrite, "--disk-format", "qcow2", "-f", "value", "-c", "state", disk)

    assert (shown.status, shown.out) == (0, f"{state}\n")


def test_request_that_is_not_carried_out_is_1_and_says_what_would_do_it(host: Host, run: Run) -> None:
    disk = host.overlay(mapped=0.5)

    metadata = run("allocate", "--mode", "metadata", "--disk-format", "qcow2", "-f", "json", disk)
    full = run("allocate", "--mode", "full", "--disk-format", "qcow2", "-f", "json", disk)

    assert (metadata.status, full.status) == (1, 1)
    for ended, state in ((metadata, "thin"), (full, "reserved")):
        (row,) = json.loads(ended.out)
        assert row["state"] == state
        assert "--rewrite" in row["error"]
        assert row["error"] in ended.err


def test_rewriting_that_has_no_room_is_1(host: Host, run: Run) -> None:
    disk = host.overlay(mapped=0.5, held=SIZE - units.Mi)
    host.available = 12 * units.Mi

    ended = run("allocate", "--keep-free", "0", "--rewrite", "--disk-format", "qcow2", "-f", "json", disk)

    assert ended.status == 1
    assert json.loads(ended.out)[0]["state"] == "reserved"
    assert "was not rewritten" in ended.err


@pytest.mark.parametrize("more", [["--dry-run"], []], ids=" ".join)
def test_disk_that_has_all_its_space_is_done_also_where_no_other_could_have_it(
    host: Host, run: Run, more: list[str]
) -> None:
    host.filesystem = Filesystem("nfs", fallocate=False, copy_on_write=False)

    told = run("allocate", *more, "--on-unsupported", "error", "-f", "json", host.raw(held=SIZE))

    (row,) = json.loads(told.out)
    assert (told.status, row["state"], row["error"]) == (0, "preallocated", None)


def test_allocate_goes_on_after_a_disk_that_it_cannot_preallocate(host: Host, run: Run) -> None:
    shown = run("allocate", "-f", "value", "-c", "path", host.path("missing"), host.raw())

    assert (shown.status, shown.out.split()) == (1, [host.path("missing"), host.path()])
    assert host.disk().held == SIZE


# What is only planned.

PLAN_KEYS = [
    "instance",
    "path",
    "format",
    "state",
    "treatment",
    "state_after",
    "new_space",
    "temporary_space",
    "written",
    "estimated_seconds",
    "filesystem",
    "fits",
    "error",
]


def test_dry_run_tells_scripts_exactly_the_documented_keys_in_bytes_and_seconds(host: Host, run: Run) -> None:
    told = run("allocate", "--dry-run", "--mode", "full", "--disk-format", "raw", "-f", "json", host.raw(held=8192))

    (row,) = json.loads(told.out)
    assert (told.status, list(row)) == (0, PLAN_KEYS)
    assert (row["state"], row["treatment"], row["state_after"]) == ("thin", "fill", "preallocated")
    assert (row["new_space"], row["temporary_space"], row["written"]) == (SIZE - 8192, 0, SIZE)
    assert (row["estimated_seconds"], row["fits"], row["error"]) == (1, True, None)
    assert os.path.ismount(row["filesystem"])


@pytest.mark.parametrize("more", [[], ["--rewrite"], ["--mode", "full"]], ids=" ".join)
def test_dry_run_does_nothing(host: Host, run: Run, more: list[str]) -> None:
    paths = [host.raw(), host.overlay(name="blank"), host.overlay(name="data", mapped=0.5)]
    note_format(host, {host.path(): "raw", host.path("blank"): "qcow2", host.path("data"): "qcow2"})
    before = (host.files, [FileStamp.from_stat(os.stat(path)) for path in paths])

    run("allocate", "--dry-run", *more, *paths)

    assert host.changes == []
    assert (host.files, [FileStamp.from_stat(os.stat(path)) for path in paths]) == before


def test_dry_run_fits_80_characters_and_ends_with_what_fits(host: Host, run: Run) -> None:
    folder = instance_with(host, "disk", "disk.eph0", "disk.swap")
    host.available = 10 * units.Gi + 2 * SIZE + units.Mi

    told = run("allocate", "--dry-run", "--keep-free", "10G", "--disk-format", "raw", folder)

    lines = told.out.splitlines()
    assert told.status == 1
    assert max(map(len, lines[:-1])) <= 80
    assert [line.split("|")[3].strip() for line in lines[3:-2]] == ["fill", "fill", "left out"]
    assert "2 fill; 32 MiB of new space, " in lines[-1]
    assert lines[-1].endswith("may be taken (keep free: 10G): 1 left out, for want of space")


def test_dry_run_tells_people_how_long_it_takes(host: Host, run: Run) -> None:
    paths = [host.raw(100 * units.Gi), host.qcow2(100 * units.Gi, name="other", mapped=1.0, held=8192)]
    note_format(host, {paths[0]: "raw", paths[1]: "qcow2"})

    assert "| 9 min " in run("allocate", "--dry-run", "--mode", "full", paths[0]).out
    assert "| no time " in run("allocate", "--dry-run", paths[1]).out


@pytest.mark.parametrize("more", [["--dry-run"], []], ids=" ".join)
def test_what_would_be_refused_is_a_row_with_its_error(host: Host, run: Run, more: list[str]) -> None:
    disk = host.overlay(mapped=0.5)
    with opened_by_qemu(disk):
        told = run("allocate", *more, "--rewrite", "--disk-format", "qcow2", "-f", "json", disk, host.path("missing"))

    used, missing = json.loads(told.out)
    assert told.status == 1
    assert "QEMU has the image open for writing" in used["error"]
    assert used["error"] in told.err
    assert (used["state"], missing["state"]) == ("thin", None)
    assert "there is no such file" in missing["error"]


@pytest.mark.parametrize(
    ("asked", "mapped", "said"),
    [(["--mode", "metadata"], 0.5, "--rewrite"), (["--mode", "full"], 0.5, "--rewrite"), (["--rewrite"], 0.5, "not")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_dry_run_is_1_where_the_request_would_not_be_carried_out(
    host: Host, run: Run, asked: list[str], mapped: float, said: str
) -> None:
    # With a snapshot it is not replaced.
    disk = host.overlay(mapped=mapped, snapshots=1)

    told = run("allocate", "--dry-run", *asked, "--disk-format", "qcow2", "-f", "json", disk)

    assert told.status == 1
    assert said in json.loads(told.out)[0]["error"]


def test_disk_in_use_that_cannot_be_written_gets_its_space_as_was_told(host: Host, run: Run) -> None:
    disk = host.raw()
    asked = ("--mode", "full", "--disk-format", "raw", "-f", "json", disk)
    with opened_by_qemu(disk):
        (planned,) = json.loads(run("allocate", "--dry-run", *asked).out)
        done = run("allocate", *asked)

    (row,) = json.loads(done.out)
    assert done.status == 1
    assert (planned["state_after"], row["state"]) == ("preallocated", "preallocated")
    assert "QEMU has the image open for writing" in planned["error"]
    assert "QEMU has the image open for writing" in row["error"]


def test_time_is_that_of_the_rate_that_is_asked_for(host: Host, run: Run) -> None:
    told = run(
        "allocate", "--dry-run", "--rate", "1M", "--mode", "full", "--disk-format", "raw", "-f", "json", host.raw()
    )

    assert json.loads(told.out)[0]["estimated_seconds"] == SIZE // units.Mi


# A whole request.


def disks_that_lack(host: Host, *lacking: int) -> list[str]:
    """Lay down raw disks that lack so many bytes."""
    paths = [host.raw(SIZE, name=f"disk{number}", held=SIZE - each) for number, each in enumerate(lacking)]
    note_format(host, dict.fromkeys(paths, "raw"))
    return paths


def test_disks_that_need_least_come_first_and_the_rest_is_left_out(host: Host, run: Run) -> None:
    paths = disks_that_lack(host, 9 * units.Mi, units.Mi, 8 * units.Mi, 2 * units.Mi)
    host.available = 10 * units.Gi + 12 * units.Mi

    told = run("allocate", "--keep-free", "10G", "-f", "json", *paths)

    rows = json.loads(told.out)
    assert told.status == 1
    assert [row["path"] for row in rows] == paths
    assert [row["state"] for row in rows] == ["thin", "preallocated", "preallocated", "preallocated"]
    assert f"{paths[0]}: left out: it needs 9 MiB" in rows[0]["error"]
    assert rows[0]["error"] in told.err
    assert host.available >= 10 * units.Gi


def test_what_is_left_out_is_known_before_the_first_disk_is_touched(host: Host, run: Run) -> None:
    paths = [host.qcow2(name=f"disk{number}", mapped=1.0, held=held) for number, held in enumerate((8192, SIZE))]
    note_format(host, dict.fromkeys(paths, "qcow2"))
    host.available = SIZE // 2

    told = run("allocate", "--keep-free", "0", *paths)

    names = [call.name for call in host.calls if call.name in ("check", "fallocate")]
    assert told.status == 1
    assert names[:3] == ["check", "check", "fallocate"]


@pytest.mark.parametrize(("available", "fits"), [(24, [True, False]), (26, [True, True])])
def test_copy_needs_the_room_that_those_before_it_have_left(
    host: Host, run: Run, available: int, fits: list[bool]
) -> None:
    paths = [host.overlay(name=f"disk{number}", mapped=0.5) for number in range(2)]
    note_format(host, dict.fromkeys(paths, "qcow2"))
    for path in paths:
        with open(path, "r+b") as disk:
            # Half of what the copy has; it is there until that is done.
            disk.seek(units.Mi)
            disk.write(b"x" * 8 * units.Mi)
            os.fsync(disk.fileno())
    host.available = available * units.Mi

    told = run("allocate", "--dry-run", "--keep-free", "0", "--rewrite", "-f", "json", *paths)

    assert [row["fits"] for row in json.loads(told.out)] == fits
    assert told.status == (0 if all(fits) else 1)


def test_a_hundredth_is_kept_free_of_disks_that_exist_unless_told_otherwise(host: Host, run: Run) -> None:
    (path,) = disks_that_lack(host, 8 * units.Mi)
    host.size, host.available = 100 * units.Gi, units.Gi + 4 * units.Mi

    assert run("allocate", path).status == 1
    assert host.disk(path).held == SIZE - 8 * units.Mi
    # Nobody else has asked for it.
    assert run("create", "--disk-format", "raw", host.path("new"), "512M").status == 0

    host.available = 8 * units.Mi
    assert run("allocate", "--keep-free", "0", path).status == 0
    assert host.available == 0


def test_allocate_ends_with_what_was_done_in_which_way(host: Host, run: Run) -> None:
    paths = disks_that_lack(host, 2 * units.Mi, units.Mi, 0, 9 * units.Mi)
    blank = host.overlay(name="blank")
    note_format(host, {**dict.fromkeys(paths, "raw"), blank: "qcow2"})
    host.available = 8 * units.Mi

    told = run("allocate", "--keep-free", "0", *paths, host.path("missing"))

    assert told.out.splitlines()[-1] == (
        "2 filled, 1 left as they were, 1 left out, 1 failed; 3 MiB more held than before."
    )
    host.available = units.Gi
    assert run("allocate", "--keep-free", "0", blank).out.splitlines()[-1].startswith("1 made anew; ")
    # Machines are told rows alone.
    assert isinstance(json.loads(run("allocate", "-f", "json", blank).out), list)


def test_disk_that_is_named_twice_is_treated_once(host: Host, run: Run) -> None:
    (path,) = disks_that_lack(host, 8 * units.Mi)
    host.available = 12 * units.Mi

    told = run("allocate", "--keep-free", "0", "-f", "value", "-c", "state", path, path)

    assert (told.status, told.out.split()) == (0, ["preallocated", "preallocated"])


def test_resize_grows_a_disk(host: Host, run: Run) -> None:
    shown = run("resize", "--disk-format", "raw", "-f", "json", host.raw(held=SIZE), "20M")

    assert (shown.status, host.disk().held) == (0, 20 * units.Mi)
    assert json.loads(shown.out)[0]["virtual_size"] == 20 * units.Mi


# The format that Nova has noted.


@pytest.mark.parametrize(
    ("verb", "after"), [("show", []), ("allocate", []), ("resize", ["20M"])], ids=lambda value: str(value)
)
def test_raw_disk_stays_raw_whatever_its_guest_has_written_to_it(
    host: Host, run: Run, verb: str, after: list[str]
) -> None:
    disk = host.qcow2(mapped=0.5)
    note_format(host, {disk: "raw"})

    shown = run(verb, "-f", "value", "-c", "format", disk, *after)

    assert (shown.status, shown.out) == (0, "raw\n")
    assert all(call.after("-f") == "raw" for call in host.run("resize"))
    assert host.run("info", "check") == []


def test_raw_disk_that_begins_like_qcow2_is_told_of(host: Host, run: Run) -> None:
    disk = host.qcow2(mapped=0.5)
    note_format(host, {disk: "raw"})

    shown = run("show", disk)

    assert disk in shown.err
    assert "--disk-format qcow2" in shown.err


def test_operator_s_word_weighs_more_than_nova_s(host: Host, run: Run) -> None:
    disk = host.qcow2(mapped=0.5)
    note_format(host, {disk: "raw"})

    assert run("show", "--disk-format", "qcow2", "-f", "value", "-c", "format", disk).out == "qcow2\n"


@pytest.mark.parametrize("content", [b"{}", b"{", b"", b'["raw"]'])
def test_disk_of_which_nothing_is_noted_is_what_it_looks_like(host: Host, run: Run, content: bytes) -> None:
    disk = host.qcow2()
    with open(host.path("disk.info"), "wb") as file:
        file.write(content)

    assert run("show", "-f", "value", "-c", "format", disk).out == "qcow2\n"


# Sizes.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("10737418240", 10 * units.Gi),
        ("1K", 1024),
        ("512M", 512 * units.Mi),
        ("10G", 10 * units.Gi),
        ("10g", 10 * units.Gi),
        ("1.5G", 3 * units.Gi // 2),
        ("0.5KiB", 512),
        ("10GB", 10 * units.Gi),
        ("10GiB", 10 * units.Gi),
        ("2T", 2 * units.Ti),
        ("1P", units.Pi),
        ("1E", units.Ei),
    ],
)
def test_size_is_read_as_qemu_img_reads_it(text: str, expected: int) -> None:
    assert disks.size(text) == expected


@pytest.mark.parametrize(
    ("value", "readable"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (100 * units.Gi, "100 GiB"),
        (5000 * units.Ti, "5000 TiB"),
    ],
)
def test_size_is_readable_in_a_table(value: int, readable: str) -> None:
    assert disks.Size(value).human_readable() == readable


# Exit status.


@pytest.mark.parametrize(
    "argv",
    [
        ["show", "--disk-format", "vmdk", "disk"],
        ["show", "-f", "word", "disk"],
        ["show", "--no-such-option", "disk"],
        ["create", "disk"],
        ["create", "disk", "many"],
        ["create", "disk", "1X"],
        ["create", "disk", "1.5"],
        ["create", "disk", "0.0001K"],
        ["create", "disk", "-5"],
        ["create", "--backing-format", "raw", "disk", "1M"],
        ["create", "--mode", "thin", "disk", "1M"],
        ["create", "--overlay-cluster-size", "5", "disk", "1M"],
        ["create", "--overlay-cluster-size", "4K", "disk", "1M"],
        ["create", "--overlay-cluster-size", "4M", "disk", "1M"],
        ["create", "--overlay-cluster-size", "96K", "disk", "1M"],
        ["allocate", "--on-unsupported", "falloc", "disk"],
        ["allocate", "--overlay-cluster-size", "0", "disk"],
        ["allocate", "--keep-free", "much", "disk"],
        ["allocate", "--keep-free", "101%", "disk"],
        ["create", "--keep-free", "-1", "disk", "1M"],
        ["resize", "disk"],
        ["resize", "--overlay-cluster-size", "64", "disk", "1M"],
    ],
    ids=" ".join,
)
def test_command_line_that_makes_no_sense_is_2(host: Host, run: Run, argv: list[str]) -> None:
    ended = run(*argv)

    assert (ended.status, ended.out) == (2, "")
    assert ended.err
    assert host.files == []


def test_cluster_size_that_there_is_not_is_told_with_those_that_there_are(host: Host, run: Run) -> None:
    said = run("create", "--overlay-cluster-size", "4K", host.path(), "1M").err

    assert "4096 (choose from 16384, 32768" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["show", "missing"], "no such file"),
        (["create", "present", "1M"], "there is a file already"),
        (["create", "new", "0"], "no size for a disk"),
        (["create", "--backing", "missing", "--backing-format", "raw", "new", "1M"], "missing is not there"),
        (["create", "--backing", "present", "new", "1M"], "--backing-format"),
        (["create", "nowhere/disk", "1M"], "No such file or directory"),
        (["allocate", "missing"], "no such file"),
        (["resize", "--disk-format", "raw", "present", "1M"], "A disk can only grow"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_error_is_1_and_told_in_one_line(
    host: Host, run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    host.raw(name="present")
    monkeypatch.chdir(host.folder)

    ended = run(*argv)

    assert ended.status == 1
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert host.files == ["present"]


@pytest.mark.parametrize("verb", ["show", "check", "metrics", "create", "allocate", "resize", "check-nova"])
def test_help_of_a_verb_is_the_verb_s(run: Run, verb: str) -> None:
    told = run(verb, "--help")

    assert told.status == 0
    assert f" {verb} [-h]" in told.out


def test_help_tells_the_format_of_what_is_made_and_how_that_of_what_is_there_is_found(run: Run) -> None:
    made, there = (" ".join(run(verb, "--help").out.split()) for verb in ("create", "resize"))

    assert "the disk's format (default: qcow2)" in made
    assert ("first bytes" in made, "first bytes" in there) == (False, True)


def test_without_arguments_the_help_is_printed(run: Run) -> None:
    told = run()

    assert told.status == 0
    assert "allocate" in told.out


def test_verbose_tells_what_is_done_and_not_how_tables_are_made(host: Host, run: Run) -> None:
    told = run("-v", "allocate", host.raw())

    assert "thin before, preallocated now" in told.err
    assert "EntryPoint" not in told.err


def test_debug_shows_where_an_error_came_from(host: Host, run: Run) -> None:
    assert "Traceback" in run("--debug", "show", host.path("missing")).err
    assert "Traceback" not in run("show", host.path("missing")).err


def test_command_that_there_is_not_is_2(run: Run) -> None:
    assert run("no-such-command").status == 2


def test_version_told_is_the_package_s(run: Run) -> None:
    assert run("--version").out.split()[-1] == metadata.version("imgprealloc")


# How fast, and how far.


def test_command_thinks_of_the_guests_on_the_same_storage(host: Host, run: Run) -> None:
    ended = run("create", "--mode", "full", "--rate", "10M", "--disk-format", "raw", host.path(), "16M")

    [zeros] = host.run("zeros")
    assert ended.status == 0
    assert zeros.argv[-1] == str(10 * units.Mi)
    assert zeros.is_idle


@pytest.mark.parametrize("rate", ["0", "fast", "-1"])
@pytest.mark.parametrize("verb", ["create", "allocate", "resize", "thin"])
def test_rate_that_is_none_ends_with_2(host: Host, run: Run, verb: str, rate: str) -> None:
    size = ["16M"] if verb in ("create", "resize") else []

    assert run(verb, f"--rate={rate}", host.path(), *size).status == 2
    assert host.calls == []


def test_disk_of_which_a_part_is_not_done_because_it_is_in_use_is_shown_as_it_is(
    host: Host, run: Run, opened: Callable[[str], object]
) -> None:
    disk = host.raw(held=SIZE)
    opened(disk)

    ended = run("allocate", "--mode", "full", "--disk-format", "raw", "-f", "json", disk)

    (row,) = json.loads(ended.out)
    assert (ended.status, row["state"], row["in_use"]) == (1, "preallocated", True)
    assert "Stop the instance" in row["error"]
