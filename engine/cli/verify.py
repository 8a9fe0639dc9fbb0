"""`engine verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from engine.cli.common import Help, parse, print_result
from engine.errors import EXIT_OK


@dataclass
class VerifyOptions:
    """Check every file of a checkpoint against the digests in its manifest."""

    checkpoint: tyro.conf.Positional[Path]
    """run folder (its newest checkpoint) or step folder"""
    secret: str = ""
    """file:PATH or env:NAME of the secret of a signed or encrypted checkpoint"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


HELP = Help(
    examples=(
        ("Check the newest checkpoint of a run", "engine verify runs/demo"),
        (
            "Check an encrypted checkpoint and print JSON",
            "engine verify runs/demo/checkpoints/step_00000100 --secret file:run.key --json",
        ),
    ),
)


def run(args: list[str]) -> int:
    """Run the command; returns the exit code."""

    from engine.checkpoint.format import find_checkpoint, read_manifest, verify_all
    from engine.checkpoint.seal import open_storage

    o = parse(VerifyOptions, args, "verify", HELP)
    storage = open_storage(o.secret)
    folder = find_checkpoint(o.checkpoint, storage)
    manifest = read_manifest(folder, storage)
    verify_all(folder, manifest, storage)
    size = sum(entry.size for entry in manifest.files.values())
    text = f"{folder}: step {manifest.step}, {len(manifest.files)} files, {size:,} bytes, all digests match"
    fields = {"verb": "verify", "checkpoint": str(folder), "step": manifest.step}
    print_result([text], fields | {"files": len(manifest.files), "bytes": size} if o.json else None)
    return EXIT_OK
