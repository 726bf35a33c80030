# SPDX-License-Identifier: Apache-2.0
"""Parts of the pages in doc/source/ that are written by programs."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a simple table; a first cell is never empty, or it would continue the row above."""
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])
