"""What the core takes for the attention_mask and the position_ids of a decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .stack import CannotFuse

_CLOSED = -1e4  # what is added to a score to rule a key out; exp of it is 0


def mask_of(
    given: Any, batch: int, tokens: int, past: int, dropped: int, cached: bool, sdpa: bool, window: int
) -> Tensor | None:
    """What the core takes for an attention_mask. It rules out later keys and those before a window itself."""
    if given is None:
        return None
    if type(given) is not Tensor or not given.is_cpu:
        raise CannotFuse("its attention_mask is no plain tensor on the CPU")
    keys = past + tokens
    if given.ndim == 2:
        width = dropped + keys
        if given.shape[0] != batch or (not cached and given.shape[1] != width):
            raise CannotFuse("its attention_mask does not have the shape of the tokens")
        real = given.bool()[:, dropped:width]
        if real.shape[1] < keys:
            real = functional.pad(real, (0, keys - real.shape[1]))
        return None if real.all() else real[:, None, None]
    kinds = (torch.bool,) if sdpa else ()  # eager attention adds it, a 1 for a True too
    if given.ndim != 4 or not (given.is_floating_point() or given.dtype in kinds):
        raise CannotFuse(f"an attention_mask of {given.ndim} dimensions and {given.dtype}")
    sizes = zip(given.shape, (batch, None, tokens, keys), strict=True)
    if dropped or any(whole is not None and size not in (1, whole) for size, whole in sizes):
        raise CannotFuse("its attention_mask does not have the shape of the tokens")
    # Such a mask is all that the model's own attention looks at.
    full = given.expand(-1, -1, tokens, keys)
    open_ = full if given.dtype is torch.bool else full > _CLOSED
    distance = torch.arange(past, keys)[:, None] - torch.arange(keys)
    outside = (distance < 0) | (distance >= window) if window else distance < 0
    if (open_ & outside).any():
        raise CannotFuse("an attention_mask that lets a token see later ones, or beyond the window")
    return given


def positions_of(given: Any, batch: int, tokens: int, seen: int, packing: bool) -> Tensor | None:
    """position_ids [batch, tokens]; None where they follow those that were seen."""
    if given is None:
        return None
    if type(given) is not Tensor or not given.is_cpu or given.dtype.is_floating_point:
        raise CannotFuse("its position_ids are no plain tensor of integers on the CPU")
    if given.ndim != 2 or given.shape[0] not in (1, batch) or given.shape[1] != tokens:
        raise CannotFuse("its position_ids do not have the shape of the tokens")
    if given.numel() == 1:
        if int(given) == seen:
            return None
    elif (given == torch.arange(seen, seen + tokens)).all():
        return None
    if packing and (given.diff(dim=1) != 1).any():
        raise CannotFuse("position_ids that jump mean several texts in one row")
    return given.long().expand(batch, tokens)
