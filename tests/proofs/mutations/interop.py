"""Faults of importing models of other engines."""

from __future__ import annotations

from .catchers import hf
from .patch import Mutation

MUTATIONS = [
    Mutation(
        "imported_window_one_token_too_short",
        "sliding_window is read as the number of earlier tokens, without the token itself",
        "engine.interop.huggingface.windows:read_window",
        '{"window": window, "window_layers": shortest_pattern(letters)}',
        '{"window": window - 1, "window_layers": shortest_pattern(letters)}',
        ("test_sliding_windows_are_those_of_transformers",),
    ),
    Mutation(
        "fused_heads_taken_for_fused_matrices",
        "query_key_value of GPT-NeoX is q of all heads, then k, then v (gpt-neox#712: gibberish)",
        "engine.interop.huggingface.weights:locate_tensors",
        "groups = cfg.num_heads if stem.endswith(family.by_head) and family.by_head else 1",
        "groups = 1",
        hf("neox"),
    ),
    Mutation(
        "keys_that_count_ignored",
        "a key of config.json that changes the model is ignored silently",
        "engine.interop.huggingface.config_json:_key_errors",
        "value not in fixed[key]",
        "value not in family.fixed.get(key, (value,))",
        ("test_unsupported_keys_are_rejected_by_name",),
    ),
]
