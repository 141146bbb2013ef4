"""Whether a layer becomes sparse, and in which scheme: its zeros, predicted and measured times, bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arrays import check_vector, kind_of
from ..modules import extra_attributes, float_bias, float_weight, is_linear, join
from ..pack import pack
from ..pack_inplace import is_freed
from ..qlinear import QLinear
from ..quantized_tensor import QuantizedTensor
from ..tables import mebibytes, percent, significant
from ..timing import interleaved
from .cost import predicted_time
from .linear import SparseLinear
from .pattern import Pattern
from .scheme import SparseScheme
from .tensor import SparseTensor, sparsify

WHEN = ("faster", "smaller", "always")
_MARGIN = 0.95  # of the time as it is: medians of the same call differ by 1 or 2 %, at times by more
_HOPELESS = 1.5  # times of the dense layer: predicted to be that slow, a kernel is not measured
_LEAST = 0.1  # of a weight that a pattern leaves out; a few codes of any int8 weight are 0
_SEED = 5
# The numbers that a float weight can have without another word, by its dtype, which those of inputs are too.
_FLOATS = {torch.float32: ("f32",), torch.bfloat16: ("f32", "bf16"), torch.float16: ("f32",)}
DTYPES = tuple(_FLOATS)
Weight = Tensor | QuantizedTensor


@dataclass
class Layer:
    """A linear layer of the model, and the places it is found at."""

    names: list[str]
    module: nn.Module
    places: list[tuple[nn.Module, str]]  # (parent, attribute); none for a model that is itself the layer

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def title(self) -> str:
        return self.name or "the model"


@dataclass
class Group:
    """Layers that have one weight, and how often they are called with how many rows."""

    layers: list[Layer]
    sizes: Counter[int] = field(default_factory=Counter)

    @property
    def module(self) -> nn.Module:
        return self.layers[0].module


class Candidate(NamedTuple):
    """A scheme that a weight can have, the share that it stores, and the predicted time; 1 is as it is."""

    scheme: SparseScheme
    density: float
    time: float

    @property
    def bytes(self) -> float:
        """Stored for each weight of the dense layer, without scales of channels."""
        p, group = self.scheme.pattern, self.scheme.group
        value = 0.5 if group else {"w8a8": 1, "bf16": 2, "f32": 4}[self.scheme.values]
        stored = self.density * (value + (0.5 if p.kind == "nm" else 4 / (p.rows * p.columns)))
        return stored + (2 / group if group else 0)

    def __str__(self) -> str:
        return f"{self.scheme} (density {percent(self.density)})"


def choose(
    group: Group, when: str, schemes: list[SparseScheme], named: bool
) -> tuple[list[SparseLinear], str]:
    """The layers that take the place of the group's, none if it stays, and the reason.

    schemes: those allowed; named: it is one, that the caller gave.
    """
    module, name, freed = group.module, join(group.layers[0].name, "weight"), is_freed(group.module)
    weight = _float(module, group.layers[0].name) if is_linear(module) else module.quantized
    values = weight if is_linear(module) else weight.unpacked()
    kind_of(values, name)
    own = (_FLOATS[values.dtype] if not named else None) if is_linear(module) else (str(weight.scheme),)
    candidates, reason = _candidates(values, own, schemes)
    if not candidates:
        return [], reason
    if when == "faster":
        return _faster(group, weight, candidates)
    if when == "always":
        found = sparsify(weight, candidates[0].scheme, name=name)
        return _made(group, found), str(candidates[0])
    return _smaller(group, weight, candidates, freed)


def _float(module: nn.Module, name: str) -> Tensor:
    """[n, k], masks applied."""
    weight = float_weight(module, name).detach()
    return weight if isinstance(module, nn.Linear) else weight.t()


def _candidates(
    values: Tensor, own: tuple[str, ...] | None, schemes: list[SparseScheme]
) -> tuple[list[Candidate], str]:
    """What the weight can become, the fastest by prediction first; where it is nothing, the reason.

    own: the numbers that it can have; None: any.
    """
    usable = [s for s in schemes if own is None or s.values in own]
    if not usable:
        what, is_float = ", ".join(map(str, schemes)), values.is_floating_point()
        why = "which needs scheme=, as it quantizes it" if is_float else "which takes others"
        return [], f"its weights are {'floats' if is_float else own[0]}; allowed is {what}, {why}"
    kept = values != 0
    share = float(kept.float().mean())
    found = []
    for scheme in usable:
        p = scheme.pattern
        if p.kind == "block" or p.fits(kept):
            density = p.n / p.m if p.kind == "nm" else _kept_units(kept, p)
            if density <= 1 - _LEAST:
                # The kernels of floats skip the zeros that N:M stores.
                time = predicted_time(scheme, share if scheme.op == "spmm_unstructured_f32" else density)
                found.append(Candidate(scheme, density, time))
    zeros = 1 - share
    patterns = ", ".join(dict.fromkeys(str(s.pattern) for s in usable))
    reason = (
        f"{percent(zeros)} of its weights are 0, and none of {patterns} leaves out {percent(_LEAST)} of it: "
        "prune it first"
    )
    best: dict[str, Candidate] = {}  # of each kernel
    for candidate in sorted(found, key=lambda c: (c.time, c.bytes)):
        best.setdefault(candidate.scheme.op, candidate)
    return list(best.values()), reason


def _kept_units(kept: Tensor, pattern: Pattern) -> float:
    """The share of weights or blocks with anything that is not 0. kept: bool [n, k]."""
    return float((pattern.units(kept.float()) > 0).float().mean())


def _faster(group: Group, weight: Weight, candidates: list[Candidate]) -> tuple[list[SparseLinear], str]:
    name = join(group.layers[0].name, "weight")
    if not group.sizes:
        return [], "example_inputs do not reach it: nothing to measure"
    if candidates[0].time > _HOPELESS:
        return [], f"{candidates[0]} is predicted to take {candidates[0].time:.2f} times as long"
    found: list[tuple[Candidate, SparseTensor]] = []
    for candidate in candidates:
        if candidate.time <= _HOPELESS:
            found.append((candidate, sparsify(weight, candidate.scheme, name=name)))
    twins = [_made(group, sparse)[0] for _, sparse in found]
    times = _times(group, weight, twins)
    before, (best, now) = times[0], min(enumerate(times[1:]), key=lambda item: item[1])
    candidate, sparse = found[best]
    rows = ", ".join(map(str, sorted(group.sizes)))
    took = f"{significant(now)} ms, as it was {significant(before)} ms, with {rows} rows"
    if now >= _MARGIN * before:
        return [], f"not faster: {candidate} takes {took.replace('was', 'is')}"
    return _made(group, sparse), f"{candidate} takes {took}"


def _times(group: Group, weight: Weight, twins: list[SparseLinear]) -> list[float]:
    """Milliseconds of the layer as it is and of each twin, added up over the calls of all sizes."""
    module = group.module
    generator = torch.Generator().manual_seed(_SEED)  # leaves the state of torch as it was
    dense = module
    if is_linear(module):
        bias = float_bias(module, group.layers[0].name)

        def dense(x: Tensor) -> Tensor:
            return functional.linear(x, weight, bias)

    dtype = weight.dtype if is_linear(module) else module.float_dtype
    dtype = dtype if dtype in DTYPES else torch.float32
    total = [0.0] * (1 + len(twins))
    for rows, calls in group.sizes.items():
        x = torch.randn(rows, twins[0].in_features, generator=generator).to(dtype)
        took = interleaved([lambda layer=layer, x=x: layer(x) for layer in (dense, *twins)])
        total = [a + calls * b for a, b in zip(total, took, strict=True)]
    return total


def _smaller(
    group: Group, weight: Weight, candidates: list[Candidate], freed: bool
) -> tuple[list[SparseLinear], str]:
    """freed: `pack_` has freed the codes."""
    name, before = join(group.layers[0].name, "weight"), weight.nbytes
    if isinstance(weight, QuantizedTensor):
        before += group.module._prepare().nbytes - (weight.codes.nbytes if freed else 0)
    found = []
    for candidate in candidates:
        sparse = sparsify(weight, candidate.scheme, name=name)
        found.append((sparse.nbytes + pack(sparse).nbytes, candidate, sparse))
    now, candidate, sparse = min(found, key=lambda item: item[0])
    sizes = f"{mebibytes(now)}, stored and packed, as it was {mebibytes(before)}"
    if now >= before:
        return [], f"not smaller: {candidate} takes {sizes.replace('was', 'is')}"
    return _made(group, sparse), f"{candidate} takes {sizes}"


def _made(group: Group, sparse: SparseTensor) -> list[SparseLinear]:
    """A layer for each of the group, all with this weight."""
    return [_make(layer, sparse) for layer in group.layers]


def _make(layer: Layer, sparse: SparseTensor) -> SparseLinear:
    old, options = layer.module, {"name": layer.title}
    if isinstance(old, QLinear):
        bias, extra = old.bias, vars(old)
        options |= {"float_dtype": old.float_dtype, "activation": old.activation}
    else:
        bias, extra = float_bias(old, layer.name), extra_attributes(old)
        options["float_dtype"] = old.weight.dtype
    if bias is not None:
        kind = kind_of(sparse.values, join(layer.name, "weight"))
        check_vector(kind, bias, sparse.shape[0], join(layer.name, "bias"), "its weight")
    new = SparseLinear(sparse, bias, **options)
    if isinstance(old, QLinear):
        new.static = old.static
    for attribute, value in extra.items():
        if not hasattr(new, attribute):
            setattr(new, attribute, value)
    return new.train(old.training)
