"""ShardSpec: counted pieces tile every canonical tensor exactly once; initial values do not depend on the layout."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.derived import derive
from engine.config.schema import Config
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import Chunk, Parameter, ShardSpec, initialise_, new_parameter, parameters
from engine.model.transformer import Transformer, stage_shapes, tensor_shapes
from tests.support.cases import assemble, config, max_relative_error, pieces_of


def contexts(layout: Layout, num_kv_heads: int = 1 << 20, **options: Any) -> list[ParallelContext]:
    """The context of every rank, without processes."""
    options = {"dtype": torch.float64} | options
    return [make_context(layout, rank, num_kv_heads=num_kv_heads, **options) for rank in range(layout.world)]


@st.composite
def specs(draw: st.DrawFn) -> tuple[int, ShardSpec]:
    """A tensor degree and a spec. The parts of each chunk divide the degree; its size may be smaller than the parts."""
    tensor = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    divisors = [d for d in range(1, tensor + 1) if tensor % d == 0]
    chunks = tuple(
        Chunk(f"chunk{i}", draw(st.integers(1, 20)), parts=draw(st.sampled_from(divisors)))
        for i in range(draw(st.integers(1, 3)))
    )
    other = draw(st.none() | st.integers(1, 3))
    dim = 0 if other is None else draw(st.integers(0, 1))
    return tensor, ShardSpec(chunks, dim=dim, other=other)


@settings(deadline=None, max_examples=200)
@given(specs())
def test_counted_pieces_tile_every_tensor_once(case: tuple[int, ShardSpec]) -> None:
    tensor, spec = case
    counts: dict[str, np.ndarray] = {}
    owner: dict[tuple[str, tuple[int, ...], tuple[int, ...]], int] = {}
    held: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    for ctx in contexts(Layout(tensor, tensor=tensor)):
        local = torch.zeros(spec.local_shape())
        for piece, chunk in zip(spec.pieces(ctx), spec.chunks, strict=True):
            assert piece.name == chunk.name and piece.global_shape[spec.dim] == chunk.size
            view = piece.of(local)
            assert view.shape == piece.shape
            view += 1
            whole = torch.from_numpy(counts.setdefault(piece.name, np.zeros(piece.global_shape)))
            assert piece.cut(whole).shape == piece.shape
            rectangle = (piece.name, piece.offset, piece.shape)
            held.add(rectangle)
            if piece.counted:
                piece.cut(whole).add_(1)
                if 0 not in piece.shape:
                    assert rectangle not in owner
                    owner[rectangle] = ctx.rank
        assert local.max() <= 1, "two pieces share local rows"
    for name, count in counts.items():
        assert (count == 1).all(), name
    assert {r for r in held if 0 not in r[2]} == set(owner), "a replica holds values that no rank counts"


@settings(deadline=None, max_examples=100)
@given(specs())
def test_local_shapes(case: tuple[int, ShardSpec]) -> None:
    """The shape is the same on every rank, with less than one part of padding."""
    tensor, spec = case
    shape = spec.local_shape()
    assert len(shape) == (1 if spec.other is None else 2)
    assert shape[spec.dim] == sum(-(-chunk.size // chunk.parts) for chunk in spec.chunks)
    if spec.other is not None:
        assert shape[1 - spec.dim] == spec.other
    first = contexts(Layout(tensor, tensor=tensor))[0]
    pieces = spec.pieces(first)
    assert new_parameter(spec, first).shape == shape
    assert [p.start for p in pieces] == [
        sum(-(-c.size // c.parts) for c in spec.chunks[:i]) for i in range(len(spec.chunks))
    ]


def test_fused_kv_with_fewer_heads_than_ranks() -> None:
    """8 query heads and 2 KV heads of width 3 on 4 ranks: ranks 0 and 1 share KV head 0. Expected values by hand."""
    spec = ShardSpec(
        (
            Chunk("q", 24, parts=4),
            Chunk("k", 6, parts=2, sum_over=("kv",)),
            Chunk("v", 6, parts=2, sum_over=("kv",)),
        ),
        other=5,
    )
    assert spec.local_shape() == (12, 5)
    rows = []
    for ctx in contexts(Layout(4, tensor=4), num_kv_heads=2):
        assert ctx.kv.ranks == ((0, 1) if ctx.rank < 2 else (2, 3))
        rows.append([(p.name, p.offset[0], p.shape[0], p.start, p.counted) for p in spec.pieces(ctx)])
    assert rows == [
        [("q", 0, 6, 0, True), ("k", 0, 3, 6, True), ("v", 0, 3, 9, True)],
        [("q", 6, 6, 0, True), ("k", 0, 3, 6, False), ("v", 0, 3, 9, False)],
        [("q", 12, 6, 0, True), ("k", 3, 3, 6, True), ("v", 3, 3, 9, True)],
        [("q", 18, 6, 0, True), ("k", 3, 3, 6, False), ("v", 3, 3, 9, False)],
    ]


def test_padded_vocabulary_with_a_rank_that_holds_nothing() -> None:
    spec = ShardSpec((Chunk("embed", 5, parts=4),), other=2)
    pieces = [spec.pieces(ctx)[0] for ctx in contexts(Layout(4, tensor=4))]
    assert [(p.offset, p.shape) for p in pieces] == [
        ((0, 0), (2, 2)),
        ((2, 0), (2, 2)),
        ((4, 0), (1, 2)),
        ((5, 0), (0, 2)),
    ]
    assert spec.local_shape() == (2, 2)
    far = ShardSpec((Chunk("embed", 3, parts=8),)).pieces(contexts(Layout(8, tensor=8))[7])[0]
    assert far.offset == (3,) and far.shape == (0,), "an offset is never outside the tensor"


def test_row_split() -> None:
    spec = ShardSpec((Chunk("out", 6, parts=2),), dim=1, other=4)
    assert spec.local_shape() == (4, 3)
    left, right = (spec.pieces(ctx)[0] for ctx in contexts(Layout(2, tensor=2)))
    assert left.global_shape == right.global_shape == (4, 6)
    assert (left.offset, left.shape) == ((0, 0), (4, 3)) and (right.offset, right.shape) == ((0, 3), (4, 3))
    whole = torch.arange(24).view(4, 6)
    assert torch.equal(right.cut(whole), whole[:, 3:])


MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"model_num_kv_heads": 8},
    "tied qk-norm": {"model_tie_embeddings": True, "model_qk_norm": True},
    "tiny vocabulary": {"model_vocab_size": 5, "model_tie_embeddings": True},
}
DEGREES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 4, 1), (4, 2, 1), (2, 2, 2)]


def model_on(cfg: Config, ctx: ParallelContext) -> Transformer:
    return Transformer(cfg.model, ctx, stage_shapes(derive(cfg).layers)[ctx.pipeline.rank])


def laid_out(degrees: tuple[int, int, int], **model: Any) -> Config:
    tensor, pipeline, data = degrees
    world = tensor * pipeline * data
    return config(world, parallel_tensor=tensor, parallel_pipeline=pipeline, parallel_data=data, **model)


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_the_model_is_counted_once_for_each_data_replica(model: str, degrees: tuple[int, int, int]) -> None:
    cfg = laid_out(degrees, **MODELS[model])
    counts = {name: np.zeros((degrees[2], *shape)) for name, shape in tensor_shapes(cfg.model).items()}
    for ctx in contexts(derive(cfg).layout, cfg.model.num_kv_heads, device="meta"):
        for p in parameters(model_on(cfg, ctx)):
            for piece in p.spec.pieces(ctx):
                assert piece.global_shape == counts[piece.name].shape[1:]
                if piece.counted:
                    piece.cut(torch.from_numpy(counts[piece.name][ctx.data.rank])).add_(1)
    for name, count in counts.items():
        assert (count == 1).all(), name


def initialised(cfg: Config, ctx: ParallelContext) -> list[Parameter]:
    found = parameters(model_on(cfg, ctx))
    initialise_(found, ctx, cfg.train.seed)
    return found


def assembled(cfg: Config) -> dict[str, np.ndarray]:
    ranks = contexts(derive(cfg).layout, cfg.model.num_kv_heads)
    return assemble([pieces_of(((p, p) for p in initialised(cfg, ctx)), ctx) for ctx in ranks])


@pytest.mark.parametrize("degrees", DEGREES[1:], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_initial_bits_do_not_know_the_layout(model: str, degrees: tuple[int, int, int]) -> None:
    one, many = (assembled(laid_out(d, **MODELS[model])) for d in ((1, 1, 1), degrees))
    assert max_relative_error(many, one) == 0
    assert many.keys() == tensor_shapes(config(1, **MODELS[model]).model).keys()


def test_initial_values_are_what_the_config_says() -> None:
    cfg = config(1, model_vocab_size=4000, model_init_std=0.05)
    values = assembled(cfg)
    assert abs(values["embed.weight"].std() / 0.05 - 1) < 0.01 and abs(values["embed.weight"].mean()) < 1e-3
    out = values["layers.0.attention.out.weight"]
    assert abs(out.std() / (0.05 / 8**0.5) - 1) < 0.1  # 2 * 4 layers
    assert (values["norm.weight"] == 1).all()
    for other in ("layers.1.attention.out.weight", "head.weight"):
        assert not np.array_equal(values[other].ravel()[:50], out.ravel()[:50])
    reseeded = assembled(config(1, model_vocab_size=4000, model_init_std=0.05, train_seed=5))
    assert not np.array_equal(reseeded["embed.weight"], values["embed.weight"])


def test_bf16_starts_from_the_rounded_values() -> None:
    cfg = config(1)
    wide, narrow = (make_context(Layout(), 0, num_kv_heads=2, dtype=d) for d in (torch.float32, torch.bfloat16))
    for a, b in zip(initialised(cfg, wide), initialised(cfg, narrow), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_padding_is_zero(tensor: int) -> None:
    cfg = laid_out((tensor, 1, 1), model_vocab_size=5)
    padded = 0
    for ctx in contexts(derive(cfg).layout, cfg.model.num_kv_heads):
        for p in initialised(cfg, ctx):
            rest = torch.ones_like(p)
            for piece in p.spec.pieces(ctx):
                piece.of(rest).zero_()
            padded += int(rest.sum())
            assert (p[rest.bool()] == 0).all(), p.name
            assert (p[~rest.bool()] != 0).all(), p.name
    rows = -(-5 // tensor) * tensor - 5
    assert padded == 2 * rows * cfg.model.hidden_size  # embedding and head


def test_a_parameter_is_not_copied() -> None:
    ctx = contexts(Layout())[0]
    model = model_on(config(1), ctx)
    weight = next(iter(parameters(model)))
    with pytest.raises(TypeError, match="build the module again from its config"):
        copy.deepcopy(weight)
    with pytest.raises(TypeError, match="is not copied"):
        copy.deepcopy(model)


def test_names_and_facts() -> None:
    ctx = contexts(Layout())[0]
    model = model_on(config(1, model_tie_embeddings=True, model_qk_norm=True), ctx)
    found = {p.name: p for p in parameters(model)}
    qkv = found["+".join(f"layers.0.attention.{part}.weight" for part in "qkv")]
    assert qkv.spec.decay and qkv.main_grad is None and qkv.on_grad is None and qkv.requires_grad
    assert not found["norm.weight"].spec.decay
    assert found["layers.0.attention.q_norm.weight"].spec.chunks[0].sum_over == ("tensor",)
    assert model.head.weight is model.embed.weight, "tied on one stage: one parameter"
    assert found["embed.weight"].spec.chunks[0].sum_over == ("tied_stages",)


def test_a_parameter_without_a_spec_is_rejected() -> None:
    with pytest.raises(AssertionError, match=r"is a sharding\.Parameter"):
        parameters(torch.nn.Linear(2, 2))
