"""What a run would be, printed before anything runs: config with sources, who holds what, sizes. No processes."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from engine.config import Resolved, layout_of
from engine.context import make_context
from engine.layout import Coords, Layout
from engine.model.transformer import StageShape, Transformer, num_parameters
from engine.optim.precision import PRECISIONS
from engine.planner.cost import flops_per_token
from engine.sharding import parameters

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
    console.print(_stages(resolved, layout))
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
    microbatches = train.global_batch_size // (layout.data * train.micro_batch_size)
    flops = flops_per_token(cfg.model, train.seq_len)
    for label, value in (
        ("ranks", f"{layout.world:,}"),
        ("parameters in total", f"{num_parameters(cfg.model):,}"),
        ("tokens per step", f"{tokens:,} ({train.global_batch_size} sequences of {train.seq_len})"),
        ("tokens in all", f"{tokens * train.steps:,} ({train.steps} steps)"),
        ("microbatches per step and rank", f"{microbatches} of {train.micro_batch_size}"),
        ("model FLOPs", f"{flops / 1e9:,.2f} GFLOP a token, {flops * tokens / 1e12:,.2f} TFLOP a step"),
    ):
        console.print(f"{label}: {value}", highlight=False)


def _stages(resolved: Resolved, layout: Layout) -> Table:
    cfg = resolved.config
    precision = PRECISIONS[cfg.train.precision]
    per_parameter = 4 * precision.main.itemsize  # gradient, master weight, two moments
    if precision.compute != precision.main:
        per_parameter += precision.compute.itemsize
    table = Table("stage", "layers", "ranks", "parameters per rank", "weights, gradients and optimizer", title="Layout")
    table.title_justify = "left"
    for stage in range(layout.pipeline):
        first = layout.rank(Coords(stage, 0, 0, 0))
        last = first + layout.world // layout.pipeline - 1
        ctx = make_context(layout, first, num_kv_heads=cfg.model.num_kv_heads, dtype=precision.compute, device="meta")
        shape = StageShape.of(cfg.model.num_layers, stage, layout.pipeline)
        count = sum(p.numel() for p in parameters(Transformer(cfg.model, ctx, shape)))
        layers = f"{shape.layers.start}..{shape.layers.stop - 1}"
        layers = ("embedding, " if shape.first else "") + layers + (", head" if shape.last else "")
        table.add_row(str(stage), layers, f"{first}..{last}", f"{count:,}", f"{count * per_parameter / 2**30:,.3f} GiB")
    return table
