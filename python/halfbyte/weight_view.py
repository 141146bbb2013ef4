"""What `layer.weight` of a quantized layer is: the float weight, made only when it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .modules import shape_of

if TYPE_CHECKING:
    from .embedding import QEmbedding
    from .packed_layer import PackedLayer


class WeightView:
    """Stands for the float32 weight [n, k] of a QLinear, a SparseLinear or a QEmbedding.

    Models read `layer.weight.dtype` or `.device` to prepare inputs, which costs nothing here; a torch
    function that is called with this object gets the dequantized float32 tensor. Code that would hand the
    weight to a fused float kernel, such as nn.TransformerEncoderLayer, sees that this is no plain tensor and
    calls the layer instead.
    """

    requires_grad = False

    def __init__(self, layer: PackedLayer | QEmbedding):
        self._layer = layer
        self.shape = torch.Size(shape_of(layer))
        self.device = layer.device
        self.dtype = layer.float_dtype

    def dequantize(self) -> Tensor:
        """The weight as a tensor of its own, float32."""
        return self._layer.dequantize()

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args, kwargs = tree_map(
            lambda a: a.dequantize().to(a.dtype) if isinstance(a, cls) else a, (args, kwargs or {})
        )
        return func(*args, **kwargs)
