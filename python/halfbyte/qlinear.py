"""QLinear: the module in the place of nn.Linear; codes and scales are its buffers, the pack its cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import DTypeError
from .modules import float_bias, linear_weight
from .packed_layer import PackedLayer
from .quantize import QuantizedTensor, quantize
from .quantized_tensor import PARTS
from .scheme import Scheme
from .torch_ops import linear

WEIGHT_BUFFERS = tuple(f"weight_{part}" for part in PARTS)


class QLinear(PackedLayer):
    """A linear layer on quantized weights: `y = activation(x @ weight.T + bias)`.

    x: [..., in_features], float32, bfloat16 or float16, on the CPU or on the GPU that the layer is on; y has
    the dtype of x. In eager inference the call goes straight to the kernels; under torch.compile, tracing, or
    where a gradient of x is wanted, through the torch operator halfbyte::linear, which has a gradient with
    respect to x for activation "none". docs/cuda.md says what runs on a GPU.

    Buffers, all in the state_dict where they are not None: weight_codes, weight_scale, weight_group_scale,
    weight_zero and weight_minimum, which are those of the QuantizedTensor; bias float32 [n]; and, where
    activations are quantized with fixed numbers (`calibrate`), input_scale float32 [] and input_zero int32
    []. The floating-point ones keep their dtype under .half() and .bfloat16(). Weights are packed at the
    first call, and again after a buffer was replaced or changed in place; the pack is shared by layers that
    share their codes and scheme, and never saved. `pack_` frees the codes until something asks for them.

    activation: none, relu, gelu, gelu_tanh or silu; may be assigned.
    float_dtype: what `weight.dtype` says, that of the float weight before; follows .half() and its kind.
    name: what errors call the layer; its place in the model where quantize_ or load made it.
    """

    weight_buffers = WEIGHT_BUFFERS
    main_buffer = "weight_scale"
    _made = "quantized", "quantize_"

    def __init__(
        self,
        q: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        activation: str = "none",
        float_dtype: torch.dtype = torch.float32,
        name: str = "QLinear",
    ):
        if not isinstance(q, QuantizedTensor) or not isinstance(q.codes, Tensor):
            raise DTypeError(
                "QLinear takes a QuantizedTensor of torch tensors; quantize() makes one of a torch weight"
            )
        parts = {name: getattr(q, part) for name, part in zip(WEIGHT_BUFFERS, PARTS, strict=True)}
        super().__init__(q, parts, bias, activation, float_dtype, name)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: str | Scheme = "w8a8",
        *,
        method: str | None = None,
        name: str = "linear",
    ) -> QLinear:
        """The quantized twin of an nn.Linear or of a Conv1D of transformers, which is left as it is; masks of
        torch.nn.utils.prune are applied. `name` is what errors call the layer.

        method: that of `quantize`, which also says what is raised; DTypeError also for another module.
        """
        weight = linear_weight(linear, name, "QLinear.from_linear")
        q = quantize(weight, scheme, method=method, name=f"{name}.weight")
        return cls(q, float_bias(linear, name), float_dtype=weight.dtype, name=name).train(linear.training)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor that shares this layer's buffers."""
        codes, scale, *rest = self._weight()
        return QuantizedTensor(codes, scale, self.scheme, self.in_features, *rest)

    @property
    def packable(self) -> QuantizedTensor:
        """What `pack` takes: `quantized`."""
        return self.quantized

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for: float32 [n, k]."""
        return self.quantized.dequantize()

    def _operator(self, x: Tensor) -> Tensor:
        return linear(
            x,
            str(self.scheme),
            *self._weight(),
            self.bias,
            self.activation,
            None,
            self.input_scale,
            self.input_zero,
        )

    def _other_format(self, state_dict: dict, prefix: str, metadata: dict) -> str | None:
        if prefix + "weight_values" in state_dict:
            return f"{prefix}weight_values is of a sparse layer and this one is not: call sparsify_ before"
        return other_format(self.scheme, state_dict, prefix, metadata)

    def _follow(self, saved: dict[str, Tensor | None]) -> None:
        """Also which of zero and minimum the layer has, and the dtype of group scales."""
        super()._follow(saved)
        if self.scheme.asym and (saved["weight_zero"] is None) != (saved["weight_minimum"] is None):
            self._follow_presence(saved, ("weight_zero", "weight_minimum"))
        for name in ("weight_group_scale", "weight_minimum"):
            self._follow_dtype(saved, name)


def other_format(scheme: Scheme, state_dict: dict, prefix: str, metadata: dict) -> str | None:
    """An error where the weight in a state_dict is of other numbers than `scheme` says, which the shapes and
    names of the tensors do not always tell. States without metadata, as those of a file, are not looked at.
    """
    if prefix + WEIGHT_BUFFERS[0] not in state_dict or "scheme" not in metadata:
        return None
    saved = Scheme.parse(metadata["scheme"])
    formats = [(s.weight_bits, bool(s.group), s.asym, s.nf4) for s in (saved, scheme)]
    if formats[0] == formats[1]:
        return None
    return (
        f"{prefix}{WEIGHT_BUFFERS[0]} is of the scheme {saved} and this layer of {scheme}: quantize "
        "the model with the scheme of the state"
    )
