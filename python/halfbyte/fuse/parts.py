"""The parts of a block as models write them: which norm, which activation, whose classes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from .stack import CannotFuse, NormSpec

# Classes of transformers.activations, by name. Those of gelu_tanh write the constant sqrt(2 / pi) with 10 or
# more digits, or compute it.
_CLASSES = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
    "LinearActivation": "none",
}
_FUNCTIONS = {
    functional.relu: "relu",
    torch.relu: "relu",
    functional.gelu: "gelu",
    functional.silu: "silu",
}
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "none"}
_RMS_NORMS = {
    ("transformers.models.llama.modeling_llama", "LlamaRMSNorm"),
    ("transformers.models.mistral.modeling_mistral", "MistralRMSNorm"),
    ("transformers.models.qwen2.modeling_qwen2", "Qwen2RMSNorm"),
}


def activation_of(function: Callable) -> str:
    """Its name in the core. Raises CannotFuse for one that the core does not have."""
    cls = type(function)
    if isinstance(function, functools.partial) and function.func is functional.gelu and not function.args:
        if function.keywords in ({}, {"approximate": "none"}, {"approximate": "tanh"}):
            return "gelu_tanh" if function.keywords.get("approximate") == "tanh" else "gelu"
    elif cls is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    elif cls in _MODULES:
        return _MODULES[cls]
    elif cls.__module__ == "transformers.activations" and cls.__name__ in _CLASSES:
        return _CLASSES[cls.__name__]
    for known, name in _FUNCTIONS.items():
        if function is known:
            return name
    raise CannotFuse(f"the core has no activation {getattr(function, '__name__', cls.__name__)}")


def layer_norm(module: nn.Module, size: int) -> NormSpec:
    """Of an nn.LayerNorm over the last dimension, of this size."""
    if type(module) is not nn.LayerNorm:
        raise CannotFuse(f"its norm is a {type(module).__name__}, not an nn.LayerNorm")
    if module.normalized_shape != (size,):
        raise CannotFuse(f"its norm is over {tuple(module.normalized_shape)}, not over {size}")
    return NormSpec(module.weight, module.bias, module.eps)


def rms_norm(module: nn.Module) -> NormSpec:
    """Of one that is written as Llama's."""
    return NormSpec(module.weight, None, module.variance_epsilon)


def any_norm(module: nn.Module) -> tuple[bool, NormSpec, int]:
    """(whether it is an RMSNorm, it, of how many elements) of a norm over the last dimension."""
    name = type(module).__name__
    if rms := origin(module) in _RMS_NORMS:
        norm, shape = rms_norm(module), tuple(module.weight.shape)
    elif rms := type(module) is nn.RMSNorm:
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        norm, shape = NormSpec(module.weight, None, eps), module.normalized_shape
    elif type(module) is nn.LayerNorm:
        norm, shape = NormSpec(module.weight, module.bias, module.eps), module.normalized_shape
    else:
        raise CannotFuse(f"the core has no {name}")
    if (
        len(shape) != 1
        or shape[0] == 0
        or any(v is not None and v.shape != shape for v in (norm.weight, norm.bias))
    ):
        raise CannotFuse(f"its {name} is over {tuple(shape)}")
    if not (isinstance(norm.eps, (int, float)) and 0 <= norm.eps <= torch.finfo(torch.float32).max):
        raise CannotFuse(f"the eps of its {name} is {norm.eps}")
    return rms, norm, shape[0]


def check_dropout(module: nn.Module) -> None:
    """CannotFuse unless it is one that does nothing in evaluation."""
    if type(module) not in (nn.Dropout, nn.Identity):
        raise CannotFuse(f"a {type(module).__name__} stands where a dropout is expected")


def defined_in(source: str, *modules: nn.Module) -> None:
    """CannotFuse unless the forward of each of them is defined in the file of that module name."""
    for module in modules:
        forward = type(module).forward
        if forward.__module__ != source:
            raise CannotFuse(f"its {type(module).__name__} has a forward of its own, in {forward.__module__}")


def origin(module: nn.Module) -> tuple[str, str]:
    """Where the forward of its class is defined: (module name, class name)."""
    forward = type(module).forward
    return forward.__module__, getattr(forward, "__qualname__", "").rpartition(".")[0]


def origins(module: nn.Module) -> list[tuple[str, str]]:
    """The same of its class and all its bases: a subclass may have replaced what they define."""
    return [(cls.__module__, cls.__name__) for cls in type(module).__mro__]


def loaded(name: str) -> bool:
    """Whether a Python module was imported; what is not there has made none of a model's modules."""
    return name in sys.modules
