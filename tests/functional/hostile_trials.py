# SPDX-License-Identifier: Apache-2.0
"""What must not happen to a hostile disk, and how it is tried out: by rules that hold for each of them.

A trial is one verb on one disk, which is made anew for it. Each disk is tried
out in a process of its own, with an alarm, because what is wrong may be that
nothing ever ends.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import json
from multiprocessing import connection
import multiprocessing.context
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import traceback
from typing import Any, Optional

from functional import hostile_disks
from functional.hostile_disks import Entry

# After so many seconds in one verb nobody believes that it will end. Programs
# that read a disk may take 30 of CPU time, and a machine may have more to do.
HANG = 120
# What reads a disk for the comparison may wait for a FIFO.
_PATIENCE = 3
# More than one that is read whole has.
_GREATEST = 64 * hostile_disks.MiB

# How many disks are tried at once.
WORKERS = 2


@dataclasses.dataclass(frozen=True)
class Fault:
    """A rule that was broken.

    :param lost: whether a guest, or somebody, has lost bytes by it
    """

    trial: str
    what: str
    lost: bool = False

    def __str__(self) -> str:
        return f"{self.trial}: {'LOST: ' if self.lost else ''}{self.what}"


@dataclasses.dataclass(frozen=True)
class Seen:
    """A file, as far as nobody may change it."""

    kind: int
    mode: int
    owner: tuple[int, int]
    inode: int
    length: int
    content: Optional[str]


@dataclasses.dataclass(frozen=True)
class Look:
    """A folder with a disk in it, as it was found; two that are equal have nothing between them but reading."""

    files: dict[str, Seen]
    disk: str
    content: bytes
    stamps: dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Guest:
    """What a guest finds in a disk, and what else is in it: None where QEMU does not open it."""

    content: bytes
    kept: tuple[str, ...]
    faults: int
    leaks: int


def look(folder: pathlib.Path, path: pathlib.Path) -> Look:
    """Look at everything in a folder, and nothing that could block or follow."""
    files: dict[str, Seen] = {}
    stamps: dict[str, tuple[int, ...]] = {}
    # Not for a path whose last part is a link: that one is there as well.
    disk = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    for directory, folders, names in os.walk(folder):
        for name in folders + names:
            found = os.path.join(directory, name)
            status = os.lstat(found)
            called = os.path.relpath(found, folder)
            files[called] = _seen(found, status)
            stamps[called] = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_blocks)
    content = b""
    if disk in files and stat.S_ISREG(files[disk].kind):
        content = pathlib.Path(folder, disk).read_bytes()
    return Look(files, disk, content, stamps)


def _seen(path: str, status: os.stat_result) -> Seen:
    content = None
    if stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
        # Who is not root may not read a file of their own without permissions.
        content = hashlib.blake2b(pathlib.Path(path).read_bytes()).hexdigest()
    length = status.st_size if content is not None else 0
    kind = stat.S_IFMT(status.st_mode)
    return Seen(kind, status.st_mode, (status.st_uid, status.st_gid), status.st_ino, length, content)


def guest(folder: pathlib.Path, seen: Look) -> Guest | None:
    """Read a qcow2 disk as its guest does, every byte and through its backing files."""
    path = folder / seen.disk
    with tempfile.TemporaryDirectory(prefix="imgprealloc-guest-") as scratch:
        target = os.path.join(scratch, "raw")
        try:
            info = json.loads(_qemu_img("info", "--output=json", "-f", "qcow2", path))
            if info["virtual-size"] > _GREATEST:
                return None
            _qemu_img("dd", "-f", "qcow2", "-O", "raw", "bs=1M", f"if={path}", f"of={target}")
            check = json.loads(_qemu_img("check", "--output=json", "-f", "qcow2", path, statuses=(0, 2, 3)))
            content = pathlib.Path(target).read_bytes() if info["virtual-size"] else b""
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
    kept = [f"snapshot {snapshot['name']}" for snapshot in info.get("snapshots", ())]
    kept += [f"bitmap {bitmap['name']}" for bitmap in info["format-specific"]["data"].get("bitmaps", ())]
    kept += [f"{key} {info.get(key)}" for key in ("backing-filename", "backing-filename-format", "encrypted")]
    faults = check.get("check-errors", 0) + check.get("corruptions", 0)
    return Guest(content, tuple(kept), faults, check.get("leaks", 0))


def _qemu_img(*words: str | os.PathLike[str], statuses: Sequence[int] = (0,)) -> bytes:
    command = ["qemu-img", *words]
    done = subprocess.run(command, capture_output=True, check=False, timeout=_PATIENCE, stdin=subprocess.DEVNULL)
    if done.returncode not in statuses:
        raise subprocess.CalledProcessError(done.returncode, command)
    return done.stdout


@dataclasses.dataclass(frozen=True)
class Trial:
    """One verb on one disk.

    :param certain: whether somebody has said which format it has
    :param may_write: whether the verb may change the file, or replace it
    :param grows: whether the disk may be longer afterwards
    :param others: files that are somebody else's to change
    """

    name: str
    entry: Entry
    certain: bool
    may_write: bool = True
    grows: bool = False
    others: tuple[str, ...] = ()

    def faults(
        self, folder: pathlib.Path, before: Look, after: Look, was: Callable[[], Guest | None], *, refused: bool
    ) -> Iterator[Fault]:
        """Compare a folder with what it was before, and name the rules that were broken.

        :param was: tells what the guest found in the disk before
        :param refused: whether the verb has ended with an error
        """
        if before.stamps == after.stamps:
            return
        yield from self._neighbours(before, after)
        if before.disk not in before.files:
            return
        if before.disk not in after.files:
            yield Fault(self.name, "the disk is gone", lost=True)
            return
        old, new = before.files[before.disk], after.files[before.disk]
        same_file = old.inode == new.inode
        if (old.kind, old.mode, old.owner) != (new.kind, new.mode, new.owner):
            yield Fault(self.name, f"the disk is another kind of file, or another's: {old}, then {new}", lost=True)
        elif before.content == after.content and same_file:
            return
        elif refused or not self.may_write:
            what = "was refused, but the file is another" if refused else "has only to look, but the file is another"
            yield Fault(self.name, what, lost=before.content != after.content[: len(before.content)])
        else:
            found = was() if self.entry.truth == "qcow2" and self.certain else None
            # Damage that QEMU has no sign of is nobody's fault but its maker's.
            broken = found is not None and self.entry.damaged and bool(found.faults or found.leaks)
            if found is None or (broken and (found.faults or not self.grows)):
                yield from self._bytes(before, after, same_file=same_file)
                return
            if broken:
                # Growth changes the header and the tables; the data that has leaked has to stay.
                yield from self._bytes(before, after, same_file=same_file, start=hostile_disks.DATA)
            yield from self._guest(found, guest(folder, after))

    def _neighbours(self, before: Look, after: Look) -> Iterator[Fault]:
        for name in sorted(before.files.keys() | after.files.keys()):
            old, new = before.files.get(name), after.files.get(name)
            if name in self.others:
                continue
            if new is None:
                if name != before.disk:
                    yield Fault(self.name, f"{name!r} is gone", lost=True)
            elif old is None:
                yield Fault(self.name, f"{name!r} remains")
            elif name != before.disk and old != new:
                disk, then = before.files.get(before.disk), after.files.get(before.disk)
                if disk is not None and then is not None and (old.inode, new.inode) == (disk.inode, then.inode):
                    # Another name of the disk.
                    continue
                yield Fault(self.name, f"{name!r} was {old}, and is {new}", lost=True)

    def _bytes(self, before: Look, after: Look, *, same_file: bool, start: int = 0) -> Iterator[Fault]:
        end = len(before.content)
        wanted, kept, more = before.content[start:], after.content[start:end], after.content[end:]
        if kept != wanted:
            at = next(index for index, byte in enumerate(wanted) if kept[index : index + 1] != bytes([byte]))
            yield Fault(self.name, f"its byte {start + at} is another, or gone", lost=True)
        elif start:
            return
        elif not same_file:
            yield Fault(self.name, "it is another file, though nothing but a reservation was allowed")
        elif more.strip(b"\0"):
            yield Fault(self.name, "more than zeros were written behind its end", lost=True)
        elif len(more) >= 512 and not (self.grows and self.certain):
            yield Fault(self.name, f"it is longer by {len(more)} bytes")

    def _guest(self, was: Guest, now: Guest | None) -> Iterator[Fault]:
        if now is None:
            yield Fault(self.name, "QEMU does not open it any more", lost=True)
            return
        kept, more = now.content[: len(was.content)], now.content[len(was.content) :]
        if kept != was.content or more.strip(b"\0"):
            yield Fault(self.name, "its guest reads other bytes", lost=True)
        if len(more) >= 512 and not self.grows:
            yield Fault(self.name, f"its guest finds it longer by {len(more)} bytes")
        if now.kept != was.kept:
            yield Fault(self.name, f"it had {was.kept}, and has {now.kept}", lost=True)
        if now.faults > was.faults:
            yield Fault(self.name, f"it has {now.faults} faults, and had {was.faults}", lost=True)


class Bench:
    """One hostile disk in a folder, made anew whenever something has changed it."""

    def __init__(self, entry: Entry, folder: pathlib.Path) -> None:
        self.entry = entry
        self.folder = folder
        self._before: Look | None = None
        self._path = folder
        self._guest: list[Guest | None] = []

    def set_up(self) -> tuple[pathlib.Path, Look]:
        """Have the disk as its entry makes it."""
        if self._before is None or look(self.folder, self._path).stamps != self._before.stamps:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            self._path = self.entry.build(self.folder)
            self._before = look(self.folder, self._path)
        return self._path, self._before

    def judge(self, trial: Trial, *, refused: bool) -> list[Fault]:
        """Name the rules that a trial has broken."""
        assert self._before is not None
        after = look(self.folder, self._path)
        return list(trial.faults(self.folder, self._before, after, self._was, refused=refused))

    def _was(self) -> Guest | None:
        """Read what the guest of an untouched disk finds: once, and beside it."""
        if not self._guest:
            # Some name themselves by their folder, none by where that is.
            aside = self.folder.with_name(f"{self.folder.name}-untouched")
            aside.mkdir()
            path = self.entry.build(aside)
            self._guest.append(guest(aside, look(aside, path)))
            shutil.rmtree(aside)
        return self._guest[0]


class Hung(BaseException):
    """The alarm: a verb does not end. No handler of errors is to catch it."""


@contextlib.contextmanager
def alarm(seconds: float = 0) -> Iterator[None]:
    """Raise Hung in what takes longer."""

    def ring(*_: object) -> None:
        raise Hung

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds or HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


Outcome = dict[str, list[Fault]]


def in_processes(entries: Iterable[Entry], work: Callable[[Entry], list[Fault]]) -> Outcome:
    """Try disks, each in a process of its own, some at once, and return what is wrong with each."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(list(entries)))
    outcome: Outcome = {}
    running: dict[int, tuple[Entry, multiprocessing.context.ForkProcess, connection.Connection, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < WORKERS:
                entry = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(work, entry, theirs))
                process.start()
                theirs.close()
                running[process.sentinel] = entry, process, ours, time.monotonic() + 12 * HANG
            done = connection.wait([ours for _, _, ours, _ in running.values()], timeout=1)
            for sentinel, (entry, process, ours, deadline) in list(running.items()):
                if ours not in done and time.monotonic() < deadline:
                    continue
                fault = Fault("all", "the process that tried it has died, or hung", lost=True)
                outcome[entry.name] = [fault]
                with contextlib.suppress(EOFError):
                    outcome[entry.name] = ours.recv() if ours in done else [fault]
                ours.close()
                end_session(process.pid)
                process.join()
                del running[sentinel]
    finally:
        for _, process, _, _ in running.values():
            end_session(process.pid)
    return outcome


def _work(work: Callable[[Entry], list[Fault]], entry: Entry, answer: connection.Connection) -> None:
    os.setsid()
    with open(os.devnull, "r+b") as nothing:
        for number in range(3):
            os.dup2(nothing.fileno(), number)
    try:
        answer.send(work(entry))
    except Exception:
        answer.send([Fault("all", f"the trial itself has failed: {traceback.format_exc()}", lost=True)])
    answer.close()


def end_session(leader: int | None) -> None:
    """Kill all that is left of a session that we have started."""
    for process in os.listdir("/proc"):
        if not process.isdigit():
            continue
        with contextlib.suppress(OSError):
            stats = pathlib.Path("/proc", process, "stat").read_text().rpartition(")")[2].split()
            if leader is not None and int(stats[3]) == leader:
                os.kill(int(process), signal.SIGKILL)


def counts(outcome: Outcome) -> dict[str, int]:
    """Count the disks that were tried, those that no rule was broken with, and those that something was lost of."""
    return {
        "tried": len(outcome),
        "held": sum(not faults for faults in outcome.values()),
        "lost": sum(any(fault.lost for fault in faults) for faults in outcome.values()),
    }


class Summary:
    """A plugin of pytest's that tells the counts at the end.

    :param subject: what was tried
    """

    def __init__(self, subject: str, outcome: Outcome) -> None:
        self.subject = subject
        self.outcome = outcome

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Write the one line."""
        said = ", ".join(f"{what} {number}" for what, number in counts(self.outcome).items())
        terminalreporter.write_line(f"{self.subject}: {said}")
