# SPDX-License-Identifier: Apache-2.0
"""What imgprealloc opens, locks and starts is what contrib/apparmor/imgprealloc allows, so that the rules stay true."""

from __future__ import annotations

from collections.abc import Iterator
import os
import pathlib
import re
import sys

import images
import pytest
import tools_needed

RULES = pathlib.Path(__file__).parents[2] / "contrib" / "apparmor" / "imgprealloc"

MiB = 1 << 20

# Where the rules have instances.
_INSTANCE = "/var/lib/nova/instances/0a4e0f3c-0000-4000-8000-000000000000"

# What any program may do has rules of its own (abstractions/base and python).
_RULED = ("/dev/", "/proc/", "/sys/", _INSTANCE)
_OF_ANY_PROGRAM = re.compile(
    r"/dev/(null|tty|urandom)|/proc/(filesystems|sys/.*|meminfo|\d+/maps)|/sys/devices/system/cpu.*"
)

_TRACED = (
    "open,openat,openat2,creat,execve,fcntl,rename,renameat,renameat2,unlink,unlinkat,truncate,chmod,fchmodat,"
    "mkdir,mkdirat,link,linkat"
)
_WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")


@pytest.fixture(scope="session", autouse=True)
def _strace() -> None:
    tools_needed.require(["strace"])


def _pattern(rule: str) -> str:
    """Return a regular expression for a path of AppArmor's."""
    for name, text in {"@{PROC}": "/proc", "@{pid}": "[0-9]*"}.items():
        rule = rule.replace(name, text)
    pieces = {"**": ".*", "*": "[^/]*", "{": "(", "}": ")", ",": "|", "[0-9]*": "[0-9]+"}
    return "".join(pieces.get(piece, re.escape(piece)) for piece in re.split(r"(\[0-9\]\*|\*\*|[*{},])", rule))


def _rules() -> list[tuple[str, str]]:
    """Return the paths of the rules as regular expressions, each with its letters."""
    found = re.findall(r"^  ([/@]\S+) ([a-z]+),$", RULES.read_text(), re.MULTILINE)
    assert found
    return [(_pattern(path), letters) for path, letters in found]


def _whole(trace: str) -> Iterator[str]:
    """Put calls together that strace has told in two lines, because another process came between."""
    begun: dict[str, str] = {}
    for line in trace.splitlines():
        process = line.partition(" ")[0]
        if line.endswith("<unfinished ...>"):
            begun[process] = line.removesuffix("<unfinished ...>")
        elif resumed := re.match(r"\d+ +<\.\.\. \w+ resumed>(.*)", line):
            yield begun.pop(process, "") + resumed[1]
        else:
            yield line


def _accesses(trace: str, folder: str) -> Iterator[tuple[str, str]]:
    """List what was done to which file, in AppArmor's letters; a file as the kernel has found it, by strace's -y."""
    for line in _whole(trace):
        if "= -1 " in line:
            continue
        call, _, rest = line.partition(" ")[2].lstrip().partition("(")
        names = [name.replace(folder, _INSTANCE) for name in re.findall(r'"((?:/|\.)[^"]*)"', rest)]
        result = re.search(r"= \d+<(/[^>]*?)(?:>\(deleted\))?>$", line)
        held = re.match(r"\d+<(/[^>]*)>", rest)
        if call == "execve":
            program = os.path.realpath(names[0])
            # The rules are for a host's own QEMU; the one under test may be elsewhere (tools/test-qemu).
            name = os.path.basename(program)
            yield f"/usr/bin/{name}" if name.startswith("qemu-") else program, "x"
        elif call == "fcntl":
            if held and re.search(r"F_OFD_SETLK|F_SETLEASE", rest):
                yield held[1].replace(folder, _INSTANCE), "k"
        elif call.startswith("open") or call == "creat":
            if result and "O_PATH" not in rest:
                path = result[1].replace(folder, _INSTANCE)
                yield f"{path}/" if os.path.isdir(result[1]) else path, "w" if _WRITES.search(rest) else "r"
        else:
            # Of what is beside a disk, by the folder that is open.
            places = [place.replace(folder, _INSTANCE) for place in re.findall(r"\d+<(/[^>]*)>", rest)]
            inside = re.findall(r'"([^"]*)"', rest)
            for name in inside:
                yield os.path.join(places[0] if places else _INSTANCE, name), "w"


def _is_ruled(path: str, letter: str) -> bool:
    if letter == "x":
        return True
    return path.startswith(_RULED) and not _OF_ANY_PROGRAM.fullmatch(path)


def _run(folder: pathlib.Path, log: pathlib.Path, *argv: str) -> set[tuple[str, str]]:
    """Run the command, and list what the rules have to allow."""
    command = [sys.executable, "-W", "ignore", "-m", "imgprealloc.cli", *argv]
    images.run(
        "strace", "-f", "--seccomp-bpf", "-y", "-qq", "-s", "4096", "-e", f"trace={_TRACED}", "-o", log, *command
    )
    found = {access for access in _accesses(log.read_text(errors="replace"), str(folder)) if _is_ruled(*access)}
    assert found
    return found


def _commands(folder: pathlib.Path) -> list[tuple[str, ...]]:
    """Prepare disks, and return what is to be run on them."""
    base = str(images.random_file(folder / "base", 4 * MiB))
    for name in ("blank", "used", "kept"):
        images.qcow2(folder / name, 16 * MiB, backing=base)
    for name in ("used", "kept"):
        images.qemu_io(folder / name, "write -P 7 1M 1M", "write -z 2M 1M")
    images.sparse_file(folder / "raw", 16 * MiB)
    images.sparse_file(folder / "written", 16 * MiB)
    allocate = ("allocate", "--disk-format")
    return [
        ("create", "--backing", base, "--backing-format", "raw", str(folder / "new"), "16M"),
        ("create", "--overlay-subclusters", "copied", "--backing", base, "--backing-format", "raw",
         str(folder / "copied"), "16M"),
        (*allocate, "qcow2", str(folder / "blank")),
        (*allocate, "qcow2", "--rewrite", str(folder / "used")),
        (*allocate, "qcow2", str(folder / "kept")),
        (*allocate, "raw", str(folder / "raw")),
        (*allocate, "raw", "--mode", "full", str(folder / "written")),
        ("resize", "--disk-format", "qcow2", str(folder / "new"), "24M"),
        ("resize", "--disk-format", "raw", str(folder / "raw"), "24M"),
        ("show", "--disk-format", "qcow2", str(folder / "kept")),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_rules_allow_what_is_done(folder: pathlib.Path, tmp_path: pathlib.Path, kind: str) -> None:
    if kind == "btrfs":
        images.run("chattr", "+C", folder)
    rules = _rules()
    done: set[tuple[str, str]] = set()
    for argv in _commands(folder):
        done |= _run(folder, tmp_path / "log", *argv)

    python = os.path.realpath(sys.executable)
    refused = {
        (path, letter)
        for path, letter in done
        if path != python and not any(letter in letters and re.fullmatch(rule, path) for rule, letters in rules)
    }

    assert refused == set()
    # What there has to be, or the trace was not read.
    assert {letter for _, letter in done} == {"k", "r", "w", "x"}
    assert any("/mountinfo" in path for path, _ in done)
    assert any(path.endswith(".imgprealloc") for path, _ in done)


@pytest.mark.parametrize(
    ("path", "letter", "allowed"),
    [
        ("/proc/1/mountinfo", "r", True),
        ("/proc/1/environ", "r", False),
        ("/proc/1/mountinfo", "w", False),
        ("/usr/bin/qemu-img", "x", True),
        ("/usr/bin/sh", "x", False),
        (f"{_INSTANCE}/.disk.imgprealloc", "w", True),
        ("/var/lib/nova/.ssh/id_rsa", "r", False),
    ],
)
def test_rules_are_read_as_apparmor_reads_them(path: str, letter: str, allowed: bool) -> None:
    assert any(letter in letters and re.fullmatch(rule, path) for rule, letters in _rules()) == allowed
