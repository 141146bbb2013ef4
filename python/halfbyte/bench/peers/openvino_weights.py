"""OpenVINO with 8- or 4-bit weights: the fastest of dynamic activation quantization and weights only.

The graph is what `nncf.compress_weights` produces: for 8 bits (INT8_SYM) int8 -> Convert -> Multiply(scale
per channel) -> MatMul; for 4 bits i4 (INT4_SYM), or u4 with zero points (INT4_ASYM), with a float16 scale per
group. For a scheme with 16-bit activations OpenVINO's stay in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import openvino
from openvino import opset13 as ops

from ..engine import fastest
from . import Layer, Problem, UnavailableError
from .grouped import grouped_codes, nibbles

# Activations are quantized at run time in groups of this many along K; 0 leaves them in float32.
_GROUPS = {"dynamic activations g32": 32, "dynamic activations g128": 128, "weights only": 0}
_FOUR_BITS = {"i4": openvino.Type.i4, "u4": openvino.Type.u4}
_ZERO = 8  # the code that means 0


@dataclass(frozen=True)
class _Variant:
    """One of the ways to run the layer."""

    make_model: Callable[[], openvino.Model]
    hints: dict[str, str]


def build(problem: Problem) -> Layer:
    eight, floats = problem.scheme.weight_bits == 8, problem.scheme.activation_bits == 16
    kinds = ["int8"] if eight else list(_FOUR_BITS)
    groups = {name: group for name, group in _GROUPS.items() if not (floats and group)}
    variants = {
        f"{kind} weights, {name}": _Variant(
            lambda kind=kind: weights_model(problem, kind), {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)}
        )
        for kind in kinds
        for name, group in groups.items()
    }
    calls = {}
    for name, variant in variants.items():
        calls[name], request = infer_call(problem, variant.make_model(), variant.hints)
        if not (eight or _keeps_four_bits(request)):
            raise UnavailableError(f"OpenVINO {version()} widens 4-bit weights when it compiles the model")
    chosen = fastest(calls)
    scales = "per channel" if eight else f"g{problem.group}"
    tried = ", ".join([*(kinds if len(kinds) > 1 else []), *(groups if len(groups) > 1 else [])])
    note = f"OpenVINO {version()} {scales}, {chosen}" + (f", the fastest of {tried}" if tried else "")
    size = problem.weight.size
    weight_bytes = size + 4 * problem.weight.shape[0]
    if not eight:  # a float16 scale per group
        weight_bytes = size // 2 + 2 * size // problem.group
    return layer(problem, variants[chosen].make_model, variants[chosen].hints, weight_bytes, note)


def version() -> str:
    """Release number without the build's hash."""
    return openvino.__version__.partition("-")[0]


def weights_model(problem: Problem, kind: str) -> openvino.Model:
    """x[m,k] float32 -> y[m,n] float32, with compressed weights of `kind` int8, i4 or u4."""
    m, _, k = problem.mnk
    x = ops.parameter([m, k], np.float32, name="x")
    weight = int8_weight(problem) if kind == "int8" else _int4_weight(problem, kind)
    return openvino.Model([product(problem, x, weight)], [x], "linear")


def product(problem: Problem, x, weight):
    """MatMul of `x` with the weight, plus the bias."""
    return ops.add(ops.matmul(x, weight, False, True), ops.constant(problem.bias.reshape(1, -1)))


def int8_weight(problem: Problem):
    """Symmetric per-channel int8 weights."""
    peak = np.abs(problem.weight).max(axis=1, keepdims=True)
    scale = np.where(peak > 0, peak / 127, 1).astype(np.float32)
    codes = np.clip(np.rint(problem.weight / scale), -127, 127).astype(np.int8)
    return ops.multiply(ops.convert(ops.constant(codes), "f32"), ops.constant(scale))


def _int4_weight(problem: Problem, kind: str):
    """Symmetric 4-bit weights in groups; codes of u4 are 8 higher and the graph subtracts 8."""
    _, n, k = problem.mnk
    if k % problem.group:
        raise UnavailableError(f"its weights take k in multiples of the group {problem.group}")
    codes, scale = grouped_codes(problem.weight, 4, problem.group)
    signed = kind == "i4"
    values = _four_bits(codes.shape, nibbles((codes - _ZERO) & 15 if signed else codes), kind)
    if not signed:
        values = ops.subtract(values, _four_bits((1, 1, 1), np.array([_ZERO]), kind))
    grouped = ops.multiply(values, ops.constant(scale[..., None].astype(np.float16)))
    return ops.convert(ops.reshape(grouped, np.array([n, k]), False), "f32")


def _four_bits(shape: tuple[int, ...], packed: np.ndarray, kind: str):
    """A constant of `shape` from bytes of two elements, converted to float16."""
    # The tensor owns its memory; one made of an array would borrow the array's.
    tensor = openvino.Tensor(_FOUR_BITS[kind], list(shape))
    tensor.data[:] = packed.reshape(-1)
    return ops.convert(openvino.op.Constant(tensor), "f16")


def _keeps_four_bits(request: openvino.InferRequest) -> bool:
    """Whether the compiled model still holds a matrix of 4-bit constants."""
    outputs = (node.output(0) for node in request.get_compiled_model().get_runtime_model().get_ops())
    return any(
        out.get_element_type() in _FOUR_BITS.values() and np.prod(out.get_shape()) > 1 for out in outputs
    )


def infer_call(
    problem: Problem, model: openvino.Model, hints: dict[str, str]
) -> tuple[Callable, openvino.InferRequest]:
    """Compile for the CPU, one stream, fixed shapes; the input is shared, the output read in place."""
    settings = {
        "INFERENCE_NUM_THREADS": problem.threads,
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(model, "CPU", {**settings, **hints}).create_infer_request()
    request.set_input_tensor(openvino.Tensor(problem.x, shared_memory=True))
    return request.infer, request


def layer(
    problem: Problem,
    make_model: Callable[[], openvino.Model],
    hints: dict[str, str],
    weight_bytes: int,
    note: str,
) -> Layer:
    """One compiled model per weight copy."""
    pairs = [infer_call(problem, make_model(), hints) for _ in range(problem.copies(weight_bytes))]

    def output() -> np.ndarray:
        call, request = pairs[0]
        call()
        return np.array(request.get_output_tensor().data)

    return Layer([call for call, _ in pairs], output, weight_bytes, note)
