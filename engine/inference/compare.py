"""Compare, layer by layer, the logits of an export in transformers with those of its checkpoint in the engine.

Both compute in float32 from the exported weights on the same tokens, so only the rounding of sums may differ. Its
effect is measured on the model itself: the engine runs a second time with noise at every layer, as large as the
rounding of a sum of hidden_size terms (unit roundoff x sqrt(hidden_size) x the token's root mean square); the
difference of the two runs includes how the layers amplify it. transformers may differ by `SAFETY` times as much:
correct exports of all families, 32 to 256 wide and 2 to 48 deep, stay below 2.4 times, most below 1, while a wrong
rope_theta, epsilon or order of heads is far above.

An epsilon matters only where activations are small. So everything runs twice, the second time with the input of the
first layer scaled down to the square root of norm_eps.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint.storage import DISK, Storage
from engine.distributed.context import make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import parameters
from engine.errors import CheckpointError, ConfigError, FieldError
from engine.inference.load import config_of, load_stage
from engine.interop.huggingface.config_json import read_json_object
from engine.interop.huggingface.families import FAMILIES

SAFETY = 8.0
_ROUNDOFF = 2.0**-24
Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison. difference: max error of the logits; bound: the part that rounding explains.

    largest: the largest logit. problem: description of the first difference that is too large, else empty.
    """

    difference: float
    bound: float
    largest: float
    problem: str = ""


def need_transformers() -> None:
    """Raise ConfigError if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        fix = "Install it: pip install transformers."
        raise ConfigError([FieldError("inference.no-transformers", "--verify", True, "needs transformers", fix)])


def compare_with_transformers(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    storage: Storage = DISK,
    *,
    num_tokens: int = 128,
) -> Comparison:
    """Compare the logits of a checkpoint in the engine with those of its export `folder` in transformers.

    dtype: of the exported weights, to which the engine's are rounded; None: unchanged. Raises CheckpointError if
    transformers does not load the folder.
    """
    theirs = _load_theirs(folder)
    cfg = config_of(checkpoint, storage)
    ctx = make_context(Layout(), 0, dtype=torch.float32)
    ours = load_stage(checkpoint, cfg, ctx, storage)
    if dtype is not None:
        for parameter in parameters(ours):
            parameter.data.copy_(parameter.data.to(dtype))
    family = FAMILIES[str(read_json_object(folder / "config.json")["model_type"])]
    block = family.names["layers.{}.attention_norm"].rsplit(".", 1)[0]
    their_layers = [theirs.get_submodule(block.format(layer)) for layer in range(cfg.model.num_layers)]
    shape = (2, min(num_tokens, cfg.model.max_seq_len))
    tokens = torch.randint(cfg.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    our_layers = list(ours.layers.values())
    small = math.sqrt(cfg.model.norm_eps)
    first: Comparison | None = None
    for scale in (_identity, lambda x: x * (small / _size(x).mean().clamp(min=small))):
        a = _layer_states(our_layers, lambda: ours.logits(tokens), scale)
        again = _layer_states(
            our_layers, lambda: ours.logits(tokens), scale, partial(_noisy, torch.Generator().manual_seed(1))
        )
        b = _layer_states(their_layers, lambda: theirs(tokens, use_cache=False).logits, scale)
        a, again = ([x.transpose(0, 1) for x in states[:-1]] + states[-1:] for states in (a, again))
        found = _compare_states(a, again, b)
        first = first or found
        if found.problem:
            return found
    assert first is not None
    return first


def _load_theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers raises many types
        raise CheckpointError(
            "inference.export-not-loaded", f"{folder}: transformers cannot load it: {str(error)[:500]}"
        ) from error
    model, info = loaded
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise CheckpointError(
            "inference.export-tensors-differ",
            f"{folder}: these tensors are missing or unknown to transformers: {', '.join(wrong[:5])}",
        )
    return model.eval()


def _identity(x: Tensor) -> Tensor:
    return x


def _size(x: Tensor) -> Tensor:
    """Root mean square of each token."""
    return x.square().mean(-1, keepdim=True).sqrt()


def _noisy(generator: torch.Generator, x: Tensor) -> Tensor:
    uniform = torch.rand(x.shape, generator=generator) * 2 - 1
    return x + uniform * (_ROUNDOFF * math.sqrt(x.shape[-1])) * _size(x)


def _layer_states(
    layers: Sequence[nn.Module], compute: Callable[[], Tensor], scale: Transform, noise: Transform = _identity
) -> list[Tensor]:
    """Input of the first layer, output of each layer (both after `noise`), and the logits.

    scale: applied to the input of the first layer.
    """
    states: list[Tensor] = []

    def before_first_layer(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states.append(noise(scale(inputs[0])))
        return (states[-1], *inputs[1:])

    def after_layer(module: nn.Module, inputs: Any, output: Any) -> Any:
        states.append(noise(output[0] if isinstance(output, tuple) else output))
        return (states[-1], *output[1:]) if isinstance(output, tuple) else states[-1]

    with ExitStack() as stack, torch.no_grad():
        stack.callback(layers[0].register_forward_pre_hook(before_first_layer).remove)
        for layer in layers:
            stack.callback(layer.register_forward_hook(after_layer).remove)
        logits = compute()
    return [*states, logits]


def _compare_states(ours: Sequence[Tensor], again: Sequence[Tensor], theirs: Sequence[Tensor]) -> Comparison:
    names = ["the embedding", *(f"layer {number}" for number in range(len(ours) - 2)), "the final norm or the head"]
    difference = bound = largest = 0.0
    problem = ""
    for name, a, noisy, b in zip(names, ours, again, theirs, strict=True):
        difference, largest = float((a - b).abs().max()), float(a.abs().max())
        rounding = _ROUNDOFF * math.sqrt(ours[0].shape[-1]) * largest
        bound = SAFETY * max(float((a - noisy).abs().max()), rounding)
        if problem:
            continue
        if not (math.isfinite(largest) and math.isfinite(difference)):
            owner = "the engine's" if not math.isfinite(largest) else "transformers'"
            problem = f"{owner} values after {name} are not finite"
        elif not difference <= bound:
            problem = (
                f"{name} is the first that differs: max error {difference:.2e} for values up to {largest:.2e}, while "
                f"rounding explains {bound:.2e}"
            )
    return Comparison(difference, bound, largest, problem)
