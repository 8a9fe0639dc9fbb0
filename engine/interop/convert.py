"""Imports weights of other projects (`import_folder`) and exports Hugging Face folders (`export`), in one CPU process.

Both stream: one output shard and one tensor are in memory at a time. Both write under a temporary name and rename at
the end. Settings of a folder that are not part of the model (token ids, dropout rates, generation settings) are kept in
`hugging_face/` of the run folder, and written again by its exports.
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

from engine.checkpoint.format import find_checkpoint, step_dir
from engine.checkpoint.lineage import code_versions
from engine.checkpoint.load import Reader, TensorSource
from engine.checkpoint.retention import commit, remove_leftovers
from engine.checkpoint.save import build_manifest, write_part
from engine.checkpoint.storage import DISK, Storage, make_folders
from engine.checkpoint.tensorfile import BLOCK_BYTES, DTYPE_NAMES, DTYPES, LazyTensor, write_safetensors
from engine.config.checks import config_errors
from engine.config.dtypes import SAFETENSORS_DTYPES
from engine.config.load import model_config
from engine.config.phases import saved_model
from engine.config.schema import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from engine.data.tokenize.convert import find as find_tokenizer
from engine.data.tokenize.tokenizer import Tokenizer
from engine.distributed.layout import Layout
from engine.errors import CheckpointError, ConfigError, DataError, FieldError, SecretError
from engine.interop.huggingface.companions import (
    COMPANIONS_DIR,
    TOKENIZER_METADATA,
    copy_companions,
    copy_extra,
    extra_files,
    read_inside,
    tokenizer_files,
)
from engine.interop.huggingface.config_json import extras, read_config, read_json_object, rope_forms, write_config
from engine.interop.huggingface.families import FAMILIES, Family
from engine.interop.huggingface.weights import (
    CONFIG,
    GENERATION,
    INDEX,
    HfReader,
    assemble,
    group_by_key,
    locate_tensors,
    parse_token_ids,
)
from engine.interop.megatron.folder import is_megatron
from engine.interop.megatron.source import MegatronSource, open_megatron
from engine.optim.update_rules import MODEL
from engine.util.files import sync_folder, write_synced

MAX_SHARD_BYTES = 4 << 30
_PRECISIONS = {tensor: name for name, tensor in SAFETENSORS_DTYPES.items()}


Importable = HfReader | MegatronSource


def open_foreign(
    path: Path, max_seq_len: int | None = None, vocab_size: int | None = None, ignore_keys: Sequence[str] = ()
) -> Importable:
    """Open the weights of a Hugging Face folder or of a Megatron-LM checkpoint.

    vocab_size: rows of a Megatron embedding without its padding. ignore_keys: keys of config.json to treat as absent.
    """
    if is_megatron(path):
        if ignore_keys:
            problem = f"is a key of config.json, but {path} is a Megatron-LM checkpoint"
            raise ConfigError(
                [
                    FieldError(
                        "interop.ignore-key-without-config-json",
                        "--ignore-key",
                        ignore_keys[0],
                        problem,
                        "Remove the option.",
                    )
                ]
            )
        return open_megatron(path, vocab_size)
    return HfReader(path, max_seq_len, ignore_keys)


def open_source(path: Path, max_seq_len: int | None = None, storage: Storage = DISK) -> TensorSource[Any]:
    """Open the weights of a Hugging Face folder, or of one of our checkpoints or run folders, signed or not.

    storage: has the secret, if the checkpoint is signed.
    """
    if (path / CONFIG).exists():
        return HfReader(path, max_seq_len)
    try:
        return Reader(find_checkpoint(path))
    except SecretError:
        if storage is DISK:
            raise
        return Reader(find_checkpoint(path, storage), storage)


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
    """Import weights as a run folder with a checkpoint of step 0. Returns the checkpoint folder and notes for the user.

    Tensors are copied bit-exactly, in their dtypes. ignore_keys: see `open_foreign`; they are recorded in the manifest.
    Raises ConfigError or CheckpointError for anything that the engine does not support.
    """
    if (out / "checkpoints").exists():
        raise CheckpointError("interop.run-has-checkpoints", f"{out}: already has checkpoints; choose another folder")
    with open_foreign(folder, max_seq_len, vocab_size, ignore_keys) as reader:
        reader.verify()
        notes, architecture = _copy_tokenizer(folder, out / "tokenizer"), "megatron"
        if isinstance(reader, HfReader):
            reader.check_tied_head()
            notes, architecture = [*reader.notes, *notes], reader.hf_config.family.architecture
        config = _run_config(reader.cfg, out, _PRECISIONS[DTYPE_NAMES[_widest_stored_dtype(reader)]])
        root, final = out / "checkpoints", step_dir(out / "checkpoints", 0)
        temporary = root / f".{final.name}.tmp"
        remove_leftovers(storage, root, temporary)
        make_folders(storage, temporary)
        sizes = {name: _num_bytes(entry.shape, entry.dtype) for name, entry in reader.entries[MODEL].items()}
        parts = [
            _write_shard(reader, storage, temporary / f"model-{number:05d}.safetensors", names)
            for number, names in enumerate(split_by_bytes(sizes, max_shard_bytes), 1)
        ]
        metadata = {
            "consumed_samples": 0,
            "consumed_tokens": 0,
            "config": config.model_dump(),
            "data": {"imported_from": str(folder), "architecture": architecture}
            | ({"ignored_keys": list(ignore_keys)} if ignore_keys else {}),
            "versions": code_versions(),
            "initial_values": "",
        }
        manifest = build_manifest(parts, Layout(), 0, metadata, BLOCK_BYTES)
        if isinstance(reader, HfReader):
            copy_companions(folder, out)
            if skipped := extra_files(folder)[1]:
                notes = [*notes, f"skipped, neither read nor kept for exports: {', '.join(skipped)}"]
        commit(storage, temporary, final, manifest.encode(storage))
    return final, notes


def widest_dtype(names: Iterable[str]) -> torch.dtype:
    """The dtype that represents all of these (as safetensors names them) exactly; for BF16 and F16: float32."""
    return reduce(torch.promote_types, [DTYPES[name] for name in sorted(names)])


def _widest_stored_dtype(source: TensorSource[Any]) -> torch.dtype:
    return widest_dtype({entry.dtype for entry in source.entries[MODEL].values()})


def _write_shard(reader: Importable, storage: Storage, file: Path, names: list[str]) -> dict[str, Any]:
    """Write whole tensors as one file of a checkpoint; returns its manifest entries."""
    entries = {name: reader.entries[MODEL][name] for name in names}
    tensors = {
        f"{MODEL}/{name}": LazyTensor(DTYPES[entry.dtype], tuple(entry.shape), partial(reader.read_whole, MODEL, name))
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
    """Copy the tokenizer files; build tokenizer.json from the others if it is missing. Returns notes for the user."""
    found = tokenizer_files(folder)
    if not found:
        return ["no tokenizer in the folder: pass --tokenizer to commands that need one"]
    for name in found:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_synced(out / name, read_inside(folder, name))
    if "tokenizer.json" in found:
        return []
    try:
        source, tokenizer = find_tokenizer(folder), Tokenizer.load(folder)
    except DataError as error:
        return [f"no tokenizer.json in the folder, and it could not be built: {error}"]
    tokenizer.save_definition(out)
    if source is None:
        return []
    if tokenizer.sentencepiece is not None:
        library = tokenizer.sentencepiece.name
        return [f"{source.path.name} is used directly, by {library}: no tokenizer.json produces its ids"]
    return [f"tokenizer.json built from {source.path.name}"]


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
    """Export a checkpoint as a Hugging Face folder. Returns (family, bytes of the weights, notes for the user).

    Writes model-*.safetensors with their index, config.json and generation_config.json, and copies the tokenizer files.
    dtype: None keeps the checkpoint's. eod: id of the tokenizer's end-of-document token. extra: also copy the licence,
    model card and other small files of the imported folder. The notes list differences from the imported folder.
    Raises CheckpointError if `out` exists, or no family can express this model.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError("interop.output-exists", f"{out}: already exists; choose another folder")
    companions = folder.parent.parent / COMPANIONS_DIR
    with Reader(folder, storage) as reader:
        cfg = ModelConfig.model_validate(saved_model(reader.manifest.config, reader.manifest.step))
        family, config, generation = _config_files(cfg, companions)
        notes = _update_token_ids(companions, config, generation, eod)
        config["dtype"] = config["torch_dtype"] = str(dtype or _stated_dtype(companions, reader)).removeprefix("torch.")
        temporary = out.parent / f".{out.name}.tmp"
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # left by an interrupted export
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
    notes += copy_extra(companions, temporary if extra else None)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, value in ((INDEX, index), (GENERATION, generation), (CONFIG, config)):
        write_synced(temporary / name, json.dumps(value, indent=2).encode() + b"\n")
    sync_folder(temporary)
    os.rename(temporary, out)
    sync_folder(out.parent)
    return family, total, notes


def _write_weights(
    reader: Reader, cfg: ModelConfig, family: Family, out: Path, dtype: torch.dtype | None, max_shard_bytes: int
) -> tuple[int, dict[str, str]]:
    """Write the weights in shards. Returns (bytes, Hugging Face name -> file). At most three tensors are in memory."""
    slices, hf_shapes = locate_tensors(cfg, family)
    names_by_key = group_by_key(slices)
    kinds = {key: dtype or DTYPES[reader.entries[MODEL][names[0]].dtype] for key, names in names_by_key.items()}
    sizes = {key: math.prod(shape) * kinds[key].itemsize for key, shape in hf_shapes.items()}
    shards = list(split_by_bytes(sizes, max_shard_bytes))

    def make(key: str) -> Tensor:
        parts = {name: _cast(name, reader.read_whole(MODEL, name), kinds[key]) for name in names_by_key[key]}
        return assemble(parts, slices, hf_shapes[key])

    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {key: LazyTensor(kinds[key], hf_shapes[key], partial(make, key)) for key in keys}
        write_safetensors(out / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(keys, file)
    return sum(sizes.values()), weight_map


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor to `dtype`. Raises CheckpointError if a finite value would overflow to infinity."""
    result = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and bool(result.isinf().any()) and bool((result.isinf() & tensor.isfinite()).any()):
        most, kind = float(tensor[tensor.isfinite()].abs().max()), str(dtype).removeprefix("torch.")
        text = f"has the value {most:.4g}, and the largest in {kind} is {torch.finfo(dtype).max:.4g}: it would overflow"
        raise CheckpointError("interop.value-out-of-range", f"{name}: {text}. Export with --dtype bf16 or fp32")
    return result


def _config_files(cfg: ModelConfig, companions: Path) -> tuple[Family, dict[str, Any], dict[str, Any]]:
    """(family, config.json, generation_config.json) of a model, with the settings kept from the imported folder."""
    origin = read_json_object(companions / CONFIG) if (companions / CONFIG).exists() else {}
    near = [f.model_type for f in FAMILIES.values() if cfg.preset.startswith(f.preset)]
    fields, defaults = (model.model_dump(exclude={"preset"}) for model in (cfg, ModelConfig()))
    if origin and _describes_model(companions / CONFIG, fields):
        family = FAMILIES[origin["model_type"]]
        config = {key: value for key, value in origin.items() if key not in _WRITER_KEYS}
        config |= rope_forms(fields, family, config)
    else:
        family, config = write_config(fields, defaults, [str(origin.get("model_type")), *near])
        config |= _extras(origin, family) if origin else {"use_cache": True}
    generation: dict[str, Any] = {"do_sample": True}
    if (companions / GENERATION).exists():
        generation = read_json_object(companions / GENERATION)
    elif origin:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: config[key] for key in ids if config.get(key) is not None}
    return family, config, generation


def _update_token_ids(
    companions: Path, config: dict[str, Any], generation: dict[str, Any], eod: int | None
) -> list[str]:
    """Set the token ids in both files to those of a tokenizer that replaced the folder's own. Returns notes.

    eod: id of the end-of-document token. Nothing changes if the folder lists eod too, or if its own tokenizer had the
    same eod. Other ids that were equal to the old end (GPT-2's bos, a padding id) change with it.
    """
    if not (companions / CONFIG).exists():
        for settings in (config, generation):
            settings |= {"bos_token_id": eod, "eos_token_id": eod}
        return []
    old = [i for settings in (config, generation) for i in parse_token_ids(settings.get("eos_token_id"))]
    kept = read_json_object(companions / TOKENIZER_METADATA) if (companions / TOKENIZER_METADATA).exists() else {}
    if eod is None or not old or eod in old or kept.get("eos_token_id") == eod:
        return []
    for settings in (config, generation):
        settings |= {key: eod for key in ("bos_token_id", "pad_token_id") if settings.get(key) in old}
        settings["eos_token_id"] = eod
    return [f"eos_token_id is {eod}, the tokenizer's: the folder had {', '.join(map(str, dict.fromkeys(old)))}"]


def _stated_dtype(companions: Path, reader: Reader) -> torch.dtype:
    """The dtype named in the folder's config.json if any tensor has it; otherwise the widest dtype of the tensors."""
    origin = read_json_object(companions / CONFIG) if (companions / CONFIG).exists() else {}
    stored = {
        str(DTYPES[entry.dtype]).removeprefix("torch."): DTYPES[entry.dtype] for entry in reader.entries[MODEL].values()
    }
    return stored.get(str(origin.get("dtype") or origin.get("torch_dtype"))) or _widest_stored_dtype(reader)


_WRITER_KEYS = ("auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


def _describes_model(path: Path, fields: Mapping[str, Any]) -> bool:
    """Whether a config.json describes exactly the model with these fields."""
    try:
        return model_config(path, read_config(path).model_fields).model_dump(exclude={"preset"}) == fields
    except ConfigError:
        return False


def _extras(origin: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Keys of a config.json that are not part of the model: token ids, dropout rates, generation settings."""
    written = {*_WRITER_KEYS, "architectures", "model_type"}
    return {key: value for key, value in extras(origin, family).items() if key not in written}


def split_by_bytes(sizes: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Split names into consecutive groups of at most `max_bytes`, or of a single larger tensor."""
    group: list[str] = []
    size = 0
    for name, each in sizes.items():
        if group and size + each > max_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += each
    yield group


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize
