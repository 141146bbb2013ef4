"""onnxruntime's dynamic quantization: DynamicQuantizeLinear + MatMulInteger, per-channel int8 weights."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from . import Layer, Problem

# IR 9 / opset 17: read by every onnxruntime since 1.16, whatever the onnx package would write by default.
_OPSET, _IR = 17, 9


def build(problem: Problem) -> Layer:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(_float_model(problem), source)
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)
        model = target.read_bytes()
    note = f"onnxruntime {onnxruntime.__version__} quantize_dynamic, per-channel int8 weights, I/O binding"
    return sessions(problem, model, problem.weight.size + 4 * problem.weight.shape[0], note)


def graph(
    problem: Problem, nodes: list, initializers: dict[str, np.ndarray], domains: dict[str, int]
) -> onnx.ModelProto:
    """A model x[m,k] -> y[m,n]; m is fixed, which lets onnxruntime plan its memory."""
    m, n, k = problem.mnk
    body = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in initializers.items()],
    )
    opsets = [helper.make_opsetid(name, version) for name, version in {"": _OPSET, **domains}.items()]
    return helper.make_model(body, opset_imports=opsets, ir_version=_IR)


def sessions(problem: Problem, model: bytes, weight_bytes: int, note: str) -> Layer:
    """One session per weight copy, inputs and outputs bound once; the pool spins as onnxruntime lets it."""
    m, n, _ = problem.mnk
    count = problem.copies(weight_bytes)
    options = session_options(problem.threads, shared=count > 1)
    x = onnxruntime.OrtValue.ortvalue_from_numpy(problem.x)
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((m, n), np.float32))
    calls = []
    for _ in range(count):
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x)
        binding.bind_ortvalue_output("y", y)
        calls.append(lambda session=session, binding=binding: session.run_with_iobinding(binding))

    def output() -> np.ndarray:
        calls[0]()
        return y.numpy()

    return Layer(calls, output, weight_bytes, note)


def session_options(threads: int, shared: bool = False) -> onnxruntime.SessionOptions:
    """Every optimization, and a pool of `threads` threads of its own or shared with other sessions.

    Several sessions share one pool of threads: a pool each would have the idle ones spin beside the busy one.
    Once a process has that pool, onnxruntime refuses sessions with one of their own.
    """
    options = onnxruntime.SessionOptions()
    if shared or _make_shared_pool.cache_info().currsize:
        _make_shared_pool(threads)
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    return options


@cache
def _make_shared_pool(threads: int) -> None:
    onnxruntime.set_global_thread_pool_sizes(threads, 1)  # fails where there is one of another size


def _float_model(problem: Problem) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y"]),
    ]
    return graph(problem, nodes, {"w": problem.weight.T, "b": problem.bias}, {})
