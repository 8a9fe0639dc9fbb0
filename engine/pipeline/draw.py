"""Pictures of timelines: a row per rank, a box per computation, several schedules under each other on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.pipeline.actions import Op
from engine.pipeline.simulate import Timeline
from engine.util.glyphs import drawable

# Okabe-Ito palette, distinguishable with any colour vision; the texts are those of the legend.
_COLOURS = {
    Op.F: ("#56B4E9", "F  forward"),
    Op.B: ("#E69F00", "B  backward"),
    Op.I: ("#F0E442", "I  input gradient"),
    Op.W: ("#2BAF88", "W  weight gradient"),
}
_WIDTH = 13.0  # inches
_ROW = 0.34  # inches, height of a rank's row
_GAP = 0.5  # inches between two schedules, for the title of the second
_HEAD, _FOOT = 0.62, 0.5  # inches above the first row and below the last
_CHARACTER = 0.62  # width of a digit relative to the font size
_NUMBER_SIZES = (2.8, 8.5)  # points, smallest and largest font of microbatch numbers; smaller ones are not drawn


def draw(timelines: Sequence[tuple[str, Timeline]], output: Path, unit: str = "") -> None:
    """Draw (title, timeline) pairs to a PNG or SVG file, chosen by the suffix of its name.

    The first chunk of a rank is the palest. A box shows its microbatch number if that fits. unit: of the times, "" for
    none.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "engine", "font.size": 9}
    with matplotlib.rc_context(style), drawable([title for title, _ in timelines]) as label:
        heights = [_ROW * len(timeline.lanes) for _, timeline in timelines]
        height = _HEAD + sum(heights) + _GAP * (len(heights) - 1) + _FOOT
        most = max(len(lane) for _, timeline in timelines for lane in timeline.lanes)
        figure = plt.figure(figsize=(_WIDTH, height), dpi=110 if most <= 60 else 200)  # small numbers need more dots
        longest = max(timeline.time for _, timeline in timelines) or 1.0
        top, shared = height - _HEAD, None
        for (title, timeline), size in zip(timelines, heights):
            box = (0.65 / _WIDTH, (top - size) / height, (_WIDTH - 0.8) / _WIDTH, size / height)
            shared = axes = figure.add_axes(box, sharex=shared)
            _lanes(axes, timeline, longest, (_WIDTH - 0.8) / longest)
            axes.set_title(label(title), loc="left", fontsize=10, fontweight="bold", pad=4)
            axes.tick_params(labelbottom=False)
            top -= size + _GAP
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(f"time ({unit})" if unit else "time")
        _legend(figure, plt, timelines, height)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
        plt.close(figure)


def _lanes(axes: Any, timeline: Timeline, longest: float, inches: float) -> None:
    """Draw the boxes of all ranks. inches: width of one unit of time."""
    plan = timeline.plan
    begin = min((event.start for lane in timeline.lanes for event in lane), default=0.0)
    chunk_of = {stage: chunk for rank in range(plan.num_ranks) for chunk, stage in enumerate(plan.stages_of(rank))}
    chunks = plan.num_stages // plan.num_ranks
    digits = len(str(plan.microbatches - 1))  # one size of font for all boxes of a length
    for rank, lane in enumerate(timeline.lanes):
        spans = [(event.start - begin, event.end - event.start) for event in lane]
        shades = [_shade(event.action.op, chunk_of[event.action.stage], chunks) for event in lane]
        axes.broken_barh(spans, (rank - 0.46, 0.92), facecolors=shades, edgecolors="#333333", linewidth=0.4)
        for event, (start, length) in zip(lane, spans):
            size = min(_NUMBER_SIZES[1], 72 * length * inches * 0.92 / (_CHARACTER * digits))
            if size >= _NUMBER_SIZES[0]:
                number, middle = str(event.action.microbatch), start + length / 2
                axes.text(middle, rank, number, ha="center", va="center_baseline", fontsize=size)
    axes.set(ylim=(len(timeline.lanes) - 0.5, -0.5), xlim=(0, longest * 1.002))
    axes.set_yticks(range(len(timeline.lanes)), [f"rank {rank}" for rank in range(len(timeline.lanes))])
    axes.tick_params(left=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.axvline(timeline.time, color="#333333", lw=0.8, ls=(0, (3, 2)))


def _shade(op: Op, chunk: int, chunks: int) -> tuple[float, float, float]:
    """The colour of an operation: the full one for the only or last chunk of a rank, paler for earlier ones."""
    from matplotlib.colors import to_rgb

    white = 0.0 if chunks == 1 else 0.62 * (1 - chunk / (chunks - 1))
    red, green, blue = to_rgb(_COLOURS[op][0])
    return (red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white)


def _legend(figure: Any, plt: Any, timelines: Sequence[tuple[str, Timeline]], height: float) -> None:
    """Draw the legend of the colours and shades in use."""
    ops = {event.action.op for _, timeline in timelines for lane in timeline.lanes for event in lane}
    chunks = max(timeline.plan.num_stages // timeline.plan.num_ranks for _, timeline in timelines)
    entries = [(colour, text) for op, (colour, text) in _COLOURS.items() if op in ops]
    if chunks > 1:
        entries += [("#E4E4E4", "pale: first chunk of a rank"), ("#999999", "full: last chunk")]
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor="#333333", lw=0.4) for colour, _ in entries]
    handles.append(plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="#333333", lw=0.4))
    figure.legend(
        handles,
        [*(text for _, text in entries), "idle"],
        loc="upper left",
        bbox_to_anchor=(0.65 / _WIDTH, 1 - 0.02 / height),
        bbox_transform=figure.transFigure,
        borderaxespad=0.3,
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.6,
    )
