# SPDX-License-Identifier: Apache-2.0
"""What would be done to a disk is what is done to it."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import os
from typing import Any

from oslo_utils import units
import pytest

from imgprealloc import Existing
from imgprealloc import Mode
from imgprealloc import Plan
from imgprealloc import Preallocator
from imgprealloc import exceptions
from imgprealloc.filesystem import Filesystem
from imgprealloc.plan import TreatmentName

from .host import SIZE
from .host import Host
from .host import opened_by_qemu

BTRFS = Filesystem("btrfs", fallocate=True, copy_on_write=True)
NFS = Filesystem("nfs", fallocate=False, copy_on_write=False)


@dataclasses.dataclass(frozen=True)
class Case:
    """A disk, what is asked for, and what is to come of it."""

    name: str
    lay: Callable[[Host], str]
    format: str
    existing: Existing
    mode: Mode
    treatment: TreatmentName
    under: Filesystem | None = None

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("raw, whole", lambda host: host.raw(held=SIZE), "raw", "reserve", "falloc", "none"),
    Case("raw, holes", lambda host: host.raw(held=8192), "raw", "reserve", "falloc", "fill"),
    Case("raw, shared", lambda host: host.raw(held=SIZE, shared=8192), "raw", "reserve", "falloc", "fill"),
    Case("raw, full", lambda host: host.raw(), "raw", "recreate_blank", "full", "fill"),
    Case("raw, held", lambda host: host.raw(held=SIZE), "raw", "recreate_blank", "full", "write"),
    Case("raw, metadata", lambda host: host.raw(), "raw", "recreate_blank", "metadata", "none"),
    Case("raw, btrfs", lambda host: host.raw(held=8192), "raw", "rewrite", "falloc", "rewrite", BTRFS),
    Case("raw, NFS", lambda host: host.raw(), "raw", "reserve", "falloc", "none", NFS),
    Case("blank, kept", lambda host: host.overlay(), "qcow2", "reserve", "falloc", "reserve"),
    Case("blank", lambda host: host.overlay(), "qcow2", "recreate_blank", "falloc", "recreate"),
    Case("blank, full", lambda host: host.overlay(), "qcow2", "recreate_blank", "full", "recreate"),
    Case("blank, metadata", lambda host: host.overlay(), "qcow2", "recreate_blank", "metadata", "recreate"),
    Case("blank, alone", lambda host: host.qcow2(), "qcow2", "recreate_blank", "falloc", "recreate"),
    Case("data", lambda host: host.overlay(mapped=0.5), "qcow2", "recreate_blank", "falloc", "reserve"),
    Case("data, rewritten", lambda host: host.overlay(mapped=0.5), "qcow2", "rewrite", "falloc", "rewrite"),
    Case("data, written", lambda host: host.overlay(mapped=0.5), "qcow2", "rewrite", "full", "rewrite"),
    Case("data, mapped", lambda host: host.overlay(mapped=0.5), "qcow2", "rewrite", "metadata", "rewrite"),
    Case("data, metadata", lambda host: host.overlay(mapped=0.5), "qcow2", "reserve", "metadata", "none"),
    Case("data, snapshot", lambda host: host.overlay(mapped=0.5, snapshots=1), "qcow2", "rewrite", "falloc", "reserve"),
    Case("held", lambda host: host.overlay(mapped=0.5, held=2 * SIZE), "qcow2", "reserve", "falloc", "none"),
    Case("mapped", lambda host: host.qcow2(mapped=1.0, held=8192), "qcow2", "reserve", "falloc", "fill"),
    Case("whole", lambda host: host.qcow2(mapped=1.0), "qcow2", "rewrite", "falloc", "none"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def planned(host: Host, case: Case, **settings: Any) -> Plan:
    """Lay down a case's disk, and plan for it."""
    if case.under is not None:
        host.filesystem = case.under
    strategy = Preallocator(case.mode, **settings)
    return strategy.plan(case.lay(host), case.existing, format=case.format)


@each_case
def test_treatment_is_named(host: Host, case: Case) -> None:
    plan = planned(host, case)

    assert (plan.treatment, plan.error) == (case.treatment, None)


@each_case
def test_nothing_is_written_for_a_plan(host: Host, case: Case) -> None:
    path = case.lay(host)
    before = (host.files, host.content(path), os.stat(path).st_mtime_ns)

    Preallocator(case.mode).plan(path, case.existing, format=case.format)

    assert host.changes == []
    assert (host.files, host.content(path), os.stat(path).st_mtime_ns) == before


@each_case
def test_what_is_planned_is_done(host: Host, case: Case) -> None:
    plan = planned(host, case)
    strategy, inode = Preallocator(case.mode), os.stat(plan.path).st_ino

    # A start does not wait for that.
    started = Preallocator(case.mode).plan(plan.path, case.existing, format=case.format, write_held=False)
    has_work = strategy.has_work(plan.path, case.existing, plan.image, format=case.format)
    after = strategy.preallocate(plan.path, case.existing, format=case.format)

    assert after.state == plan.state
    assert has_work == (started.treatment != "none")
    assert (started.treatment == plan.treatment) == (case.treatment != "write")
    assert bool(host.changes) == (plan.treatment != "none")
    assert (os.stat(plan.path).st_ino != inode) == (plan.treatment in ("recreate", "rewrite"))


@each_case
def test_just_the_space_that_a_plan_needs_is_enough(host: Host, case: Case) -> None:
    needed = planned(host, case).needed
    # What is made here is longer than what qemu-img makes, by its stand-in's own reckoning.
    host.available = needed + (units.Mi if case.treatment in ("recreate", "rewrite") else 0)
    path = host.path()

    assert Preallocator(case.mode).plan(path, case.existing, format=case.format).fits
    Preallocator(case.mode).preallocate(path, case.existing, format=case.format)


def test_disk_that_stays_the_same_file_needs_what_it_is_short_of(host: Host) -> None:
    plan = Preallocator().plan(host.raw(SIZE, held=SIZE - 8192), format="raw")

    assert (plan.space, plan.temporary, plan.needed, plan.written) == (8192, 0, 8192, 0)


def test_copy_needs_the_old_file_s_space_besides_until_it_is_done(host: Host) -> None:
    path = host.overlay(mapped=0.5)
    with open(path, "r+b") as disk:
        disk.seek(2 * units.Mi)
        disk.write(b"x" * units.Mi)
        os.fsync(disk.fileno())
    old = os.stat(path).st_blocks * 512

    plan = Preallocator().plan(path, "rewrite", format="qcow2")

    assert old >= units.Mi
    assert plan.temporary == old
    assert plan.space == plan.needed - old
    # With tables, refcounts and header.
    assert SIZE < plan.needed < SIZE + units.Mi


def test_mode_metadata_needs_no_more_than_tables(host: Host) -> None:
    plan = Preallocator("metadata").plan(host.overlay(), format="qcow2")

    assert 0 < plan.needed < units.Mi


@pytest.mark.parametrize(
    ("lay", "format", "mode", "subclusters", "least", "most"),
    [
        (lambda host: host.raw(held=4096), "raw", "falloc", "unallocated", 0, 0),
        (lambda host: host.raw(held=SIZE, shared=8192), "raw", "falloc", "unallocated", 8192, 8192),
        (lambda host: host.raw(), "raw", "full", "unallocated", SIZE, SIZE),
        (lambda host: host.raw(held=SIZE), "raw", "full", "unallocated", SIZE, SIZE),
        (lambda host: host.overlay(), "qcow2", "falloc", "unallocated", 0, 0),
        (lambda host: host.overlay(), "qcow2", "full", "unallocated", SIZE, SIZE + units.Mi),
        (lambda host: host.overlay(), "qcow2", "falloc", "copied", SIZE // 2, SIZE // 2),
        (lambda host: host.overlay(mapped=0.25), "qcow2", "falloc", "unallocated", SIZE // 4, SIZE // 4),
        (lambda host: host.overlay(mapped=0.25), "qcow2", "falloc", "copied", SIZE, SIZE),
        (lambda host: host.overlay(mapped=0.25), "qcow2", "full", "unallocated", SIZE * 5 // 4, SIZE * 3 // 2),
    ],
)
def test_plan_tells_what_is_written_or_copied(
    host: Host, lay: Callable[[Host], str], format: str, mode: Mode, subclusters: Any, least: int, most: int
) -> None:
    plan = Preallocator(mode, overlay_subclusters=subclusters).plan(lay(host), "rewrite", format=format)

    assert least <= plan.written <= most


# What would be refused.


@pytest.mark.parametrize("existing", ["reserve", "recreate_blank"])
def test_lack_of_space_is_in_the_plan(host: Host, existing: Existing) -> None:
    path = host.raw()
    host.available = SIZE - 1

    plan = Preallocator().plan(path, existing, format="raw")

    assert isinstance(plan.error, exceptions.NoSpace)
    assert (plan.treatment, plan.state, plan.fits, plan.available) == ("fill", "thin", False, SIZE - 1)
    with pytest.raises(exceptions.NoSpace) as caught:
        Preallocator().preallocate(path, existing, format="raw")
    assert str(caught.value) == str(plan.error)


def test_disk_in_use_would_not_be_rewritten(host: Host) -> None:
    path = host.overlay(mapped=0.5)
    with opened_by_qemu(path):
        plan = Preallocator().plan(path, "rewrite", format="qcow2")

        with pytest.raises(exceptions.ImageInUse):
            Preallocator().preallocate(path, "rewrite", format="qcow2")

    assert isinstance(plan.error, exceptions.ImageInUse)
    assert (plan.treatment, plan.state) == ("rewrite", "thin")


def test_disk_in_use_would_not_be_written_full(host: Host) -> None:
    path = host.raw()
    with opened_by_qemu(path):
        plan = Preallocator("full").plan(path, format="raw")
        assert isinstance(plan.error, exceptions.ImageInUse)
        # Its space is set aside all the same.
        assert (plan.treatment, plan.state, plan.refused) == ("fill", "preallocated", False)
        # The control: nobody minds that space is set aside.
        assert Preallocator("falloc").plan(path, format="raw").error is None


@pytest.mark.parametrize("lay", [Host.raw, lambda host: host.qcow2(mapped=1.0, held=8192)], ids=["raw", "qcow2"])
def test_disk_that_a_reader_has_open_gets_its_space_and_is_not_written_full(
    host: Host, lay: Callable[[Host], str]
) -> None:
    path = lay(host)
    format = "raw" if lay is Host.raw else "qcow2"
    with open(path, "rb"):
        plan = Preallocator("full").plan(path, format=format)
        with pytest.raises(exceptions.ImageInUse):
            Preallocator("full").preallocate(path, format=format)

    assert isinstance(plan.error, exceptions.ImageInUse)
    assert (plan.treatment, plan.state, plan.refused) == ("fill", "preallocated", False)
    assert Preallocator().inspect(path, format=format).held


def test_disk_in_use_that_zeros_alone_could_give_space_would_be_refused(host: Host) -> None:
    host.filesystem = NFS
    path = host.raw()
    with opened_by_qemu(path):
        plan = Preallocator(on_unsupported="full").plan(path, format="raw")

    assert isinstance(plan.error, exceptions.ImageInUse)
    assert (plan.treatment, plan.state, plan.refused) == ("fill", "thin", True)


def test_link_would_not_be_replaced(host: Host) -> None:
    os.link(host.overlay(), host.path("other"))

    plan = Preallocator().plan(host.path("other"), format="qcow2")

    assert isinstance(plan.error, exceptions.DiskIsLink)


def test_disk_would_not_be_rewritten_under_a_guess(host: Host) -> None:
    plan = Preallocator().plan(host.overlay(mapped=0.5), "rewrite")

    assert isinstance(plan.error, exceptions.FormatNotCertain)
    assert (plan.treatment, plan.state, plan.needed) == ("none", "thin", 0)


def test_filesystem_that_can_hold_nothing_would_be_refused(host: Host) -> None:
    host.filesystem = NFS

    plan = Preallocator(on_unsupported="error").plan(host.raw(), format="raw")

    assert isinstance(plan.error, exceptions.UnsupportedFilesystem)


def test_disk_that_cannot_be_looked_at_has_no_plan(host: Host) -> None:
    with pytest.raises(exceptions.DiskNotFound):
        Preallocator().plan(host.path("missing"))
    with pytest.raises(exceptions.BrokenImage):
        Preallocator().plan(host.qcow2(errors=1), format="qcow2")


def test_look_that_is_known_is_not_done_again(host: Host) -> None:
    path = host.overlay(mapped=0.5)
    known = Preallocator().inspect(path, format="qcow2")
    host.calls.clear()

    Preallocator().plan(path, "reserve", format="qcow2", known=known)

    assert host.run("check") == []


def test_fallback_is_told_by_its_mode(host: Host) -> None:
    host.filesystem = NFS

    assert Preallocator().plan(host.overlay(), format="qcow2").mode == "metadata"


# What is left to others.


@pytest.mark.parametrize("case", [case for case in CASES if case.treatment not in ("none", "write")], ids=str)
def test_disk_takes_nothing_of_what_is_to_be_kept_free(host: Host, case: Case) -> None:
    plan = planned(host, case)
    # Twice for what a filesystem may take for its own books.
    spare = 2 * (64 * units.Ki + plan.needed // 1024)
    for available, fits in ((units.Gi, False), (units.Gi + plan.needed + spare + units.Mi, True)):
        host.available = available
        strategy = Preallocator(case.mode, keep_free="1G")
        assert strategy.plan(plan.path, case.existing, format=case.format).fits == fits
        if fits:
            strategy.preallocate(plan.path, case.existing, format=case.format)
            assert host.available >= units.Gi
        else:
            with pytest.raises(exceptions.NoSpace, match=r"beside what is to be kept free \(1G\)"):
                strategy.preallocate(plan.path, case.existing, format=case.format)


@pytest.mark.parametrize(
    "act",
    [
        lambda strategy, host: strategy.create(host.path("new"), SIZE, format="raw"),
        lambda strategy, host: strategy.resize(host.path(), 2 * SIZE, format="raw"),
    ],
    ids=["create", "resize"],
)
def test_disk_that_is_made_or_grown_takes_nothing_of_it_either(
    host: Host, act: Callable[[Preallocator, Host], object]
) -> None:
    host.raw(held=SIZE)
    host.available = units.Gi + SIZE
    strategy = Preallocator(keep_free=units.Gi)

    with pytest.raises(exceptions.NoSpace, match="let less be kept free"):
        act(strategy, host)

    assert host.changes == []


def test_work_that_would_take_of_it_is_known_before_others_wait_for_it(host: Host) -> None:
    path = host.raw()
    host.available = units.Gi + SIZE
    known = Preallocator().inspect(path, format="raw")

    with pytest.raises(exceptions.NoSpace):
        Preallocator(keep_free=units.Gi).has_work(path, "reserve", known, format="raw")
    # What is not there at all, a filesystem may still be about to free: that is for those who wait.
    host.available = SIZE - 1
    assert Preallocator(keep_free=units.Gi).has_work(path, "reserve", known, format="raw")


@pytest.mark.parametrize("keep_free", ["much", "101%", -1, "", True])
def test_part_that_makes_no_sense_is_refused_at_once(keep_free: Any) -> None:
    with pytest.raises(ValueError, match=r"^keep_free .*cannot be"):
        Preallocator(keep_free=keep_free)
