"""`engine import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from engine.cli.common import print_result, shard_bytes, single_process
from engine.errors import EXIT_OK, ConfigError, FieldError


@dataclass
class ImportOptions:
    """Write a Hugging Face folder (Llama, Mistral, Qwen2 and 3, Gemma, OLMo-2, Phi-3, GPT-2, GPT-NeoX) as a checkpoint.

    On one process, streaming; the checkpoint loads in any layout. Training can start from the folder without it:
    engine train --checkpoint.init FOLDER.
    """

    folder: tyro.conf.Positional[Path]
    """folder with config.json and safetensors files, or a checkpoint of Megatron-LM (torch_dist or legacy)"""
    output: tyro.conf.Positional[Path]
    """new run folder"""
    max_seq_len: int = 0
    """longest sequence of the model that is made, such as the sliding window of one that has it; 0: the folder's"""
    shard_mib: float = 4096.0
    """size of a file that is written, which is also what is held in memory"""
    vocab_size: int = 0
    """Megatron-LM: true size of the vocabulary, whose padding is left out; 0: as its arguments say"""
    ignore_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """read config.json as if it had no such key, which you know to change nothing; may be given several times"""
    secret: str = ""
    """file:PATH or env:NAME: sign what is written"""
    encrypt: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """with --secret: encrypt it too"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


def run(args: list[str]) -> int:
    """Run the verb; returns the exit code."""

    from engine.checkpoint.seal import open_storage
    from engine.interop.convert import import_folder

    o = tyro.cli(ImportOptions, args=args, prog="engine import")
    single_process("import")
    if o.max_seq_len < 0:
        raise ConfigError(
            [FieldError("cli.too-small", "--max-seq-len", o.max_seq_len, "is below 0", "Use 0 for the folder's.")]
        )
    if o.vocab_size < 0:
        raise ConfigError(
            [FieldError("cli.too-small", "--vocab-size", o.vocab_size, "is below 0", "Use 0 for the checkpoint's.")]
        )
    if o.encrypt and not o.secret:
        raise ConfigError(
            [
                FieldError(
                    "cli.missing-option", "--encrypt", True, "needs --secret", "Such as --secret file:/home/me/run.key."
                )
            ]
        )
    made, notes = import_folder(
        o.folder,
        o.output,
        max_seq_len=o.max_seq_len or None,
        vocab_size=o.vocab_size or None,
        ignore_keys=o.ignore_key,
        max_shard_bytes=shard_bytes(o.shard_mib),
        storage=open_storage(o.secret, encrypt=o.encrypt),
    )
    text = [*(f"note: {note}" for note in notes), f"wrote {made}; train from it with --checkpoint.init {o.output}"]
    fields = {"verb": "import", "folder": str(o.folder), "run": str(o.output), "checkpoint": str(made), "notes": notes}
    print_result(text, fields if o.json else None)
    return EXIT_OK
