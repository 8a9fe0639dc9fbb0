"""Selects the implementation of each op: the custom kernels (csrc/ops) if they are built and applicable, else torch.

This is the only module that loads the extension, and every op asks it. The torch code of an op is its reference: tests
compare the two, and it runs where the extension is missing or has no kernels for the tensors' device.
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
from torch.library import register_fake

from engine.util import extension
from engine.util.build_notes import why_not_built

_INTERFACE = 2  # of csrc/ops/schemas.cpp, raised when a schema or what an operator computes changes
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class _Overrides:
    """Overrides for tests (`forced`). kernels: use custom kernels; gemm: the custom GEMM, None: where it is faster."""

    kernels: bool = True
    gemm: bool | None = None


_OVERRIDES = _Overrides()


def _open(name: str) -> tuple[Any, str]:
    """Load the extension: (torch.ops.trident, the interface and the torch version that it was built for)."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None  # found by extension.load
    torch.ops.load_library(spec.origin)
    library = torch.ops.trident
    interface = getattr(library, "interface", int)()  # 0 if the build has none
    return library, _version(interface, library.built_for())


def _version(interface: int, built_for: str) -> str:
    return f"interface {interface} and torch {built_for}"


@functools.cache
def load() -> tuple[Any, str]:
    """Load the extension once per process: (torch.ops.trident, "") or (None, why it cannot be used)."""
    library, why = extension.load("engine._ops", _version(_INTERFACE, torch.__version__), _open)
    if library is not None:
        _register_shapes()
    return library, why


def _register_shapes() -> None:
    """Register the output shapes of the operators for torch.compile and meta tensors."""

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

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        b, n, s, d = q.shape
        return q.new_empty(s, b, n * d), q.new_empty(b, n, s)

    def draw(starts: Tensor, n: int, key: int, stream: int, kind: int, threshold: int) -> Tensor:
        dtype = {0: torch.int32, 3: torch.bool}.get(kind, torch.float32)
        return starts.new_empty(starts.numel(), n, dtype=dtype)

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
        "attention_backward": lambda grad, q, k, v, *_: same(q, k, v),
        "softmax_stats": lambda logits, target, valid: stats(logits, 3, len(logits)),
        "softmax_gradient_": lambda logits, target, peak, scale, grad, valid: None,
        "adamw_": lambda *_: None,
        "sum_squares": lambda flat, bounds: flat.new_empty(len(bounds), dtype=torch.float64),
        "draw": draw,
        "dropout": lambda x, starts, key, stream, threshold, scale: torch.empty_like(x),
    }
    for name, fake in fakes.items():
        register_fake(f"trident::{name}", _on_one_device(name, fake))


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a shape function to reject tensors of several devices, as the kernels do, even if one of them is "meta"."""

    def checked(*arguments: Any) -> Any:
        devices = sorted({str(x.device) for x in arguments if isinstance(x, Tensor)})
        if len(devices) > 1:
            raise ValueError(f"trident::{name}: all tensors must be on one device, not {' and '.join(devices)}")
        return fake(*arguments)

    return checked


@functools.cache
def _library() -> Any:
    library, why = load()
    if library is None:
        extension.warn(why, "torch's operators run instead, slower")
    return library


def references_only() -> bool:
    """Whether ops must run their torch code: under torch.compile, and in tests that force it."""
    return not _OVERRIDES.kernels or torch.compiler.is_compiling()


@functools.cache
def _cuda_library(device: torch.device) -> Any:
    if why := why_no_cuda(device):
        extension.warn(why, "torch's operators run instead, slower")
        return None
    return load()[0]


def kernels_on(device: torch.device) -> Any:
    """torch.ops.trident if custom kernels are to run on this device, else None: then the op runs its torch code.

    CPU: if the extension is built. GPU: if it was built with CUDA kernels for this compute capability.
    """
    if references_only():
        return None
    if device.type == "cuda":
        return _cuda_library(device)
    return _library() if device.type == "cpu" else None


def kernels(*tensors: Tensor) -> Any:
    """`kernels_on` the device of these tensors, if they have the same device and the same floating-point dtype."""
    first = tensors[0]
    if first.dtype not in _TYPES or any(x.device != first.device or x.dtype != first.dtype for x in tensors):
        return None
    return kernels_on(first.device)


@functools.cache
def why_no_cuda(device: torch.device) -> str:
    """Why the custom CUDA kernels cannot run on this GPU; "" if they can."""
    library, why = load()
    if library is None:
        return why
    built = library.cuda_capabilities()
    if not built:
        reason = why_not_built("cuda") or "the torch of that build had no CUDA"
        return f"engine._ops was built without CUDA kernels ({reason})"
    capability = torch.cuda.get_device_capability(device)
    if runs_on(capability, built):
        return ""
    return f"the CUDA kernels were built for compute capability {built}, this GPU has {capability[0]}.{capability[1]}"


def runs_on(capability: tuple[int, int], built: str) -> bool:
    """Whether kernels built for the targets `built` ("8.0 9.0+PTX") run on a GPU of this compute capability.

    A target runs on the same major version from its minor version on; with +PTX, on all later capabilities.
    """
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


def _use_custom_gemm(*matrices: Tensor) -> bool:
    if not all(x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 2 for x in matrices):
        return False
    if not _OVERRIDES.kernels or not all(1 in x.stride() and min(x.stride()) >= 0 for x in matrices):
        return False
    return _gemm_wins() if _OVERRIDES.gemm is None else _OVERRIDES.gemm


@functools.cache
def _attention_runs() -> bool:
    library = _library()
    return library is not None and library.attention_runs()


def can_run_custom_attention(*heads: Tensor) -> bool:
    """Whether the custom attention kernel can run on these tensors: float32 on a CPU with AVX2."""
    fits = heads[0].device.type == "cpu" and heads[0].dtype == torch.float32
    return fits and kernels(*heads) is not None and _attention_runs()


def describe_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """One line for the user: which kernels run on tensors of this device and dtype, and why not the custom ones."""
    probe = torch.empty(1, 1, 1, 1, device=device, dtype=dtype)
    if device.type == "cuda":
        reason = why_no_cuda(probe.device)
    elif device.type == "cpu":
        reason = load()[1]
    else:
        reason = f"custom kernels exist for CPUs and CUDA, not for {device.type}"
    if reason or kernels(probe) is None:
        return f"torch ({reason or f'there are no custom kernels for {dtype}'})"
    matmul = "custom" if _use_custom_gemm(probe[0, 0]) else "torch"
    return f"custom (engine._ops for torch {torch.__version__}), matmul: {matmul}"


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Matmul a [..., k] times b [k, n] -> [..., n]. Not differentiable."""
    rows = a.reshape(-1, a.shape[-1])
    if not _use_custom_gemm(rows, b):
        return torch.matmul(a, b)
    out = torch.empty(*a.shape[:-1], b.shape[1], dtype=a.dtype)
    _library().mm_(out.view(-1, b.shape[1]), rows, b, False)
    return out


def add_matmul_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """In place: out [m, n] += a [m, k] b [k, n], all of the same dtype."""
    if _use_custom_gemm(out, a, b) and out.stride(1) == 1:
        _library().mm_(out, a, b, True)
    else:
        torch.addmm(out, a, b, out=out)


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for later allocations; False if that is not supported here.

    Each step frees and allocates the same large tensors. By default their memory is returned to the system, and every
    new allocation causes page faults.
    """
    library = _library()
    return library is not None and bool(library.keep_freed_memory())


@contextmanager
def forced(*, kernels: bool = True, gemm: bool | None = None) -> Iterator[None]:
    """For tests: run ops without custom kernels (kernels=False), or with or without the custom GEMM (gemm)."""
    before = _OVERRIDES.kernels, _OVERRIDES.gemm
    _OVERRIDES.kernels, _OVERRIDES.gemm = kernels, gemm
    try:
        yield
    finally:
        _OVERRIDES.kernels, _OVERRIDES.gemm = before
