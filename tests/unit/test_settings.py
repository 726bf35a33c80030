# SPDX-License-Identifier: Apache-2.0
"""A setting stands in one place, and is told, checked and passed on from there."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
from typing import get_args, get_type_hints

from oslo_utils import units
import pytest

import imgprealloc
from imgprealloc import Preallocator
from imgprealloc import healing
from imgprealloc import opts
from imgprealloc import settings
from imgprealloc import sizes

_PACKAGE = pathlib.Path(str(imgprealloc.__file__)).parent

_NEW = '''
    colour: str = dataclasses.field(
        default="red",
        metadata=described({"red": "Like a brick.", "blue": "Like the sea."}, """
Colour of the disks.

Nobody sees it.
"""),
    )

    def __post_init__'''

# What may never have to be told of it.
_SEES_IT = """
import argparse, types
from oslo_config import cfg
import imgprealloc
from imgprealloc import Preallocator, healing, opts, settings
from imgprealloc.cli import allocate, create, resize, show

assert imgprealloc.__file__.startswith({copy!r}), imgprealloc.__file__

# The library.
assert Preallocator().colour == "red"
assert Preallocator(colour="blue").with_mode("full").colour == "blue"
assert healing.without_zeros(Preallocator(colour="blue")).colour == "blue"
try:
    Preallocator(colour="green")
except ValueError as exc:
    assert "colour 'green' is not one of red, blue" in str(exc)
else:
    raise AssertionError("green was accepted")

# nova.conf.
conf = cfg.ConfigOpts()
opts.register(conf)
conf(["--config-file", {conf!r}], default_config_files=[], default_config_dirs=[])
opts.validate(conf)
assert conf.imgprealloc.colour == "blue"
assert opts.preallocator_from(conf) == Preallocator(colour="blue")
[option] = [option for option in opts.OPTIONS if option.name == "colour"]
assert dict(option.type.choices) == {{"red": "Like a brick.", "blue": "Like the sea."}}
assert "Nobody sees it." in option.help

# The command.
for verb in (allocate.Allocate, create.Create, resize.Resize):
    command = verb(types.SimpleNamespace(), argparse.Namespace())
    parser = command.get_parser("imgprealloc")
    size = [] if verb is allocate.Allocate else ["1G"]
    assert command.preallocator(parser.parse_args(["disk", *size])).colour == "red"
    assert command.preallocator(parser.parse_args(["--colour", "blue", "disk", *size])).colour == "blue"
    assert "Colour of the disks. (default: red)" in " ".join(parser.format_help().split())
assert "--colour" not in show.Show(types.SimpleNamespace(), argparse.Namespace()).get_parser("x").format_help()
print("seen")
"""


def test_setting_that_is_added_in_its_one_place_reaches_all_who_have_to_know_it(tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "imgprealloc"
    shutil.copytree(_PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / "settings.py").read_text()
    assert source.count("\n    def __post_init__") == 1
    (copy / "settings.py").write_text(source.replace("\n    def __post_init__", _NEW))
    conf = tmp_path / "nova.conf"
    conf.write_text("[imgprealloc]\ncolour = blue\n")

    ended = subprocess.run(
        [sys.executable, "-c", _SEES_IT.format(copy=str(copy), conf=str(conf))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stdout) == (0, "seen\n")


@pytest.mark.parametrize(
    "field", [field for field in settings.fields() if field.name != "keep_free"], ids=lambda field: field.name
)
def test_setting_has_choices_of_which_its_default_is_one_and_whole_sentences(
    field: dataclasses.Field[object],
) -> None:
    choices = field.metadata["choices"]

    assert field.default in choices
    assert field.metadata["help"].strip().endswith(".")
    assert field.metadata["help"].strip().splitlines()[0].endswith(".")
    assert all(text == "" or text.endswith(".") for text in choices.values())


def test_what_is_kept_free_has_a_default_for_disks_that_exist_and_whole_sentences() -> None:
    [field] = [field for field in settings.fields() if field.metadata["choices"] is None]

    assert (field.name, field.default) == ("keep_free", 0)
    assert sizes.part(field.metadata["for_existing"], 100 * units.Gi) == units.Gi
    assert sizes.part(field.metadata["for_existing"], 100 * units.Ti) == 10 * units.Gi
    assert all(line.endswith(".") for line in (field.metadata["help"].strip(), field.metadata["help"].split("\n")[1]))


@pytest.mark.parametrize("name", ["mode", "on_unsupported"])
def test_what_a_type_allows_is_what_may_be_chosen(name: str) -> None:
    [field] = [field for field in settings.fields() if field.name == name]

    assert list(field.metadata["choices"]) == list(get_args(get_type_hints(settings.Settings)[name]))


def test_strategy_has_the_settings_and_nothing_else() -> None:
    assert [field.name for field in dataclasses.fields(Preallocator)] == [field.name for field in settings.fields()]
    assert {field.name for field in settings.fields()} <= {option.name for option in opts.OPTIONS}


def test_strategy_is_a_value() -> None:
    assert Preallocator() == Preallocator("falloc")
    assert hash(Preallocator()) == hash(Preallocator("falloc"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Preallocator().mode = "full"  # type: ignore[misc]


def test_another_mode_is_another_strategy() -> None:
    made = Preallocator("full", on_unsupported="error", overlay_cluster_size=65536)

    assert made.with_mode("metadata") == Preallocator("metadata", on_unsupported="error", overlay_cluster_size=65536)
    assert made.mode == "full"


@pytest.mark.parametrize(
    ("mode", "fallback", "running"),
    [
        ("falloc", "metadata", ("falloc", "metadata")),
        ("full", "metadata", ("falloc", "metadata")),
        ("falloc", "full", ("falloc", "metadata")),
        ("metadata", "error", ("metadata", "error")),
    ],
)
def test_no_zeros_are_written_under_a_running_guest(
    mode: settings.Mode, fallback: settings.OnUnsupported, running: tuple[str, str]
) -> None:
    made = healing.without_zeros(Preallocator(mode, on_unsupported=fallback, overlay_cluster_size=65536))

    assert (made.mode, made.on_unsupported, made.overlay_cluster_size) == (*running, 65536)
