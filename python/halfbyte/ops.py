"""The ops on numpy arrays and torch tensors: arguments checked here, then one call into the C++ core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _core
from .arrays import Array, Gpu, Kind, check_kind, check_vector, float_code, place_of
from .dispatch import isa_errors
from .errors import DeviceError, DTypeError, ShapeError
from .pack import GpuWeight, PackedWeight
from .quantize import check_static, check_takes_static
from .scheme import Scheme
from .sparse.scheme import SparseScheme

_W8A8 = Scheme(8, 8)
_MOST_LINEARS = 3
_WEIGHTS = (PackedWeight, GpuWeight)
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def linear(
    x: Array,
    packed: PackedWeight | GpuWeight,
    bias: Array | None = None,
    *,
    activation: str = "none",
    residual: Array | None = None,
    out_dtype: Any = None,
    static: tuple[float, int] | None = None,
) -> Array:
    """`activation(x @ weight.T + bias) + residual` with integer products, exact int32 sums and a fused
    epilogue; the scheme of the weight says how x is quantized. Sparse weights of floats multiply floats.

    x: [..., k] with any leading dimensions, also none or empty; float32, float16 or (torch) bfloat16. bias:
    [n], floating point. residual: [..., n], floating point. All of the kind of x: numpy or torch. activation:
    none, relu, gelu (erf), gelu_tanh or silu. out_dtype: that of x unless given; int32 returns the
    accumulator itself, `sum_k (qx - zero) * qw`, which only w8a8 has, dense or sparse, and takes no bias,
    activation or residual. static: (scale, zero) for all of x instead of a scale and zero point per row found
    from the row, for schemes with a8 and without +ag.

    Returns [..., n], contiguous. A row of x with a NaN or an infinity gives a row of NaN. Not differentiable:
    QLinear is. Raises DTypeError (TypeError), ShapeError, DeviceError or ValueError.
    """
    _check_inference(x, "linear")
    return run_linear(x, packed, bias, activation, residual, out_dtype, static)


def gated_linear(
    x: Array,
    packed: PackedWeight | GpuWeight,
    gate: PackedWeight | GpuWeight,
    bias: Array | None = None,
    gate_bias: Array | None = None,
    *,
    activation: str = "silu",
    residual: Array | None = None,
    out_dtype: Any = None,
    static: tuple[float, int] | None = None,
) -> Array:
    """`(x @ weight.T + bias) * activation(x @ gate.T + gate_bias) + residual`, x quantized once: the
    first half of a gated MLP (Shazeer 2020, arXiv:2002.05202), SwiGLU with silu.

    gate: of the shape and scheme of `packed`. The rest as for `linear`; the product is one float32
    multiplication. Raises what `linear` does.
    """
    _check_inference(x, "gated_linear")
    if not isinstance(gate, _WEIGHTS):
        raise DTypeError(f"gate must be a PackedWeight, not {type(gate).__name__}")
    if isinstance(packed, _WEIGHTS) and (gate.shape, gate.scheme) != (packed.shape, packed.scheme):
        raise ShapeError(
            f"gate is {gate.shape} in {gate.scheme}; it must be {packed.shape} in {packed.scheme} like the "
            "weight"
        )
    return run_linear(x, packed, bias, activation, residual, out_dtype, static, gate, gate_bias)


def gated_mlp(
    x: Array,
    up: PackedWeight | GpuWeight,
    gate: PackedWeight | GpuWeight,
    down: PackedWeight | GpuWeight,
    *,
    activation: str = "silu",
    residual: Array | None = None,
) -> Array:
    """`down((x @ up.T) * activation(x @ gate.T)) + residual`: `gated_linear`, then `linear`. x: [..., k]."""
    return linear(gated_linear(x, up, gate, activation=activation), down, residual=residual)


def linears(
    x: Array,
    packed: Sequence[PackedWeight | GpuWeight],
    biases: Sequence[Array | None] | None = None,
    *,
    activation: str = "none",
    static: tuple[float, int] | None = None,
) -> list[Array]:
    """`[activation(x @ weight.T + bias) for ...]` of up to three weights, such as query, key and value, whose
    input is quantized once and whose products are one multiplication. x: [..., k].

    packed: of one scheme and one k; otherwise ShapeError. biases: one per weight, or None. The rest as for
    `linear`, whose results these are.
    """
    _check_inference(x, "linears")
    if not packed or len(packed) > _MOST_LINEARS:
        raise ShapeError(f"linears takes 1 to {_MOST_LINEARS} weights, not {len(packed)}")
    biases = [None] * len(packed) if biases is None else list(biases)
    if len(biases) != len(packed):
        raise ShapeError(f"there are {len(biases)} biases for {len(packed)} weights")
    calls = [_Call(x, p, b, activation, static) for p, b in zip(packed, biases, strict=True)]
    first = calls[0]
    for p in packed[1:]:
        if (p.shape[1], p.scheme) != (packed[0].shape[1], packed[0].scheme):
            raise ShapeError(
                f"a weight is {p.shape} in {p.scheme}; all must be of {packed[0].shape[1]} input features "
                f"and of {packed[0].scheme} like the first"
            )
    kind = first.kind
    if isinstance(kind, Gpu):
        from .cuda.linear import Input, run

        rows = Input(x, first.static)
        return [
            run(rows, p, call.bias, activation, None, x.dtype) for p, call in zip(packed, calls, strict=True)
        ]
    outs = [kind.empty((*x.shape[:-1], p.shape[0]), x.dtype) for p in packed]
    rows, ld = kind.rows(x, packed[0].shape[1])
    weights = [
        (p.core, kind.pointer(out), p.shape[0], call.bias_pointer)
        for p, out, call in zip(packed, outs, calls, strict=True)
    ]
    with isa_errors:
        _core.linears(
            weights,
            len(rows),
            kind.pointer(rows),
            ld,
            first.x_code,
            first.x_code,
            ACTIVATIONS[activation],
            *first.static,
            kind.threads(),
        )
    return outs


def _check_inference(x: Array, what: str) -> None:
    kind = place_of(x, "x")
    if getattr(x, "requires_grad", False) and kind.torch.is_grad_enabled():
        raise ValueError(
            f"{what}: x requires a gradient, which this function does not record; use a QLinear or a "
            "SparseLinear, or call it under torch.no_grad()"
        )


def _check_together(kind: Kind, x: Array, packed: PackedWeight | GpuWeight) -> None:
    """DeviceError unless x, which is of `kind`, is where the weight is."""
    if isinstance(kind, Gpu):
        if isinstance(packed, GpuWeight) and packed.device == kind.device:
            return
    elif isinstance(packed, PackedWeight):
        return
    here, there = (str(getattr(a, "device", "cpu")) for a in (x, packed))
    raise DeviceError(
        f"x is on the device {here!r} and the weight on {there!r}: move x, or the weight before it is packed "
        "(a model with .to())"
    )


class _Call:
    """The arguments of a linear op, checked."""

    def __init__(
        self,
        x: Array,
        packed: PackedWeight,
        bias: Array | None,
        activation: str,
        static: tuple[float, int] | None,
    ):
        self.kind = kind = place_of(x, "x")
        self.x_code = float_code(kind, x.dtype, "x")
        if not isinstance(packed, _WEIGHTS):
            raise DTypeError(
                f"linear takes the PackedWeight that pack() returns, not {type(packed).__name__}"
            )
        _check_together(kind, x, packed)
        n, k = packed.shape
        if x.ndim == 0 or x.shape[-1] != k:
            raise ShapeError(
                f"x has the shape {tuple(x.shape)}; its last dimension must be the {k} input features of the "
                "weight"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is none of: {', '.join(ACTIVATIONS)}")
        self.static = (0.0, 0)
        if static is not None:
            check_takes_static(packed.scheme)
            self.static = check_static(static)
        self.bias = self.vector(bias, n, "bias")

    def vector(self, vector: Array | None, n: int, what: str) -> Array | None:
        """A bias as float32."""
        if vector is None:
            return None
        check_vector(self.kind, vector, n, what, "x")
        return self.kind.cast(vector, self.kind.float32)

    def address(self, array: Array | None) -> int:
        return 0 if array is None else self.kind.pointer(array)

    @property
    def bias_pointer(self) -> int:
        return self.address(self.bias)


def run_linear(
    x: Array,
    packed: PackedWeight | GpuWeight,
    bias: Array | None,
    activation: str,
    residual: Array | None,
    out_dtype: Any,
    static: tuple[float, int] | None,
    gate: PackedWeight | GpuWeight | None = None,
    gate_bias: Array | None = None,
) -> Array:
    """`linear` below autograd: every argument check, then the kernel."""
    call = _Call(x, packed, bias, activation, static)
    kind, (n, k) = call.kind, packed.shape
    if gate is not None:
        _check_together(kind, x, gate)
    out_dtype = x.dtype if out_dtype is None else kind.dtype(out_dtype)
    if out_dtype == kind.int32:
        if bias is not None or residual is not None or activation != "none" or gate is not None:
            raise ValueError(
                "an int32 output is the bare accumulator: it takes no bias, activation, residual or gate"
            )
        scheme = packed.scheme
        if not (scheme.values == "w8a8" if isinstance(scheme, SparseScheme) else scheme == _W8A8):
            raise ValueError(
                f"an int32 output is the one integer sum that an output of {_W8A8} has; {packed.scheme} adds "
                "floats: ask for a floating-point dtype"
            )
        out_code = kind.codes[out_dtype]
    else:
        out_code = float_code(kind, out_dtype, "the output")
    gate_bias = call.vector(gate_bias, n, "gate_bias")
    if isinstance(packed, GpuWeight):
        return _on_gpu(call, x, packed, activation, residual, out_dtype, gate, gate_bias)
    out = kind.empty((*x.shape[:-1], n), out_dtype)
    rows, ld = kind.rows(x, k)
    residual_args = (0, 0, 0)
    if residual is not None:
        residual, *residual_args = _residual(kind, residual, tuple(out.shape))
    with isa_errors:
        _core.linear(
            packed.core,
            len(rows),
            kind.pointer(rows),
            ld,
            call.x_code,
            kind.pointer(out),
            n,
            out_code,
            call.bias_pointer,
            ACTIVATIONS[activation],
            *residual_args,
            *call.static,
            kind.threads(),
            None if gate is None else gate.core,
            call.address(gate_bias),
        )
    return out


def _on_gpu(
    call: _Call,
    x: Array,
    packed: GpuWeight,
    activation: str,
    residual: Array | None,
    out_dtype: Any,
    gate: GpuWeight | None,
    gate_bias: Array | None,
) -> Array:
    from .cuda.linear import Input, accumulator, run

    if residual is not None:
        _check_residual(call.kind, residual, (*x.shape[:-1], packed.shape[0]))
    rows = Input(x, call.static)
    if out_dtype == call.kind.int32:
        return accumulator(rows, packed)
    return run(rows, packed, call.bias, activation, residual, out_dtype, gate, gate_bias)


def _residual(kind: Kind, residual: Array, shape: tuple[int, ...]) -> tuple[Array, int, int, int]:
    code = _check_residual(kind, residual, shape)
    rows, ld = kind.rows(residual, shape[-1])
    return rows, kind.pointer(rows), ld, code


def _check_residual(kind: Kind, residual: Array, shape: tuple[int, ...]) -> int:
    """Errors for a residual that does not fit the output; its dtype code."""
    check_kind(kind, residual, "residual", "x")
    code = float_code(kind, residual.dtype, "residual")
    if tuple(residual.shape) != shape:
        raise ShapeError(f"residual has the shape {tuple(residual.shape)}; the output has {shape}")
    return code
