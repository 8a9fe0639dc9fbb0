"""Weights of others in, Hugging Face folders out: `import_folder` and `export`. CPU, one process, streaming.

In memory at any time: one shard of what is written and one tensor. Both write under a temporary name and rename at the
end. What of a folder is not the model (token ids, dropout rates, generation settings) lies beside the checkpoints of a
run in `hugging_face/` and comes back in its exports.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.format import MODEL, find, step_dir
from engine.checkpoint.lineage import code_versions
from engine.checkpoint.load import Reader, TensorSource
from engine.checkpoint.retention import commit, tidy
from engine.checkpoint.save import manifest_of, write_part
from engine.checkpoint.storage import DISK, Storage, make_folders
from engine.checkpoint.tensorfile import BLOCK_BYTES, DTYPE_NAMES, DTYPES, LazyTensor, write_safetensors
from engine.config.checks import config_errors
from engine.config.dtypes import SAFETENSORS_DTYPES
from engine.config.load import model_config
from engine.config.schema import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from engine.data.tokenize.convert import find as find_tokenizer
from engine.data.tokenize.tokenizer import Tokenizer
from engine.distributed.layout import Layout
from engine.errors import CheckpointError, ConfigError, DataError, FieldError, SecretError
from engine.interop.huggingface.companions import (
    BESIDE,
    TOKENIZER_FACTS,
    content,
    copy_beside,
    copy_extra,
    extra_files,
    tokenizer_files,
)
from engine.interop.huggingface.config_json import extras, json_object, read_config, rope_forms, write_config
from engine.interop.huggingface.families import FAMILIES, Family
from engine.interop.huggingface.weights import (
    CONFIG,
    GENERATION,
    INDEX,
    HfReader,
    assembled,
    contents,
    places,
    token_ids,
)
from engine.interop.megatron.folder import is_megatron
from engine.interop.megatron.source import MegatronSource, open_megatron
from engine.util.files import sync_folder, write_synced

MAX_SHARD_BYTES = 4 << 30
_PRECISIONS = {tensor: name for name, tensor in SAFETENSORS_DTYPES.items()}


Importable = HfReader | MegatronSource


def open_foreign(
    path: Path, max_seq_len: int | None = None, vocab_size: int | None = None, ignore_keys: Sequence[str] = ()
) -> Importable:
    """The weights of a Hugging Face folder, or of a checkpoint of Megatron-LM (vocab_size: without its padding).

    ignore_keys: of config.json, which are then read as if they were not there.
    """
    if is_megatron(path):
        if ignore_keys:
            problem = f"is a key of config.json, and {path} is a checkpoint of Megatron-LM"
            raise ConfigError(
                [
                    FieldError(
                        "interop.ignore-key-without-config-json",
                        "--ignore-key",
                        ignore_keys[0],
                        problem,
                        "Leave it out.",
                    )
                ]
            )
        return open_megatron(path, vocab_size)
    return HfReader(path, max_seq_len, ignore_keys)


def open_source(path: Path, max_seq_len: int | None = None, storage: Storage = DISK) -> TensorSource[Any]:
    """The weights of a Hugging Face folder, or of one of our checkpoints or run folders, signed or not.

    storage: with the secret of one that is signed.
    """
    if (path / CONFIG).exists():
        return HfReader(path, max_seq_len)
    try:
        return Reader(find(path))
    except SecretError:
        if storage is DISK:
            raise
        return Reader(find(path, storage), storage)


def import_folder(
    folder: Path,
    out: Path,
    *,
    max_seq_len: int | None = None,
    vocab_size: int | None = None,
    ignore_keys: Sequence[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    storage: Storage = DISK,
) -> tuple[Path, list[str]]:
    """Write what `open_foreign` opens as a run folder with one checkpoint of step 0; returns that, and notes in words.

    The tensors keep their dtypes and bits. ignore_keys: as of `open_foreign`; the manifest names them. Raises
    ConfigError or CheckpointError for whatever the engine does not have.
    """
    if (out / "checkpoints").exists():
        raise CheckpointError("interop.run-has-checkpoints", f"{out}: holds checkpoints already; choose another folder")
    with open_foreign(folder, max_seq_len, vocab_size, ignore_keys) as reader:
        reader.verify()
        notes, architecture = _copy_tokenizer(folder, out / "tokenizer"), "megatron"
        if isinstance(reader, HfReader):
            reader.check_spare_head()
            notes, architecture = [*reader.notes, *notes], reader.described.family.architecture
        config = _run_config(reader.cfg, out, _PRECISIONS[DTYPE_NAMES[_widest(reader)]])
        root, final = out / "checkpoints", step_dir(out / "checkpoints", 0)
        temporary = root / f".{final.name}.tmp"
        tidy(storage, root, temporary)
        make_folders(storage, temporary)
        sizes = {name: _bytes(entry.shape, entry.dtype) for name, entry in reader.entries[MODEL].items()}
        parts = [
            _write_shard(reader, storage, temporary / f"model-{number:05d}.safetensors", names)
            for number, names in enumerate(runs(sizes, max_shard_bytes), 1)
        ]
        facts = {
            "consumed_samples": 0,
            "consumed_tokens": 0,
            "config": config.model_dump(),
            "data": {"imported_from": str(folder), "architecture": architecture}
            | ({"ignored_keys": list(ignore_keys)} if ignore_keys else {}),
            "versions": code_versions(),
        }
        manifest = manifest_of(parts, Layout(), 0, facts, BLOCK_BYTES)
        if isinstance(reader, HfReader):
            copy_beside(folder, out)
            if left := extra_files(folder)[1]:
                notes = [*notes, f"left out, neither read nor kept for exports: {', '.join(left)}"]
        commit(storage, temporary, final, manifest.encode(storage))
    return final, notes


def widest_of(names: Iterable[str]) -> torch.dtype:
    """The dtype that holds all of these (safetensors' names) exactly: of BF16 and F16 it is float32."""
    return reduce(torch.promote_types, [DTYPES[name] for name in sorted(names)])


def _widest(source: TensorSource[Any]) -> torch.dtype:
    return widest_of({entry.dtype for entry in source.entries[MODEL].values()})


def _write_shard(reader: Importable, storage: Storage, file: Path, names: list[str]) -> dict[str, Any]:
    """Write these tensors, whole, as one file of a checkpoint; what its manifest needs to know of it."""
    entries = {name: reader.entries[MODEL][name] for name in names}
    tensors = {
        f"{MODEL}/{name}": LazyTensor(DTYPES[entry.dtype], tuple(entry.shape), partial(reader.whole, MODEL, name))
        for name, entry in entries.items()
    }
    index = {
        name: {
            "shape": tuple(entry.shape),
            "dtype": entry.dtype,
            "slices": [{"key": key, "offset": (0,) * len(entry.shape), "shape": tuple(entry.shape)}],
        }
        for key, (name, entry) in zip(tensors, entries.items())
    }
    return write_part(storage, file, tensors, {MODEL: index})


def _run_config(model: ModelConfig, out: Path, precision: str) -> Config:
    config = Config(
        run=RunConfig(dir=str(out)),
        model=model,
        train=TrainConfig.model_validate(
            {"precision": precision, "seq_len": max(2, min(model.max_seq_len, TrainConfig().seq_len))}
        ),
        data=DataConfig(tokenizer=str(out / "tokenizer") if (out / "tokenizer").exists() else ""),
    )
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"data": 1, "chunks": 1})})
    if errors := config_errors(config, 1):
        raise ConfigError(errors)
    return config


def _copy_tokenizer(folder: Path, out: Path) -> list[str]:
    """Copy the tokenizer's files; where there is no tokenizer.json, make it from what is there."""
    found = tokenizer_files(folder)
    if not found:
        return ["no tokenizer in the folder: give one with --tokenizer where it is needed"]
    for name in found:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_synced(out / name, content(folder, name))
    if "tokenizer.json" in found:
        return []
    try:
        source, made = find_tokenizer(folder), Tokenizer.load(folder)
    except DataError as error:
        return [f"no tokenizer.json in the folder, and none could be made: {error}"]
    made.save_definition(out)
    if source is None:
        return []
    if made.sentencepiece is not None:
        return [f"{source.path.name} is used itself, by {made.sentencepiece.name}: no tokenizer.json gives its ids"]
    return [f"tokenizer.json made from {source.path.name}"]


def export(
    folder: Path,
    out: Path,
    *,
    dtype: torch.dtype | None,
    tokenizer: Path | None,
    eod: int | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    storage: Storage = DISK,
    extra: bool = False,
) -> tuple[Family, int, list[str]]:
    """Write a checkpoint as a Hugging Face folder; returns the family, the bytes of the weights and notes.

    Writes model-*.safetensors with their index, config.json, generation_config.json, and copies the tokenizer's files.
    dtype: None for that of the checkpoint. eod: id of the tokenizer's end-of-document token. extra: licence, model
    card and other small files of the folder it came from too. The notes say what was changed of that folder.
    Raises CheckpointError when `out` is there already, or no family is this model.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError("interop.output-exists", f"{out}: is there already; choose another folder")
    beside = folder.parent.parent / BESIDE
    with Reader(folder, storage) as reader:
        cfg = ModelConfig.model_validate(reader.manifest.config["model"])
        family, config, generation = _describe(cfg, beside)
        said = _renamed_end(beside, config, generation, eod)
        config["dtype"] = config["torch_dtype"] = str(dtype or _stated(beside, reader)).removeprefix("torch.")
        temporary = out.parent / f".{out.name}.tmp"
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir()
        try:
            total, weight_map = _write_weights(reader, cfg, family, temporary, dtype, max_shard_bytes)
        except CheckpointError:
            shutil.rmtree(temporary)
            raise
    if tokenizer is not None:
        for name in tokenizer_files(tokenizer):
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(tokenizer / name, temporary / name)
    said += copy_extra(beside, temporary if extra else None)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, facts in ((INDEX, index), (GENERATION, generation), (CONFIG, config)):
        write_synced(temporary / name, json.dumps(facts, indent=2).encode() + b"\n")
    sync_folder(temporary)
    os.rename(temporary, out)
    sync_folder(out.parent)
    return family, total, said


def _write_weights(
    reader: Reader, cfg: ModelConfig, family: Family, out: Path, dtype: torch.dtype | None, max_shard_bytes: int
) -> tuple[int, dict[str, str]]:
    """(bytes, their name -> file): the weights in shards of at most so many bytes, three tensors in memory."""
    found, theirs = places(cfg, family)
    inside = contents(found)
    kinds = {key: dtype or DTYPES[reader.entries[MODEL][names[0]].dtype] for key, names in inside.items()}
    sizes = {key: math.prod(shape) * kinds[key].itemsize for key, shape in theirs.items()}
    shards = list(runs(sizes, max_shard_bytes))

    def made(key: str) -> Tensor:
        parts = {name: _narrowed(name, reader.whole(MODEL, name), kinds[key]) for name in inside[key]}
        return assembled(parts, found, theirs[key])

    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {key: LazyTensor(kinds[key], theirs[key], partial(made, key)) for key in keys}
        write_safetensors(out / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(keys, file)
    return sum(sizes.values()), weight_map


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype. Raises CheckpointError where a finite value of it is beyond that."""
    result = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and bool(result.isinf().any()) and bool((result.isinf() & tensor.isfinite()).any()):
        most, kind = float(tensor[tensor.isfinite()].abs().max()), str(dtype).removeprefix("torch.")
        text = f"holds {most:.4g}, and {kind} ends at {torch.finfo(dtype).max:.4g}: it would become infinite"
        raise CheckpointError("interop.value-out-of-range", f"{name}: {text}. Export with --dtype bf16 or fp32")
    return result


def _describe(cfg: ModelConfig, beside: Path) -> tuple[Family, dict[str, Any], dict[str, Any]]:
    """(family, config.json, generation_config.json): what computes this model, with what is kept of its origin."""
    origin = json_object(beside / CONFIG) if (beside / CONFIG).exists() else {}
    near = [f.model_type for f in FAMILIES.values() if cfg.preset.startswith(f.preset)]
    facts, defaults = (model.model_dump(exclude={"preset"}) for model in (cfg, ModelConfig()))
    if origin and _says(beside / CONFIG, facts):
        family = FAMILIES[origin["model_type"]]
        config = {key: value for key, value in origin.items() if key not in _OF_THE_WRITER}
        config |= rope_forms(facts, family, config)
    else:
        family, config = write_config(facts, defaults, [str(origin.get("model_type")), *near])
        config |= _extras(origin, family) if origin else {"use_cache": True}
    generation: dict[str, Any] = {"do_sample": True}
    if (beside / GENERATION).exists():
        generation = json_object(beside / GENERATION)
    elif origin:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: config[key] for key in ids if config.get(key) is not None}
    return family, config, generation


def _renamed_end(beside: Path, config: dict[str, Any], generation: dict[str, Any], eod: int | None) -> list[str]:
    """Let the ids of both files be those of the tokenizer, where it is not the folder's any more; notes in words.

    eod ends documents. What the folder says stays where it names eod too, or where its own tokenizer had the same eod.
    Ids that were the old end (GPT-2's beginning, a padding) follow it.
    """
    if not (beside / CONFIG).exists():
        for facts in (config, generation):
            facts |= {"bos_token_id": eod, "eos_token_id": eod}
        return []
    old = [i for facts in (config, generation) for i in token_ids(facts.get("eos_token_id"))]
    kept = json_object(beside / TOKENIZER_FACTS) if (beside / TOKENIZER_FACTS).exists() else {}
    if eod is None or not old or eod in old or kept.get("eos_token_id") == eod:
        return []
    for facts in (config, generation):
        facts |= {key: eod for key in ("bos_token_id", "pad_token_id") if facts.get(key) in old}
        facts["eos_token_id"] = eod
    return [f"eos_token_id is {eod}, the tokenizer's: the folder said {', '.join(map(str, dict.fromkeys(old)))}"]


def _stated(beside: Path, reader: Reader) -> torch.dtype:
    """The dtype that the folder's config.json gave its weights, if one of them has it; else what holds all of them."""
    origin = json_object(beside / CONFIG) if (beside / CONFIG).exists() else {}
    stored = {
        str(DTYPES[entry.dtype]).removeprefix("torch."): DTYPES[entry.dtype] for entry in reader.entries[MODEL].values()
    }
    return stored.get(str(origin.get("dtype") or origin.get("torch_dtype"))) or _widest(reader)


_OF_THE_WRITER = ("auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


def _says(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a config.json is of exactly this model."""
    try:
        return model_config(path, read_config(path).facts).model_dump(exclude={"preset"}) == facts
    except ConfigError:
        return False


def _extras(origin: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """What a folder's config.json says beside the model: token ids, dropout rates, settings of generation."""
    ours = {*_OF_THE_WRITER, "architectures", "model_type"}
    return {key: value for key, value in extras(origin, family).items() if key not in ours}


def runs(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Names cut in runs of at most `most` bytes, or of one name."""
    run: list[str] = []
    size = 0
    for name, each in sizes.items():
        if run and size + each > most:
            yield run
            run, size = [], 0
        run.append(name)
        size += each
    yield run


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize
