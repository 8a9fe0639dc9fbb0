"""Malicious files (code execution, memory bombs, false metadata) are rejected; nothing is run or read wrongly.

The canary is a file that each planted call would create. Each pickle is first shown to work with `pickle` itself.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import pickletools
import struct
import time
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from engine.errors import CheckpointError
from engine.interop.megatron import archive, symbolic
from engine.interop.megatron.archive import Archive
from engine.interop.megatron.source import open_megatron
from engine.interop.megatron.symbolic import Call, Global, parse
from tests.support.errors import raises
from tests.support.megatron_cases import LLAMA, save_dist, save_legacy


class Calls:
    """An object that pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


NOT_RUN = "interop.megatron-description-not-read"  # part of every message: nothing was run


def canaries(path: Path) -> dict[str, bytes]:
    """Pickles that create the file `path` when `pickle` loads them."""
    touch = f"touch {path}"
    source = f"open({str(path)!r}, 'w').close()"
    import builtins

    found = {
        "os.system": pickle.dumps(Calls(os.system, touch), 2),
        "builtins.exec": pickle.dumps(Calls(builtins.exec, source), 4),
        "builtins.eval": pickle.dumps({"args": [Calls(builtins.eval, source)]}, 4),
        "open": pickle.dumps(Calls(open, str(path), "w"), 2),
        "a key of a dict": b"\x80\x02}cos\nsystem\nX"
        + struct.pack("<I", len(touch))
        + touch.encode()
        + b"\x85RK\x01s.",
        "the old opcodes": b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        "INST": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nX" + struct.pack("<I", len(touch)) + touch.encode() + b"o.",
        "in the state of a namespace": pickle.dumps(argparse.Namespace(a=Calls(os.system, touch)), 2),
        "a pickle in a pickle": pickle.dumps(Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))), 4),
    }
    return found


def test_no_canary_is_executed(tmp_path: Path) -> None:
    """As a bare pickle, as data.pkl of a legacy file and of common.pt, and as .metadata."""
    canary = tmp_path / "canary"
    save_dist(tmp_path / "dist", LLAMA)
    save_legacy(tmp_path / "old", LLAMA, 1, 1)
    legacy = tmp_path / "old/iter_0000007/mp_rank_00/model_optim_rng.pt"
    common, metadata = tmp_path / "dist/common.pt", tmp_path / "dist/.metadata"
    whole = metadata.read_bytes(), common.read_bytes()
    trials = 0
    for name, raw in canaries(canary).items():
        pickle.loads(raw)
        assert canary.exists(), f"{name}: the trap itself does not work"
        canary.unlink()
        with raises(CheckpointError, NOT_RUN, "x: "):
            parse(raw, "x")
        repack(legacy, raw)
        metadata.write_bytes(raw)
        for folder in (tmp_path / "dist", tmp_path / "old"):
            with raises(CheckpointError, NOT_RUN, folder):
                open_megatron(folder)
        metadata.write_bytes(whole[0])
        repack(common, raw)
        with raises(CheckpointError, NOT_RUN, common):
            open_megatron(tmp_path / "dist")
        common.write_bytes(whole[1])
        trials += 4
    assert not canary.exists() and trials == 40


def repack(path: Path, description: bytes) -> None:
    """A torch archive with its data.pkl replaced."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("x/data.pkl", description)
        out.writestr("x/byteorder", b"little")


def test_every_global_and_opcode_off_the_list_is_rejected() -> None:
    allowed = {*symbolic._LITERALS, *symbolic._CONSTANTS, *symbolic._STEPS}
    allowed |= {"PROTO", "FRAME", "STOP", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"}
    names = {opcode.name for opcode in pickletools.opcodes}
    assert allowed <= names and {"INST", "OBJ", "EXT1", "PERSID", "NEWOBJ_EX", "NEXT_BUFFER", "GET"} <= names - allowed
    machine = symbolic._Machine()
    for name in sorted(names - allowed):
        with pytest.raises(Exception, match="does not occur in checkpoints"):
            machine.step(name, None)
    for module, name in [("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"), ("", "")]:
        with raises(CheckpointError, NOT_RUN, f"{module}.{name}"):
            parse(f"\x80\x02c{module}\n{name}\n.".encode("latin-1"), "x")
    dangerous = {"os", "sys", "subprocess", "posix", "nt", "importlib", "runpy", "pickle", "operator", "functools"}
    assert not [name for name in symbolic.GLOBALS if name.split()[0].split(".")[0] in dangerous]


def test_plain_data_and_objects() -> None:
    value = {"a": [1, -(2**40), 1.5, True, None, "ü", b"x", (1,), (1, 2), (1, 2, 3, 4), {"b": {}}], 3: "c"}
    for protocol in (2, 3, 4, 5):
        found = parse(pickle.dumps(value, protocol), "x")
        if protocol > 2:  # protocol 2 writes bytes as a call of _codecs.encode
            assert found == value
    array = parse(pickle.dumps(np.arange(3), 2), "x")
    assert isinstance(array, Call) and array.function.name == "_reconstruct"
    node = parse(pickle.dumps(argparse.Namespace(x=torch.bfloat16), 4), "x")
    assert node.function == Global("argparse", "Namespace") and node.state == {"x": Global("torch", "bfloat16")}


OPCODES = 500_000  # less than symbolic.MAX_OPCODES, which are slow under tracemalloc

BOMBS: dict[str, Callable[[], bytes]] = {
    "many opcodes": lambda: b"\x80\x02" + b"N0" * 10 + b"]" * 200_000 + b".",
    "very many opcodes": lambda: b"\x80\x02]" + b"Na" * (OPCODES // 2) + b".",
    "marks": lambda: b"(" * 200_000 + b".",
    "a text of 4 GB": lambda: b"X\xff\xff\xff\xff" + b"x" * 100 + b".",
    "a text of 2^63 bytes": lambda: b"\x8d" + b"\xff" * 7 + b"\x7f" + b"x." * 10,
    "a long integer": lambda: b"\x8b\xff\xff\xff\x7f" + b"1" * 100 + b".",
    "decimal digits": lambda: b"L" + b"9" * 100_000 + b"L\n.",
    "too large": lambda: b"\x80\x02" + b"]" * (65 << 20) + b".",
    "a dict of itself": lambda: b"}q\x00h\x00h\x00s.",
    "a tower of tuples as a key": lambda: b"})" + b"2" * 40 + b".",
    "nothing": lambda: b"",
    "only a stop": lambda: b".",
    "two values": lambda: b"NN.",
    "more after the stop": lambda: b"N.N.",
    "memo out of nowhere": lambda: b"h\x05.",
    "a pop below the mark": lambda: b"N(a.",
    "a state for a number": lambda: b"K\x01}b.",
    "twice the same key": lambda: b"}K\x01Ns" + b"K\x01Ns.",
    "colliding integers": lambda: (
        b"}" + b"".join(b"\x8a\x09" + (i * (2**61 - 1)).to_bytes(9, "little") + b"Ns" for i in range(9)) + b"."
    ),
    "no end": lambda: pickle.dumps({"a": 1})[:-1],
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_rejected_in_bounded_time_and_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "MAX_OPCODES", OPCODES)
    raw = BOMBS[name]()
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        parse(raw, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 500 and "x: " in str(caught.value)
    assert peak < (1 << 20) + 4 * len(raw) and peak < 400 << 20, f"{peak >> 20} MiB"
    assert time.monotonic() - start < 60  # not a measurement, only a bound for endless loops


def test_shared_parts_cost_nothing() -> None:
    """2^40 leaves in 200 bytes, and 100,000 nested tuples: they are parsed, and no message traverses them."""
    doubled = b"\x80\x04)" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(40)) + b"."
    for raw in (doubled, b"\x80\x04)" + b"\x85" * 100_000 + b"."):
        value = parse(raw, "x")
        assert symbolic.shown(value) == "a tuple"
        with raises(CheckpointError, "interop.megatron-not-a-tensor", "a tuple"):
            Archive("x", {}, None).tensor(value, "t")


def edited(folder: Path, change: Callable[[Metadata], None]) -> None:
    """Modify a .metadata file with DCP's own classes."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def places(change: Callable[[_StorageInfo], None]) -> Callable[[Metadata], None]:
    def apply(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "output_layer.weight":
                change(info)

    return apply


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Callable[[Metadata], None]:
    def apply(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["output_layer.weight"]
        place = next(x for i, x in metadata.storage_data.items() if i.fqn == "output_layer.weight")
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        metadata.storage_data[MetadataIndex("output_layer.weight", torch.Size(offsets), 9)] = place

    return apply


def resized(size: tuple[Any, ...]) -> Callable[[Metadata], None]:
    def apply(metadata: Metadata) -> None:
        metadata.state_dict_metadata["output_layer.weight"].size = torch.Size(size)

    return apply


# name -> (modification, error code, values in the message)
FALSE_METADATA: dict[str, tuple[Any, ...]] = {
    "up": (places(lambda x: setattr(x, "relative_path", "../secret")), "file-name-not-plain", "../secret"),
    "absolute": (places(lambda x: setattr(x, "relative_path", "/etc/passwd")), "file-name-not-plain", "/etc/passwd"),
    "hidden": (places(lambda x: setattr(x, "relative_path", ".metadata")), "file-name-not-plain", ".metadata"),
    "no such file": (places(lambda x: setattr(x, "relative_path", "__9_0.distcp")), "file-missing", "__9_0.distcp"),
    "a folder": (places(lambda x: setattr(x, "relative_path", "folder")), "file-missing", "folder"),
    "a null": (places(lambda x: setattr(x, "relative_path", "a\0b")), "file-name-not-plain"),
    "behind the end": (places(lambda x: setattr(x, "offset", 1 << 40)), "file-cut-short", 1 << 40),
    "negative": (places(lambda x: setattr(x, "offset", -5)), "place-malformed", -5),
    "one byte off": (places(lambda x: setattr(x, "offset", x.offset + 1)), "archive-not-zip"),
    "overflow": (places(lambda x: setattr(x, "length", (1 << 64) - 1)), "place-malformed", (1 << 64) - 1),
    "huge": (places(lambda x: setattr(x, "length", (1 << 63) - 1)), "file-cut-short"),
    "short": (places(lambda x: setattr(x, "length", x.length - 30)), "archive-damaged"),
    "compressed": (places(lambda x: setattr(x, "transform_descriptors", ["zstd"])), "chunk-compressed"),
    "overlap": (chunk((0, 1), (48, 15)), "values-missing", 768),
    "outside": (chunk((0, 16), (48, 16)), "part-out-of-place", [48, 16]),
    "hole": (resized((50, 16)), "values-missing", 800),
    "huge shape": (resized((1 << 62, 16)), "values-missing"),
    "other shape": (resized((768,)), "chunk-malformed", [768]),
}


@pytest.mark.parametrize("case", FALSE_METADATA)
def test_false_metadata_is_rejected(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "a"
    save_dist(folder, LLAMA)
    (tmp_path / "secret").write_bytes((folder / "__0_0.distcp").read_bytes())
    (folder / "folder").mkdir()
    open_megatron(folder)
    how, code, *values = FALSE_METADATA[case]
    edited(folder, how)
    with raises(CheckpointError, f"interop.megatron-{code}", folder, *values):
        open_megatron(folder)


def tensor_file(path: Path, args: tuple[Any, ...], storage: str = "FloatStorage") -> None:
    """An archive whose value is `_rebuild_tensor_v2` with given arguments, on a storage of 6 floats."""
    pickled = io.BytesIO()
    torch.save({"x": torch.zeros(6)}, pickled)
    made = pickle.dumps(("PERSISTENT", *args), 2)
    identity = pickle.dumps(("storage", "KIND", "0", "cpu", 6), 2)[2:-1]
    made = made.replace(pickle.dumps("PERSISTENT", 2)[2:-3], identity + b"Q", 1)
    made = made.replace(pickle.dumps("KIND", 2)[2:-3], f"ctorch\n{storage}\n".encode(), 1)
    made = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + made[2:-1] + b"R."
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("x/data.pkl", made)
        out.writestr("x/data/0", bytes(24))


@pytest.mark.parametrize(
    ("args", "good"),
    [
        ((0, (2, 3), (3, 1), False, None), True),
        ((0, (3, 2), (1, 3), False, None), True),
        ((0, (6,), (1,), False, None), True),
        ((1, (6,), (1,), False, None), False),
        ((0, (2, 3), (4, 1), False, None), False),
        ((0, (1 << 40,), (0,), False, None), False),
        ((-1, (2,), (1,), False, None), False),
        ((0, (-2,), (1,), False, None), False),
        ((0, (2,), (-1,), False, None), False),
        ((0, (2,), (1, 1), False, None), False),
        ((1 << 62, (2,), (1 << 62,), False, None), False),
        ((0, (1,) * 9, (1,) * 9, False, None), False),
        ((0, "ab", (1,), False, None), False),
        ((True, (2,), (1,), False, None), False),
        ((0,), False),
    ],
)
def test_shapes_and_strides_stay_inside_the_storage(tmp_path: Path, args: tuple[Any, ...], good: bool) -> None:
    tensor_file(tmp_path / "a.pt", args)
    opened = Archive.open(archive.map_file(tmp_path / "a.pt"), "a.pt")
    if good:
        x = opened.tensor(opened.value, "t")
        assert x.read((0,) * len(x.shape), x.shape).shape == x.shape
        return
    with pytest.raises(CheckpointError, match=r"a\.pt: t: "):
        opened.tensor(opened.value, "t")


def test_archives_that_are_not_torchs(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"

    def rejected(code: str) -> None:
        with raises(CheckpointError, f"interop.megatron-{code}", path):
            Archive.open(archive.map_file(path), str(path))

    good = pickle.dumps({"a": 1}, 2)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("x/data.pkl", good)
    rejected("archive-member-compressed")
    for names, code in (
        (["x/data.pkl", "y/data.pkl"], "archive-member-repeated"),
        (["data.pkl"], "archive-member-repeated"),
        (["x/data.pkl", "x/data.pkl"], "archive-member-repeated"),
        (["x/other"], "archive-member-missing"),
    ):
        with zipfile.ZipFile(path, "w") as out:
            for name in names:
                out.writestr(name, good)
        rejected(code)
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("x/data.pkl", good)
        out.writestr("x/byteorder", "big")
    rejected("archive-byte-order")
    path.write_bytes(pickle.dumps({"a": 1}))
    rejected("archive-not-zip")
    path.write_bytes(b"")
    rejected("file-unreadable")
    os.remove(path)
    rejected("file-missing")
    os.mkfifo(path)
    rejected("file-missing")  # and does not block waiting for a writer


def changed(raw: bytes, rng: np.random.Generator) -> bytes:
    """One to three random changes: a bit, a byte, a number, a truncation, a repetition, zeros, or garbage."""
    out = bytearray(raw)
    for _ in range(int(rng.integers(1, 4))):
        kind, at = int(rng.integers(7)), int(rng.integers(max(1, len(out))))
        if kind == 0 and out:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1 and out:
            out[at] = int(rng.choice([0, 1, 0x28, 0x29, 0x2E, 0x52, 0x5D, 0x62, 0x63, 0x7D, 0x85, 0x94, 0xFF]))
        elif kind == 2:
            size = int(rng.choice([2, 4, 8]))
            out[at : at + size] = (int(rng.choice([0, 1, 2**15, 2**31 - 1, 2**62])) % 2 ** (8 * size)).to_bytes(
                size, "little"
            )
        elif kind == 3 and rng.integers(4) == 0:
            del out[at:]
        elif kind == 4:
            other = int(rng.integers(max(1, len(out))))
            out[at:at] = out[other : other + int(rng.integers(1, 40))]
        else:
            out[at : at + int(rng.integers(1, 20))] = rng.bytes(int(rng.integers(0, 20)))
    return bytes(out)


def outcome(folder: Path, wanted: dict[str, torch.Tensor], weights_only: bool) -> str:
    """Result of opening and reading all: rejected or read. If only weights were damaged, values must be right."""
    try:
        with open_megatron(folder) as source:
            found = {name: source.read_whole("model", name) for name in source.shapes("model")}
    except CheckpointError as error:
        assert str(folder) in str(error) and len(str(error)) < 4000
        return "rejected"
    if weights_only:
        assert found.keys() == wanted.keys() and all(torch.equal(x, wanted[name]) for name, x in found.items())
    return "read"


def fuzz(folder: Path, files: list[str], rounds: int, seed: int, wanted: dict[str, torch.Tensor]) -> Counter[str]:
    rng, seen = np.random.default_rng(seed), Counter[str]()
    good = {file: (folder / file).read_bytes() for file in files}
    for _ in range(rounds):
        file = str(rng.choice(files))
        (folder / file).write_bytes(changed(good[file], rng))
        weights = file.endswith(".distcp")
        seen[("weights " if weights else "") + outcome(folder, wanted, weights)] += 1
        (folder / file).write_bytes(good[file])
    return seen


FUZZ_DIST = [".metadata", ".metadata", "common.pt", "__0_0.distcp"]


def small(args: dict[str, Any]) -> dict[str, Any]:
    return args | {"num_layers": 1}


def test_damaged_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.megatron_cases.LAYERS", 1)
    wanted = save_dist(tmp_path / "dist", small(LLAMA))
    seen = fuzz(tmp_path / "dist", FUZZ_DIST, 800, 0, wanted)
    assert sum(seen.values()) == 800 and seen["rejected"] > 250 and seen["weights rejected"] > 50
    wanted = save_legacy(tmp_path / "old", small(LLAMA), 1, 1)
    seen = fuzz(tmp_path / "old", ["iter_0000007/mp_rank_00/model_optim_rng.pt"], 300, 1, wanted)
    assert sum(seen.values()) == 300 and seen["rejected"] > 150


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_thousands_of_damaged_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.megatron_cases.LAYERS", 1)
    wanted = save_dist(tmp_path / "dist", small(LLAMA))
    assert sum(fuzz(tmp_path / "dist", FUZZ_DIST, 5_000, 2, wanted).values()) == 5_000


def test_a_checksum_that_is_not_compared_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checksum, as in torch.load, the fuzz test fails."""
    monkeypatch.setattr("tests.support.megatron_cases.LAYERS", 1)
    monkeypatch.setattr(archive.zlib, "crc32", lambda _: 0)
    monkeypatch.setattr(archive, "Record", lambda data, crc: Record(data, 0))
    wanted = save_dist(tmp_path / "dist", small(LLAMA))
    with pytest.raises(AssertionError):
        fuzz(tmp_path / "dist", ["__0_0.distcp"], 500, 0, wanted)


Record = archive.Record


@settings(deadline=None, max_examples=500)
@given(
    st.lists(
        st.sampled_from(
            [bytes([opcode]) for opcode in b"N()]}abetsu.\x85\x86\x87\x81RQ\x93\x94\x88\x8f\x90q\x00h\x00K\x01"]
        )
        | st.sampled_from(
            [b"ctorch\nSize\n", b"cargparse\nNamespace\n", b"\x8c\x01a", b"X\x01\0\0\0b", b"cos\nsystem\n"]
        ),
        max_size=40,
    )
)
def test_any_run_of_opcodes_gives_a_value_or_words(opcodes: list[bytes]) -> None:
    try:
        symbolic.shown(parse(b"\x80\x04" + b"".join(opcodes) + b".", "x"))
    except CheckpointError as error:
        assert str(error).startswith("x: ")


def test_real_optimizer_states_pass(tmp_path: Path) -> None:
    """Legacy files also contain random states, schedulers and Adam's moments, which are ignored."""
    import random

    save_legacy(tmp_path, LLAMA, 1, 1)
    path = tmp_path / "iter_0000007/mp_rank_00/model_optim_rng.pt"
    top = torch.load(path, weights_only=False)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    states = {"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    top |= {"optimizer": optimizer.state_dict(), "rng_state": [states], "opt_param_scheduler": {"num_steps": 3}}
    torch.save(top, path)
    assert open_megatron(tmp_path).step == 7
