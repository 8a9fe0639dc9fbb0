"""Faults of what a config says about the steps of a run."""

from __future__ import annotations

from .patch import Mutation

COUNT = ("test_a_count_step_by_step_agrees",)
CHANGED = ("test_later_phases_may_change_and_past_ones_may_not",)
STAGED = ("test_every_length_reads_epochs_of_its_order",)

MUTATIONS = [
    Mutation(
        "consumed_counts_one_batch_size",
        "samples consumed are steps x the batch size of now",
        "engine.config.phases:Phases.consumed",
        "samples += steps * phase.global_batch_size",
        "samples += steps * self.phases[-1].global_batch_size",
        COUNT,
        threads=("NVIDIA-NeMo/Speech#3738",),
    ),
    Mutation(
        "phase_one_step_late",
        "the step at which a phase begins still has the values before it",
        "engine.config.phases:Phases.at",
        "phase.first_step <= max(1, step)",
        "phase.first_step <= max(1, step - 1)",
        COUNT,
    ),
    Mutation(
        "weights_of_earlier_phases_lost",
        "a source that a phase does not name goes back to the weight of data.train",
        "engine.config.phases:phases_of",
        "{**found[-1].weights, **given.get('weights', {})}",
        "given.get('weights', {})",
        COUNT,
    ),
    Mutation(
        "first_plan_kept",
        "the plan of the first phase runs in all phases",
        "engine.train.state:TrainState.plan",
        "self.derived.plan_of(self.phase)",
        "self.derived.first_plan",
        ("test_one_process_equals_plain_torch",),
    ),
    Mutation(
        "loss_normalised_by_the_first_batch",
        "the loss is divided by the tokens of the first phase's batch",
        "engine.train.step:train_step",
        "counted = count_tokens(batches, state.plan, ctx)",
        "counted = count_tokens(batches, state.plan, ctx)\n"
        "counted = type(counted)(counted.number, counted.weight * state.phases.at(1).tokens / state.phase.tokens)",
        ("test_one_process_equals_plain_torch",),
    ),
    Mutation(
        "rope_of_the_first_phase_kept",
        "the table of angles is cached over a change of rope_theta",
        "engine.model.transformer:Transformer.use",
        "self.cfg, self.rope = (cfg, self.rope[:, :0])",
        "self.cfg = cfg",
        ("test_one_process_equals_plain_torch",),
    ),
    Mutation(
        "export_with_the_rope_of_the_first_phase",
        "a checkpoint of a later phase is exported with the RoPE settings of [model]",
        "engine.config.phases:saved_model",
        "saved_phase(config, step)",
        "saved_phase(config, 1)",
        ("test_rope_settings_add_up_and_checkpoints_have_those_of_their_step",),
    ),
    Mutation(
        "past_recomputed_at_resume",
        "after a resume the samples of the past are counted with the phases of now",
        "engine.train.resume:resume",
        "state.phases = state.phases.resumed(begin)",
        "pass",
        CHANGED,
    ),
    Mutation(
        "length_restarts_the_epochs",
        "a new sequence length begins with the shuffle of epoch 0 again",
        "engine.data.samples.staged:StagedOrder.__init__",
        "order.begin_at(sample, epoch)",
        "order.begin_at(sample, 0)",
        STAGED,
    ),
    Mutation(
        "length_restarts_the_samples",
        "a new sequence length skips as many samples as were read before",
        "engine.data.samples.staged:StagedOrder.__init__",
        "order.begin_at(sample, epoch)",
        "order.begin_at(0, epoch)",
        STAGED,
    ),
    Mutation(
        "past_phases_not_compared",
        "a run resumes with other batch sizes in the steps done",
        "engine.checkpoint.lineage:differences",
        "pairs |= _past_phases(manifest, cfg)",
        "pass",
        CHANGED,
    ),
]
