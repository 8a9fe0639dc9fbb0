"""Reads Megatron folders written by other versions of Python, torch and numpy: real folders and hand-made pickles.

`written_by/*.zip` were made by `python -m tests.support.megatron_cases tests/interop/megatron/written_by` under the
versions in their names.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import CheckpointError
from engine.interop.megatron import symbolic
from engine.interop.megatron.source import open_megatron
from engine.interop.megatron.symbolic import Call, Global, parse
from tests.support.errors import raises
from tests.support.megatron_cases import LLAMA, canonical, odd_values, save_dist

SAMPLES = sorted(Path(__file__).with_name("written_by").glob("*.zip"))

NOT_RUN = "interop.megatron-description-not-read"


def test_there_are_samples_of_each_kind() -> None:
    """Enums by name (early 3.11), pathlib._local (3.13), numpy.core (numpy 1), two versions of torch."""
    names = " ".join(path.stem for path in SAMPLES)
    assert all(version in names for version in ("python3.11.2-", "python3.12.", "python3.13."))
    assert "numpy1." in names and "numpy2." in names and len({path.stem.split("-")[1] for path in SAMPLES}) > 1


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_a_folder_that_others_wrote(tmp_path: Path, sample: Path) -> None:
    with zipfile.ZipFile(sample) as archive:
        archive.extractall(tmp_path)
    wanted = canonical(LLAMA, torch.bfloat16)
    with open_megatron(tmp_path) as source:
        source.verify()
        assert source.step == 7 and source.shapes("model") == {name: tuple(x.shape) for name, x in wanted.items()}
        assert all(torch.equal(source.read_whole("model", name), x) for name, x in wanted.items())


def test_a_folder_that_this_python_writes(tmp_path: Path) -> None:
    save_dist(tmp_path, LLAMA | odd_values())
    assert open_megatron(tmp_path).cfg.vocab_size == LLAMA["vocab_size"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(protocol: int) -> None:
    for name, value in odd_values().items():
        parse(pickle.dumps(value, protocol), name)


# pickle.dumps(pathlib.PosixPath("/a/b")) and others, as written by the named versions
WRITTEN = {
    "3.11.7": (
        b"\x80\x02cpathlib\nPosixPath\nq\x00X\x01\x00\x00\x00/q\x01X\x01\x00\x00\x00aq\x02\x86q\x04Rq\x05.",
        "/",
    ),
    "3.13.0": (b"\x80\x02cpathlib._local\nPosixPath\nq\x00X\x04\x00\x00\x00/a/bq\x01\x85q\x02Rq\x03.", "/a/b"),
    "3.14.2": (b"\x80\x02cpathlib\nPosixPath\nq\x00X\x04\x00\x00\x00/a/bq\x01\x85q\x02Rq\x03.", "/a/b"),
}


@pytest.mark.parametrize("version", WRITTEN)
def test_a_path_is_the_same_from_any_version(version: str) -> None:
    data, first = WRITTEN[version]
    path = parse(data, version)
    assert isinstance(path, Call) and path.function == Global("pathlib", "PosixPath") and path.args[0] == first


def call(function: str, *args: str) -> bytes:
    """A pickle that calls MODULE NAME with arguments: globals (those with a space) and strings."""
    parts = [
        f"c{a.replace(' ', chr(10))}\n".encode() if " " in a else b"X" + len(a).to_bytes(4, "little") + a.encode()
        for a in (function, *args)
    ]
    return b"\x80\x02" + parts[0] + b"(" + b"".join(parts[1:]) + b"tR."


def test_a_member_of_an_enum_by_name() -> None:
    """Python 3.11.2 writes getattr(Enum, name); getattr of anything else is rejected."""
    enum = "megatron.core.transformer.enums AttnBackend"
    for builtins in ("__builtin__", "builtins"):
        found = parse(call(f"{builtins} getattr", enum, "flash"), "x")
        assert found.function == Global(*enum.split()) and found.args == ("flash",)
    calls: list[tuple[str, ...]] = [("torch device", "x"), ("flash", "x"), (enum,), (enum, enum), (), (enum, "a", "b")]
    for args in calls:
        with raises(CheckpointError, NOT_RUN, "builtins.getattr"):
            parse(call("builtins getattr", *args), "x")
    with raises(CheckpointError, NOT_RUN, "builtins.getattr of builtins.getattr"):  # nor a chain of getattr
        parse(call("builtins getattr", "builtins getattr", "x"), "x")


@pytest.mark.parametrize(
    "name", ["pathlib._localx PosixPath", "numpy.corex ndarray", "_io open", "pathlib._local Path"]
)
def test_no_more_than_the_names_that_moved(name: str) -> None:
    with raises(CheckpointError, NOT_RUN, name.replace(" ", ".")):
        parse(call(name, "x"), "x")


def test_names_are_known_by_one_module() -> None:
    moved: dict[str, Any] = symbolic.RENAMED_MODULES
    assert (
        not [name for name in symbolic.GLOBALS if symbolic._canonical_module(name.split()[0]) != name.split()[0]]
        and moved
    )
