"""Faults of samples and of their distribution to ranks."""

from __future__ import annotations

from .patch import Mutation

LOADER = ("test_layout_and_restarts_do_not_change_the_samples",)

MUTATIONS = [
    Mutation(
        "samples_depend_on_the_data_degree",
        "a data rank reads samples of another rank (Megatron-Bridge#3503, bigscience Megatron-DeepSpeed#276)",
        "engine.data.samples.loader:RankShare.read",
        "first = whole.start + self.data_rank * local",
        "first = whole.start + self.data_rank",
        LOADER,
    ),
    Mutation(
        "data_restarts_at_sample_0",
        "after a resume the first samples are repeated (Megatron-Bridge#3503, accelerate#2016)",
        "engine.config.phases:Phases.consumed",
        "samples, tokens = (self.origin.samples, self.origin.tokens)",
        "samples, tokens = (0, self.origin.tokens)",
        LOADER,
    ),
    Mutation(
        "fim_in_order_of_access",
        "fill-in-the-middle depends on the reader of a sample (Megatron's GPTFIMDataset draws in access order)",
        "engine.data.samples.fim:FillInTheMiddle._choose",
        'derive_key(self.seed, "fim", int(sample), at)',
        'derive_key(self.seed, "fim", number, at)',
        ("test_layout_and_restarts_do_not_change_it",),
    ),
    Mutation(
        "fim_turns_torn_characters_into_text",
        "half a character at the boundary of a sample becomes U+FFFD",
        "engine.data.samples.fim:FillInTheMiddle._read",
        "s.text and _LOST not in s.text",
        "s.text",
        ("test_nearly_all_segments_are_changed_torn_ones_too",),
    ),
    Mutation(
        "fim_filling_counts",
        "padding tokens are in the loss",
        "engine.data.samples.fim:FillInTheMiddle.__call__",
        "np.arange(1, result.rows.shape[1]) >= result.lengths[:, None]",
        "np.arange(1, result.rows.shape[1]) >= result.rows.shape[1] + 0 * result.lengths[:, None]",
        ("test_rows_keep_their_length_and_the_filling_does_not_count",),
    ),
]
