# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows for readers to type and to copy: console blocks and configuration, for the tests."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import pathlib
import re
import textwrap

REPOSITORY = pathlib.Path(__file__).parents[1]

# Not a man page, which shows commands in a form of its own.
PAGES = (
    REPOSITORY / "README.rst",
    REPOSITORY / "CONTRIBUTING.rst",
    *sorted((REPOSITORY / "doc" / "source").glob("*.rst")),
)

_BLOCK = re.compile(
    r"(?:^\.\. ends with (?P<ends>.*)\n\n)?^(?P<indent> *)\.\. code-block:: (?P<language>\w+)\n\n"
    r"(?P<text>(?:(?P=indent) +.*\n|\n)+)",
    re.MULTILINE,
)
_PROMPTS = ("# ", "$ ")


@dataclasses.dataclass(frozen=True)
class Block:
    """One code block.

    :param place: page and line
    :param ends: the exit statuses that its commands may end with, as the comment
        above it says; 0 where there is none
    """

    place: str
    language: str
    text: str
    ends: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Command:
    """What is typed at a prompt, and what is shown of the answer."""

    place: str
    typed: str
    shown: tuple[str, ...]
    ends: tuple[int, ...]


def blocks(page: pathlib.Path, language: str) -> Iterator[Block]:
    """List a page's blocks in a language."""
    text = page.read_text() + "\n"
    for found in _BLOCK.finditer(text):
        if found["language"] == language:
            place = f"{page.relative_to(REPOSITORY)}:{text.count(chr(10), 0, found.start('language')) + 1}"
            ends = tuple(map(int, re.findall(r"\d+", found["ends"] or "0")))
            yield Block(place, language, textwrap.dedent(found["text"]).strip("\n"), ends)


def commands(page: pathlib.Path) -> Iterator[Command]:
    """List what a page's console blocks have typed."""
    for block in blocks(page, "console"):
        typed: list[str] = []
        shown: list[str] = []
        for line in [*block.text.splitlines(), _PROMPTS[0]]:
            if line.startswith(_PROMPTS):
                if typed:
                    yield Command(block.place, "\n".join(typed), tuple(shown), block.ends)
                typed, shown = [line[2:]], []
            elif typed and typed[-1].endswith("\\"):
                typed.append(line)
            else:
                shown.append(line)
