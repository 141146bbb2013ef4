"""QLinear: the module that takes the place of nn.Linear; int8 weights are its buffers, the pack its cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import _core, dispatch
from .arrays import BF16, F16, F32, check_vector, kind_of
from .errors import DTypeError
from .ops import ACTIVATIONS, run_linear
from .pack import PackedWeight
from .quantize import QuantizedTensor, check_static, quantize
from .scheme import Scheme
from .torch_ops import linear_w8a8, packed_weight
from .weight_view import WeightView

_FLOAT32_BUFFERS = ("weight_scale", "bias", "input_scale")
_CODES = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}

# True while something records or replaces tensor operations, from which a call into the core would hide.
_tracing = torch._C._get_tracing_state
_modes = torch._C._len_torch_dispatch_stack

_get_num_threads = torch.get_num_threads


class QLinear(nn.Module):
    """A linear layer on quantized weights: `y = activation(x @ weight.T + bias)`.

    x: [..., in_features], float32, bfloat16 or float16, on the CPU; y has the dtype of x. In eager inference
    the call goes straight to the C++ core; under torch.compile, tracing, or where a gradient of x is wanted,
    through the torch operator halfbyte::linear_w8a8, which has a gradient with respect to x for activation
    "none".

    Buffers, all in the state_dict: weight_codes int8 [n, k], weight_scale float32 [n], bias float32 [n] or
    None and, where activations are quantized with fixed numbers (`calibrate`), input_scale float32 [] and
    input_zero int32 []. The float32 ones stay so under .half() and .bfloat16(). Weights are packed at the
    first call, and again after a buffer was replaced or changed in place; the pack is shared by layers that
    share their codes, and never saved.

    activation: none, relu, gelu, gelu_tanh or silu; may be assigned.
    float_dtype: what `weight.dtype` says, that of the float weight before; follows .half() and its kind.
    """

    def __init__(
        self, q: QuantizedTensor, bias: Tensor | None = None, *, float_dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        if not isinstance(q, QuantizedTensor) or not isinstance(q.codes, Tensor):
            raise DTypeError(
                "QLinear takes a QuantizedTensor of torch tensors; quantize() makes one of a torch weight"
            )
        self.scheme: Scheme = q.scheme
        self.out_features, self.in_features = q.shape
        self.activation = "none"
        self.float_dtype = float_dtype
        self.register_buffer("weight_codes", q.codes)
        self.register_buffer("weight_scale", q.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("input_scale", None)
        self.register_buffer("input_zero", None)
        self._plan: tuple | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: str | Scheme = "w8a8", *, name: str = "linear"
    ) -> QLinear:
        """The quantized twin of an nn.Linear, which is left as it is. `name` is what errors call the layer.

        Raises what `quantize` raises.
        """
        q = quantize(linear.weight, scheme, name=f"{name}.weight")
        return cls(q, linear.bias, float_dtype=linear.weight.dtype).train(linear.training)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor that shares this layer's buffers."""
        return QuantizedTensor(self.weight_codes, self.weight_scale, self.scheme)

    @property
    def weight(self) -> WeightView:
        """Stands for the dequantized weight, for code that reads `layer.weight`."""
        return WeightView(self)

    @property
    def static(self) -> tuple[float, int] | None:
        """(scale, zero) that every input is quantized with, or None: found per token."""
        return None if self.input_scale is None else (self.input_scale.item(), self.input_zero.item())

    @static.setter
    def static(self, static: tuple[float, int] | None) -> None:
        if static is None:
            self.input_scale = self.input_zero = None
            return
        scale, zero = check_static(static)
        device = self.weight_codes.device
        self.input_scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.input_zero = torch.tensor(zero, dtype=torch.int32, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] of x [..., in_features]."""
        if is_compiling():
            return self._operator(x)
        plan = self._plan
        if (
            plan is None
            or type(x) is not Tensor
            or (dtype := _CODES.get(x.dtype)) is None
            or x.requires_grad
            or not x.is_cpu
            or not x.is_contiguous()
            or _modes()
            or _tracing() is not None
        ):
            return self._checked(x)
        codes, codes_v, scale, scale_v, bias, static, static_v, k, n, packed, x_scale, x_zero = plan
        buffers, shape = self._buffers, x.shape
        dims = len(shape)
        if (
            buffers["weight_codes"] is not codes
            or codes._version != codes_v
            or buffers["weight_scale"] is not scale
            or scale._version != scale_v
            or buffers["bias"] is not bias
            or buffers["input_scale"] is not static
            or (static is not None and static._version != static_v)
            or dims == 0
            or shape[-1] != k
        ):
            return self._checked(x)
        # Separate integers are parsed faster than a tuple, and slices of a Size are slow: 0.4 us less.
        if dims == 2:
            m = shape[0]
            out = x.new_empty(m, n)
        elif dims == 3:
            m = shape[0] * shape[1]
            out = x.new_empty(shape[0], shape[1], n)
        else:
            m = x.numel() // k
            out = x.new_empty(*shape[:-1], n)
        _core.linear_w8a8(
            packed,
            m,
            x.data_ptr(),
            k,
            dtype,
            out.data_ptr(),
            n,
            dtype,
            0 if bias is None else bias.data_ptr(),
            ACTIVATIONS[self.activation],
            0,
            0,
            0,
            x_scale,
            x_zero,
            dispatch.thread_override or _get_num_threads(),
        )
        return out

    def _checked(self, x: Tensor) -> Tensor:
        """forward with every check, for every kind of input; prepares the short way for the next call."""
        if not isinstance(x, Tensor):
            raise DTypeError(f"QLinear: x must be a torch tensor, not {type(x).__name__}")
        recorded = x.requires_grad and torch.is_grad_enabled()
        if recorded or x.is_meta or type(x) is not Tensor or _modes() or _tracing() is not None:
            return self._operator(x)
        packed = self._prepare()
        return run_linear(x, packed, self.bias, self.activation, None, None, self.static)

    def _operator(self, x: Tensor) -> Tensor:
        return linear_w8a8(
            x,
            self.weight_codes,
            self.weight_scale,
            self.bias,
            self.activation,
            None,
            self.input_scale,
            self.input_zero,
        )

    def _prepare(self) -> PackedWeight:
        """Pack, and note what `forward` compares and passes on."""
        with torch.inference_mode(False):
            for name in ("weight_codes", "weight_scale", "input_scale"):
                if (buffer := self._buffers[name]) is not None and buffer.is_inference():
                    self._buffers[name] = buffer.clone()  # inference tensors do not count their changes
        if self.bias is not None:
            check_vector(
                kind_of(self.weight_codes, "weight_codes"),
                self.bias,
                self.out_features,
                "bias",
                "weight_codes",
            )
            self._buffers["bias"] = self.bias.float().contiguous()
        codes, scale, static = self.weight_codes, self.weight_scale, self.input_scale
        packed = packed_weight(codes, scale)
        self._plan = (
            codes,
            codes._version,
            scale,
            scale._version,
            self.bias,
            static,
            0 if static is None else static._version,
            self.in_features,
            self.out_features,
            packed.core,
            *(self.static or (0.0, 0)),
        )
        return packed

    def _apply(self, fn: Any, recurse: bool = True) -> QLinear:
        kept = {name: self._buffers[name] for name in _FLOAT32_BUFFERS if self._buffers[name] is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if (moved := self._buffers[name]).dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype)).dtype
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if prefix + "weight_codes" in state_dict:  # the file decides whether the layer is static
            for name in ("input_scale", "input_zero"):
                saved = state_dict.get(prefix + name)
                if (saved is None) != (self._buffers[name] is None):
                    self._buffers[name] = None if saved is None else torch.empty_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_plan": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}, "
            f"kernel={_core.select(self.scheme.op)}, static={self.static}"
        )
