"""Masks as torch.nn.utils.prune has them (weight_orig, weight_mask, a hook): put on, taken off, counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..modules import check_module, float_weight, is_linear, is_masked, shape_of
from ..tables import text_table
from .layers import Layer, check_mask, mask_hook


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
    Raises DTypeError for what is no module, ShapeError, naming the layer, for a mask of another shape.
    """
    check_module(model, "sparsity")
    layers = []
    for name, module in model.named_modules():
        if not (is_linear(module) or isinstance(module, nn.Linear)):
            continue
        if is_masked(module):
            check_mask(name, module, "weight", "sparsity")
        weight = float_weight(module)
        zeros = weight.numel() - int(weight.count_nonzero())
        layers.append(LayerSparsity(name, shape_of(module), zeros, is_masked(module)))
    return Sparsity(tuple(layers))


def remove_masks_(model: nn.Module) -> nn.Module:
    """Make the masks of `model` permanent, in place: pruned weights become zeros. Returns the model.

    That is torch.nn.utils.prune.remove for every tensor of every module, whoever masked it; what is pruned is
    0 whatever it was, an infinity too. Parameters stay the same objects, but where not all that have one are
    masked alike: what has no mask (an embedding, say), or else the first mask, keeps it, and each other mask
    gets a parameter of its own, so that no output changes. A model without masks stays as it is. Raises
    DTypeError for what is no module, ShapeError, naming the layer, for a mask of another shape than its
    weight; the model is as it was then.
    """
    check_module(model, "remove_masks_")
    found = [(name, module, tensor) for name, module in model.named_modules() for tensor in _masked(module)]
    for name, module, tensor in found:
        check_mask(name, module, tensor, "remove_masks_")
    holders: dict[int, list[_Kept]] = {}
    for module in model.modules():
        masked = {f"{tensor}_orig" for tensor in _masked(module)}
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in masked:
                holders[id(parameter)] = [_Kept(parameter, None, parameter)]
    new = []
    for _, module, tensor in found:
        kept = holders.setdefault(id(module._parameters[f"{tensor}_orig"]), [])
        new.append((module, tensor, _kept(kept, module, tensor)))
    for module, tensor, kept in new:
        _unmask(module, tensor, kept.parameter)
    for kept in {id(kept): kept for _, _, kept in new}.values():
        kept.parameter.data = kept.value
    return model


@dataclass(frozen=True)
class _Kept:
    """What remains of a parameter under one mask."""

    parameter: nn.Parameter
    mask: Tensor | None
    value: Tensor  # with the mask's zeros, to be written to `parameter`


def _kept(kept: list[_Kept], module: nn.Module, tensor: str) -> _Kept:
    """The one of `kept`, those of the same parameter, that has the mask of this tensor; added if new."""
    parameter, mask = module._parameters[f"{tensor}_orig"], module._buffers[f"{tensor}_mask"]
    for one in kept:
        if one.mask is mask or (one.mask is not None and torch.equal(one.mask, mask)):
            return one
    values = parameter.detach()
    value = (values * mask.to(values.dtype)).masked_fill(mask == 0, 0)
    if kept:
        parameter = nn.Parameter(value, parameter.requires_grad)
    kept.append(_Kept(parameter, mask, value))
    return kept[-1]


def _unmask(module: nn.Module, tensor: str, parameter: nn.Parameter) -> None:
    """Take the mask, its hook and the unmasked parameter away, and give the module `parameter` instead."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == tensor:
            del module._forward_pre_hooks[key]
    del module._parameters[f"{tensor}_orig"], module._buffers[f"{tensor}_mask"]
    setattr(module, tensor, parameter)


def put(layer: Layer, keep: Tensor) -> None:
    """Mask the weight of a layer, on top of a mask that it may have. keep: bool [n, k].

    Modules that share the weight share the very mask.
    """
    keep = layer.turn(keep if layer.mask is None else keep & layer.mask).contiguous()
    shared = None
    for module in layer.modules:
        hook = mask_hook(module)
        if hook is None:
            hook = prune.CustomFromMask.apply(module, "weight", keep)
        # Of a hook that was there not through torch's container, which would keep the mask of every step of a
        # schedule.
        shared = keep.to(module.weight_mask.dtype) if shared is None else shared
        module.weight_mask = shared
        with torch.no_grad():  # a tensor without history, so that the model can still be deep-copied
            hook(module, ())


def _masked(module: nn.Module) -> list[str]:
    """The names of the tensors of a module that are masked."""
    hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]
    return [hook._tensor_name for hook in hooks]


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
