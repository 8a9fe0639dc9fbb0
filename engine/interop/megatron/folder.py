"""Reads Megatron-LM checkpoint folders: args, and global tensors by Megatron-core's names, for any parallel layout.

    latest_checkpointed_iteration.txt    names iter_XXXXXXX (or release) in the same folder, which can be given directly
    iter_XXXXXXX/                        `torch_dist`: a DCP folder with common.pt (args) and metadata.json
      mp_rank_TT[_PPP]/model_optim_rng.pt    legacy: an archive per rank; matrices sharded across T, layers across P

Both formats become one `ShardedTensor` per layer, such as `decoder.layers.N.mlp.linear_fc1.weight`. A gated fc1 is the
whole gate, then the whole up, as in `torch_dist`; in legacy files each tensor rank has its part of both.
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
_COLUMN = (
    "word_embeddings.weight",
    "output_layer.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
)  # sharded along dim 0
_GATED = ("linear_fc1.weight", "linear_fc1.bias")  # gate and up separately sharded along dim 0
_ROW = ("linear_proj.weight", "linear_fc2.weight")  # sharded along dim 1


@dataclass(frozen=True)
class RankFile:
    """A legacy file: its archive, and the chunks of the model (several if the schedule is interleaved)."""

    archive: Archive
    chunks: tuple[Values, ...]


@dataclass(frozen=True)
class MegatronFolder:
    """An open Megatron-LM checkpoint: folder, args, iteration, and the DCP folder or legacy files with its tensors."""

    folder: Path
    args: Values
    iteration: int
    source: DcpFolder | dict[tuple[int, int], RankFile]

    def tensors(self, *, gated: bool) -> dict[str, ShardedTensor]:
        """Megatron name -> tensor, for all tensors of the model, checked to be complete. Raises CheckpointError."""
        if isinstance(self.source, DcpFolder):
            return _dcp_tensors(self.source)
        return _legacy_tensors(self.source, gated)


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like a Megatron-LM checkpoint."""
    return any((path / name).exists() for name in (TRACKER, METADATA, FORMAT)) or any(path.glob("mp_rank_*"))


def open_folder(path: Path) -> MegatronFolder:
    """Open a Megatron-LM checkpoint folder. Raises CheckpointError."""
    folder = _folder(path)
    if (folder / METADATA).exists() or (folder / FORMAT).exists():
        _check_format(folder / FORMAT)
        archive = Archive.open(map_file(folder / COMMON), str(folder / COMMON))
        return MegatronFolder(folder, *_args_and_iteration(archive), DcpFolder(folder))
    ranks = _rank_files(folder)
    args, iteration = _args_and_iteration(ranks[0, 0].archive)
    return MegatronFolder(folder, args, iteration, ranks)


def _folder(path: Path) -> Path:
    """The folder of the checkpoint: the path, or the subfolder that its tracker file names."""
    if not path.is_dir():
        raise CheckpointError(
            "interop.megatron-not-a-folder", f"{path}: is not a folder; give one that Megatron-LM saved"
        )
    tracker = path / TRACKER
    if not tracker.exists():
        return path
    with tracker.open("rb") as file:
        text = file.read(64).strip().decode("ascii", "replace")
    if text != "release" and not re.fullmatch(r"\d{1,12}", text):
        raise CheckpointError(
            "interop.megatron-tracker-malformed",
            f"{tracker}: contains {shown(text)}, which is not a number; give the iter_... folder itself",
        )
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise CheckpointError(
            "interop.megatron-tracked-step-missing",
            f"{tracker}: names {folder.name}, which does not exist; give another iter_... folder",
        )
    return folder


def _check_format(file: Path) -> None:
    try:
        backend = json.loads(bytes(map_file(file)[: 1 << 20]))["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            "interop.megatron-metadata-json-damaged", f"{file}: damaged ({shown(str(error))}); use another copy"
        ) from None
    if backend != "torch_dist":
        raise CheckpointError(
            "interop.megatron-format-not-read",
            f"{file}: format {shown(backend)} is not read, only torch_dist and the legacy format",
        )


def _args_and_iteration(archive: Archive) -> tuple[Values, int]:
    """(args, iteration) from an archive."""
    top = as_dict(archive.value) or {}
    args = top.get("args")
    if not is_call(args, "argparse Namespace") or not isinstance(args.state, dict):  # type: ignore[union-attr]
        raise CheckpointError(
            "interop.megatron-args-missing",
            f"{archive.where}: has no `args`, which describe the model; only checkpoints that were saved by "
            "Megatron-LM's training have them",
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
                f"{source.where}: {shown(min(twice))} exists both per layer and stacked; damaged",
            )
        found |= new
    _join_halves(found)
    for tensor in found.values():
        for part in tensor.parts:
            part.open_tensor()  # opens the blob, which checks shape and dtype before any read
    return found


def _join_halves(tensors: dict[str, ShardedTensor]) -> None:
    """Join gate and up that were saved as separate tensors (`singleton_local_shards`) into one fc1."""
    for gate_name in [name for name in tensors if name.endswith(("linear_fc1.weight_w", "linear_fc1.bias_w"))]:
        name = gate_name.removesuffix("_w")
        gate, up = tensors.pop(gate_name), tensors.pop(f"{name}_v", None)
        if up is None or up.shape != gate.shape or up.dtype != gate.dtype or name in tensors:
            raise CheckpointError(
                "interop.megatron-gate-half-missing", f"{gate.where}: has no second half of the same shape; damaged"
            )
        tensors[name] = _concatenate(gate.where, [gate, up])


def _concatenate(where: str, tensors: list[ShardedTensor]) -> ShardedTensor:
    """Concatenate tensors along dim 0, without reading them."""
    parts, rows = [], 0
    for tensor in tensors:
        parts += [replace(p, offset=(p.offset[0] + rows, *p.offset[1:])) for p in tensor.parts]
        rows += tensor.shape[0]
    return ShardedTensor(where, tensors[0].dtype, (rows, *tensors[0].shape[1:]), tuple(parts))


def _rank_files(folder: Path) -> dict[tuple[int, int], RankFile]:
    """(tensor rank, pipeline rank) -> file, for a complete grid of ranks. Raises CheckpointError."""
    found: dict[tuple[int, int], RankFile] = {}
    for entry in sorted(folder.glob("mp_rank_*"))[: MAX_RANKS + 1]:
        match = _RANK.fullmatch(entry.name)
        if match is None or match[3] or len(found) >= MAX_RANKS:
            raise CheckpointError(
                "interop.megatron-rank-folder-unknown",
                f"{entry}: is not named mp_rank_TT or mp_rank_TT_PPP; expert-parallel files are not read",
            )
        rank = (int(match[1]), int(match[2] or 0))
        if rank in found:
            raise CheckpointError(
                "interop.megatron-rank-repeated", f"{entry}: tensor rank {rank[0]} of stage {rank[1]} exists twice"
            )
        found[rank] = _rank_file(entry / RANK_FILE)
    if not found:
        raise CheckpointError(
            "interop.megatron-no-checkpoint",
            f"{folder}: has neither {METADATA} nor mp_rank_... folders, so it is not a Megatron-LM checkpoint",
        )
    t, p = (1 + max(rank[axis] for rank in found) for axis in (0, 1))
    missing = [(i, j) for i in range(t) for j in range(p) if (i, j) not in found][:3] if len(found) != t * p else []
    if missing:
        raise CheckpointError(
            "interop.megatron-ranks-missing",
            f"{folder}: the files of (tensor rank, stage) {missing} are missing; copy the whole folder",
        )
    return found


def _rank_file(path: Path) -> RankFile:
    archive = Archive.open(map_file(path), str(path))
    top = as_dict(archive.value) or {}
    chunks = [as_dict(top[name]) for name in ("model", *(f"model{i}" for i in range(64))) if name in top]
    if not chunks or any(chunk is None for chunk in chunks):
        raise CheckpointError(
            "interop.megatron-model-missing", f"{path}: has no `model`; it is damaged, or from another program"
        )
    for chunk in chunks:
        if chunk and "language_model" in chunk:
            raise CheckpointError(
                "interop.megatron-before-core",
                f"{path}: is of a model before Megatron-core; convert it first with Megatron-LM's "
                "tools/checkpoint/convert.py and --target-ckpt-format torch_dist",
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
                        f"{ranks[0, stage].archive.where}: {shown(min(unlike))} is missing on some tensor ranks",
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
    """Name -> tensor, for chunk `number` of a rank's model."""
    if number >= len(file.chunks):
        raise CheckpointError(
            "interop.megatron-chunk-counts-differ",
            f"{file.archive.where}: has {len(file.chunks)} chunks of the model, but other ranks have more",
        )
    found = {}
    for name, value in file.chunks[number].items():
        if not isinstance(name, str):
            raise CheckpointError(
                "interop.megatron-tensor-name-malformed",
                f"{file.archive.where}: {shown(name)} is not a name of a tensor",
            )
        if not _NOT_MODEL.fullmatch(name):
            found[name] = file.archive.tensor(value, shown(name))
    return found


def _join_ranks(name: str, shards: list[StoredTensor], gated: bool) -> ShardedTensor:
    """Join the shards of all tensor ranks to a global tensor. Raises CheckpointError."""
    first, where = shards[0], f"{shards[0].archive.where}: {shown(name)}"
    if any(x.shape != first.shape or x.dtype != first.dtype for x in shards) or 0 in first.shape:
        raise CheckpointError(
            "interop.megatron-ranks-do-not-join",
            f"{where}: shapes or dtypes differ between tensor ranks, or a shape is empty; damaged",
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
    """Raise CheckpointError unless two copies of a tensor are bitwise equal. Compares blocks of 4,096 rows."""
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
            f"{one.where}: differs from its copy on another rank ({other.where})",
        )
