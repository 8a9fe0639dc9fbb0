"""`engine train --dry-run`: print config with sources, layout, memory and FLOPs of a run without starting processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from engine.cli.common import print_result
from engine.cli.sheet_options import SheetOptions
from engine.cli.sheet_pages import (
    as_fields,
    day_line,
    explained,
    judge,
    memory_lines,
    on_gpu,
    table,
    verdict_lines,
)
from engine.config.load import Resolved
from engine.config.mixture import read_mixture
from engine.config.phases import Phase
from engine.config.schema import Config, fields
from engine.config.tree import value_at
from engine.errors import EXIT_ERROR, EXIT_OK
from engine.model.build import num_parameters, parameter_specs
from engine.optim.groups import ParameterGroup, group_of
from engine.pipeline.simulate import peak_memory, simulate
from engine.planner.flops import flops_per_token, uneven_pipeline
from engine.planner.sheet import RankSheet, sheets

_MAX_GRID_RANKS = 64


def show(resolved: Resolved, console: Console, options: SheetOptions) -> int:
    """Print the dry run of a checked config. Returns the exit code: 1 if it does not fit into --gpu-memory."""
    target = on_gpu(resolved) if options.gpu_memory is not None else resolved
    found = sheets(target.config, target.derived)
    verdict = None if options.gpu_memory is None else judge(target, found, options.gpu_memory)
    if options.json:
        print_result([], as_fields(resolved, found, options, verdict))
    elif options.explain:
        print_result(list(explained(resolved, found, options.explain)))
    else:
        _show(resolved, console, options, found)
    if verdict is not None and options.gpu_memory is not None and not options.json:
        print_result(list(verdict_lines(verdict, options.gpu_memory)))
    return EXIT_OK if verdict is None or verdict.fits else EXIT_ERROR


def _show(resolved: Resolved, console: Console, options: SheetOptions, found: Sequence[RankSheet]) -> None:
    cfg, layout, derived = resolved.config, resolved.derived.layout, resolved.derived
    console.print(_settings(resolved, options.full))
    for line in _data_status(cfg):
        console.print(line, markup=False, highlight=False)
    console.print(table(derived, found))
    if cfg.optimizer.groups:
        console.print(_groups(cfg))
    if layout.world <= _MAX_GRID_RANKS:
        console.print(layout.table(), markup=False, highlight=False)
    else:
        console.print(layout.formula(), highlight=False)
    steps = cfg.train.steps
    position = derived.phases.consumed(steps)
    for label, value in (
        ("ranks", f"{layout.world:,}"),
        ("parameters in total", f"{num_parameters(cfg.model):,}"),
        ("tokens in total", f"{position.tokens:,} ({steps} steps, {position.samples:,} samples)"),
    ):
        console.print(f"{label}: {value}", highlight=False)
    phases = derived.phases.phases
    for phase in phases:
        if len(phases) > 1:
            late = "" if phase.first_step <= steps else f", after the end of the run (train.steps {steps})"
            name = f"phase {phase.number}" if phase.number else "before the phases"
            console.print(f"{name}, from step {phase.first_step}{late}:", highlight=False)
        for label, value in _step_lines(resolved, phase):
            console.print(f"{'  ' * (len(phases) > 1)}{label}: {value}", highlight=False)
    if uneven := uneven_pipeline(cfg, resolved.derived):
        console.print(f"note: {uneven}", highlight=False)
    for line in (*day_line(resolved, options.mfu), *memory_lines(resolved, found)):
        console.print(line, markup=False, highlight=False)
    longest = derived.phases.longest(steps)
    if resolved.sources["train.seq_len"] == "default" and cfg.model.max_seq_len > 8 * longest:
        text = f"train.seq_len is {cfg.train.seq_len} by default; model.max_seq_len is {cfg.model.max_seq_len}"
        console.print(f"note: {text}", highlight=False)


def _step_lines(resolved: Resolved, phase: Phase) -> Iterator[tuple[str, str]]:
    """Labels and values that describe a step of a phase."""
    plan, tokens = resolved.derived.plan_of(phase), phase.tokens
    flops = flops_per_token(resolved.config.model, phase.seq_len)
    yield "tokens per step", f"{tokens:,} ({phase.global_batch_size} sequences of {phase.seq_len})"
    if rope := {name: value for name, value in phase.rope.items() if name in phase.given}:
        yield "RoPE", ", ".join(f"{name} {value}" for name, value in rope.items())
    if "weights" in phase.given:
        yield "weights", ", ".join(f"{name} {weight:g}" for name, weight in phase.weights.items())
    yield "micro-batches per step and rank", f"{plan.microbatches} of {phase.micro_batch_size} sequences"
    bubble = f"bubble {simulate(plan).bubble:.1%} if F, I and W take the same time on all stages"
    yield "pipeline", f"{plan.name}, {bubble}"
    most = max(peak_memory(plan))
    kept = f"at most those of {most:g} micro-batch{'' if most == 1 else 'es'} of a stage"
    yield "activations in memory on a rank", kept
    yield "model FLOPs", f"{flops / 1e9:,.2f} GFLOP per token, {flops * tokens / 1e12:,.2f} TFLOP per step"


def _settings(resolved: Resolved, full: bool) -> Table:
    defaults = {f"{section}.{name}": field.default for section, name, field in fields()}
    table = Table(
        Column("setting", no_wrap=True),
        Column("value", overflow="fold"),
        Column("from", overflow="fold"),
        title="Config",
    )
    table.title_justify = "left"
    for path, source in resolved.sources.items():
        value = value_at(resolved.config, path)
        if source.startswith("file "):
            source = f"file {Path(source[5:]).name}"  # the whole path would not fit into the column
        if full or path not in defaults or value != defaults[path]:
            table.add_row(escape(path), escape(str(value)), escape(source), style="" if source != "default" else "dim")
    if not full:
        table.caption = "All other settings have their defaults; --full lists them."
        table.caption_justify = "left"
    return table


def _data_status(cfg: Config) -> Iterator[str]:
    """Lines that say whether the data and tokenizer files of the config exist."""
    prefixes = list(read_mixture(cfg.data.train).prefixes) if cfg.data.train else []
    if not prefixes:
        yield "data.train: not set; `engine prepare` writes a corpus"
    for name, prefix in [
        *(("data.train", p) for p in prefixes),
        *([("data.valid", cfg.data.valid)] * bool(cfg.data.valid)),
    ]:
        missing = [f"{prefix}{end}" for end in (".bin", ".idx") if not Path(f"{prefix}{end}").is_file()]
        yield f"{name}: {prefix}: {'found' if not missing else 'missing: ' + ' and '.join(missing)}"
    if cfg.data.valid and cfg.data.valid in prefixes:
        yield "note: data.valid is also a training corpus, so the validation loss says nothing about new text"
    if cfg.data.tokenizer:
        folder = Path(cfg.data.tokenizer)
        found = (folder / "tokenizer.json").is_file() or folder.is_file()
        yield f"data.tokenizer: {folder}: {'found' if found else 'missing'}"


def _groups(cfg: Config) -> Table:
    """What is trained how: one line for each row of optimizer.groups, or two if its vectors have no weight decay."""
    counts: dict[ParameterGroup, int] = {}
    for spec in parameter_specs(cfg.model):
        group = group_of(spec, cfg.optimizer)
        counts[group] = counts.get(group, 0) + sum(math.prod(chunk.shape) for chunk in spec.chunks)
    columns = (Column("group", no_wrap=True), "selects", "parameters", "peak learning rate", "weight decay", "rule")
    table = Table(*columns, title="Parameter groups")
    table.title_justify = "left"
    for group in sorted(counts, key=lambda g: (g.row or len(cfg.optimizer.groups) + 1, -g.weight_decay)):
        name, selects = "others", ""
        if group.row:
            row = cfg.optimizer.groups[group.row - 1]
            name, selects = f"groups.{group.row}", " ".join(filter(None, (row.names, row.role)))
        trained = (f"{cfg.optimizer.lr * group.lr_factor:g}", f"{group.weight_decay:g}", group.rule)
        table.add_row(name, escape(selects), f"{counts[group]:,}", *(("frozen", "", "") if group.frozen else trained))
    return table
