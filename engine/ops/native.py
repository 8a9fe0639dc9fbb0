"""Which implementation an op runs: our own kernels (csrc/ops) where they are built and fit, else torch's.

Every op asks here and nowhere else, so there is one place that knows what is loaded. The torch code of an op is its
reference: tests compare the two, and the engine runs on it where the extension is missing or the tensors are elsewhere.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.util import extension
from engine.util.build_notes import why_not_built

_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class _Choice:
    """What tests may force. kernels: own kernels at all; gemm: own matrix products, None: where they are faster."""

    kernels: bool = True
    gemm: bool | None = None


_CHOICE = _Choice()


def _open(name: str) -> tuple[Any, str]:
    """torch.ops.trident, and which torch it was built for."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None  # found by extension.load
    torch.ops.load_library(spec.origin)
    return torch.ops.trident, f"torch {torch.ops.trident.built_for()}"


@functools.cache
def load() -> tuple[Any, str]:
    """(torch.ops.trident, "") or (None, why it cannot be used). Loads the extension once per process."""
    library, why = extension.load("engine._ops", f"torch {torch.__version__}", _open)
    if library is not None:
        _register_shapes()
    return library, why


def _register_shapes() -> None:
    """Tell torch.compile and meta tensors what the operators return; those that return nothing need no telling."""

    def stats(x: Tensor, *sizes: int) -> Tensor:
        return x.new_empty(*sizes, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)

    def rows(x: Tensor) -> int:
        return x.numel() // x.shape[-1] if x.shape[-1] else 0

    def same(*like: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in like)

    def rope(fused: Tensor, table: Tensor, n: int, m: int) -> tuple[Tensor, ...]:
        s, b, width = fused.shape
        return tuple(fused.new_empty(b, heads, s, width // (n + 2 * m)) for heads in (n, m, m))

    def rope_backward(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        b, n, s, d = q.shape
        return q.new_empty(s, b, (n + 2 * k.shape[1]) * d)

    def attention(q: Tensor, k: Tensor, v: Tensor, begin: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        b, n, s, d = q.shape
        return q.new_empty(s, b, n * d), q.new_empty(b, n, s)

    fakes: dict[str, Callable[..., Any]] = {
        "mm_": lambda out, a, b, add: None,
        "rms_norm": lambda x, weight, eps, offset: (*same(x), stats(x, rows(x))),
        "add_rms_norm": lambda x, residual, weight, eps, offset: (*same(x, x), stats(x, rows(x))),
        "rms_norm_backward": lambda grad, grad_sum, x, weight, scale, offset: same(x, weight),
        "layer_norm": lambda x, weight, bias, eps: (*same(x), stats(x, 2, rows(x))),
        "add_layer_norm": lambda x, residual, weight, bias, eps: (*same(x, x), stats(x, 2, rows(x))),
        "layer_norm_backward": lambda grad, grad_sum, x, weight, stats: same(x, weight, weight),
        "gated": lambda fused, kind: fused.new_empty(*fused.shape[:-1], fused.shape[-1] // 2),
        "gated_backward": lambda grad, fused, kind: torch.empty_like(fused),
        "rope": rope,
        "rope_backward": rope_backward,
        "attention": attention,
        "attention_backward": lambda grad, q, k, v, out, lse, begin, scale: same(q, k, v),
        "softmax_stats": lambda logits, target, valid: stats(logits, 3, len(logits)),
        "softmax_gradient_": lambda logits, target, peak, scale, grad, valid: None,
        "adamw_": lambda *_: None,
        "sum_squares": lambda flat, bounds: flat.new_empty(len(bounds), dtype=torch.float64),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"trident::{name}", _on_one_device(name, fake))


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The kernels refuse tensors of several devices; one of them being "meta" must not hide that."""

    def checked(*arguments: Any) -> Any:
        devices = sorted({str(x.device) for x in arguments if isinstance(x, Tensor)})
        if len(devices) > 1:
            raise ValueError(f"trident::{name}: tensors are on {' and '.join(devices)}, wanted one device")
        return fake(*arguments)

    return checked


@functools.cache
def _library() -> Any:
    library, why = load()
    if library is None:
        extension.warn(why, "torch's own operators run instead, slower")
    return library


def references_only() -> bool:
    """Whether plain torch code is to run: in a test that asks for it, and in what torch.compile makes."""
    return not _CHOICE.kernels or torch.compiler.is_compiling()


@functools.cache
def _cuda_library(device: torch.device) -> Any:
    if why := why_no_cuda(device):
        extension.warn(why, "torch's own operators run instead, slower")
        return None
    return load()[0]


def kernels(*tensors: Tensor) -> Any:
    """torch.ops.trident if our kernels are to run on these tensors, of one device and one floating type; else None.

    On the CPU wherever the extension is built; on a GPU where it was built with CUDA kernels for it.
    """
    if references_only():
        return None
    first = tensors[0]
    if first.dtype not in _TYPES or any(x.device != first.device or x.dtype != first.dtype for x in tensors):
        return None
    if first.device.type == "cuda":
        return _cuda_library(first.device)
    return _library() if first.device.type == "cpu" else None


@functools.cache
def why_no_cuda(device: torch.device) -> str:
    """Why our CUDA kernels cannot run on this GPU; "" if they can."""
    library, why = load()
    if library is None:
        return why
    built = library.cuda_capabilities()
    if not built:
        return f"engine._ops has no CUDA kernels ({why_not_built('cuda') or 'torch had no CUDA when it was built'})"
    own = torch.cuda.get_device_capability(device)
    if runs_on(own, built):
        return ""
    return f"the CUDA kernels were built for compute capability {built}, this GPU has {own[0]}.{own[1]}"


def runs_on(capability: tuple[int, int], built: str) -> bool:
    """Whether code for `built` ("8.0 9.0+PTX") runs on a GPU: PTX on all later ones, else within its major number."""
    for word in built.replace(";", " ").split():
        number, ptx, _ = word.partition("+PTX")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if (capability[0] == major or ptx) and capability >= (major, minor):
            return True
    return False


@functools.cache
def _gemm_wins() -> bool:
    library = _library()
    return library is not None and library.gemm_wins()


def _own_gemm(*matrices: Tensor) -> bool:
    if not all(x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 2 for x in matrices):
        return False
    if not _CHOICE.kernels or not all(1 in x.stride() and min(x.stride()) >= 0 for x in matrices):
        return False
    return _gemm_wins() if _CHOICE.gemm is None else _CHOICE.gemm


@functools.cache
def _attention_runs() -> bool:
    library = _library()
    return library is not None and library.attention_runs()


def own_attention(*heads: Tensor) -> bool:
    """Whether our attention is to run: float32 on a CPU with AVX2."""
    fits = heads[0].device.type == "cpu" and heads[0].dtype == torch.float32
    return fits and kernels(*heads) is not None and _attention_runs()


def in_words(device: torch.device, dtype: torch.dtype) -> str:
    """What runs on tensors of this device and type, and why, in half a line."""
    probe = torch.empty(1, 1, 1, 1, device=device, dtype=dtype)
    if device.type == "cuda":
        why_not_own = why_no_cuda(probe.device)
    elif device.type == "cpu":
        why_not_own = load()[1]
    else:
        why_not_own = f"own ones are for CPUs and CUDA, this is {device.type}"
    if why_not_own or kernels(probe) is None:
        return f"torch ({why_not_own or f'own ones are not for {dtype}'})"
    matmul = "own" if _own_gemm(probe[0, 0]) else "torch"
    return f"own (engine._ops for torch {torch.__version__}), matrix products: {matmul}"


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., k] times a matrix b [k, n] -> [..., n]."""
    rows = a.reshape(-1, a.shape[-1])
    if not _own_gemm(rows, b):
        return torch.matmul(a, b)
    out = torch.empty(*a.shape[:-1], b.shape[1], dtype=a.dtype)
    _library().mm_(out.view(-1, b.shape[1]), rows, b, False)
    return out


def add_matmul_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [m, n] += a [m, k] b [k, n], all of one dtype."""
    if _own_gemm(out, a, b) and out.stride(1) == 1:
        _library().mm_(out, a, b, True)
    else:
        torch.addmm(out, a, b, out=out)


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory of this process for the next tensors; False where that cannot be asked for.

    A step frees and takes the same large tensors again and again; by default each goes back to the system and comes
    back as page faults.
    """
    library = _library()
    return library is not None and bool(library.keep_freed_memory())


@contextmanager
def forced(*, kernels: bool = True, gemm: bool | None = None) -> Iterator[None]:
    """For tests: run on the references, or with or without own matrix products, whatever is faster here."""
    before = _CHOICE.kernels, _CHOICE.gemm
    _CHOICE.kernels, _CHOICE.gemm = kernels, gemm
    try:
        yield
    finally:
        _CHOICE.kernels, _CHOICE.gemm = before
