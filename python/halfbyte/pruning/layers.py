"""The linear layers of a model that prune_ may put masks on, and why it leaves the others alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from ..arrays import wraps
from ..errors import DeviceError, DTypeError, ModelError, NonFiniteError, ShapeError
from ..modules import float_weight, is_linear, is_masked, join, shape_of, sites, weight_parameter
from ..qlinear import QLinear
from ..rules import Patterns, _patterns
from ..sparse.pattern import PRUNED, ZERO, Pattern

# Names that transformers gives to the layers that make its models' outputs.
HEADS = ("lm_head", "score", "classifier", "qa_outputs")

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass
class Layer:
    """One weight to prune and the linear layers that have it, several where they are tied."""

    name: str
    modules: list[nn.Module]
    parameter: nn.Parameter  # as the modules keep it: `weight`, or `weight_orig` under a mask
    names: list[str] = field(default_factory=list)  # the first one of each module
    asked: bool = True  # `include` names all of them

    @property
    def transposed(self) -> bool:
        """Whether it is a Conv1D, whose parameter is [k, n]."""
        return not isinstance(self.modules[0], nn.Linear)

    @property
    def mask(self) -> Tensor | None:
        """What an earlier pruning left, bool [n, k]; None without one."""
        mask = self.modules[0]._buffers.get("weight_mask")
        return None if mask is None else self.turn(mask != 0)

    @property
    def weight(self) -> Tensor:
        """As it is multiplied with, [n, k], of float32 or float64."""
        weight = self.turn(self.parameter.detach())
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return weight if self.mask is None else weight.masked_fill(~self.mask, 0)

    @property
    def shape(self) -> tuple[int, int]:
        return shape_of(self.modules[0])

    def turn(self, x: Tensor) -> Tensor:
        """From the layout of the parameter to [n, k], or back."""
        return x.t() if self.transposed else x

    def rank(self, scores: Tensor) -> Tensor:
        """Scores [n, k] for Pattern.select: what is pruned or zero already goes first.

        Raises NonFiniteError for a NaN or an infinity.
        """
        if not scores.isfinite().all():
            row = int((~scores.isfinite()).any(1).to(torch.uint8).argmax())
            name = self.name or "the model"
            raise NonFiniteError(f"prune_: the scores of {name} hold a NaN or an infinity in row {row}")
        ranked = scores.masked_fill(self.weight == 0, ZERO)
        return ranked if self.mask is None else ranked.masked_fill(~self.mask, PRUNED)


class Choice:
    """The include and exclude patterns of prune_, as in quantize_."""

    def __init__(self, include: Patterns, exclude: Patterns):
        self.include = None if include is None else _patterns(include)
        self.exclude = _patterns(exclude or ())

    def refusal(self, names: list[str]) -> str:
        """Why a layer with these names stays as it is; empty where it does not."""
        if any(p.fits(*names) for p in self.exclude):
            return "excluded"
        return "" if self.include is None or self.asked(names) else "not included"

    def asked(self, names: list[str]) -> bool:
        """Whether `include` names such a layer."""
        return self.include is not None and any(p.fits(*names) for p in self.include)

    def idle(self, names: Iterable[str]) -> list[str]:
        """The patterns that fit none of the names, quoted."""
        names = list(names)
        return [repr(p.text) for p in (*(self.include or ()), *self.exclude) if not p.fits(*names)]


def find(
    model: nn.Module, choice: Choice, pattern: Pattern, updates: bool
) -> tuple[list[Layer], list[dict[str, Any]]]:
    """The layers to prune, and rows of the report on those that stay dense.

    updates: whether weights are to change beyond their mask, which those who share them would notice.
    """
    refuse_quantized(model)
    heads = _output_embeddings(model)
    layers: dict[int, Layer] = {}
    report = []
    for names, module, _ in sites(model):
        if not (is_linear(module) or isinstance(module, nn.Linear)):
            continue
        reason = choice.refusal(names) or obstacle(module)
        if not reason and not choice.asked(names):
            reason = _head(names, module, heads)
        if reason:
            report.append(dense_row(names[0], module, reason))
            continue
        parameter = _check(names[0], module)
        layer = layers.setdefault(id(parameter), Layer(names[0], [], parameter))
        layer.modules.append(module)
        layer.names.append(names[0])
        layer.asked &= choice.asked(names)
    holders = _holders(model)
    for key, layer in list(layers.items()):
        others = [name for name, module in holders[key] if module not in layer.modules]
        if reason := _unfit(layer, pattern, others, updates):
            report += [dense_row(n, m, reason) for n, m in zip(layer.names, layer.modules, strict=True)]
            del layers[key]
    return list(layers.values()), report


def names_of(model: nn.Module) -> list[str]:
    """All names of the linear layers, pruned or not."""
    linear = [names for names, m, _ in sites(model) if isinstance(m, nn.Linear) or is_linear(m)]
    return [name for names in linear for name in names]


def refuse_quantized(model: nn.Module) -> None:
    """ModelError if the model has quantized or sparse layers."""
    sparse = getattr(sys.modules.get("halfbyte.sparse.linear"), "SparseLinear", QLinear)
    for name, module in model.named_modules():
        if isinstance(module, QLinear | sparse):
            raise ModelError(
                f"prune_: {name or 'the model'} is a {type(module).__name__} already; prune the float model, "
                "before quantize_ and sparsify_"
            )


def dense_row(name: str, module: nn.Module, reason: str) -> dict[str, Any]:
    """A row of the report on a layer that stays dense."""
    return {"name": name, "shape": shape_of(module), "action": "dense", "reason": reason}


def obstacle(module: nn.Module) -> str:
    """Why a linear layer cannot have a mask; empty where it can."""
    if not is_linear(module):
        return f"{type(module).__name__} is a subclass of nn.Linear"
    weight = weight_parameter(module)
    if weight is None or (is_masked(module) and mask_hook(module) is None):
        return "its weight is computed by a hook (weight_norm?), not a parameter"
    return f"its weight is a {type(weight).__name__}, not a plain tensor" if wraps(weight) else ""


def mask_hook(module: nn.Module) -> BasePruningMethod | None:
    """The hook of torch.nn.utils.prune that masks the weight of a module."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            return hook
    return None


def check_mask(name: str, module: nn.Module, tensor: str, what: str) -> None:
    """ShapeError if the mask of a tensor of a module has another shape than the parameter that it is for."""
    mask, shape = module._buffers[f"{tensor}_mask"].shape, module._parameters[f"{tensor}_orig"].shape
    if mask != shape:
        raise ShapeError(
            f"{what}: {join(name, f'{tensor}_mask')} has the shape {tuple(mask)}, the {tensor} {tuple(shape)}"
        )


def _check(name: str, module: nn.Module) -> nn.Parameter:
    """The parameter behind the weight; errors for one that has no values to look at."""
    weight, masked = weight_parameter(module), is_masked(module)
    what = join(name, "weight_orig" if masked else "weight")
    if weight.is_meta:
        raise DeviceError(f"prune_: {what} is on the meta device, without data; load its values first")
    if weight.dtype not in _DTYPES:
        raise DTypeError(f"prune_: {what} has the dtype {weight.dtype}; it must be one of floating point")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ShapeError(f"prune_: {what} has the shape {tuple(weight.shape)}: nothing to prune; exclude it")
    if masked:
        check_mask(name, module, "weight", "prune_")
        mask = module._buffers["weight_mask"]
        if not ((mask == 0) | (mask == 1)).all():
            raise NonFiniteError(f"prune_: {join(name, 'weight_mask')} holds more than zeros and ones")
    if not float_weight(module).isfinite().all():
        raise NonFiniteError(f"prune_: {what} holds a NaN or an infinity")
    return weight


def _head(names: list[str], module: nn.Module, heads: list[nn.Module]) -> str:
    if module in heads or any(name.rpartition(".")[2] in HEADS for name in names):
        return "an output head; name it in include to prune it"
    return ""


def _output_embeddings(model: nn.Module) -> list[nn.Module]:
    """What transformers' models say makes their outputs."""
    found = []
    for module in model.modules():
        if callable(getattr(module, "get_output_embeddings", None)):
            found.append(module.get_output_embeddings())
    return [module for module in found if module is not None]


def _holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """By the id of a parameter, the modules that have it."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append((name or type(module).__name__, module))
    return holders


def _unfit(layer: Layer, pattern: Pattern, others: list[str], updates: bool) -> str:
    """Why the layers of one weight stay dense together; empty where they do not."""
    if len({isinstance(module, nn.Linear) for module in layer.modules}) > 1:
        return "shares its weight with a layer that has it transposed"
    masks = [module._buffers.get("weight_mask") for module in layer.modules]
    if any((a is None) != (masks[0] is None) or (a is not None and not a.equal(masks[0])) for a in masks):
        return "shares its weight with a layer that has another mask"
    if others and (updates or not layer.asked):
        change = ", which an update of it would change" if layer.asked else ", which is not pruned"
        return f"shares its weight with {', '.join(others)}{change}"
    if not pattern.applies(layer.shape):
        return f"smaller than one {'group' if pattern.kind == 'nm' else 'block'} of {pattern}"
    return ""
