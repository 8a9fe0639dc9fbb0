"""Validation loss, perplexity and bits per byte of a corpus, in any layout, run by the pipeline executor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.batch import Rows, micro_batches
from engine.checkpoint.format import find_checkpoint, read_manifest
from engine.checkpoint.storage import DISK, Storage
from engine.config.derived import Derived
from engine.config.schema import Config
from engine.data.samples.corpora import end_of_document, scoring_transforms
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.order import SampleOrder
from engine.distributed.collectives import all_reduce_
from engine.distributed.context import ParallelContext
from engine.errors import EXIT_OK, ConfigError, DataError, FieldError
from engine.inference.load import load_stage
from engine.pipeline.actions import Plan
from engine.pipeline.executor import contributes_loss, execute, local_totals
from engine.pipeline.schedules import forward_only
from engine.pipeline.stage import Stage
from engine.train.objective import checked_counts, count_labels


@dataclass(frozen=True)
class Score:
    """Validation result. loss: mean nats per scored token, by weight. ppl: exp(loss). tokens: number of scored tokens.

    Tokens masked by data.mask_eod and data.mask_tokens are not scored. bpb: bits per byte of text, assuming that tokens
    that are not scored have the same mean loss. unigram: entropy of the corpus' tokens in nats, the loss of the best
    model without context. bpb and unigram are None if the corpus' JSON file lacks the statistics. sums: the named sums
    of the model's parts, as means over the scored tokens; `loss` does not contain them.
    """

    loss: float
    ppl: float
    bpb: float | None
    unigram: float | None
    tokens: int
    sums: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """The values that are not None, by name, with those of `sums`."""
        values = asdict(self)
        return {name: value for name, value in (values | values.pop("sums")).items() if value is not None}

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f} nats/token, perplexity {self.ppl:.2f}"
        if self.bpb is not None:
            text += f", {self.bpb:.4f} bits/byte"
        text += f" over {self.tokens:,} tokens"
        return text if self.unigram is None else f"{text}; unigrams alone: {self.unigram:.4f}"


class Evaluator:
    """Scores samples of one corpus with the loss mask of training.

    The samples, and so the score, do not depend on the layout. plan: any plan with the placement of `stages`.
    metadata: data metadata of the run, with the loss mask. batch: sequences per global batch of `run`; 0: as in `cfg`.
    """

    def __init__(
        self,
        plan: Plan,
        stages: Mapping[int, Stage],
        ctx: ParallelContext,
        dataset: IndexedDataset,
        cfg: Config,
        metadata: Mapping[str, Any],
        batch: int = 0,
    ):
        self.names: tuple[str, ...] = ()
        self.batch = batch or cfg.train.global_batch_size
        self.plan, self.stages, self.ctx, self.dataset, self.cfg = plan, stages, ctx, dataset, cfg
        self.order = SampleOrder(dataset, cfg.train.seq_len, cfg.train.seed, short=True)
        separate = end_of_document([dataset], "separate_documents") if cfg.data.separate_documents else None
        self.transforms = scoring_transforms(cfg, metadata, separate)

    def run(self, batches: int) -> Score:
        """Score the first `batches` global batches of the sample order; 0: the whole corpus once. Collective."""
        score = self.run_unless(lambda: False, batches)
        assert score is not None
        return score

    def run_unless(self, stopping: Callable[[], bool], batches: int) -> Score | None:
        """As `run`, but None once `stopping()` is true; called before each global batch, equal on all ranks."""
        ctx, mbs = self.ctx, self.cfg.train.micro_batch_size
        total = self.order.samples_per_epoch + (self.order.tail > 0)  # the last sample may be shorter
        if batches:
            total = min(total, batches * self.batch)
        mine = np.arange(ctx.samples.rank, total, ctx.samples.size, dtype=np.int64)
        per_rank = -(-total // ctx.samples.size)
        chunk = mbs * max(1, self.cfg.train.global_batch_size // (mbs * ctx.samples.size))
        totals = torch.zeros((), dtype=torch.float64, device=ctx.device)
        for begin in range(0, per_rank, chunk):
            if stopping():
                return None
            totals = totals + self._chunk(mine[begin : begin + chunk], min(chunk, per_rank - begin))
        loss, *sums = all_reduce_(totals, ctx.world).tolist()
        counted = checked_counts(sums[-3:])
        if not counted.weight:
            raise DataError(
                "train.nothing-to-score",
                f"{self.dataset.prefix}: data.mask_eod and data.mask_tokens mask every token",
            )
        named = zip(self.names, sums[:-3])
        return self._score(loss / counted.weight, counted.number, {name: x / counted.weight for name, x in named})

    def _chunk(self, samples: np.ndarray, count: int) -> torch.Tensor:
        """This rank's [loss, named sums, counts of labels] of `count` samples, to be summed over the world.

        If this rank has fewer samples, the rest is padding without weight.
        """
        mbs = self.cfg.train.micro_batch_size
        padded = -(-count // mbs) * mbs
        rows = torch.zeros(padded, self.cfg.train.seq_len + 1, dtype=torch.int64)
        weights = torch.zeros(padded, self.cfg.train.seq_len, dtype=torch.float64)
        numbers = torch.zeros(padded, dtype=torch.int64)
        numbers[: len(samples)] = torch.from_numpy(samples)
        whole = samples[samples < self.order.samples_per_epoch]
        if len(whole):
            rows[: len(whole)] = torch.from_numpy(self.order.gather(whole))
            weights[: len(whole)] = 1
        if len(whole) < len(samples):
            rows[len(whole), : self.order.tail + 1] = torch.from_numpy(self.order.gather_tail())
            weights[len(whole), : self.order.tail] = 1
        whole_batches = micro_batches(Rows(rows, weights, numbers, torch.zeros_like(numbers)), mbs, self.transforms)
        batches = [b.part(self.ctx.positions.rank, self.ctx.positions.size) for b in whole_batches]
        there = [batch.to(self.ctx.device) for batch in batches]
        done = execute(forward_only(self.plan, len(there)), self.stages, self.ctx, there)
        self.names = tuple(done.sums)
        counts = count_labels(batches) * float(contributes_loss(self.plan, self.ctx))
        return torch.cat((local_totals(done, self.ctx), counts.to(self.ctx.device)))

    def _score(self, loss: float, tokens: int, sums: dict[str, float]) -> Score:
        meta = self.dataset.meta
        bpb = None
        if meta.get("text_bytes"):
            bpb = loss / math.log(2) * self.dataset.num_tokens / meta["text_bytes"]
        return Score(loss, math.exp(min(loss, 700.0)), bpb, meta.get("unigram_entropy"), tokens, sums)


def evaluate(
    cfg: Config,
    derived: Derived,
    ctx: ParallelContext,
    checkpoint: Path,
    data: str,
    batches: int,
    storage: Storage = DISK,
) -> int:
    """`engine evaluate`: score a corpus with a checkpoint and print the result on rank 0. Collective.

    derived: computed from cfg. batches: number of global batches to score, each as large as in the run that saved the
    checkpoint; 0: the whole corpus.
    """
    if not data:
        problem = "no corpus was given and the run had no data.valid"
        raise ConfigError([FieldError("train.no-corpus-to-score", "--data", data, problem, "Give --data PREFIX.")])
    dataset = IndexedDataset(data, vocab_size=cfg.model.vocab_size)
    model = load_stage(checkpoint, cfg, ctx, storage)
    folder = find_checkpoint(checkpoint, storage)
    manifest = read_manifest(folder, storage)
    batch = int(manifest.config["train"]["global_batch_size"])
    stages = {ctx.pipeline.rank: Stage(model, (), None)}
    score = Evaluator(derived.first_plan, stages, ctx, dataset, cfg, manifest.data, batch).run(batches)
    if ctx.rank == 0:
        print(f"{folder} on {data}: {score}")
    return EXIT_OK
