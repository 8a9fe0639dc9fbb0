"""Continue a prompt with a checkpoint, on one process (a checkpoint of any layout loads there).

The whole sequence is computed again for every new token: simple, and fast enough for a look at a model's progress.
There is no key/value cache yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import ConfigError, FieldError
from engine.model.layers import ModelPart
from engine.ops.draws import Key, rectangle, uniform


def sample(
    model: ModelPart,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    prepend_bos: bool = False,
) -> Iterator[str]:
    """Yield the continuation in pieces of text until the end-of-document token or max_tokens.

    temperature 0 takes the most likely token each time; otherwise tokens are sampled among the top_k most likely (0:
    all), determined by seed and prompt. prepend_bos: start with BOS, as `engine prepare --prepend-bos` does; DataError
    if the tokenizer has none. ConfigError if the prompt fills the model's positions.
    """
    prefix = [tokenizer.bos] if prepend_bos else []
    ids = [*prefix, *tokenizer.encode(prompt)] or [tokenizer.eod]
    limit = model.cfg.max_seq_len
    if len(ids) >= limit:
        problem = f"fills the model's {limit} positions"
        raise ConfigError(
            [FieldError("inference.prompt-too-long", "--prompt", f"{len(ids)} tokens", problem, "Shorten the prompt.")]
        )
    places = rectangle((limit,), (len(ids),), (limit - len(ids),), torch.device("cpu"))
    draws = uniform(Key.of(seed, "sample", name=prompt), places)[0].double()  # of the positions to come
    shown = tokenizer.decode(ids)
    for draw in draws[:max_tokens]:
        with torch.no_grad():
            logits = model.logits(torch.tensor([ids], device=model.ctx.device))[0, -1].double().cpu()
        logits = logits[: tokenizer.vocab_size]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            values, choices = logits.topk(min(top_k or len(logits), len(logits)))
            below = (values / temperature).softmax(0).cumsum(0)  # the last is 1, or nearly
            token = int(choices[min(int((below <= draw * below[-1]).sum()), len(choices) - 1)])
        if token == tokenizer.eod:
            return
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # an incomplete character: wait for its other bytes
            yield text[len(shown) :]
            shown = text
