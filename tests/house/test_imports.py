"""Rules about imports and forbidden calls, checked with `ast`: packages import only lower ones, no pickle, no shell.

Every rule is a function (module name, syntax tree) -> complaints. The engine has none; each planted violation has one.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# A module may import modules of earlier rows, and modules of the same package in the same row. A package without a dot
# means all its modules. Every module must be listed, so that its level is decided when it is written.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("", "errors"),  # "" is engine/__init__.py
    ("util",),
    (
        "config.peers",
        "config.hints",
        "config.presets",
        "config.renames",
        "config.skips",
        "config.mixture",
        "config.dtypes",
        "config.section",
        "config.phase_table",
        "config.group_table",
        "config.objective_table",
        "optim.update_rules",
        "distributed.layout",
        "distributed.specs",
        "interop.huggingface.families",
        "pipeline.actions",
        "ops.chunks",
        "cli.output",
    ),
    ("pipeline.passes", "pipeline.simulate", "pipeline.check"),
    ("pipeline.schedules", "pipeline.torch_csv"),
    ("pipeline.shares", "pipeline.list_schedules", "pipeline.improve", "pipeline.search"),
    ("pipeline.timeline", "pipeline.draw"),
    ("config.schema", "config.derived", "config.tree", "config.phases"),
    ("optim.groups", "parallel.partition", "model.layer_specs", "model.declarations", "model.build"),
    (
        "config.checks",
        "config.model_checks",
        "config.phase_checks",
        "config.idle",
        "planner",
        "interop.huggingface.config_json",
        "interop.huggingface.windows",
    ),
    ("config.load", "planner.fit"),
    ("cli.schedule_pages",),
    ("distributed.board",),  # no torch up to here
    ("distributed.shared_memory", "distributed.env", "ops.native", "ops.draws"),
    ("batch", "distributed.context", "distributed.network", "distributed.failure"),
    ("part",),
    ("distributed.sharding",),
    ("distributed.collectives", "distributed.launch"),
    ("distributed.pair", "ops", "data.tokenize.file_names"),
    ("data.read",),
    ("data.tokenize",),
    ("data.samples",),
    ("data.workfolder",),
    ("data.clean", "data.prepare"),
    ("parallel",),
    ("model", "pipeline.stage"),
    ("optim", "pipeline.executor"),
    ("pipeline.trace",),
    ("checkpoint",),
    ("interop.megatron", "interop.huggingface.weights", "interop.huggingface.companions", "interop.convert"),
    ("inference.load",),
    ("inference.compare", "train.objective", "train.evaluate"),
    ("monitor",),
    ("train.state", "train.step", "train.resume", "train.run"),
    ("train.loop", "inference.generate"),
    ("proof",),
    ("cli",),
    ("__main__",),
)
_LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
_TORCH_FREE_LEVELS = 13

# module or package -> packages that it must not import, even if the levels allow it
MUST_NOT_KNOW = {
    "model": ("pipeline", "optim", "data", "checkpoint", "interop"),
    "pipeline": ("model", "data"),
    "parallel": ("data",),
    "optim": ("data",),
    "ops": ("data", "distributed.env", "distributed.launch"),
    "data.tokenize.tokenizer": ("data.read",),
    "data.tokenize.convert": ("data.read",),
    "data.samples": ("data.read",),
    "data.clean": ("data.tokenize", "data.samples", "data.prepare"),
    "data.prepare": ("data.clean",),
}
# Packages that train or use a model may import only these parts of data; they must not depend on how a corpus was made.
USERS_OF_DATA = ("checkpoint", "interop", "monitor", "train", "inference")
SERVED = ("data.samples", "data.tokenize.tokenizer", "data.tokenize.file_names")
SERVED_TO = {"interop": ("data.tokenize.convert",)}  # to find which tokenizer file of a folder was converted
MAY_USE_DIST = (  # may use torch.distributed
    *(f"distributed.{name}" for name in ("collectives", "launch", "failure", "context", "pair")),
    "proof.ranks",
)
MAY_NAME_DIST_WORK = ("pipeline.executor", "parallel.gradients")  # may name the type dist.Work, and no other name
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}

Rule = Callable[[str, ast.AST], Iterator[str]]


def row(module: str) -> str | None:
    """The entry of LEVELS for a module (without "engine."): the module itself, else the nearest enclosing package."""
    if module in _LEVEL_OF:
        return module
    if any(name.startswith(module + ".") for name in _LEVEL_OF):
        return ""  # a package whose modules are in several rows: its __init__ is only a docstring
    package = module.rpartition(".")[0]
    return row(package) or None if package else None


Aliases = dict[str, str]


def aliases_of(tree: ast.AST) -> Aliases:
    """Local name -> full name of the import: `import numpy as np`, `from torch import distributed as dist`."""
    found: Aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node: ast.AST, aliases: Aliases | None = None) -> str:
    """`a.b.c` of a chain of names, the first one as it was imported; "" for anything else."""
    if isinstance(node, ast.Name):
        return (aliases or {}).get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all imports, anywhere in the file: `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def engine_modules(tree: ast.AST) -> Iterator[str]:
    """Modules of the package a file imports, without "engine."."""
    for name in imported(tree):
        if name.split(".")[0] != "engine":
            continue
        parts = name.split(".")[1:]
        while parts and not is_module(parts):
            parts = parts[:-1]  # the last part is a class or function
        yield ".".join(parts)


def within(module: str, package: str) -> bool:
    """Whether a module is `package` or inside it."""
    return f"{module}.".startswith(f"{package}.")


def is_module(parts: list[str]) -> bool:
    """Whether engine.<parts> is a module or package in the tree."""
    path = ROOT.joinpath("engine", *parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_point_down(module: str, tree: ast.AST) -> Iterator[str]:
    if not module:  # engine/__init__.py names the library, and loads a name when it is asked for
        return
    mine = row(module)
    if mine is None:
        yield f"{module} has no place in LEVELS"
        return
    for target in engine_modules(tree):
        theirs = row(target)
        if theirs is None:
            yield f"{target} has no place in LEVELS"
        elif _LEVEL_OF[theirs] > _LEVEL_OF[mine]:
            yield f"{module} imports {target}, which is on a higher level"
        elif _LEVEL_OF[theirs] == _LEVEL_OF[mine] and theirs.split(".")[0] != mine.split(".")[0] and theirs:
            yield f"{module} imports {target}, which is on the same level in another package"


def imports_are_absolute(module: str, tree: ast.AST) -> Iterator[str]:
    for name in imported(tree):
        if name.startswith("."):
            yield f"{module}: relative import of {name}"


def packages_import_only_what_they_may(module: str, tree: ast.AST) -> Iterator[str]:
    unknown = [name for mine, names in MUST_NOT_KNOW.items() if within(module, mine) for name in names]
    for target in engine_modules(tree):
        if any(within(target, name) for name in unknown):
            yield f"{module} must not know {target}"


def training_reads_samples_alone(module: str, tree: ast.AST) -> Iterator[str]:
    package = module.split(".")[0]
    if package not in USERS_OF_DATA:
        return
    for target in engine_modules(tree):
        if within(target, "data") and not any(within(target, name) for name in (*SERVED, *SERVED_TO.get(package, ()))):
            yield f"{module} imports {target}: of data only {', '.join(SERVED)}"


def torch_comes_late(module: str, tree: ast.AST) -> Iterator[str]:
    mine = row(module)
    if mine is None or _LEVEL_OF[mine] >= _TORCH_FREE_LEVELS:
        return
    for name in imported(tree):
        if name.split(".")[0] == "torch":
            yield f"{module} imports {name}; config and help must not wait for torch"


def no_global_statement(module: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"{module}:{node.lineno}: global {', '.join(node.names)}"


def environment_in_one_module_only(module: str, tree: ast.AST) -> Iterator[str]:
    if module == "distributed.env":
        return
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield f"{module}:{node.lineno}: os.{node.attr}"
    for name in imported(tree):
        if name.startswith("os.") and name[3:] in names:
            yield f"{module}: imports {name}"


def collectives_in_distributed_only(module: str, tree: ast.AST) -> Iterator[str]:
    """Only MAY_USE_DIST modules use torch.distributed; MAY_NAME_DIST_WORK modules may name `dist.Work`."""
    if module in MAY_USE_DIST:
        return
    root, holder, aliases = "torch.distributed", module in MAY_NAME_DIST_WORK, aliases_of(tree)
    allowed = {root, f"{root}.Work"} if holder else set()
    for name in imported(tree):
        if name.startswith(root) and name not in allowed:
            yield f"{module}: imports {name}"
    for node in ast.walk(tree):
        name = dotted(node, aliases)
        if isinstance(node, ast.Attribute) and name.startswith(root) and name not in allowed:
            yield f"{module}:{node.lineno}: {name}"


def nothing_runs_what_it_reads(module: str, tree: ast.AST) -> Iterator[str]:
    """No pickle in any form, no eval or exec, no shell, no remote code."""
    for name in imported(tree):
        if name.split(".")[0] in PICKLERS or name.split(".")[-1] in ("_pickle", "pickle"):
            yield f"{module}: imports {name}"
        if name in ("torch.load", "torch.save", "os.system", "os.popen", "yaml.load") or name.endswith("_object_list"):
            yield f"{module}: imports {name}"
    aliases = aliases_of(tree)
    for node in ast.walk(tree):
        yield from (f"{module}:{getattr(node, 'lineno', 0)}: {text}" for text in _runs(node, aliases))


def _runs(node: ast.AST, aliases: Aliases) -> Iterator[str]:
    if isinstance(node, ast.Call):
        name = dotted(node.func, aliases)
        if name in ("eval", "exec", "builtins.eval", "builtins.exec", "__import__"):
            yield f"{name}()"
        for keyword in node.keywords:
            true = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            if keyword.arg in ("shell", "allow_pickle") and true:
                yield f"{keyword.arg}="
            if keyword.arg == "trust_remote_code":
                yield "trust_remote_code"
    if isinstance(node, ast.Attribute):
        name = dotted(node, aliases)
        banned = ("torch.load", "torch.save", "torch.jit.load", "os.system", "os.popen", "yaml.load", "numpy.load")
        if name in banned or name.startswith("yaml.unsafe"):
            yield name
        if node.attr.endswith(("_object_list", "gather_object")):
            yield f".{node.attr}"
    if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
        yield "trust_remote_code"


def texts_name_their_encoding(module: str, tree: ast.AST) -> Iterator[str]:
    """A text file or a pipe without `encoding=` would be read in the encoding of the locale."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {word.arg: word.value for word in node.keywords}
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else dotted(node.func)
        owner = dotted(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        text = name in ("read_text", "write_text") or any(word in given for word in ("text", "universal_newlines"))
        opened = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call)
        opened = opened and dotted(node.func.value.func) == "fsspec.open"  # it has the mode of fsspec.open
        if (name == "open" and owner not in ("os", "io") and not opened) or name == "fdopen":
            at = 0 if method and name == "open" else 1
            mode = given.get("mode", node.args[at] if len(node.args) > at else None)
            words = mode.value if isinstance(mode, ast.Constant) else "r" if mode is None and name == "open" else "b"
            text = isinstance(words, str) and "b" not in words and (not method or mode is not None or not node.args)
        if text and "encoding" not in given and not (name.startswith("add_") or name in _TEXT_IS_NO_PIPE):
            yield f"{module}: line {node.lineno}: {name} without an encoding"


def no_test_is_imported(module: str, tree: ast.AST) -> Iterator[str]:
    """No test module or test is imported: shared code of test modules is in tests/support."""
    for name in imported(tree):
        if any(part.startswith("test_") for part in name.split(".")):
            yield f"{module} imports {name}: share it through tests/support"


_TEXT_IS_NO_PIPE = ("document", "sample", "update")  # functions whose argument `text` is a text, not a pipe mode

STRUCTURE: tuple[Rule, ...] = (
    imports_point_down,
    imports_are_absolute,
    packages_import_only_what_they_may,
    training_reads_samples_alone,
    torch_comes_late,
    no_global_statement,
    environment_in_one_module_only,
    collectives_in_distributed_only,
)


def sources(folder: Path) -> dict[str, ast.AST]:
    """Dotted name below `folder` -> syntax tree ("" for __init__ of the folder itself)."""
    trees: dict[str, ast.AST] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        trees[".".join(parts)] = ast.parse(path.read_text(), str(path))
    return trees


ENGINE = sources(ROOT / "engine")


@pytest.mark.parametrize("rule", STRUCTURE, ids=lambda rule: rule.__name__)
def test_the_engine_keeps_the_rule(rule: Rule) -> None:
    assert len(ENGINE) > 40
    assert [text for module, tree in ENGINE.items() for text in rule(module, tree)] == []


def test_nothing_in_the_product_runs_what_it_reads() -> None:
    trees = {f"engine.{k}": v for k, v in ENGINE.items()} | sources(ROOT / "tools")
    trees["setup"] = ast.parse((ROOT / "setup.py").read_text())
    assert [text for module, tree in trees.items() for text in nothing_runs_what_it_reads(module, tree)] == []


def test_texts_are_utf8_whatever_the_locale() -> None:
    trees = {f"engine.{k}": v for k, v in ENGINE.items()} | sources(ROOT / "tools") | sources(ROOT / "examples")
    trees["setup"] = ast.parse((ROOT / "setup.py").read_text())
    assert [text for module, tree in trees.items() for text in texts_name_their_encoding(module, tree)] == []


def test_the_table_names_only_what_exists() -> None:
    for name in _LEVEL_OF:
        assert name in ENGINE, f"LEVELS names {name}, which is not in the tree"
    for name in (*MUST_NOT_KNOW, *MAY_USE_DIST, *MAY_NAME_DIST_WORK, *USERS_OF_DATA, *SERVED, *SERVED_TO):
        assert name in ENGINE


def circles(trees: dict[str, ast.AST]) -> set[frozenset[str]]:
    """Pairs of modules that import each other, directly or through others, including imports inside functions."""
    imports = {module: {*engine_modules(tree)} - {"", module} for module, tree in trees.items()}

    def reached(module: str) -> set[str]:
        found, new = set[str](), {module}
        while new := {target for one in new for target in imports.get(one, ())} - found:
            found |= new
        return found

    below = {module: reached(module) for module in imports}
    return {frozenset((a, b)) for a in below for b in below[a] if a != b and a in below.get(b, ())}


def test_no_two_modules_import_each_other() -> None:
    """Except one pair: `Tokenizer.load` accepts files of any kind, and converting them returns a Tokenizer."""
    assert circles(ENGINE) == {frozenset({"data.tokenize.convert", "data.tokenize.tokenizer"})}
    above, below = "def f():\n    from engine.ops.loss import g", "import engine.ops.norm"
    planted = {"ops.norm": ast.parse("from engine.ops.rope import f"), "ops.rope": ast.parse(above)}
    assert len(circles(planted | {"ops.loss": ast.parse(below)})) == 3
    assert circles(planted) == set()


def test_no_test_module_imports_another() -> None:
    trees = sources(ROOT / "tests")
    assert len(trees) > 80 and {"ops.test_ops", "support.harness"} <= trees.keys()
    assert [text for module, tree in trees.items() for text in no_test_is_imported(module, tree)] == []


PLANTED: list[tuple[Rule, str, str]] = [
    (imports_point_down, "distributed.collectives", "from engine.train.step import setup"),
    (imports_point_down, "model.layers", "from engine.pipeline.executor import execute"),
    (imports_point_down, "distributed.layout", "import engine.config.schema"),
    (imports_point_down, "distributed.layout", "from engine.config import load"),
    (imports_point_down, "distributed.sharding", "from engine.distributed.collectives import all_reduce_"),
    (imports_point_down, "ops.norm", "from engine.data.samples.keyed import permute"),
    (imports_point_down, "planner.flops", "def f():\n    from engine.model.transformer import Block"),
    (imports_point_down, "errors", "import importlib\nimportlib.import_module('engine.config.schema')"),
    (imports_point_down, "pipeline.schedules", "from engine.pipeline.executor import execute"),
    (imports_point_down, "newcomer", ""),
    (imports_point_down, "pipeline.newcomer", ""),
    (imports_are_absolute, "distributed.collectives", "from . import context"),
    (imports_are_absolute, "distributed.collectives", "from .context import Axis"),
    (packages_import_only_what_they_may, "model.layers", "from engine.pipeline.actions import Op"),
    (packages_import_only_what_they_may, "model.feed_forward", "from engine.optim import lr"),
    (packages_import_only_what_they_may, "model.feed_forward", "import engine.data.samples.loader"),
    (
        packages_import_only_what_they_may,
        "model.feed_forward",
        "from engine.interop.huggingface.weights import hf_name",
    ),
    (packages_import_only_what_they_may, "pipeline.stage", "from engine.model.transformer import Transformer"),
    (packages_import_only_what_they_may, "pipeline.executor", "from engine.data.samples.loader import Loader"),
    (packages_import_only_what_they_may, "data.prepare.merge", "from engine.data.clean.task import PartWriter"),
    (packages_import_only_what_they_may, "data.clean.run", "from engine.data.tokenize.tokenizer import Tokenizer"),
    (imports_point_down, "data.read.inputs", "from engine.data.tokenize.tokenizer import FILES"),
    (imports_point_down, "data.tokenize.train", "from engine.data.prepare.report import Totals"),
    (imports_point_down, "data.samples.order", "from engine.data.prepare.pack import pack"),
    (training_reads_samples_alone, "train.loop", "from engine.data.prepare.report import PrepareReport"),
    (training_reads_samples_alone, "inference.generate", "import engine.data.read.document_source"),
    (training_reads_samples_alone, "monitor.health", "def f():\n    from engine.data.tokenize import train"),
    (training_reads_samples_alone, "train.evaluate", "from engine.data.tokenize.convert import find"),
    (torch_comes_late, "config.schema", "import torch"),
    (torch_comes_late, "pipeline.check", "def f():\n    from torch.nn import Module"),
    (no_global_statement, "distributed.collectives", "def f():\n    global state\n    state = 1"),
    (environment_in_one_module_only, "distributed.collectives", "import os\nrank = os.environ['RANK']"),
    (environment_in_one_module_only, "distributed.collectives", "import os as system\nrank = system.getenv('RANK')"),
    (environment_in_one_module_only, "distributed.collectives", "from os import environ"),
    (collectives_in_distributed_only, "model.layers", "import torch.distributed as dist"),
    (collectives_in_distributed_only, "model.layers", "from torch import distributed"),
    (collectives_in_distributed_only, "model.layers", "from torch.distributed import ProcessGroup"),
    (collectives_in_distributed_only, "model.layers", "import torch\ntorch.distributed.all_reduce(x)"),
    (collectives_in_distributed_only, "model.layers", "import torch\ndef f(w: torch.distributed.Work): ..."),
    (collectives_in_distributed_only, "parallel.gradients", "import torch.distributed as dist\ndist.all_reduce(x)"),
    (collectives_in_distributed_only, "parallel.gradients", "from torch.distributed import all_reduce"),
    (collectives_in_distributed_only, "model.layers", "import torch as t\nt.distributed.barrier()"),
    (no_test_is_imported, "gpu.test_ops", "from tests.ops.test_ops import randn"),
    (no_test_is_imported, "gpu.test_ops", "from tests.ops import test_ops"),
    (no_test_is_imported, "gpu.test_ops", "import test_ops"),
    (no_test_is_imported, "ops.test_native", "from tests.support.numbers import test_rope"),
    (texts_name_their_encoding, "distributed.collectives", "open(name)"),
    (texts_name_their_encoding, "distributed.collectives", "open(name, 'w')"),
    (texts_name_their_encoding, "distributed.collectives", "path.open()"),
    (texts_name_their_encoding, "distributed.collectives", "path.open('a', buffering=1)"),
    (texts_name_their_encoding, "distributed.collectives", "os.fdopen(file, 'w')"),
    (texts_name_their_encoding, "distributed.collectives", "path.read_text()"),
    (texts_name_their_encoding, "distributed.collectives", "path.write_text('x')"),
    (texts_name_their_encoding, "distributed.collectives", "subprocess.run(['ls'], text=True)"),
    (nothing_runs_what_it_reads, "distributed.collectives", "import pickle"),
    (nothing_runs_what_it_reads, "distributed.collectives", "from pickle import loads"),
    (nothing_runs_what_it_reads, "distributed.collectives", "from multiprocessing.reduction import pickle"),
    (nothing_runs_what_it_reads, "distributed.collectives", "def f(x):\n    return eval(x)"),
    (nothing_runs_what_it_reads, "distributed.collectives", "exec('x = 1')"),
    (nothing_runs_what_it_reads, "distributed.collectives", "import torch\nx = torch.load('a', weights_only=True)"),
    (nothing_runs_what_it_reads, "distributed.collectives", "from torch import load"),
    (nothing_runs_what_it_reads, "distributed.collectives", "import torch as t\nx = t.load('a')"),
    (nothing_runs_what_it_reads, "distributed.collectives", "import builtins as b\nb.eval('a')"),
    (nothing_runs_what_it_reads, "distributed.collectives", "subprocess.run('ls', shell=True)"),
    (nothing_runs_what_it_reads, "distributed.collectives", "subprocess.run('ls', shell=flag)"),
    (nothing_runs_what_it_reads, "distributed.collectives", "import os\nos.system('ls')"),
    (nothing_runs_what_it_reads, "distributed.collectives", "import yaml\nyaml.load(text)"),
    (nothing_runs_what_it_reads, "distributed.collectives", "AutoModel.from_pretrained(x, trust_remote_code=True)"),
    (
        nothing_runs_what_it_reads,
        "distributed.collectives",
        "AutoModel.from_pretrained(x, **{'trust_remote_code': True})",
    ),
    (nothing_runs_what_it_reads, "distributed.collectives", "dist.broadcast_object_list(x)"),
    (nothing_runs_what_it_reads, "distributed.collectives", "dist.all_gather_object(x, y)"),
    (nothing_runs_what_it_reads, "distributed.collectives", "from torch.distributed import send_object_list"),
    (nothing_runs_what_it_reads, "distributed.collectives", "np.load('a.npy', allow_pickle=True)"),
]


@pytest.mark.parametrize(("rule", "module", "source"), PLANTED)
def test_a_planted_violation_is_found(rule: Rule, module: str, source: str) -> None:
    assert list(rule(module, ast.parse(source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model.layers", "from engine.ops.norm import rms_norm\nfrom engine.distributed.specs import Chunk"),
        ("data.samples.loader", "from engine.data.samples.order import SampleOrder"),
        ("train.loop", "from engine.data.samples.loader import Loader\nimport engine.data.tokenize.tokenizer"),
        ("interop.convert", "from engine.data.tokenize.convert import find"),
        ("pipeline.executor", "from engine.pipeline.stage import Stage"),
        ("parallel.gradients", "import torch.distributed as dist\nwork: dist.Work | None = None"),
        ("distributed.env", "import os\nos.environ['RANK']"),
        (
            "distributed.collectives",
            "open(a, 'rb'); path.open('wb'); os.open(a, 0); storage.open(a); path.read_text(encoding='utf-8')",
        ),
        ("model.layers", "model.eval()\nsubprocess.run(['ls'], shell=False)\nobject_list = []"),
    ],
)
def test_what_is_allowed_is_not_reported(module: str, source: str) -> None:
    tree = ast.parse(source)
    assert [text for rule in (*STRUCTURE, nothing_runs_what_it_reads) for text in rule(module, tree)] == []


def test_the_light_modules_load_without_torch() -> None:
    """Not through a third-party package either; --help and the errors of a dry run come before torch is loaded."""
    light = [m for m in ENGINE if (name := row(m)) is not None and _LEVEL_OF[name] < _TORCH_FREE_LEVELS]
    assert {"config.schema", "cli.schedule_pages", "planner.flops", "pipeline.schedules"} <= set(light)
    light += [m for m in ENGINE if m.startswith("cli.") and m not in ("cli.diagnosis", "cli.selftest", "cli.dry_run")]
    names = [f"engine.{module}".rstrip(".") for module in light]
    program = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
from engine.cli.main import main
for words, code in ((["--help"], 0), (["--train.steps", "0", "--dry-run"], 2)):
    try:
        main(["train", *words])
    except SystemExit as end:
        assert end.code == code, (words, end.code)
    assert "torch" not in sys.modules, words
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
