"""Size limits and structure of the source: files, functions and packages. Each rule has a planted violation.

`ALLOWED` lists current violations with their size. It may only shrink: an entry that no longer breaks its rule is an
error, and so is one that has grown. Rules about imports and forbidden calls: tests/house/test_imports.py.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FILE_LINES, FUNCTION_LINES, ARGUMENTS, TOP_FILES = 400, 60, 8, 8
TOP_LEVEL = {"engine", "csrc", "examples", "tests", "tools", "docs"}

# The core: a training step and everything that it needs, from the config to the optimizer.
CORE = (
    "config",
    "distributed",
    "ops",
    "model",
    "parallel",
    "pipeline",
    "optim",
    "train",
    "batch.py",
    "part.py",
    "errors.py",
)
CORE_LINES = 13_600

# rule: place that breaks it -> its size
ALLOWED: dict[str, dict[str, int]] = {
    "files are short": {},
    "functions are short": {},
    "functions take few arguments": {},
    "a class name is unique": {},
    "a module name is unique": {},
    "no loose files": {},
    "packages state their purpose": {},
    "words are plain": {},
}
# Module names that may occur in several packages. A command's module in cli/ may have the name of the code it runs.
SAME_NAME = {"attention", "convert", "job", "load", "options", "progress", "report", "run"}

# Words that a reader of this field would have to translate, and what to write instead. A sample text in a string of
# tests/ may have them, and so may a list of top-level domains.
IDIOM = {
    r"products|matrix product": "matmul",
    r"cut (?:over|along|across|among)": "sharded across",
    r"kernels? of (?:our|one's) own|(?:our )?own kernels?": "custom kernels",
    r"remakes?": "recompute, recipe",
    r"settles?|settled": "wait for (the weights)",
    r"speaks?|spoken": "contribute, transport",
    r"(?:kept|keeps?|told|tells?) apart": "document masking; separate, distinguish",
    r"borders?": "boundaries, cu_seqlens",
    r"(?:go|goes|going|gone|went) on": "continue, resume",
    r"facts?": "fields, metadata",
    r"strangers?": "unexpected files",
    r"(?:leaves?|left|leaving) out": "skip, omit",
    r"tells?|told|telling|said": "report, print, state",
    r"anew": "again",
    r"whatever|whoever": "any, the caller",
    r"for ever": "indefinitely",
    r"of then": "of that time",
    r"besides?": "next to, alongside, compared with",
    r"(?:no|every|some)body|everyone|someone": "no rank, all ranks, a caller",
    r"husks?": "empty folder",
    r"off by [0-9<{]": "max error",
    r"in silence": "silently",
    r"of (?:one's|our|its|their) own": "separate, custom",
    r"to the bit": "bitwise",
    r"stands?|stood|standing": "is",
    r"lies?|lying": "is in, is contained in",
    r"in vain": "without success",
    r"alike": "the same way, identical",
    r"rooms?": "package (of code), space (on a disk)",
    r"at last": "finally",
    r"meant": "intended",
    r"repairs?|repaired": "fix",
    r"whence|thereof|hereby|betimes|ere": "a plain word",
}
# Not matched: words with hyphens, such as error codes.
_OLD_WORDS = re.compile(r"(?<![-\w])(?:" + "|".join(f"({pattern})" for pattern in IDIOM) + r")(?![-\w])", re.I)
WORD_LISTS = {"engine/data/clean/pii/domains.py"}

Tree = dict[str, str]  # path from the root -> text
Rule = Callable[[Tree], Iterator[tuple[str, int]]]


def short_files(tree: Tree) -> Iterator[tuple[str, int]]:
    """Files of engine/ and csrc/ with more than FILE_LINES lines."""
    for path, text in tree.items():
        if (lines := text.count("\n")) > FILE_LINES:
            yield path, lines


def functions(tree: Tree) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """(path:Class.function, its syntax tree, whether it is a method) for every function of engine/."""
    for path, text in tree.items():
        if path.endswith(".py"):
            yield from _functions(f"{path}:", ast.parse(text), False)


def _functions(
    prefix: str, node: ast.AST, inside: bool
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child, inside
            yield from _functions(f"{prefix}{child.name}.", child, False)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(f"{prefix}{child.name}.", child, True)
        else:
            yield from _functions(prefix, child, inside)


def short_functions(tree: Tree) -> Iterator[tuple[str, int]]:
    """Functions with more than FUNCTION_LINES lines, docstring and signature included."""
    for name, node, _ in functions(tree):
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES:
            yield name, lines


def few_arguments(tree: Tree) -> Iterator[tuple[str, int]]:
    """Functions with more than ARGUMENTS arguments, not counting self, cls and the ctx of an autograd function."""
    for name, node, method in functions(tree):
        count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
        count -= bool(method and node.args.args and node.args.args[0].arg in ("self", "cls", "ctx"))
        if count > ARGUMENTS:
            yield name, count


def class_names(tree: Tree) -> Iterator[tuple[str, int]]:
    """Class names that occur in several modules."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, text in tree.items():
        if path.endswith(".py"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(path)
    yield from ((f"{name}: {', '.join(paths)}", len(paths)) for name, paths in found.items() if len(paths) > 1)


def module_names(tree: Tree) -> Iterator[tuple[str, int]]:
    """Module names that occur in several packages, except commands and SAME_NAME."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in tree:
        name = Path(path).stem
        if path.endswith(".py") and name != "__init__" and not path.startswith("engine/cli/"):
            found[name].append(path)
    for name, paths in found.items():
        if len(paths) > 1 and name not in SAME_NAME:
            yield f"{name}: {', '.join(paths)}", len(paths)


def no_loose_files(tree: Tree) -> Iterator[tuple[str, int]]:
    """More than TOP_FILES modules at the top of engine/, any file at the top of csrc/, and folders not in TOP_LEVEL."""
    top = [path for path in tree if path.startswith("engine/") and path.count("/") == 1]
    if len(top) > TOP_FILES:
        yield f"engine/: {', '.join(top)}", len(top)
    yield from ((path, 1) for path in tree if path.startswith("csrc/") and path.count("/") == 1)
    folders = {path.split("/")[0] for path in tree if "/" in path and not path.startswith(".")}
    yield from ((folder, 1) for folder in sorted(folders - TOP_LEVEL))


def packages_state_purpose(tree: Tree) -> Iterator[tuple[str, int]]:
    """Folders of engine/ whose __init__.py does not state their purpose, imports, and what they never know."""
    folders = {str(Path(path).parent) for path in tree if path.endswith(".py") and path.startswith("engine/")}
    for folder in sorted(folders - {"engine"}):
        module = ast.parse(tree.get(f"{folder}/__init__.py", ""))
        text = ast.get_docstring(module) or ""
        states = text.count("\n\n") >= 1 and "mport" in text and "ever know" in text
        subject = folder.count("/") > 2  # a subpackage: its first line is enough
        if not (text and (states or subject)):
            yield folder, 1


def plain_words(tree: Tree) -> Iterator[tuple[str, int]]:
    """Places with a word of IDIOM: in pages and csrc all text, in Python comments, docstrings, names and messages."""
    for path, text in tree.items():
        for line, part in _texts(path, text) if path not in WORD_LISTS else ():
            for found in _OLD_WORDS.finditer(part):
                instead = list(IDIOM.values())[(found.lastindex or 1) - 1]
                yield f"{path}:{line + part.count(chr(10), 0, found.start())}: {found[0]!r} (write: {instead})", 1


def _texts(path: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of what a person reads of a file."""
    if not path.endswith(".py"):
        yield 1, text
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        docstring = kind == "STRING" and token.line.lstrip().startswith('"""')
        message = kind in ("STRING", "FSTRING_MIDDLE") and not path.startswith("tests/")
        name = kind == "NAME" and token.string != "tell"  # the position in a file
        if name or kind == "COMMENT" or docstring or message:
            yield token.start[0], token.string


RULES: dict[str, Rule] = {
    "files are short": short_files,
    "functions are short": short_functions,
    "functions take few arguments": few_arguments,
    "a class name is unique": class_names,
    "a module name is unique": module_names,
    "no loose files": no_loose_files,
    "packages state their purpose": packages_state_purpose,
    "words are plain": plain_words,
}


def house(*folders: str) -> Tree:
    """The sources below these folders of the repository."""
    ends = {".py", ".cpp", ".cu", ".h", ".md"}
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in ends]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


HOUSE = house("engine", "csrc")


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_the_rule(rule: str) -> None:
    assert len(HOUSE) > 200
    found, allowed = dict(RULES[rule](HOUSE)), ALLOWED[rule]
    new = {place: size for place, size in found.items() if size > allowed.get(place, 0)}
    assert not new, f"{rule}: {new}"
    stale = {place: size for place, size in allowed.items() if found.get(place, 0) < size}
    assert not stale, f"{rule}: these have improved, remove them from ALLOWED: {stale}"


def test_words_are_plain() -> None:
    """In the whole repository; CHANGELOG.md names old words."""
    tree = HOUSE | house("docs", "tests", "examples", "tools")
    tree |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "setup.py")}
    found = [place for place, _ in plain_words(tree)]
    assert len(tree) > 500 and not found, "\n".join(found)


def test_the_core_keeps_its_budget() -> None:
    lines = sum(text.count("\n") for path, text in HOUSE.items() if path.startswith(tuple(f"engine/{h}" for h in CORE)))
    assert 5_000 < lines <= CORE_LINES, f"{lines:,} lines from the config to the optimizer"


def test_the_repository_has_six_folders() -> None:
    entries = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert entries <= TOP_LEVEL, entries - TOP_LEVEL


PLANTED: list[tuple[str, Tree]] = [
    ("words are plain", {"engine/a/b.py": "x = 1  # the run goes on\n"}),
    ("words are plain", {"engine/a/b.py": 'raise E(f"{x} stands beside {y}")\n'}),
    ("words are plain", {"tests/a/b.py": 'def f():\n    """Said anew."""\n'}),
    ("words are plain", {"tests/a/b.py": "told = 1\n"}),
    ("words are plain", {"docs/a.md": "the same to\nthe bit, to the bit"}),
    ("words are plain", {"csrc/ops/b.h": "// our own kernels\n"}),
    ("files are short", {"engine/a/b.py": "x = 1\n" * 401}),
    ("files are short", {"csrc/ops/b.cpp": "\n" * 401}),
    ("functions are short", {"engine/a/b.py": "def f():\n" + "    x = 1\n" * 60}),
    ("functions are short", {"engine/a/b.py": "class A:\n    async def f(self):\n" + "        x = 1\n" * 60}),
    ("functions take few arguments", {"engine/a/b.py": "def f(a, b, c, d, *, e, f, g, h, i): ..."}),
    ("functions take few arguments", {"engine/a/b.py": "class A:\n    def f(self, a, b, c, d, e, f, g, h, i): ..."}),
    ("a class name is unique", {"engine/a/b.py": "class A: ...", "engine/c.py": "def f():\n    class A: ..."}),
    ("a module name is unique", {"engine/a/b.py": "", "engine/c/b.py": ""}),
    ("no loose files", {f"engine/m{k}.py": "" for k in range(9)}),
    ("no loose files", {"csrc/a.cpp": ""}),
    ("no loose files", {"scripts/a.py": ""}),
    ("packages state their purpose", {"engine/a/b.py": ""}),
    ("packages state their purpose", {"engine/a/__init__.py": '"""A package."""\n', "engine/a/b.py": ""}),
    ("packages state their purpose", {"engine/a/__init__.py": '"""A.\n\nImports it."""\n', "engine/a/b.py": ""}),
    ("packages state their purpose", {"engine/a/__init__.py": '"""A.\n\nNever knows."""\n', "engine/a/b.py": ""}),
]


@pytest.mark.parametrize(("rule", "tree"), PLANTED)
def test_a_planted_violation_is_found(rule: str, tree: Tree) -> None:
    assert list(RULES[rule](tree))


def test_what_is_allowed_is_not_reported() -> None:
    tree = {
        "engine/a/__init__.py": '"""A package.\n\nImports nothing, never knows anything.\n"""\n',
        "engine/a/b.py": "def f(a, b, c, d, e, f, g, h):\n" + "    x = 1\n" * 59,
        "engine/cli/b.py": "class B:\n    def f(self, a, b, c, d, e, f, g, h): ...\n",
        "engine/cli/__init__.py": '"""Verbs.\n\nImports everything; others never know it.\n"""\n',
        "csrc/ops/a.cpp": "\n" * 400,
    }
    assert [found for rule in RULES.values() for found in rule(tree)] == []
