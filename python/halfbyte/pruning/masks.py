"""Masks as torch.nn.utils.prune has them (weight_orig, weight_mask, a hook): put on, taken off, counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..modules import check_module, float_weight, is_linear, is_masked, shape_of
from ..tables import text_table
from .layers import Layer, mask_hook


@dataclass(frozen=True)
class LayerSparsity:
    """The zeros of one linear layer."""

    name: str
    shape: tuple[int, int]  # (output channels, input features)
    zeros: int
    masked: bool  # a mask holds the pruned ones at zero

    @property
    def total(self) -> int:
        return math.prod(self.shape)

    @property
    def amount(self) -> float:
        """The share of zeros."""
        return self.zeros / self.total if self.total else 0.0


@dataclass(frozen=True)
class Sparsity:
    """The zeros of the linear layers of a model, as a table (`str`)."""

    layers: tuple[LayerSparsity, ...]

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers)

    @property
    def amount(self) -> float:
        """The share of zeros in all layers together."""
        return self.zeros / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [
            [x.name or "(the model)", f"{x.shape[1]} -> {x.shape[0]}", str(x.zeros), _percent(x.amount)]
            + ["yes" if x.masked else ""]
            for x in self.layers
        ]
        rows.append(["all", "", str(self.zeros), _percent(self.amount), ""])
        return text_table(["layer", "in -> out", "zeros", "share", "mask"], rows)


def sparsity(model: nn.Module) -> Sparsity:
    """The zeros in the float linear layers of `model` (nn.Linear, its subclasses, Conv1D), masks applied.

    A layer that the model holds under several names counts once, layers that share a weight count each.
    Raises DTypeError for what is no module.
    """
    check_module(model, "sparsity")
    layers = []
    for name, module in model.named_modules():
        if not (is_linear(module) or isinstance(module, nn.Linear)):
            continue
        weight = float_weight(module)
        zeros = weight.numel() - int(weight.count_nonzero())
        layers.append(LayerSparsity(name, shape_of(module), zeros, is_masked(module)))
    return Sparsity(tuple(layers))


def remove_masks_(model: nn.Module) -> nn.Module:
    """Make the masks of `model` permanent, in place: pruned weights become zeros. Returns the model.

    That is torch.nn.utils.prune.remove for every tensor of every module, whoever masked it. Parameters stay
    the same objects, but for a weight that something without a mask has too (an embedding, say), which keeps
    it: the masked layer then gets a weight of its own. A model without masks stays as it is. Raises
    DTypeError for what is no module.
    """
    check_module(model, "remove_masks_")
    unmasked = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (name.removesuffix("_orig"), name) not in _masked(module)
    }
    for module in model.modules():
        for name, kept in _masked(module):
            parameter = module._parameters[kept]
            if id(parameter) in unmasked:
                module._parameters[kept] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            prune.remove(module, name)
    return model


def put(layer: Layer, keep: Tensor) -> None:
    """Mask the weight of a layer, on top of a mask that it may have. keep: bool [n, k]."""
    keep = layer.turn(keep if layer.mask is None else keep & layer.mask).contiguous()
    for module in layer.modules:
        hook = mask_hook(module)
        if hook is None:
            hook = prune.CustomFromMask.apply(module, "weight", keep)
        else:
            # Not through torch's container, which would keep the mask of every step of a schedule.
            module.weight_mask = keep.to(module.weight_mask.dtype)
        with torch.no_grad():  # a tensor without history, so that the model can still be deep-copied
            hook(module, ())


def _masked(module: nn.Module) -> list[tuple[str, str]]:
    """The names of the tensors of a module that are masked, and of the parameters behind them."""
    hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]
    return [(hook._tensor_name, f"{hook._tensor_name}_orig") for hook in hooks]


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
