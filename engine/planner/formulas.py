"""How each term of the memory sheet is computed: its formula with the numbers of a run (`--explain TERM`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from engine.config.dtypes import DTYPE_BYTES, MAIN_DTYPE
from engine.config.schema import Config
from engine.planner.sheet import BATCH_BYTES, PREFETCH_BYTES, RankSheet

MIB = 2**20


def formula(term: str, cfg: Config, sheet: RankSheet) -> list[str]:
    """Lines that derive a term's bytes on the ranks of a sheet. term: in TERMS."""
    return list(_FORMULAS[term](cfg, sheet))


def _weights(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    state, size = sheet.states, DTYPE_BYTES[cfg.train.precision]
    yield "parameters of the rank's stages, padded in buckets, x bytes of train.precision"
    yield f"{state.elements + state.frozen:,} x {size}"


def _gradients(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    yield f"trainable parameters, padded in buckets, x bytes of {MAIN_DTYPE[cfg.train.precision]}"
    yield f"{sheet.states.elements:,} x {_main(cfg)}"


def _master(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    if DTYPE_BYTES[cfg.train.precision] == _main(cfg):
        yield f"0: with train.precision {cfg.train.precision} the weights are the master weights"
        return
    yield f"updated range x bytes of {MAIN_DTYPE[cfg.train.precision]}; {_range(cfg)}"
    yield f"{sheet.states.states(owned=False).get('master', 0):,} x {_main(cfg)}"


def _optimizer(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    kinds = sheet.states.states(owned=False)
    yield f"for each kind of state, updated range x bytes of {MAIN_DTYPE[cfg.train.precision]}; {_range(cfg)}"
    for kind, count in kinds.items():
        if kind != "master":
            yield f"{kind}: {count:,} x {_main(cfg)}"


def _activations(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    yield "for each stage, micro-batches between forward and backward x bytes saved by one (docs/training.md)"
    for number, stage in sheet.stages.items():
        yield (
            f"stage {number}: {sheet.peak.in_flight.get(number, 0)} x {stage.total / MIB:,.2f} MiB = "
            f"{_parts(sheet, number)}"
        )
    yield f"at the peak, {sheet.peak.where}: less what it has freed, more what it has saved"


def _parts(sheet: RankSheet, number: int) -> str:
    stage = sheet.stages[number]
    blocks = stage.saved[stage.first : len(stage.saved) - stage.last]
    texts = [f"embedding {stage.saved[0] / MIB:,.2f}"] * stage.first
    texts += [f"{len(blocks)} blocks {sum(blocks) / MIB:,.2f}"] * bool(blocks)
    texts += [f"head {stage.saved[-1] / MIB:,.2f}"] * stage.last + [f"RoPE {stage.shared / MIB:,.2f}"]
    texts += [f"output {stage.hidden / MIB:,.2f}"] * (not stage.last)
    return " + ".join(texts) + (f" - input {stage.hidden / MIB:,.2f}" if stage.local_input else "")


def _temporary(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    yield "the most that one part needs in addition to what it saves: gathered inputs, gradients, and with"
    yield "recomputation its activations again; 0 if the peak is not inside a block"
    for number, stage in sheet.stages.items():
        most = max(part.work_in(mode).backward for part, mode in zip(stage.parts, stage.modes)) / MIB
        yield f"stage {number}: at most {most:,.2f} MiB in a backward"


def _loss(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    yield "hidden states and their gradient, and a chunk of logits [rows, vocabulary / tensor] with its matmul;"
    yield "on a GPU a chunk has at most 4,096 rows, on a CPU 768; 0 if the peak is not in the head"
    for number, stage in sheet.stages.items():
        if stage.last:
            yield f"stage {number}: {stage.parts[-1].work_in('none').forward / MIB:,.2f} MiB, of which it saves a part"


def _messages(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    size = next(iter(sheet.stages.values())).hidden
    yield "hidden states received and not yet used, and gradients that are being sent, at the peak"
    yield f"{sheet.peak.terms.get('messages', 0) // max(1, size)} x {size / MIB:,.2f} MiB"


def _reductions(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    yield "results of reduce-scatters (parallel.zero) and copies in parallel.reduce_dtype, of the buckets whose"
    yield "sums have started before the peak; none with one data rank"
    for number, stage in sheet.stages.items():
        yield f"stage {number}: {(sum(stage.sums) + stage.late) / MIB:,.2f} MiB at the end of the backward"


def _batch(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    tokens = sheet.phase.tokens // cfg.parallel.data
    tables = sum(stage.shared for stage in sheet.stages.values())
    yield f"tokens of a step on this rank x {BATCH_BYTES} bytes + RoPE tables"
    yield f"{tokens:,} x {BATCH_BYTES} + {tables:,}"


def _staging(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    yield "host: what a rank writes (checkpoint), with checkpoint.async_save and checkpoint.every; else 0"
    yield f"{sheet.host['staging']:,}"


def _prefetch(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    tokens = sheet.phase.tokens // cfg.parallel.data
    yield f"host: (data.prefetch + 1) x tokens of a step on this rank x {PREFETCH_BYTES} bytes"
    yield f"{cfg.data.prefetch + 1} x {tokens:,} x {PREFETCH_BYTES}"


def _checkpoint(cfg: Config, sheet: RankSheet) -> Iterator[str]:
    kinds = sheet.states.states(owned=True)
    yield f"owned range (1 / data ranks) of the master weights and of each kind of state, x {_main(cfg)} bytes"
    yield " + ".join(f"{kind} {count:,} x {_main(cfg)}" for kind, count in kinds.items())


def _main(cfg: Config) -> int:
    return DTYPE_BYTES[MAIN_DTYPE[cfg.train.precision]]


def _range(cfg: Config) -> str:
    return "ZeRO-1: 1 / data ranks of each bucket" if cfg.parallel.zero else "without ZeRO: all of each bucket"


_FORMULAS: dict[str, Callable[[Config, RankSheet], Iterator[str]]] = {
    "weights": _weights,
    "gradients": _gradients,
    "master": _master,
    "optimizer": _optimizer,
    "activations": _activations,
    "temporary": _temporary,
    "loss": _loss,
    "messages": _messages,
    "reductions": _reductions,
    "batch": _batch,
    "staging": _staging,
    "prefetch": _prefetch,
    "checkpoint": _checkpoint,
}
