# SPDX-License-Identifier: Apache-2.0
"""Completion by a real bash, beside what the command's own parsers have."""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess

import completion
import pytest

PARSERS = completion.parsers()

_COMPLETE = f"""
source {completion.TARGET}
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_imgprealloc
for word in "${{COMPREPLY[@]}}"; do printf '%s\\0' "$word"; done
"""


def completed(*words: str, folder: pathlib.Path | None = None) -> list[str]:
    """Return what bash offers for the last of the words."""
    argv = ["bash", "-c", _COMPLETE, "bash", "imgprealloc", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=folder)
    assert done.stderr == ""
    return done.stdout.split("\0")[:-1]


def actions(verb: str) -> list[argparse.Action]:
    return [action for action in PARSERS[verb]._actions if action.option_strings]


def test_verbs_are_completed() -> None:
    assert completed("") == list(PARSERS)
    assert completed("--debug", "al") == ["allocate"]


@pytest.mark.parametrize("verb", PARSERS)
def test_options_of_a_verb_are_all_offered(verb: str) -> None:
    missing = {option for action in actions(verb) for option in action.option_strings} - set(completed(verb, "-"))

    assert missing == set(), "run tools/completion.py"


@pytest.mark.parametrize("verb", PARSERS)
def test_choices_of_an_option_are_offered_and_nothing_else(verb: str) -> None:
    for action in actions(verb):
        for option in action.option_strings:
            if action.choices:
                choices = [completion._word(choice) for choice in action.choices]
                assert completed(verb, option, "") == choices, "run tools/completion.py"


def test_modes_are_completed_wherever_they_stand() -> None:
    assert completed("allocate", "--mode", "f") == ["falloc", "full"]
    assert completed("allocate", "--rewrite", "disk", "--mode", "=", "m") == ["metadata"]
    assert completed("allocate", "--mode", "=") == ["falloc", "full", "metadata"]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Give a folder with disks whose names are no words."""
    for name in ("disk", "disk of mine", "-disk"):
        (tmp_path / name).touch()
    (tmp_path / "0d7a").mkdir()
    return tmp_path


@pytest.mark.parametrize("verb", ["show", "allocate", "check", "metrics", "create", "resize"])
def test_paths_are_completed(folder: pathlib.Path, verb: str) -> None:
    assert sorted(completed(verb, "d", folder=folder)) == ["disk", "disk of mine"]
    assert sorted(completed(verb, "", folder=folder)) == ["-disk", "0d7a", "disk", "disk of mine"]


def test_files_that_options_ask_for_are_completed(folder: pathlib.Path) -> None:
    for words in (["show", "-o"], ["metrics", "--output", "="], ["check-nova", "--config-file"], ["--log-file"]):
        assert completed(*words, "0", folder=folder) == ["0d7a"]


def test_what_follows_two_dashes_is_a_path(folder: pathlib.Path) -> None:
    assert completed("show", "--", "-", folder=folder) == ["-disk"]


def test_nothing_is_offered_for_a_number_or_a_size(folder: pathlib.Path) -> None:
    assert completed("show", "--max-width", "", folder=folder) == []


def test_word_that_is_another_verb_s_does_not_change_the_verb() -> None:
    assert "--rewrite" in completed("allocate", "show", "--")


def test_it_is_written_beside_the_old_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "TARGET", tmp_path / "imgprealloc.bash")

    completion.main()

    assert os.listdir(tmp_path) == ["imgprealloc.bash"]
    assert subprocess.run(["bash", "-n", tmp_path / "imgprealloc.bash"], check=False).returncode == 0
