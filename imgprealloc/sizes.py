# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write and read them, in binary units, the same in tables, errors and options."""

from __future__ import annotations

import decimal
import re

from oslo_utils import units

_UNITS = {"": 1, "K": units.Ki, "M": units.Mi, "G": units.Gi, "T": units.Ti, "P": units.Pi, "E": units.Ei}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGTPE]?)(?:i?B)?", re.ASCII | re.IGNORECASE)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%", re.ASCII)


def parse(text: str) -> int:
    """Return the bytes that are written as qemu-img has it: a number, or one with K, M, G, T, P, E for powers of 1024.

    :raises: ValueError
    """
    found = _SIZE.fullmatch(text)
    size = decimal.Decimal(found[1]) * _UNITS[found[2].upper()] if found else decimal.Decimal("NaN")
    if size != size.to_integral_value():
        raise ValueError(f"{text!r} is not a size such as 10737418240, 512M or 1.5G")
    return int(size)


def part(asked: int | str, whole: int) -> int:
    """Return the bytes that a part of a whole has: a size, a percentage, or the least of several with commas between.

    :param asked: as 10737418240, "10G", "5%", "1%,10G"
    :raises: ValueError
    """
    return min(_part(word.strip(), whole) for word in str(asked).split(","))


def _part(word: str, whole: int) -> int:
    percent = _PERCENT.fullmatch(word)
    if percent is None:
        try:
            return parse(word)
        except ValueError as exc:
            raise ValueError(f"{word!r} is neither a size such as 10G nor a part such as 5%") from exc
    share = decimal.Decimal(percent[1])
    if share > 100:
        raise ValueError(f"{word} is more than there is")
    return int(whole * share / 100)


def readable(size: int) -> str:
    """Write a size with four digits and a binary unit; from 10,000 TiB on with all that it takes."""
    rest, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(rest) >= units.Ki:
            rest, unit = rest / units.Ki, larger
    # Nobody reads 1.638e+04 TiB.
    return f"{rest:.4g} {unit}" if abs(rest) < 10_000 else f"{rest:.0f} {unit}"


def exact(size: int) -> str:
    """Write a size for an error's text: readable, and to the byte."""
    told = readable(size)
    return told if told == f"{size} bytes" else f"{told} ({size} bytes)"
