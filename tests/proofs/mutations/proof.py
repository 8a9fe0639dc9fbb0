"""Faults of proofs: a difference that is not seen, and an option that is lost while a config is shrunk."""

from __future__ import annotations

from .patch import Mutation

DIFFERENCES = "test_differences[found{}-wanted{}-{}]"
DRAWN = ("test_drawn_configs_shrink[8-12]",)

MUTATIONS = [
    Mutation(
        "proof_ignores_missing_tensors",
        "a tensor that only one side has is not compared",
        "engine.proof.tensors:errors_of",
        "found.keys() ^ wanted.keys()",
        "()",
        (DIFFERENCES.format(5, 5, "inf"),),
    ),
    Mutation(
        "proof_takes_nan_for_equal",
        "a difference that is not a number is below every limit",
        "engine.proof.tensors:errors_of",
        "math.isnan(errors[name])",
        "False",
        (DIFFERENCES.format(4, 4, "inf"),),
    ),
    Mutation(
        "proof_ignores_replicas",
        "replicas that have drifted apart are overwritten by the last rank",
        "engine.proof.tensors:assemble",
        "not np.array_equal(target[rectangle][there], values[there], equal_nan=True)",
        "False",
        ("test_faults_of_the_ranks_are_named[ranks0-replicas differ]",),
    ),
    Mutation(
        "proof_ignores_uncovered_values",
        "values that no rank holds count as zero",
        "engine.proof.tensors:assemble",
        "not held.all()",
        "False",
        ("test_faults_of_the_ranks_are_named[ranks1-1 of 4 values are on no rank]",),
    ),
    Mutation(
        "proof_passes_any_difference",
        "a check passes without a look at its limit",
        "engine.proof.prove:Check.passed",
        "self.error <= self.limit and not self.problem",
        "not self.problem",
        ("test_a_fault_is_found_and_named[kv_replicas_not_summed]",),
    ),
    Mutation(
        "resumed_run_compared_with_itself",
        "a resumed run without its moments passes",
        "engine.proof.prove:prove",
        'tuple(_resumed(again, found, "resumed", 0.0))',
        'tuple(_resumed(again, again, "resumed", 0.0))',
        ("test_a_fault_is_found_and_named[moments_not_loaded]",),
    ),
    Mutation(
        "shrinking_drops_phases",
        "a config with phases is proven without them",
        "engine.proof.shrink:_shrink_steps",
        'row["from_step"] <= t.steps',
        'row["from_step"] <= 1',
        DRAWN,
    ),
    Mutation(
        "shrinking_drops_axes",
        "a layout of many ranks loses a parallel axis although the processes suffice for all",
        "engine.proof.shrink:_degrees.key",
        "return plan, kept, math.prod(new.values()), divisors, -max(new.values()), new['tensor']",
        "return plan, math.prod(new.values()), max(new.values())",
        DRAWN,
    ),
    Mutation(
        "shrunk_kv_heads_not_shared",
        "tensor ranks that share a KV head get one each",
        "engine.proof.shrink:_heads",
        "shared",
        "False",
        ("test_shared_kv_heads_stay_shared",),
    ),
    Mutation(
        "shrunk_groups_select_by_number",
        "a row for layer 7 selects layer 7 of a model that has four",
        "engine.proof.shrink:_shrink_groups",
        "str(sources[int(n[0])])",
        "n[0]",
        ("test_layers_with_their_own_settings_stay",),
    ),
    Mutation(
        "shrunk_stages_even",
        "a stage without blocks gets some",
        "engine.proof.shrink:_layer_counts",
        "[min(count, base + (count > least)) for count in picked]",
        "[base for count in picked]",
        DRAWN,
    ),
]
