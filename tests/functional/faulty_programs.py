# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for qemu-img, qemu-io, fallocate and sync that do as the real ones, but for one sub-command with one fault.

They are for a folder that is put first on PATH. Each writes down that it was
called; what is wrong with which is written into the folder by the test.
"""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
import pathlib
import shutil
import sys

from functional import processes

PROGRAMS = ("qemu-img", "qemu-io", "fallocate", "sync")

# What any program may do.
ANYWHERE = ("hang", "garbage", "flood_stdout", "flood_stderr", "warn_much", "segv", "kill", "nothing")
# What one may do that prints JSON.
JSON = ("half_json", "texts", "lists", "nulls", "negative", "empty", "list")
# What one may do that makes or changes an image.
HALVES = {
    "create": ("smaller", "no_backing", "other_backing_format", "other_cluster_size", "other_format"),
    "convert": ("no_backing", "other_backing_format", "other_cluster_size", "other_format"),
    "resize": ("smaller",),
}

FLOOD = 100 << 20

# Seconds; one that is not ended by then has been waited for.
OVERSLEPT = 15

# Started with -I -S, which takes a third of the time that Python takes else.
_STAND_IN = """#!{python} -IS
import json, os, signal, sys, time
folder, real = {folder!r}, {real!r}
name = os.path.basename(sys.argv[0])
argv = sys.argv[1:]
sub = argv[0] if name == "qemu-img" and argv else ""
with open(folder + "/called", "a") as file:
    file.write(json.dumps([name, sub]) + chr(10))
with open(folder + "/plan") as file:
    program, wanted, fault = json.load(file)
if (program, wanted) != (name, sub):
    os.execv(real[name], [name, *argv])

def flood(fd):
    block = b"x" * 65535 + b"\\n"
    left = {flood}
    while left > 0:
        try:
            left -= os.write(fd, block)
        except OSError:
            return

def answer():
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(write, 1)
        os.execv(real[name], [name, *argv])
    os.close(write)
    with open(read) as file:
        said = file.read()
    return said, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def each(found, change):
    if isinstance(found, dict):
        return {{key: each(value, change) for key, value in found.items()}}
    if isinstance(found, list):
        return [each(value, change) for value in found]
    return change(found) if isinstance(found, int) and not isinstance(found, bool) else found

def without(option):
    if option in argv:
        at = argv.index(option)
        del argv[at:at + 2]

def put(option, value):
    without(option)
    argv[1:1] = [option, value]

def choose(key, *value):
    if "-o" in argv:
        at = argv.index("-o") + 1
        kept = [option for option in argv[at].split(",") if not option.startswith(key + "=")]
        argv[at] = ",".join(kept + [key + "=" + word for word in value])

def real_one():
    os.execv(real[name], [name, *argv])

if fault == "hang":
    time.sleep({overslept})
    open(folder + "/overslept", "w").close()
    sys.exit(1)
elif fault == "garbage":
    os.write(1, bytes(range(256)) * 16)
elif fault == "flood_stdout":
    flood(1)
elif fault == "flood_stderr":
    flood(2)
    sys.exit(1)
elif fault == "warn_much":
    flood(2)
    real_one()
elif fault in ("segv", "kill"):
    os.kill(os.getpid(), signal.SIGSEGV if fault == "segv" else signal.SIGKILL)
elif fault in ("half_json", "texts", "lists", "nulls", "negative", "empty", "list"):
    said, status = answer()
    if fault == "half_json":
        said = said[:len(said) // 2]
    elif fault == "empty":
        said = "{{}}"
    elif fault == "list":
        said = "[" + said + "]"
    else:
        change = {{"texts": str, "lists": lambda n: [n], "nulls": lambda n: None, "negative": lambda n: -1 - n}}[fault]
        said = json.dumps(each(json.loads(said), change))
    sys.stdout.write(said)
    sys.stdout.flush()
    sys.exit(status)
elif fault == "smaller":
    argv[-1] = str(int(argv[-1]) // 2 if sub == "create" else int(argv[-1]) - 1048576)
    real_one()
elif fault == "no_backing":
    # Its format is not allowed without it on each version.
    for option in ("-b", "-B", "-F"):
        without(option)
    choose("backing_fmt")
    real_one()
elif fault == "other_backing_format":
    if "-F" in argv:
        put("-F", "qcow2")
        argv.insert(1, "-u")
    elif "-B" in argv:
        choose("backing_fmt", "qcow2")
    real_one()
elif fault == "other_cluster_size":
    choose("cluster_size", "32768")
    real_one()
elif fault == "other_format":
    option = "-f" if sub == "create" else "-O"
    at = argv.index(option) + 1
    argv[at] = "qcow2" if argv[at] == "raw" else "raw"
    for option in ("-o", "-b", "-B", "-F"):
        without(option)
    real_one()
"""


class FaultyPrograms:
    """A folder of stand-ins.

    :param folder: an empty folder
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        real = {name: str(shutil.which(name)) for name in PROGRAMS}
        python = os.path.realpath(sys.executable)
        text = _STAND_IN.format(python=python, folder=str(folder), real=real, flood=FLOOD, overslept=OVERSLEPT)
        for name in PROGRAMS:
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.plan()

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which they are found."""
        return {"PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}", processes.MARK: str(self.folder)}

    def plan(self, program: str = "", sub_command: str = "", fault: str = "") -> None:
        """Let one of them be faulty from now on, or none."""
        (self.folder / "plan").write_text(json.dumps([program, sub_command, fault]))
        for name in ("called", "overslept"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def called(self) -> list[tuple[str, str]]:
        """Which were called, with which sub-command, each once."""
        called = self.folder / "called"
        lines = called.read_text().splitlines() if called.exists() else []
        return list(dict.fromkeys((name, sub) for name, sub in map(json.loads, lines)))

    @property
    def overslept(self) -> bool:
        """Whether one that hung was not ended."""
        return (self.folder / "overslept").exists()

    def left_running(self) -> list[str]:
        """List what was started with this folder on PATH and does not end now that what started it is over."""
        return processes.left_running(str(self.folder))


def faults(program: str, sub_command: str) -> Iterator[str]:
    """List what a program may do wrong."""
    yield from ANYWHERE
    if sub_command in ("info", "check"):
        yield from JSON
    yield from HALVES.get(sub_command, ())
