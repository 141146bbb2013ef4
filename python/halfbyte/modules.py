"""The modules of a model: its linear layers and embeddings, their names, what a replacement would lose."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from .arrays import wraps
from .errors import DTypeError, ShapeError

# Of an nn.Linear and of a Conv1D; and what does not tie a value to the layer that it was assigned to.
_PARAMETERS = ("weight", "bias")
_LINEAR_ATTRIBUTES = {*vars(nn.Linear(1, 1, device="meta")), "nf", "nx", *_PARAMETERS}
_EMBEDDING_ATTRIBUTES = {*vars(nn.Embedding(1, 1, device="meta")), *_PARAMETERS}
_PLAIN_VALUE = (bool, int, float, str, type(None))


def check_module(model: object, what: str) -> None:
    """DTypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise DTypeError(f"{what} takes a model (an nn.Module), not {type(model).__name__}")


def join(module: str, name: str) -> str:
    """Dotted name of something in a module, whose own name is empty for the whole model."""
    return f"{module}.{name}" if module else name


def is_linear(module: nn.Module) -> bool:
    """Whether quantize_ replaces `module`: an nn.Linear or a Conv1D of transformers, not a subclass."""
    return type(module) is nn.Linear or _is_conv1d(module)


def _is_conv1d(module: object) -> bool:
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and type(module) is transformers.Conv1D


def is_embedding(module: nn.Module) -> bool:
    """Whether quantize_ can replace `module`: an nn.Embedding, not a subclass."""
    return type(module) is nn.Embedding


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(n, k) of a linear layer or an embedding, quantized or not; a Conv1D keeps its weight transposed."""
    if hasattr(module, "in_features"):
        return module.out_features, module.in_features
    if hasattr(module, "num_embeddings"):
        return module.num_embeddings, module.embedding_dim
    return tuple(module.weight.t().shape)


def sites(model: nn.Module) -> Iterator[tuple[list[str], nn.Module, list[tuple[nn.Module, str]]]]:
    """Every module of the model once: all its names, itself, and all (parent, attribute) that hold it."""
    names: dict[nn.Module, list[str]] = {}
    places: dict[nn.Module, dict[tuple[nn.Module, str], None]] = {}
    # A stack and no inner function: one that calls itself is a cycle, which would keep every module that it
    # saw alive until the garbage collector comes by.
    stack: list[tuple[nn.Module, str, tuple[nn.Module, ...]]] = [(model, "", (model,))]
    while stack:
        module, name, above = stack.pop()
        names.setdefault(module, []).append(name)
        for attribute, child in reversed(module._modules.items()):
            if child is not None and child not in above:
                stack.append((child, join(name, attribute), (*above, child)))
        for attribute, child in module._modules.items():
            if child is not None:
                places.setdefault(child, {})[module, attribute] = None
    for module, its_names in names.items():
        yield its_names, module, list(places.get(module, ()))


def replace(places: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Put `module` at every (parent, attribute)."""
    for parent, attribute in places:
        parent._modules[attribute] = module


def weight_parameter(module: nn.Module) -> nn.Parameter | None:
    """The parameter that holds the weight: `weight`, or `weight_orig` of a layer that was pruned."""
    return module._parameters.get("weight_orig" if is_masked(module, "weight") else "weight")


def is_masked(module: nn.Module, name: str = "weight") -> bool:
    """Whether a parameter has a mask of torch.nn.utils.prune, whose hook applies it before each call."""
    return f"{name}_orig" in module._parameters and f"{name}_mask" in module._buffers


def float_weight(module: nn.Module, layer: str = "") -> Tensor:
    """The weight as it is used, in the layout of its parameter; the mask of a pruned layer applied to the
    values that the parameter has now. ShapeError, which names the `layer`, for a mask of another shape.
    """
    return _unmasked(module, "weight", layer)


def float_bias(module: nn.Module, layer: str = "") -> Tensor | None:
    """The bias as it is used; ShapeError as of `float_weight`."""
    return _unmasked(module, "bias", layer)


def linear_weight(module: nn.Module, layer: str, what: str) -> Tensor:
    """`float_weight` of an nn.Linear or a Conv1D, [n, k]; DTypeError, of the function `what`, for others."""
    if not (isinstance(module, nn.Linear) or _is_conv1d(module)):
        raise DTypeError(f"{what} takes an nn.Linear or a Conv1D, not {type(module).__name__} ({layer})")
    weight = float_weight(module, layer)
    return weight.t() if _is_conv1d(module) else weight


def mask_numbers(modules: Iterable[nn.Module]) -> dict[nn.Module, int]:
    """For each module a number; modules that share a weight have the same one if their masks are equal."""
    numbers: dict[nn.Module, int] = {}
    masks: dict[int, list[Tensor | None]] = {}  # those found so far, of each weight
    for module in modules:
        mask, known = module._buffers.get("weight_mask"), masks.setdefault(id(weight_parameter(module)), [])
        equal = (i for i, other in enumerate(known) if _same_mask(mask, other))
        numbers[module] = next(equal, len(known))
        if numbers[module] == len(known):
            known.append(mask)
    return numbers


def _same_mask(a: Tensor | None, b: Tensor | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    return a.shape == b.shape and a.device == b.device and not a.is_meta and bool((a == b).all())


def _unmasked(module: nn.Module, name: str, layer: str) -> Tensor | None:
    if not is_masked(module, name):
        return getattr(module, name)
    original, mask = module._parameters[f"{name}_orig"].detach(), module._buffers[f"{name}_mask"]
    if mask.shape != original.shape:
        raise ShapeError(
            f"{join(layer, f'{name}_mask')} is {list(mask.shape)}, the {name} {list(original.shape)}; a mask "
            "must have the shape of what it masks"
        )
    # What is pruned is 0 whatever it was, an infinity too.
    return (original * mask.to(original.dtype)).masked_fill(mask == 0, 0)


def obstacle(module: nn.Module) -> str:
    """Why a linear layer or an embedding cannot be swapped without losing something; empty where it can.

    Masks of torch.nn.utils.prune are none: `float_weight` applies them.
    """
    masked = [name for name in _PARAMETERS if is_masked(module, name)]
    if weight_parameter(module) is None:
        return "its weight is computed by a hook (weight_norm?), not a parameter"
    if wraps(module.weight):
        return f"its weight is a {type(module.weight).__name__}, not a plain tensor"
    if any(_hooks_but_masks(module, masked)):
        return "it has hooks, which a replacement would lose"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    own = {*_PARAMETERS, *(f"{name}_{part}" for name in masked for part in ("orig", "mask"))}
    held = [name for name in (*module._buffers, *module._modules, *module._parameters) if name not in own]
    held += [name for name, value in extra_attributes(module).items() if not isinstance(value, _PLAIN_VALUE)]
    if held:
        return f"it holds {', '.join(held)}, which a replacement would lose"
    return embedding_obstacle(module) if is_embedding(module) else ""


def _hooks_but_masks(module: nn.Module, masked: list[str]) -> Iterator[object]:
    """The hooks of a module, without those that apply the masks of its parameters."""
    for name, hooks in vars(module).items():
        if name == "_forward_pre_hooks":
            for hook in hooks.values():
                if not (isinstance(hook, BasePruningMethod) and hook._tensor_name in masked):
                    yield hook
        elif name.endswith("_hooks") and hooks:
            yield hooks


def embedding_obstacle(module: nn.Embedding) -> str:
    """The option of an nn.Embedding that writes to its weight, or trains it; empty where there is none."""
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} makes it change its weight at every call"
    trained = [name for name in ("scale_grad_by_freq", "sparse") if getattr(module, name)]
    return f"{trained[0]}=True says how it is trained, and codes are not trained" if trained else ""


def extra_attributes(module: nn.Module) -> dict[str, Any]:
    """What was assigned to a layer beyond its own; plain values move to a replacement."""
    own = _EMBEDDING_ATTRIBUTES if is_embedding(module) else _LINEAR_ATTRIBUTES
    return {name: value for name, value in vars(module).items() if name not in own}
