"""Draws docs/images/step.svg, the data flow of one optimizer step: python tools/step_picture.py (tested).

Every box names the file and the function that does it; a test looks that they are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/images/step.svg"
WIDTH, HEIGHT = 1186, 510
BOX = (212, 84)


@dataclass(frozen=True)
class Box:
    """A part of a step at its upper left corner (x, y). place: file below engine/ and a name in it."""

    title: str
    text: str
    place: tuple[str, str]
    x: int
    y: int
    fill: str


@dataclass(frozen=True)
class Arrow:
    """A way along points, with a text (lines divided by a bar) whose first line begins at `at`."""

    points: tuple[tuple[int, int], ...]
    text: str
    at: tuple[int, int]
    dashed: bool = False


FORWARD, BACKWARD, UPDATE = "#dcebf7", "#fbe3d0", "#dff0df"
BOXES = (
    Box("micro-batch", "tokens, labels, weights [b, s]", ("batch.py", "micro_batches"), 20, 60, FORWARD),
    Box("embedding", "[b, s] -> [s/t, b, h]", ("model/layers.py", "VocabEmbedding"), 330, 60, FORWARD),
    Box("blocks, stage by stage", "norm, attention, norm, MLP", ("model/transformer.py", "Block"), 640, 60, FORWARD),
    Box("head and loss", "chunk by chunk, no full logits", ("ops/loss.py", "linear_cross_entropy"), 940, 60, FORWARD),
    Box("input gradients", "B or I, stage by stage", ("pipeline/stage.py", "input_backward"), 640, 220, BACKWARD),
    Box("weight gradients", "added by the matmul itself", ("ops/linear.py", "WeightGrad"), 330, 220, BACKWARD),
    Box(
        "gradient buckets",
        "flat fp32, summed as they fill",
        ("parallel/gradients.py", "GradBuckets"),
        20,
        380,
        BACKWARD,
    ),
    Box("norm and clipping", "one float64 per tensor", ("optim/clip.py", "NormCounter"), 330, 380, UPDATE),
    Box("optimizer", "master weights, two moments", ("optim/optimizer.py", "Optimizer"), 640, 380, UPDATE),
    Box("weights", "flat, in the compute dtype", ("parallel/gradients.py", "wait_before_use"), 940, 380, UPDATE),
)
ARROWS = (
    Arrow(((232, 102), (330, 102)), "tokens", (258, 94)),
    Arrow(((542, 102), (640, 102)), "reduce-scatter|over tensor", (548, 80)),
    Arrow(((852, 102), (940, 102)), "last stage", (862, 94)),
    Arrow(((1046, 144), (1046, 262), (852, 262)), "the loss has weight 1/tokens,|so its gradient is 1", (862, 284)),
    Arrow(((790, 144), (790, 168), (690, 168), (690, 144)), "point-to-point to the next stage", (650, 184)),
    Arrow(((640, 262), (542, 262)), "at once (B)|or later (W)", (556, 240)),
    Arrow(((330, 262), (126, 262), (126, 380)), "over all micro-batches", (150, 254)),
    Arrow(((232, 422), (330, 422)), "reduce-scatter|over data", (238, 400)),
    Arrow(((542, 422), (640, 422)), "scale", (574, 414)),
    Arrow(((852, 422), (940, 422)), "owned range", (862, 414)),
    Arrow(
        ((1152, 422), (1170, 422), (1170, 18), (436, 18), (436, 60)),
        "all-gather over data (ZeRO-1), while the next forward already runs",
        (560, 36),
        True,
    ),
)


def svg() -> str:
    """The picture."""
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#39424a"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for arrow in ARROWS:
        way = "L".join(f"{x} {y}" for x, y in arrow.points)
        dash = ' stroke-dasharray="6 4"' if arrow.dashed else ""
        out.append(f'<path d="M{way}" fill="none" stroke="#39424a" stroke-width="1.5"{dash} marker-end="url(#head)"/>')
        out += [
            _text(arrow.at[0], arrow.at[1] + 14 * k, line, 12) for k, line in enumerate(arrow.text.split("|")) if line
        ]
    for box in BOXES:
        middle = box.x + BOX[0] // 2
        size = f'x="{box.x}" y="{box.y}" width="{BOX[0]}" height="{BOX[1]}"'
        out += [
            f'<rect {size} rx="6" fill="{box.fill}" stroke="#4a5560"/>',
            _text(middle, box.y + 24, box.title, 15, ' text-anchor="middle" font-weight="bold"'),
            _text(middle, box.y + 45, box.text, 12.5, ' text-anchor="middle"'),
            _text(middle, box.y + 68, f"{box.place[0]}: {box.place[1]}", 11, ' text-anchor="middle" fill="#5b6770"'),
        ]
    for x, fill, text in ((20, FORWARD, "forward"), (130, BACKWARD, "backward"), (250, UPDATE, "update")):
        out.append(f'<rect x="{x}" y="{HEIGHT - 24}" width="16" height="14" fill="{fill}" stroke="#4a5560"/>')
        out.append(_text(x + 22, HEIGHT - 12, text, 13))
    return "\n".join([*out, "</svg>", ""])


def _text(x: int, y: int, text: str, size: float, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}"{more}>{escape(text)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
    print(f"wrote {PICTURE}")
