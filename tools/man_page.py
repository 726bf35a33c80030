# SPDX-License-Identifier: Apache-2.0
"""Write the verbs of the man page, doc/source/man/verbs.inc, from what the command itself says of them.

To be run, in an environment in which the command is installed, whenever an option
has come, gone or been described anew: python tools/man_page.py. A unit test tells when.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import os
import pathlib
import textwrap

import completion

TARGET = pathlib.Path(__file__).parent.parent / "doc" / "source" / "man" / "verbs.inc"

# cliff's own.
_LEFT_OUT = ("complete", "help")


def verbs() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the verbs that the page has."""
    return {name: parser for name, parser in completion.parsers().items() if name not in _LEFT_OUT}


def own(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """List a verb's own options and arguments: not how tables look, nor --help."""
    groups = parser._action_groups[:2]
    return [action for group in groups for action in group._group_actions if action.dest != "help"]


def text() -> str:
    """Return the whole of it."""
    return "\n".join(line for name, parser in verbs().items() for line in _verb(name, parser))


def _verb(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    actions = own(parser)
    arguments = [_argument(action) for action in actions if not action.option_strings]
    heading = " ".join([name, "[option ...]", *arguments])
    yield from (heading, "-" * len(heading), "")
    yield from textwrap.wrap(f"{parser.description}", 88)
    yield ""
    for action in actions:
        described = " ".join((action.help or "").split()) % {"default": action.default}
        if action.option_strings:
            yield ", ".join(f"{option}{_value(action)}" for option in action.option_strings)
            yield from textwrap.wrap(described, 85, initial_indent="   ", subsequent_indent="   ")
    yield ""


def _argument(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest.upper())
    return f"[{name} ...]" if action.nargs == "*" else name


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices and action.metavar is None:
        return f" <{'|'.join(map(str, action.choices))}>"
    return f" {action.metavar or action.dest.upper()}"


def main() -> None:
    """Write it beside the old one, and put it in its place."""
    beside = TARGET.with_suffix(".new")
    beside.write_text(text())
    os.replace(beside, TARGET)


if __name__ == "__main__":
    main()
