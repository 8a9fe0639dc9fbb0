"""Faults of the memory sheet: a term that is missing, counted twice, or of the wrong size."""

from __future__ import annotations

from .patch import Mutation

SHEET = "test_the_sheet_equals_the_counted_storages"

MUTATIONS = [
    Mutation(
        "logits_of_all_tokens_not_counted",
        "the sheet forgets the chunk of logits, so a large vocabulary runs out of memory in the head",
        "engine.model.declarations:decoder",
        "logits + max(product, work.gradient(WeightSpecs(matrix)))",
        "0",
        (f"{SHEET}[large vocabulary]",),
    ),
    Mutation(
        "micro_batches_in_flight_not_counted",
        "the sheet counts the activations of one micro-batch, as if no pipeline held several",
        "engine.planner.sheet:_Walk._forward",
        'self.add("activations", stage.total)',
        'self.alive["activations"] = stage.total',
        (f"{SHEET}[uneven stages]",),
    ),
    Mutation(
        "recomputed_activations_not_counted",
        "the sheet of full recomputation forgets that a block's activations exist again in its backward",
        "engine.model.declarations:block",
        "none + most",
        "most",
        (f"{SHEET}[micro-batch of 4, full recompute]",),
    ),
    Mutation(
        "zero_not_counted",
        "the sheet stores the whole optimizer state on each data rank although ZeRO-1 shards it",
        "engine.planner.memory:RankState.states",
        "owned or bool(self.cfg.parallel.zero)",
        "owned",
        (f"{SHEET}[bfloat16, data 2, full recompute]",),
    ),
    Mutation(
        "deferred_gradient_holds_the_graph",
        "a weight gradient that waits for W keeps the autograd graph, and with it two more tensors of hidden states",
        "engine.ops.linear:_Linear.backward",
        "tuple(x.detach() for x in ctx.saved_tensors)",
        "ctx.saved_tensors",
        ("test_a_deferred_gradient_holds_no_graph",),
    ),
    Mutation(
        "peak_of_a_change_is_that_of_the_present_run",
        "a change is proposed because the present settings are counted, not the changed ones",
        "engine.planner.fit:_Counter.peak",
        "sheets(changed, resolved, states)",
        "sheets(self.cfg, self.derived)",
        ("test_each_change_fits_and_its_peak_is_that_of_the_changed_run[30]",),
    ),
]
