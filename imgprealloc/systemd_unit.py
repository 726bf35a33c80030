# SPDX-License-Identifier: Apache-2.0
"""What a systemd service is started with, by its unit file and drop-ins.

The files are read as systemd reads them, because systemctl has no answer in a
chroot or a container. As much as services are written with: see systemd.service(5)
and systemd.exec(5); specifiers (%n) stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import os
import re
import shlex
from typing import Optional

# Those before count more.
_FOLDERS = (
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)

_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)\}|(\w+))")


@dataclasses.dataclass(frozen=True)
class Service:
    """The last program that a service starts.

    :param path: the unit file
    :param command: the program and its arguments
    :param user: who it runs as; empty for root
    :param folder: its working directory; "~" is the user's home; empty for /
    :param environment: variables that the unit sets
    """

    path: str
    command: tuple[str, ...]
    user: str
    folder: str
    environment: dict[str, str]


def find(name: str, root: str = "/") -> Optional[Service]:
    """Read a service's unit; None if there is none, or none that starts anything.

    :param name: with its suffix, as in nova-compute.service
    :param root: where the host's files are
    :raises: OSError for files that cannot be read
    """
    path = next(_found(root, name), None)
    if path is None:
        return None
    settings = _Settings()
    for file in (path, *_drop_ins(root, name)):
        with open(file, encoding="utf-8", errors="surrogateescape") as lines:
            settings.read(lines.read())
    if not settings.start:
        return None
    environment = {**settings.environment, **settings.of_files(root)}
    # systemd's own marks, as "do not care how it ends".
    words = shlex.split(settings.start.lstrip("@-:+!|"))
    command = tuple(word for part in words for word in _with_variables(part, environment))
    return Service(path, command, settings.user, settings.folder, environment)


def _found(root: str, name: str) -> Iterator[str]:
    for folder in _FOLDERS:
        path = os.path.join(root, folder, name)
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        yield path


def _drop_ins(root: str, name: str) -> list[str]:
    """List a unit's drop-ins in their order, which is that of their names alone."""
    found: dict[str, str] = {}
    for folder in _found(root, f"{name}.d"):
        for file in os.listdir(folder):
            if file.endswith(".conf"):
                found.setdefault(file, os.path.join(folder, file))
    return [found[file] for file in sorted(found)]


class _Settings:
    """What the files say of [Service], one after the other."""

    def __init__(self) -> None:
        self.start = ""
        self.environment: dict[str, str] = {}
        self.user = ""
        self.folder = ""
        self._files: list[str] = []

    def read(self, text: str) -> None:
        section = ""
        for line in text.replace("\\\n", " ").splitlines():
            line = line.strip()
            if line.startswith("["):
                section = line
            elif section == "[Service]":
                # A comment's name is none of ours.
                name, _, value = line.partition("=")
                self._set(name.strip(), value.strip())

    def _set(self, name: str, value: str) -> None:
        if name == "ExecStart":
            # Without a value it takes back what was said before.
            self.start = value
        elif name == "Environment":
            words = dict(word.split("=", 1) for word in shlex.split(value) if "=" in word)
            self.environment = {**self.environment, **words} if value else {}
        elif name == "EnvironmentFile":
            self._files = [*self._files, value] if value else []
        elif name == "User":
            self.user = value
        elif name == "WorkingDirectory":
            self.folder = value.lstrip("-")

    def of_files(self, root: str) -> dict[str, str]:
        """Return the variables of the unit's EnvironmentFiles; one that is not there is the service's matter."""
        found: dict[str, str] = {}
        for file in self._files:
            path = os.path.join(root, file.lstrip("-").lstrip("/"))
            try:
                with open(path, encoding="utf-8", errors="surrogateescape") as lines:
                    text = lines.read().replace("\\\n", "")
            except FileNotFoundError:
                continue
            for line in text.splitlines():
                name, equals, value = line.strip().partition("=")
                if equals and not line.startswith(("#", ";")):
                    found[name.strip()] = " ".join(shlex.split(value))
        return found


def _with_variables(word: str, environment: dict[str, str]) -> list[str]:
    """Put a word's variables in: $NAME alone is as many words as it has, ${NAME} is a part of one."""
    alone = re.fullmatch(r"\$(\w+)", word)
    if alone:
        return environment.get(alone[1], "").split()

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        return environment.get(name, "") if name else "$"

    return [_VARIABLE.sub(value, word)]
