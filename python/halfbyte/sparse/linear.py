"""SparseLinear: the module in the place of a pruned nn.Linear; parts of a SparseTensor are its buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import DTypeError, HalfbyteError
from ..modules import float_bias, linear_weight
from ..packed_layer import GROUP_DTYPES, PackedLayer
from .scheme import SparseScheme
from .tensor import PARTS, SparseTensor, density, sparsify
from .torch_ops import sparse_linear

SPARSE_BUFFERS = tuple(f"weight_{part}" for part in PARTS)


class SparseLinear(PackedLayer):
    """A linear layer on a sparse weight: `y = activation(x @ weight.T + bias)`, zeros left out.

    x: [..., in_features], float32, bfloat16 or float16, where the layer is; y has the dtype of x. With w8a8
    and w4a8 it is quantized as by QLinear, and y equals that of the QLinear with the same codes, bit for bit.
    All that is said there of calls, the bias, the activation, static scales, packs and `name` holds here too;
    the torch operator is halfbyte::sparse_linear.

    Buffers, all in the state_dict where they are not None: weight_values, weight_crow, weight_columns,
    weight_positions, weight_scale and weight_group_scale, which are those of the SparseTensor; bias,
    input_scale, input_zero. A state_dict of another weight with the same scheme and shape can be loaded,
    however many values it has; one whose parts are no such weight is an error that leaves the layer as it
    was.
    """

    weight_buffers = SPARSE_BUFFERS
    main_buffer = "weight_values"
    _made = "sparse", "sparsify_"

    def __init__(
        self,
        sparse: SparseTensor,
        bias: Tensor | None = None,
        *,
        activation: str = "none",
        float_dtype: torch.dtype = torch.float32,
        name: str = "SparseLinear",
    ):
        if not isinstance(sparse, SparseTensor) or not isinstance(sparse.values, Tensor):
            raise DTypeError(
                "SparseLinear takes a SparseTensor of torch tensors; sparsify() makes one of a torch weight"
            )
        parts = {name: getattr(sparse, part) for name, part in zip(SPARSE_BUFFERS, PARTS, strict=True)}
        super().__init__(sparse, parts, bias, activation, float_dtype, name)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: str | SparseScheme, *, name: str = "linear"
    ) -> SparseLinear:
        """The sparse twin of an nn.Linear or of a Conv1D of transformers, which is left as it is; masks of
        torch.nn.utils.prune are applied.

        Raises what `sparsify` does, and DTypeError for another module; `name` is what errors call the layer.
        """
        weight = linear_weight(linear, name, "SparseLinear.from_linear")
        sparse = sparsify(weight, scheme, name=f"{name}.weight")
        bias = float_bias(linear, name)
        return cls(sparse, bias, float_dtype=weight.dtype, name=name).train(linear.training)

    @property
    def sparse(self) -> SparseTensor:
        """The weight as a SparseTensor that shares this layer's buffers."""
        values, *rest = self._weight()
        return SparseTensor(values, self.scheme, (self.out_features, self.in_features), *rest)

    @property
    def packable(self) -> SparseTensor:
        """What `pack` takes: `sparse`."""
        return self.sparse

    @property
    def density(self) -> float:
        """The share of the weight that is stored."""
        shape = self.out_features, self.in_features
        return density(self.scheme, shape, tuple(self.weight_values.shape))

    def dequantize(self) -> Tensor:
        """The weight, zeros included: float32 [n, k]."""
        return self.sparse.to_dense()

    def _operator(self, x: Tensor) -> Tensor:
        return sparse_linear(
            x,
            str(self.scheme),
            self.out_features,
            self.in_features,
            *self._weight(),
            self.bias,
            self.activation,
            None,
            self.input_scale,
            self.input_zero,
        )

    def _other_format(self, state_dict: dict, prefix: str, metadata: dict) -> str | None:
        if prefix + "weight_codes" in state_dict:
            return f"{prefix}weight_codes is of a dense layer and this is sparse: load it before sparsify_"
        saved = metadata.get("scheme", str(self.scheme))
        if prefix + "weight_values" in state_dict and saved != str(self.scheme):
            return (
                f"{prefix}weight_values is of the scheme {saved} and this layer of {self.scheme}: make the "
                "model sparse with the scheme of the state"
            )
        return self._unsound(state_dict, prefix)

    def _unsound(self, state_dict: dict, prefix: str) -> str | None:
        """What is wrong with the weight that the layer would have with what a state_dict has of it."""
        parts, given = {}, False
        for part, name in zip(PARTS, SPARSE_BUFFERS, strict=True):
            if (own := self._buffers[name]) is None:
                continue
            parts[part] = own
            if (value := state_dict.get(prefix + name)) is not None:
                cast = isinstance(value, Tensor) and value.is_floating_point() and own.is_floating_point()
                cast = cast and not (part == "group_scale" and value.dtype in GROUP_DTYPES)
                parts[part], given = value.detach().to(own.dtype) if cast else value, True
        try:
            if given:
                SparseTensor(scheme=self.scheme, shape=(self.out_features, self.in_features), **parts)
        except (HalfbyteError, ValueError) as error:
            return f"the sparse weight of {prefix[:-1] or self.name}: {error}"
        return None

    def _follow(self, saved: dict[str, Tensor | None]) -> None:
        """Also how many values there are, and the dtype of group scales."""
        super()._follow(saved)
        self._follow_dtype(saved, "weight_group_scale")
        if self.scheme.pattern.kind == "nm" or saved["weight_columns"] is None:
            return
        if len(saved["weight_columns"]) == len(saved["weight_values"]) != len(self.weight_values):
            for name in ("weight_values", "weight_columns"):
                buffer, value = self._buffers[name], saved[name]
                if buffer.shape[1:] == value.shape[1:]:
                    self._buffers[name] = buffer.new_zeros(value.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, density={self.density:.3g}"
