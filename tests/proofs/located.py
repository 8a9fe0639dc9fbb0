"""Where `engine.proof.difference` locates the faults of tests/proofs/mutations that change a value of a step.

    python -m tests.proofs.located                          # all of them, with a table
    python -m tests.proofs.located --only input_gradient_not_summed

A probe is a small model in a layout. The code with the fault runs it in a copy of the repository and records its
tensors; the unchanged code runs the same model on one process, which is the reference. The first difference has to be
at the operation or layer with the fault: `FAULTS` says which, as a pattern of "phase: kind tensor | operation".
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.proofs.mutations import MUTATIONS
from tests.proofs.mutations.patch import Mutation
from tests.proofs.mutations.trial import built, copy_repository, enter, preload

_TWO_STEPS = {"ramp", "dropout_data", "bf16"}  # probes of two steps; the others have one
_TIMEOUT_S = 300.0
_TINY: dict[str, Any] = {"model_num_layers": 2, "model_hidden_size": 16, "model_num_heads": 4, "model_ffn_size": 24}
_TINY |= {
    "data_mask_eod": True,
    "train_seq_len": 8,
    "optimizer_clip_norm": 0.05,
    "model_num_kv_heads": 2,
    "optimizer_weight_decay": 0.3,
}
_T2, _P2, _D2 = {"parallel_tensor": 2}, {"parallel_pipeline": 2}, {"parallel_data": 2}
_Z = {"train_z_loss": 0.1}
_DROPOUT = {"train_dropout": 0.3, "train_attention_dropout": 0.15}
_WINDOW = {"model_window": 3, "model_window_layers": "wf"}
_BIASES = {"model_qkv_bias": True, "model_attention_out_bias": True, "model_mlp_bias": True}
_GPT2 = {"model_num_kv_heads": 4, "model_norm": "layernorm", "model_positions": "learned", "model_gated_mlp": False}
_GPT2 |= {"model_activation": "gelu_tanh", **_BIASES}
_OLMO2 = {"model_norm_position": "post", "model_qk_norm": True, "model_qk_norm_span": "projection"}
_GROUPS = (
    {"names": "layers.1.attention.*", "frozen": "true"},
    {"names": "layers.0.*", "role": "matrix", "lr_factor": 0.5, "weight_decay": 0.0},
)
_TIED = {"model_tie_embeddings": True, "model_qk_norm": True}
# name -> options of the model, options of the layout
PROBES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one": (_TIED, {}),
    "fp32": ({"train_precision": "fp32"}, {}),
    "bf16": ({"train_precision": "bf16"}, {}),
    "fp16": ({"train_precision": "fp16", **_Z}, {}),
    "z": (_Z, {}),
    "sequence": (_TIED | _Z | {"model_num_kv_heads": 1}, _T2),
    "replicated": (
        _TIED | _Z | {"model_num_kv_heads": 1},
        _T2 | {"parallel_sequence": False, "train_recompute": "full"},
    ),
    "pipeline": (_TIED | _Z, _P2),
    "split": (_TIED, _P2 | {"parallel_schedule": "zb-h1", "train_recompute": "full"}),
    "zero": (_TIED, _D2),
    "data": (_TIED | _Z, _D2 | {"parallel_zero": 0, "parallel_overlap": False}),
    "dropout": (_DROPOUT, _T2 | {"train_recompute": "full"}),
    "dropout_data": (_DROPOUT, _D2),
    "gpt2-t2": (_GPT2, _T2),
    "gpt2-t4": (_GPT2, {"parallel_tensor": 4}),
    "gpt2-t4-replicated": (_GPT2, {"parallel_tensor": 4, "parallel_sequence": False}),
    "qwen2-t2": ({"model_qkv_bias": True}, _T2),
    "qwen2-t4": ({"model_qkv_bias": True}, {"parallel_tensor": 4, "parallel_sequence": False}),
    "olmo2-t2": (_OLMO2, _T2),
    "olmo2-t4": (_OLMO2, {"parallel_tensor": 4}),
    "gemma": ({"model_norm_offset": True, "model_activation": "gelu_tanh"}, {}),
    "gemma-fp32": (
        {"model_norm_offset": True, "model_activation": "gelu_tanh", "train_precision": "fp32"},
        {},
    ),
    "sandwich": ({"model_norm_position": "sandwich"}, {}),
    "parallel": ({"model_parallel_residual": True}, {}),
    "window": (_WINDOW, {}),
    "window-p2": (_WINDOW | {"model_num_layers": 4, "model_window_layers": "wwwf"}, _P2),
    "window-packed": (_WINDOW | {"data_separate_documents": True, "train_precision": "fp32"}, {}),
    "window-fp32": (_WINDOW | {"train_precision": "fp32"}, {}),
    "llama3": ({"model_rope_scaling": "llama3", "model_rope_factor": 8, "model_rope_original_seq_len": 8}, {}),
    "ramp": ({"phase_1_from_step": 2, "phase_1_rope_theta": 50.0, "phase_1_global_batch_size": 8}, {}),
    "groups": ({"optimizer_groups": _GROUPS}, {}),
}

_NORM, _LOSSES = "number gradient norm", "activation losses|number loss"
_WEIGHTS, _GATHER = "update: (master )?weights", "weights embed"
FAULTS: dict[str, tuple[str, str]] = {
    "rope_of_the_first_phase_kept": ("ramp", "attention core"),
    "loss_normalised_by_the_first_batch": ("ramp", _LOSSES),
    "tied_gradient_counted_twice": ("pipeline", _NORM),
    "norm_counts_replicas": ("sequence", _NORM),
    "norm_misses_tensor_shards": ("sequence", _NORM),
    "sequence_gradient_not_gathered": ("sequence", "backward of (row-parallel|embedding)"),
    "reduce_scatter_takes_its_own_part": ("sequence", "forward.*(embedding|row-parallel)"),
    "zero_gather_sends_the_wrong_range": ("zero", _GATHER),
    "initial_values_by_rank": ("replicated", "state before"),
    "layers_initialised_identically": ("one", "state before"),
    "initial_values_by_local_place": ("sequence", "state before"),
    "dropout_mask_by_rank": ("dropout", r"\| dropout"),
    "dropout_mask_by_local_position": ("dropout", r"\| dropout"),
    "dropout_mask_without_the_tensor_offset": ("dropout", "activation function|dropout"),
    "dropout_mask_of_the_first_heads": ("dropout", "attention core"),
    "dropout_mask_by_local_sample": ("dropout_data", r"\| dropout"),
    "dropout_mask_redrawn_in_recompute": ("dropout", "dropout|layers.1"),
    "dropout_mask_redrawn_in_backward": ("dropout_data", "backward of.*dropout|gradient .*mlp"),
    "dropout_mask_of_every_step_equal": ("dropout_data", r"\| dropout"),
    "dropout_without_scale": ("dropout_data", r"\| dropout"),
    "inner_activations_not_dropped": ("dropout_data", "activation function"),
    "input_gradient_not_summed": ("replicated", "backward of column-parallel"),
    "only_the_last_microbatch_trained": ("one", "weight gradient"),
    "gradient_is_a_moving_average": ("one", "weight gradient"),
    "repeated_tokens_do_not_add_up": ("one", "weight gradient embed"),
    "vocabulary_padding_in_the_softmax": ("replicated", "losses|output head"),
    "recomputed_gradient_twice": ("replicated", "layers.1|weight gradient"),
    "bias_gradient_dropped": ("qwen2-t2", "weight gradient .*bias"),
    "qk_norm_over_the_rank_only": ("olmo2-t2", r"[qk]_norm \| norm"),
    "qk_norm_counts_copies": ("olmo2-t4", r"k_norm \| norm"),
    "qk_norm_backward_counts_copies": ("olmo2-t4", "backward of norm .*_norm"),
    "residual_gradient_dropped": ("fp32", "backward of (residual sum and )?norm"),
    "norm_offset_ignored_in_the_backward": ("gemma-fp32", "backward of norm"),
    "gate_of_another_kind": ("gemma-fp32", "backward of activation function"),
    "norm_weight_without_its_one": ("gemma", "backward of norm"),
    "rotary_convention": ("one", "attention core"),
    "z_loss_without_gradient": ("z", "backward of output head"),
    "log_z_of_the_local_slice": ("sequence", "z_loss|output head"),
    "tied_gradient_not_summed_over_the_stages": ("pipeline", "weight gradient embed"),
    "kv_replicas_not_summed": ("sequence", "weight gradient .*[kv].(weight|norm)"),
    "gradient_averaged_over_data_ranks": ("data", "weight gradient"),
    "zero_gather_forgotten": ("zero", _GATHER),
    "embedding_stale_under_zero": ("pipeline-zero", "weights embed.*all-gather of weights"),
    "bucket_reduced_at_its_first_gradient": ("zero", "weight gradient"),
    "norm_weight_not_summed_under_sequence_parallelism": ("sequence", "weight gradient .*norm"),
    "qk_norm_not_summed": ("replicated", "weight gradient .*[qk]_norm"),
    "weight_decay_on_norms": ("one", "update: .*weights .*norm"),
    "row_bias_added_by_every_rank": ("gpt2-t4-replicated", "row-parallel"),
    "row_bias_gradient_not_summed": ("gpt2-t4", "weight gradient .*bias"),
    "kv_bias_replicas_not_summed": ("qwen2-t4", "weight gradient .*[kv].bias"),
    "sandwich_norm_skipped": ("sandwich", "layers.0"),
    "settings_of_layer_0_for_all_layers": ("window", "layers.1.*attention core"),
    "parallel_residual_in_sequence": ("parallel", "layers.0"),
    "positions_of_the_first_part": ("gpt2-t2", "position embedding"),
    "window_of_every_layer": ("window", "layers.1.*attention core"),
    "window_pattern_counts_from_the_stage": ("window-p2", "attention core"),
    "window_one_token_too_long": ("window", "layers.0.*attention core"),
    "window_ignored_in_packed_rows": ("window-packed", "attention core"),
    "window_across_documents": ("window-packed", "attention core"),
    "first_key_one_too_early": ("window-fp32", "attention core"),
    "rope_scaling_ignored": ("llama3", "attention core"),
    "norm_of_one_stage": ("pipeline", _NORM),
    "tied_copies_diverge": ("pipeline", _WEIGHTS),
    "bias_correction_one_step_late": ("fp32", _WEIGHTS),
    "bias_correction_one_step_late_in_torch": ("one", _WEIGHTS),
    "bf16_without_masters": ("bf16", _WEIGHTS),
    "gradient_scale_ignored": ("fp32", f"{_WEIGHTS}|update: exp_avg"),
    "gradient_scale_ignored_in_torch": ("one", f"{_WEIGHTS}|update: exp_avg"),
    "rounded_weights_not_written": ("bf16", "update: weights"),
    "rounded_weights_not_written_in_torch": ("bf16", "update: weights"),
    "frozen_weight_updated": ("groups", f"{_WEIGHTS} layers.1.attention|gradient layers.1.attention"),
    "factor_of_another_group": ("groups", _WEIGHTS),
    "group_without_decay_decays": ("groups", _WEIGHTS + " layers.0"),
    "loss_is_a_mean_of_microbatch_means": ("one", _LOSSES),
    "reduce_before_the_last_microbatch": ("zero", "weight gradient"),
    "weight_gradient_twice": ("split", "weight gradient"),
    "weight_gradient_dropped": ("split", "weight gradient"),
    "receive_buffer_reused": ("pipeline", "layers.1|the next stage"),
    "named_sum_on_every_tensor_rank": ("replicated", "number z_loss"),
    "named_sum_of_the_last_microbatch": ("z", "number z_loss"),
    "clip_on_the_first_tensor_rank_only": ("replicated", f"{_WEIGHTS}|update: exp_avg"),
    "loss_is_a_mean_of_data_rank_means": ("data", _LOSSES),
    "loss_counts_masked_tokens": ("one", _LOSSES),
    "loss_reported_by_every_tensor_rank": ("replicated", _LOSSES),
    "pipeline_gradient_scaled_by_tokens": ("pipeline", _LOSSES),
    "pipeline_gradient_averaged_over_microbatches": ("pipeline", _LOSSES),
    "loss_scale_in_the_norm": ("fp16", _NORM),
    "loss_scale_not_undone": ("fp16", f"{_WEIGHTS}|update: exp_avg"),
    "named_sum_not_reduced_over_data_ranks": ("data", "number (z_)?loss"),
    "z_loss_scaled_twice": ("fp16", "z_loss|backward of output head"),
    "gradient_doubled_by_each_microbatch": ("one", "weight gradient"),
    "norm_weight_never_trained": ("one", "weight gradient .*norm"),
    "variance_term_weighted_twice": ("one", "backward of norm"),
    "norm_offset_ignored": ("gemma", r"\| norm"),
    "norm_with_offset_begins_at_one": ("gemma", "state before"),
    "copies_counted_in_the_softmax": ("replicated", "losses|output head"),
    "z_loss_gradient_by_tensor_degree": ("sequence", "z_loss|backward of output head"),
    "windows_begin_one_layer_late": ("window", "layers.0.*attention core"),
    "update_count_never_advances": ("ramp", _WEIGHTS),
}
PROBES["pipeline-zero"] = (_TIED, _P2 | _D2)


@dataclass(frozen=True)
class Located:
    """Where a fault was located. found: "" if nothing differs, or the error of the run. right: it is as expected."""

    name: str
    probe: str
    found: str
    right: bool
    seconds: float


def sides_of(probe: str, data: Path) -> tuple[Any, Any]:
    """The configs of a probe: in its layout, and on one process. data: folder of its corpus, written if it is new."""
    from engine.proof.small_data import with_small_data
    from tests.support.cases import config

    model, layout = PROBES[probe]
    world = layout.get("parallel_tensor", 1) * layout.get("parallel_pipeline", 1) * layout.get("parallel_data", 1)
    if not data.exists():
        data.mkdir(parents=True)
        with_small_data(config(1, **_TINY | model), data)
    options = {"data_train": str(data / "train"), "checkpoint_resume": "never"}
    return config(world, **_TINY | model | layout | options), config(1, **_TINY | model | options)


def record_probe(probe: str, folder: Path, data: Path, *, reference: bool) -> None:
    """Record a probe with the engine that is on the path: in its layout, or its reference with all moves."""
    from engine.proof.difference import MOVES
    from engine.proof.sides import Side, noise_of, record

    cfg, one = sides_of(probe, data)
    moves = range(MOVES + 1) if reference else (0,)
    side = Side(one if reference else cfg, redrawn=True)
    record(side, folder, [noise_of([one, cfg], move) for move in moves], 1 + (probe in _TWO_STEPS))


def forked(function: Callable[[], None], log: Path) -> str:
    """Run a function in a fork of this process, which has not imported the engine; "" or its error."""

    def body() -> None:
        code = 1
        try:
            function()
            code = 0
        except Exception as error:
            log.write_text(f"{type(error).__name__}: {error}")
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(_TIMEOUT_S)
    hung = process.exitcode is None
    process.kill()
    process.join()
    if hung or process.exitcode == 0:
        return "hang" if hung else ""
    return f"error: {log.read_text()[:300] if log.exists() else process.exitcode}"


def in_a_copy(mutation: Mutation, probe: str, folder: Path, data: Path) -> str:
    """Record a probe in a copy of the repository with the fault; "" or the error of the run."""
    with tempfile.TemporaryDirectory(prefix="located_") as name:
        root = Path(name).resolve()
        copy_repository(root, built() and mutation.path != "torch")
        mutation.apply(root)

        def recorded() -> None:
            enter(root)
            record_probe(probe, folder, data, reference=False)

        return forked(recorded, folder / "error")


def located(names: Iterable[str], folder: Path) -> Iterator[Located]:
    """Locate faults by name. folder: for the traces of the references."""
    mutations = {m.name: m for m in MUTATIONS}
    for name in names:
        begin = time.monotonic()
        probe, pattern = FAULTS[name]
        with tempfile.TemporaryDirectory(dir=folder) as trace:
            found, error = _locate(mutations[name], probe, folder, Path(trace))
        right = bool(re.search(pattern, found)) and not error
        yield Located(name, probe, error or found, right, time.monotonic() - begin)


def _locate(mutation: Mutation, probe: str, folder: Path, trace: Path) -> tuple[str, str]:
    """The first difference, and an error of the run; each may be empty."""
    reference, data, log, answer = folder / probe, folder / f"{probe}-data", trace / "error", trace / "found"
    if not reference.exists() and (error := forked(lambda: record_probe(probe, reference, data, reference=True), log)):
        return "", error
    if error := in_a_copy(mutation, probe, trace, data) or forked(lambda: first(trace / "0", reference, answer), log):
        return "", error
    return answer.read_text(), ""


def first(trace: Path, reference: Path, answer: Path) -> None:
    """Write to `answer` the first difference of a trace from the reference."""
    from engine.proof.difference import MOVES, compare
    from engine.proof.report import place_of
    from engine.proof.traces import Trace

    there, *moves = (Trace(reference / str(move)) for move in range(MOVES + 1))
    findings = compare(Trace(trace), there, moves).findings
    answer.write_text(f"{place_of(findings[0].here)} | {findings[0].here.op}" if findings else "")


def main() -> int:
    """Locate all faults; the exit code is 0 if at least nine of ten are where they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*FAULTS], help="locate these faults only")
    args = parser.parse_args()
    preload()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="located_") as folder:
        for outcome in located(args.only or FAULTS, Path(folder)):
            outcomes.append(outcome)
            mark = "right" if outcome.right else "WRONG"
            print(f"{mark} {outcome.seconds:3.0f} s  {outcome.name} ({outcome.probe}): {outcome.found or 'nothing'}")
            sys.stdout.flush()
    count = sum(outcome.right for outcome in outcomes)
    print(f"{count} of {len(outcomes)} faults are located at their operation or layer")
    return int(count < 0.9 * len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
