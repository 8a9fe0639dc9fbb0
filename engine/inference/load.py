"""Load a checkpoint for use: its config in the current layout, its weights, its tokenizer."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.format import find_checkpoint, read_manifest
from engine.checkpoint.links import reject_links
from engine.checkpoint.load import Reader, load_into
from engine.checkpoint.storage import DISK, Storage
from engine.config.derived import data_degree, layers_per_stage
from engine.config.phases import saved_model
from engine.config.schema import Config
from engine.data.tokenize.file_names import is_tokenizer
from engine.data.tokenize.tokenizer import Tokenizer
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import AXES, Layout
from engine.distributed.sharding import parameters
from engine.errors import CheckpointError
from engine.model.build import stage_shapes
from engine.model.layers import Build, ComputeBackends, ModelPart
from engine.model.stages import build_part
from engine.optim.optimizer import StateShard
from engine.optim.precision import PRECISIONS
from engine.optim.update_rules import MODEL


def config_of(
    checkpoint: Path, storage: Storage = DISK, *, tensor: int = 1, pipeline: int = 1, world: int = 1
) -> Config:
    """The config of a checkpoint with its layout replaced. world: number of ranks; the data degree follows from it.

    train.global_batch_size is rounded up to a multiple that these data ranks can split: not always the run's own. The
    result has the model of the checkpoint's phase, and no phases.
    """
    manifest = read_manifest(find_checkpoint(checkpoint, storage), storage)
    config = Config.model_validate({**manifest.config, "model": saved_model(manifest.config, manifest.step)})
    parallel = config.parallel.model_copy(
        update={
            **dict.fromkeys(AXES, 1),
            "tensor": tensor,
            "pipeline": pipeline,
            "data": 0,
            "schedule": "1f1b",
            "chunks": 1,
            "layers": "",
            "sequence": config.train.seq_len % tensor == 0,
            "keep_gathered": False,
        }
    )
    parallel = parallel.model_copy(update={"data": data_degree(parallel, world)})
    batch = config.train.micro_batch_size * parallel.data
    whole = -(-config.train.global_batch_size // batch) * batch
    train = config.train.model_copy(update={"global_batch_size": whole, "fp8": "none"})
    return config.model_copy(update={"parallel": parallel, "train": train, "phase": ()})


def load_stage(checkpoint: Path, cfg: Config, ctx: ParallelContext, storage: Storage = DISK) -> ModelPart:
    """Load this rank's stage of the model from a checkpoint, without optimizer state. Collective."""
    build = Build(ctx, backends=ComputeBackends(documents=cfg.data.separate_documents))
    model = build_part(cfg.model, build, stage_shapes(layers_per_stage(cfg))[ctx.pipeline.rank])
    with Reader(find_checkpoint(checkpoint, storage), storage) as reader:
        load_into(reader, (StateShard(MODEL, p, 0, p.data.view(-1)) for p in parameters(model)), ctx)
    return model


def load_model(checkpoint: Path, storage: Storage = DISK) -> ModelPart:
    """Load the whole model on this process, on the CPU, in the precision it was trained in."""
    cfg = config_of(checkpoint, storage)
    dtype = PRECISIONS[cfg.train.precision].compute
    ctx = make_context(Layout(), 0, dtype=dtype)
    return load_stage(checkpoint, cfg, ctx, storage)


def tokenizer_folder(checkpoint: Path, wanted: Path | None, storage: Storage = DISK) -> Path:
    """Folder of the tokenizer: `wanted`, else the copy in the run folder, else the run's data.tokenizer.

    Raises CheckpointError if there is none.
    """
    if wanted is not None:
        return wanted
    folder = find_checkpoint(checkpoint, storage)
    given = read_manifest(folder, storage).config["data"]["tokenizer"]
    for candidate in (folder.parent.parent / "tokenizer", Path(given)):
        if (candidate == folder.parent.parent / "tokenizer" or given) and is_tokenizer(candidate):
            if candidate == folder.parent.parent / "tokenizer":
                reject_links(folder.parent.parent)
            return candidate
    raise CheckpointError(
        "inference.no-tokenizer", f"{checkpoint}: the run has no tokenizer; give one with --tokenizer DIR"
    )


def load_tokenizer(checkpoint: Path, wanted: Path | None, storage: Storage = DISK) -> Tokenizer:
    """Load the tokenizer of `tokenizer_folder`."""
    return Tokenizer.load(tokenizer_folder(checkpoint, wanted, storage))
