# SPDX-License-Identifier: Apache-2.0
"""What this host's nova-compute was started with, or would be: which Python, which words, which surroundings.

A running one is asked first, in /proc; else its systemd unit, then its init script,
which Debian's unit only calls. What is in the files of configuration is read
elsewhere; which ones they are is told here.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import glob
import os
import pwd
import re
import shlex
import shutil
from typing import Optional

from oslo_config import cfg

from imgprealloc import command
from imgprealloc import exceptions
from imgprealloc import systemd_unit

_NAME = "nova-compute"

# Debian's, Ubuntu's and OpenStack-Ansible's; RDO's and SUSE's; DevStack's.
_UNITS = ("nova-compute.service", "openstack-nova-compute.service", "devstack@n-cpu.service")
# Of openstack-pkg-tools. Debian's units run it, and its verb show-args prints what it would start.
_INIT_SCRIPT = "etc/init.d/nova-compute"

# What else than the command line decides which files oslo.config reads, and what counts more than these.
_DECISIVE = re.compile(r"HOME|SNAP|SNAP_COMMON|OS_[A-Z0-9_]+?__\w+")

_BY_HAND = "name its configuration with --config-file"


@dataclasses.dataclass(frozen=True)
class Invocation:
    """How a nova-compute was started, or would be.

    :param told_by: who says so, for people: a process, or a file; empty if nobody does
    :param python: the interpreter; empty if it is not known
    :param program: the script; its name decides which files Nova reads by default
    :param arguments: those that follow
    :param environment: its variables; None: those of this process
    :param folder: its working directory
    :param pid: its process; None if it does not run
    :param started: when at the latest, in seconds since the epoch; None if it does not run
    :param unknown: what of it cannot be found out, and the way out; empty if all is known
    """

    told_by: str = ""
    python: str = ""
    program: str = _NAME
    arguments: tuple[str, ...] = ()
    environment: Optional[Mapping[str, str]] = None
    folder: str = "/"
    pid: Optional[int] = None
    started: Optional[float] = None
    unknown: str = ""

    @property
    def prog(self) -> str:
        """What oslo.config calls the program."""
        return os.path.basename(self.program).removesuffix(".py")

    @property
    def configuration(self) -> tuple[str, ...]:
        """Those of its arguments that name configuration, in their order, each as one word."""
        found = []
        words = iter(self.arguments)
        for word in words:
            option, equals, value = word.partition("=")
            if option not in ("--config-file", "--config-dir", "--config-source"):
                continue
            value = value if equals else next(words, "")
            if option != "--config-source" and not value.startswith("~"):
                value = os.path.join(self.folder, value)
            found.append(f"{option}={value}")
        return tuple(found)

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Have, for as long as this lasts, those variables of its that decide what oslo.config reads."""
        if self.environment is None:
            yield
            return
        before = dict(os.environ)
        for name in filter(_DECISIVE.fullmatch, before):
            del os.environ[name]
        os.environ.update({name: value for name, value in self.environment.items() if _DECISIVE.fullmatch(name)})
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def files_read(self, conf: cfg.ConfigOpts) -> list[str]:
        """List the files that it has read, in oslo.config's order: what a later one says counts.

        :param conf: made from prog and configuration, within surroundings()
        """
        given = [word.partition("=")[::2] for word in self.configuration]
        options = {option for option, _ in given}
        files = [] if "--config-file" in options else list(conf.default_config_files)
        if "--config-dir" not in options:
            # Read before the files that are named, which so count more.
            given = [("--config-dir", folder) for folder in conf.default_config_dirs] + given
        for option, value in given:
            path = os.path.abspath(os.path.expanduser(value))
            if option == "--config-file":
                files.append(path)
            elif option == "--config-dir":
                files += sorted(glob.glob(os.path.join(glob.escape(path), "*.conf")))
        return files


def found(root: str = "/") -> Invocation:
    """Return how nova-compute was started on this host, or would be; an empty one where there is no service of it."""
    return next(iter(running(root)), None) or configured(root) or Invocation()


def running(root: str = "/") -> list[Invocation]:
    """Return the nova-computes that run on this host, not those of containers and chroots.

    :param root: where the host's files are
    """
    proc = os.path.join(root, "proc")
    found: dict[int, Invocation] = {}
    parents: dict[int, int] = {}
    for name in sorted(filter(str.isdigit, os.listdir(proc)), key=int):
        folder = os.path.join(proc, name)
        # It may end while it is looked at, or not be for us to know (proc(5), hidepid=1).
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            words = _read(folder, "cmdline").split("\0")[:-1]
            place = _place_of_program(words)
            if place is None or _is_nested(proc, folder):
                continue
            statistics = _read(folder, "stat").rpartition(")")[2].split()
            parents[int(name)] = int(statistics[1])
            try:
                if not os.path.samestat(os.stat(os.path.join(folder, "root")), os.stat(root)):
                    continue
                found[int(name)] = _seen(root, int(name), words, place, statistics)
            except PermissionError:
                found[int(name)] = Invocation(
                    told_by=f"process {name}",
                    program=words[place],
                    arguments=tuple(words[place + 1 :]),
                    pid=int(name),
                    unknown=f"process {name} is another user's: run this as nova-compute's user, or as root",
                )
    # A child that it has just made, and that has not become another program yet, has its command line.
    return [invocation for pid, invocation in found.items() if parents[pid] not in found]


def _seen(root: str, pid: int, words: list[str], place: int, statistics: list[str]) -> Invocation:
    """Return what a process was started with.

    :param words: its command line
    :param place: where in it nova-compute is
    :param statistics: its stat from the third value on, see proc(5)
    """
    folder = os.path.join(root, "proc", str(pid))
    environment = dict(word.split("=", 1) for word in _read(folder, "environ").split("\0") if "=" in word)
    ticks = int(statistics[19])
    [boot] = re.findall(r"^btime (\d+)", _read(os.path.join(root, "proc"), "stat"), re.MULTILINE)
    # As it was called: what that is a link to does not know its virtual environment.
    python = words[0] if place else os.readlink(os.path.join(folder, "exe"))
    return Invocation(
        told_by=f"process {pid}",
        python=shutil.which(python, path=environment.get("PATH")) or python,
        program=words[place],
        arguments=tuple(words[place + 1 :]),
        environment=environment,
        folder=os.readlink(os.path.join(folder, "cwd")),
        pid=pid,
        # The boot is told without its fraction of a second: not before that.
        started=int(boot) + 1 + ticks / os.sysconf("SC_CLK_TCK"),
    )


def _read(folder: str, name: str) -> str:
    with open(os.path.join(folder, name), encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _place_of_program(words: list[str]) -> Optional[int]:
    """Return where in a command line nova-compute is: at its beginning, or as the script of a Python."""
    place = 0
    if words and re.fullmatch(r"python[\d.]*", os.path.basename(words[0])):
        place = 1
        while place < len(words) and words[place].startswith("-"):
            # These two have a word of their own.
            place += 2 if words[place] in ("-W", "-X") else 1
    return place if place < len(words) and os.path.basename(words[place]) == _NAME else None


def _is_nested(proc: str, folder: str) -> bool:
    """Whether a process is in a PID namespace below ours, as a container's is. Anybody may ask that."""
    depths = []
    for place in (folder, os.path.join(proc, "self")):
        [numbers] = re.findall(r"^NSpid:(.*)$", _read(place, "status"), re.MULTILINE)
        depths.append(len(numbers.split()))
    return depths[0] > depths[1]


def configured(root: str = "/") -> Optional[Invocation]:
    """Return how this host would start nova-compute; None if it has no service of that name.

    :param root: where the host's files are
    """
    for name in _UNITS:
        try:
            unit = systemd_unit.find(name, root)
        except (OSError, ValueError) as exc:
            return Invocation(told_by=name, unknown=f"{name}: {exc}; {_BY_HAND}")
        if unit is not None:
            return _of_unit(unit, root)
    script = os.path.join(root, _INIT_SCRIPT)
    return _of_script(script, told_by=script) if os.access(script, os.X_OK) else None


def _of_unit(unit: systemd_unit.Service, root: str) -> Invocation:
    if not unit.command:
        return Invocation(told_by=unit.path, unknown=f"{unit.path} starts no program; {_BY_HAND}")
    environment = dict(unit.environment)
    with contextlib.suppress(KeyError):
        environment.setdefault("HOME", pwd.getpwnam(unit.user or "root").pw_dir)
    if unit.command[0] == f"/{_INIT_SCRIPT}":
        script = os.path.join(root, _INIT_SCRIPT)
        told = _of_script(script, told_by=f"{script}, by {unit.path}", user=unit.user)
    else:
        place = _place_of_program(list(unit.command))
        if place is None:
            shown = shlex.join(unit.command)
            return Invocation(told_by=unit.path, unknown=f"{unit.path} starts it by way of {shown}; {_BY_HAND}")
        told = _started(unit.path, list(unit.command), place)
    folder = environment.get("HOME", "/") if unit.folder == "~" else unit.folder or "/"
    return dataclasses.replace(told, environment=environment, folder=folder)


def _of_script(script: str, *, told_by: str, user: str = "") -> Invocation:
    """Ask an init script what it would start.

    :param user: whom the service asks it as; empty for root
    """
    try:
        with open(script, encoding="utf-8", errors="surrogateescape") as file:
            can_tell = "show-args)" in file.read()
        # It has variables that could be ours, and makes its service's folders if it is root.
        as_user = (
            ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user and not os.geteuid() else []
        )
        clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        said = command.run(script, *as_user, *clean, script, "show-args") if can_tell else ""
    except OSError as exc:
        return Invocation(told_by=told_by, unknown=f"{script}: {exc.strerror}; {_BY_HAND}")
    except exceptions.PreallocationError as exc:
        return Invocation(told_by=told_by, unknown=f"{exc.path}: {exc.reason}; {_BY_HAND}")
    words = shlex.split(said)
    place = _place_of_program(words)
    if place is None:
        return Invocation(told_by=told_by, unknown=f"{script} does not tell what it starts; {_BY_HAND}")
    return _started(told_by, words, place)


def _started(told_by: str, words: list[str], place: int) -> Invocation:
    """Return what a command line that is not running yet will be."""
    program = words[place]
    return Invocation(
        told_by=told_by,
        python=words[0] if place else _interpreter(program),
        program=program,
        arguments=tuple(words[place + 1 :]),
    )


def _interpreter(script: str) -> str:
    """Return the Python that a script names in its first line; nothing if it names none."""
    try:
        with open(script, encoding="utf-8", errors="surrogateescape") as file:
            words = file.readline().removeprefix("#!").split()
    except OSError:
        return ""
    if words and os.path.basename(words[0]) == "env":
        del words[0]
    return (shutil.which(words[0]) or "") if words else ""


def environment_of(python: str) -> str:
    """Return the folder of the Python environment that an interpreter is of.

    :param python: as it is called: in a virtual environment that is a link to another one's
    """
    for folder in (os.path.dirname(python), os.path.dirname(os.path.dirname(python))):
        with contextlib.suppress(OSError):
            os.stat(os.path.join(folder, "pyvenv.cfg"))
            return os.path.realpath(folder)
    return os.path.dirname(os.path.dirname(os.path.realpath(python)))
