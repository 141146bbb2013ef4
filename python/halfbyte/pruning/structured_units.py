"""Units of a model that can go as a whole: which tensors hold them, and what stands in the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arrays import wraps
from ..modules import is_linear, sites

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = {
    nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: 0,
    nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3,
}  # fmt: skip

# What treats every element alike and by itself, so that a unit stays one behind it.
_ELEMENTWISE = {
    nn.AlphaDropout, nn.CELU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ELU,
    nn.FeatureAlphaDropout, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.RReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU,
    nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
}  # fmt: skip
_NAMES = (
    "alpha_dropout celu dropout dropout1d dropout2d dropout3d elu elu_ gelu hardshrink hardsigmoid hardswish "
    "hardtanh hardtanh_ leaky_relu leaky_relu_ logsigmoid mish relu relu_ relu6 selu selu_ sigmoid silu "
    "softplus softshrink softsign tanh tanhshrink threshold"
).split()
_FUNCTIONS = {getattr(functional, name) for name in _NAMES}
_FUNCTIONS |= {torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.selu, torch.celu}

# The parameters and buffers that a layer is expected to have.
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_MASKED = (
    "has a mask of torch.nn.utils.prune, whose shape would no longer fit: make it permanent with "
    "halfbyte.remove_masks_ first"
)


class CannotPrune(Exception):
    """Why units are left alone, in one line."""


@dataclass(frozen=True)
class Part:
    """A parameter or buffer that has the units along one of its dimensions."""

    name: str  # of the module
    module: nn.Module
    tensor: str  # its name there
    axis: int
    positions: Tensor  # int64 [units, n]: where each unit lies along the axis

    @property
    def value(self) -> Tensor:
        return getattr(self.module, self.tensor)


@dataclass(frozen=True)
class Size:
    """A number that a module or a config keeps: so many for each unit."""

    owner: Any
    attribute: str
    per_unit: int


@dataclass
class Group:
    """Units that one or several layers make together and one layer uses: a unit goes from all of them."""

    name: str
    units: int
    made_by: list[Part] = field(default_factory=list)  # weights, of which units are scored
    others: list[Part] = field(default_factory=list)  # biases, and norms in between
    used_by: Part | None = None  # None for a layer that has no user of its own: it is left alone
    sizes: list[Size] = field(default_factory=list)
    settings: list[Size] = field(default_factory=list)  # of a config
    fixed: list[tuple[Any, str, int]] = field(default_factory=list)  # to write there with them
    reason: str = ""  # why it is left alone
    note: str = ""
    in_config: bool = False  # whether a config may say how many units there are, in a way that is not known

    def parts(self) -> list[Part]:
        return [*self.made_by, *self.others, *([self.used_by] if self.used_by else [])]

    def layers(self) -> list[str]:
        """The names of the modules that change."""
        return list(dict.fromkeys(part.name for part in self.parts()))

    def add_maker(self, name: str, module: nn.Module, blocks: int = 1) -> None:
        """A layer whose outputs are the units; `blocks` of them one after the other, as in a merged qkv."""
        axis, size = axes(module)[0], sizes_of(module)[0]
        count = module.weight.shape[axis]
        if count % (self.units * blocks):
            raise CannotPrune(f"{name} has {count} outputs, which are not {self.units} units")
        where = spans(self.units, count // self.units // blocks, blocks)
        self.made_by.append(Part(name, module, "weight", axis, where))
        if module.bias is not None:
            self.others.append(Part(name, module, "bias", 0, where))
        self.sizes.append(Size(module, size, count // self.units))

    def add_between(self, name: str, module: nn.Module, count: int, attributes: Iterable[str]) -> None:
        """A norm or a depthwise convolution, which has something of its own for each unit."""
        where = spans(self.units, count // self.units)
        held = {**module._parameters, **module._buffers}
        self.others += [
            Part(name, module, key, 0, where) for key, t in held.items() if t is not None and t.ndim
        ]
        self.sizes += [Size(module, attribute, count // self.units) for attribute in attributes]

    def set_user(self, name: str, module: nn.Module) -> None:
        """The layer whose inputs are the units."""
        axis, size = axes(module)[1], sizes_of(module)[1]
        count = module.weight.shape[axis]
        if count % self.units:
            raise CannotPrune(
                f"{name}, which uses them, has {count} inputs, which are not {self.units} units"
            )
        self.used_by = Part(name, module, "weight", axis, spans(self.units, count // self.units))
        self.sizes.append(Size(module, size, count // self.units))


def spans(units: int, size: int, blocks: int = 1) -> Tensor:
    """int64 [units, blocks * size]: positions of `blocks` runs, in each of which every unit has `size`."""
    return torch.arange(units * size * blocks).view(blocks, units, size).transpose(0, 1).reshape(units, -1)


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution, transposed or not, and no subclass."""
    return type(module) in CONVOLUTIONS or type(module) in TRANSPOSED


def axes(module: nn.Module) -> tuple[int, int]:
    """The dimensions of its weight that are outputs and inputs."""
    return (0, 1) if type(module) is nn.Linear or type(module) in CONVOLUTIONS else (1, 0)


def sizes_of(module: nn.Module) -> tuple[str, str]:
    """The attributes that say how many outputs and inputs it has."""
    if is_convolution(module):
        return "out_channels", "in_channels"
    return ("out_features", "in_features") if type(module) is nn.Linear else ("nf", "nx")


def outputs_of(module: nn.Module) -> int:
    """Units that a linear layer or a convolution makes."""
    return getattr(module, sizes_of(module)[0])


def is_elementwise(function: Any) -> bool:
    """Whether a module or function is known to treat every element alike and by itself."""
    cls = type(function)
    if isinstance(function, nn.Module):
        single = cls is nn.PReLU and function.num_parameters == 1
        return single or cls in _ELEMENTWISE or cls.__module__ == "transformers.activations"
    return any(function is known for known in _FUNCTIONS)


def check(groups: list[Group], model: nn.Module) -> None:
    """Give every group a reason to be left alone if one of its layers is shared, tied, hooked or unusual."""
    uses = _uses(model)
    for group in groups:
        if not group.reason:
            reasons = (_obstacle(part, uses) for part in group.parts())
            group.reason = next((reason for reason in reasons if reason), "")


def _uses(model: nn.Module) -> Counter:
    """How many modules hold a tensor, by its memory, and how many names a module has."""
    uses: Counter = Counter()
    for names, module, _ in sites(model):
        uses.update(_memory(p) for p in module._parameters.values() if p is not None)
        uses[id(module)] = len(names)
    return uses


def _memory(tensor: Tensor) -> tuple:
    pointer = 0 if wraps(tensor) else tensor.data_ptr()
    return ("memory", pointer) if pointer else ("tensor", id(tensor))


def _obstacle(part: Part, uses: Counter) -> str:
    module, who = part.module, part.name or "the model"
    if "weight_mask" in module._buffers or "bias_mask" in module._buffers:
        return f"{who} {_MASKED}"
    tensor = module._parameters.get(part.tensor, module._buffers.get(part.tensor))
    if tensor is None:
        return f"the {part.tensor} of {who} is computed by a hook (weight_norm?), not a parameter"
    if wraps(tensor):
        return f"the {part.tensor} of {who} is a {type(tensor).__name__}, not a plain tensor"
    if not tensor.is_floating_point():
        return f"the {part.tensor} of {who} is of {tensor.dtype}"
    if uses[id(module)] > 1:
        return f"{who} is a module that the model has at several places"
    if part.tensor in module._parameters and uses[_memory(tensor)] > 1:
        return f"{who} shares its {part.tensor} with another layer"
    if any(value for name, value in vars(module).items() if name.endswith("_hooks")):
        return f"{who} has hooks, which may depend on its shape"
    if "forward" in vars(module):
        return f"the forward of {who} was replaced on the instance"
    more = {*module._parameters, *module._buffers, *module._modules} - _TENSORS
    return f"{who} holds {', '.join(sorted(more))}, which may depend on its shape" if more else ""


def is_layer(module: nn.Module, pattern: str) -> bool:
    """Whether it could make units of this kind."""
    return is_linear(module) if pattern == "neuron" else is_convolution(module)
