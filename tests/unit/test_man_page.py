# SPDX-License-Identifier: Apache-2.0
"""The man page, beside what the command itself says."""

from __future__ import annotations

import os
import pathlib
import re

import man_page
import pytest

PAGE = man_page.TARGET.with_name("imgprealloc.rst").read_text()


def options(text: str) -> dict[str, list[str]]:
    """Take the options of each verb out of the verbs' part."""
    found: dict[str, list[str]] = {}
    verb = ""
    for line in text.splitlines():
        if heading := re.match(r"([\w-]+) \[option \.\.\.\]", line):
            verb = heading[1]
        elif line.startswith("--") or re.match("-[a-z] ", line):
            found.setdefault(verb, []).append(line)
    return found


def test_page_has_each_verb_with_its_options() -> None:
    written = options(man_page.TARGET.read_text())

    assert written == options(man_page.text()), "run tools/man_page.py"
    assert set(written) == set(man_page.verbs())


@pytest.mark.parametrize("verb", man_page.verbs())
def test_each_option_of_ours_is_described(verb: str) -> None:
    page = man_page.TARGET.read_text()

    for action in man_page.own(man_page.verbs()[verb]):
        if action.option_strings:
            assert re.search(rf"^.*{action.option_strings[-1]}\b.*\n   \S", page, re.MULTILINE)


def test_each_example_is_a_command_line_that_the_command_takes() -> None:
    examples = re.findall(r"^   imgprealloc (\S+) ?(.*)$", PAGE, re.MULTILINE)

    assert len(examples) > 5
    for verb, rest in examples:
        man_page.verbs()[verb].parse_args(rest.split())


def test_it_is_written_beside_the_old_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(man_page, "TARGET", tmp_path / "verbs.inc")

    man_page.main()

    assert os.listdir(tmp_path) == ["verbs.inc"]
    assert options((tmp_path / "verbs.inc").read_text())
