# SPDX-License-Identifier: Apache-2.0
"""What a systemd unit says of how a service is started, as far as Debian's packages of OpenStack use it."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import pathlib
import re
import shlex

_FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


@dataclasses.dataclass(frozen=True)
class Unit:
    """How a service is started.

    :param before: commands to be run first, as root (ExecStartPre, PermissionsStartOnly)
    :param folder: where; "~" is the user's home
    :param runtime: folders that it wants below /run
    """

    command: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    user: str = "root"
    group: str = ""
    folder: str = "/"
    runtime: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def of(name: str) -> Unit:
    """Read a service's unit."""
    for folder in _FOLDERS:
        path = pathlib.Path(folder, f"{name}.service")
        if path.exists():
            return parsed(path.read_text())
    raise FileNotFoundError(f"no unit {name}.service in {', '.join(_FOLDERS)}")


def parsed(text: str) -> Unit:
    """Return what a unit's text says.

    Variables are left out of commands, which is what systemd does with those that are not set.
    """
    found: dict[str, list[str]] = {}
    section = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        line = line.strip()
        if line.startswith("["):
            section = line
        elif section == "[Service]" and line[:1] not in ("#", ";", ""):
            key, _, value = line.partition("=")
            found.setdefault(key.strip(), []).append(value.strip())

    def last(key: str, otherwise: str) -> str:
        return found.get(key, [otherwise])[-1]

    return Unit(
        command=_command(last("ExecStart", "")),
        before=tuple(_command(line) for line in found.get("ExecStartPre", [])),
        user=last("User", "root"),
        group=last("Group", ""),
        folder=last("WorkingDirectory", "/").lstrip("-"),
        runtime=tuple(last("RuntimeDirectory", "").split()),
        environment=dict(
            word.split("=", 1) for line in found.get("Environment", []) for word in shlex.split(line) if "=" in word
        ),
    )


def _command(line: str) -> tuple[str, ...]:
    # "-", "+" and the like before a command say how systemd takes its failure, and as whom it is run.
    words = shlex.split(line.lstrip("-+!:@"))
    return tuple(word for word in words if not word.startswith("$"))
