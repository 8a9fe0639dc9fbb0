"""A thousand random corruptions of a checkpoint: none loads, and the damaged file is named. Old schemas still load."""

from __future__ import annotations

import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.format import find_checkpoint, find_damage, read_manifest, step_dir, with_digest
from engine.checkpoint.load import Reader, load_into
from engine.checkpoint.save import save
from engine.checkpoint.storage import DISK
from engine.checkpoint.tensorfile import write_safetensors
from engine.cli.main import main
from engine.errors import CheckpointError
from engine.optim.update_rules import MODEL
from tests.support.disk_double import File, MemoryDisk
from tests.support.errors import raises
from tests.support.tiny_states import BLOCK, FOLDER, METADATA, SHAPES, context, save_by_two_ranks, states, values

STEP = step_dir(FOLDER, 2)
FILES = ["manifest.json", "rank00000.safetensors", "rank00001.safetensors"]


def load(disk: Any, folder: Path = STEP) -> None:
    """Load as a resume does: the manifest, then all tensors of a rank. The values must be those that were saved."""
    held = states(0)
    with Reader(folder, disk) as reader:
        load_into(reader, held, context())
        step = reader.manifest.step
    for one in held:
        name = one.param.spec.chunks[0].name
        assert torch.equal(one.flat, values(step, one.kind, name, 0).view(-1)), "loaded, and wrong"


def data_of(disk: MemoryDisk, name: str) -> bytearray:
    file = disk.tree[str(STEP / name)]
    assert file is not None
    return file.data


Damage = Callable[[MemoryDisk, random.Random], set[str]]


def flip(disk: MemoryDisk, rng: random.Random) -> set[str]:
    name = rng.choice(FILES)
    data = data_of(disk, name)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return {name}


def cut(disk: MemoryDisk, rng: random.Random) -> set[str]:
    name = rng.choice(FILES)
    del data_of(disk, name)[rng.randrange(len(data_of(disk, name))) :]
    return {name}


def empty(disk: MemoryDisk, rng: random.Random) -> set[str]:
    name = rng.choice(FILES)
    data_of(disk, name).clear()
    return {name}


def longer(disk: MemoryDisk, rng: random.Random) -> set[str]:
    name = rng.choice(FILES)
    data_of(disk, name).extend(rng.randbytes(rng.randrange(1, 100)))
    return {name}


def zeroed(disk: MemoryDisk, rng: random.Random) -> set[str]:
    name = rng.choice(FILES)
    data = data_of(disk, name)
    begin = rng.randrange(len(data) - 8)
    data[begin : begin + 8] = bytes(8) if any(data[begin : begin + 8]) else b"\1" * 8
    return {name}


def swapped(disk: MemoryDisk, rng: random.Random) -> set[str]:
    a, b = rng.sample(FILES, 2)
    disk.tree[str(STEP / a)], disk.tree[str(STEP / b)] = disk.tree[str(STEP / b)], disk.tree[str(STEP / a)]
    return {a, b}


def missing(disk: MemoryDisk, rng: random.Random) -> set[str]:
    name = rng.choice(FILES)
    del disk.tree[str(STEP / name)]
    return {name}


def extra(disk: MemoryDisk, rng: random.Random) -> set[str]:
    name = f"rank{rng.randrange(2, 10**5):05d}.safetensors"
    disk.tree[str(STEP / name)] = File(0, bytearray(data_of(disk, rng.choice(FILES))))
    return {name}


def of_another_step(disk: MemoryDisk, rng: random.Random) -> set[str]:
    """Replace a file by the one of the previous step: same names, shapes and size."""
    name = rng.choice(FILES)
    disk.tree[str(STEP / name)] = disk.tree[str(step_dir(FOLDER, 1) / name)]
    return {name}


def moved(disk: MemoryDisk, rng: random.Random) -> set[str]:
    """Rename the folder to another step."""
    for path in disk._below(str(STEP)):
        del disk.tree[path]
    for path in disk._below(str(step_dir(FOLDER, 1))):
        disk.tree[path.replace("step_00000001", "step_00000002")] = disk.tree[path]
    return {"manifest.json"}


def folder_instead(disk: MemoryDisk, rng: random.Random) -> set[str]:
    name = rng.choice(FILES)
    disk.tree[str(STEP / name)] = None
    return {name}


def edited(disk: MemoryDisk, rng: random.Random) -> set[str]:
    """Change one value anywhere in the manifest, or swap two of the same kind, without updating its digest."""
    manifest = json.loads(bytes(data_of(disk, "manifest.json")))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(manifest)
    while True:
        node, key = rng.choice(places)
        old = node[key]
        others = [(n, k) for n, k in places if type(n[k]) is type(old) and n[k] != old]
        if isinstance(old, (dict, list)) and not others:
            continue
        if others and rng.random() < 0.7:
            other, where = rng.choice(others)
            node[key], other[where] = json.loads(json.dumps(other[where])), json.loads(json.dumps(old))
        elif isinstance(old, int):
            node[key] = old + rng.choice((-1, 1))
        elif isinstance(old, str):
            node[key] = old + "x"
        else:
            continue
        break
    text = json.dumps(manifest, indent=1).replace('{\n "xxh3_128"', '{"xxh3_128"', 1).encode()
    data_of(disk, "manifest.json")[:] = text
    return {"manifest.json"}


DAMAGES: list[Damage] = [
    flip, flip, flip, cut, empty, longer, zeroed, swapped, missing, extra,
    of_another_step, moved, folder_instead, edited, edited, edited,
]  # fmt: skip


def whole() -> MemoryDisk:
    disk = MemoryDisk()
    disk.make_folder(FOLDER.parent)
    for step in (1, 2):
        save_by_two_ranks(disk, step)
    return disk


def test_no_damage_loads_silently_and_the_file_is_named(trials: int = 1000) -> None:
    disk, rng, fired, silent, verified = whole(), random.Random(trials), Counter[str](), 0, 0
    load(disk)
    for _ in range(trials):
        kind, broken = rng.choice(DAMAGES), disk.copy()
        names = kind(broken, rng)
        assert {p: f and f.data for p, f in broken.tree.items()} != {p: f and f.data for p, f in disk.tree.items()}
        fired[kind.__name__] += 1
        try:
            load(broken)
            silent += 1
        except CheckpointError as error:
            assert any(name in str(error) for name in names), (kind.__name__, names, str(error))
        try:
            verified += bool(list(find_damage(STEP, read_manifest(STEP, broken), broken)))
        except CheckpointError:
            verified += 1
    print(f"damages: {trials} tried, {fired.total()} fired ({dict(fired)}), {silent} loaded in silence")
    assert silent == 0 and verified == trials


def test_verify_names_the_file_and_the_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path, states(1), context(), step=1, metadata=METADATA)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["verify", str(folder)])
    assert "all digests match" in capsys.readouterr().out
    file = folder / "rank00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    data[-8 * 7 * 2 - 1] ^= 1
    file.write_bytes(data)
    (folder / "left.safetensors").touch()
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["verify", str(folder)])
    reported = capsys.readouterr().err
    assert "3 errors" in reported and "left.safetensors: does not belong to this checkpoint" in reported
    assert "(tensor exp_avg_sq b.weight)" in reported and "(tensor exp_avg b.weight)" not in reported


@pytest.mark.parametrize("broken", [False, True])
def test_every_handle_is_given_back_and_a_damage_stops_all_threads(tmp_path: Path, broken: bool) -> None:
    folder = save(tmp_path, states(1), context(), step=1, metadata=METADATA)
    if broken:
        with (folder / "rank00000.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
    before = os.listdir("/proc/self/fd")
    if broken:
        with raises(CheckpointError, "checkpoint.digest-differs", folder / "rank00000.safetensors"):
            load(DISK, folder)
    else:
        load(DISK, folder)
    assert os.listdir("/proc/self/fd") == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


def test_links_are_not_followed(tmp_path: Path) -> None:
    folder = save(tmp_path, states(1), context(), step=1, metadata=METADATA)
    load(DISK, folder)
    file = folder / "rank00000.safetensors"
    elsewhere = file.rename(tmp_path / "elsewhere")
    file.symlink_to(elsewhere)
    with raises(CheckpointError, "checkpoint.file-not-as-listed", file):
        load(DISK, folder)
    with pytest.raises(OSError):
        DISK.open(file)
    with pytest.raises(OSError):
        DISK.create(file, 0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        DISK.open(tmp_path / "pipe")


def test_other_users_cannot_read(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        folder = save(tmp_path / "run/checkpoints", states(1), context(), step=1, metadata=METADATA)
    finally:
        os.umask(old)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o640"}
    assert {oct(path.stat().st_mode & 0o777) for path in (folder, folder.parent, folder.parent.parent)} == {"0o750"}


def test_blocks_are_read_as_far_as_they_are_wanted() -> None:
    """Damage in blocks that a rank does not need is not reported; in a block of a row that it needs it is."""
    disk = whole()
    with Reader(STEP, disk) as reader:
        part = next(p for p in reader.manifest.tensors[MODEL]["a.weight"].slices if p.file == FILES[1])
        assert BLOCK // (6 * 8) == 2 and part.shape == (2, 6)
        (data_of(disk, FILES[1]))[-1] ^= 1
        assert torch.equal(reader.read(MODEL, "a.weight", (1, 2), (2, 3)), values(2, MODEL, "a.weight", 0)[1:3, 2:5])
        with raises(CheckpointError, "checkpoint.digest-differs", "rank00000.safetensors", "exp_avg_sq/b.weight"):
            reader.read_whole("exp_avg_sq", "b.weight")


def test_schema_1_still_loads(tmp_path: Path) -> None:
    """As engine 0.1.0 wrote it: a digest per whole file, and none for the manifest."""
    import xxhash

    folder = tmp_path / "step_00000001"
    folder.mkdir()
    file = folder / "rank00000.safetensors"
    tensors, table = {}, {}
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        for name, shape in SHAPES.items():
            tensors[f"{kind}/{name}"] = values(1, kind, name, 0)
            part = {"file": file.name, "key": f"{kind}/{name}", "offset": [0] * len(shape), "shape": shape}
            table.setdefault(kind, {})[name] = {"shape": shape, "dtype": "F64", "slices": [part]}
    size = write_safetensors(file, tensors).size
    manifest: dict[str, Any] = {"schema_version": 1, "step": 1, "layout": {"tensor": 1}, **METADATA, "tensors": table}
    manifest["files"] = {file.name: {"size": size, "xxh3_128": xxhash.xxh3_128(file.read_bytes()).hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    load(DISK, find_checkpoint(tmp_path))
    assert not list(find_damage(folder, read_manifest(folder)))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with raises(CheckpointError, "checkpoint.digest-differs", file):
        load(DISK, folder)
    (folder / "manifest.json").write_bytes(with_digest(json.dumps({**manifest, "schema_version": 4}).encode()))
    with raises(CheckpointError, "checkpoint.schema-unknown", folder, 4, 3):
        load(DISK, folder)
