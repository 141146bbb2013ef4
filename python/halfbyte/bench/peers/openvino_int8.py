"""OpenVINO with 8-bit per-channel weights: the fastest of dynamic activation quantization and weights only.

The graph is what `nncf.compress_weights(mode=INT8_SYM)` produces: int8 -> Convert -> Multiply(scale) ->
MatMul.
"""

from collections.abc import Callable

import numpy as np
import openvino
from openvino import opset13 as ops

from ..engine import fastest
from . import Layer, Problem

# Activations are quantized at run time in groups of this many along K; 0 leaves them in float32.
_GROUPS = {"dynamic activations g32": 32, "dynamic activations g128": 128, "weights only": 0}


def build(problem: Problem) -> Layer:
    variants = {
        name: infer_call(problem, weights_model(problem), {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)})
        for name, group in _GROUPS.items()
    }
    chosen = fastest({name: call for name, (call, _) in variants.items()})
    hint = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(_GROUPS[chosen])}
    note = f"OpenVINO {version()} int8 weights, {chosen}, the fastest of {', '.join(_GROUPS)}"
    return layer(problem, lambda: weights_model(problem), hint, note)


def version() -> str:
    """Release number without the build's hash."""
    return openvino.__version__.partition("-")[0]


def weights_model(problem: Problem) -> openvino.Model:
    """x[m,k] float32 -> y[m,n] float32, with compressed weights."""
    m, _, k = problem.mnk
    x = ops.parameter([m, k], np.float32, name="x")
    return openvino.Model([product(problem, x)], [x], "linear")


def product(problem: Problem, x):
    """MatMul of `x` with symmetric per-channel int8 weights, plus the bias."""
    peak = np.abs(problem.weight).max(axis=1, keepdims=True)
    scale = np.where(peak > 0, peak / 127, 1).astype(np.float32)
    codes = np.clip(np.rint(problem.weight / scale), -127, 127).astype(np.int8)
    weight = ops.multiply(ops.convert(ops.constant(codes), "f32"), ops.constant(scale))
    return ops.add(ops.matmul(x, weight, False, True), ops.constant(problem.bias.reshape(1, -1)))


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
    problem: Problem, make_model: Callable[[], openvino.Model], hints: dict[str, str], note: str
) -> Layer:
    """One compiled model per weight copy."""
    weight_bytes = problem.weight.size + 4 * problem.weight.shape[0]
    pairs = [infer_call(problem, make_model(), hints) for _ in range(problem.copies(weight_bytes))]

    def output() -> np.ndarray:
        call, request = pairs[0]
        call()
        return np.array(request.get_output_tensor().data)

    return Layer([call for call, _ in pairs], output, weight_bytes, note)
