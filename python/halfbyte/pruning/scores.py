"""How much each weight matters, by the methods that leave the weights as they are: higher scores stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import DTypeError, ModelError, NonFiniteError
from ..sparse.pattern import Pattern
from .inputs import check_seen
from .layers import Layer

LossFunction = Callable[[nn.Module, object], Tensor]


def magnitude(layer: Layer, pattern: Pattern) -> Tensor:
    """|w|, [n, k]; in blocks w^2, whose sum orders them as their L2 norm does."""
    weight = layer.weight
    return weight.square() if pattern.kind == "block" else weight.abs()


def random(layer: Layer, pattern: Pattern, generator: torch.Generator) -> Tensor:
    """A number from 0 to 1 for each weight or block, [n, k]; of that of a block each weight has its part."""
    sizes = pattern.units(torch.ones(layer.shape))
    drawn = torch.rand(sizes.shape, generator=generator, dtype=torch.float64)
    return pattern.expand(drawn / sizes, layer.shape).to(layer.parameter.device)


def wanda(layer: Layer, norms: Tensor) -> Tensor:
    """|w| * ||x_j||_2, [n, k] (Sun et al. 2023, arXiv:2306.11695). norms: [k], over all tokens."""
    weight = layer.weight
    return weight.abs() * norms.to(weight.dtype)


def taylor(
    model: nn.Module, layers: list[Layer], batches: Iterable, loss_fn: LossFunction
) -> dict[str, Tensor]:
    """The mean over batches of |w * dL/dw|, [n, k] by layer: what the loss changes by without a weight, to
    first order, in the manner of Molchanov et al. (2017, arXiv:1611.06440), for weights.

    Of the layers that any loss depends on. Gradients in `.grad` are not touched.
    """
    parameters = [layer.parameter for layer in layers]
    needed = [parameter.requires_grad for parameter in parameters]
    totals: dict[str, Tensor] = {}
    count = 0
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                loss = _check_loss(loss_fn(model, batch), count)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            count += 1
            for layer, gradient in zip(layers, gradients, strict=True):
                if gradient is not None:
                    change = (layer.weight * layer.turn(gradient)).abs()
                    totals[layer.name] = totals[layer.name] + change if layer.name in totals else change
    finally:
        for parameter, need in zip(parameters, needed, strict=True):
            parameter.requires_grad_(need)
    check_seen(count, totals, "taylor")
    return {name: total / count for name, total in totals.items()}


def _check_loss(loss: object, number: int) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise DTypeError(f"prune_: loss_fn(model, batch) must return a tensor of one number, not {found}")
    if not loss.requires_grad:
        raise ModelError("prune_: the loss has no gradient; loss_fn must not detach what it computes")
    if not math.isfinite(loss.item()):
        raise NonFiniteError(f"prune_: the loss of batch {number} is {loss.item()}")
    return loss.reshape(())
