"""Which parameters share a gradient bucket, where each is in it, and which replica owns which range. Needs no torch.

`gradients.make_buckets` makes its buckets from this partition, and the memory sheet counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from engine.distributed.specs import ShardSpec

ALIGN = 64  # elements, so that every parameter and every rank's range starts on its own cache line for any dtype

P = TypeVar("P")


class Group(Protocol):
    """Parameters with the same update rule and settings; hashable. whole_matrices: a replica owns whole parameters."""

    @property
    def whole_matrices(self) -> bool: ...


class _Ungrouped(NamedTuple):
    whole_matrices: bool = False


def ungrouped(spec: ShardSpec) -> Group:
    """The group of every parameter where no rule needs whole matrices."""
    return _Ungrouped()


@dataclass(frozen=True)
class BucketPlan(Generic[P]):
    """A bucket before it has tensors; its fields are those of `gradients.Bucket`. replicas: name of its axis."""

    params: list[P]
    starts: list[int]
    shares: list[range]
    late: bool
    even: bool
    replicas: str

    @property
    def elements(self) -> int:
        """Length of the flat tensors, with padding."""
        return self.shares[-1].stop


@dataclass(frozen=True)
class Partition(Generic[P]):
    """How parameters are divided among buckets.

    spec_of: of a parameter. size_of: name of an axis of replicas -> its number of ranks. elements: a bucket is closed
    when it has this many.
    """

    spec_of: Callable[[P], ShardSpec]
    size_of: Callable[[str], int]
    elements: int
    group_of: Callable[[ShardSpec], Group] = ungrouped

    def __call__(self, units: Sequence[Sequence[P]]) -> list[BucketPlan[P]]:
        """The buckets of the trainable parameters of these units, in reverse order (the order of the backward)."""
        plans: list[BucketPlan[P]] = []
        loads: dict[str, list[int]] = {}
        for unit in reversed(units):
            kinds: dict[tuple[str, bool], dict[Group, list[P]]] = {}
            for p in reversed(unit):
                spec = self.spec_of(p)
                if spec.trainable:
                    late = any("tied_stages" in c.sum_over for c in spec.chunks)
                    kinds.setdefault((spec.replicas, late), {}).setdefault(self.group_of(spec), []).append(p)
            for (replicas, late), groups in kinds.items():
                for run in self._runs(groups):
                    whole = any(group.whole_matrices for group, _ in run)
                    load = loads.setdefault(replicas, [0] * self.size_of(replicas)) if whole else None
                    plans.append(self._bucket([p for _, p in run], replicas, late, load))
        return plans

    def _count(self, p: P) -> int:
        return math.prod(self.spec_of(p).local_shape())

    def _runs(self, groups: Mapping[Group, list[P]]) -> list[list[tuple[Group, P]]]:
        """The parameters group by group, with a new run after `elements` elements."""
        runs: list[list[tuple[Group, P]]] = [[]]
        for group, params in groups.items():
            for p in params:
                if runs[-1] and sum(self._count(q) for _, q in runs[-1]) >= self.elements:
                    runs.append([])
                runs[-1].append((group, p))
        return runs

    def _bucket(self, params: list[P], replicas: str, late: bool, load: list[int] | None) -> BucketPlan[P]:
        """A bucket of these parameters. load: elements that each replica owns so far, if it owns whole parameters."""
        if load is not None:
            params, shares, starts = self._whole_shares(params, load)
            return BucketPlan(params, starts, shares, late, False, replicas)
        total, starts, ranks = 0, [], self.size_of(replicas)
        for p in params:
            starts.append(total)
            total += _aligned(self._count(p))
        share = -(-total // (ALIGN * ranks)) * ALIGN
        return BucketPlan(
            params, starts, [range(i * share, (i + 1) * share) for i in range(ranks)], late, True, replicas
        )

    def _whole_shares(self, params: list[P], load: list[int]) -> tuple[list[P], list[range], list[int]]:
        """Give each parameter to the replica that owns least, the largest first: (parameters by owner, shares, starts).

        load is updated. The result depends only on sizes, so that all tensor ranks of a replica own the same
        parameters.
        """
        owners: list[list[P]] = [[] for _ in load]
        owner_of: dict[int, int] = {}
        for p in sorted(params, key=lambda p: -self._count(p)):
            owner = load.index(min(load))
            load[owner] += self._count(p)
            owner_of[id(p)] = owner
        for p in params:
            owners[owner_of[id(p)]].append(p)
        shares, starts, at = [], [], 0
        for owned in owners:
            begin = at
            for p in owned:
                starts.append(at)
                at += _aligned(self._count(p))
            shares.append(range(begin, at))
        return [p for owned in owners for p in owned], shares, starts


def _aligned(elements: int) -> int:
    return -(-elements // ALIGN) * ALIGN
