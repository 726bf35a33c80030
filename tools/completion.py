# SPDX-License-Identifier: Apache-2.0
"""Write contrib/completion/imgprealloc.bash from what the command itself says of its verbs and options.

To be run, in an environment in which the command is installed, whenever an option
has come or gone: python tools/completion.py. A unit test tells when.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
import os
import pathlib
import textwrap

from oslo_utils import units

from imgprealloc import cli

TARGET = pathlib.Path(__file__).parent.parent / "contrib" / "completion" / "imgprealloc.bash"

# How options and arguments call what is a file's name.
_FILES = ("FILE", "LOG_FILE", "PATH")

_HEAD = """\
# bash completion for imgprealloc(1).                                   -*- shell-script -*-
# SPDX-License-Identifier: Apache-2.0
#
# Written by tools/completion.py from what the command says of its options.

_imgprealloc() {
    local cur=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} verb= word
    local options= words= files= is_value=
    COMPREPLY=()
    # --option=value is three words to bash.
    if [[ $cur == "=" ]]; then
        cur=
    elif [[ $previous == "=" ]]; then
        previous=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    for word in "${COMP_WORDS[@]:1:COMP_CWORD - 1}"; do
        case $word in
            {verbs}) verb=${verb:-$word} ;;
            # After that there are no more options.
            --) previous=-- ;;
        esac
    done
    case $verb in
"""

_TAIL = """\
    esac
    if [[ -z $is_value && $previous != -- && $cur == -* ]]; then
        words=$options files=
    fi
    if [[ -n $words ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
    elif [[ -n $files ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
    fi
}

complete -F _imgprealloc imgprealloc
"""


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb, or none, as it is completed.

    :param words: what may stand where no option is asked for
    :param files: whether a file may
    :param values: by the options, what may follow them; None for a file
    """

    name: str
    options: tuple[str, ...]
    words: tuple[str, ...]
    files: bool
    values: tuple[tuple[tuple[str, ...], tuple[str, ...] | None], ...]


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each verb."""
    app = cli.Imgprealloc()
    names = sorted(name for name, _ in app.command_manager)
    return {name: app.command_manager.find_command([name])[0](app, None).get_parser(name) for name in names}


def verbs() -> Iterator[Verb]:
    """List the verbs, and what goes without one."""
    found = parsers()
    yield _verb("", cli.Imgprealloc().parser, tuple(found))
    for name, parser in found.items():
        yield _verb(name, parser, tuple(found) if name == "help" else ())


def _verb(name: str, parser: argparse.ArgumentParser, words: tuple[str, ...]) -> Verb:
    options: list[str] = []
    values = []
    files = False
    for action in parser._actions:
        options += action.option_strings
        if not action.option_strings:
            files |= action.metavar in _FILES
        elif action.nargs != 0:
            name_of_value = action.metavar or action.dest.upper()
            choices = None if name_of_value in _FILES else tuple(map(_word, action.choices or ()))
            values.append((tuple(action.option_strings), choices))
    return Verb(name, tuple(sorted(options)), words, files, tuple(values))


def _word(choice: object) -> str:
    if not isinstance(choice, int):
        return str(choice)
    return f"{choice // units.Mi}M" if choice % units.Mi == 0 else f"{choice // units.Ki}K"


def script() -> str:
    """Return the whole of it."""
    found = list(verbs())
    parts = [_HEAD.replace("{verbs}", " | ".join(verb.name for verb in found if verb.name))]
    for verb in found:
        parts.append(f"        {verb.name or chr(34) * 2})\n")
        parts += (f"            {line}\n" for line in _case(verb))
        parts.append("            ;;\n")
    return "".join([*parts, _TAIL])


def _case(verb: Verb) -> Iterator[str]:
    yield from _assigned("options", verb.options)
    if verb.words:
        yield from _assigned("words", verb.words)
    if verb.files:
        yield "files=yes"
    if verb.values:
        yield "case $previous in"
        for options, choices in verb.values:
            what = "words= files=yes" if choices is None else f'words="{" ".join(choices)}" files='
            yield f"    {' | '.join(options)}) is_value=yes {what} ;;"
        yield "esac"


def _assigned(name: str, words: Iterable[str]) -> list[str]:
    lines = textwrap.wrap(" ".join(words), 84, break_on_hyphens=False)
    return f'{name}="{" ".join(lines[:1])}{"".join(f" {chr(92)}{chr(10)}{line}" for line in lines[1:])}"'.splitlines()


def main() -> None:
    """Write it beside the old one, and put it in its place."""
    beside = TARGET.with_suffix(".new")
    beside.write_text(script())
    os.replace(beside, TARGET)


if __name__ == "__main__":
    main()
