"""Reads canonical tensors and the model config from a Megatron-LM checkpoint.

`open_megatron(path)` has the interface of engine.checkpoint.load.Reader (`shapes`, `read`, `read_whole`) and the
ModelConfig that Megatron's args describe. It reads rectangles of memory-mapped files. Nothing is unpickled
(docs/megatron.md). Args that this engine's model cannot compute are rejected by name; so is a tensor that has no place
in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from engine.checkpoint.load import TensorSource
from engine.checkpoint.tensorfile import DTYPE_NAMES
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError
from engine.interop.megatron.folder import open_folder, require_same
from engine.interop.megatron.names import RowPattern, TensorMapping, map_tensors, model_fields_from_args
from engine.interop.megatron.sharded_tensor import ShardedTensor
from engine.interop.megatron.symbolic import shown
from engine.optim.update_rules import MODEL


@dataclass(frozen=True)
class SourceTensor:
    """A canonical tensor: shape, dtype as safetensors names it, and its rows in a Megatron tensor."""

    shape: tuple[int, ...]
    dtype: str
    stored: ShardedTensor
    rows: RowPattern


class MegatronSource(TensorSource[SourceTensor]):
    """Reads canonical tensors from a Megatron-LM checkpoint. cfg: its model. step: its iteration.

    Only the model: optimizer state is not imported.
    """

    def __init__(self, folder: Path, cfg: ModelConfig, step: int, tensors: dict[str, SourceTensor]):
        super().__init__(folder, {MODEL: tensors})
        self.cfg, self.step = cfg, step

    def close(self) -> None:
        self.entries = {}  # files are unmapped with their last view

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Check torch's checksums of every `parts`-th storage from number `part`. Raises CheckpointError."""
        tensors = [entry.stored for entry in self.entries[MODEL].values()]
        storages = {(id(x.archive), x.record): x for tensor in tensors for x in (p.open_tensor() for p in tensor.parts)}
        for tensor in list(storages.values())[part::parts]:
            tensor.archive.read_member(tensor.record)

    def _fill_tasks(
        self, name: str, entry: SourceTensor, offset: tuple[int, ...], out: Tensor
    ) -> Iterator[Callable[[], None]]:
        rows, done = entry.rows, 0
        while done < out.shape[0]:
            run, inside = divmod(offset[0] + done, rows.each)
            number = min(rows.each - inside, out.shape[0] - done)
            at = (run * rows.period + rows.first + inside, *offset[1:])
            yield partial(self._fill, out[done : done + number], entry.stored, at)
            done += number

    def _fill(self, target: Tensor, stored: ShardedTensor, at: tuple[int, ...]) -> None:
        block = torch.empty(target.shape, dtype=stored.dtype)
        stored.read_into(block, at)
        target.copy_(block)


def open_megatron(path: Path, vocab_size: int | None = None) -> MegatronSource:
    """Open a `torch_dist` or legacy checkpoint of Megatron-LM.

    vocab_size: number of embedding rows to keep, if args do not have it (Megatron pads the vocabulary and often does
    not store its true size). Otherwise the padding is kept: rows that no token ever used.
    Raises CheckpointError for damaged or malicious files and for unsupported models.
    """
    source = open_folder(path)
    where = str(source.folder)
    fields = model_fields_from_args(source.args, where)
    stored_tensors = source.tensors(gated=fields["gated_mlp"])
    embedding = stored_tensors.get("embedding.word_embeddings.weight")
    if embedding is None or not embedding.shape:
        raise CheckpointError(
            "interop.megatron-embedding-missing",
            f"{where}: embedding.word_embeddings.weight is missing; the folder is incomplete",
        )
    padded = embedding.shape[0]
    fields["vocab_size"] = vocab_size or fields["vocab_size"] or padded
    try:
        model = ModelConfig.model_validate(fields)
    except ValidationError as error:
        text = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors()[:3])
        raise CheckpointError(
            "interop.megatron-args-of-no-model", f"{where}: the args do not describe a valid model: {text}"
        ) from None
    if not fields["vocab_size"] <= padded:
        raise CheckpointError(
            "interop.megatron-vocabulary-differs",
            f"{where}: the vocabulary has {fields['vocab_size']} tokens, but the embedding has only {padded} rows",
        )
    if model.tie_embeddings and (copy := stored_tensors.pop("output_layer.weight", None)):
        require_same(embedding, copy)
    tensors = {}
    for entry in map_tensors(model, padded):
        stored = _lookup(stored_tensors, entry, where)
        tensors[entry.canonical] = SourceTensor(entry.shape, DTYPE_NAMES[stored.dtype], stored, entry.rows)
    used = {id(tensor.stored) for tensor in tensors.values()}
    if unknown := [name for name, stored in stored_tensors.items() if id(stored) not in used]:
        listed = ", ".join(shown(name) for name in unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise CheckpointError(
            "interop.megatron-tensors-unknown", f"{where}: {len(unknown)} tensors have no place in the model: {listed}"
        )
    return MegatronSource(source.folder, model, source.iteration, tensors)


def _lookup(stored_tensors: dict[str, ShardedTensor], entry: TensorMapping, where: str) -> ShardedTensor:
    """The stored tensor that contains a canonical one. Raises CheckpointError."""
    have = [stored_tensors[name] for name in entry.names if name in stored_tensors]
    if len(have) != 1:
        problem = "exists twice" if have else "is missing"
        raise CheckpointError(
            "interop.megatron-tensor-missing",
            f"{where}: {' or '.join(entry.names)} {problem}; the args are from another model, or it is damaged",
        )
    stored = have[0]
    if stored.shape != entry.fused or stored.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            "interop.megatron-shape-differs",
            f"{stored.where}: is {stored.dtype} of shape {list(stored.shape)}, but by the args it is "
            f"{list(entry.fused)}; they are from another model",
        )
    return stored
