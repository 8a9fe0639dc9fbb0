"""What a run would be, printed before anything runs: config with sources, who holds what, sizes. No processes."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from engine.config import layout_of, pipeline_plan
from engine.context import make_context
from engine.layout import Coords, Layout
from engine.model.transformer import build_stages, num_parameters
from engine.optim.precision import PRECISIONS
from engine.pipeline.actions import Plan
from engine.pipeline.simulate import peak_memory, simulate
from engine.planner.cost import flops_per_token, uneven_pipeline
from engine.resolve import Resolved

_MAX_GRID_RANKS = 64


def show(resolved: Resolved, console: Console) -> None:
    """Print the dry run of a checked config."""
    cfg, layout = resolved.config, layout_of(resolved.config)
    table = Table("setting", "value", "from", title="Config", title_justify="left")
    for path, source in resolved.sources.items():
        section, name = path.split(".")
        table.add_row(
            path, str(getattr(getattr(cfg, section), name)), source, style="" if source != "default" else "dim"
        )
    console.print(table)
    plan = pipeline_plan(cfg)
    console.print(_stages(resolved, layout, plan))
    if layout.world <= _MAX_GRID_RANKS:
        console.print(layout.table(), markup=False, highlight=False)
    else:
        console.print(
            "rank = ((pipeline * D + data) * C + context) * T + tensor, "
            f"D = {layout.data}, C = {layout.context}, T = {layout.tensor}",
            highlight=False,
        )
    train = cfg.train
    tokens = train.global_batch_size * train.seq_len
    kept = max(peak_memory(plan))
    flops = flops_per_token(cfg.model, train.seq_len)
    for label, value in (
        ("ranks", f"{layout.world:,}"),
        ("parameters in total", f"{num_parameters(cfg.model):,}"),
        ("tokens per step", f"{tokens:,} ({train.global_batch_size} sequences of {train.seq_len})"),
        ("tokens in all", f"{tokens * train.steps:,} ({train.steps} steps)"),
        ("microbatches per step and rank", f"{plan.microbatches} of {train.micro_batch_size}"),
        ("pipeline", f"{plan.name}, bubble {simulate(plan).bubble:.1%} if F, I and W cost the same on all stages"),
        ("activations kept on a rank", f"of {kept:g} microbatches of a stage at most"),
        ("model FLOPs", f"{flops / 1e9:,.2f} GFLOP a token, {flops * tokens / 1e12:,.2f} TFLOP a step"),
    ):
        console.print(f"{label}: {value}", highlight=False)
    if uneven := uneven_pipeline(cfg, plan):
        console.print(f"note: {uneven}", highlight=False)


def _stages(resolved: Resolved, layout: Layout, plan: Plan) -> Table:
    cfg = resolved.config
    precision = PRECISIONS[cfg.train.precision]
    state = 2 * precision.main.itemsize  # moments
    if precision.compute != precision.main:
        state += precision.main.itemsize  # master weights
    shares = layout.data if cfg.parallel.zero else 1
    per_parameter = precision.compute.itemsize + precision.main.itemsize + state / shares
    table = Table("ranks", "stages", "parameters per rank", "weights, gradients and optimizer", title="Layout")
    table.title_justify = "left"
    for rank in range(layout.pipeline):
        first = layout.rank(Coords(rank, 0, 0, 0))
        last = first + layout.world // layout.pipeline - 1
        ctx = make_context(layout, first, num_kv_heads=cfg.model.num_kv_heads, dtype=precision.compute, device="meta")
        count, texts = 0, []
        for _, model, params in build_stages(cfg, ctx, plan.stages_of(rank)):
            shape = model.shape
            count += sum(p.numel() for p in params)
            layers = f"layers {shape.layers.start}..{shape.layers.stop - 1}" if shape.layers else "no layers"
            texts.append(("embedding, " if shape.first else "") + layers + (", head" if shape.last else ""))
        size = f"{count * per_parameter / 2**30:,.3f} GiB"
        table.add_row(f"{first}..{last}", "; ".join(texts), f"{count:,}", size)
    return table
