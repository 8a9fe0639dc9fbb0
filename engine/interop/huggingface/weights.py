"""A Hugging Face folder as a source of canonical tensors, and back: exact rearrangements, by the tables of `families`.

Every canonical tensor is a set of rectangles of theirs: all of one, rows of a fused one, each head's rows of one that
is fused by heads, or any of these of a transposed matrix. So a rank reads what it holds from a folder of any family, as
it does from our own checkpoints, and no tensor is ever whole in memory that need not be. Nothing of the folder is run:
safetensors only, file names from the index are plain names, no pickle.
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

from engine.checkpoint.format import MODEL
from engine.checkpoint.load import TensorSource
from engine.checkpoint.tensorfile import DTYPES
from engine.config.load import model_config
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError, truncate
from engine.interop.huggingface.config_json import ParsedConfig, json_object, read_config
from engine.interop.huggingface.families import Family
from engine.model.transformer import tensor_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")


@dataclass(frozen=True)
class HfSlice:
    """A rectangle of a canonical tensor, and where it is: in tensor `key` of `file` from row `start` on, all columns.

    transposed: the tensor holds it as [columns, rows].
    """

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    transposed: bool

    def stored_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """A rectangle of this one, counted from its corner -> where it is in the tensor."""
        rows = slice(index[0].start + self.start, index[0].stop + self.start)
        return (index[1], rows) if self.transposed else (rows, *index[1:])


@dataclass(frozen=True)
class HfTensor:
    """A canonical tensor of a folder."""

    shape: tuple[int, ...]
    dtype: str
    slices: Sequence[HfSlice]


def hf_name(canonical: str, family: Family) -> str:
    """Their name of the tensor that a canonical one lies in."""
    stem, suffix = canonical.rsplit(".", 1)
    number = re.search(r"\.(\d+)\.", stem)
    if number is None:
        return f"{family.names[stem]}.{suffix}"
    return f"{family.names[stem.replace(number[0], '.{}.', 1)].format(number[1])}.{suffix}"


def locate_tensors(cfg: ModelConfig, family: Family) -> tuple[dict[str, list[HfSlice]], dict[str, tuple[int, ...]]]:
    """Canonical name -> its places, files left empty; their name -> the shape it must have."""
    shapes = tensor_shapes(cfg)
    inside: dict[str, list[str]] = {}
    for name in shapes:
        inside.setdefault(hf_name(name, family), []).append(name)
    found: dict[str, list[HfSlice]] = {}
    hf_shapes: dict[str, tuple[int, ...]] = {}
    for key, names in inside.items():
        stem = key.rsplit(".", 1)[0]
        groups = cfg.num_heads if stem.endswith(family.by_head) and family.by_head else 1
        transposed = bool(family.transposed) and stem.endswith(family.transposed) and len(shapes[names[0]]) == 2
        rows = sum(shapes[name][0] for name in names)
        rest = shapes[names[0]][1:]
        hf_shapes[key] = (*rest, rows) if transposed else (rows, *rest)
        before = 0
        for name in names:
            each = shapes[name][0] // groups
            found[name] = [
                HfSlice(
                    "",
                    key,
                    (group * each, *(0 for _ in rest)),
                    (each, *rest),
                    group * (rows // groups) + before,
                    transposed,
                )
                for group in range(groups)
            ]
            before += each
    return found, hf_shapes


class HfReader(TensorSource[HfTensor]):
    """The source that a Hugging Face folder is. Raises ConfigError or CheckpointError for all that it cannot be.

    max_seq_len: of the model that is made of it, where that is less than the folder's. ignore_keys: of its config.json.
    Attributes: `hf_config` (its config.json), `cfg` (the model), `notes` (what of the folder is not read, or is not as
    it says, in words).
    """

    def __init__(self, folder: Path, max_seq_len: int | None = None, ignore_keys: Sequence[str] = ()):
        super().__init__(folder, {})
        self._open: tuple[str, Any] = ("", None)
        self._lock = threading.Lock()
        self.hf_config: ParsedConfig = read_config(folder / CONFIG, max_seq_len, ignore_keys)
        self.cfg: ModelConfig = model_config(folder, self.hf_config.model_fields)
        self.notes: list[str] = list(self.hf_config.notes)
        self.head_key = f"{self.hf_config.family.names['head']}.weight"  # some folders of tied models hold it too
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
        """A file, open. One at a time is held: a mapped file counts in this process's memory, page by page as read."""
        with self._lock:
            if self._open[0] != name:
                if not (self.folder / name).is_file():  # a pipe would be waited for
                    raise OSError(errno.EINVAL, "is not a regular file")
                self._open = (name, safe_open(self.folder / name, framework="pt"))
            return self._open[1]

    def _files(self) -> dict[str, str]:
        """Their tensor name -> file. As in transformers a single file comes before an index."""
        listed: dict[str, Any] = {}
        names = [SINGLE]
        if (self.folder / SINGLE).exists():
            if (self.folder / INDEX).exists():
                self.notes.append(f"{INDEX} is not read: {SINGLE} is there too and comes first, as in transformers")
        elif (self.folder / INDEX).exists():
            listed = json_object(self.folder / INDEX).get("weight_map") or {}
            if not isinstance(listed, dict) or not listed or not all(isinstance(f, str) for f in listed.values()):
                raise CheckpointError(
                    "interop.index-malformed", f"{self.folder / INDEX}: has no weight_map of names and files; damaged"
                )
            names = sorted(set(listed.values()))
        else:
            raise self._no_weights()
        found: dict[str, str] = {}
        for name in names:
            if not _PLAIN.fullmatch(name):
                raise CheckpointError(
                    "interop.shard-name-not-plain",
                    f"{self.folder / INDEX}: {name!r} is not the plain name of a safetensors file",
                )
            if not (self.folder / name).exists():
                text = "which is not here: a shard is missing, or the index is a stale one of another save"
                raise CheckpointError(
                    "interop.shard-missing", f"{self.folder / INDEX}: names {name}, {text}; get the files again"
                )
            for key in self._keys(name):
                if key in found:
                    text = f"{key} is in {found[key]} and in {name}; the folder is a mixture of two saves"
                    raise CheckpointError(
                        "interop.tensor-twice", f"{self.folder}: {text}. Remove the files of one of them"
                    )
                found[key] = name
        self._compare_with_index(found, listed)
        others = {p.name for p in self.folder.glob("*.safetensors")} - set(names)
        if others:
            self.notes.append(f"not read: {_first_names(sorted(others))}, which the model's weights do not name")
        if (self.folder / "adapter_config.json").exists():
            self.notes.append("adapter_config.json: no adapter is read, the model is that of the weights beside it")
        return found

    def _keys(self, name: str) -> list[str]:
        try:
            return list(self._file(name).keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "interop.shard-unreadable", f"{self.folder / name}: {error}; get the file again"
            ) from None

    def _compare_with_index(self, found: Mapping[str, str], listed: Mapping[str, str]) -> None:
        """Take from a stale index what transformers takes too, with a note; refuse it where a tensor is missing."""
        spare = {self.head_key} if self.cfg.tie_embeddings else set()
        missing = [key for key in listed if key not in found and key not in spare]
        if missing:
            text = (
                f"{missing[0]} is not in {listed[missing[0]]}, where the index says it is, nor in another of its files"
            )
            raise CheckpointError(
                "interop.index-stale",
                f"{self.folder / INDEX}: {text}; a stale index of another save? Get the files again",
            )
        moved = [key for key, file in listed.items() if found.get(key, file) != file]
        moved += [key for key in found if listed and key not in listed]
        if moved:
            self.notes.append(f"{INDEX} is stale: {_first_names(moved)} lie elsewhere than it says, and are read there")

    def _no_weights(self) -> CheckpointError:
        pickled = sorted(p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if not pickled:
            others = sorted(p.name for p in self.folder.glob("*.safetensors"))
            there = f", only {_first_names(others)}; rename a single whole one to {SINGLE}" if others else ""
            return CheckpointError("interop.no-weights", f"{self.folder}: neither {SINGLE} nor {INDEX} is here{there}")
        return CheckpointError(
            "interop.weights-are-pickles",
            f"{self.folder}: the weights are in {pickled[0]}, a pickle, which can run code when it is read; the engine "
            "reads safetensors only. Get the model's safetensors files, or in a sandbox: AutoModelForCausalLM"
            ".from_pretrained(DIR).save_pretrained(NEW) of transformers writes them",
        )

    def _header(self, file: str, key: str) -> tuple[tuple[int, ...], str]:
        view = self._file(file).get_slice(key)
        return tuple(view.get_shape()), str(view.get_dtype())

    def _locate(self, files: Mapping[str, str]) -> dict[str, HfTensor]:
        """Check names, shapes and dtypes of all tensors and say where the canonical ones are."""
        family = self.hf_config.family
        found, hf_shapes = locate_tensors(self.cfg, family)
        headless = not any(key.startswith(family.prefix) for key in files)  # saved without its head: no prefix
        actual = {key: key.removeprefix(family.prefix) if headless else key for key in hf_shapes}
        embed = hf_name("embed.weight", family)
        if self.cfg.tie_embeddings and actual[embed] not in files and self.head_key in files:
            actual[embed] = self.head_key  # one matrix under two names, of which this one was saved
        if missing := [key for key in actual.values() if key not in files]:
            beside = (self.folder / SINGLE).exists() and (self.folder / INDEX).exists()
            where = f" (only {SINGLE} was read, not {INDEX})" if beside else ""
            raise CheckpointError(
                "interop.tensors-missing",
                f"{self.folder}: lacks {len(missing)} tensors of the model: {_first_names(missing)}{where}",
            )
        known = {*actual.values(), *([self.head_key] if self.cfg.tie_embeddings else [])}
        extra = [key for key in files if key not in known and not key.endswith(family.buffers)]
        if extra:
            raise CheckpointError(
                "interop.tensors-unknown",
                f"{self.folder}: holds {len(extra)} tensors that {family.architecture} with this {CONFIG} does not "
                f"have: {_first_names(extra)}; the engine refuses to leave them out",
            )
        for key, shape in hf_shapes.items():
            have, dtype = self.headers[actual[key]]
            if have != shape:
                text = f"{actual[key]} has shape {list(have)}, {CONFIG} says {list(shape)}"
                raise CheckpointError("interop.shape-differs", f"{self.folder / files[actual[key]]}: {text}")
            if dtype not in DTYPES:
                text = f"{actual[key]} is {dtype}; the engine reads {', '.join(DTYPES)}, no quantised weights"
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
                "interop.shard-unreadable", f"{self.folder / part.file}: {part.key}: {error}; get the file again"
            ) from None
        target.copy_(block.t() if part.transposed else block)

    def check_tied_head(self, rows: int = 4096) -> None:
        """A folder of a tied model may hold the head too: then it must be the embedding. Raises CheckpointError."""
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
                f"{self.folder}: tie_word_embeddings is true, but {self.head_key} is there and "
                f"is not the embedding matrix, {hf_name('embed.weight', self.hf_config.family)}; "
                "if the model has a head of its own, config.json must say tie_word_embeddings false",
            )


def assemble(parts: Mapping[str, Tensor], found: Mapping[str, list[HfSlice]], shape: tuple[int, ...]) -> Tensor:
    """Their tensor of this shape from all the canonical ones that lie in it; of one that is all of it, no copy."""
    if len(parts) == 1:
        [(name, values)] = parts.items()
        if len(found[name]) == 1:
            return values.t() if found[name][0].transposed else values
    out = torch.empty(shape, dtype=next(iter(parts.values())).dtype)
    for name, values in parts.items():
        for place in found[name]:
            rows = slice(place.offset[0], place.offset[0] + place.shape[0])
            target = place.stored_index(tuple(slice(0, length) for length in place.shape))
            out[target] = values[rows].t() if place.transposed else values[rows]
    return out


def group_by_key(found: Mapping[str, list[HfSlice]]) -> dict[str, list[str]]:
    """Their name -> the canonical tensors that lie in it, in order."""
    inside: dict[str, list[str]] = {}
    for name, parts in found.items():
        inside.setdefault(parts[0].key, []).append(name)
    return inside


def parse_token_ids(value: Any) -> list[int]:
    """The ids that a key such as eos_token_id holds: one, several or none. Raises ValueError for anything else."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{value!r}"[:100] + " is no token id")
    return list(ids)


def _generation_notes(path: Path, vocab_size: int) -> list[str]:
    """Check a generation_config.json now, as exports give it back; notes of ids that the model does not have."""
    facts, notes = json_object(path), []
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        try:
            ids = parse_token_ids(facts.get(key))
        except ValueError as error:
            raise CheckpointError(
                "interop.generation-config-malformed", f"{path}: {key} {error}; correct it, or remove the file"
            ) from None
        if odd := [i for i in ids if i >= vocab_size]:
            notes.append(f"{path.name}: {key} {odd[0]} is outside of the vocabulary of {vocab_size}")
    return notes


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(truncate(name, 100) for name in names[:5]) + (", ..." if len(names) > 5 else "")
