"""Draws docs/images/house.svg, the packages of engine/ and their imports: python tools/house_picture.py (tested).

A box is a package, or a named part of one (PARTS). An arrow is an import; one that other arrows imply is not drawn.
The row of a box follows from the imports: every import leads to a lower row, or stays within a row.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/images/house.svg"
Graph = dict[str, set[str]]  # box -> boxes that it imports

# Parts of packages that need no torch, or that other packages import: module prefixes -> box.
PARTS = {
    "distributed.layout": "layout",
    "distributed.board": "layout",
    "distributed.specs": "layout",
    "interop.huggingface.families": "families",
    "interop.huggingface.config_json": "families",
    "interop.huggingface.windows": "families",
    "model.layer_specs": "declarations",
    "model.declarations": "declarations",
    "model.build": "declarations",
    "optim.groups": "groups",
    "optim.update_rules": "groups",
    "parallel.partition": "groups",
    "ops.chunks": "layout",
    **{f"pipeline.{name}": "plans" for name in ("actions", "passes", "check", "schedules", "simulate", "shares")},
    **{
        f"pipeline.{name}": "plans" for name in ("list_schedules", "improve", "search", "timeline", "draw", "torch_csv")
    },
    "train.evaluate": "evaluate",
    "train.objective": "evaluate",
}
TEXTS = {
    "errors": "codes, exit codes",
    "util": "files, locks, signals",
    "layout": "rank grid, specs, no torch",
    "declarations": "weights, costs of a model",
    "groups": "parameter groups, buckets",
    "families": "Hugging Face tables",
    "plans": "schedules, check, search",
    "config": "settings and checks",
    "planner": "FLOPs, memory",
    "batch": "micro-batch, sequence",
    "part": "what a stage runs",
    "distributed": "axes, collectives, shards",
    "ops": "autograd and kernels",
    "data": "text to samples",
    "parallel": "gradient buckets",
    "model": "the Transformer",
    "pipeline": "stage, executor",
    "optim": "AdamW, clipping, lr",
    "checkpoint": "save, load, reshard",
    "interop": "Hugging Face, Megatron",
    "inference": "load, generate",
    "evaluate": "objective, validation",
    "monitor": "metrics, health, plots",
    "train": "setup, step, loop",
    "proof": "layout against one process",
    "cli": "the engine command",
}
CORE = {
    "errors",
    "layout",
    "plans",
    "declarations",
    "groups",
    "config",
    "batch",
    "part",
    "distributed",
    "ops",
    "parallel",
}
CORE |= {"model", "pipeline", "optim", "evaluate", "train"}  # as CORE of tests/test_house.py
WIDTH, HEIGHT, GAP, ROW = 168, 44, 24, 84


def box_of(module: str) -> str:
    """The box of a module (without "engine."); "" for those that only name others."""
    part = next((box for prefix, box in PARTS.items() if module == prefix), "")
    return part or ("" if module in ("", "__main__") else module.split(".")[0])


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix("__init__").strip(".")


def imports(root: Path = ROOT) -> Graph:
    """The boxes of engine/ with the boxes that they import, imports inside functions included."""
    paths = sorted((root / "engine").rglob("*.py"))
    names = {_module(path.relative_to(root / "engine")): path for path in paths}
    graph: Graph = {}
    for name, path in names.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in (f.removeprefix("engine.") for f in found if f.startswith("engine.")):
                while target and target not in names:
                    target = target.rpartition(".")[0]
                targets.add(box_of(target))
        if box := box_of(name):
            graph.setdefault(box, set()).update(targets - {box, ""})
    return graph


def below(graph: Graph, box: str) -> set[str]:
    """All boxes that a box imports, directly or through others."""
    seen: set[str] = set()
    todo = [box]
    while todo:
        for target in graph[todo.pop()] - seen:
            seen.add(target)
            todo.append(target)
    return seen


def rows_of(graph: Graph) -> list[list[str]]:
    """The boxes by row, the lowest first. Boxes that import each other share a row."""
    reach = {box: below(graph, box) for box in graph}
    row: dict[str, int] = {}

    def place(box: str) -> int:
        if box not in row:
            lower = [t for t in reach[box] if box not in reach[t]]
            row[box] = 1 + max((place(t) for t in lower), default=-1)
        return row[box]

    for box in graph:
        place(box)
    return [sorted(b for b in graph if row[b] == k) for k in range(max(row.values()) + 1)]


def arrows(graph: Graph) -> list[tuple[str, str]]:
    """The imports to a lower row that no chain of other imports implies."""
    reach = {box: below(graph, box) for box in graph}
    down = {a: {b for b in graph[a] if a not in reach[b]} for a in sorted(graph)}
    return [
        (a, b) for a in down for b in sorted(down[a]) if not any(b in reach[c] and c not in reach[b] for c in down[a])
    ]


@dataclass(eq=False)
class Node:
    """Boxes of one row that import each other, mostly one box; or none, where a long arrow passes. x: of its centre."""

    boxes: tuple[str, ...]
    x: float = 0.0

    @property
    def width(self) -> int:
        """In pixels, with the gap to the next node of the row."""
        return len(self.boxes) * (WIDTH + GAP) if self.boxes else GAP

    def centre(self, box: str) -> float:
        """The x of the centre of one of its boxes."""
        at = self.boxes.index(box) if self.boxes else 0
        return self.x + (at - (len(self.boxes) - 1) / 2) * (WIDTH + GAP) * bool(self.boxes)


Way = list[Node]  # the nodes that an arrow passes, its ends included, from the upper to the lower


def place(graph: Graph) -> tuple[list[list[Node]], list[tuple[str, str, Way]]]:
    """The nodes of each row from left to right, the lowest row first, and the way of every arrow."""
    reach = {box: below(graph, box) for box in graph}
    rows: list[list[Node]] = []
    home: dict[str, tuple[int, Node]] = {}
    for number, boxes in enumerate(rows_of(graph)):
        groups = sorted({tuple(b for b in boxes if b == a or (b in reach[a] and a in reach[b])) for a in boxes})
        rows.append([Node(_hub_in_the_middle(graph, group)) for group in groups])
        home |= {box: (number, node) for node in rows[-1] for box in node.boxes}
    ways = []
    for a, b in arrows(graph):
        (high, start), (low, end) = home[a], home[b]
        passed = [Node(()) for _ in range(low + 1, high)]
        for number, node in zip(range(high - 1, low, -1), passed):
            rows[number].append(node)
        ways.append((a, b, [start, *passed, end]))
    for _ in range(40):
        for row in (*rows, *reversed(rows)):
            _pull(row, ways)
    left = min(node.x - node.width / 2 for row in rows for node in row)
    for node in (node for row in rows for node in row):
        node.x -= left
    return rows, ways


def _hub_in_the_middle(graph: Graph, group: tuple[str, ...]) -> tuple[str, ...]:
    """The boxes of a group with the one that most of the others import in the middle."""
    hub = max(group, key=lambda box: sum(box in graph[other] for other in group))
    rest = [box for box in group if box != hub]
    return (*rest[: len(rest) // 2], hub, *rest[len(rest) // 2 :])


def _pull(row: list[Node], ways: list[tuple[str, str, Way]]) -> None:
    """Move every node of a row to the mean of its neighbours along arrows, then apart until none overlap."""
    wanted: dict[int, list[float]] = {}
    for a, b, way in ways:
        ends = {id(way[0]): a, id(way[-1]): b}
        for upper, lower in pairwise(way):
            for node, other in ((upper, lower), (lower, upper)):
                offset = node.centre(ends[id(node)]) - node.x if id(node) in ends else 0.0
                target = other.centre(ends[id(other)]) if id(other) in ends else other.x
                wanted.setdefault(id(node), []).append(target - offset)
    goal = {id(node): sum(xs) / len(xs) if (xs := wanted.get(id(node))) else node.x for node in row}
    row.sort(key=lambda node: goal[id(node)])
    edge = float("-inf")
    for node in row:
        node.x = max(goal[id(node)], edge + node.width / 2)
        edge = node.x + node.width / 2
    shift = sum(node.x - goal[id(node)] for node in row) / len(row)
    for node in row:
        node.x = round(node.x - shift, 1)


def svg(graph: Graph) -> str:
    """The picture of a graph."""
    rows, ways = place(graph)
    width = max(node.x + node.width / 2 for row in rows for node in row) + 2 * GAP
    height = ROW * len(rows) + 40

    def top(box_row: int) -> float:
        return ROW * (len(rows) - 1 - box_row) + 20

    row_of = {id(node): number for number, row in enumerate(rows) for node in row}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="sans-serif">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#5b6770"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height}" fill="#ffffff"/>',
        *(_frame(node, top(number)) for number, row in enumerate(rows) for node in row if len(node.boxes) > 1),
        '<g fill="none" stroke="#8a959d" stroke-width="1.3">',
    ]
    for a, b, way in ways:
        points = [(way[0].centre(a) + GAP, top(row_of[id(way[0])]) + HEIGHT)]
        for node in way[1:-1]:
            y = top(row_of[id(node)])
            points += [(node.x + GAP, y), (node.x + GAP, y + HEIGHT)]
        points.append((way[-1].centre(b) + GAP, top(row_of[id(way[-1])]) - 1))
        out.append(f'<path d="{_curve(points)}" marker-end="url(#head)"/>')
    out.append("</g>")
    for number, row in enumerate(rows):
        out += [line for node in row if node.boxes for line in _boxes(node, top(number))]
    out += _legend(height)
    return "\n".join([*out, "</svg>", ""])


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """Straight down through a row, and an S between two rows."""
    text = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for k, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        middle = (y0 + y1) / 2
        text += f"L{x1:.1f} {y1:.1f}" if k % 2 else f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    return text


def _frame(node: Node, top: float) -> str:
    left, width = node.x - node.width / 2 + GAP + GAP / 4, node.width - GAP / 2
    return (
        f'<rect x="{left:.1f}" y="{top - 7:.1f}" width="{width:.1f}" height="{HEIGHT + 14}" rx="9" '
        'fill="#f6f7f8" stroke="#8a959d" stroke-dasharray="4 3"/>'
    )


def _boxes(node: Node, top: float) -> list[str]:
    out = []
    for box in node.boxes:
        centre, fill = node.centre(box) + GAP, "#dcebf7" if box in CORE else "#f3efe4"
        out += [
            f'<rect x="{centre - WIDTH / 2:.1f}" y="{top:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" '
            'stroke="#4a5560"/>',
            f'<text x="{centre:.1f}" y="{top + 18:.1f}" text-anchor="middle" font-size="14" font-weight="bold">'
            f"{escape(box)}</text>",
            f'<text x="{centre:.1f}" y="{top + 35:.1f}" text-anchor="middle" font-size="11.5" fill="#39424a">'
            f"{escape(TEXTS[box])}</text>",
        ]
    return out


def _legend(height: int) -> list[str]:
    entries = (
        ("#dcebf7", "", "the core: a training step, from config to optimizer"),
        ("#f3efe4", "", "around it"),
        ("#f6f7f8", ' stroke-dasharray="4 3"', "these import each other"),
    )
    out, x = [], GAP
    for fill, dash, text in entries:
        out += [
            f'<rect x="{x}" y="{height - 26}" width="16" height="14" fill="{fill}" stroke="#4a5560"{dash}/>',
            f'<text x="{x + 22}" y="{height - 15}" font-size="12">{text}</text>',
        ]
        x += 50 + 7 * len(text)
    return out


if __name__ == "__main__":
    PICTURE.write_text(svg(imports()), encoding="utf-8")
    print(f"wrote {PICTURE}")
