"""Plots: the loss curves of runs, and the document lengths of a corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.errors import DataError, truncate
from engine.monitor.metrics import read_metrics
from engine.util.glyphs import drawable


def plot_loss(runs: Sequence[Path], output: Path) -> list[str]:
    """Draw training loss (line) and validation loss (dots) of each run over steps, in nats per token; returns notes.

    The unigram entropy of the validation corpus, if known, is a dashed line: a model below it uses context.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = distinct_names(runs)
    with drawable(names) as label:
        figure, axes = plt.subplots(figsize=(8, 4.5), dpi=130)
        drawn: set[float] = set()
        notes: list[str] = []
        for number, (run, name) in enumerate(zip(runs, map(label, names))):
            try:
                training, validation, torn = read_metrics(run)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(
                    "monitor.metrics-unreadable", f"{run}: no readable metrics.jsonl ({error}); give a run folder"
                ) from None
            notes += [f"{run}: the last line of metrics.jsonl is incomplete and was skipped"] if torn else []
            colour = f"C{number}"
            steps = sorted(training)
            axes.plot(steps, [training[s]["loss"] for s in steps], color=colour, lw=1.2, label=f"{name}: training")
            if validation:
                at = sorted(validation)
                values = [validation[s]["val_loss"] for s in at]
                axes.plot(
                    at, values, "o", color=colour, mec="black", ms=6, label=f"{name}: validation {values[-1]:.3f}"
                )
                unigram = validation[at[-1]].get("val_unigram")
                if unigram is not None and unigram not in drawn:
                    drawn.add(unigram)
                    axes.axhline(unigram, color="grey", ls="--", lw=1, label=f"unigram entropy {unigram:.3f}")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.tight_layout()
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
        plt.close(figure)
    return notes


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """A name for each run: as many last parts of its path as make all names distinct."""
    paths = [run.absolute().parts for run in runs]
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(run) for run in runs]


def plot_lengths(
    edges: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    marks: Mapping[str, float],
    name: str,
    output: Path,
) -> None:
    """Draw a histogram of document lengths: shares of documents and of tokens in classes edges[i] .. edges[i + 1] - 1.

    Empty classes before the first and after the last document are omitted; an empty one in between is labelled "none".
    marks: lengths to mark by a line, such as {"median": 120}.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    filled = np.flatnonzero(documents)
    shown = range(int(filled[0]), int(filled[-1]) + 1)
    places = np.array(shown)
    name = truncate(name, 60)
    with drawable([name]) as label:
        figure, axes = plt.subplots(figsize=(8, 4.5), dpi=130)
        axes.bar(places - 0.2, documents[places] / documents.sum(), 0.4, label="of the documents")
        axes.bar(places + 0.2, tokens[places] / max(1, tokens.sum()), 0.4, label="of the tokens")
        for place in (place for place in shown if not documents[place]):
            axes.text(place, 0, "none", ha="center", va="bottom", fontsize=7, color="grey")
        for (mark, length), style in zip(marks.items(), ("-", "--", ":", "-.")):
            at = length_position(edges, length)
            figures = f"{length:,}" if isinstance(length, int) else f"{length:,.1f}"
            axes.axvline(at, color="black", lw=1.2, ls=style, label=f"{mark}: {figures} tokens")
        labels = [str(a) if b - a == 1 else f"{a:,}-{b - 1:,}" for a, b in zip(edges.tolist(), edges[1:].tolist())]
        axes.set_xticks(places, [labels[place] for place in shown], rotation=45, ha="right", fontsize=7)
        axes.set(xlim=(shown[0] - 0.6, shown[-1] + 0.6))
        axes.set(xlabel="tokens of a document", ylabel="share", title=f"Lengths of documents: {label(name)}")
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")
        figure.tight_layout()
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
        plt.close(figure)


def length_position(edges: npt.NDArray[np.int64], length: float) -> float:
    """Position of a length on an axis of classes: class k spans k - 0.5 to k + 0.5, its lengths evenly spaced."""
    k = int(np.searchsorted(edges, length, side="right")) - 1
    return float(k - 0.5 + (length + 0.5 - edges[k]) / (edges[k + 1] - edges[k]))
