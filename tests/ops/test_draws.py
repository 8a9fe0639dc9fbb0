"""Keyed draws: published vectors, places, the distribution of normals, dropout.

The kernels are compared bitwise with the reference. The oracles share no code with either: Philox in whole numbers of
Python, quantiles of the standard library, the error function of torch in float64.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from engine.batch import AttentionDropout, Documents, Draws, Sequence
from engine.data.samples.keyed import derive_key
from engine.errors import ConfigError
from engine.ops import draws, native
from engine.ops.attention import AttentionCase, select_implementation
from engine.ops.attention_cores import CORES
from engine.ops.draws import Key, Places, bits, dropout, keep, normal, rectangle, uniform
from tests.support import op_checks
from tests.support.cases import config
from tests.support.errors import raises
from tests.support.numbers import randn, relative

CPU = torch.device("cpu")
SOME = Key.of(5, "test", 3, "layers.1")


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's whole numbers, from the paper."""
    a, b, c, d = counter
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
        high0, low0 = divmod(0xD2511F53 * a, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
    return [a, b, c, d]


# counter, key, words: kat_vectors of Random123
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def signed(low: int, high: int) -> int:
    return int.from_bytes(low.to_bytes(4, "little") + high.to_bytes(4, "little"), "little", signed=True)


@pytest.mark.parametrize("vector", PUBLISHED)
def test_philox_has_the_published_vectors(vector: tuple[str, str, str]) -> None:
    counter, key, words = ([int(word, 16) for word in text.split()] for text in vector)
    assert philox(counter, key) == words
    found = draws._philox(torch.tensor([signed(*counter[:2])]), Key(signed(*key), signed(*counter[2:])))
    assert [int(x) for x in found] == words


def unsigned(found: Tensor) -> list[int]:
    return [int(x) % 2**32 for x in found.flatten()]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
def test_an_element_takes_its_word_of_its_counter(kernels: bool) -> None:
    """At the first places and at places above 2^32 and near 2^63."""
    key, stream = (SOME.key % 2**64, SOME.stream % 2**64)
    with native.forced(kernels=kernels):
        for start in (0, 7, 2**38 - 3, 2**63 - 200):
            found = unsigned(bits(SOME, Places(torch.tensor([start]), 150)))
            for place, word in enumerate(found, start):
                counter = place // 64 * 16 + place % 16
                halves = [counter % 2**32, counter >> 32, stream % 2**32, stream >> 32]
                assert word == philox(halves, [key % 2**32, key >> 32])[place // 16 % 4]
    with native.forced(kernels=kernels):
        first = unsigned(bits(Key(0, 0), Places(torch.tensor([0]), 64)))
    assert [f"{first[i]:08x}" for i in (0, 16, 32, 48)] == PUBLISHED[0][2].split()


def test_every_part_of_a_key_counts() -> None:
    seeds = [0, *(1 << bit for bit in range(63))]
    assert len({Key.of(seed, "init", 0, "w") for seed in seeds}) == 64
    assert len({derive_key(seed, "samples", 0) for seed in seeds}) == 64
    parts: list[tuple[Any, ...]] = [(1, "init", 2, "w"), (1, "dropout", 2, "w"), (1, "init", 3, "w"), (1, "init", 2)]
    found = [bits(Key.of(*part), Places(torch.tensor([0]), 1000)) for part in parts]
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert not (one == other).any(), "a match by chance has a probability of 1e-6"
    for first, second in ((1, "12"), (11, "2")), ((1, "2\x003"), (1, "2")):
        assert Key.of(first[0], str(first[1])) != Key.of(second[0], str(second[1]))
    assert config(1, train_seed=2**63 - 1).train.seed == 2**63 - 1
    with raises(ConfigError, "config.value-not-valid", "train.seed", 2**63):
        config(1, train_seed=2**63)


@op_checks.over_cases(op_checks.check_draws_have_the_bits_of_the_reference)
def test_draws_have_the_bits_of_the_reference(kind: str, shape: tuple[int, int]) -> None:
    op_checks.check_draws_have_the_bits_of_the_reference(kind, shape)


@op_checks.over_cases(op_checks.check_dropout_has_the_bits_of_the_reference)
def test_dropout_has_the_bits_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    op_checks.check_dropout_has_the_bits_of_the_reference(shape, dtype)


def test_threads_change_no_bit() -> None:
    places, before = Places(torch.arange(5) * 70_001 + 3, 70_000), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(normal(SOME, places))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_negative_place_is_an_error() -> None:
    if native.load()[0] is not None:
        with pytest.raises(ValueError, match=r"trident::draw: starts\[1\] is -1"):
            bits(SOME, Places(torch.tensor([0, -1]), 3))


@pytest.mark.parametrize("shape", [(300,), (7, 90), (3, 5, 70), (2, 3, 4, 33)], ids=str)
def test_a_rectangle_has_the_values_of_its_part_of_the_whole(shape: tuple[int, ...]) -> None:
    dims, chance = len(shape), random.Random(len(shape))
    whole = normal(SOME, rectangle(shape, (0,) * dims, shape, CPU)).view(shape)
    assert torch.equal(whole.flatten(), normal(SOME, Places(torch.tensor([0]), whole.numel()))[0])
    for _ in range(10):
        offset = tuple(chance.randrange(n) for n in shape)
        size = tuple(chance.randint(0 if d < dims - 1 else 1, n - o) for d, (n, o) in enumerate(zip(shape, offset)))
        part = normal(SOME, rectangle(shape, offset, size, CPU)).view(size)
        assert torch.equal(part, whole[tuple(slice(o, o + n) for o, n in zip(offset, size))])


def test_rows_are_drawn_in_parts() -> None:
    places = rectangle((9, 40), (1, 3), (7, 20), CPU)
    assert len(places) == 7
    assert torch.equal(torch.cat([normal(SOME, part) for part in places.split(3)]), normal(SOME, places))


# -- the distribution of normals


def quantile(words: Tensor) -> Tensor:
    """The normal quantile of (word + 1/2) / 2^32, word as a signed number, by the standard library."""
    low = (words + 2**31) % 2**32  # from the lowest quantile
    tail = torch.minimum(low, 2**32 - 1 - low)
    inverse = NormalDist().inv_cdf
    exact = torch.tensor([inverse((float(t) + 0.5) / 2**32) for t in tail.tolist()], dtype=torch.float64)
    return exact.where(low < 2**31, -exact)


def test_a_normal_value_is_the_quantile_of_its_word() -> None:
    gen = torch.Generator().manual_seed(0)
    words = torch.cat(
        [torch.randint(0, 2**32, (20_000,), generator=gen), torch.arange(300), 2**32 - 1 - torch.arange(300)]
    )
    extreme = 2**31 + torch.cat([torch.arange(-3000, 3000), torch.logspace(0, 30, 3000, base=2).long()])
    words = torch.cat([words, extreme % 2**32])
    found, exact = draws._normal(words), quantile(words)
    assert found.dtype == torch.float32 and float((found.double() / exact - 1).abs().max()) < 4e-7
    assert torch.equal(draws._normal(2**32 - 1 - words), -found)
    assert 6.33 < float(found.abs().max()) < 6.34
    order = words[((words + 2**31) % 2**32).argsort()].unique_consecutive()
    steps = draws._normal(order).double().diff()
    assert float((steps / draws._normal(order)[1:].double().abs()).min()) > -4e-7


def test_normals_are_normal() -> None:
    """Moments, the distance of Kolmogorov and Smirnov, tails, and no correlation of neighbours or of other keys."""
    n = 2_000_000
    x = normal(SOME, Places(torch.tensor([12345]), n))[0].double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        assert abs(float(x.pow(power).mean()) - expected) < 4 * (variance / n) ** 0.5, power
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    cdf = torch.special.ndtr(x.sort().values)
    distance = torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max()
    assert float(distance) * n**0.5 < 1.95, "a larger one has a probability of 0.001"
    for edge in (3.0, 4.0, 4.7):
        expected = n * 2 * NormalDist().cdf(-edge)
        assert abs(float((x.abs() > edge).sum()) - expected) < 4 * expected**0.5
    others = [x.roll(shift) for shift in (1, 2, 16, 48, 64, 4096)]
    others += [
        normal(Key.of(5, "test", step, name), Places(torch.tensor([12345]), n))[0].double()
        for step, name in ((4, "layers.1"), (3, "layers.2"))
    ]
    for other in others:
        for a, b in ((x, other), (x.square() - 1, other.square() - 1)):
            assert abs(float((a * b).mean() / (a.std() * b.std()))) < 4.5 / n**0.5


def test_uniforms_are_uniform() -> None:
    n = 1_000_000
    x = uniform(SOME, Places(torch.tensor([7]), n))[0].double()
    assert float(x.min()) >= 0 and float(x.max()) < 1 and torch.equal(x * 2**24, (x * 2**24).floor())
    counts = torch.histc(x, 100, 0, 1)
    assert float((counts - n / 100).square().sum() / (n / 100)) < 150  # chi-squared, 99 degrees of freedom


# -- dropout


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_dropout_keeps_and_scales(p: float) -> None:
    x, places = torch.full((500, 400), 3.0, dtype=torch.float64), rectangle((500, 400), (0, 0), (500, 400), CPU)
    y, n = dropout(x, SOME, places, p), 200_000
    assert set(y.unique().tolist()) <= {0.0, 3.0 / (1 - p), 3.0 * (1 / (1 - p))}
    assert abs(float((y == 0).sum()) - n * p) <= 4 * (n * p * (1 - p)) ** 0.5
    if p:
        assert torch.equal(y != 0, keep(SOME, places, p))
        rows, columns = (y == 0).double().mean(1), (y == 0).double().mean(0)
        assert rows.std() < 0.05 and columns.std() < 0.05


def test_dropout_of_a_larger_p_drops_more_of_the_same() -> None:
    places = rectangle((50, 400), (0, 0), (50, 400), CPU)
    kept = [keep(SOME, places, p) for p in (0.0, 0.1, 0.3, 0.9)]
    assert kept[0].all() and all((more | ~less).all() for more, less in pairwise(kept))


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
def test_the_gradient_of_dropout(kernels: bool) -> None:
    places = rectangle((10, 9), (2, 0), (6, 9), CPU)
    x = randn(2, 3, 9).requires_grad_()
    with native.forced(kernels=kernels):
        assert gradcheck(lambda x: dropout(x, SOME, places, 0.4), (x,))
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = dropout(x, SOME, places, 0.4)
    assert [t.shape for t in saved] == [(6,)], "no mask and no input is saved"
    assert torch.equal(y.detach()[y != 0], (x.detach() * (1 / 0.6))[y != 0])


# -- dropout of attention weights


def heads(seed: int, n: int, s: int, d: int = 6) -> Tensor:
    return randn(2, n, s, d, seed=seed)


def with_dropout(sequence: Sequence, p: float, heads: int, first: int = 0) -> Sequence:
    draws = Draws(3, 5, torch.tensor([7, 2]))
    return replace(sequence, draws=draws).with_dropout(AttentionDropout(p, "layers.1.weights", heads, first))


def test_attention_weights_are_dropped_after_the_softmax() -> None:
    """Against a softmax over an explicit mask, and a mask of the element's index (sample, head, query, key)."""
    n, m, s, p = 4, 2, 9, 0.3
    q, k, v = heads(0, n, s), heads(1, m, s), heads(2, m, s)
    starts = torch.tensor([[0, 0, 0, 3, 3, 5, 6, 6, 6], [0] * 9])
    plain = Sequence.of_rows(s, Documents.from_starts(starts))
    sequence = with_dropout(plain, p, n)
    key = Key.of(3, "dropout", 5, "layers.1.weights")
    whole = torch.stack([keep(key, Places(torch.tensor([x * n * s * s]), n * s * s), p).view(n, s, s) for x in (7, 2)])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(n // m, 1) for x in leaves[1:])
    seen = (torch.arange(s) >= starts[:, None, :, None]) & (torch.arange(s) <= torch.arange(s)[:, None])
    weights = (leaves[0] @ keys.transpose(2, 3) * 6**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    exact = ((weights * whole / (1 - p)) @ values).permute(2, 0, 1, 3).reshape(s, 2, -1)
    found = CORES["sdpa"](q, k, v, sequence)
    assert relative(found, exact) < 1e-14
    grad = randn(*exact.shape, seed=9)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(exact, leaves, grad)):
        assert relative(a, b) < 1e-13
    half = CORES["sdpa"](q[:, 2:], k[:, 1:], v[:, 1:], with_dropout(plain, p, n, 2))  # the second of two tensor ranks
    assert relative(half, found[..., 12:]) < 1e-14


def test_other_cores_refuse_to_drop_attention_weights() -> None:
    sequence = with_dropout(Sequence.of_rows(5), 0.1, 2)
    for name, core in CORES.items():
        if name not in ("own", "sdpa"):
            with raises(ConfigError, "ops.attention-cannot", "train.attention", name, "attention_dropout"):
                core(heads(0, 2, 5), heads(1, 2, 5), heads(2, 2, 5), sequence)
    case = AttentionCase("cuda", torch.bfloat16, 64, dropout=True, capability=(9, 0))
    assert select_implementation("auto", case) == "sdpa"
    assert select_implementation("auto", replace(case, device="cpu", dtype=torch.float32, custom=True)) == "own"
    with raises(ConfigError, "ops.attention-not-available", "flash"):
        select_implementation("flash", case)
    plain = Sequence.of_rows(5)
    assert plain.with_dropout(AttentionDropout(0.5, "x", 2, 0)) is plain, "no draws in validation"
