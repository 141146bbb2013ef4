"""What a call of a module has to do at the least: operations, by what does them, and bytes moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _core
from ..arrays import wraps
from ..bench.ceilings import products_per_weight
from ..embedding import QEmbedding
from ..modules import is_embedding, is_linear, shape_of
from ..packed_layer import PackedLayer
from ..scheme import Scheme

FLOAT = "float32"  # in Work.units: multiply-adds of floats, whatever the instruction set


class Work(NamedTuple):
    """Of one call, or of several added up.

    units: the operations by what does them: an instruction set (of int8 products, two for one of 16 by 8
    bits) or FLOAT; empty where no ceiling is known for them.
    """

    operations: float = 0
    bytes: float = 0
    weight_bytes: float = 0  # of those bytes, what is the same memory at every call
    units: Mapping[str, float] = {}

    def __add__(self, other: Work) -> Work:
        units = dict(self.units)
        for unit, count in other.units.items():
            units[unit] = units.get(unit, 0) + count
        sums = (a + b for a, b in zip(self[:3], other[:3], strict=True))
        return Work(*sums, units)

    def scaled(self, factor: float) -> Work:
        """Of so many times as many calls."""
        parts = (factor * part for part in self[:3])
        return Work(*parts, {unit: factor * count for unit, count in self.units.items()})


NOTHING = Work()
_PASSING = (nn.Identity, nn.modules.dropout._DropoutNd)  # which in evaluation hand on what they are given
Counter = Callable[[tuple, dict, object], Work]


def counter_of(module: nn.Module) -> Counter:
    """Counts calls of a module that has no parts, each from its arguments and what it returned."""
    if isinstance(module, PackedLayer):
        return _linear(module, module._prepare().nbytes, *unit_of(module))
    if is_linear(module):
        in_float32 = module.weight.dtype is torch.float32 and not wraps(module.weight)
        return _linear(module, module.weight.nbytes, FLOAT if in_float32 else "", 1)
    if isinstance(module, QEmbedding):
        return _embedding(_bytes(module.buffers()) / module.num_embeddings)
    if is_embedding(module):
        return _embedding(module.weight.nbytes / module.num_embeddings)
    if isinstance(module, _PASSING):
        return lambda args, kwargs, output: NOTHING
    return _stream(_bytes([*module.parameters(), *module.buffers()]))


def patterns_counter(module: nn.Module) -> Counter:
    """Counts calls of a module whose packed layers take along what follows them, as if each ran once."""
    layers = packed_layers(module)
    weights = [layer._prepare().nbytes + _bytes_of_bias(layer) for layer in layers]

    def count(args: tuple, kwargs: dict, output: object) -> Work:
        x = next(_tensors((args, kwargs)))
        rows, total = x.numel() // x.shape[-1], NOTHING
        for layer, weight_bytes in zip(layers, weights, strict=True):
            n, k = layer.out_features, layer.in_features
            moved = rows * (n + k) * x.itemsize
            total += linear_work(rows, n, k, weight_bytes, moved, *unit_of(layer))
        return total

    return count


def packed_layers(module: nn.Module) -> list[PackedLayer]:
    """Those that are children of a module."""
    return [child for child in module._modules.values() if isinstance(child, PackedLayer)]


def unit_of(layer: PackedLayer) -> tuple[str, float]:
    """What multiplies the weights of a layer on this machine, and how many products each of them takes on the
    average: of int8, or of floats; none for a weight that is not stored.
    """
    scheme = layer.scheme
    if isinstance(scheme, Scheme):
        return isa_of(_core.select(scheme.op)), products_per_weight(scheme)
    return isa_of(_core.select(scheme.op)) if scheme.per_token else FLOAT, layer.density


def isa_of(kernel: str) -> str:
    """Its instruction set."""
    return next(row["isa"] for row in _core.kernels() if row["name"] == kernel)


def linear_work(
    rows: int, n: int, k: int, weight_bytes: float, other_bytes: float, unit: str, products: float
) -> Work:
    """Of rows times weights. other_bytes: input, output and whatever else is not the weight."""
    operations = 2 * rows * n * k * min(products, 1)  # not those that zeros would take
    units = {unit: 2 * rows * n * k * products} if unit else {}
    return Work(operations, weight_bytes + other_bytes, weight_bytes, units)


def _linear(module: nn.Module, weight_bytes: float, unit: str, products: float) -> Counter:
    n, k = shape_of(module)
    weight_bytes += _bytes_of_bias(module)

    def count(args: tuple, kwargs: dict, output: object) -> Work:
        moved = _bytes(_tensors((args, kwargs, output)))
        return linear_work(output.numel() // n, n, k, weight_bytes, moved, unit, products)

    return count


def _bytes_of_bias(module: nn.Module) -> int:
    return 0 if module.bias is None else module.bias.nbytes


def _embedding(row_bytes: float) -> Counter:
    """Rows are read, not the table."""

    def count(args: tuple, kwargs: dict, output: object) -> Work:
        ids = _bytes(_tensors((args, kwargs)))
        return Work(0, output.numel() // output.shape[-1] * row_bytes + ids + output.nbytes)

    return count


def _stream(own_bytes: float) -> Counter:
    """What comes in is read once, what goes out is written once."""

    def count(args: tuple, kwargs: dict, output: object) -> Work:
        return Work(0, own_bytes + _bytes(_tensors((args, kwargs, output))), own_bytes)

    return count


def _tensors(value: object) -> Iterator[Tensor]:
    """Those in arguments or in an output."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
