"""`engine import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from engine.cli.common import Help, parse, print_result, shard_bytes, single_process
from engine.errors import EXIT_OK, ConfigError, FieldError


@dataclass
class ImportOptions:
    """Write a Hugging Face folder or a Megatron-LM checkpoint as a checkpoint.

    Families: Llama, Mistral, Qwen2 and 3, Gemma, OLMo-2, Phi-3, GPT-2, GPT-NeoX. Runs on one process and streams the
    weights; the checkpoint loads in any layout. Training can also start from a Hugging Face folder directly: engine
    train --checkpoint.init FOLDER.
    """

    folder: tyro.conf.Positional[Path]
    """folder with config.json and safetensors files, or a Megatron-LM checkpoint (torch_dist or legacy)"""
    output: tyro.conf.Positional[Path]
    """new run folder"""
    max_seq_len: int = 0
    """longest sequence of the new model; one that fits in its sliding window needs no window; 0: as in the folder"""
    shard_mib: float = 4096.0
    """maximum size of a file in MiB; also the memory that the import needs"""
    vocab_size: int = 0
    """Megatron-LM: vocabulary size without padding, whose rows are dropped; 0: as in the checkpoint's arguments"""
    ignore_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """key of config.json to ignore because you know that it changes nothing; may be given several times"""
    secret: str = ""
    """file:PATH or env:NAME of a secret that signs the new checkpoint"""
    encrypt: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """with --secret: also encrypt the new checkpoint"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


HELP = Help(
    examples=(
        ("Import a Hugging Face folder", "engine import hf/Llama-3.1-8B runs/llama"),
        (
            "Import a Megatron-LM checkpoint whose vocabulary was padded",
            "engine import megatron/checkpoints runs/imported --vocab-size 50257",
        ),
    ),
    groups={
        "model": ("max_seq_len", "vocab_size", "ignore_key"),
        "output": ("shard_mib", "secret", "encrypt", "json"),
    },
)


def run(args: list[str]) -> int:
    """Run the command; returns the exit code."""

    from engine.checkpoint.seal import open_storage
    from engine.interop.convert import import_folder

    o = parse(ImportOptions, args, "import", HELP)
    single_process("import")
    if o.max_seq_len < 0:
        raise ConfigError(
            [FieldError("cli.too-small", "--max-seq-len", o.max_seq_len, "is below 0", "Use 0 for the folder's value.")]
        )
    if o.vocab_size < 0:
        raise ConfigError(
            [FieldError("cli.too-small", "--vocab-size", o.vocab_size, "is below 0", "Use 0 for the checkpoint's.")]
        )
    if o.encrypt and not o.secret:
        raise ConfigError(
            [
                FieldError(
                    "cli.missing-option",
                    "--encrypt",
                    True,
                    "needs --secret",
                    "Give one, such as --secret file:/home/me/run.key.",
                )
            ]
        )
    checkpoint, notes = import_folder(
        o.folder,
        o.output,
        max_seq_len=o.max_seq_len or None,
        vocab_size=o.vocab_size or None,
        ignore_keys=o.ignore_key,
        max_shard_bytes=shard_bytes(o.shard_mib),
        storage=open_storage(o.secret, encrypt=o.encrypt),
    )
    text = [
        *(f"note: {note}" for note in notes),
        f"wrote {checkpoint}; to train from it: engine train --checkpoint.init {o.output}",
    ]
    fields: dict[str, Any] = {
        "verb": "import",
        "folder": str(o.folder),
        "run": str(o.output),
        "checkpoint": str(checkpoint),
    }
    fields |= {"notes": notes}
    print_result(text, fields if o.json else None)
    return EXIT_OK
