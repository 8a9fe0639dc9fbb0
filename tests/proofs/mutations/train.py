"""Faults of a step, of resuming, and of validation."""

from __future__ import annotations

from .catchers import PLAIN, RESUME, small
from .patch import Mutation

RESUME_BF16 = ("test_resume_in_the_same_layout_changes_no_bit[bf16-1]",)
OVERFLOW = ("test_an_overflow_leaves_out_the_update_on_all_ranks_and_survives_a_restart",)
UNDONE = ("test_the_scale_is_undone_to_the_bit",)

MUTATIONS = [
    Mutation(
        "clip_on_the_first_tensor_rank_only",
        "the other tensor ranks are not clipped (BLOOM's chronicles)",
        "engine.train.step:train_step",
        "clip_factor(norms.norm, cfg.optimizer.clip_norm) / scale",
        "1.0 if ctx.tensor.rank else clip_factor(norms.norm, cfg.optimizer.clip_norm) / scale",
        small("copies"),
    ),
    Mutation(
        "loss_is_a_mean_of_data_rank_means",
        "each data rank divides by its own count of tokens (torchtune#1875, Fast-LLM#426)",
        "engine.train.step:count_tokens",
        "total = int(all_reduce_(torch.tensor(mine, device=ctx.device), ctx.world).item())",
        "total = total * ctx.data.size",
        small("data"),
    ),
    Mutation(
        "loss_counts_masked_tokens",
        "divided by the length of the sequences instead of the tokens that count (nanochat#59)",
        "engine.train.step:count_tokens",
        "total = sum(int(b.mask.sum()) for b in batches)",
        "total = sum(b.mask.numel() for b in batches)",
        PLAIN,
    ),
    Mutation(
        "loss_reported_by_every_tensor_rank",
        "the reported loss is added up over ranks that all have it",
        "engine.train.step:sum_losses",
        "losses.sum() * float(holds_loss(plan, ctx))",
        "losses.sum()",
        small("copies"),
    ),
    Mutation(
        "pipeline_gradient_scaled_by_tokens",
        "with a pipeline the division by the global token count is lost (torchtitan#2972)",
        "engine.train.step:train_step",
        "scale / tokens",
        "scale if ctx.pipeline.size > 1 else scale / tokens",
        small("pipeline"),
        nth=(1, 2),
    ),
    Mutation(
        "pipeline_gradient_averaged_over_microbatches",
        "with a pipeline the gradient is divided by the number of microbatches once more (torchtitan#1733, #1759)",
        "engine.train.step:train_step",
        "scale / tokens",
        "scale / tokens / (len(batches) if ctx.pipeline.size > 1 else 1)",
        small("pipeline"),
        nth=(1, 2),
    ),
    Mutation(
        "validation_loss_depends_on_accumulation",
        "the reported score is divided by the accumulation steps (torchtitan#1759)",
        "engine.train.evaluate:Evaluator.run_unless",
        "return self._score(loss / tokens, int(tokens))",
        "return self._score(loss / tokens / (chunk // mbs), int(tokens))",
        ("test_the_score_does_not_depend_on_the_layout[2]",),
    ),
    Mutation(
        "loss_scale_in_the_norm",
        "clipping looks at gradients that are still scaled",
        "engine.train.step:train_step",
        "norms = state.norms(scale)",
        "norms = state.norms()",
        UNDONE,
    ),
    Mutation(
        "loss_scale_not_undone",
        "AdamW gets scaled gradients and hardly shows it",
        "engine.train.step:train_step",
        "clip_factor(norms.norm, cfg.optimizer.clip_norm) / scale",
        "clip_factor(norms.norm, cfg.optimizer.clip_norm)",
        UNDONE,
    ),
    Mutation(
        "overflow_decided_by_each_rank",
        "only the rank that holds the overflow leaves the update out",
        "engine.train.step:train_step",
        "finite = math.isfinite(norms.norm)",
        "finite = bool(torch.isfinite(state.norms.local()).all())",
        ("test_an_overflow_on_one_rank_is_one_on_all",),
    ),
    Mutation(
        "skipped_update_counted_by_adam",
        "an update that was left out moves the bias correction (OLMo-core's SkipStep)",
        "engine.train.step:train_step",
        "leave_behind(state)",
        "state.optimizer.steps += not finite\nleave_behind(state)",
        OVERFLOW,
    ),
    Mutation(
        "skipped_update_stops_the_schedule",
        "the learning rate counts updates instead of steps (OLMo-core's SkipStep)",
        "engine.train.step:train_step",
        "state.step + 1",
        "state.optimizer.steps + 1",
        OVERFLOW,
        nth=(2, 2),
    ),
    Mutation(
        "moments_not_loaded",
        "weights come from the checkpoint, the optimizer starts anew (DeepSpeed#7786)",
        "engine.train.resume:resume",
        "load_into(reader, state.optimizer.states(), state.ctx)",
        'load_into(reader, (held for held in state.optimizer.states() if held.kind == "model"), state.ctx)',
        RESUME,
    ),
    Mutation(
        "masters_loaded_but_not_published",
        "the model computes with what it had before the load (DeepSpeed#762)",
        "engine.train.resume:resume",
        "state.optimizer.publish()",
        "pass",
        RESUME_BF16,
    ),
    Mutation(
        "adam_step_lost",
        "after a resume the bias correction starts anew (Automodel#3882)",
        "engine.train.resume:resume",
        'state.optimizer.steps = int(manifest.optimizer.get("steps", manifest.step))',
        "state.optimizer.steps = 0",
        RESUME,
    ),
    Mutation(
        "schedule_restarts_at_resume",
        "the learning rate counts the steps since the process began (gpt-neox#1029, Megatron#7468)",
        "engine.train.step:train_step",
        "state.step + 1",
        'state.step + 1 - state.__dict__.setdefault("begun", state.step)',
        RESUME,
        nth=(2, 2),
    ),
    Mutation(
        "update_overtakes_the_copy",
        "a save in the background writes values of a later step (pytorch#144657, NVRx#376)",
        "engine.train.step:train_step",
        "state.before_update()",
        "pass",
        ("test_an_update_waits_for_the_copy[True]",),
    ),
]
