"""`engine export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from engine.cli.common import print_result, shard_bytes, single_process
from engine.errors import EXIT_OK, CheckpointError, ConfigError, EngineError, FieldError

if TYPE_CHECKING:
    import torch


@dataclass
class ExportOptions:
    """Write a checkpoint as a Hugging Face folder, of the family that is its model. On one process, streaming."""

    checkpoint: tyro.conf.Positional[Path]
    """run folder (its newest checkpoint) or step folder"""
    output: tyro.conf.Positional[Path]
    """new folder for config.json, weights and tokenizer"""
    dtype: str = ""
    """fp32, bf16, fp16 or fp64; empty: the precision of the run, or as imported"""
    shard_mib: float = 4096.0
    """size of a file that is written, which is also what is held in memory"""
    tokenizer: Path | None = None
    """folder with tokenizer.json; default: the copy in the run folder"""
    verify: bool = False
    """load the result with transformers and compare its logits with the engine's"""
    secret: str = ""
    """file:PATH or env:NAME of the secret of a signed or encrypted checkpoint"""
    copy_extra: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """copy the licence, the model card and other small files of the Hugging Face folder that the model came from"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


def run(args: list[str]) -> int:
    """Run the verb; returns the exit code."""

    from engine.checkpoint.format import find_checkpoint, read_manifest
    from engine.checkpoint.seal import open_storage
    from engine.inference.compare import compare_with_transformers, need_transformers
    from engine.inference.load import config_of, load_tokenizer, tokenizer_folder
    from engine.interop.convert import export

    o = tyro.cli(ExportOptions, args=args, prog="engine export")
    single_process("export")
    if o.verify:
        need_transformers()
    storage = open_storage(o.secret)
    cfg, folder = config_of(o.checkpoint, storage), find_checkpoint(o.checkpoint, storage)
    imported = "exp_avg" not in read_manifest(folder, storage).tensors
    tokenizer: Path | None = None
    eod, notes = None, list[str]()
    try:
        tokenizer = tokenizer_folder(o.checkpoint, o.tokenizer, storage)
        eod = load_tokenizer(o.checkpoint, o.tokenizer, storage).eod
    except EngineError as error:
        if o.tokenizer is not None or not imported:
            raise
        notes.append(str(error))
        kept = folder.parent.parent / "tokenizer"
        tokenizer = kept if kept.is_dir() else None  # what came with a folder goes out again, if it can be read or not
    dtype = None if imported and not o.dtype else _dtype(o.dtype or cfg.train.precision)
    family, size, changed = export(
        folder,
        o.output,
        dtype=dtype,
        tokenizer=tokenizer,
        eod=eod,
        extra=o.copy_extra,
        max_shard_bytes=shard_bytes(o.shard_mib),
        storage=storage,
    )
    notes += changed
    files = "config.json, generation_config.json" + (", tokenizer" if tokenizer else "")
    text = [f"note: {note}" for note in notes]
    text.append(f"wrote {o.output}: {family.architecture}, {size:,} bytes of weights, {files}")
    fields: dict[str, Any] = {"verb": "export", "checkpoint": str(folder), "folder": str(o.output)}
    fields |= {"architecture": family.architecture, "weight_bytes": size, "notes": notes, "compared": None}
    if o.verify:
        found = compare_with_transformers(o.checkpoint, o.output, dtype, storage)
        if found.problem:
            raise CheckpointError(
                "cli.export-computes-otherwise",
                f"{o.output}: transformers computes other logits than the engine: {found.problem}. Do not use it",
            )
        text.append(
            f"transformers gives the same logits: largest difference {found.difference:.2e}, where rounding explains "
            f"{found.bound:.2e} (largest logit {found.largest:.2f})"
        )
        fields["compared"] = {key: getattr(found, key) for key in ("difference", "bound", "largest")}
    print_result(text, fields if o.json else None)
    return EXIT_OK


def _dtype(name: str) -> torch.dtype:
    from engine.optim.precision import PRECISIONS

    if name not in PRECISIONS:
        raise ConfigError(
            [FieldError("cli.unknown-choice", "--dtype", name, f"is none of {', '.join(PRECISIONS)}", "Choose one.")]
        )
    return PRECISIONS[name].compute
