"""Mutations: faults that peers really had, put in one at a time by a small patch, each to be caught by a test.

    python tests/mutations.py                        # all of them (`make test-mutations`)
    python tests/mutations.py --only tied_gradient_counted_twice
    python tests/mutations.py --without-extensions   # the same where nothing is built

A test that cannot fail proves nothing; this is the figure for how good the tests are. Every mutation is a textual
replacement that fits exactly once, so that it says so when the code has moved on. It is applied to a copy of the
repository in a temporary folder, where the named tests must pass without it and fail by an assertion with it: a
mutation that cannot be imported, or that stops in an error of its own, counts as broken, and so does a silent hang.
Where a kernel of ours and plain torch do the same, a fault in one is hidden while the other runs: such a mutation says
which `path` it is on. Faults of the torch path are tried without the built extensions, always; those of the kernels'
path with them, and where there are none they are named as not tried.
Tests run in a fork of this process, which has imported everything but the engine: a mutation costs what its test does.
The issues are those that the faults come from; where none is given, the fault is a classic that has many.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Column, Table

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 400.0
WARM = "torch torch.distributed torch.utils.flop_counter torch.utils.tensorboard sympy numpy hypothesis.strategies"
WARM += " pydantic tyro safetensors tokenizers matplotlib.figure"
# errors that a mutation makes of its own, instead of being caught by a test
OWN_ERRORS = re.compile(
    r"^(?:E +)?(?:NameError|ImportError|SyntaxError|AttributeError|UnboundLocalError)\b", re.MULTILINE
)


@dataclass(frozen=True)
class Mutation:
    """One fault. why: what went wrong and where; old -> new in `file`; tests: pytest node ids, one of which fails.

    path: "both" where the fault shows with and without the extensions, "kernels" or "torch" where only that one has it.
    """

    name: str
    why: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    path: str = "both"

    def apply(self, root: Path) -> None:
        """Put the fault into the copy of the repository at `root`."""
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise LookupError(
                f"mutation {self.name}: its text occurs {text.count(self.old)} times in {self.file}, not once; "
                "the code has moved on: write it anew"
            )
        path.write_text(text.replace(self.old, self.new))


def small(*names: str) -> tuple[str, ...]:
    """The two-rank cases of test_equivalence.SMALL."""
    return tuple(f"tests/test_equivalence.py::test_two_ranks_equal_one[{name}]" for name in names)


def shape(name: str) -> tuple[str, ...]:
    """A family's shape in a layout."""
    return (f"tests/test_shapes.py::test_layout_equals_one_process[{name}]",)


def hf(name: str) -> tuple[str, ...]:
    """A family beside transformers."""
    return (f"tests/test_hf.py::test_import_gives_transformers_logits_and_gradients[{name}]",)


PLAIN = ("tests/test_equivalence.py::test_one_process_equals_plain_torch[True]",)
LATE = ("tests/test_equivalence.py::test_what_is_on_its_way_is_waited_for[1]",)
RESUME = ("tests/test_bitwise.py::test_resume_in_the_same_layout_changes_no_bit[fp64-1]",)
RESUME_BF16 = ("tests/test_bitwise.py::test_resume_in_the_same_layout_changes_no_bit[bf16-1]",)
OVERFLOW = ("tests/test_precision.py::test_an_overflow_leaves_out_the_update_on_all_ranks_and_survives_a_restart",)
UNDONE = ("tests/test_precision.py::test_the_scale_is_undone_to_the_bit",)
LOADER = ("tests/test_data.py::test_layout_and_restarts_do_not_change_the_samples",)


def norms(*cases: str) -> tuple[str, ...]:
    """Cases of the test that gives every layout a known gradient."""
    return tuple(f"tests/test_optim.py::test_the_norm_is_that_of_the_whole_gradient[{case}]" for case in cases)


COUNTED = 'counted = ctx.tensor.rank % replicas == 0 and ("ends" not in chunk.sum_over or ctx.ends.rank == 0)'
SUMMED = "if self.ctx.axis(name).size > 1:"
LOSS_GRAD = "losses = execute(state.plan, state.stages, ctx, batches, scale / tokens, trace)"
WEIGHTS = "weights = batch.mask * torch.tensor(token_weight, dtype=torch.float64)"
COUNT = "total = sum(int(b.mask.sum()) for b in batches)"

TIED_AND_NORM = [
    Mutation(
        "tied_gradient_counted_twice",
        "the tied weight is in the norm once for each pipeline end: 40 instead of 28.28 (Megatron#7227)",
        "engine/sharding.py",
        COUNTED,
        "counted = ctx.tensor.rank % replicas == 0",
        norms("tied-(1, 4, 1)"),
    ),
    Mutation(
        "norm_counts_replicas",
        "weights that tensor ranks hold alike are counted by each of them (ROCm/TransformerEngine#715)",
        "engine/sharding.py",
        COUNTED,
        'counted = "ends" not in chunk.sum_over or ctx.ends.rank == 0',
        norms("gqa-(2, 1, 1)"),
    ),
    Mutation(
        "norm_misses_tensor_shards",
        "only the first tensor rank's shards are counted (Megatron#5916)",
        "engine/sharding.py",
        COUNTED,
        'counted = ctx.tensor.rank == 0 and ("ends" not in chunk.sum_over or ctx.ends.rank == 0)',
        norms("gqa-(2, 1, 1)"),
    ),
    Mutation(
        "norm_counts_padding",
        "whatever lies in the padding of the vocabulary enters the norm",
        "engine/optim/clip.py",
        "begin, end = piece.flat_range()",
        "begin, end = piece.flat_range() if len(p.spec.chunks) > 1 else (0, p.numel())",
        norms("gqa-(2, 1, 1)"),
    ),
    Mutation(
        "norm_of_one_stage",
        "each pipeline stage clips by its own norm (Megatron#7227, torchtitan#771)",
        "engine/optim/clip.py",
        "all_reduce_(self.local(), self.ctx.world)",
        "all_reduce_(self.local(), self.ctx.tensor)",
        small("pipeline"),
    ),
    Mutation(
        "clip_on_the_first_tensor_rank_only",
        "the other tensor ranks are not clipped (BLOOM's chronicles)",
        "engine/train.py",
        "step(lr, clip_factor(norms.norm, cfg.optimizer.clip_norm) / scale)",
        "step(lr, 1.0 if ctx.tensor.rank else clip_factor(norms.norm, cfg.optimizer.clip_norm) / scale)",
        small("copies"),
    ),
    Mutation(
        "tied_gradient_not_summed_over_the_ends",
        "each end of the pipeline trains its copy with its own part of the gradient (Megatron#656)",
        "engine/parallel/buckets.py",
        SUMMED,
        'if name != "ends" and self.ctx.axis(name).size > 1:',
        small("pipeline"),
    ),
    Mutation(
        "tied_copies_diverge",
        "the two copies are treated differently by the optimizer (Megatron#4641, Megatron-Bridge#5380)",
        "engine/optim/adamw.py",
        "decay = self.cfg.weight_decay if bucket.decay else 0.0",
        "decay = self.cfg.weight_decay if bucket.decay and not self.stages[0].ctx.ends.rank else 0.0",
        small("pipeline"),
    ),
]

REPLICAS = [
    Mutation(
        "norm_weight_not_summed_under_sequence_parallelism",
        "each tensor rank keeps the gradient of its part of the sequence (Megatron#1446, apex#1686)",
        "engine/model/layers.py",
        'sum_over: str = "sequence",',
        'sum_over: str = "alone",',
        small("sequence"),
    ),
    Mutation(
        "qk_norm_not_summed",
        "each tensor rank keeps the gradient of its own heads (NeMo-RL#3716)",
        "engine/model/attention.py",
        'means, sum_over="tensor")',
        'means, sum_over="alone")',
        small("copies"),
    ),
    Mutation(
        "kv_replicas_not_summed",
        "the ranks that share a KV head each keep the gradient of their own queries (bigcode Megatron-LM#35)",
        "engine/parallel/buckets.py",
        SUMMED,
        'if name != "kv" and self.ctx.axis(name).size > 1:',
        small("copies"),
    ),
    Mutation(
        "sequence_gradient_not_gathered",
        "backward of the reduce-scatter repeats the rank's own part instead of gathering all (Megatron#7452)",
        "engine/comm.py",
        "return all_gather(grad, ctx.sequence), None, None",
        "return torch.cat([grad] * ctx.sequence.size), None, None",
        small("sequence"),
    ),
    Mutation(
        "reduce_scatter_takes_its_own_part",
        "the partial sums are cut but not added (Megatron#7452)",
        "engine/comm.py",
        "reduce_scatter_start(all_reduce_(x, copies), sequence)",
        "Pending(all_reduce_(x, copies).chunk(sequence.size)[sequence.rank].clone())",
        small("sequence"),
    ),
    Mutation(
        "input_gradient_not_summed",
        "the mirror of the row-parallel sum is missing: each tensor rank passes on its part",
        "engine/ops/linear.py",
        "grad_x = sum_start(products.input_grad(grad, weight), ctx.copies, sequence)",
        "grad_x = Pending(products.input_grad(grad, weight).chunk(sequence.size)[sequence.rank].contiguous())",
        small("copies"),
    ),
    Mutation(
        "gather_along_the_wrong_dim",
        "what was gathered along the first dim is not moved back: logits of the wrong tokens",
        "engine/comm.py",
        "return all_gather_start(x.movedim(dim, 0), axis).wait().movedim(0, dim)",
        "return all_gather_start(x.movedim(dim, 0), axis).wait().reshape(*x.shape[:dim], -1, *x.shape[dim:][1:])",
        ("tests/test_evaluate.py::test_logits_do_not_depend_on_the_layout",),
    ),
]

LOSS = [
    Mutation(
        "loss_is_a_mean_of_microbatch_means",
        "accumulated microbatches weigh the same however few tokens they count (transformers#24725, #34191)",
        "engine/pipeline/executor.py",
        "run.batches[action.microbatch], run.token_weight)",
        "b := run.batches[action.microbatch], 1 / len(run.batches) / max(1, int(b.mask.sum())))",
        PLAIN,
    ),
    Mutation(
        "loss_is_a_mean_of_data_rank_means",
        "each data rank divides by its own count of tokens (torchtune#1875, Fast-LLM#426)",
        "engine/train.py",
        "total = int(all_reduce_(torch.tensor(total * speaks, device=ctx.device), ctx.world).item())",
        "total = total * ctx.data.size",
        small("data"),
    ),
    Mutation(
        "loss_counts_masked_tokens",
        "divided by the length of the sequences instead of the tokens that count (nanochat#59)",
        "engine/train.py",
        COUNT,
        "total = sum(b.mask.numel() for b in batches)",
        PLAIN,
    ),
    Mutation(
        "mask_aliased",
        "a forward changes the mask it was given (Megatron#1298: it shrinks in every iteration)",
        "engine/pipeline/stage.py",
        WEIGHTS,
        f"{WEIGHTS}\n        batch.mask[:, -1] = False",
        ("tests/test_equivalence.py::test_a_step_leaves_its_batches_as_they_were",),
    ),
    Mutation(
        "loss_reported_by_every_tensor_rank",
        "the reported loss is added up over ranks that all have it",
        "engine/train.py",
        "losses.sum() * float(ctx.tensor.rank == 0)",
        "losses.sum()",
        small("copies"),
    ),
    Mutation(
        "pipeline_gradient_scaled_by_tokens",
        "with a pipeline the division by the global token count is lost (torchtitan#2972)",
        "engine/train.py",
        LOSS_GRAD,
        LOSS_GRAD.replace("scale / tokens", "scale if ctx.pipeline.size > 1 else scale / tokens"),
        small("pipeline"),
    ),
    Mutation(
        "pipeline_gradient_averaged_over_microbatches",
        "with a pipeline the gradient is divided by the number of microbatches once more (torchtitan#1733, #1759)",
        "engine/train.py",
        LOSS_GRAD,
        LOSS_GRAD.replace("scale / tokens", "scale / tokens / (len(batches) if ctx.pipeline.size > 1 else 1)"),
        small("pipeline"),
    ),
    Mutation(
        "gradient_averaged_over_data_ranks",
        "divided by the data degree although the loss is already global (Megatron#673, #906)",
        "engine/parallel/buckets.py",
        "x = bucket.grads.to(self.reduce_dtype)",
        "x = bucket.grads.to(self.reduce_dtype) / self.ctx.data.size",
        small("data"),
    ),
    Mutation(
        "only_the_last_microbatch_trained",
        "a microbatch overwrites the gradient of those before it: the loss looks fine (Automodel#3530)",
        "engine/ops/products.py",
        "add_product_(main, grad.t(), x)",
        "torch.mm(grad.t(), x, out=main)",
        PLAIN,
    ),
    Mutation(
        "gradient_is_a_moving_average",
        "what is accumulated is scaled down by each microbatch (torchtitan#1733)",
        "engine/ops/products.py",
        "add_product_(main, grad.t(), x)",
        "torch.addmm(main, grad.t(), x, beta=0.5, out=main)",
        PLAIN,
    ),
    Mutation(
        "repeated_tokens_do_not_add_up",
        "of a token that comes twice, the embedding keeps one gradient",
        "engine/ops/embedding.py",
        "target.index_add_(0, local.reshape(-1), grad.to(target.dtype))",
        "target[local.reshape(-1)] += grad.to(target.dtype)",
        PLAIN,
    ),
    Mutation(
        "vocabulary_padding_in_the_softmax",
        "the columns beyond the vocabulary take part in the sum",
        "engine/ops/loss.py",
        "stats(logits, local, part.valid)",
        "stats(logits, local, logits.shape[1])",
        small("copies"),
    ),
    Mutation(
        "logits_of_two_chunks_alive",
        "the chunk before is kept while the next one's logits are made",
        "engine/ops/loss.py",
        "del grad  # before the next chunk's is made",
        "kept = grad",
        tuple(f"tests/test_loss.py::test_logits_of_all_tokens_never_exist[{way}-True]" for way in ("own", "torch")),
    ),
    Mutation(
        "last_chunk_left_out_of_the_sum",
        "the sum over the tensor ranks starts before the gradient of the last chunk is there",
        "engine/ops/loss.py",
        "if rows.stop == len(rows_x):",
        "if rows.start == 0:",
        ("tests/test_loss.py::test_tensor_ranks[2-13-dtype0-True-own]",),
    ),
    Mutation(
        "head_gradient_scaled_afterwards",
        "a factor on the loss reaches the input's gradient or none, not the weight's",
        "engine/ops/loss.py",
        "torch._assert_async((grad == 1).all(), _NOT_ONE)",
        "pass",
        ("tests/test_loss.py::test_a_gradient_other_than_one_raises[0.5]",),
    ),
    Mutation(
        "validation_loss_depends_on_accumulation",
        "the reported score is divided by the accumulation steps (torchtitan#1759)",
        "engine/evaluate.py",
        "return self._score(loss / tokens, int(tokens))",
        "return self._score(loss / tokens / (chunk // mbs), int(tokens))",
        ("tests/test_evaluate.py::test_the_score_does_not_depend_on_the_layout[2]",),
    ),
]

ZERO = [
    Mutation(
        "zero_gather_forgotten",
        "after the update nobody sends its weights: data ranks drift apart (nanotron#242)",
        "engine/parallel/buckets.py",
        "if self.zero:\n            for b in reversed",
        "if self.zero and overlap is None:\n            for b in reversed",
        small("zero"),
    ),
    Mutation(
        "embedding_stale_under_zero",
        "the tied embedding is left out of the gather (Megatron#844)",
        "engine/parallel/buckets.py",
        "for b in reversed(self.buckets):",
        "for b in reversed([b for b in self.buckets if not b.late]):",
        small("zero"),
    ),
    Mutation(
        "zero_gather_not_waited_for",
        "a forward reads weights that are still on their way (DeepSpeed#5545, #7188)",
        "engine/parallel/buckets.py",
        "part.register_forward_pre_hook(_settler(holder[id(p)]))",
        "holder[id(p)].gathering = None",
        LATE,
    ),
    Mutation(
        "gradient_sum_not_waited_for",
        "the optimizer reads gradients that are still being summed (DeepSpeed#8061, #6351)",
        "engine/parallel/buckets.py",
        "total, target = b.reducing.wait(), b.part(b.grads, b.held)",
        "total, target = b.reducing.value, b.part(b.grads, b.held)",
        LATE,
    ),
    Mutation(
        "zero_gather_sends_the_wrong_range",
        "a rank sends a range that it has not updated (DeepSpeed#4298)",
        "engine/comm.py",
        "part = x.view(axis.size, -1)[axis.rank]",
        "part = x.view(axis.size, -1)[0]",
        small("zero"),
    ),
    Mutation(
        "reduce_before_the_last_microbatch",
        "buckets are summed after the first microbatch, the rest stays local (DeepSpeed#7188)",
        "engine/pipeline/executor.py",
        "for step in program if step[0].op in (Op.B, Op.W)}",
        "for step in reversed(program) if step[0].op in (Op.B, Op.W)}",
        small("zero"),
    ),
]

BACKWARD = [
    Mutation(
        "weight_gradient_twice",
        "W of a split backward is run twice",
        "engine/pipeline/stage.py",
        "queue.pop().run()",
        "(queue[-1].run(), queue.pop().run())",
        small("split"),
    ),
    Mutation(
        "weight_gradient_dropped",
        "the oldest entry of a split backward is never run",
        "engine/pipeline/stage.py",
        "queue.reverse()",
        "queue.reverse(), queue.pop()",
        small("split"),
    ),
    Mutation(
        "recomputed_gradient_twice",
        "a recomputed block adds its gradients twice",
        "engine/ops/recompute.py",
        "torch.autograd.backward(out, grad)",
        "torch.autograd.backward(out, grad, retain_graph=True), torch.autograd.backward(out, grad)",
        small("copies"),
    ),
    Mutation(
        "receive_buffer_reused",
        "the next activation is received over the one whose backward is still to come (gpt-neox#1004)",
        "engine/pipeline/executor.py",
        "torch.empty(shape, dtype=run.ctx.dtype, device=run.ctx.device), peer",
        "run.__dict__.setdefault('buffer', torch.empty(shape, dtype=run.ctx.dtype)).detach(), peer",
        (
            "tests/test_bitwise.py::test_what_may_change_no_bit[pipeline-fp32]",
        ),  # gpipe: all are received before any backward
    ),
]

START = [
    Mutation(
        "initial_values_by_rank",
        "each rank draws from its own generator (pytorch#168058, Megatron-Bridge#5396)",
        "engine/sharding.py",
        'generator(seed, "init", piece.name)',
        'generator(seed + ctx.rank, "init", piece.name)',
        small("copies"),
    ),
    Mutation(
        "layers_initialised_identically",
        "layers of interleaved chunks start from equal values (OLMo-core's changelog)",
        "engine/sharding.py",
        'generator(seed, "init", piece.name)',
        'generator(seed, "init", piece.name.partition("layers.")[2].lstrip("0123456789") or piece.name)',
        ("tests/test_sharding.py::test_initial_values_are_what_the_config_says",),
    ),
    Mutation(
        "samples_depend_on_the_data_degree",
        "a data rank takes samples of another (Megatron-Bridge#3503, bigscience Megatron-DeepSpeed#276)",
        "engine/data/loader.py",
        "first = consumed + self.data_rank * local",
        "first = consumed + self.data_rank",
        LOADER,
    ),
    Mutation(
        "data_restarts_at_sample_0",
        "after a resume the first samples come again (Megatron-Bridge#3503, accelerate#2016)",
        "engine/data/loader.py",
        "self._consumed = start_sample",
        "self._consumed = 0",
        LOADER,
    ),
    Mutation(
        "fim_in_order_of_access",
        "fill-in-the-middle depends on who reads a sample (Megatron's GPTFIMDataset draws in the order of access)",
        "engine/data/fim.py",
        'derive_key(self.seed, "fim", int(sample), at)',
        'derive_key(self.seed, "fim", number, at)',
        ("tests/test_fim.py::test_layout_and_restarts_do_not_change_it",),
    ),
    Mutation(
        "fim_turns_torn_characters_into_text",
        "half a character at a sample's border becomes U+FFFD",
        "engine/data/fim.py",
        "if s.text and _LOST not in s.text]",
        "if s.text]",
        ("tests/test_fim.py::test_nearly_all_segments_are_changed_torn_ones_too",),
    ),
    Mutation(
        "fim_filling_counts",
        "the loss counts tokens that fill a row",
        "engine/data/loader.py",
        "mask &= torch.arange(1, line.shape[1]) < torch.from_numpy(lengths[part])[:, None]",
        "mask &= torch.arange(1, line.shape[1]) < line.shape[1]",
        ("tests/test_fim.py::test_rows_keep_their_length_and_the_filling_does_not_count",),
    ),
]

OPTIMIZER = [
    Mutation(
        "weight_decay_on_norms",
        "norm weights decay like matrices",
        "engine/model/layers.py",
        "ShardSpec((chunk,), init_value=1.0 - offset, decay=False)",
        "ShardSpec((chunk,), init_value=1.0 - offset)",
        PLAIN,
    ),
    Mutation(
        "bias_correction_one_step_late",
        "AdamW's correction uses the count of the wrong step (NVRx#376: step 2 with the weights of step 1)",
        "engine/optim/adamw.py",
        "decay, grad_scale, self.steps)",
        "decay, grad_scale, self.steps + 1)",
        PLAIN,
        path="kernels",
    ),
    Mutation(
        "bias_correction_one_step_late_in_torch",
        "the same where torch's AdamW does it",
        "engine/optim/adamw.py",
        "float(self.steps - 1)",
        "float(self.steps)",
        PLAIN,
        path="torch",
    ),
    Mutation(
        "bf16_without_masters",
        "updates are rounded to bf16 each time, small ones are lost (DeepSpeed#7786)",
        "engine/optim/adamw.py",
        "bucket.part(bucket.grads, bucket.held), self._rounded(bucket, master)",
        "bucket.part(bucket.grads, bucket.held), self._rounded(bucket, master.copy_(bucket.values))",
        ("tests/test_optim.py::test_bf16_does_not_lose_tiny_updates",),
    ),
    Mutation(
        "loss_scale_in_the_norm",
        "clipping looks at gradients that are still scaled",
        "engine/train.py",
        "norms = state.norms(scale)",
        "norms = state.norms()",
        UNDONE,
    ),
    Mutation(
        "loss_scale_not_undone",
        "AdamW gets scaled gradients and hardly shows it",
        "engine/train.py",
        "clip_factor(norms.norm, cfg.optimizer.clip_norm) / scale)",
        "clip_factor(norms.norm, cfg.optimizer.clip_norm))",
        UNDONE,
    ),
    Mutation(
        "overflow_decided_by_each_rank",
        "only the rank that holds the overflow leaves the update out",
        "engine/train.py",
        "finite = math.isfinite(norms.norm)",
        "finite = bool(torch.isfinite(state.norms.local()).all())",
        ("tests/test_precision.py::test_an_overflow_on_one_rank_is_one_on_all",),
    ),
    Mutation(
        "skipped_update_counted_by_adam",
        "an update that was left out moves the bias correction (OLMo-core's SkipStep)",
        "engine/train.py",
        "    if finite:\n        state.before_update()",
        "    state.optimizer.steps += not finite\n    if finite:\n        state.before_update()",
        OVERFLOW,
    ),
    Mutation(
        "skipped_update_stops_the_schedule",
        "the learning rate counts updates instead of steps (OLMo-core's SkipStep)",
        "engine/train.py",
        "lr = learning_rate(state.step + 1,",
        "lr = learning_rate(state.optimizer.steps + 1,",
        OVERFLOW,
    ),
]

RESUMED = [
    Mutation(
        "moments_not_loaded",
        "weights come from the checkpoint, the optimizer starts anew (DeepSpeed#7786)",
        "engine/train.py",
        "load_into(reader, state.optimizer.states(), state.ctx)",
        'load_into(reader, (held for held in state.optimizer.states() if held.kind == "model"), state.ctx)',
        RESUME,
    ),
    Mutation(
        "moments_of_the_wrong_range",
        "ZeRO's moments are written from, and read into, the beginning of the range (Megatron-Bridge#5637)",
        "engine/optim/adamw.py",
        "flats[i][at : at + end - begin]",
        'flats[i][at : at + end - begin] if kind == "model" else flats[i][: end - begin]',
        RESUME,
    ),
    Mutation(
        "data_rank_missing_in_the_checkpoint",
        "only the first data rank writes its range of the optimizer (Megatron-Bridge#5637, torchtitan#811)",
        "engine/checkpoint/save.py",
        "            if not tensors:\n",
        "            if not tensors or self.ctx.data.rank:\n",
        RESUME,
    ),
    Mutation(
        "masters_loaded_but_not_published",
        "the model computes with what it had before the load (DeepSpeed#762)",
        "engine/train.py",
        "    state.optimizer.publish()\n    state.step = manifest.step",
        "    state.step = manifest.step",
        RESUME_BF16,
    ),
    Mutation(
        "adam_step_lost",
        "after a resume the bias correction starts anew (Automodel#3882)",
        "engine/train.py",
        'state.optimizer.steps = int(manifest.optimizer.get("steps", manifest.step))',
        "state.optimizer.steps = 0",
        RESUME,
    ),
    Mutation(
        "schedule_restarts_at_resume",
        "the learning rate counts the steps since the process began (gpt-neox#1029, Megatron#7468)",
        "engine/train.py",
        "lr = learning_rate(state.step + 1,",
        'lr = learning_rate(state.step + 1 - state.__dict__.setdefault("begun", state.step),',
        RESUME,
    ),
]

FACTS_OF_MODELS = [
    Mutation(
        "row_bias_added_by_every_rank",
        "the bias of a row-parallel product is in the sum once for each tensor rank (gpt-neox#1220)",
        "engine/model/layers.py",
        "return out if self.bias is None else out + self.bias",
        "return out if self.bias is None else out + self.bias * max(self.copies.size, self.sequence.size)",
        shape("gpt2-t4-copies"),
    ),
    Mutation(
        "row_bias_gradient_not_summed",
        "under sequence parallelism each rank keeps the bias gradient of its part (Megatron#1446)",
        "engine/model/layers.py",
        'bias_of(Chunk(name, out_size, sum_over=("sequence",)))',
        "bias_of(Chunk(name, out_size))",
        shape("gpt2-t4"),
    ),
    Mutation(
        "kv_bias_replicas_not_summed",
        "ranks that share a KV head each keep its bias gradient of their own queries",
        "engine/model/layers.py",
        'return replace(chunk, name=chunk.name.removesuffix("weight") + "bias")',
        'return replace(chunk, name=chunk.name.removesuffix("weight") + "bias", sum_over=())',
        shape("qwen2-t4-copies"),
    ),
    Mutation(
        "bias_gradient_dropped",
        "the bias of a column-parallel product is never trained",
        "engine/ops/linear.py",
        "grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None",
        "torch.zeros_like(grad.reshape(-1, grad.shape[-1]).sum(0)) if ctx.needs_input_grad[2] else None",
        shape("qwen2-t2"),
    ),
    Mutation(
        "qk_norm_over_the_rank_only",
        "a norm over all heads is computed over the heads of each tensor rank",
        "engine/ops/norm.py",
        "scale = all_reduce_(squares, axis).add_(eps).rsqrt_()",
        "scale = squares.mul_(axis.size).add_(eps).rsqrt_()",
        shape("olmo2-t2"),
    ),
    Mutation(
        "qk_norm_counts_copies",
        "copies of a KV head are in the mean square several times",
        "engine/ops/norm.py",
        "square_().div_(copies * ctx.count)",
        "square_().div_(ctx.count)",
        shape("olmo2-t4"),
    ),
    Mutation(
        "qk_norm_backward_counts_copies",
        "each copy of a KV head passes on the whole of what follows from all",
        "engine/ops/norm.py",
        ".div_(ctx.count * ctx.copies)",
        ".div_(ctx.count)",
        shape("olmo2-t4"),
    ),
    Mutation(
        "positions_of_the_first_part",
        "under sequence parallelism every rank adds the positions of the first part",
        "engine/model/layers.py",
        ".chunk(self.sequence.size)[self.sequence.rank]",
        ".chunk(self.sequence.size)[0]",
        shape("gpt2-t2"),
    ),
    Mutation(
        "positions_run_on_over_documents",
        "learned positions do not begin again with a document",
        "engine/documents.py",
        "device=self.begin.device) - self.begin",
        "device=self.begin.device) - 0 * self.begin",
        ("tests/test_documents.py::test_packed_documents_learn_as_if_alone",),
    ),
    Mutation(
        "residual_gradient_dropped",
        "the gradient that reaches the sum beside the norm is lost: the embedding hears the MLPs only",
        "engine/ops/norm.py",
        "grad_sum, grad = grads if ctx.summed else (None, grads[0])",
        "grad_sum, grad = (None, grads[-1])",
        ("tests/test_native_ops.py::test_a_norm_after_a_sum_is_the_two_in_turn",),
        path="kernels",
    ),
    Mutation(
        "norm_offset_ignored_in_the_backward",
        "Gemma's 1 + weight is weight where our kernel computes the gradient",
        "engine/ops/norm.py",
        "ops.rms_norm_backward(grad, grad_sum, x, weight, kept, ctx.offset)",
        "ops.rms_norm_backward(grad, grad_sum, x, weight, kept, 0.0)",
        ("tests/test_native_ops.py::test_kernels_equal_the_float64_reference",),
        path="kernels",
    ),
    Mutation(
        "gate_of_another_kind",
        "the backward takes a gelu for the one by tanh",
        "engine/ops/activation.py",
        "own.gated_backward(grad.contiguous(), fused.contiguous(), KINDS[ctx.name])",
        'own.gated_backward(grad.contiguous(), fused.contiguous(), KINDS[ctx.name.removesuffix("_tanh")])',
        ("tests/test_native_ops.py::test_kernels_equal_the_float64_reference",),
        path="kernels",
    ),
    Mutation(
        "gradient_scale_ignored",
        "AdamW takes the gradients as they are: nothing is clipped, and the moments are of another scale",
        "engine/optim/adamw.py",
        "decay, grad_scale, self.steps)",
        "decay, 1.0, self.steps)",
        ("tests/test_optim.py::test_a_scale_of_the_gradient_is_that_of_the_update",),
        path="kernels",
    ),
    Mutation(
        "gradient_scale_ignored_in_torch",
        "the same where torch's AdamW does it",
        "engine/optim/adamw.py",
        "grads = grads * grad_scale",
        "grads = grads * 1.0",
        ("tests/test_optim.py::test_a_scale_of_the_gradient_is_that_of_the_update",),
        path="torch",
    ),
    Mutation(
        "rounded_weights_not_written",
        "the model computes with the weights it began with, the masters learn alone",
        "engine/optim/adamw.py",
        "own.adamw_(master, grads, first, second, low, lr,",
        "own.adamw_(master, grads, first, second, None, lr,",
        ("tests/test_optim.py::test_a_scale_of_the_gradient_is_that_of_the_update",),
        path="kernels",
    ),
    Mutation(
        "rounded_weights_not_written_in_torch",
        "the same where torch's AdamW does it",
        "engine/optim/adamw.py",
        "lr, decay)\n            if low is not None:",
        "lr, decay)\n            if False:",
        ("tests/test_optim.py::test_a_scale_of_the_gradient_is_that_of_the_update",),
        path="torch",
    ),
    Mutation(
        "norm_weight_without_its_one",
        "the gradient of x is that of a norm scaled by weight, not by 1 + weight",
        "engine/ops/norm.py",
        "            wide_weight = wide_weight + ctx.offset",
        "            wide_weight = wide_weight + 0.0",
        ("tests/test_ops.py::test_other_norms",),
        path="torch",
    ),
    Mutation(
        "fused_heads_taken_for_fused_matrices",
        "query_key_value of GPT-NeoX is q of all heads, then k, then v (gpt-neox#712: gibberish)",
        "engine/checkpoint/hf.py",
        "groups = cfg.num_heads if stem.endswith(family.by_head) and family.by_head else 1",
        "groups = 1",
        hf("neox"),
    ),
    Mutation(
        "rotary_convention",
        "the wrong half of a head is rotated",
        "engine/ops/rope.py",
        "torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)",
        "torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=1)",
        hf("qwen3"),
    ),
    Mutation(
        "rope_scaling_ignored",
        "a Llama 3.1 is loaded with the angles of Llama 3 (a common fault of converters)",
        "engine/model/transformer.py",
        "ctx.device, ctx.dtype, rope_scaling_of(cfg))",
        "ctx.device, ctx.dtype, RopeScaling())",
        hf("llama3-rope"),
    ),
    Mutation(
        "keys_that_count_ignored",
        "a key of config.json that changes the model is dropped without a word",
        "engine/hf_config.py",
        "if value not in fixed[key]:",
        "if value not in family.fixed.get(key, (value,)):",
        ("tests/test_hf_config.py::test_what_the_engine_does_not_have_is_refused_by_name",),
    ),
]

SAVED = [
    Mutation(
        "error_of_the_writing_thread_swallowed",
        "a writer thread fails and the save reports success (pytorch#191391)",
        "engine/checkpoint/save.py",
        "            raise self._explain(fault, temporary / file, wanted) from None",
        '            return {"tensors": {}}',
        ("tests/test_checkpoint.py::test_a_failed_save_is_an_error_on_all_ranks_and_leaves_the_old_one",),
    ),
    Mutation(
        "host_copy_made_once",
        "every save in the background writes the first one's values (NeMo-RL#3312)",
        "engine/checkpoint/staging.py",
        "            ours.flat.copy_(theirs.flat, non_blocking=True)",
        "            if not ours.flat.any():\n                ours.flat.copy_(theirs.flat)",
        ("tests/test_async_save.py::test_the_files_are_those_of_a_save_that_waits[tensor]",),
    ),
    Mutation(
        "update_overtakes_the_copy",
        "a save in the background writes values of a later step (pytorch#144657, NVRx#376)",
        "engine/train.py",
        "        state.before_update()\n",
        "",
        ("tests/test_async_save.py::test_an_update_waits_for_the_copy[True]",),
    ),
    Mutation(
        "digests_not_compared",
        "a flipped bit loads in silence (torch.load, safetensors: no checksum is looked at)",
        "engine/checkpoint/format.py",
        "if part.digests and found",
        "if not part.digests and found",
        ("tests/test_damage.py::test_no_damage_loads_in_silence_and_the_file_is_named",),
    ),
    Mutation(
        "old_ones_deleted_unproven",
        "older checkpoints are deleted though the new one cannot be read back",
        "engine/checkpoint/save.py",
        "            if self.keep:\n                self._prove",
        "            if not self.keep:\n                self._prove",
        ("tests/test_crash.py::test_nothing_is_deleted_when_the_new_one_reads_back_differently",),
    ),
    Mutation(
        "rename_not_synced",
        "what was reported as saved is gone after a power cut",
        "engine/checkpoint/retention.py",
        "    storage.sync_folder(final.parent)\n    return replaced",
        "    return replaced",
        ("tests/test_crash.py::test_a_crash_at_any_operation[one more]",),
    ),
]

MUTATIONS = [*TIED_AND_NORM, *REPLICAS, *LOSS, *ZERO, *BACKWARD, *START, *OPTIMIZER, *RESUMED, *FACTS_OF_MODELS, *SAVED]


@dataclass(frozen=True)
class Outcome:
    """What came of a mutation. caught: a test failed as it should; by: that test, or what went wrong instead."""

    name: str
    caught: bool
    by: str
    seconds: float


def built() -> bool:
    """Whether there are extensions."""
    return any((ROOT / "engine").rglob("*.so"))


def copy_repository(to: Path, extensions: bool) -> None:
    """What the tests need; extensions: with those that are built."""
    left_out = shutil.ignore_patterns("__pycache__", *(() if extensions else ("*.so",)))
    for folder in ("engine", "tests"):
        shutil.copytree(ROOT / folder, to / folder, ignore=left_out)
    shutil.copy2(ROOT / "pyproject.toml", to)


def run_tests(root: Path, tests: Iterable[str]) -> None:
    """In a fork: pytest in the copy of the repository at `root`, its exit code as the process's."""
    os.chdir(root)
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path[:] = [str(root)] + [entry for entry in sys.path if ROOT not in (Path(entry), Path(entry).parent)]
    # an editable install finds the submodules that a copy lacks, such as extensions left out, in the original
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
    os.environ["PYTHONPATH"] = str(root)
    engine = importlib.import_module("engine")
    assert Path(engine.__file__ or "").parent == root / "engine", "the copy is not what is tested"
    for name in ("_index", "_ops", "_shared"):
        found = importlib.util.find_spec(f"engine.{name}")
        assert found is None or Path(found.origin or "").parent == root / "engine", f"{name} is not of the copy"
    code = pytest.main(["-x", "--tb=short", "-p", "no:xdist", *tests])
    sys.stdout.flush()
    os._exit(code)


def judge(code: int | None, output: str) -> tuple[bool, str]:
    """Whether a test failed by an assertion, and which; else what happened."""
    if code is None:
        return False, f"HANG of {TIMEOUT_S:.0f} s without a word from the harness"
    if code == 0:
        return False, "SURVIVED"
    failed = re.search(r"^FAILED tests/(\S+?::\S+(?: [^-]*\])?)", output, re.MULTILINE)
    if code != 1 or failed is None:
        return False, f"BROKEN: pytest exit code {code}: {output.strip()[-500:]}"
    own = OWN_ERRORS.search(output)
    return (False, f"BROKEN: {own.group()} in {failed.group(1)}") if own else (True, failed.group(1))


@dataclass
class Attempt:
    """One mutation (None: none at all) on its way, in its own copy of the repository."""

    mutation: Mutation | None
    tests: Iterable[str]
    extensions: bool

    def start(self) -> None:
        """Copy, mutate, fork. Raises LookupError when the mutation does not fit."""
        self.begin = time.monotonic()
        self.folder = tempfile.TemporaryDirectory(prefix="mutation_")
        root = Path(self.folder.name).resolve()
        copy_repository(root, self.extensions)
        if self.mutation is not None:
            self.mutation.apply(root)
        self.process: BaseProcess = multiprocessing.get_context("fork").Process(
            target=run_tests, args=(root, tuple(self.tests))
        )
        self.process.start()

    def overdue(self) -> bool:
        return time.monotonic() - self.begin > TIMEOUT_S

    def finish(self) -> tuple[int | None, str]:
        """pytest's exit code (None: it hung and was killed) and output."""
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        self.process.join()
        output = (Path(self.folder.name) / "log").read_text(errors="replace")
        self.folder.cleanup()
        return code, output


def attempt(mutations: Iterable[Mutation], jobs: int = 2, extensions: bool = True) -> Iterator[Outcome]:
    """Try the mutations, `jobs` at a time, each on a fresh copy; outcomes as they come.

    extensions: leave the built ones in where the mutation is not one of the torch path.
    """
    waiting = [Attempt(m, m.tests, extensions and m.path != "torch") for m in mutations]
    running: list[Attempt] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            new = waiting.pop(0)
            assert new.mutation is not None
            try:
                new.start()
                running.append(new)
            except LookupError as error:
                yield Outcome(new.mutation.name, False, f"BROKEN: {error.args[0]}", 0.0)
        wait([a.process.sentinel for a in running], 1.0)
        for a in [a for a in running if a.process.exitcode is not None or a.overdue()]:
            running.remove(a)
            assert a.mutation is not None
            seconds = time.monotonic() - a.begin
            yield Outcome(a.mutation.name, *judge(*a.finish()), seconds)


def healthy(mutations: Iterable[Mutation], extensions: bool) -> str:
    """Run the tests of all mutations without any of them; empty when they pass, else pytest's output."""
    for with_them in (True, False):
        those = [m for m in mutations if (extensions and m.path != "torch") == with_them]
        if not those:
            continue
        one = Attempt(None, dict.fromkeys(test for mutation in those for test in mutation.tests), with_them)
        one.start()
        one.process.join(TIMEOUT_S)
        code, output = one.finish()
        if code != 0:
            return output or "hung"
    return ""


def warm() -> None:
    """Import what takes long, once; never the engine or a test."""
    for name in WARM.split():
        importlib.import_module(name)


def main() -> int:
    """Run the suite; the exit code says whether every mutation was caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these mutations only")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time")
    parser.add_argument("--without-extensions", action="store_true", help="run the tests as if none were built")
    args = parser.parse_args()
    unknown = set(args.only or ()) - {m.name for m in MUTATIONS}
    if unknown:
        parser.error(f"no mutation named {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if not args.only or m.name in args.only]
    console, begin = Console(), time.monotonic()
    extensions = built() and not args.without_extensions
    impossible = [m.name for m in chosen if m.path == "kernels" and not extensions]
    chosen = [m for m in chosen if m.name not in impossible]
    warm()
    if output := healthy(chosen, extensions):
        console.print(output, markup=False)
        console.print("the tests fail without any mutation: repair them first", style="bold red")
        return 1
    table = Table("mutation", Column("caught by", overflow="fold"), "s", title=f"{len(chosen)} mutations")
    outcomes = []
    for outcome in attempt(chosen, args.jobs, extensions):
        outcomes.append(outcome)
        console.print(f"{'caught' if outcome.caught else outcome.by}: {outcome.name}", markup=False, highlight=False)
    for outcome in outcomes:
        style = "" if outcome.caught else "bold red"
        table.add_row(outcome.name, outcome.by.replace("[", r"\["), f"{outcome.seconds:.0f}", style=style)
    console.print(table)
    caught = sum(outcome.caught for outcome in outcomes)
    with_what = "with the extensions" if extensions else "without extensions"
    console.print(f"{caught} of {len(chosen)} caught {with_what} in {time.monotonic() - begin:.0f} s")
    if impossible:
        console.print(f"not tried, since their code runs with built extensions only: {', '.join(impossible)}")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
