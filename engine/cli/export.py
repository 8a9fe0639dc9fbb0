"""Verbs on checkpoints: import, export, verify, and inspect for a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.cli.run import single_process
from engine.errors import EXIT_OK, ConfigError, EngineError, Fault

if TYPE_CHECKING:
    import torch

    from engine.cli.options import Inspect


def import_(args: list[str]) -> int:
    """write a Hugging Face folder or a checkpoint of Megatron-LM as a checkpoint"""
    import tyro

    from engine.checkpoint.seal import storage_of
    from engine.cli.options import Import
    from engine.interop.convert import import_folder

    o = tyro.cli(Import, args=args, prog="engine import")
    single_process("import")
    if o.max_seq_len < 0:
        raise ConfigError([Fault("", "--max-seq-len", o.max_seq_len, "is below 0", "Use 0 for the folder's.")])
    if o.vocab_size < 0:
        raise ConfigError([Fault("", "--vocab-size", o.vocab_size, "is below 0", "Use 0 for the checkpoint's.")])
    if o.encrypt and not o.secret:
        raise ConfigError([Fault("", "--encrypt", True, "needs --secret", "Such as --secret file:/home/me/run.key.")])
    made, notes = import_folder(
        o.folder,
        o.output,
        max_seq_len=o.max_seq_len or None,
        vocab_size=o.vocab_size or None,
        ignore_keys=o.ignore_key,
        max_shard_bytes=_shard_bytes(o.shard_mib),
        storage=storage_of(o.secret, encrypt=o.encrypt),
    )
    text = [*(f"note: {note}" for note in notes), f"wrote {made}; train from it with --checkpoint.init {o.output}"]
    facts = {"verb": "import", "folder": str(o.folder), "run": str(o.output), "checkpoint": str(made), "notes": notes}
    tell(text, facts if o.json else None)
    return EXIT_OK


def export(args: list[str]) -> int:
    """write a checkpoint as a Hugging Face folder"""
    import tyro

    from engine.checkpoint.format import find, read_manifest
    from engine.checkpoint.seal import storage_of
    from engine.cli.options import Export
    from engine.errors import CheckpointError
    from engine.inference.compare import compare_with_transformers, need_transformers
    from engine.inference.load import config_of, load_tokenizer, tokenizer_folder
    from engine.interop.convert import export

    o = tyro.cli(Export, args=args, prog="engine export")
    single_process("export")
    if o.verify:
        need_transformers()
    storage = storage_of(o.secret)
    cfg, folder = config_of(o.checkpoint, storage), find(o.checkpoint, storage)
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
    family, size = export(
        folder,
        o.output,
        dtype=dtype,
        tokenizer=tokenizer,
        eod=eod,
        notes=notes,
        extra=o.copy_extra,
        max_shard_bytes=_shard_bytes(o.shard_mib),
        storage=storage,
    )
    files = "config.json, generation_config.json" + (", tokenizer" if tokenizer else "")
    text = [f"note: {note}" for note in notes]
    text.append(f"wrote {o.output}: {family.architecture}, {size:,} bytes of weights, {files}")
    facts: dict[str, Any] = {"verb": "export", "checkpoint": str(folder), "folder": str(o.output)}
    facts |= {"architecture": family.architecture, "weight_bytes": size, "notes": notes, "compared": None}
    if o.verify:
        found = compare_with_transformers(o.checkpoint, o.output, dtype, storage)
        if found.fault:
            raise CheckpointError(
                f"{o.output}: transformers does not compute from it what the engine does: {found.fault}. Do not use it"
            )
        text.append(
            f"transformers gives the same logits: largest difference {found.difference:.2e}, where rounding explains "
            f"{found.bound:.2e} (largest logit {found.largest:.2f})"
        )
        facts["compared"] = {key: getattr(found, key) for key in ("difference", "bound", "largest")}
    tell(text, facts if o.json else None)
    return EXIT_OK


def verify(args: list[str]) -> int:
    """check every file of a checkpoint against its digests"""
    import tyro

    from engine.checkpoint.format import find, prove_all, read_manifest
    from engine.checkpoint.seal import storage_of
    from engine.cli.options import Verify

    o = tyro.cli(Verify, args=args, prog="engine verify")
    storage = storage_of(o.secret)
    folder = find(o.checkpoint, storage)
    manifest = read_manifest(folder, storage)
    prove_all(folder, manifest, storage)
    size = sum(entry.size for entry in manifest.files.values())
    text = f"{folder}: step {manifest.step}, {len(manifest.files)} files, {size:,} bytes, every digest is right"
    facts = {"verb": "verify", "checkpoint": str(folder), "step": manifest.step}
    tell([text], facts | {"files": len(manifest.files), "bytes": size} if o.json else None)
    return EXIT_OK


def inspect_checkpoint(o: Inspect) -> int:
    """`engine inspect` of a checkpoint."""
    from dataclasses import asdict

    from engine.checkpoint.format import find, prove_all
    from engine.checkpoint.load import Reader
    from engine.checkpoint.seal import storage_of
    from engine.checkpoint.summary import summary, tensor_facts

    storage = storage_of(o.secret)
    with Reader(find(Path(o.data), storage), storage) as reader:
        text = list(summary(reader))
        facts: dict[str, Any] = {"verb": "inspect", "checkpoint": str(reader.folder), "step": reader.manifest.step}
        facts |= {"summary": list(text), "digests_proven": o.verify, "tensors": []}
        if o.verify:
            prove_all(reader.folder, reader.manifest, storage)
            text.append("every digest is right")
        width = max(map(len, (name for names in reader.manifest.tensors.values() for name in names)), default=0)
        if not o.json:
            tell(text)
        for t in tensor_facts(reader, norms=o.norms):
            norm = f"  norm {t.norm:.6g}" if o.norms else ""
            shape = " x ".join(map(str, t.shape))
            facts["tensors"].append({**asdict(t), "norm": t.norm if o.norms else None})
            if not o.json:
                tell([f"{t.kind:10}  {t.name:{width}}  {t.dtype:4}  {shape:14}  {t.files} files{norm}"])
    if o.json:
        tell([], facts)
    return EXIT_OK


def tell(text: Sequence[str], facts: Mapping[str, Any] | None = None) -> None:
    """Print lines of text, or, where they are given, the facts as one JSON object; numbers that are none are null."""
    for line in text if facts is None else ():
        print(line)
    if facts is not None:
        print(json.dumps(_finite(facts)))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shard_bytes(mib: float) -> int:
    if not mib > 0:
        raise ConfigError([Fault("", "--shard-mib", mib, "is not above 0", "The default is 4096.")])
    return int(mib * 2**20)


def _dtype(name: str) -> torch.dtype:
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    if name not in dtypes:
        raise ConfigError([Fault("", "--dtype", name, f"is none of {', '.join(dtypes)}", "Choose one.")])
    return dtypes[name]
