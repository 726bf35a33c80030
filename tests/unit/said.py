# SPDX-License-Identifier: Apache-2.0
"""What the package says when something is wrong, found in its source: no list to be kept up by hand.

A text that is put together when it is said has GAP where its parts differ.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
import dataclasses
import functools
import inspect
import pathlib
from typing import Optional, Union

from imgprealloc import exceptions

GAP = "\0"

PACKAGE = pathlib.Path(str(inspect.getfile(exceptions))).parent

ERRORS = {
    name: kind
    for name, kind in vars(exceptions).items()
    if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == exceptions.__name__
}

# Those whose strings say why something is not done to a disk.
_REASONS = ("_obstacle", "_obstacle_in_header", "_lack_of_room", "_lack", "_cut_short", "_became", "why_left_out")

_LOGGED = {"warning", "error", "exception"}

_Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]


@dataclasses.dataclass(frozen=True)
class Said:
    """One text.

    :param kind: the error's class; "warning", or "command" for what is told on the command's standard error
    :param text: with GAP for what differs
    :param place: where it stands
    """

    kind: str
    text: str
    place: str


@dataclasses.dataclass(frozen=True)
class _Source:
    """A module as it is written, with what leads from a part of it to the whole."""

    path: pathlib.Path
    tree: ast.Module
    parents: dict[ast.AST, ast.AST]

    @classmethod
    def read(cls, path: pathlib.Path) -> _Source:
        tree = ast.parse(path.read_text())
        return cls(path, tree, {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)})

    def place(self, node: ast.expr) -> str:
        return f"{self.path.relative_to(PACKAGE.parent)}:{node.lineno}"

    def function(self, node: ast.AST) -> Optional[_Function]:
        found: Optional[ast.AST] = node
        while found is not None and not isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found = self.parents.get(found)
        return found

    def texts(self, node: ast.expr, within: frozenset[tuple[str, str]] = frozenset()) -> list[str]:
        """List what an expression may be, as far as it is written here.

        :param within: the variables that it is the value of, each with its function
        """
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else [GAP]
        if isinstance(node, ast.JoinedStr):
            texts = [""]
            for part in node.values:
                ends = self.texts(part.value if isinstance(part, ast.FormattedValue) else part, within)
                texts = [text + end for text in texts for end in ends]
            return texts
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [left + right for left in self.texts(node.left, within) for right in self.texts(node.right, within)]
        if isinstance(node, ast.IfExp):
            return self.texts(node.body, within) + self.texts(node.orelse, within)
        if isinstance(node, ast.Name):
            function = self.function(node)
            variable = (function.name if function else "", node.id)
            return [GAP] if variable in within else self._named(node, within | {variable})
        return [GAP]

    def _named(self, name: ast.Name, within: frozenset[tuple[str, str]]) -> list[str]:
        """List what a variable may be: given in the function that uses it, by its callers, or in the module."""
        function = self.function(name)
        for scope in (function, self.tree):
            given = [
                assignment.value
                for assignment in ast.walk(scope or ast.Pass())
                if isinstance(assignment, ast.Assign)
                and any(isinstance(target, ast.Name) and target.id == name.id for target in assignment.targets)
                and (scope is not self.tree or assignment in self.tree.body)
            ]
            if given:
                return [text for value in given for text in self.texts(value, within)]
            if scope is function and function is not None:
                parameters = [argument.arg for argument in function.args.args if argument.arg != "self"]
                if name.id in parameters:
                    return _told_by_callers(function.name, parameters.index(name.id), len(parameters), within)
        return [GAP]


@functools.lru_cache
def _sources() -> tuple[_Source, ...]:
    return tuple(_Source.read(path) for path in sorted(PACKAGE.rglob("*.py")))


def _told_by_callers(function: str, place: int, parameters: int, within: frozenset[tuple[str, str]]) -> list[str]:
    """List the sentences that a function is given as one of its arguments; of anything else that it differs."""
    texts = [
        text
        for source in _sources()
        for call in ast.walk(source.tree)
        if isinstance(call, ast.Call) and _name(call) == function and place < len(call.args) <= parameters
        for text in source.texts(call.args[place], within)
    ]
    return sorted({text if " " in text else GAP for text in texts}) or [GAP]


@functools.lru_cache
def everything() -> tuple[Said, ...]:
    """List all that is said of faults, also where a function is told the reason by its callers."""
    return tuple(dict.fromkeys(_said()))


def _said() -> Iterator[Said]:
    for source in _sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call):
                yield from _said_by(source, node)
            elif isinstance(node, ast.Return) and node.value is not None:
                function = source.function(node)
                if function is not None and function.name in _REASONS:
                    yield from _each("reason", source, node.value)


def _said_by(source: _Source, call: ast.Call) -> Iterator[Said]:
    name = _name(call)
    if name in ERRORS and len(call.args) > 1:
        yield from _each(name, source, call.args[1])
    elif name == "warn_once" and len(call.args) == 3:
        yield from _each("warning", source, call.args[2])
    elif name in _LOGGED and isinstance(call.func, ast.Attribute) and call.args:
        if ast.unparse(call.func.value).endswith("LOG"):
            kind = "command" if "app" in ast.unparse(call.func.value) else "warning"
            yield from _each(kind, source, call.args[0])
    elif name in ("_tell", "ArgumentTypeError", "InTheWay", "ValueError") and call.args:
        yield from _each("command", source, call.args[0])


def _each(kind: str, source: _Source, node: ast.expr) -> Iterator[Said]:
    for text in source.texts(node):
        text = text.replace("%s", GAP).replace("%d", GAP)
        if any(character.isalpha() for character in text):
            yield Said(kind, text, source.place(node))


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def subjects_of_check_nova() -> set[str]:
    """List what check-nova has rows about, but for the places in Nova."""
    tree = ast.parse((PACKAGE / "check_nova.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node) == "Finding"]
    return {str(call.args[0].value) for call in calls if isinstance(call.args[0], ast.Constant)}
