"""halfbyte::sparse_linear as a torch operator, for torch.compile, autograd and tracing; and, for its
gradient, halfbyte::sparse_values: the dense matrix of the values that a SparseTensor stores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import run_linear
from ..torch_ops import check_not_meta, check_one_device, packed_weight, static_of, straight_through
from .scheme import SparseScheme
from .tensor import SparseTensor, unscaled

_library = torch.library.Library("halfbyte", "FRAGMENT")
_WEIGHT = (
    "str scheme, SymInt out_features, SymInt in_features, Tensor values, Tensor? crow, Tensor? columns, "
    "Tensor? positions, Tensor? scale, Tensor? group_scale"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    f"sparse_linear(Tensor x, {_WEIGHT}, Tensor? bias=None, str activation='none', Tensor? residual=None, "
    "Tensor? input_scale=None, Tensor? input_zero=None) -> Tensor",
    tags=_TAGS,
)
_library.define(f"sparse_values({_WEIGHT}) -> Tensor", tags=_TAGS)


def _linear(
    x: Tensor,
    scheme: str,
    out_features: int,
    in_features: int,
    values: Tensor,
    crow: Tensor | None,
    columns: Tensor | None,
    positions: Tensor | None,
    scale: Tensor | None,
    group_scale: Tensor | None,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero: Tensor | None = None,
) -> Tensor:
    parts = values, crow, columns, positions, scale, group_scale
    packed = packed_weight(SparseScheme.parse(scheme), (out_features, in_features), *parts)
    return run_linear(x, packed, bias, activation, residual, None, static_of(input_scale, input_zero))


def _linear_fake(
    x: Tensor, scheme: str, out_features: int, in_features: int, values: Tensor, *others: object
) -> Tensor:
    check_not_meta(values, x, "values")
    check_one_device(values, x, "values")
    torch._check(
        x.shape[-1] == in_features,
        lambda: f"x has the shape {tuple(x.shape)}; its last dimension must be {in_features}",
    )
    return x.new_empty((*x.shape[:-1], out_features))


def _values(scheme: str, out_features: int, in_features: int, *parts: Tensor | None) -> Tensor:
    weight = SparseTensor(parts[0], SparseScheme.parse(scheme), (out_features, in_features), *parts[1:])
    return torch.from_numpy(unscaled(weight)).to(parts[0].device)


def _values_fake(
    scheme: str, out_features: int, in_features: int, values: Tensor, *others: Tensor | None
) -> Tensor:
    return values.new_empty((out_features, in_features), dtype=torch.float32)


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    x, scheme, n, k, *parts = inputs[:10]
    bias, activation, residual = inputs[10:13]
    ctx.save_for_backward(*parts)
    ctx.weight, ctx.activation = (scheme, n, k), activation
    ctx.dtypes = [None if t is None else t.dtype for t in (x, bias, residual)]


def _backward(ctx, grad: Tensor) -> tuple:
    parts = ctx.saved_tensors

    def times_weight(g: Tensor) -> Tensor:
        scale = parts[4]
        scaled = g if scale is None else g * scale
        return scaled @ torch.ops.halfbyte.sparse_values(*ctx.weight, *parts)

    return straight_through(ctx, grad, sparse_linear, "values and scales", times_weight)


for _key in ("CPU", "CUDA"):
    _library.impl("sparse_linear", _linear, _key)
    _library.impl("sparse_values", _values, _key)
torch.library.register_fake("halfbyte::sparse_linear", _linear_fake, lib=_library)
torch.library.register_fake("halfbyte::sparse_values", _values_fake, lib=_library)
torch.library.register_autograd(
    "halfbyte::sparse_linear", _backward, setup_context=_save_for_backward, lib=_library
)

sparse_linear = torch.ops.halfbyte.sparse_linear.default
