# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code does: every fault, option, column and metric of it, and no others.

Its commands are run by tests/functional/test_docs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
import configparser
import dataclasses
import importlib.util
import inspect
import pathlib
import re
import shlex
from typing import Any

from cliff import command as cliff_command
import fixtures
from oslo_config import cfg
import pytest
import rst_blocks
import yaml

import imgprealloc
from imgprealloc import cli
from imgprealloc import opts
from imgprealloc.cli import metrics

from . import said
from .test_cli import KEYS
from .test_opts import configured

_SOURCE = rst_blocks.REPOSITORY / "doc" / "source"
_TROUBLESHOOTING = (_SOURCE / "troubleshooting.rst").read_text()

_TERM = re.compile("(``[^`]+``(, )?)+")

_EACH_PAGE = pytest.mark.parametrize("page", rst_blocks.PAGES, ids=lambda page: str(page.name))


# Troubleshooting


def _terms() -> list[str]:
    """List the texts that the page explains: terms of definition lists, in the words in which they are said."""
    lines = _TROUBLESHOOTING.splitlines()
    terms = [line.strip() for line, below in zip(lines, lines[1:]) if _indent(below) > _indent(line)]
    return [text for term in terms if _TERM.fullmatch(term) for text in re.findall("``(.+?)``", term)]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _matches(term: str, text: str) -> bool:
    """Whether a text is what a term stands for: words in capitals are what differs, dots leave the rest out."""
    gaps = re.sub(r"\\\.\\\.\\\.", ".*", re.escape(term))
    return bool(re.fullmatch(re.sub(r"\b[A-Z]{1,}S?\b", ".+", gaps), text))


@pytest.mark.parametrize("fault", said.everything(), ids=lambda f: f.place)
def test_each_fault_that_is_told_is_explained(fault: said.Said) -> None:
    assert any(_matches(term, fault.text) for term in _terms()), fault.text.replace(said.GAP, "...")


@pytest.mark.parametrize("term", _terms())
def test_each_fault_that_is_explained_is_told(term: str) -> None:
    assert any(_matches(term, fault.text) for fault in said.everything())


@pytest.mark.parametrize("error", sorted(said.ERRORS.keys() - {"PreallocationError"}))
def test_each_error_has_its_section(error: str) -> None:
    assert f"\n{error}\n{'-' * len(error)}\n" in _TROUBLESHOOTING


@pytest.mark.parametrize("error", sorted(said.ERRORS.keys() - {"PreallocationError", "IncompatibleNova"}))
def test_texts_are_explained_in_the_section_of_their_error(error: str) -> None:
    (section,) = re.findall(rf"\n{error}\n-+\n(.*?)\n\n\S[^\n]*\n[-=]{{4}}", _TROUBLESHOOTING, re.DOTALL)
    terms = [text for text in _terms() if f"``{text}``" in section]

    for fault in said.everything():
        if fault.kind == error:
            assert any(_matches(term, fault.text) for term in terms), fault.text


@pytest.mark.parametrize("subject", sorted(said.subjects_of_check_nova()))
def test_each_row_of_check_nova_is_explained(subject: str) -> None:
    assert re.search(rf"^``{re.escape(subject)}`` +[A-Z]", _TROUBLESHOOTING, re.MULTILINE)


def test_finder_of_faults_finds_those_that_are_put_together() -> None:
    texts = {(fault.kind, fault.text) for fault in said.everything()}

    gap = said.GAP
    # In a call of a function that is told the reason; with a constant of the module; in a class's own words.
    assert ("BackingFileUnusable", f"its backing file {gap} is not there") in texts
    assert ("UnsupportedFormat", f"its backing file is named by a protocol of QEMU's: {gap}") in texts
    assert ("warning", f"{gap}: this round has ended early: {gap}") in texts
    assert ("NoSpace", f"it needs {gap} more, and the filesystem has {gap}") in texts


# nova.conf

# Of Nova's own options, and others' files, what the pages show.
_NOVAS = {"DEFAULT": {"compute_driver", "preallocate_images"}}
_OTHERS_FILES = {"nova-base-plugin-imgprealloc"}


def _sections(text: str) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    # DevStack's own line, which says what file the rest is merged into.
    parser.read_string(re.sub(r"^\[\[.*\]\]$", "", text, flags=re.MULTILINE))
    return {name: dict(parser[name]) for name in parser.sections()}


def _shown_sections() -> Iterator[Any]:
    for page in rst_blocks.PAGES:
        for block in rst_blocks.blocks(page, "ini"):
            sections = _sections(block.text)
            if not sections.keys() & _OTHERS_FILES:
                yield pytest.param(sections, id=block.place)
        for block in rst_blocks.blocks(page, "yaml"):
            overrides = yaml.safe_load(block.text).get("nova_nova_conf_overrides")
            if overrides:
                yield pytest.param(overrides, id=block.place)


@pytest.mark.parametrize("sections", _shown_sections())
def test_options_that_are_shown_are_there_and_take_the_values(sections: dict[str, dict[str, str]]) -> None:
    ours = sections.pop("imgprealloc", {})
    conf = configured("[imgprealloc]\n" + "".join(f"{name} = {value}\n" for name, value in ours.items()))

    opts.validate(conf)
    assert ours.keys() <= {option.dest for option in opts.OPTIONS}
    for name, options in sections.items():
        assert options.keys() <= _NOVAS[name]


def test_options_that_there_are_not_are_found() -> None:
    with pytest.raises(cfg.ConfigFileValueError):
        opts.validate(configured("[imgprealloc]\nmode = fallocate\n"))
    assert _sections("[[post-config|$NOVA_CPU_CONF]]\n[imgprealloc]\nnode = x\n") == {"imgprealloc": {"node": "x"}}


@pytest.mark.parametrize("option", [option.dest for option in opts.OPTIONS])
def test_readme_has_each_option_at_its_default(option: str) -> None:
    (ours,) = (
        sections["imgprealloc"]
        for block in rst_blocks.blocks(rst_blocks.REPOSITORY / "README.rst", "ini")
        if "imgprealloc" in (sections := _sections(block.text))
    )
    conf = configured("[imgprealloc]\n" + "".join(f"{name} = {value}\n" for name, value in ours.items()))

    assert option in ours
    assert conf.imgprealloc[option] == configured().imgprealloc[option]


# Commands

# What cannot be run here, because it is about a service, a package or a cloud: looked at only for its form.
NOT_RUN = (
    "apt install ",
    "cp contrib/",
    "cp nova/",
    "docker exec ",
    "git ",
    "imgprealloc-venv/bin/pip ",
    "journalctl ",
    "kolla-ansible ",
    "kolla-build ",
    "openstack ",
    "openstack-ansible ",
    "/opt/nova/bin/pip ",
    "/opt/stack/data/venv/bin/imgprealloc ",
    "/opt/stack/data/venv/bin/pip ",
    "patch ",
    "pip ",
    "python3 -m build ",
    "python3 -m venv ",
    "rm -r /opt/stack/",
    "sudo -u nova /open",
    "sudo -u nova /opt/",
    "systemctl ",
    "tools/",
    "tox ",
)

_ALL = [command for page in rst_blocks.PAGES for command in rst_blocks.commands(page)]


@pytest.mark.parametrize("command", _ALL, ids=lambda command: f"{command.place}: {command.typed[:40]}")
def test_command_has_the_form_of_one(command: rst_blocks.Command) -> None:
    words = shlex.split(command.typed.replace("\\\n", " "))

    assert command.typed.startswith(NOT_RUN) or words[0] in ("imgprealloc", "sudo", "truncate", "qemu-io")
    ours = [number for number, word in enumerate(words) if word.rpartition("/")[2] == "imgprealloc"]
    if ours and (words[ours[0]].endswith("/bin/imgprealloc") or words[0] in ("imgprealloc", "docker", "sudo")):
        _parse(words[ours[0] + 1 :])


def _parse(argv: list[str]) -> None:
    """Read a command line as the command would, and do nothing."""
    if argv in (["--help"], ["--version"]):
        return
    app = cli.Imgprealloc()
    _, remainder = app.parser.parse_known_args(argv)
    # cliff takes the beginning of a verb for it, too.
    assert remainder[0] in dict(app.command_manager)
    kind, name, rest = app.command_manager.find_command(remainder)
    made: cliff_command.Command = kind(app, None)
    made.get_parser(name).parse_args(rest)


@pytest.mark.parametrize("argv", [["shew"], ["sho"], ["show", "--chek"], ["create", "disk", "10 Gb"]])
def test_command_that_there_is_not_is_found(argv: list[str]) -> None:
    with pytest.raises((SystemExit, AssertionError)):
        _parse(argv)


@_EACH_PAGE
def test_commands_are_typed_at_a_prompt(page: pathlib.Path) -> None:
    """Or nobody would run them; what is called so in running text is in backquotes."""
    for block in rst_blocks.blocks(page, "console"):
        assert block.text.startswith(("# ", "$ ")), block.place
    verbs = "|".join(name for name, _ in cli.Imgprealloc().command_manager)
    assert not re.search(rf"^ +([#$] )?imgprealloc ({verbs})\b", _without_console(page), re.MULTILINE)


def _without_console(page: pathlib.Path) -> str:
    return re.sub(r"\.\. code-block:: console\n\n(?:( +).*\n|\n)+", "", page.read_text())


@_EACH_PAGE
def test_python_that_is_shown_can_be_read(page: pathlib.Path) -> None:
    for block in rst_blocks.blocks(page, "python"):
        compile(block.text, block.place, "exec")


# Names that scripts and monitoring rely on


def _first_cells(page: str, after: str) -> list[str]:
    text = (_SOURCE / page).read_text().partition(after)[2]
    return re.findall(r"^``([a-z_]+)``", text.partition("\n\n\n")[0], re.MULTILINE)


def test_every_column_of_the_formats_for_machines_is_explained() -> None:
    assert _first_cells("verify.rst", "Formats for machines")[: len(KEYS)] == KEYS


def test_every_metric_is_explained() -> None:
    registry = metrics._registry([], 0)

    names = {name for name in registry._names_to_collectors if name.startswith("imgprealloc_")}
    assert set(_first_cells("monitor.rst", "for Prometheus")) == names


@pytest.mark.parametrize("name", imgprealloc.__all__)
def test_every_public_name_is_in_the_api(name: str) -> None:
    assert re.search(rf"^\.\. auto\w+:: {name}$", (_SOURCE / "api.rst").read_text(), re.MULTILINE)


def test_every_state_is_explained() -> None:
    assert {"thin", "mapped", "reserved", "preallocated"} <= set(_first_cells("verify.rst", "States\n"))


_MODULES = {path.name for path in said.PACKAGE.glob("*.py")} - {"__init__.py"}


def test_every_module_has_its_room_in_the_architecture_and_no_other_has() -> None:
    page = (_SOURCE / "architecture.rst").read_text()
    (table,) = re.findall(r"\n=+ =+\n(.*?)\n=+ =+\n", page, re.DOTALL)

    first_cells = "\n".join(line[: line.find("   ")] for line in table.splitlines() if not line.startswith(" "))
    assert set(re.findall(r"``(\w+\.py)``", first_cells)) == _MODULES


# The library's own words


@pytest.mark.parametrize(
    "kind",
    [imgprealloc.DiskImage, imgprealloc.Layout, imgprealloc.Pace, imgprealloc.Plan, imgprealloc.Preallocator],
    ids=lambda kind: kind.__name__,
)
def test_each_field_of_a_public_value_is_explained(kind: Any) -> None:
    unexplained = [field.name for field in dataclasses.fields(kind) if f":param {field.name}: " not in kind.__doc__]

    assert unexplained == []


_VERBS = [
    verb
    for name, verb in inspect.getmembers(imgprealloc.Preallocator, inspect.isfunction)
    if not name.startswith("_") and ":raises:" in (verb.__doc__ or "")
]


def _raised(verb: Any) -> set[str]:
    return set(re.findall(r"\w+", inspect.cleandoc(verb.__doc__).partition(":raises:")[2]))


def test_each_error_of_a_disk_is_told_of_by_a_verb_that_raises_it() -> None:
    told = set[str]().union(*map(_raised, _VERBS))

    assert said.ERRORS.keys() - {"PreallocationError", "IncompatibleNova"} <= told


# Pictures


def _pictures() -> Any:
    spec = importlib.util.spec_from_file_location("pictures", _SOURCE.parent / "pictures.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_those_that_the_program_draws() -> None:
    module = _pictures()
    with fixtures.TempDir() as folder:
        module.FOLDER = pathlib.Path(folder.path)
        module.main()
        drawn = {path.name: path.read_text() for path in module.FOLDER.iterdir()}

    assert drawn == {path.name: path.read_text() for path in (_SOURCE / "pictures").iterdir()}


@_EACH_PAGE
def test_pictures_that_are_shown_are_there(page: pathlib.Path) -> None:
    for name in re.findall(r"^\.\. image:: (\S+)", page.read_text(), re.MULTILINE):
        assert (page.parent / name).is_file(), name
