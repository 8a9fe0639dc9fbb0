"""Seeds: every bit of the run's seed matters, and no seed has more bits than torch uses."""

from __future__ import annotations

import torch

from engine.data.samples.order import derive_key
from engine.distributed.rng import generator, seed_for
from engine.errors import ConfigError
from tests.support.cases import config
from tests.support.errors import raises


def test_torch_takes_32_bits_of_a_seed_and_ours_have_no_more() -> None:
    def draw(seed: int) -> torch.Tensor:
        return torch.rand(4, generator=torch.Generator("cpu").manual_seed(seed))

    assert torch.equal(draw(5), draw(5 + 2**32)), "torch now uses more bits: let seed_for return them"
    seeds = [seed_for(1234, "init", f"layers.{i}.w") for i in range(2000)]
    assert max(seeds).bit_length() == 32 and len(set(seeds)) == len(seeds)


def test_every_bit_of_the_run_seed_counts() -> None:
    seeds = [0, *(1 << bit for bit in range(63))]
    assert len({generator(seed, "init", "w").initial_seed() for seed in seeds}) == 64
    assert len({derive_key(seed, "samples", 0) for seed in seeds}) == 64
    assert config(1, train_seed=2**63 - 1).train.seed == 2**63 - 1
    with raises(ConfigError, "config.value-not-valid", "train.seed", 2**63):
        config(1, train_seed=2**63)
