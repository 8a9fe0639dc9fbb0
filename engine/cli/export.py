"""`engine export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from engine.cli.common import Help, parse, print_result, shard_bytes, single_process
from engine.errors import EXIT_OK, CheckpointError, ConfigError, EngineError, FieldError

if TYPE_CHECKING:
    import torch


@dataclass
class ExportOptions:
    """Write a checkpoint as a Hugging Face folder.

    The folder has the format of the model's family. Runs on one process and streams the weights.
    """

    checkpoint: tyro.conf.Positional[Path]
    """run folder (its newest checkpoint) or step folder"""
    output: tyro.conf.Positional[Path]
    """new folder for config.json, weights and tokenizer"""
    dtype: str = ""
    """dtype of the weights: fp32, bf16, fp16 or fp64; empty: train.precision of the run, or unchanged for an imported
    checkpoint"""
    shard_mib: float = 4096.0
    """maximum size of a weight file in MiB; also the memory that the export needs"""
    tokenizer: Path | None = None
    """folder with tokenizer.json; not set: the copy in the run folder"""
    verify: bool = False
    """load the result with transformers and compare its logits with the engine's; needs memory for both models"""
    secret: str = ""
    """file:PATH or env:NAME of the secret of a signed or encrypted checkpoint"""
    copy_extra: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """also copy the licence, model card and other small files of the Hugging Face folder that the model came from"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


HELP = Help(
    examples=(
        ("Write the newest checkpoint of a run for transformers", "engine export runs/demo hf/demo"),
        (
            "Write bf16 weights and compare the logits of transformers with the engine's",
            "engine export runs/demo hf/demo --dtype bf16 --verify",
        ),
    ),
    groups={
        "output": ("dtype", "shard_mib", "tokenizer", "copy_extra"),
        "check": ("verify", "secret", "json"),
    },
)


def run(args: list[str]) -> int:
    """Run the command; returns the exit code."""

    from engine.checkpoint.format import find_checkpoint, read_manifest
    from engine.checkpoint.seal import open_storage
    from engine.inference.compare import compare_with_transformers, need_transformers
    from engine.inference.load import config_of, load_tokenizer, tokenizer_folder
    from engine.interop.convert import export

    o = parse(ExportOptions, args, "export", HELP)
    single_process("export")
    if o.verify:
        need_transformers()
    storage = open_storage(o.secret)
    cfg, folder = config_of(o.checkpoint, storage), find_checkpoint(o.checkpoint, storage)
    imported = read_manifest(folder, storage).kinds is None
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
        tokenizer = kept if kept.is_dir() else None  # exported unchanged even if the engine cannot read it
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
            f"transformers computes the same logits: max error {found.difference:.2e}, rounding bound "
            f"{found.bound:.2e} (largest logit {found.largest:.2f})"
        )
        fields["compared"] = {key: getattr(found, key) for key in ("difference", "bound", "largest")}
    print_result(text, fields if o.json else None)
    return EXIT_OK


def _dtype(name: str) -> torch.dtype:
    from engine.optim.precision import PRECISIONS

    if name not in PRECISIONS:
        raise ConfigError(
            [FieldError("cli.unknown-choice", "--dtype", name, f"is not one of {', '.join(PRECISIONS)}", "Choose one.")]
        )
    return PRECISIONS[name].compute
