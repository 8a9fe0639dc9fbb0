"""The CUDA kernels, run by the emulator of tests/csrc/cuda_emulator, against torch in float64.

Sizes are random: zero rows, single values, widths that no pack divides, rows wider than the registers of a thread hold,
tensors with any alignment. Each call runs in two orders of its threads and blocks and must give the same bits; a
missing barrier shows there. Results of 16-bit types are compared with rounded results of the rounded inputs.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.ops import draws, native
from tests.csrc.emulated import ALL_CHECKED, CHECKED, ROOT, TYPES, Kernels, Memory, compile_emulated
from tests.support.numbers import relative

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
ALL_TYPES = pytest.mark.parametrize("dtype", TYPES, ids=str)
SEEDS = range(6)
WIDTHS = [1, 2, 7, 8, 16, 33, 64, 70, 120, 128, 200, 256, 512, 1000, 1023, 2048, 4100]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    if mutant := os.environ.get("TRIDENT_MUTANT"):
        return Kernels(Path(mutant))
    return Kernels(compile_emulated(flags=ALL_CHECKED if os.environ.get("TRIDENT_SANITIZED") else CHECKED))


class Trial:
    """One random call: `draw` and `pick` depend only on the seed; `run` executes the call in two orders."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype, seed: int):
        self.kernels, self.dtype, self.seed = kernels, dtype, seed
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.choice = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.memory = Memory()

    def pick(self, *options: int) -> int:
        return self.choice.choice(options)

    def rows_and_width(self, *widths: int) -> tuple[int, int]:
        """With the last two seeds, rows are wider than a team's registers hold for any type; one width has no packs."""
        if self.seed in SEEDS[-2:]:
            return 5, (9000, 4101)[SEEDS[-1] - self.seed]
        return self.pick(0, 1, 5, 40), self.pick(*widths)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)
        return self.memory.give(values, self.off())

    def off(self) -> int:
        """Mostly 0, because one misaligned tensor is enough to select the path without packs."""
        return self.pick(0, 0, 0, 0, 0, 0, 0, 1)

    def buffer(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.memory.take(shape, dtype or self.dtype, self.off())

    def run(self, name: str, *arguments: object, results: tuple[Tensor, ...]) -> None:
        before = [x.clone() for x in results]
        found = []
        for order in (0, 1):
            for x, was in zip(results, before):
                x.copy_(was)
            self.kernels.seed(2 * self.seed + order)
            self.kernels(name, TYPES[self.dtype], *arguments)
            found.append([x.clone() for x in results])
            self.memory.check(*results)
        for one, other in zip(*found):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), (
                "the result depends on the order of the threads"
            )

    def near(self, a: Tensor, exact: Tensor, times: float = 1.0) -> None:
        if exact.numel():
            tolerance = TOLERANCE[self.wide if a.dtype == self.wide else self.dtype]
            assert relative(a, exact.to(torch.float64), 1e-300 if exact.any() else 1.0) < times * tolerance


def optional(trial: Trial, x: Tensor) -> Tensor | None:
    return x if trial.pick(0, 1) else None


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@ALL_TYPES
@pytest.mark.parametrize("seed", SEEDS)
def test_rms_norm(kernels: Kernels, dtype: torch.dtype, seed: int) -> None:
    t = Trial(kernels, dtype, seed)
    rows, h = t.rows_and_width(*WIDTHS)
    x, w, offset = t.draw(rows, h), t.draw(h), float(t.pick(0, 1))
    residual = optional(t, t.draw(rows, h))
    total, y, scale = t.buffer(rows, h), t.buffer(rows, h), t.buffer(rows, dtype=t.wide)
    results = (y, scale) if residual is None else (total, y, scale)
    t.run("rms_norm", x, residual, total, w, y, scale, rows, h, 1e-5, offset, results=results)
    if residual is not None:
        assert torch.equal(total, x + residual)
    kept = x if residual is None else total
    exact = kept.double().requires_grad_()
    weight = w.double().requires_grad_()
    out = rms(exact, weight + offset, 1e-5)
    t.near(y, out)
    t.near(scale, torch.rsqrt(kept.double().square().mean(-1) + 1e-5))

    grad, more = t.draw(rows, h), optional(t, t.draw(rows, h))
    kept, scale = t.memory.give(kept), t.memory.give(scale)
    gx, gw = t.buffer(rows, h), t.buffer(h)
    t.run("rms_norm_backward", grad, more, kept, w, scale, gx, gw, rows, h, offset, results=(gx, gw))
    want_x, want_w = torch.autograd.grad(out, (exact, weight), grad.double())
    t.near(gx, want_x + (0 if more is None else more.double()))
    t.near(gw, want_w)


@ALL_TYPES
@pytest.mark.parametrize("seed", SEEDS)
def test_layer_norm(kernels: Kernels, dtype: torch.dtype, seed: int) -> None:
    t = Trial(kernels, dtype, seed)
    rows, h = t.rows_and_width(*WIDTHS[2:])  # the variance of a single value is 0
    x, w, b = t.memory.give(3 * t.draw(rows, h) + 5, t.off()), t.draw(h), t.draw(h)
    residual = optional(t, t.draw(rows, h))
    total, y, stats = t.buffer(rows, h), t.buffer(rows, h), t.buffer(2, rows, dtype=t.wide)
    results = (y, stats) if residual is None else (total, y, stats)
    t.run("layer_norm", x, residual, total, w, b, y, stats, rows, h, 1e-5, results=results)
    kept = x if residual is None else total
    exact, weight, bias = (z.double().requires_grad_() for z in (kept, w, b))
    out = torch.nn.functional.layer_norm(exact, (h,), weight, bias, 1e-5)
    t.near(y, out, 2)  # x has a mean of 5, whose subtraction cancels digits of float32
    t.near(stats[0], kept.double().mean(-1))
    t.near(stats[1], torch.rsqrt((kept.double() - kept.double().mean(-1, keepdim=True)).square().mean(-1) + 1e-5))

    grad, more = t.draw(rows, h), optional(t, t.draw(rows, h))
    kept, stats = t.memory.give(kept), t.memory.give(stats)
    gx, gw, gb = t.buffer(rows, h), t.buffer(h), t.buffer(h)
    t.run("layer_norm_backward", grad, more, kept, w, stats, gx, gw, gb, rows, h, results=(gx, gw, gb))
    expected_values = torch.autograd.grad(out, (exact, weight, bias), grad.double())
    t.near(gx, expected_values[0] + (0 if more is None else more.double()), 4 if h > 2 else 100)
    t.near(gw, expected_values[1], 2)
    t.near(gb, expected_values[2])


@ALL_TYPES
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["silu", "gelu", "gelu_tanh"])
def test_gated(kernels: Kernels, dtype: torch.dtype, kind: int, seed: int) -> None:
    t = Trial(kernels, dtype, seed)
    rows, f = t.pick(0, 1, 9, 70), t.pick(*WIDTHS)
    fused, grad = t.memory.give(3 * t.draw(rows, 2 * f), t.off()), t.draw(rows, f)
    y, gfused = t.buffer(rows, f), t.buffer(rows, 2 * f)
    t.run("gated", fused, y, kind, rows, f, results=(y,))
    t.run("gated_backward", grad, fused, gfused, kind, rows, f, results=(gfused,))
    gelu = torch.nn.functional.gelu
    act = [torch.nn.functional.silu, gelu, functools.partial(gelu, approximate="tanh")][kind]
    exact = fused.double().requires_grad_()
    out = act(exact[:, :f]) * exact[:, f:]
    t.near(y, out)
    t.near(gfused, torch.autograd.grad(out, exact, grad.double())[0])


@ALL_TYPES
@pytest.mark.parametrize("seed", range(12))
def test_rope(kernels: Kernels, dtype: torch.dtype, seed: int) -> None:
    """Forward and backward; heads in the layout of attention or of the projection; any part of a head rotated."""
    t = Trial(kernels, dtype, seed)
    s, b, m, d = t.pick(0, 1, 5, 9), t.pick(1, 2), t.pick(1, 2), t.pick(1, 2, 5, 16, 24, 64, 128)
    n = m * t.pick(1, 3)
    r = 2 * t.pick(0, d // 2, d // 2, d // 2, d // 4)
    fused, table = t.draw(s, b, (n + 2 * m) * d), t.draw(2, s, r // 2)
    by_head = t.pick(0, 1)
    sizes = [(b, heads, s, d) if by_head else (s, b, heads, d) for heads in (n, m, m)]
    buffers = [t.buffer(*size) for size in sizes]
    views = [x if by_head else x.permute(1, 2, 0, 3) for x in buffers]
    strides = [x.stride(i) for x in views for i in range(3)]
    shape = [s, b, n, m, d, r]
    t.run("rope", fused, table[0], table[1], *buffers, strides, shape, False, results=tuple(buffers))
    heads = fused.double().view(s, b, n + 2 * m, d).permute(1, 2, 0, 3)
    cos, sin = table.double()
    low, high, rest = heads.split([r // 2, r // 2, d - r], dim=-1)
    turned = torch.cat([low * cos - high * sin, high * cos + low * sin, rest], -1)
    q, k, v = views
    t.near(q, turned[:, :n])
    t.near(k, turned[:, n : n + m])
    assert torch.equal(v.double(), heads[:, n + m :])

    given = [t.memory.give(x, t.off()) for x in buffers]
    back = t.buffer(s, b, (n + 2 * m) * d)
    t.run("rope", back, table[0], table[1], *given, strides, shape, True, results=(back,))
    x = torch.cat([(g if by_head else g.permute(1, 2, 0, 3)).double() for g in given], 1)
    low, high, rest = x[:, : n + m].split([r // 2, r // 2, d - r], dim=-1)
    exact = torch.cat([torch.cat([low * cos + high * sin, high * cos - low * sin, rest], -1), x[:, n + m :]], 1)
    t.near(back, exact.permute(2, 0, 1, 3).reshape(back.shape))


@ALL_TYPES
@pytest.mark.parametrize("seed", range(12))
def test_softmax(kernels: Kernels, dtype: torch.dtype, seed: int) -> None:
    """Padding columns, targets of other ranks, huge logits, minus infinity, and no valid column at all."""
    t = Trial(kernels, dtype, seed)
    rows, v = t.pick(0, 1, 7, 50), t.pick(*WIDTHS, 20_003)
    if v > 2000:
        rows = min(rows, 7)
    valid = t.pick(v, v, v - 1, v // 2, 0)
    logits = 3 * t.draw(rows, v)
    logits[1:3] += 1000
    logits[4:6, v // 3 :] = -torch.inf
    target = torch.randint(-2, v + 2, (rows,), generator=t.generator)
    given, stats = t.memory.give(logits, t.off()), t.buffer(3, rows, dtype=t.wide)
    t.run("softmax_stats", given, target, stats, rows, v, valid, results=(stats,))
    exact = logits.double()[:, :valid]
    inside = (target >= 0) & (target < valid)
    at = target.where(inside, torch.zeros_like(target))[:, None]
    if valid:
        peak = exact.amax(-1)
        assert torch.equal(stats[0].double(), peak)
        shift = peak.where(peak > -torch.inf, torch.zeros_like(peak))
        t.near(stats[1], (exact - shift[:, None]).exp().sum(-1))
        assert torch.equal(stats[2].double(), exact.gather(1, at)[:, 0].where(inside, torch.zeros_like(peak)))
    else:
        assert bool((stats[0] == -torch.inf).all()) and not stats[1:].any()
    in_place = t.memory.lend(logits, t.off())
    peak = t.memory.give(stats[0].where(stats[0] > -torch.inf, torch.zeros_like(stats[0])))
    scale, grad = t.draw(rows, dtype=t.wide), t.draw(rows, dtype=t.wide)
    t.run("softmax_gradient", in_place, target, peak, scale, grad, rows, v, valid, results=(in_place,))
    expected_values = torch.zeros(rows, v, dtype=torch.float64)
    expected_values[:, :valid] = (exact - peak.double()[:, None]).exp() * scale.double()[:, None]
    if valid:
        expected_values.scatter_add_(1, at, torch.where(inside, -grad, 0).double()[:, None])
    t.near(in_place, expected_values)
    assert not in_place[:, valid:].any()


@pytest.mark.parametrize("values", TYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 6, 1000, 10_001])
def test_adamw(kernels: Kernels, values: torch.dtype, n: int) -> None:
    """Two steps against torch's AdamW; for wide types, master weights only."""
    t = Trial(kernels, values, n)
    p = t.draw(n, dtype=t.wide).double().clone().requires_grad_()
    theirs = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    flats = [t.memory.lend(x, t.off()) for x in (p.detach().to(t.wide), *torch.zeros(2, n, dtype=t.wide))]
    low = None if values == t.wide else t.buffer(n)
    for step in (1, 2):
        grad = t.draw(n, dtype=t.wide)
        p.grad = grad.double() * 0.25
        theirs.step()
        results = tuple(flats if low is None else [*flats, low])
        master, first, second = flats
        how = [1e-2, 0.9, 0.95, 1e-8, 0.1, 0.25]
        t.run("adamw", master, grad, first, second, low, n, how, step, results=results)
        t.near(master, p.detach())
        assert low is None or torch.equal(low, master.to(values))


@ALL_TYPES
@pytest.mark.parametrize("seed", range(3))
def test_sum_squares(kernels: Kernels, dtype: torch.dtype, seed: int) -> None:
    """Ranges of any alignment, empty and overlapping ones; an invalid range gives NaN and reads nothing."""
    t = Trial(kernels, dtype, seed)
    n = t.pick(5, 3000, 40_000)
    flat = t.draw(n)
    cuts = [sorted((t.choice.randint(0, n), t.choice.randint(0, n))) for _ in range(2)]
    ranges = [[0, n], [3, 3], [1, 2], *cuts, [-1, 2], [2, n + 1], [2, 1]]
    bounds = t.memory.give(torch.tensor(ranges))
    out = t.buffer(len(ranges), dtype=torch.float64)
    t.run("sum_squares", flat, n, bounds, out, len(ranges), results=(out,))
    for (begin, end), found in zip(ranges[:-3], out):
        exact = flat[begin:end].double().square().sum()
        assert abs(found - exact) <= 1e-14 * exact
    assert bool(out[-3:].isnan().all())


def test_a_range_longer_than_one_round(kernels: Kernels) -> None:
    """So long that every thread executes its loop twice."""
    t = Trial(kernels, torch.float32, 1)
    n = 4 * 512 * 256 * 4 + 100_000  # packs ahead, shares, threads, values
    flat, out = t.draw(n), t.buffer(1, dtype=torch.float64)
    t.run("sum_squares", flat, n, t.memory.give(torch.tensor([[0, n]])), out, 1, results=(out,))
    exact = flat.double().square().sum()
    assert abs(out[0] - exact) <= 1e-12 * exact


def test_no_ranges(kernels: Kernels) -> None:
    nothing = torch.empty(0)
    kernels("sum_squares", 0, nothing, 0, nothing.long(), nothing.double(), 0)


def test_a_row_has_the_same_bits_alone(kernels: Kernels) -> None:
    """A row has the same bits alone and on a device of another size: the order of its sum depends only on its width."""
    t = Trial(kernels, torch.float32, 1)
    x, w = t.draw(9, 400), t.draw(400)
    found = []
    for rows, processors in ((x, 3), (x[4:5], 1)):
        y, scale = torch.empty_like(rows), torch.empty(len(rows))
        kernels.seed(1, processors)
        kernels("rms_norm", 0, rows, None, None, w, y, scale, len(rows), 400, 1e-5, 0.0)
        found.append(y)
    assert torch.equal(found[0][4:5], found[1])


@pytest.mark.parametrize("kind", range(4), ids=["bits", "uniform", "normal", "keep"])
@pytest.mark.parametrize(("rows", "n"), [(0, 64), (7, 1), (7, 63), (3, 64), (7, 200), (1, 70_000)])
def test_draw(kernels: Kernels, kind: int, rows: int, n: int) -> None:
    """The bits of the reference: rows of any alignment, longer than all threads take at once, at places above 2^32."""
    t = Trial(kernels, torch.float32, n)
    starts = t.memory.give(torch.randint(0, t.pick(200, 2**62), (rows,), generator=t.generator))
    key, threshold = draws.Key.of(n, "test"), draws._threshold(0.3)
    with native.forced(kernels=False):
        exact = draws._draw(key, draws.Places(starts, n), kind, threshold)
    # guards are compared in words of 32 bits
    out = t.memory.take((rows, n), torch.float32) if kind in (1, 2) else torch.full((rows, n), 1, dtype=exact.dtype)
    t.run("draw", starts, rows, n, [key.key, key.stream], kind, threshold, out, results=(out,))
    assert torch.equal(out, exact)


@ALL_TYPES
@pytest.mark.parametrize("seed", range(3))
def test_dropout(kernels: Kernels, dtype: torch.dtype, seed: int) -> None:
    t = Trial(kernels, dtype, seed)
    rows, n = t.pick(0, 3, 40), t.pick(1, 70, 128, 1000)
    x, y = t.draw(rows, n), t.buffer(rows, n)
    starts = t.memory.give(torch.randint(0, 2**40, (rows,), generator=t.generator))
    key, threshold = draws.Key.of(seed, "test"), draws._threshold(0.3)
    t.run("dropout", x, starts, rows, n, [key.key, key.stream], threshold, 1 / 0.7, y, results=(y,))
    with native.forced(kernels=False):
        assert torch.equal(y, draws._dropped(x, starts, key, 0.3))


# -- faults that the emulator finds -----------------------------------------------------------------------------------

SOUND: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "no barrier before reading": (0, lambda i: i.flip(0)),
    "no barrier before writing again": (1, lambda i: 1000 + 2 * i.flip(0)),
    "no barrier in a warp": (2, lambda i: i.view(-1, 2).flip(1).reshape(-1)),
    "a shuffle half joined": (3, lambda i: i.view(-1, 2).flip(1).reshape(-1)),
    "a barrier not reached": (4, lambda i: i),
    "beyond shared memory": (5, lambda i: 0 * i + 1),
    "another block's shared memory": (6, lambda i: 0 * i + 1),
}
MESSAGES = {3: "that not all lanes of its mask join", 4: "others of its block have returned", 5: "384 were asked for"}


@pytest.mark.parametrize("name", SOUND)
def test_the_emulator_reports_faulty_kernels_only(kernels: Kernels, name: str) -> None:
    number, expected = SOUND[name]
    expected_values = expected(torch.arange(96.0))
    wrong = 0
    for seed in range(10):
        kernels.seed(seed)
        out = torch.zeros(96)
        kernels("run_fault", number, out, True)
        assert torch.equal(out, expected_values)
        out.zero_()
        if number in MESSAGES:
            with pytest.raises(RuntimeError, match=MESSAGES[number]):
                kernels("run_fault", number, out, False)
            wrong += 1
        else:
            kernels("run_fault", number, out, False)
            wrong += not torch.equal(out, expected_values)
    assert wrong >= 9


# -- faults planted in the kernels, which these tests must find -------------------------------------------------------

FAULTS: dict[str, tuple[str, str, str, str]] = {
    "a team's sum read too soon": (
        "device.h",
        "    __syncthreads();\n    x = parts[0];",
        "    x = parts[0];",
        "rms_norm",
    ),
    "a team's sum overwritten": (
        "device.h",
        "    __syncthreads();  // earlier values have been read\n",
        "",
        "layer_norm",
    ),
    "half of a warp": ("device.h", "(team < 32 ? team : 32) / 2;", "(team < 32 ? team : 32) / 4;", "rms_norm"),
    "column sums read too soon": (
        "norm.cu",
        "    __syncthreads();\n    if (threadIdx.y",
        "    if (threadIdx.y",
        "rms_norm",
    ),
    "a pack too many": ("norm.cu", "(mine[k] = i < packs)", "(mine[k] = i <= packs)", "rms_norm"),
    "wide rows cut": (
        "norm.cu",
        "rest = threadIdx.x + KEEP * team",
        "rest = threadIdx.x + 3 * team",
        "layer_norm",
    ),
    "rows beyond the grid": (
        "norm.cu",
        "first += int64_t(gridDim.x) * blockDim.y",
        "first += int64_t(gridDim.x) * 64 * blockDim.y",
        "rms_norm",
    ),
    "misaligned packs": ("device.h", "% 16 == 0) && ...)", "% 16 < 16) && ...)", "gated"),
    "parts of another's": ("norm.cu", "parts_w + teams * a.h", "parts_w + (teams - 1) * a.h", "layer_norm"),
    "turned the other way": ("model.cu", "BACK ? -wide(sin", "!BACK ? -wide(sin", "rope"),
    "v turned too": ("model.cu", "if (!in_v)", "if (true)", "rope"),
    "the rest of a head": ("model.cu", "const int64_t i = x.r + (slot", "const int64_t i = half + (slot", "rope"),
    "sums of different peaks": ("model.cu", "sum : sum * soft_exp(peak - top)", "sum : sum", "softmax"),
    "the row's head": ("model.cu", "head = off ? FULL<T> - off : 0", "head = 0", "softmax"),
    "padding": ("model.cu", "begin + j >= valid ? W(0)", "begin + j > valid ? W(0)", "softmax"),
    "the tail of a flat": ("optim.cu", "if (i < a.n - packs * N) update", "if (false) update", "adamw"),
    "no decay": ("optim.cu", "p.at[j] * f.decay", "p.at[j]", "adamw"),
    "both ends of a range": ("optim.cu", "if (tail + threadIdx.x < count)", "if (false)", "sum_squares"),
    "a word of another lane": (
        "draws.cu",
        "uint64_t(w * LANES) + lane - start",
        "uint64_t(w + lane * WORDS) - start",
        "draw",
    ),
    "a group too few": ("draws.cu", "(n + 2 * (GROUP - 1)) / GROUP", "(n + GROUP - 1) / GROUP", "draw"),
    "the next row": ("draws.cu", "0 <= at && at < x.n", "0 <= at && at <= x.n", "dropout"),
    "a range twice": ("optim.cu", "i += AHEAD * step", "i += step", "a_range"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str, tmp_path: Path) -> None:
    file, old, new, op = FAULTS[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (tmp_path / "csrc/kernels/cuda" / file).read_text()
    assert old in text
    (tmp_path / "csrc/kernels/cuda" / file).write_text(text.replace(old, new))
    mutant = compile_emulated(tmp_path / "csrc", ["-fsanitize=alignment", "-fno-sanitize-recover=all"], tmp_path)
    # in a separate process, because a wrong bound may end it
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", f"test_{op} and not float64"]
    environment = os.environ | {"TRIDENT_MUTANT": str(mutant)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0, done.stdout


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_under_the_sanitizers() -> None:
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TRIDENT_SANITIZED": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        __file__,
        "-m",
        "not heavy",
        "-k",
        "not faulty and not faults",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
