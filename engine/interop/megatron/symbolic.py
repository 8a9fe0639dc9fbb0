"""Reads pickles as plain data: interprets the opcodes without importing or calling anything that they name.

torch's files (.pt, .distcp, DCP's .metadata) describe their contents with a pickle, and unpickling can run any code.
This reader runs none: `pickletools.genops` of the standard library splits the bytes into opcodes without imports, and a
small stack machine turns them into numbers, strings, lists, tuples, dicts and three kinds of inert nodes:

    Global(module, name)        a name; never looked up
    Call(function, args)        a call or an object; never executed. `state`, `items`, `entries`: set on it afterwards
    Persistent(id)              a storage outside the pickle

Versions of Python, numpy and pickle differ in names: here each object has one (`RENAMED_MODULES`, `_Machine.call`).

Invariants: a file is rejected if any opcode or global is not listed below. Size, number of opcodes, stack depth and
integer length are limited, which bounds time and memory. Values may share parts or contain themselves: callers must
only follow the structure of a known format, and print values in messages only through `shown`.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.errors import CheckpointError

MAX_BYTES = 64 << 20
MAX_OPCODES = 4_000_000
MAX_STACK = 100_000  # pickle writes containers in batches of 1,000, but tuples are on the stack as a whole
MAX_INTEGER_BYTES = 256

_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool float8_e4m3fn float8_e5m2"
_STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool"
_NUMPY = "Float64 Float32 Float16 Int64 Int32 Int16 Int8 UInt64 UInt32 UInt16 UInt8 Bool"
_DCP = "torch.distributed.checkpoint"
_CORE = "megatron.core"

# Module name in a file -> module name used here; also applies to submodules.
RENAMED_MODULES = {
    "__builtin__": "builtins",  # in pickles of protocol 2
    "_io": "io",
    "pathlib._local": "pathlib",  # Python 3.13 only
    "numpy.core": "numpy._core",  # numpy 1
}

# Enums: early releases of Python 3.11 write members as getattr(CLASS, NAME), later ones as CLASS(VALUE).
ENUMS = {
    *(f"{_CORE}.transformer.enums {name}" for name in ("AttnBackend", "CudaGraphScope", "AttnMaskType", "LayerType")),
    f"{_CORE}.enums ModelType",
    *(f"{_CORE}.rerun_state_machine {name}" for name in ("RerunDiagnostic", "RerunMode", "RerunState")),
    f"{_DCP}.metadata _MEM_FORMAT_ENCODING",
    f"{_DCP}.planner WriteItemType",
    "signal Signals",
}

# Globals of Megatron's checkpoints (most are in megatron/core/safe_globals.py), torch's tensors and DCP's metadata.
GLOBALS = {
    *ENUMS,
    "builtins getattr",  # only for ENUMS: see `_Machine.call`
    *(f"torch {name}" for name in _DTYPES.split()),
    *(f"torch {name}Storage" for name in _STORAGES.split()),
    *(f"torch {name}" for name in ("Size", "device", "strided")),
    *(f"torch._utils {name}" for name in ("_rebuild_tensor_v2", "_rebuild_parameter")),
    "torch.storage UntypedStorage",
    "torch.serialization _get_layout",
    *(f"torch.nn.functional {name}" for name in ("silu", "gelu", "relu")),
    *(f"torch._C._nn {name}" for name in ("gelu", "silu")),
    *(f"{_DCP}.metadata {name}" for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")),
    *(f"{_DCP}.metadata {name}" for name in ("TensorProperties", "ChunkStorageMetadata", "MetadataIndex")),
    f"{_DCP}.metadata StorageMeta",
    f"{_DCP}.filesystem _StorageInfo",
    *(f"{_DCP}.planner {name}" for name in ("SavePlan", "WriteItem", "TensorWriteData")),
    *(f"{_CORE}.dist_checkpointing.strategies.torch {name}" for name in ("MCoreMetadata", "MCoreSavePlan")),
    f"{_CORE}.transformer.pipeline_parallel_layer_layout PipelineParallelLayerLayout",
    f"{_CORE}.optimizer OptimizerConfig",
    f"{_CORE}.optimizer.optimizer_config OptimizerConfig",
    "argparse Namespace",
    "types SimpleNamespace",
    "collections OrderedDict",
    "collections defaultdict",
    *(f"builtins {name}" for name in ("set", "frozenset", "bytearray")),
    *(
        f"builtins {name}" for name in ("int", "long", "float", "bool", "str", "unicode", "list", "dict")
    ),  # of defaultdict
    *(f"pathlib {name}" for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(f"signal SIG{name}" for name in ("TERM", "INT", "HUP", "USR1", "USR2", "ALRM", "QUIT", "CONT", "XCPU")),
    "io BytesIO",
    "_codecs encode",
    *(f"numpy._core.multiarray {name}" for name in ("_reconstruct", "scalar")),
    "numpy._core.numeric _frombuffer",
    "numpy ndarray",
    "numpy dtype",
    *(f"numpy.dtypes {name}DType" for name in _NUMPY.split()),
}


@dataclass(frozen=True)
class Global:
    """The name of a class or function."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """A call that was not executed, or an object that was not created. state, items, entries: set on it afterwards."""

    function: Global
    args: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    entries: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Persistent:
    """A reference to something outside the pickle."""

    id: Any


def shown(value: object) -> str:
    """A value as short text for messages, safe for any content of a file."""
    if isinstance(value, (str, bytes)):
        return ascii(value[:80]) + ("..." if len(value) > 80 else "")
    if value is None or isinstance(value, (bool, int, float)):
        return ascii(value)
    if isinstance(value, Call):
        return f"a {value.function}"
    return str(value) if isinstance(value, Global) else f"a {type(value).__name__}"


def parse(data: bytes | memoryview, where: str) -> Any:
    """Parse a pickle into plain data and nodes. where: its name in messages. Raises CheckpointError.

    Dict keys are strings, numbers, None, or nodes (compared by identity).
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(
            "interop.megatron-description-too-long",
            f"{where}: the pickle has {len(data)} bytes; at most {MAX_BYTES} are read",
        )
    machine = _Machine()
    position = 0
    try:
        for count, (opcode, argument, at) in enumerate(pickletools.genops(io.BytesIO(data))):
            position = at or 0
            if count >= MAX_OPCODES:
                raise _RejectedError(f"more than {MAX_OPCODES} opcodes")
            if opcode.name == "STOP":
                if (rest := len(data) - position - 1) != 0:
                    raise _RejectedError(f"{rest} bytes after the end")
                return machine.result()
            machine.step(opcode.name, argument)
    except (_RejectedError, ValueError, OverflowError, EOFError, IndexError, TypeError) as error:
        text = str(error) if isinstance(error, _RejectedError) else f"damaged ({shown(str(error))})"
        raise CheckpointError(
            "interop.megatron-description-not-read",
            f"{where}: offset {position}: {text}; nothing in the file was run. It is damaged or not a checkpoint: "
            "use another copy",
        ) from None
    raise CheckpointError(
        "interop.megatron-description-ends-early", f"{where}: ends before its STOP opcode; use another copy"
    )  # genops ends at STOP or raises


class _RejectedError(Exception):
    """Reason why a pickle is rejected; `parse` adds the location."""


def _key(value: object) -> Any:
    """A dict key whose hash is cheap and safe from crafted collisions; tuples become nodes, compared by identity."""
    if isinstance(value, tuple):
        return Call(Global("builtins", "tuple"), value)
    small = isinstance(value, int) and abs(value) < 1 << 60
    if small or value is None or isinstance(value, (str, bytes, float, Call, Global)):
        return value
    raise _RejectedError(f"{shown(value)} as the key of a dict")


def _canonical_module(module: str) -> str:
    """The name that this reader uses for a module."""
    for old, new in RENAMED_MODULES.items():
        if module == old or module.startswith(f"{old}."):
            return new + module.removeprefix(old)
    return module


def _enum_member(args: tuple[Any, ...]) -> tuple[Global, tuple[str]]:
    """Arguments of getattr as a call of an enum with the member's name; anything else is rejected."""
    if len(args) == 2 and isinstance(args[0], Global) and isinstance(args[1], str):
        enum, name = args
        if f"{enum.module} {enum.name}" in ENUMS:
            return enum, (name,)
    raise _RejectedError(f"calls builtins.getattr of {shown(args[0]) if args else 'nothing'}, which is not an enum")


class _Machine:
    """The stack machine. Opcodes are named as in pickletools; those that are not in the tables are rejected."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self.stack) != 1 or self.marks:
            raise _RejectedError(f"{len(self.stack)} values at the end, not one")
        if isinstance(self.stack[0], Global):
            raise _RejectedError(f"contains only the name {shown(self.stack[0])}; no checkpoint does")
        return self.stack[0]

    def step(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        if name in _LITERALS:
            if isinstance(argument, int) and argument.bit_length() > 8 * MAX_INTEGER_BYTES:
                raise _RejectedError(f"an integer of more than {MAX_INTEGER_BYTES} bytes")
            self.push(argument)
        elif name in _CONSTANTS:
            self.push(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise _RejectedError(f"memo {argument} was never set")
            self.push(self.memo[argument])
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise _RejectedError(f"opcode {name} does not occur in checkpoints")

    def push(self, value: Any) -> None:
        if len(self.stack) >= MAX_STACK:
            raise _RejectedError(f"a stack of more than {MAX_STACK}")
        self.stack.append(value)

    def top(self) -> Any:
        self._above_mark(1)
        return self.stack[-1]

    def pop(self) -> Any:
        self._above_mark(1)
        return self.stack.pop()

    def pop_many(self, number: int) -> tuple[Any, ...]:
        self._above_mark(number)
        values = tuple(self.stack[-number:])
        del self.stack[-number:]
        return values

    def _above_mark(self, number: int) -> None:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < number:
            raise _RejectedError("takes values that are not on the stack")

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise _RejectedError("no mark on the stack")
        begin = self.marks.pop()
        values = self.stack[begin:]
        del self.stack[begin:]
        return values

    def mark(self, _: Any) -> None:
        if len(self.marks) >= MAX_STACK:
            raise _RejectedError(f"more than {MAX_STACK} open marks")
        self.marks.append(len(self.stack))

    def named(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _RejectedError("a global whose name is not a string")
        known = _canonical_module(module)
        if f"{known} {name}" not in GLOBALS:
            raise _RejectedError(f"names {shown(f'{module}.{name}')}, which does not occur in checkpoints")
        self.push(Global(known, name))

    def call(self, _: Any) -> None:
        function, args = self.pop_many(2)
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise _RejectedError(f"calls {shown(function)}")
        if function == Global("builtins", "getattr"):
            function, args = _enum_member(args)
        self.push(Call(function, args))

    def build(self, _: Any) -> None:
        state = self.pop()
        target = self.top()
        if not isinstance(target, Call) or target.state is not None:
            raise _RejectedError(f"sets the state of {shown(target)}")
        target.state = state

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Call):
            target = target.entries
        if not isinstance(target, list):
            raise _RejectedError(f"appends to {shown(target)}")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Call):
            target = target.items
        if not isinstance(target, dict) or len(values) % 2:
            raise _RejectedError(f"sets items of {shown(target)}")
        for key, value in zip(values[::2], values[1::2]):
            if (key := _key(key)) in target:
                raise _RejectedError(f"sets {shown(key)} twice")
            target[key] = value


_INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BYTEARRAY8")
_LITERALS = frozenset((*_INTEGERS, *_TEXTS, "BINFLOAT"))
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.push(m.pop_many(1)),
    "TUPLE2": lambda m, _: m.push(m.pop_many(2)),
    "TUPLE3": lambda m, _: m.push(m.pop_many(3)),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "FROZENSET": lambda m, _: m.push(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.append(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items(list(m.pop_many(2))),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": lambda m, argument: m.named(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.named(*m.pop_many(2)),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": lambda m, _: m.push(Persistent(m.pop())),
}


def as_dict(value: object) -> dict[Any, Any] | None:
    """The items of a dict or OrderedDict; None for anything else."""
    if isinstance(value, Call) and value.function == Global("collections", "OrderedDict") and not value.args:
        return value.items
    return value if isinstance(value, dict) else None


def is_call(value: object, name: str) -> bool:
    """Whether a value is a call or object of `name`, given as "module name"."""
    return isinstance(value, Call) and f"{value.function.module} {value.function.name}" == name
