"""Faults of samples and of their distribution to ranks."""

from __future__ import annotations

from .patch import Mutation

LOADER = ("test_layout_and_restarts_do_not_change_the_samples",)

MUTATIONS = [
    Mutation(
        "samples_depend_on_the_data_degree",
        "a data rank reads samples of another rank",
        "engine.data.samples.loader:RankShare.read",
        "first = whole.start + self.data_rank * local",
        "first = whole.start + self.data_rank",
        LOADER,
        threads=(
            "NVIDIA-NeMo/Megatron-Bridge#5944",
            "vllm-project/speculators#427",
        ),
    ),
    Mutation(
        "data_restarts_at_sample_0",
        "after a resume the first samples are repeated",
        "engine.config.phases:Phases.consumed",
        "samples, tokens = (self.origin.samples, self.origin.tokens)",
        "samples, tokens = (0, self.origin.tokens)",
        LOADER,
        threads=(
            "NVIDIA-NeMo/Megatron-Bridge#3503",
            "huggingface/accelerate#2016",
        ),
    ),
    Mutation(
        "fim_in_order_of_access",
        "fill-in-the-middle depends on the reader of a sample",
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
    Mutation(
        "padding_found_by_its_id",
        "labels with the id of the padding do not count: with padding = end of document, no end is ever learned",
        "engine.data.samples.fim:FillInTheMiddle.__call__",
        "np.arange(1, result.rows.shape[1]) >= result.lengths[:, None]",
        "result.rows[:, 1:] == self.eod",
        ("test_rows_keep_their_length_and_the_filling_does_not_count",),
        threads=("NVIDIA-NeMo/Megatron-Bridge#4660",),
    ),
    Mutation(
        "large_ids_in_16_bits",
        "token ids of a large vocabulary are stored as uint16",
        "engine.data.samples.indexed_writer:token_dtype",
        "vocab_size < UINT16_VOCAB_LIMIT",
        "True",
        ("test_writer_dtype_rule[200000-i4]",),
        threads=("huggingface/transformers#2825", "allenai/open-instruct#1862"),
    ),
    Mutation(
        "offsets_in_32_bits",
        "offsets into a corpus of more than 2 GiB overflow",
        "engine.data.samples.index_file:write_index",
        "lengths[part][lengths[part] > 0].astype(np.int64) * dtype.itemsize",
        "lengths[part][lengths[part] > 0] * np.int32(dtype.itemsize)",
        ("test_offsets_beyond_32_bits",),
        threads=("NVIDIA/Megatron-LM#1672", "facebookresearch/fairseq#5532"),
    ),
    Mutation(
        "every_epoch_shuffled_alike",
        "the epoch is not part of the shuffle's seed: each epoch has the order of the first",
        "engine.data.samples.order:SampleOrder._positions",
        'derive_key(self.seed, "samples", epoch)',
        'derive_key(self.seed, "samples", 0)',
        ("test_equals_the_oracle",),
        threads=("modelscope/ms-swift#10050",),
    ),
]
