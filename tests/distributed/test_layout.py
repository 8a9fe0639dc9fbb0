"""The rank grid: coordinates and ranks are inverse, every axis partitions the ranks, replica and tied groups match."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.distributed.layout import AXES, Layout
from engine.errors import LayoutError
from tests.support.errors import raises


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tensor, pipeline, data, context = (draw(st.integers(1, n)) for n in (8, 5, 4, 3))
    world = tensor * pipeline * data * context
    return Layout(world, tensor=tensor, pipeline=pipeline, data=data, context=context)


quick = settings(deadline=None, max_examples=60)


@quick
@given(layouts())
def test_rank_and_coords_are_inverse(layout: Layout) -> None:
    seen = [layout.coords(rank) for rank in range(layout.world)]
    assert [layout.rank(at) for at in seen] == list(range(layout.world))
    assert len({tuple(at.values()) for at in seen}) == layout.world
    for axis in AXES:
        assert {at[axis] for at in seen} == set(range(getattr(layout, axis)))
    assert seen == sorted(seen, key=lambda at: list(at.values()))  # tensor fastest, then context, data, pipeline


@quick
@given(layouts())
def test_groups_partition_the_ranks(layout: Layout) -> None:
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(chain(*groups)) == list(range(layout.world))
        for group in groups:
            assert len(group) == getattr(layout, axis)
            for position, rank in enumerate(group):
                assert layout.group(axis, rank) == group
                at = layout.coords(rank)
                assert at[axis] == position
                assert at | {axis: 0} == layout.coords(group[0])


@quick
@given(layouts(), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24]))
def test_tensor_replicas_hold_the_same_heads(layout: Layout, num_kv_heads: int) -> None:
    t, n = layout.tensor, num_kv_heads
    if n % t and t % n:
        return  # the config rejects it
    for rank in range(layout.world):
        group = layout.axes(rank)[f"tensor/{min(n, t)}"]

        def heads(r: int) -> range:
            at = layout.coords(r)["tensor"]
            return range(at * n // t, max(at * n // t + 1, (at + 1) * n // t))

        assert group == tuple(r for r in layout.group("tensor", rank) if heads(r) == heads(rank))
        assert rank in group and len(group) == max(1, t // n)


@quick
@given(layouts())
def test_every_axis_partitions_the_ranks(layout: Layout) -> None:
    views = [layout.axes(rank) for rank in range(layout.world)]
    for name in views[0]:
        for rank, view in enumerate(views):
            assert rank in view[name] and all(views[other][name] == view[name] for other in view[name])
    for rank, view in enumerate(views):
        at, outside = layout.coords(rank), ("pipeline", "tensor")
        same = [r for r in range(layout.world) if all(layout.coords(r)[name] == at[name] for name in outside)]
        assert list(view["data_context"]) == same


@quick
@given(layouts())
def test_groups_of_tied_stages(layout: Layout) -> None:
    for rank in range(layout.world):
        at = layout.coords(rank)
        group = layout.tied_stages_group(rank)
        if at["pipeline"] in (0, layout.pipeline - 1):
            stages = [0, layout.pipeline - 1] if layout.pipeline > 1 else [0]
            assert group == tuple(layout.rank(at | {"pipeline": stage}) for stage in stages)
        else:
            assert group == (rank,)
        assert all(layout.tied_stages_group(other) == group for other in group)


def test_the_ranks_that_talk_most_are_neighbours() -> None:
    layout = Layout(16, tensor=2, pipeline=2, data=4)
    assert layout.groups("tensor")[:2] == ((0, 1), (2, 3))
    assert layout.group("data", 1) == (1, 3, 5, 7)
    assert layout.group("pipeline", 1) == (1, 9)
    assert layout.coords(11) == {"pipeline": 1, "data": 1, "context": 0, "tensor": 1}


@quick
@given(layouts())
def test_the_table_shows_every_rank_once(layout: Layout) -> None:
    shown: list[int] = []
    for line in layout.table().splitlines():
        first, last = line.split("ranks ")[1].split("..")
        shown += range(int(first), int(last) + 1)
    assert shown == list(range(layout.world))


@pytest.mark.parametrize(
    ("degrees", "code", "named"),
    [
        ({"world": 8, "tensor": 3}, "distributed.degrees-do-not-fit", "1 3 8"),
        ({"world": 1, "data": 2}, "distributed.degrees-do-not-fit", "2 1"),
        ({"world": 1, "pipeline": 0}, "distributed.degree-below-one", "0 1"),
        ({"world": 1, "tensor": -1, "data": -1}, "distributed.degree-below-one", "1"),
    ],
)
def test_wrong_degrees(degrees: dict[str, int], code: str, named: str) -> None:
    with raises(LayoutError, code, *named.split()):
        Layout(**degrees)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside(rank: int) -> None:
    with raises(LayoutError, "distributed.no-such-rank", rank, "0..3"):
        Layout(4, tensor=4).coords(rank)


def test_4096_ranks_cost_nothing() -> None:
    layout = Layout(4096, tensor=8, pipeline=8, data=64)
    assert len(layout.groups("data")) == 64
    assert layout.group("pipeline", 4095) == tuple(range(511, 4096, 512))
