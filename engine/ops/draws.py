"""Keyed draws: random numbers as a pure function of (seed, purpose, step, name) and the place of an element.

Goal: the same bits for an element of a global tensor in every layout, at every recomputation, after a resume, on every
device. So no generator has a state: Philox4x32-10 (Salmon et al. 2011) maps a key and a counter to four words, the key
comes from (seed, purpose, step, name), and the counter from the element's *place*, its row-major index in the canonical
global tensor. Element i takes word i // 16 % 4 of counter i // 64 * 16 + i % 16. A rank passes the places of the
elements that it holds and gets exactly their values.

A normal value is the quantile of one 32-bit word, computed by float32 operations that IEEE 754 rounds exactly, so that
processors and GPUs agree in all bits; libm's log and cos do not. The kernels: csrc/kernels/draws.h. If this file and
the kernels differ in one operation, a run continues with other values on other machines.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.ops.native import kernels, kernels_on

GENERATOR = "philox4x32-10/1"  # written into checkpoints; the number counts changes of the bits
_BITS, _UNIFORM, _NORMAL, _KEEP = range(4)  # the numbers in csrc/kernels/kernels.h
_MASK = 0xFFFFFFFF
_LANES, _GROUP = 16, 64
_SLAB = 1 << 18  # elements that the reference draws at a time


@dataclass(frozen=True)
class Key:
    """Which draws: `key` is Philox's key, `stream` the upper half of its counter; 64 bits each, signed as in torch."""

    key: int
    stream: int

    @staticmethod
    def of(seed: int, purpose: str, step: int = 0, name: str = "") -> Key:
        """The key of a run's seed (all of its bits), a purpose, a step, and the name of a tensor or layer."""
        digest = hashlib.blake2b(f"{seed}\0{purpose}\0{step}\0{name}".encode(), digest_size=16).digest()
        return Key(*(int.from_bytes(half, "little", signed=True) for half in (digest[:8], digest[8:])))


@dataclass(frozen=True, eq=False)
class Places:
    """The places of rows of elements. starts: int64 [rows], each row's first place, not negative; width: its length."""

    starts: Tensor
    width: int

    def __len__(self) -> int:
        return self.starts.numel()

    def split(self, rows: int) -> Iterator[Places]:
        """The same rows, at most `rows` at a time."""
        return (Places(starts, self.width) for starts in self.starts.split(rows))


def rectangle(
    global_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], device: torch.device
) -> Places:
    """The places of a rectangle of a tensor of `global_shape`, any number of dims: rows along its last dim."""
    starts, stride = torch.zeros(1, dtype=torch.int64, device=device), 1
    for dim in reversed(range(len(shape) - 1)):
        stride *= global_shape[dim + 1]
        index = torch.arange(offset[dim], offset[dim] + shape[dim], dtype=torch.int64, device=device) * stride
        starts = (index[:, None] + starts).flatten()
    return Places(starts + offset[-1], shape[-1]) if shape else Places(starts, 1)


def bits(key: Key, places: Places) -> Tensor:
    """32 uniform bits for each element, as int32 [rows, width]."""
    return _draw(key, places, _BITS, 0)


def uniform(key: Key, places: Places) -> Tensor:
    """Uniform multiples of 2^-24 in [0, 1), float32 [rows, width]."""
    return _draw(key, places, _UNIFORM, 0)


def normal(key: Key, places: Places) -> Tensor:
    """Standard normal values, float32 [rows, width], of magnitude at most 6.34."""
    return _draw(key, places, _NORMAL, 0)


def keep(key: Key, places: Places, p: float) -> Tensor:
    """A dropout mask, bool [rows, width]: False with probability p, in [0, 1)."""
    return _draw(key, places, _KEEP, _threshold(p))


class _Dropout(torch.autograd.Function):
    """The backward draws the mask of the forward again: neither a mask nor the state of a generator is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, starts: Tensor, key: Key, p: float) -> Tensor:
        ctx.save_for_backward(starts)
        ctx.key, ctx.p = key, p
        return _dropped(x, starts, key, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (starts,) = ctx.saved_tensors
        return _dropped(grad, starts, ctx.key, ctx.p), None, None, None


def dropout(x: Tensor, key: Key, places: Places, p: float) -> Tensor:
    """Zeros with probability p, else x / (1 - p); x [..., width] with one row of `places` per row of x, in order."""
    return _Dropout.apply(x, places.starts, key, p) if p else x


def dropout_arguments(key: Key, p: float) -> tuple[int, int, int, float]:
    """The arguments of kernels with dropout: key, stream, threshold, and the factor of elements that are kept."""
    return key.key, key.stream, _threshold(p), 1 / (1 - p)


def _dropped(x: Tensor, starts: Tensor, key: Key, p: float) -> Tensor:
    rows, arguments = x.reshape(-1, x.shape[-1]), dropout_arguments(key, p)
    if custom := kernels(x):
        return custom.dropout(rows.contiguous(), starts, *arguments).view(x.shape)
    mask, scale = keep(key, Places(starts, x.shape[-1]), p), arguments[-1]
    return torch.where(mask, rows * scale, rows.new_zeros(())).view(x.shape)


def _threshold(p: float) -> int:
    """The smallest word that keeps an element."""
    return int(p * 2**32)


def _draw(key: Key, places: Places, kind: int, threshold: int) -> Tensor:
    if custom := kernels_on(places.starts.device):
        return custom.draw(places.starts, places.width, key.key, key.stream, kind, threshold)
    return _reference(key, places, kind, threshold)


# -- the reference, of torch's integer and float32 operations


def _reference(key: Key, places: Places, kind: int, threshold: int) -> Tensor:
    """_draw in slabs, because the words take 8 bytes each and several copies."""
    dtype = (torch.int32, torch.float32, torch.float32, torch.bool)[kind]
    out = torch.empty(len(places), places.width, dtype=dtype, device=places.starts.device)
    columns = max(1, min(places.width, _SLAB))
    rows = max(1, _SLAB // columns)
    for r in range(0, len(places), rows):
        for c in range(0, places.width, columns):
            to = out[r : r + rows, c : c + columns]
            words = _words(key, places.starts[r : r + rows] + c, to.shape[1])
            if kind == _BITS:
                to.copy_(words.to(torch.int32))
            elif kind == _KEEP:
                torch.ge(words, threshold, out=to)
            else:
                to.copy_(_normal(words) if kind == _NORMAL else (words >> 8).to(torch.int32).float() * 2.0**-24)
    return out


def _words(key: Key, starts: Tensor, width: int) -> Tensor:
    """The words of rows of elements, int64 [rows, width] in [0, 2^32)."""
    groups = torch.arange((width + 2 * _GROUP - 2) // _GROUP, device=starts.device)
    counters = (starts[:, None] // _GROUP + groups) * _LANES
    words = torch.stack(_philox(counters[..., None] + torch.arange(_LANES, device=starts.device), key), 2)
    index = (starts % _GROUP)[:, None] + torch.arange(width, device=starts.device)
    return words.flatten(1).gather(1, index)


def _philox(counter: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each 64-bit counter. int64 wraps at 2^64, which keeps both halves of a multiplication."""
    a, b = counter & _MASK, counter >> 32 & _MASK
    c, d = (torch.full_like(counter, half & _MASK) for half in (key.stream, key.stream >> 32))
    k0, k1 = key.key & _MASK, key.key >> 32 & _MASK
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32 & _MASK) ^ b ^ k0, q & _MASK, (p >> 32 & _MASK) ^ d ^ k1, p & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return a, b, c, d


# the coefficients of draws.h, where the method is described
_LOG = (
    *(0.9999999403953552, -0.5000036358833313, 0.33335059881210327, -0.24969908595085144),
    *(0.1990017294883728, -0.17250847816467285, 0.16222524642944336, -0.10106763988733292),
)
_MIDDLE = (
    *(2.1233136653900146, 0.3488026559352875, -0.005908171180635691, -0.0017730101244524121, 0.0003091501712333411),
    *(-6.217987902346067e-06, -4.990560228179675e-06, 4.861034881287196e-07, 4.0354226626959644e-08),
)
_TAIL = (
    *(4.7170891761779785, 1.4246379137039185, 0.004640835803002119, -0.0029539959505200386, 0.0015044164611026645),
    *(-0.0008490706677548587, 0.0007000468904152513, -0.0004569130251184106, 3.346082303323783e-05),
    6.402532017091289e-05,
)
_SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)
_CUT = 5.0


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total.mul_(x).add_(c)
    return total


def _normal(words: Tensor) -> Tensor:
    """The standard normal quantile of (word + 1/2) / 2^32, by the float32 operations of draws.h in the same order."""
    negative = words >= 1 << 31
    half = torch.where(negative, _MASK - words, words).to(torch.int32)
    t = ((0x7FFFFFFF - half).float() + 0.5) * 2.0**-32
    x = (half.float() + 0.5) * 2.0**-31
    above = (t * (t * -4.0 + 4.0)).view(torch.int32) - _SQRT_HALF
    f = ((above & 0x7FFFFF) + _SQRT_HALF).view(torch.float32) - 1.0
    w = -((above >> 23).float() * math.log(2) + f * _polynomial(_LOG, f))
    root = w.clamp(min=_CUT).double().sqrt().float()  # torch's float32 sqrt (MKL) is not always rounded correctly
    tail = _polynomial(_TAIL, root - 3.5)
    z = x * torch.where(w < _CUT, _polynomial(_MIDDLE, w - 2.5), tail)
    return torch.where(negative, -z, z)
