"""ShardSpec: counted pieces tile every canonical tensor exactly once; initial values do not depend on the layout."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.derived import derive
from engine.config.schema import Config, OptimizerConfig
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout, Place
from engine.distributed.sharding import Parameter, cut_piece, initialise_, new_parameter, parameters, piece_of
from engine.distributed.specs import Chunk, Cut, Role, ShardSpec
from engine.model.build import stage_shapes, tensor_shapes
from engine.model.layers import Build
from engine.model.transformer import Transformer
from engine.optim.clip import NormCounter
from engine.optim.optimizer import Optimizer
from engine.parallel.gradients import make_buckets
from tests.support.cases import assemble, config, max_relative_error, pieces_of
from tests.support.harness import run_ranks


def contexts(layout: Layout, **options: Any) -> list[ParallelContext]:
    """The context of every rank, without processes."""
    options = {"dtype": torch.float64} | options
    return [make_context(layout, rank, **options) for rank in range(layout.world)]


@st.composite
def specs(draw: st.DrawFn) -> tuple[int, ShardSpec]:
    """A tensor degree and a spec. The parts of each chunk divide the degree; a dim 0 may be smaller than its parts."""
    tensor = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    divisors = [d for d in range(1, tensor + 1) if tensor % d == 0]
    dims = draw(st.integers(1, 3))
    parts = [draw(st.sampled_from(divisors)) for _ in range(draw(st.integers(1, 3)))]
    other = [draw(st.integers(1, 3)) for _ in range(dims - 1)]
    chunks = []
    for i, n in enumerate(parts):
        dim = draw(st.integers(0, dims - 1))
        shape = [draw(st.integers(1, 20)), *other]
        if dim > 0:
            shape[dim] *= n
        chunks.append(Chunk(f"chunk{i}", tuple(shape), (Cut(dim, n),)))
    return tensor, ShardSpec(tuple(chunks))


@settings(deadline=None, max_examples=200)
@given(specs())
def test_counted_pieces_tile_every_tensor_once(case: tuple[int, ShardSpec]) -> None:
    tensor, spec = case
    counts: dict[str, np.ndarray] = {}
    owner: dict[tuple[str, tuple[int, ...], tuple[int, ...]], int] = {}
    held: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    layout = Layout(tensor, tensor=tensor)
    for ctx in contexts(layout):
        local = torch.zeros(spec.local_shape())
        assert spec.pieces(ctx) == spec.pieces(Place(layout, ctx.rank))
        for piece, chunk in zip(spec.pieces(ctx), spec.chunks, strict=True):
            assert piece.name == chunk.name and piece.global_shape == chunk.shape
            view = piece_of(piece, local)
            assert view.shape == piece.shape
            view += 1
            whole = torch.from_numpy(counts.setdefault(piece.name, np.zeros(piece.global_shape)))
            assert cut_piece(piece, whole).shape == piece.shape
            rectangle = (piece.name, piece.offset, piece.shape)
            held.add(rectangle)
            if piece.counted:
                cut_piece(piece, whole).add_(1)
                if 0 not in piece.shape:
                    assert rectangle not in owner
                    owner[rectangle] = ctx.rank
        assert local.max() <= 1, "two pieces share local elements"
    for name, count in counts.items():
        assert (count == 1).all(), name
    assert {r for r in held if 0 not in r[2]} == set(owner), "a replica holds values that no rank counts"


@settings(deadline=None, max_examples=200)
@given(specs(), st.data())
def test_rectangles_are_the_elements_of_a_flat_range(case: tuple[int, ShardSpec], data: st.DataObject) -> None:
    """Each rectangle, read in order, holds the next elements of the flat parameter."""
    tensor, spec = case
    numel = math.prod(spec.local_shape())
    begin, end = sorted(data.draw(st.tuples(st.integers(0, numel), st.integers(0, numel))))
    for piece in spec.pieces(contexts(Layout(tensor, tensor=tensor))[data.draw(st.integers(0, tensor - 1))]):
        element = np.full(piece.global_shape, -1)
        cut_piece(piece, torch.from_numpy(element)).copy_(torch.arange(piece.begin, piece.end).view(piece.shape))
        expected = max(begin, piece.begin)
        found = piece.rectangles(begin, end)
        for offset, shape, first in found:
            values = element[tuple(slice(o, o + n) for o, n in zip(offset, shape))].reshape(-1)
            assert first == expected and list(values) == list(range(expected, expected + len(values)))
            expected += len(values)
        assert expected == max(min(end, piece.end), max(begin, piece.begin))
        assert len(found) <= 2 * len(piece.shape) - 1


@settings(deadline=None, max_examples=100)
@given(specs())
def test_local_shapes(case: tuple[int, ShardSpec]) -> None:
    """The shape is the same on every rank, with less than one part of padding, and each chunk is a contiguous run."""
    tensor, spec = case
    first = contexts(Layout(tensor, tensor=tensor))[0]
    assert new_parameter(spec, first).shape == spec.local_shape()
    assert spec.local_shape()[0] == sum(
        -(-c.shape[0] // (c.cuts[0].parts if not c.cuts[0].dim else 1)) for c in spec.chunks
    )
    begin = 0
    for piece, chunk in zip(spec.pieces(first), spec.chunks):
        assert piece.begin == begin
        begin += math.prod(chunk.local_shape())
    assert begin == math.prod(spec.local_shape())


# replicas of a chunk -> its cuts. The ranks that hold the same values either divide them or leave them to one group.
REPLICAS: dict[str, list[tuple[Cut, ...]]] = {
    "data_context": [(), (Cut(0, 2),), (Cut(1, 4),), (Cut(0, 4),)],
    "world": [()],
    "self_axis": [(), (Cut(0, 2),), (Cut(0, 4), Cut(1, 2, "data")), (Cut(0, 4, "data_context"),)],
    "data": [(), (Cut(0, 4),)],
    "tensor": [(), (Cut(0, 4, "data_context"),)],
    "tensor/2": [(), (Cut(0, 2),), (Cut(0, 2), Cut(1, 2, "data"))],
}


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("replicas, cuts", [(axis, cuts) for axis, all_cuts in REPLICAS.items() for cuts in all_cuts])
def test_norm_and_checkpoint_count_every_value_once(replicas: str, cuts: tuple[Cut, ...], trainable: bool) -> None:
    """Over all ranks, what norms count and what is saved tile the tensor, whichever axis its replicas are on."""
    normed, saved = np.zeros((13, 8)), np.zeros((13, 8))
    spec = ShardSpec((Chunk("x", (13, 8), cuts),), trainable=trainable, replicas=replicas)
    cfg = OptimizerConfig()
    for ctx in contexts(Layout(16, tensor=4, data=2, context=2)):
        (piece,) = spec.pieces(ctx)
        assert spec.pieces(ctx) == spec.pieces(Place(ctx.layout, ctx.rank))
        p = new_parameter(spec, ctx)
        options: dict[str, Any] = {"grad_dtype": torch.float64, "bucket_bytes": 1 << 20, "overlap": False}
        stage = make_buckets([[p]], ctx, **options)
        for shard in Optimizer([stage], cfg).states(owned=True):
            found = piece.rectangles(shard.begin, shard.begin + len(shard.flat)) if shard.kind == "model" else []
            for offset, shape, _ in found if piece.counted else []:
                saved[tuple(slice(o, o + n) for o, n in zip(offset, shape))] += 1
        for counted in NormCounter([stage], ctx, ["x"], torch.float64).counted:
            for begin, end in counted.ranges:
                for offset, shape, _ in piece.rectangles(begin, end):
                    normed[tuple(slice(o, o + n) for o, n in zip(offset, shape))] += 1
    assert (saved == 1).all()
    assert (normed == trainable).all()


def test_gradients_are_summed_over_the_replicas_of_their_spec() -> None:
    """A weight on all of tensor 2 x data 2, to whose gradient rank r adds r + 1: the sum is 10."""
    spec = ShardSpec((Chunk("x", (6,)),), replicas="world")

    def job(ctx: ParallelContext) -> tuple[float, list[float]]:
        p = new_parameter(spec, ctx)
        stage = make_buckets([[p]], ctx, grad_dtype=torch.float64, bucket_bytes=1 << 20, overlap=False)
        assert p.main_grad is not None
        p.main_grad.fill_(ctx.rank + 1)
        stage.reduce()
        stage.wait()
        return NormCounter([stage], ctx, ["x"], torch.float64)().norm, p.main_grad.tolist()

    for norm, gradient in run_ranks(Layout(4, tensor=2, data=2), job):
        assert gradient == [10.0] * 6 and abs(norm - 600**0.5) < 1e-12


def test_a_part_that_is_only_padding_has_no_initial_values() -> None:
    """3 elements on 4 ranks: the last rank holds one element of padding, which stays zero."""
    spec = ShardSpec((Chunk("x", (3,), (Cut(0, 4),)),), init_std=0.5)
    for ctx in contexts(Layout(4, tensor=4)):
        p = new_parameter(spec, ctx)
        initialise_([p], ctx, seed=1)
        assert p.shape == (1,) and (p.item() != 0) == (ctx.rank < 3)


def test_fused_kv_with_fewer_heads_than_ranks() -> None:
    """8 query heads and 2 KV heads of width 3 on 4 ranks: ranks 0 and 1 share KV head 0. Expected values by hand."""
    kv = (6, 5), (Cut(0, 2),), ("tensor/2",)
    spec = ShardSpec((Chunk("q", (24, 5), (Cut(0, 4),)), Chunk("k", *kv), Chunk("v", *kv)))
    assert spec.local_shape() == (12, 5)
    rows = []
    for ctx in contexts(Layout(4, tensor=4)):
        assert ctx.axis("tensor/2").ranks == ((0, 1) if ctx.rank < 2 else (2, 3))
        rows.append([(p.name, p.offset[0], p.shape[0], p.begin, p.counted) for p in spec.pieces(ctx)])
    assert rows == [
        [("q", 0, 6, 0, True), ("k", 0, 3, 30, True), ("v", 0, 3, 45, True)],
        [("q", 6, 6, 0, True), ("k", 0, 3, 30, False), ("v", 0, 3, 45, False)],
        [("q", 12, 6, 0, True), ("k", 3, 3, 30, True), ("v", 3, 3, 45, True)],
        [("q", 18, 6, 0, True), ("k", 3, 3, 30, False), ("v", 3, 3, 45, False)],
    ]


def test_a_stack_of_matrices_cut_along_two_axes() -> None:
    """4 stacked matrices [3, 6]: the stack is sharded across the data axis, their columns across tensor."""
    spec = ShardSpec((Chunk("stack", (4, 3, 6), (Cut(0, 2, "data"), Cut(2, 2))),))
    assert spec.local_shape() == (2, 3, 3)
    last = spec.pieces(contexts(Layout(4, tensor=2, data=2))[3])[0]
    assert (last.offset, last.shape, last.begin, last.end) == ((2, 0, 3), (2, 3, 3), 0, 18)
    assert last.rectangles(4, 16) == [
        ((2, 1, 4), (1, 1, 2), 4),
        ((2, 2, 3), (1, 1, 3), 6),
        ((3, 0, 3), (1, 2, 3), 9),
        ((3, 2, 3), (1, 1, 1), 15),
    ]


def test_what_cannot_be_a_contiguous_run_is_rejected() -> None:
    with pytest.raises(AssertionError, match="only dim 0 can be padded"):
        Chunk("out", (4, 5), (Cut(1, 2),))
    with pytest.raises(AssertionError, match="chunks of different widths"):
        ShardSpec((Chunk("a", (4, 5)), Chunk("b", (4, 6)))).local_shape()


def test_padded_vocabulary_with_a_rank_that_holds_nothing() -> None:
    spec = ShardSpec((Chunk("embed", (5, 2), (Cut(0, 4),)),))
    pieces = [spec.pieces(ctx)[0] for ctx in contexts(Layout(4, tensor=4))]
    assert [(p.offset, p.shape) for p in pieces] == [
        ((0, 0), (2, 2)),
        ((2, 0), (2, 2)),
        ((4, 0), (1, 2)),
        ((5, 0), (0, 2)),
    ]
    assert spec.local_shape() == (2, 2)
    far = ShardSpec((Chunk("embed", (3,), (Cut(0, 8),)),)).pieces(contexts(Layout(8, tensor=8))[7])[0]
    assert far.offset == (3,) and far.shape == (0,), "an offset is never outside the tensor"


def test_row_split() -> None:
    spec = ShardSpec((Chunk("out", (4, 6), (Cut(1, 2),)),))
    assert spec.local_shape() == (4, 3)
    left, right = (spec.pieces(ctx)[0] for ctx in contexts(Layout(2, tensor=2)))
    assert left.global_shape == right.global_shape == (4, 6)
    assert (left.offset, left.shape) == ((0, 0), (4, 3)) and (right.offset, right.shape) == ((0, 3), (4, 3))
    whole = torch.arange(24).view(4, 6)
    assert torch.equal(cut_piece(right, whole), whole[:, 3:])


MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"model_num_kv_heads": 8},
    "tied qk-norm": {"model_tie_embeddings": True, "model_qk_norm": True},
    "tiny vocabulary": {"model_vocab_size": 5, "model_tie_embeddings": True},
}
DEGREES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 4, 1), (4, 2, 1), (2, 2, 2)]


def model_on(cfg: Config, ctx: ParallelContext) -> Transformer:
    return Transformer(cfg.model, Build(ctx), stage_shapes(derive(cfg).layers)[ctx.pipeline.rank])


def laid_out(degrees: tuple[int, int, int], **model: Any) -> Config:
    tensor, pipeline, data = degrees
    world = tensor * pipeline * data
    return config(world, parallel_tensor=tensor, parallel_pipeline=pipeline, parallel_data=data, **model)


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_the_model_is_counted_once_for_each_data_replica(model: str, degrees: tuple[int, int, int]) -> None:
    cfg = laid_out(degrees, **MODELS[model])
    counts = {name: np.zeros((degrees[2], *shape)) for name, shape in tensor_shapes(cfg.model).items()}
    for ctx in contexts(derive(cfg).layout, device="meta"):
        for p in parameters(model_on(cfg, ctx)):
            for piece in p.spec.pieces(ctx):
                assert piece.global_shape == counts[piece.name].shape[1:]
                if piece.counted:
                    cut_piece(piece, torch.from_numpy(counts[piece.name][ctx.data.rank])).add_(1)
    for name, count in counts.items():
        assert (count == 1).all(), name


def initialised(cfg: Config, ctx: ParallelContext) -> list[Parameter]:
    found = parameters(model_on(cfg, ctx))
    initialise_(found, ctx, cfg.train.seed)
    return found


def assembled(cfg: Config) -> dict[str, np.ndarray]:
    ranks = contexts(derive(cfg).layout)
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
    wide, narrow = (make_context(Layout(), 0, dtype=d) for d in (torch.float32, torch.bfloat16))
    for a, b in zip(initialised(cfg, wide), initialised(cfg, narrow), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_padding_is_zero(tensor: int) -> None:
    cfg = laid_out((tensor, 1, 1), model_vocab_size=5)
    padded = 0
    for ctx in contexts(derive(cfg).layout):
        for p in initialised(cfg, ctx):
            rest = torch.ones_like(p)
            for piece in p.spec.pieces(ctx):
                piece_of(piece, rest).zero_()
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
    assert qkv.spec.role is Role.MATRIX and qkv.main_grad is None and qkv.on_grad is None and qkv.requires_grad
    assert found["norm.weight"].spec.role is Role.VECTOR
    assert found["layers.0.attention.q_norm.weight"].spec.chunks[0].sum_over == ("tensor",)
    assert model.head.weight is model.embed.weight, "tied on one stage: one parameter"
    assert found["embed.weight"].spec.chunks[0].sum_over == ("tied_stages",)


def test_a_parameter_without_a_spec_is_rejected() -> None:
    with pytest.raises(AssertionError, match=r"is a sharding\.Parameter"):
        parameters(torch.nn.Linear(2, 2))
