"""Checkpoints of Megatron-LM as a source of canonical tensors: which model they are, and under which names.

`open_megatron(path)` gives what engine.checkpoint.load.Reader gives (`names`, `read`, `whole`), reading rectangles of
mapped files, and the ModelConfig that Megatron's args mean. Nothing is unpickled (docs/megatron.md). What this engine's
model cannot compute is refused by its name in args; so is a tensor that has no place in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from engine.checkpoint.format import MODEL
from engine.checkpoint.load import TensorSource
from engine.checkpoint.tensorfile import DTYPE_NAMES
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError
from engine.interop.megatron.folder import open_stored, require_same
from engine.interop.megatron.names import MegatronTensor, Rows, model_facts, table
from engine.interop.megatron.sheets import Sheet
from engine.interop.megatron.symbolic import shown


@dataclass(frozen=True)
class SheetTensor:
    """A canonical tensor: its shape, the name of its dtype, and the rows of a sheet that it is."""

    shape: tuple[int, ...]
    dtype: str
    sheet: Sheet
    rows: Rows


class MegatronSource(TensorSource[SheetTensor]):
    """The source that one of Megatron's checkpoints is. `cfg`: its model; `step`: its iteration.

    Of the model only: optimizer state is not imported.
    """

    def __init__(self, folder: Path, cfg: ModelConfig, step: int, tensors: dict[str, SheetTensor]):
        super().__init__(folder, {MODEL: tensors})
        self.cfg, self.step = cfg, step

    def close(self) -> None:
        self.entries = {}  # the maps go with the last view of them

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Compare torch's checksums of every `parts`-th storage, from number `part` on. Raises CheckpointError."""
        sheets = [entry.sheet for entry in self.entries[MODEL].values()]
        stored = {(id(x.archive), x.record): x for sheet in sheets for x in (p.stored() for p in sheet.parts)}
        for tensor in list(stored.values())[part::parts]:
            tensor.archive.checked(tensor.record)

    def _works(
        self, name: str, entry: SheetTensor, offset: tuple[int, ...], out: Tensor
    ) -> Iterator[Callable[[], None]]:
        rows, done = entry.rows, 0
        while done < out.shape[0]:
            run, inside = divmod(offset[0] + done, rows.each)
            number = min(rows.each - inside, out.shape[0] - done)
            at = (run * rows.period + rows.first + inside, *offset[1:])
            yield partial(self._fill, out[done : done + number], entry.sheet, at)
            done += number

    def _fill(self, target: Tensor, sheet: Sheet, at: tuple[int, ...]) -> None:
        block = torch.empty(target.shape, dtype=sheet.dtype)
        sheet.read_into(block, at)
        target.copy_(block)


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
        raise CheckpointError(
            "interop.megatron-embedding-missing",
            f"{where}: embedding.word_embeddings.weight is missing; the folder is not whole",
        )
    padded = embedding.shape[0]
    facts["vocab_size"] = vocab_size or facts["vocab_size"] or padded
    try:
        model = ModelConfig.model_validate(facts)
    except ValidationError as error:
        text = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors()[:3])
        raise CheckpointError("interop.megatron-args-of-no-model", f"{where}: args are of no model: {text}") from None
    if not facts["vocab_size"] <= padded:
        raise CheckpointError(
            "interop.megatron-vocabulary-differs",
            f"{where}: a vocabulary of {facts['vocab_size']}, but the embedding has {padded} rows",
        )
    if model.tie_embeddings and (copy := sheets.pop("output_layer.weight", None)):
        require_same(embedding, copy)
    tensors = {}
    for entry in table(model, padded):
        sheet = _take(sheets, entry, where)
        tensors[entry.canonical] = SheetTensor(entry.shape, DTYPE_NAMES[sheet.dtype], sheet, entry.rows)
    used = {id(tensor.sheet) for tensor in tensors.values()}
    if unknown := [name for name, sheet in sheets.items() if id(sheet) not in used]:
        listed = ", ".join(shown(name) for name in unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise CheckpointError(
            "interop.megatron-tensors-unknown", f"{where}: {len(unknown)} tensors have no place in the model: {listed}"
        )
    return MegatronSource(stored.folder, model, stored.iteration, tensors)


def _take(sheets: dict[str, Sheet], entry: MegatronTensor, where: str) -> Sheet:
    """The sheet that an entry of the table is rows of. Raises CheckpointError."""
    have = [sheets[name] for name in entry.names if name in sheets]
    if len(have) != 1:
        fault = "is there twice" if have else "is missing"
        raise CheckpointError(
            "interop.megatron-tensor-missing",
            f"{where}: {' or '.join(entry.names)} {fault}; args are of another model, or it is damaged",
        )
    sheet = have[0]
    if sheet.shape != entry.fused or sheet.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            "interop.megatron-shape-differs",
            f"{sheet.where}: a {sheet.dtype} of shape {list(sheet.shape)}, but args want {list(entry.fused)}; "
            "they are of another model",
        )
    return sheet
