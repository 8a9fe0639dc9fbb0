"""The boundary between Python and csrc: shape functions for torch.compile, and Python errors for wrong arguments.

Each operator has one valid call (`calls`); each of its tensors is then given another dtype, device and shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.ops import native

OPS = native.load()[0]
pytestmark = pytest.mark.skipif(OPS is None, reason=native.load()[1])


@functools.cache
def calls() -> dict[str, tuple[Any, ...]]:
    """Operator -> valid arguments."""
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=gen)

    q, k, x, row, table = draw(2, 4, 9, 6), draw(2, 2, 9, 6), draw(5, 8), draw(8), draw(2, 9, 3)
    flat, low = [draw(50) for _ in range(4)], torch.zeros(50, dtype=torch.bfloat16)
    found: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, row, 1e-5, 1.0),
        "add_rms_norm": (x, draw(5, 8), row, 1e-5, 0.0),
        "rms_norm_backward": (x, draw(5, 8), draw(5, 8), row, draw(5), 0.0),
        "layer_norm": (x, row, draw(8), 1e-5),
        "add_layer_norm": (x, draw(5, 8), row, draw(8), 1e-5),
        "layer_norm_backward": (x, draw(5, 8), draw(5, 8), row, draw(2, 5)),
        "gated": (x, 1),
        "gated_backward": (draw(5, 4), x, 2),
        "rope": (draw(9, 2, 48), table, 4, 2),
        "rope_backward": (q, k, draw(2, 2, 9, 6), table),
        "softmax_stats": (x, torch.arange(5), 7),
        "softmax_gradient_": (draw(5, 8), torch.arange(5), draw(5), draw(5), draw(5), 7),
        "adamw_": (*flat, low, 0.1, 0.9, 0.9, 1e-8, 0.1, 1.0, 3),
        "sum_squares": (draw(50), torch.tensor([[0, 7], [7, 50]])),
        "draw": (torch.arange(5), 7, -3, 5, 2, 0),
        "dropout": (x, torch.arange(5), 1, 2, 2**31, 2.0),
    }
    if OPS.attention_runs():
        begin = torch.tensor([[0, 0, 0, 3, 3, 5, 6, 6, 6]] * 2)
        out, lse = OPS.attention(q, k, draw(2, 2, 9, 6), begin, 0.4)
        found["attention"] = (q, k, draw(2, 2, 9, 6), begin, 0.4)
        found["attention_backward"] = (draw(9, 2, 24), q, k, draw(2, 2, 9, 6), out, lse, begin, 0.4)
        found["mm_"] = (draw(5, 3), x, draw(8, 3), True)
    return found


NAMES = [] if OPS is None else list(calls())
# still valid: one more column of logits or values, one more dimension of rows
FREE = {(0, "softmax_stats", 0), (0, "softmax_gradient_", 0), (0, "sum_squares", 0), (0, "draw", 0), (0, "dropout", 0)}
FREE |= {(1, "rms_norm", 0), (1, "layer_norm", 0), (1, "gated", 0)}
STRIDED = {"rope_backward": (0, 1, 2), "attention": (0, 1, 2), "attention_backward": (1, 2, 3), "mm_": (0, 1, 2)}


def with_one_changed(name: str, change: Callable[[Tensor], Tensor]) -> list[tuple[int, tuple[Any, ...]]]:
    """The calls of an operator with one tensor changed: (index of the argument, arguments)."""
    arguments = calls()[name]
    places = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
    return [(i, (*arguments[:i], change(arguments[i]), *arguments[i + 1 :])) for i in places]


def test_every_operator_has_a_call() -> None:
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.removeprefix("trident::") for s in schemas if s.name.startswith("trident::") and s.arguments}
    assert names == set(NAMES) or not OPS.attention_runs()


@pytest.mark.parametrize("name", NAMES)
def test_shapes_for_compilers(name: str) -> None:
    """torch's opcheck: schemas declare the arguments that are written, shape functions the returned tensors."""
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(OPS, name).default, calls()[name], test_utils=checks)


@pytest.mark.parametrize("name", NAMES)
def test_another_type_is_an_error(name: str) -> None:
    for _, arguments in with_one_changed(name, lambda x: x.to(torch.int16)):
        with pytest.raises(TypeError, match=f"trident::{name}: "):
            getattr(OPS, name)(*arguments)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gated", "draw")])
def test_another_device_is_an_error(name: str) -> None:
    for _, arguments in with_one_changed(name, lambda x: x.to("meta")):
        with pytest.raises(ValueError, match=f"trident::{name}: .*(cpu and meta|on meta)"):
            getattr(OPS, name)(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_another_shape_is_an_error(name: str) -> None:
    """One more column, one more dimension, or no dimension."""
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: torch.nn.functional.pad(x, (0, 1)),
        lambda x: x[None],
        lambda x: x.reshape(-1)[0],
    ]
    for number, change in enumerate(changes):
        for place, arguments in with_one_changed(name, change):
            if (number, name, place) in FREE:
                continue
            with pytest.raises(ValueError, match=f"trident::{name}: "):
                getattr(OPS, name)(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_strides_are_an_error(name: str) -> None:
    """A stride of 2 along the last dimension, which even operators that accept strides reject."""

    def spread(x: Tensor) -> Tensor:
        return torch.stack((x, x), -1)[..., 0]

    for place, arguments in with_one_changed(name, spread):
        if name == "mm_":
            arguments = tuple(torch.stack((x, x), -1)[..., 0] if isinstance(x, Tensor) else x for x in calls()[name])
        with pytest.raises(ValueError, match=f"trident::{name}: .*(contiguous|stride)"):
            getattr(OPS, name)(*arguments)
        assert place in STRIDED.get(name, range(9)) or not arguments[place].is_contiguous()


_x, _row = torch.ones(2, 3), torch.ones(3)
_heads = lambda n: torch.ones(1, n, 4, 2)  # noqa: E731

WRONG: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    (
        "width",
        lambda: OPS.rms_norm(_x, torch.ones(4), 1e-5, 0.0),
        ValueError,
        r"weight is \[4\], expected \[3\]",
    ),
    ("type", lambda: OPS.rms_norm(_x, _row.double(), 1e-5, 0.0), TypeError, "weight is Double, expected Float"),
    (
        "whole numbers",
        lambda: OPS.gated(torch.ones(2, 4).long(), 0),
        TypeError,
        "expected floating-point tensors",
    ),
    ("odd", lambda: OPS.gated(torch.ones(2, 5), 0), ValueError, r"fused \[2, 5\] is not gate \| up"),
    ("strides", lambda: OPS.gated(torch.ones(4, 2).t(), 0), ValueError, "is not contiguous"),
    (
        "scale",
        lambda: OPS.rms_norm_backward(_x, None, _x, _row, torch.ones(9), 0.0),
        ValueError,
        "scale",
    ),
    ("kind", lambda: OPS.gated(torch.ones(2, 4), 3), ValueError, "kind is 3"),
    (
        "places",
        lambda: OPS.attention(*[_heads(1)] * 3, None, 1.0, torch.tensor([[[0, 4, -1, 12]]])),
        ValueError,
        r"places\[2\] is -1",
    ),
    (
        "threshold",
        lambda: OPS.attention(*[_heads(1)] * 3, None, 1.0, None, 0, 0, 2**32),
        ValueError,
        "threshold is 4294967296",
    ),
    (
        "begin ahead",
        lambda: OPS.attention(*[_heads(1)] * 3, torch.tensor([[0, 0, 3, 3]]), 1.0),
        ValueError,
        r"begin\[0, 2\] is 3",
    ),
    (
        "begin goes back",
        lambda: OPS.attention(*[_heads(1)] * 3, torch.tensor([[0, 1, 0, 1]]), 1.0),
        ValueError,
        r"begin\[0, 2\] is 0",
    ),
    (
        "begin below",
        lambda: OPS.attention(*[_heads(1)] * 3, torch.tensor([[-1, 0, 0, 0]]), 1.0),
        ValueError,
        r"begin\[0, 0\] is -1",
    ),
    ("range", lambda: OPS.sum_squares(_row, torch.tensor([[0, 4]])), ValueError, r"bounds\[0\] is \[0, 4\]"),
    ("range turned", lambda: OPS.sum_squares(_row, torch.tensor([[2, 1]])), ValueError, r"bounds\[0\] is \[2, 1\]"),
    ("heads", lambda: OPS.rope(torch.ones(2, 1, 10), torch.ones(2, 2, 1), 3, 2), ValueError, "for n = 3, m = 2"),
    (
        "table",
        lambda: OPS.rope(torch.ones(2, 1, 6), torch.ones(2, 3, 1), 1, 1),
        ValueError,
        r"expected \[2, 2, at most 1\]",
    ),
    ("product", lambda: OPS.mm_(torch.ones(2, 2), _x, torch.ones(2, 2), False), ValueError, "times"),
    ("matrix", lambda: OPS.mm_(torch.ones(2), _x, torch.ones(3, 2), False), ValueError, "is not a matrix"),
    ("out", lambda: OPS.mm_(torch.ones(2, 2).t(), *[torch.ones(2, 2)] * 2, False), ValueError, "rows of the result"),
    ("double", lambda: OPS.mm_(*[torch.ones(2, 2).double()] * 3, False), TypeError, "expected float32"),
    (
        "group",
        lambda: OPS.attention(_heads(3), _heads(2), _heads(2), None, 1.0),
        ValueError,
        "3 heads",
    ),
    (
        "more queries than keys",
        lambda: OPS.attention(_heads(1), *[_heads(1)[:, :, 1:]] * 2, None, 1.0),
        ValueError,
        "q has 4 positions, k 3",
    ),
    (
        "begin ahead of the last queries",
        lambda: OPS.attention(_heads(1)[:, :, 2:], *[_heads(1)] * 2, torch.tensor([[2, 4]]), 1.0),
        ValueError,
        r"begin\[0, 1\] is 4",
    ),
    ("valid", lambda: OPS.softmax_stats(_x, torch.zeros(2).long(), 4), ValueError, "valid is 4"),
    ("target", lambda: OPS.softmax_stats(_x, torch.zeros(2), 3), TypeError, "target is Float, expected Long"),
    ("step", lambda: OPS.adamw_(*[torch.ones(2)] * 4, None, *[0.1] * 6, 0), ValueError, "step counts from 1"),
    ("low", lambda: OPS.adamw_(*[torch.ones(2)] * 4, torch.ones(2), *[0.1] * 6, 1), TypeError, "values are Float"),
]


@pytest.mark.parametrize(("call", "error", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_call_is_an_error(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
