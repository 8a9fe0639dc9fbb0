"""Megatron-LM's checkpoint folders: args and tensors by Megatron-core's own names, whatever layout wrote them.

    latest_checkpointed_iteration.txt    names iter_XXXXXXX (or release); the folder beside it may be given too
    iter_XXXXXXX/                        `torch_dist`: a DCP folder with common.pt (args) and metadata.json
      mp_rank_TT[_PPP]/model_optim_rng.pt    legacy: one archive a rank; matrices cut over T, layers over P

Both become sheets (`tensors`) of global tensors, one a layer: `decoder.layers.N.mlp.linear_fc1.weight`.
A gated fc1 is all of gate, then all of up, as `torch_dist` has it; legacy files hold both halves of each tensor rank.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.errors import CheckpointError
from engine.interop.megatron.archive import Archive, StoredTensor, map_file
from engine.interop.megatron.dcp import METADATA, DcpFolder
from engine.interop.megatron.names import Values
from engine.interop.megatron.sharded_tensor import ShardedTensor, TensorPart
from engine.interop.megatron.symbolic import as_dict, is_call, shown

TRACKER = "latest_checkpointed_iteration.txt"
COMMON, FORMAT, RANK_FILE = "common.pt", "metadata.json", "model_optim_rng.pt"
MAX_RANKS = 4096

_STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
_LAYER = re.compile(r"decoder\.layers\.(\d{1,4})\.(.+)")
_RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?(_\d{3})?")
_NOT_MODEL = re.compile(r"(chained_\d+\.)?optimizer\..*|rng_state.*|.*\._extra_state(/.*)?")
_COLUMN = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")  # cut along dim 0
_GATED = ("linear_fc1.weight", "linear_fc1.bias")  # cut along dim 0 too, each half for itself
_ROW = ("linear_proj.weight", "linear_fc2.weight")  # cut along dim 1


@dataclass(frozen=True)
class RankFile:
    """One legacy file: the description of everything, and the chunks of the model (several when interleaved)."""

    archive: Archive
    chunks: tuple[Values, ...]


@dataclass(frozen=True)
class MegatronFolder:
    """A checkpoint of Megatron: its folder, args, iteration, and what holds the tensors."""

    folder: Path
    args: Values
    iteration: int
    source: DcpFolder | dict[tuple[int, int], RankFile]

    def tensors(self, *, gated: bool) -> dict[str, ShardedTensor]:
        """Name -> checked sheet of every tensor of the model. Raises CheckpointError."""
        if isinstance(self.source, DcpFolder):
            return _dcp_tensors(self.source)
        return _legacy_tensors(self.source, gated)


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like one that Megatron-LM saved."""
    return any((path / name).exists() for name in (TRACKER, METADATA, FORMAT)) or any(path.glob("mp_rank_*"))


def open_folder(path: Path) -> MegatronFolder:
    """Open a folder of Megatron. Raises CheckpointError."""
    folder = _folder(path)
    if (folder / METADATA).exists() or (folder / FORMAT).exists():
        _check_format(folder / FORMAT)
        archive = Archive.open(map_file(folder / COMMON), str(folder / COMMON))
        return MegatronFolder(folder, *_args_and_iteration(archive), DcpFolder(folder))
    ranks = _rank_files(folder)
    args, iteration = _args_and_iteration(ranks[0, 0].archive)
    return MegatronFolder(folder, args, iteration, ranks)


def _folder(path: Path) -> Path:
    """The checkpoint's own folder: the path, or the one that the tracker file beside its iterations names."""
    if not path.is_dir():
        raise CheckpointError("interop.megatron-not-a-folder", f"{path}: is no folder; give one that Megatron-LM saved")
    tracker = path / TRACKER
    if not tracker.exists():
        return path
    with tracker.open("rb") as file:
        text = file.read(64).strip().decode("ascii", "replace")
    if text != "release" and not re.fullmatch(r"\d{1,12}", text):
        raise CheckpointError(
            "interop.megatron-tracker-malformed",
            f"{tracker}: holds {shown(text)}, no number; give the iter_... folder itself",
        )
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise CheckpointError(
            "interop.megatron-tracked-step-missing",
            f"{tracker}: names {folder.name}, which is not there; give another iter_... folder",
        )
    return folder


def _check_format(file: Path) -> None:
    try:
        fields = json.loads(bytes(map_file(file)[: 1 << 20]))
        backend = fields["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            "interop.megatron-metadata-json-damaged", f"{file}: damaged ({shown(str(error))}); take another copy"
        ) from None
    if backend != "torch_dist":
        raise CheckpointError(
            "interop.megatron-format-not-read",
            f"{file}: format {shown(backend)} is not read; only torch_dist and the legacy format",
        )


def _args_and_iteration(archive: Archive) -> tuple[Values, int]:
    """args and iteration of an archive."""
    top = as_dict(archive.value) or {}
    args = top.get("args")
    if not is_call(args, "argparse Namespace") or not isinstance(args.state, dict):  # type: ignore[union-attr]
        raise CheckpointError(
            "interop.megatron-args-missing",
            f"{archive.where}: holds no `args`, which say what the model is; only checkpoints that Megatron-LM's own "
            "training saved have them",
        )
    iteration = top.get("iteration")
    return args.state, iteration if isinstance(iteration, int) and 0 <= iteration < 1 << 53 else 0  # type: ignore[union-attr]


def _dcp_tensors(source: DcpFolder) -> dict[str, ShardedTensor]:
    found: dict[str, ShardedTensor] = {}
    for name in source.names():
        if _NOT_MODEL.fullmatch(name):
            continue
        tensor = source.tensor(name)
        if stacked := _STACKED.fullmatch(name):
            new = {f"decoder.layers.{i}.{stacked[1]}": layer for i, layer in enumerate(tensor.layers())}
        else:
            tensor.check()
            new = {name: tensor}
        if twice := found.keys() & new.keys():
            raise CheckpointError(
                "interop.megatron-tensor-repeated",
                f"{source.where}: {shown(min(twice))} is there alone and stacked; damaged",
            )
        found |= new
    _join_halves(found)
    for tensor in found.values():
        for part in tensor.parts:
            part.open_tensor()  # opens the blob: shape and dtype are compared before anything is read
    return found


def _join_halves(tensors: dict[str, ShardedTensor]) -> None:
    """Gate and up that were saved as tensors of their own (`singleton_local_shards`) become one fc1 again."""
    for gate_name in [name for name in tensors if name.endswith(("linear_fc1.weight_w", "linear_fc1.bias_w"))]:
        name = gate_name.removesuffix("_w")
        gate, up = tensors.pop(gate_name), tensors.pop(f"{name}_v", None)
        if up is None or up.shape != gate.shape or up.dtype != gate.dtype or name in tensors:
            raise CheckpointError(
                "interop.megatron-gate-half-missing", f"{gate.where}: has no second half of the same shape; damaged"
            )
        tensors[name] = _concatenate(gate.where, [gate, up])


def _concatenate(where: str, tensors: list[ShardedTensor]) -> ShardedTensor:
    """Sheets one below the other along dim 0."""
    parts, rows = [], 0
    for tensor in tensors:
        parts += [replace(p, offset=(p.offset[0] + rows, *p.offset[1:])) for p in tensor.parts]
        rows += tensor.shape[0]
    return ShardedTensor(where, tensors[0].dtype, (rows, *tensors[0].shape[1:]), tuple(parts))


def _rank_files(folder: Path) -> dict[tuple[int, int], RankFile]:
    """(tensor rank, pipeline rank) -> file; all of a full grid."""
    found: dict[tuple[int, int], RankFile] = {}
    for entry in sorted(folder.glob("mp_rank_*"))[: MAX_RANKS + 1]:
        match = _RANK.fullmatch(entry.name)
        if match is None or match[3] or len(found) >= MAX_RANKS:
            raise CheckpointError(
                "interop.megatron-rank-folder-unknown",
                f"{entry}: is no mp_rank_TT or mp_rank_TT_PPP; expert-parallel files are not read",
            )
        rank = (int(match[1]), int(match[2] or 0))
        if rank in found:
            raise CheckpointError(
                "interop.megatron-rank-repeated", f"{entry}: tensor rank {rank[0]} of stage {rank[1]} is there twice"
            )
        found[rank] = _rank_file(entry / RANK_FILE)
    if not found:
        raise CheckpointError(
            "interop.megatron-no-checkpoint",
            f"{folder}: holds neither {METADATA} nor mp_rank_... folders; no checkpoint of Megatron",
        )
    t, p = (1 + max(rank[axis] for rank in found) for axis in (0, 1))
    missing = [(i, j) for i in range(t) for j in range(p) if (i, j) not in found][:3] if len(found) != t * p else []
    if missing:
        raise CheckpointError(
            "interop.megatron-ranks-missing",
            f"{folder}: no files of (tensor rank, stage) {missing}; copy the whole folder",
        )
    return found


def _rank_file(path: Path) -> RankFile:
    archive = Archive.open(map_file(path), str(path))
    top = as_dict(archive.value) or {}
    chunks = [as_dict(top[name]) for name in ("model", *(f"model{i}" for i in range(64))) if name in top]
    if not chunks or any(chunk is None for chunk in chunks):
        raise CheckpointError(
            "interop.megatron-model-missing", f"{path}: holds no `model`; it is damaged, or of another program"
        )
    for chunk in chunks:
        if chunk and "language_model" in chunk:
            raise CheckpointError(
                "interop.megatron-before-core",
                f"{path}: is of Megatron's models before Megatron-core; let its tools/checkpoint/convert.py "
                "save it with --target-ckpt-format torch_dist first",
            )
    return RankFile(archive, tuple(chunk for chunk in chunks if chunk is not None))


def _legacy_tensors(ranks: dict[tuple[int, int], RankFile], gated: bool) -> dict[str, ShardedTensor]:
    num_tensor_ranks, num_stages = (1 + max(rank[axis] for rank in ranks) for axis in (0, 1))
    found: dict[str, ShardedTensor] = {}
    layers = 0
    for number in range(max(len(file.chunks) for file in ranks.values())):
        for stage in range(num_stages):
            shards = [_chunk_tensors(ranks[t, stage], number) for t in range(num_tensor_ranks)]
            names, depth = shards[0].keys(), 0
            for other in shards[1:]:
                if unlike := names ^ other.keys():
                    raise CheckpointError(
                        "interop.megatron-tensor-not-on-all-ranks",
                        f"{ranks[0, stage].archive.where}: {shown(min(unlike))} is not on all ranks",
                    )
            for name in names:
                full = name
                if match := _LAYER.fullmatch(name):
                    full = f"decoder.layers.{layers + int(match[1])}.{match[2]}"
                    depth = max(depth, int(match[1]) + 1)
                tensor = _join_ranks(name, [shard[name] for shard in shards], gated)
                if full in found:
                    require_same(found[full], tensor)
                found[full] = tensor
            layers += depth
    return found


def _chunk_tensors(file: RankFile, number: int) -> dict[str, StoredTensor]:
    """Name -> tensor of one chunk of a rank's model."""
    if number >= len(file.chunks):
        raise CheckpointError(
            "interop.megatron-chunk-counts-differ",
            f"{file.archive.where}: has {len(file.chunks)} chunks of the model, other ranks have more",
        )
    found = {}
    for name, value in file.chunks[number].items():
        if not isinstance(name, str):
            raise CheckpointError(
                "interop.megatron-tensor-name-malformed", f"{file.archive.where}: {shown(name)} as the name of a tensor"
            )
        if not _NOT_MODEL.fullmatch(name):
            found[name] = file.archive.tensor(value, shown(name))
    return found


def _join_ranks(name: str, shards: list[StoredTensor], gated: bool) -> ShardedTensor:
    """The global tensor of the shards of all tensor ranks. Raises CheckpointError."""
    first, where = shards[0], f"{shards[0].archive.where}: {shown(name)}"
    if any(x.shape != first.shape or x.dtype != first.dtype for x in shards) or 0 in first.shape:
        raise CheckpointError(
            "interop.megatron-ranks-do-not-join",
            f"{where}: shapes or dtypes differ over the tensor ranks, or a shape is empty; damaged",
        )
    if name.endswith(_ROW) and len(first.shape) == 2:
        rows, width = first.shape
        parts = [_part((0, i * width), first.shape, x, (0, 0)) for i, x in enumerate(shards)]
        tensor = ShardedTensor(where, first.dtype, (rows, width * len(shards)), tuple(parts))
    elif name.endswith((*_COLUMN, *_GATED)) and first.shape:
        runs = 2 if gated and name.endswith(_GATED) else 1
        rows, rest = first.shape[0] // runs, first.shape[1:]
        none = (0,) * len(rest)
        parts = [
            _part(((run * len(shards) + i) * rows, *none), (rows, *rest), x, (run * rows, *none))
            for run in range(runs)
            for i, x in enumerate(shards)
        ]
        tensor = ShardedTensor(where, first.dtype, (runs * rows * len(shards), *rest), tuple(parts))
    else:
        copies = [
            ShardedTensor(where, x.dtype, x.shape, (_part((0,) * len(x.shape), x.shape, x, None),)) for x in shards
        ]
        tensor = copies[0]
        for other in copies[1:]:
            require_same(tensor, other)
    tensor.check()
    return tensor


def _part(
    offset: tuple[int, ...], shape: tuple[int, ...], stored: StoredTensor, origin: tuple[int, ...] | None
) -> TensorPart:
    return TensorPart(offset, shape, lambda: stored, offset if origin is None else origin)


def require_same(one: ShardedTensor, other: ShardedTensor) -> None:
    """Raises CheckpointError unless two copies of a tensor are equal, bit by bit, compared by blocks of rows."""
    equal = one.shape == other.shape and one.dtype == other.dtype
    rows = one.shape[0] if one.shape else 0
    for begin in range(0, rows if equal else 0, 4096):
        blocks = [torch.empty((min(4096, rows - begin), *one.shape[1:]), dtype=one.dtype) for _ in range(2)]
        for tensor, block in zip((one, other), blocks):
            tensor.read_into(block, (begin, *(0,) * (len(one.shape) - 1)))
        equal = equal and torch.equal(*(block.view(torch.uint8) for block in blocks))
    if not equal:
        raise CheckpointError(
            "interop.megatron-copies-differ",
            f"{one.where}: copies that should be the same differ on another rank ({other.where})",
        )
