"""Verbs on checkpoints: import, export, verify, and inspect for a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.commands.run import single_process
from engine.errors import EXIT_OK, ConfigError, EngineError, Fault

if TYPE_CHECKING:
    import torch

    from engine.options import Inspect


def import_(args: list[str]) -> int:
    """write a Hugging Face folder or a checkpoint of Megatron-LM as a checkpoint"""
    import tyro

    from engine.checkpoint.convert import import_folder
    from engine.checkpoint.seal import storage_of
    from engine.options import Import

    o = tyro.cli(Import, args=args, prog="engine import")
    single_process("import")
    if o.max_seq_len < 0:
        raise ConfigError([Fault("--max-seq-len", o.max_seq_len, "is below 0", "Use 0 for the folder's.")])
    if o.vocab_size < 0:
        raise ConfigError([Fault("--vocab-size", o.vocab_size, "is below 0", "Use 0 for the checkpoint's.")])
    if o.encrypt and not o.secret:
        raise ConfigError([Fault("--encrypt", True, "needs --secret", "Such as --secret file:/home/me/run.key.")])
    made, notes = import_folder(
        o.folder,
        o.output,
        max_seq_len=o.max_seq_len or None,
        vocab_size=o.vocab_size or None,
        ignore_keys=o.ignore_key,
        max_shard_bytes=_shard_bytes(o.shard_mib),
        storage=storage_of(o.secret, encrypt=o.encrypt),
    )
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {made}; train from it with --checkpoint.init {o.output}")
    return EXIT_OK


def export(args: list[str]) -> int:
    """write a checkpoint as a Hugging Face folder"""
    import tyro

    from engine.checkpoint.convert import export
    from engine.checkpoint.format import find, read_manifest
    from engine.checkpoint.seal import storage_of
    from engine.compare import compare_with_transformers, need_transformers
    from engine.errors import CheckpointError
    from engine.inference import config_of, load_tokenizer, tokenizer_folder
    from engine.options import Export

    o = tyro.cli(Export, args=args, prog="engine export")
    single_process("export")
    if o.verify:
        need_transformers()
    storage = storage_of(o.secret)
    cfg, folder = config_of(o.checkpoint, storage), find(o.checkpoint, storage)
    imported = "exp_avg" not in read_manifest(folder, storage).tensors
    tokenizer: Path | None = None
    eod = None
    try:
        tokenizer = tokenizer_folder(o.checkpoint, o.tokenizer, storage)
        eod = load_tokenizer(o.checkpoint, o.tokenizer, storage).eod
    except EngineError as error:
        if o.tokenizer is not None or not imported:
            raise
        print(f"note: {error}")
        kept = folder.parent.parent / "tokenizer"
        tokenizer = kept if kept.is_dir() else None  # what came with a folder goes out again, if it can be read or not
    notes: list[str] = []
    dtype = None if imported and not o.dtype else _dtype(o.dtype or cfg.train.precision)
    family, size = export(
        folder,
        o.output,
        dtype=dtype,
        tokenizer=tokenizer,
        eod=eod,
        notes=notes,
        max_shard_bytes=_shard_bytes(o.shard_mib),
        storage=storage,
    )
    for note in notes:
        print(f"note: {note}")
    files = "config.json, generation_config.json" + (", tokenizer" if tokenizer else "")
    print(f"wrote {o.output}: {family.architecture}, {size:,} bytes of weights, {files}")
    if o.verify:
        found = compare_with_transformers(o.checkpoint, o.output, dtype, storage)
        if found.fault:
            raise CheckpointError(
                f"{o.output}: transformers does not compute from it what the engine does: {found.fault}. Do not use it"
            )
        print(
            f"transformers gives the same logits: largest difference {found.difference:.2e}, where rounding explains "
            f"{found.bound:.2e} (largest logit {found.largest:.2f})"
        )
    return EXIT_OK


def verify(args: list[str]) -> int:
    """check every file of a checkpoint against its digests"""
    import tyro

    from engine.checkpoint.format import find, prove_all, read_manifest
    from engine.checkpoint.seal import storage_of
    from engine.options import Verify

    o = tyro.cli(Verify, args=args, prog="engine verify")
    storage = storage_of(o.secret)
    folder = find(o.checkpoint, storage)
    manifest = read_manifest(folder, storage)
    prove_all(folder, manifest, storage)
    size = sum(entry.size for entry in manifest.files.values())
    print(f"{folder}: step {manifest.step}, {len(manifest.files)} files, {size:,} bytes, every digest is right")
    return EXIT_OK


def inspect_checkpoint(o: Inspect) -> int:
    """`engine inspect` of a checkpoint."""
    from pathlib import Path

    from rich.console import Console

    from engine.checkpoint.format import find, prove_all
    from engine.checkpoint.inspect import summary, tensor_facts
    from engine.checkpoint.load import Reader
    from engine.checkpoint.seal import storage_of

    console = Console(highlight=False, soft_wrap=True)
    storage = storage_of(o.secret)
    with Reader(find(Path(o.data), storage), storage) as reader:
        for line in summary(reader):
            console.print(line, markup=False)
        if o.verify:
            prove_all(reader.folder, reader.manifest, storage)
            console.print("every digest is right")
        width = max(map(len, (name for names in reader.manifest.tensors.values() for name in names)), default=0)
        for t in tensor_facts(reader, norms=o.norms):
            norm = f"  norm {t.norm:.6g}" if o.norms else ""
            shape = " x ".join(map(str, t.shape))
            console.print(
                f"{t.kind:10}  {t.name:{width}}  {t.dtype:4}  {shape:14}  {t.files} files{norm}", markup=False
            )
    return EXIT_OK


def _shard_bytes(mib: float) -> int:
    if not mib > 0:
        raise ConfigError([Fault("--shard-mib", mib, "is not above 0", "The default is 4096.")])
    return int(mib * 2**20)


def _dtype(name: str) -> torch.dtype:
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    if name not in dtypes:
        raise ConfigError([Fault("--dtype", name, f"is none of {', '.join(dtypes)}", "Choose one.")])
    return dtypes[name]
