"""Making the pruned layers of a model sparse, in place; see choose.py for which, and in which scheme."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import report_row, tracked, uninterrupted
from ..errors import ModelError, SchemeError
from ..modules import (
    check_module,
    is_linear,
    is_masked,
    mask_numbers,
    obstacle,
    replace,
    sites,
    weight_parameter,
)
from ..pack_inplace import freed_again, is_freed
from ..packed_layer import held
from ..pruning.layers import Choice
from ..qlinear import QLinear
from ..rules import Patterns
from ..timing import caller, evaluation
from .choose import DTYPES, WHEN, Group, Layer, choose
from .linear import SparseLinear
from .pattern import Pattern
from .scheme import NAMES, SparseScheme

# Schemes of dense layers whose codes a sparse kernel takes as they are.
_QUANTIZED = tuple(dict.fromkeys(s.values for s in map(SparseScheme.parse, NAMES) if s.quantized))
_MOST_SIZES = 4  # of inputs of a layer that are measured: those with the most rows in all calls


def sparsify_(
    model: nn.Module,
    when: str = "faster",
    *,
    pattern: str | Pattern | None = None,
    scheme: str | SparseScheme | None = None,
    example_inputs: object = None,
    rows: int | Iterable[int] = 128,
    include: Patterns = None,
    exclude: Patterns = None,
    progress: bool = True,
) -> nn.Module:
    """Replace pruned linear layers of `model` by SparseLinear where that pays, in place; returns the model.

    Layers: nn.Linear (not its subclasses) and the Conv1D of transformers, also with masks of
    torch.nn.utils.prune, which are applied and go; and QLinear of the schemes w8a8 and w4a8_gN, whose outputs
    stay the same bit for bit. Float layers become sparse in f32, or in bf16 where their weight is bfloat16.

    when: "faster" measures each layer as it is, a float one in torch, against the kernels for the patterns
    that it has, unless they are predicted to be much slower: medians of calls in turns, of which the sparse
    ones have to take 5 % less. "smaller": where the weight takes fewer bytes, stored and packed. "always": in
    the pattern that is predicted to be the fastest.
    pattern: only this one. scheme: only this one; one with w8a8 or w4a8_gN quantizes float layers on the way.
    rows: with how many rows of input layers are measured, a number or several, whose times are added up.
    example_inputs: to measure each layer with the rows that it gets when `model` is called with them, once: a
    tensor, a tuple or list of positional arguments, a mapping of keyword arguments, or a function that calls
    the model.
    include, exclude: patterns that the name of a layer must, or must not, fit, as for `quantize_`.

    Layers that share a weight, their masks too, are decided on together and share it afterwards; with other
    masks each gets its own. One that something else has too, an embedding say, stays as it is unless
    `include` asks for its layer. A layer of which no pattern leaves out a tenth stays too, and so does one of
    another dtype than float32, bfloat16 and float16. `model._halfbyte_report` lists the linear layers: name,
    shape, action ("sparse", "quantized" or "float") and reason, which has the density and what was measured.

    Everything is chosen and made before the first layer is replaced: an error leaves the model as it was, and
    for a while there are both. Raises ModelError (no linear layer), SchemeError, NonFiniteError, DTypeError,
    ShapeError, DeviceError and ValueError.
    """
    check_module(model, "sparsify_")
    if when not in WHEN:
        raise ValueError(f"sparsify_: when is {when!r}; it must be one of {', '.join(WHEN)}")
    schemes, sizes = _schemes(pattern, scheme), _sizes(rows)
    groups, report = _find(model, Choice(include, exclude))
    for group in groups:
        group.sizes = Counter(sizes)
    swaps: list[tuple[Layer, SparseLinear]] = []
    with freed_again(model), torch.no_grad(), torch.inference_mode(False):
        if example_inputs is not None:
            _see_sizes(model, groups, example_inputs)
        for group in tracked(groups, "sparsify", progress):
            made, reason = choose(group, when, schemes, scheme is not None)
            swaps += zip(group.layers, made, strict=False)
            for layer in group.layers:
                action = "sparse" if made else "quantized" if isinstance(layer.module, QLinear) else "float"
                report[layer.name] |= {"action": action, "reason": reason}
    with uninterrupted():
        for layer, made in swaps:
            replace(layer.places, made)
            model = made if layer.module is model else model
        model._halfbyte_report = list(report.values())
    return model


def _schemes(pattern: str | Pattern | None, scheme: str | SparseScheme | None) -> list[SparseScheme]:
    """Those that are allowed."""
    found = [SparseScheme.parse(name) for name in (NAMES if scheme is None else [scheme])]
    if pattern is None:
        return found
    pattern = Pattern.parse(pattern)
    if not (fit := [s for s in found if s.pattern == pattern]):
        names = ", ".join(map(str, found))
        raise SchemeError(f"sparsify_: no scheme has the pattern {pattern} among {names}")
    return fit


def _sizes(rows: int | Iterable[int]) -> list[int]:
    sizes = [rows] if isinstance(rows, int) or not isinstance(rows, Iterable) else list(rows)
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"sparsify_: rows is {rows!r}; it must be a whole number of at least 1, or several")
    return sizes


def _find(model: nn.Module, choice: Choice) -> tuple[list[Group], dict[str, dict[str, Any]]]:
    """Layers to choose for, by the weight that they have, and the report, without their reasons.

    Raises ModelError where there is no linear layer.
    """
    layers: list[Layer] = []
    report: dict[str, dict[str, Any]] = {}
    names_of: list[str] = []
    for names, module, places in sites(model):
        if not (is_linear(module) or isinstance(module, nn.Linear | QLinear | SparseLinear)):
            continue
        names_of += names
        action, reason = _kept(module)
        report[names[0]] = report_row(names[0], module, action, choice.refusal(names) or reason)
        if not report[names[0]]["reason"]:
            layers.append(Layer(names, module, places))
    if not report:
        raise ModelError(f"sparsify_: this {type(model).__name__} has no linear layer")
    if idle := choice.idle(names_of):
        warnings.warn(f"sparsify_: no layer has a name that fits {', '.join(idle)}", stacklevel=3)
    groups: dict[tuple, Group] = {}
    masks = mask_numbers(layer.module for layer in layers if is_linear(layer.module))
    for layer in layers:
        key = _key(layer.module, masks.get(layer.module, 0))
        groups.setdefault(key, Group([])).layers.append(layer)
    holders = _holders(model)
    for key, group in list(groups.items()):
        own = [layer.module for layer in group.layers]
        if is_masked(own[0]):  # other masks make other weights, which share nothing but their training
            own += [layer.module for layer in layers if is_masked(layer.module)]
        others = [name for name, module in holders[key[0]] if module not in own]
        if others and not all(choice.asked(layer.names) for layer in group.layers):
            del groups[key]
            for layer in group.layers:
                report[layer.name]["reason"] = f"shares its weight with {', '.join(others)}"
    # What quantize_ said of embeddings stays, and what summary needs of tied weights.
    for row in getattr(model, "_halfbyte_report", ()):
        if row["name"] not in report:
            report[row["name"]] = row
        elif "tied_to" in row:
            report[row["name"]]["tied_to"] = row["tied_to"]
    return list(groups.values()), report


def _kept(module: nn.Module) -> tuple[str, str]:
    """The action of a layer that stays, and why it has to; the reason is empty where it need not."""
    if isinstance(module, SparseLinear):
        return "sparse", "was made sparse before"
    if isinstance(module, QLinear):
        if str(module.scheme) not in _QUANTIZED:
            known = ", ".join(_QUANTIZED)
            return "quantized", f"no sparse kernel has the numbers of {module.scheme}, only of {known}"
        hooks = any(value for name, value in vars(module).items() if name.endswith("_hooks"))
        if hooks or "forward" in vars(module) or module._parameters or module._modules:
            return "quantized", "it has hooks, parameters or a forward of its own, which would be lost"
        return "quantized", ""
    if not is_linear(module):
        return "float", f"{type(module).__name__} is a subclass of nn.Linear"
    dtype = weight_parameter(module).dtype if not (reason := obstacle(module)) else None
    if dtype is not None and dtype not in DTYPES:
        names = "float32, bfloat16 and float16"
        return "float", f"its weight is {dtype}; sparse layers are made of {names}: cast the model before"
    return "float", reason


def _weight_tensor(module: nn.Module) -> Tensor:
    return held(module)["weight_codes"] if isinstance(module, QLinear) else weight_parameter(module)


def _key(module: nn.Module, mask: int) -> tuple:
    """Equal for layers of the same weight; first the id of its tensor. mask: of `mask_numbers`."""
    tensor = id(_weight_tensor(module))
    if isinstance(module, QLinear):
        return tensor, id(module.weight_scale)
    return tensor, mask, isinstance(module, nn.Linear)


def _holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """By the id of a tensor, the modules that have it."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        buffers = held(module) if is_freed(module) else module._buffers
        for tensor in (*module._parameters.values(), *buffers.values()):
            holders.setdefault(id(tensor), []).append((name or type(module).__name__, module))
    return holders


def _see_sizes(model: nn.Module, groups: list[Group], inputs: object) -> None:
    """Count with how many rows the layers are called when the model is."""
    for group in groups:
        group.sizes = Counter()
    with evaluation(model), _counting(groups):
        caller(model, inputs)()
    for group in groups:
        most = sorted(group.sizes.items(), key=lambda item: item[0] * item[1])[-_MOST_SIZES:]
        group.sizes = Counter(dict(most))


@contextmanager
def _counting(groups: list[Group]) -> Iterator[None]:
    handles = []

    def watch(group: Group, module: nn.Module) -> None:
        def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and x.numel():
                group.sizes[x.numel() // x.shape[-1]] += 1

        handles.append(module.register_forward_pre_hook(count, with_kwargs=True))

    try:
        for group in groups:
            for layer in group.layers:
                watch(group, layer.module)
        yield
    finally:
        for handle in handles:
            handle.remove()
