"""The layer for a weight: a QLinear of a QuantizedTensor, a SparseLinear of a SparseTensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .packed_layer import PackedLayer
from .qlinear import QLinear
from .quantized_tensor import QuantizedTensor
from .sparse.linear import SparseLinear
from .sparse.tensor import SparseTensor


def make_layer(
    weight: QuantizedTensor | SparseTensor, bias: Tensor | None = None, **options: Any
) -> PackedLayer:
    """options: those of QLinear and SparseLinear."""
    return (SparseLinear if isinstance(weight, SparseTensor) else QLinear)(weight, bias, **options)
