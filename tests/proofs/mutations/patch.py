"""A mutation: a fault injected into one function, replacing a statement or expression found by its syntax tree.

So it still fits if the code is reformatted, commented or moved within its function. If it does not fit, the error
states the pattern, the place, and how often the pattern occurs there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Mutation:
    """One fault: replace `old` by `new` in the function `where`; at least one of `tests` has to fail.

    why: the effect of the fault. where: "module:function", such as
    "engine.optim.clip:NormCounter.__call__". old, new: two expressions, or two statements (`pass` to delete one,
    several lines to add some). nth: (index, count) of `old` among its occurrences in the function: (2, 3) is the second
    of three. tests: "test_function[case]", prefixed by "test_module::" if several modules have a function of that name.
    path: "both" if the fault shows with and without the extensions, else the only path that has it, "kernels" or
    "torch". threads: public threads about this fault in other projects, as "owner/name#number"; those with one are
    the zoo.
    """

    name: str
    why: str
    where: str
    old: str
    new: str
    tests: tuple[str, ...]
    nth: tuple[int, int] = (1, 1)
    path: str = "both"
    threads: tuple[str, ...] = ()

    def file(self, root: Path) -> Path:
        """The file of the module in the repository at `root`. LookupError if there is none."""
        module = self.where.partition(":")[0]
        stem = root / module.replace(".", "/")
        for path in (Path(f"{stem}.py"), stem / "__init__.py"):
            if path.is_file():
                return path
        raise LookupError(f"mutation {self.name}: there is no module {module}: update its `where`")

    def apply(self, root: Path) -> None:
        """Inject the fault into the copy of the repository at `root`. LookupError if it does not fit."""
        path = self.file(root)
        path.write_text(self.patch(path.read_text()))

    def patch(self, source: str) -> str:
        """The module's source with the fault, all other text unchanged. LookupError if it does not fit."""
        pattern, new = self._pattern()
        wanted, (number, count) = ast.dump(pattern), self.nth
        found = [n for n in _nodes(self._function(source)) if type(n) is type(pattern) and ast.dump(n) == wanted]
        if len(found) != count:
            raise LookupError(
                f"mutation {self.name}: {self.where} has {len(found)} of `{self.old}`, not {count}; "
                "the code has changed: update the mutation"
            )
        node = sorted(found, key=lambda n: (n.lineno, n.col_offset))[number - 1]
        lines = source.encode().split(b"\n")
        before = b"\n".join([*lines[: node.lineno - 1], lines[node.lineno - 1][: node.col_offset]])
        after = b"\n".join([lines[node.end_lineno - 1][node.end_col_offset :], *lines[node.end_lineno :]])
        return (before + new.replace("\n", "\n" + " " * node.col_offset).encode() + after).decode()

    def _pattern(self) -> tuple[Any, str]:
        """The syntax tree to find, and its replacement as text (expressions in parentheses)."""
        try:
            ast.parse(self.new, mode="eval")
            return ast.parse(self.old, mode="eval").body, f"({self.new})"
        except SyntaxError:
            (statement,) = ast.parse(self.old).body
            return statement, self.new

    def _function(self, source: str) -> ast.AST:
        module, _, wanted = self.where.partition(":")
        found = [node for name, node in _functions(ast.parse(source)) if name == wanted]
        if len(found) != 1:
            raise LookupError(
                f"mutation {self.name}: {module} has {len(found)} functions {wanted}, not one; "
                "the code has changed: update its `where`"
            )
        return found[0]


def _functions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every function and class below `tree`, with its qualified name ("Class.method", "function.inner")."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _SCOPES):
            yield within + node.name, node
            yield from _functions(node, f"{within}{node.name}.")
        else:
            yield from _functions(node, within)


def _nodes(tree: ast.AST) -> Iterator[Any]:
    """All nodes of `tree` except those in f-strings, whose positions Python 3.11 does not record."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.JoinedStr):
            yield from _nodes(node)
