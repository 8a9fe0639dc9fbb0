"""Reads canonical tensors from a Hugging Face folder, and assembles its tensors again: exact rearrangements.

By the tables of `families`, each canonical tensor is a set of rectangles of Hugging Face tensors: a whole tensor, rows
of a fused one, the rows of each head of one fused by heads, or any of these of a transposed matrix. So a rank reads
only its own part from a folder of any family, as from our checkpoints, without loading whole tensors. No code of the
folder is run: only safetensors files are read, index entries must be plain file names, and nothing is unpickled.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.load import TensorSource
from engine.checkpoint.tensorfile import DTYPES
from engine.config.load import model_config
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError, truncate
from engine.interop.huggingface.config_json import ParsedConfig, read_config, read_json_object
from engine.interop.huggingface.families import Family
from engine.model.build import tensor_shapes
from engine.optim.update_rules import MODEL

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")


@dataclass(frozen=True)
class HfSlice:
    """A rectangle of a canonical tensor, stored in tensor `key` of `file` starting at row `start`, in all columns.

    offset, shape: in the canonical tensor. transposed: stored as [columns, rows].
    """

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    transposed: bool

    def stored_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Index of a part of this rectangle (relative to its corner) in the stored tensor."""
        rows = slice(index[0].start + self.start, index[0].stop + self.start)
        return (index[1], rows) if self.transposed else (rows, *index[1:])


@dataclass(frozen=True)
class HfTensor:
    """A canonical tensor and its location in a Hugging Face folder."""

    shape: tuple[int, ...]
    dtype: str
    slices: Sequence[HfSlice]


def hf_name(canonical: str, family: Family) -> str:
    """Hugging Face name of the tensor that contains this canonical tensor."""
    stem, suffix = canonical.rsplit(".", 1)
    number = re.search(r"\.(\d+)\.", stem)
    if number is None:
        return f"{family.names[stem]}.{suffix}"
    return f"{family.names[stem.replace(number[0], '.{}.', 1)].format(number[1])}.{suffix}"


def locate_tensors(cfg: ModelConfig, family: Family) -> tuple[dict[str, list[HfSlice]], dict[str, tuple[int, ...]]]:
    """(canonical name -> its rectangles, without file names; Hugging Face name -> expected shape)."""
    shapes = tensor_shapes(cfg)
    names_by_key: dict[str, list[str]] = {}
    for name in shapes:
        names_by_key.setdefault(hf_name(name, family), []).append(name)
    slices: dict[str, list[HfSlice]] = {}
    hf_shapes: dict[str, tuple[int, ...]] = {}
    for key, names in names_by_key.items():
        stem = key.rsplit(".", 1)[0]
        groups = cfg.num_heads if stem.endswith(family.by_head) and family.by_head else 1
        transposed = bool(family.transposed) and stem.endswith(family.transposed) and len(shapes[names[0]]) == 2
        rows = sum(shapes[name][0] for name in names)
        rest = shapes[names[0]][1:]
        hf_shapes[key] = (*rest, rows) if transposed else (rows, *rest)
        start = 0
        for name in names:
            num_rows = shapes[name][0] // groups
            slices[name] = [
                HfSlice(
                    "",
                    key,
                    (group * num_rows, *(0 for _ in rest)),
                    (num_rows, *rest),
                    group * (rows // groups) + start,
                    transposed,
                )
                for group in range(groups)
            ]
            start += num_rows
    return slices, hf_shapes


class HfReader(TensorSource[HfTensor]):
    """Reads canonical tensors from a Hugging Face folder.

    Raises ConfigError or CheckpointError if the folder is unsupported or inconsistent. max_seq_len: of the model, if
    less than the folder's. ignore_keys: keys of config.json to treat as absent. Attributes: `hf_config` (the parsed
    config.json), `cfg` (the model), `notes` (messages about files and keys that are not read or are stale).
    """

    def __init__(self, folder: Path, max_seq_len: int | None = None, ignore_keys: Sequence[str] = ()):
        super().__init__(folder, {})
        self._open: tuple[str, Any] = ("", None)
        self._lock = threading.Lock()
        self.hf_config: ParsedConfig = read_config(folder / CONFIG, max_seq_len, ignore_keys)
        self.cfg: ModelConfig = model_config(folder, self.hf_config.model_fields)
        self.notes: list[str] = list(self.hf_config.notes)
        self.head_key = (
            f"{self.hf_config.family.names['head']}.weight"  # also stored in some folders with tied embeddings
        )
        if (folder / GENERATION).exists():
            self.notes += _generation_notes(folder / GENERATION, self.cfg.vocab_size)
        try:
            self.files = self._files()
            self.headers = {key: self._header(file, key) for key, file in self.files.items()}
            self.entries = {MODEL: self._locate(self.files)}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._open = ("", None)

    def _file(self, name: str) -> Any:
        """Open a file and close the previous one: pages read from a mapped file count as this process's memory."""
        with self._lock:
            if self._open[0] != name:
                if not (self.folder / name).is_file():  # opening a pipe would block
                    raise OSError(errno.EINVAL, "is not a regular file")
                self._open = (name, safe_open(self.folder / name, framework="pt"))
            return self._open[1]

    def _files(self) -> dict[str, str]:
        """Hugging Face name -> file. As in transformers, a single file takes precedence over an index."""
        listed: dict[str, Any] = {}
        names = [SINGLE]
        if (self.folder / SINGLE).exists():
            if (self.folder / INDEX).exists():
                self.notes.append(f"{INDEX} is not read: {SINGLE} exists too and takes precedence, as in transformers")
        elif (self.folder / INDEX).exists():
            listed = read_json_object(self.folder / INDEX).get("weight_map") or {}
            if not isinstance(listed, dict) or not listed or not all(isinstance(f, str) for f in listed.values()):
                raise CheckpointError(
                    "interop.index-malformed", f"{self.folder / INDEX}: has no weight_map from names to files; damaged"
                )
            names = sorted(set(listed.values()))
        else:
            raise self._no_weights()
        found: dict[str, str] = {}
        for name in names:
            if not _PLAIN.fullmatch(name):
                raise CheckpointError(
                    "interop.shard-name-not-plain",
                    f"{self.folder / INDEX}: {name!r} is not a plain name of a safetensors file",
                )
            if not (self.folder / name).exists():
                text = "which does not exist: a shard is missing, or the index is from another save"
                raise CheckpointError(
                    "interop.shard-missing", f"{self.folder / INDEX}: names {name}, {text}; download the files again"
                )
            for key in self._keys(name):
                if key in found:
                    text = f"{key} is in both {found[key]} and {name}; the folder mixes two saves"
                    raise CheckpointError(
                        "interop.tensor-twice", f"{self.folder}: {text}. Remove the files of one save"
                    )
                found[key] = name
        self._compare_with_index(found, listed)
        others = {p.name for p in self.folder.glob("*.safetensors")} - set(names)
        if others:
            self.notes.append(f"not read: {_first_names(sorted(others))}, which are not files of the model's weights")
        if (self.folder / "adapter_config.json").exists():
            self.notes.append("adapter_config.json: adapters are not read, only the weights in this folder")
        return found

    def _keys(self, name: str) -> list[str]:
        try:
            return list(self._file(name).keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "interop.shard-unreadable", f"{self.folder / name}: {error}; download the file again"
            ) from None

    def _compare_with_index(self, found: Mapping[str, str], listed: Mapping[str, str]) -> None:
        """Accept a stale index with a note, as transformers does. Raises CheckpointError for missing tensors."""
        spare = {self.head_key} if self.cfg.tie_embeddings else set()
        missing = [key for key in listed if key not in found and key not in spare]
        if missing:
            text = f"{missing[0]} is not in {listed[missing[0]]}, which the index names, nor in another of its files"
            raise CheckpointError(
                "interop.index-stale",
                f"{self.folder / INDEX}: {text}; is the index from another save? Download the files again",
            )
        moved = [key for key, file in listed.items() if found.get(key, file) != file]
        moved += [key for key in found if listed and key not in listed]
        if moved:
            self.notes.append(
                f"{INDEX} is stale: {_first_names(moved)} are in other files than it lists, and are read there"
            )

    def _no_weights(self) -> CheckpointError:
        pickled = sorted(p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if not pickled:
            others = sorted(p.name for p in self.folder.glob("*.safetensors"))
            there = f", only {_first_names(others)}; rename a single complete file to {SINGLE}" if others else ""
            return CheckpointError("interop.no-weights", f"{self.folder}: has neither {SINGLE} nor {INDEX}{there}")
        return CheckpointError(
            "interop.weights-are-pickles",
            f"{self.folder}: the weights are in {pickled[0]}, a pickle, which can run code when it is loaded; the "
            "engine reads safetensors only. Download the model's safetensors files, or write them in a sandbox with "
            "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)",
        )

    def _header(self, file: str, key: str) -> tuple[tuple[int, ...], str]:
        view = self._file(file).get_slice(key)
        return tuple(view.get_shape()), str(view.get_dtype())

    def _locate(self, files: Mapping[str, str]) -> dict[str, HfTensor]:
        """Check names, shapes and dtypes of all tensors, and locate the canonical ones."""
        family = self.hf_config.family
        found, hf_shapes = locate_tensors(self.cfg, family)
        headless = not any(key.startswith(family.prefix) for key in files)  # saved without a head: names have no prefix
        actual = {key: key.removeprefix(family.prefix) if headless else key for key in hf_shapes}
        embed = hf_name("embed.weight", family)
        if self.cfg.tie_embeddings and actual[embed] not in files and self.head_key in files:
            actual[embed] = self.head_key  # tied: the matrix was saved under the head's name
        if missing := [key for key in actual.values() if key not in files]:
            both = (self.folder / SINGLE).exists() and (self.folder / INDEX).exists()
            where = f" (only {SINGLE} was read, not {INDEX})" if both else ""
            raise CheckpointError(
                "interop.tensors-missing",
                f"{self.folder}: lacks {len(missing)} tensors of the model: {_first_names(missing)}{where}",
            )
        known = {*actual.values(), *([self.head_key] if self.cfg.tie_embeddings else [])}
        extra = [key for key in files if key not in known and not key.endswith(family.buffers)]
        if extra:
            raise CheckpointError(
                "interop.tensors-unknown",
                f"{self.folder}: has {len(extra)} tensors that {family.architecture} with this {CONFIG} does not have, "
                f"and the engine does not ignore them: {_first_names(extra)}",
            )
        for key, shape in hf_shapes.items():
            have, dtype = self.headers[actual[key]]
            if have != shape:
                text = f"{actual[key]} has shape {list(have)}, but {CONFIG} states {list(shape)}"
                raise CheckpointError("interop.shape-differs", f"{self.folder / files[actual[key]]}: {text}")
            if dtype not in DTYPES:
                text = f"{actual[key]} is {dtype}; the engine reads {', '.join(DTYPES)}, not quantised weights"
                raise CheckpointError("interop.dtype-not-read", f"{self.folder / files[actual[key]]}: {text}")
        located: dict[str, HfTensor] = {}
        for name, shape in tensor_shapes(self.cfg).items():
            key = actual[found[name][0].key]
            slices = [HfSlice(files[key], key, p.offset, p.shape, p.start, p.transposed) for p in found[name]]
            located[name] = HfTensor(shape, self.headers[key][1], slices)
        return located

    def _fill_tasks(
        self, name: str, entry: HfTensor, offset: tuple[int, ...], out: Tensor
    ) -> Iterator[Callable[[], None]]:
        for part, low, high in self._overlapping(name, entry.slices, offset, tuple(out.shape)):
            within = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, part.offset))
            target = out[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset))]
            yield partial(self._fill, target, part, within)

    def _fill(self, target: Tensor, part: HfSlice, within: tuple[slice, ...]) -> None:
        try:
            block: Tensor = self._file(part.file).get_slice(part.key)[part.stored_index(within)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "interop.shard-unreadable", f"{self.folder / part.file}: {part.key}: {error}; download the file again"
            ) from None
        target.copy_(block.t() if part.transposed else block)

    def check_tied_head(self, rows: int = 4096) -> None:
        """Check that a head stored with tied embeddings equals the embedding. Raises CheckpointError if not."""
        if not self.cfg.tie_embeddings or self.head_key not in self.files:
            return
        shape = self.shapes(MODEL)["embed.weight"]
        head = self._file(self.files[self.head_key]).get_slice(self.head_key)
        same = tuple(head.get_shape()) == shape
        for begin in range(0, shape[0] if same else 0, rows):
            count = min(rows, shape[0] - begin)
            embedding = self.read(MODEL, "embed.weight", (begin, 0), (count, shape[1]))
            other: Tensor = head[begin : begin + count]
            same = same and other.dtype == embedding.dtype and torch.equal(embedding, other)
        if not same:
            raise CheckpointError(
                "interop.head-is-not-the-embedding",
                f"{self.folder}: tie_word_embeddings is true, but {self.head_key} differs from the embedding matrix, "
                f"{hf_name('embed.weight', self.hf_config.family)}; "
                "if the model has a separate head, set tie_word_embeddings to false in config.json",
            )


def assemble(parts: Mapping[str, Tensor], slices: Mapping[str, list[HfSlice]], shape: tuple[int, ...]) -> Tensor:
    """Assemble a (possibly fused) Hugging Face tensor from its canonical parts; no copy if there is only one."""
    if len(parts) == 1:
        [(name, values)] = parts.items()
        if len(slices[name]) == 1:
            return values.t() if slices[name][0].transposed else values
    out = torch.empty(shape, dtype=next(iter(parts.values())).dtype)
    for name, values in parts.items():
        for part in slices[name]:
            rows = slice(part.offset[0], part.offset[0] + part.shape[0])
            target = part.stored_index(tuple(slice(0, length) for length in part.shape))
            out[target] = values[rows].t() if part.transposed else values[rows]
    return out


def group_by_key(slices: Mapping[str, list[HfSlice]]) -> dict[str, list[str]]:
    """Hugging Face name -> the canonical tensors in it, in order."""
    names_by_key: dict[str, list[str]] = {}
    for name, parts in slices.items():
        names_by_key.setdefault(parts[0].key, []).append(name)
    return names_by_key


def parse_token_ids(value: Any) -> list[int]:
    """Value of a key such as eos_token_id (an id, a list or null) as a list. Raises ValueError for anything else."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{value!r}"[:100] + " is not a token id")
    return list(ids)


def _generation_notes(path: Path, vocab_size: int) -> list[str]:
    """Check a generation_config.json, as exports write it again. Returns notes on ids outside the vocabulary."""
    settings, notes = read_json_object(path), []
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        try:
            ids = parse_token_ids(settings.get(key))
        except ValueError as error:
            raise CheckpointError(
                "interop.generation-config-malformed", f"{path}: {key} {error}; correct it, or remove the file"
            ) from None
        if unknown := [i for i in ids if i >= vocab_size]:
            notes.append(f"{path.name}: {key} {unknown[0]} is outside the vocabulary of {vocab_size}")
    return notes


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(truncate(name, 100) for name in names[:5]) + (", ..." if len(names) > 5 else "")
