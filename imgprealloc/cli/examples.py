# SPDX-License-Identifier: Apache-2.0
"""Examples at the end of a verb's help, each of which can be typed as it stands on a compute node."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NamedTuple

_TITLE = "examples"


class Example(NamedTuple):
    """What somebody wants, and what to type for it."""

    deed: str
    typed: str


def add(parser: argparse.ArgumentParser, examples: Iterable[Example]) -> None:
    """Let a parser's help end with these, line by line as they are."""
    text = "\n\n".join(f"{deed}:\n  # {typed}" for deed, typed in examples)
    kind: Any = parser.formatter_class

    class Formatter(kind):  # type: ignore[misc]
        def _fill_text(self, shown: str, width: int, indent: str) -> str:
            if shown != text:
                return str(super()._fill_text(shown, width, indent))
            return "".join(f"{indent}{line}".rstrip() + "\n" for line in text.splitlines())

    parser.formatter_class = Formatter
    parser.add_argument_group(_TITLE, text)
