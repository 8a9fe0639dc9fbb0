"""Checkpoints of Megatron-LM as a source of canonical tensors: which model they are, and under which names.

`open_megatron(path)` gives what engine.checkpoint.load.Reader gives (`names`, `read`, `whole`), reading rectangles of
mapped files, and the ModelConfig that Megatron's args mean. Nothing is unpickled (docs/megatron.md). What this engine's
model cannot compute is refused by its name in args; so is a tensor that has no place in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from pydantic import ValidationError
from torch import Tensor

from engine.checkpoint.format import DTYPE_NAMES, MODEL
from engine.checkpoint.megatron_files import open_stored, require_same
from engine.checkpoint.megatron_names import Entry, Rows, model_facts, table
from engine.checkpoint.sheets import Sheet
from engine.checkpoint.symbolic import shown
from engine.config import ModelConfig
from engine.errors import CheckpointError


@dataclass(frozen=True)
class Located:
    """A canonical tensor: its shape, the name of its dtype, and the rows of a sheet that it is."""

    shape: tuple[int, ...]
    dtype: str
    sheet: Sheet
    rows: Rows


class MegatronSource:
    """Canonical tensors of a checkpoint. `cfg`: its model; `step`: Megatron's iteration. A context manager.

    entries: kind -> canonical name -> where it is. Of the model only: optimizer state is not imported.
    """

    def __init__(self, folder: Path, cfg: ModelConfig, step: int, tensors: dict[str, Located]):
        self.folder, self.cfg, self.step = folder, cfg, step
        self.entries = {MODEL: tensors}

    def __enter__(self) -> MegatronSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.entries = {}  # the maps go with the last view of them

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Compare torch's checksums of every `parts`-th storage, from number `part` on. Raises CheckpointError."""
        sheets = [entry.sheet for entry in self.entries[MODEL].values()]
        stored = {(id(x.archive), x.record): x for sheet in sheets for x in (p.stored() for p in sheet.parts)}
        for tensor in list(stored.values())[part::parts]:
            tensor.archive.checked(tensor.record)

    def names(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Canonical name -> global shape of all tensors of a kind."""
        return {name: entry.shape for name, entry in self.entries.get(kind, {}).items()}

    def read(self, kind: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A rectangle of a tensor in its stored dtype. Raises CheckpointError."""
        tensor = self.entries.get(kind, {}).get(name)
        if tensor is None:
            raise CheckpointError(f"{self.folder}: holds no {kind} tensor {name}; it is of another model")
        if len(shape) != len(tensor.shape) or any(o + n > size for o, n, size in zip(offset, shape, tensor.shape)):
            raise CheckpointError(
                f"{self.folder}: {name} has shape {list(tensor.shape)}, but rows {offset}+{shape} are wanted"
            )
        out, rows = torch.empty(shape, dtype=tensor.sheet.dtype), tensor.rows
        done = 0
        while done < shape[0]:
            run, inside = divmod(offset[0] + done, rows.each)
            number = min(rows.each - inside, shape[0] - done)
            tensor.sheet.read_into(out[done : done + number], (run * rows.period + rows.first + inside, *offset[1:]))
            done += number
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole canonical tensor."""
        shape = self.names(kind)[name]
        return self.read(kind, name, (0,) * len(shape), shape)


def open_megatron(path: Path, vocab_size: int | None = None) -> MegatronSource:
    """Open a `torch_dist` or legacy checkpoint of Megatron-LM.

    vocab_size: rows of the embedding to keep, where args do not say it (Megatron pads the vocabulary and often forgets
    its true size). Without, the padding stays: rows that were never trained towards a token.
    Raises CheckpointError: damaged or hostile files, models that this engine does not have.
    """
    stored = open_stored(path)
    where = str(stored.folder)
    facts = model_facts(stored.args, where)
    sheets = stored.sheets(gated=facts["gated_mlp"])
    embedding = sheets.get("embedding.word_embeddings.weight")
    if embedding is None or not embedding.shape:
        raise CheckpointError(f"{where}: embedding.word_embeddings.weight is missing; the folder is not whole")
    padded = embedding.shape[0]
    facts["vocab_size"] = vocab_size or facts["vocab_size"] or padded
    try:
        model = ModelConfig.model_validate(facts)
    except ValidationError as error:
        text = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors()[:3])
        raise CheckpointError(f"{where}: args are of no model: {text}") from None
    if not facts["vocab_size"] <= padded:
        raise CheckpointError(f"{where}: a vocabulary of {facts['vocab_size']}, but the embedding has {padded} rows")
    if model.tie_embeddings and (copy := sheets.pop("output_layer.weight", None)):
        require_same(embedding, copy)
    tensors = {}
    for entry in table(model, padded):
        sheet = _take(sheets, entry, where)
        tensors[entry.canonical] = Located(entry.shape, DTYPE_NAMES[sheet.dtype], sheet, entry.rows)
    used = {id(tensor.sheet) for tensor in tensors.values()}
    if unknown := [name for name, sheet in sheets.items() if id(sheet) not in used]:
        listed = ", ".join(shown(name) for name in unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise CheckpointError(f"{where}: {len(unknown)} tensors have no place in the model: {listed}")
    return MegatronSource(stored.folder, model, stored.iteration, tensors)


def _take(sheets: dict[str, Sheet], entry: Entry, where: str) -> Sheet:
    """The sheet that an entry of the table is rows of. Raises CheckpointError."""
    have = [sheets[name] for name in entry.names if name in sheets]
    if len(have) != 1:
        fault = "is there twice" if have else "is missing"
        raise CheckpointError(
            f"{where}: {' or '.join(entry.names)} {fault}; args are of another model, or it is damaged"
        )
    sheet = have[0]
    if sheet.shape != entry.fused or sheet.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{sheet.where}: a {sheet.dtype} of shape {list(sheet.shape)}, but args want {list(entry.fused)}; "
            "they are of another model"
        )
    return sheet
