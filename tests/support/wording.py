"""The messages of all errors, read from the source: `python -m tests.support.wording` rewrites tests/wording.txt.

Every error has a code, "package.kebab-case-name": a literal where it is raised, or `error.code` of another error.
tests/wording.txt lists the messages by code, with {expressions} for values, so that a change of wording is visible
there while tests match codes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

SNAPSHOT = ROOT / "tests" / "wording.txt"
CODE = re.compile(r"[a-z_]+\.[a-z0-9]+(-[a-z0-9]+)*")
_BASE, _MANY, _FIELD = (
    "EngineError",
    "ConfigError",
    "FieldError",
)  # a ConfigError consists of FieldErrors, which have the codes
_FIELD_TEXT = ("path", "problem", "fix")


@dataclass(frozen=True)
class ErrorSite:
    """A call that creates an error: its place, code and message."""

    where: str
    code: str | None
    message: str


def errors(root: Path = ROOT) -> list[ErrorSite]:
    """Every call in engine/ and tools/ that creates an error, by file and line. code: None if it is not a literal."""
    files = sorted(path for folder in ("engine", "tools") for path in (root / folder).rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in files}
    kinds = _kinds(trees.values())
    return [
        _raised(call, scope, f"{path.relative_to(root)}:{call.lineno}")
        for path, tree in trees.items()
        for scope, call in _calls(tree, kinds - {_MANY})
        if not (call.args and isinstance(call.args[0], ast.Attribute) and call.args[0].attr == "code")
    ]


def complaints(raised: list[ErrorSite]) -> list[str]:
    """Problems with the codes."""
    return [
        f"{error.where}: {'the code is not a literal' if error.code is None else repr(error.code)}: "
        'the first argument must be the code, such as "package.kebab-case-name"'
        for error in raised
        if error.code is None or not CODE.fullmatch(error.code)
    ]


def snapshot(raised: list[ErrorSite]) -> str:
    """A paragraph for each code: the code, then its distinct messages."""
    found: dict[str, set[str]] = {}
    for error in raised:
        if error.code is not None and CODE.fullmatch(error.code):
            found.setdefault(error.code, set()).add(error.message)
    return "\n".join(f"{code}\n" + "".join(f"    {text}\n" for text in sorted(found[code])) for code in sorted(found))


def _kinds(trees: Iterator[ast.Module]) -> set[str]:
    """EngineError, its subclasses, and FieldError."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    kinds, before = {_BASE, _FIELD}, 0
    while len(kinds) > before:
        before = len(kinds)
        kinds |= {node.name for node in classes if kinds & {_name(base) for base in node.bases}}
    return kinds


def _name(node: ast.expr) -> str:
    """`Kind` of `Kind` and of `errors.Kind`."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _calls(tree: ast.AST, names: set[str], scope: ast.AST | None = None) -> Iterator[tuple[ast.AST, ast.Call]]:
    """(the function around it, call) for each call of one of the names."""
    scope = scope or tree
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call) and _name(node.func) in names:
            yield scope, node
        yield from _calls(node, names, node if isinstance(node, ast.FunctionDef) else scope)


def _raised(call: ast.Call, scope: ast.AST, where: str) -> ErrorSite:
    args = [template(arg, scope) for arg in call.args]
    first = call.args[0] if call.args else None
    code = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None
    if _name(call.func) == _FIELD:
        given = dict(zip(("code", "path", "value", "problem", "fix"), args))
        given |= {word.arg: template(word.value, scope) for word in call.keywords if word.arg}
        path, problem, fix = (given.get(name, "") for name in _FIELD_TEXT)
        return ErrorSite(where, code, f"{path}: {problem}" + (f". {fix}" if fix else ""))
    return ErrorSite(where, code, " ".join(args[1:]))


def template(node: ast.expr, scope: ast.AST) -> str:
    """A message with {expressions} and <either | or>. A name is replaced by the last text assigned to it, if any."""
    if isinstance(node, ast.Constant):
        return node.value.replace("\n", "\\n") if isinstance(node.value, str) else str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, scope) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return template(node.value, scope)
    if isinstance(node, ast.BinOp) and _is_text(node):
        return template(node.left, scope) + template(node.right, scope)
    if isinstance(node, ast.IfExp) and _is_text(node):
        return f"<{template(node.body, scope)} | {template(node.orelse, scope)}>"
    if isinstance(node, ast.Name) and (text := _given(node, scope)) is not None:
        return template(text, scope)
    return f"{{{ast.unparse(node)}}}"


def _given(name: ast.Name, scope: ast.AST) -> ast.expr | None:
    """The text assigned to a name in the function, last before its use; None if the value is not a text."""
    given = [
        (value.lineno, value)
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign) and node.end_lineno < name.lineno
        for target, value in _pairs(node.targets[0], node.value)
        if isinstance(target, ast.Name) and target.id == name.id
    ]
    value = max(given, key=lambda pair: pair[0], default=(0, None))[1]
    return value if value is not None and _is_text(value) else None


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """Target and value, one by one of `a, b = x, y`."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        return list(zip(target.elts, value.elts))
    return [(target, value)]


def _is_text(node: ast.expr) -> bool:
    """Whether an expression is a string literal, or composed of literals."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (_is_text(node.left) or _is_text(node.right))
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(errors()))
