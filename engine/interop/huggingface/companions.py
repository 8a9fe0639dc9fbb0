"""Files of a Hugging Face folder that are not weights: kept in the run folder and written again by its exports.

`hugging_face/` of a run has config.json, generation_config.json and the end-of-document id of the folder's tokenizer.
Its subfolder `extra/` has the licence, model card and other small files, which an export copies on request.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

from engine.checkpoint.links import reject_links
from engine.data.tokenize.file_names import is_tokenizer
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import CheckpointError, DataError
from engine.interop.huggingface.weights import CONFIG, GENERATION, INDEX
from engine.util.files import write_synced

COMPANIONS_DIR = "hugging_face"  # subfolder of a run
TOKENIZER_METADATA = "tokenizer_facts.json"  # in COMPANIONS_DIR: end-of-document id of the folder's own tokenizer
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
EXTRA = "extra"  # subfolder of COMPANIONS_DIR
MAX_EXTRA_BYTES = 1 << 20  # per file


def is_inside(folder: Path, name: str) -> bool:
    """Whether a file is in the folder itself or, for a snapshot in the Hub cache, in that cache's blobs."""
    home, target = folder.resolve(), (folder / name).resolve()
    blobs = home.parent.parent / "blobs"
    return target.is_relative_to(home) or (home.parent.name == "snapshots" and target.is_relative_to(blobs))


def read_inside(folder: Path, name: str) -> bytes:
    """The bytes of a file. Raises CheckpointError if it is a link that leaves the folder."""
    if not is_inside(folder, name):
        path = folder / name
        raise CheckpointError(
            "interop.companion-is-a-link",
            f"{path}: is a link to {path.resolve()}, outside the folder; put the file into the folder",
        )
    return (folder / name).read_bytes()


def copy_companions(source: Path, run: Path) -> None:
    """Copy companion files from the Hugging Face folder or checkpoint that a run starts from into its run folder."""
    foreign = (source / CONFIG).exists()
    folder = source if foreign else source.parent.parent / COMPANIONS_DIR
    for run_folder in (run,) if foreign else (run, source.parent.parent):
        reject_links(run_folder)
    for name in (CONFIG, GENERATION, TOKENIZER_METADATA):
        if (folder / name).is_file():
            (run / COMPANIONS_DIR).mkdir(parents=True, exist_ok=True)
            write_synced(run / COMPANIONS_DIR / name, read_inside(folder, name))
    for name in extra_files(folder)[0] if foreign else _names(folder / EXTRA):
        (run / COMPANIONS_DIR / EXTRA).mkdir(parents=True, exist_ok=True)
        write_synced(
            run / COMPANIONS_DIR / EXTRA / name, (folder / name if foreign else folder / EXTRA / name).read_bytes()
        )
    if foreign and is_tokenizer(folder):
        with suppress(DataError):
            end = {"eos_token_id": Tokenizer.load(folder).eod}
            write_synced(run / COMPANIONS_DIR / TOKENIZER_METADATA, json.dumps(end).encode() + b"\n")


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer files in a folder, including additional chat templates."""
    templates = sorted(folder.glob("additional_chat_templates/*.jinja"))
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()] + [
        f"{p.parent.name}/{p.name}" for p in templates
    ]


def extra_files(folder: Path) -> tuple[list[str], list[str]]:
    """(names of small files that are not part of the model, names of other files that are not read) of a folder.

    Links that leave the folder are not followed, except in the Hub cache, which stores all files as blobs.
    """
    read = {CONFIG, GENERATION, INDEX, "additional_chat_templates", *tokenizer_files(folder)}
    small: list[str] = []
    skipped: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name in read or path.suffix == ".safetensors" or path.name.startswith("."):
            continue
        weights = path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
        fits = (
            path.is_file() and is_inside(folder, path.name) and not weights and path.stat().st_size <= MAX_EXTRA_BYTES
        )
        (small if fits else skipped).append(path.name)
    return small, skipped


def copy_extra(companions: Path, out: Path | None) -> list[str]:
    """Copy a run's extra files into an export (None: do not), except files that it already has. Returns notes."""
    names = _names(companions / EXTRA)
    if not names:
        return []
    if out is None:
        return [f"not copied: {', '.join(names)} of the imported folder; use --copy-extra to copy them"]
    existing = [name for name in names if (out / name).exists()]
    for name in names:
        if name not in existing:
            shutil.copyfile(companions / EXTRA / name, out / name)
    return [f"not copied: {', '.join(existing)}, which the export writes itself"] if existing else []


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
