"""The model in plain torch, without code of the engine: the reference of losses and gradients."""

from __future__ import annotations

from typing import Any

import torch

from engine.config.schema import ModelConfig
from tests.support.numbers import attention_reference, rms_norm_reference, rope_reference, swiglu_reference


def hidden_keys(cfg: ModelConfig, layer: int, starts: list[list[int]]) -> torch.Tensor:
    """bool [b, s, s]: keys in another document, or before the window of a layer that has one. Element by element."""
    window = cfg.window if (cfg.window_layers or "w")[layer % max(1, len(cfg.window_layers))] == "w" else 0
    hidden = [
        [
            [begin[i] != begin[j] or (window > 0 and i - j >= window) for j in range(len(begin))]
            for i in range(len(begin))
        ]
        for begin in starts
    ]
    return torch.tensor(hidden)


def plain_logits(
    cfg: ModelConfig, w: dict[str, torch.Tensor], batch: Any, starts: Any = None, drop: Any = lambda name, x: x
) -> torch.Tensor:
    """Logits [s, b, vocab_size], by torch's autograd without code of the engine.

    starts: of the document of each position of each row; None: each row is one document. drop: dropout at a place.
    """
    b, s = batch.tokens.shape
    starts = starts or [[0] * s] * b
    norm = lambda x, name: rms_norm_reference(x, w[f"{name}.weight"], cfg.norm_eps)  # noqa: E731
    x = drop("embed", w["embed.weight"][batch.tokens.t()])
    after = "norm" if cfg.norm_position == "post" else "post_norm"
    for layer in range(cfg.num_layers):
        at = f"layers.{layer}"
        y = x if cfg.norm_position == "post" else norm(x, f"{at}.attention_norm")
        q, k, v = ((y @ w[f"{at}.attention.{part}.weight"].t()).view(s, b, -1, cfg.head_dim) for part in "qkv")
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        if cfg.qk_norm:
            q, k = norm(q, f"{at}.attention.q_norm"), norm(k, f"{at}.attention.k_norm")
        q, k = rope_reference(q, cfg.rope_theta), rope_reference(k, cfg.rope_theta)
        heads = attention_reference(q, k, v, hidden_keys(cfg, layer, starts))
        attended = heads @ w[f"{at}.attention.out.weight"].t()
        if cfg.norm_position != "pre":
            attended = norm(attended, f"{at}.attention_{after}")
        attended = drop(f"{at}.attention", attended)
        between = x if cfg.parallel_residual else x + attended
        y = between if cfg.norm_position == "post" else norm(between, f"{at}.mlp_norm")
        fused = torch.cat([y @ w[f"{at}.mlp.{part}.weight"].t() for part in ("gate", "up")], -1)
        added = drop(f"{at}.mlp.inner", swiglu_reference(fused)) @ w[f"{at}.mlp.down.weight"].t()
        added = added if cfg.norm_position == "pre" else norm(added, f"{at}.mlp_{after}")
        x = x + attended + drop(f"{at}.mlp", added)
    return norm(x, "norm") @ w["embed.weight" if cfg.tie_embeddings else "head.weight"].t()


def plain_loss(
    cfg: ModelConfig, w: dict[str, torch.Tensor], batch: Any, starts: Any = None, drop: Any = lambda name, x: x
) -> torch.Tensor:
    """The sum of the losses of the counted tokens. starts, drop: as for plain_logits."""
    logits = plain_logits(cfg, w, batch, starts, drop)
    losses = torch.nn.functional.cross_entropy(logits.permute(1, 2, 0), batch.labels, reduction="none")
    return (losses * batch.weights).sum()


def plain_z(cfg: ModelConfig, w: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
    """The sum of (log Z)^2 of the counted tokens."""
    return (plain_logits(cfg, w, batch).exp().sum(-1).log().square() * batch.weights.t()).sum()
