"""How the next token is chosen: the likeliest, or drawn at random as transformers draws it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .errors import DTypeError

Pick = Callable[[Tensor], np.ndarray]  # logits float32 [batch, vocabulary] -> tokens int64 [batch]

# Likeliest tokens, among which top_p mostly finds its mass: to sort all of 49152 takes 3 ms, these 0.1.
_CANDIDATES = 256


def greedy(logits: Tensor) -> np.ndarray:
    """The likeliest token of each row, the first of several; a tenth of the time of torch.argmax."""
    return logits.numpy().argmax(-1)


def sampler(temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Pick:
    """Draws each token by its probability, after dividing logits by `temperature`, keeping the `top_k`
    likeliest (0: all), and of those the fewest whose probabilities reach `top_p`. Raises ValueError.

    It takes from the generator what transformers takes: with one seed both draw the same tokens.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be positive; do_sample=False takes the likeliest")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise DTypeError(f"top_k {top_k!r} must be an integer")
    if top_k < 0:
        raise ValueError(f"top_k {top_k} must not be negative; 0 keeps all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and at most 1, which keeps all tokens")

    def pick(logits: Tensor) -> np.ndarray:
        if temperature != 1:
            logits = logits / temperature
        if 0 < top_k < logits.shape[-1]:
            least = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if top_p < 1:
            logits = _nucleus(logits, top_p, top_k)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].numpy()

    return pick


def _nucleus(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Rules out each token that likelier ones precede whose probabilities reach `top_p` without it."""
    probabilities, every = logits.softmax(-1), logits.shape[-1]
    top = probabilities.topk(min(top_k or _CANDIDATES, every))
    if not top_k and (top.values.sum(-1) < top_p).any():
        top = probabilities.topk(every)
    before = top.values.cumsum(-1) - top.values
    kept = logits.gather(-1, top.indices).masked_fill_(before >= top_p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter_(-1, top.indices, kept)
