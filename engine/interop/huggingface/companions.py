"""What of a Hugging Face folder is not the model, kept in a run folder and given back by its exports.

config.json, generation_config.json and the end of its tokenizer lie in `hugging_face/` of the run, and in `extra/` of
that its licence, model card and other small files, which an export takes along if it is asked to.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

from engine.checkpoint.links import refuse_links
from engine.data.tokenize.file_names import is_tokenizer
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import CheckpointError, DataError
from engine.interop.huggingface.weights import CONFIG, GENERATION, INDEX
from engine.util.files import write_synced

BESIDE = "hugging_face"  # folder of a run
TOKENIZER_FACTS = "tokenizer_facts.json"  # in it: how the folder's own tokenizer ended documents
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
EXTRA = "extra"  # folder in BESIDE
MOST_EXTRA_BYTES = 1 << 20  # of a file


def is_inside(folder: Path, name: str) -> bool:
    """Whether a file of a folder lies in it, or in the blobs of the hub's cache that it is a snapshot of."""
    home, target = folder.resolve(), (folder / name).resolve()
    blobs = home.parent.parent / "blobs"
    return target.is_relative_to(home) or (home.parent.name == "snapshots" and target.is_relative_to(blobs))


def content(folder: Path, name: str) -> bytes:
    """The bytes of a file that is copied as it is. CheckpointError for a link out of its folder."""
    if not is_inside(folder, name):
        path = folder / name
        raise CheckpointError(
            "interop.companion-is-a-link",
            f"{path}: is a link to {path.resolve()} and not copied; put the file into the folder",
        )
    return (folder / name).read_bytes()


def copy_beside(source: Path, run: Path) -> None:
    """Keep in a run folder what an export gives back, of the Hugging Face folder or the checkpoint it starts from."""
    foreign = (source / CONFIG).exists()
    folder = source if foreign else source.parent.parent / BESIDE
    for run_folder in (run,) if foreign else (run, source.parent.parent):
        refuse_links(run_folder)
    for name in (CONFIG, GENERATION, TOKENIZER_FACTS):
        if (folder / name).is_file():
            (run / BESIDE).mkdir(parents=True, exist_ok=True)
            write_synced(run / BESIDE / name, content(folder, name))
    for name in extra_files(folder)[0] if foreign else _names(folder / EXTRA):
        (run / BESIDE / EXTRA).mkdir(parents=True, exist_ok=True)
        write_synced(run / BESIDE / EXTRA / name, (folder / name if foreign else folder / EXTRA / name).read_bytes())
    if foreign and is_tokenizer(folder):
        with suppress(DataError):
            facts = {"eos_token_id": Tokenizer.load(folder).eod}
            write_synced(run / BESIDE / TOKENIZER_FACTS, json.dumps(facts).encode() + b"\n")


def tokenizer_files(folder: Path) -> list[str]:
    """Names of what is a tokenizer's in a folder, further chat templates too."""
    further = sorted(folder.glob("additional_chat_templates/*.jinja"))
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()] + [
        f"{p.parent.name}/{p.name}" for p in further
    ]


def extra_files(folder: Path) -> tuple[list[str], list[str]]:
    """(names of the small files that say nothing of the model, of all else that is not read) of a folder.

    A link out of the folder is not followed, but for those of a hub's cache, which keeps all files as blobs.
    """
    read = {CONFIG, GENERATION, INDEX, "additional_chat_templates", *tokenizer_files(folder)}
    small: list[str] = []
    left: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name in read or path.suffix == ".safetensors" or path.name.startswith("."):
            continue
        weights = path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
        fits = (
            path.is_file() and is_inside(folder, path.name) and not weights and path.stat().st_size <= MOST_EXTRA_BYTES
        )
        (small if fits else left).append(path.name)
    return small, left


def copy_extra(beside: Path, out: Path | None) -> list[str]:
    """Copy a run's extra files into an export that has no file of that name; notes of those that are not copied."""
    names = _names(beside / EXTRA)
    if not names:
        return []
    if out is None:
        return [f"not copied: {', '.join(names)} of the folder it came from; --copy-extra takes them along"]
    there = [name for name in names if (out / name).exists()]
    for name in names:
        if name not in there:
            shutil.copyfile(beside / EXTRA / name, out / name)
    return [f"not copied: {', '.join(there)}, which the export writes itself"] if there else []


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
