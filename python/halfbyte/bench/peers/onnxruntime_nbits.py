"""onnxruntime's MatMulNBits: 8- or 4-bit weights in groups along k; int8 compute where the scheme has int8
activations (accuracy level 4), else float32 (level 1).
"""

import onnxruntime
from onnx import helper

from . import Layer, Problem
from .grouped import grouped_codes, nibbles
from .onnxruntime_int8 import graph, sessions


def build(problem: Problem) -> Layer:
    _, n, k = problem.mnk
    bits, group = problem.scheme.weight_bits, problem.group
    level = 4 if problem.scheme.activation_bits == 8 else 1
    codes, scale = grouped_codes(problem.weight, bits, group)
    if bits == 4:
        codes = nibbles(codes)
    node = helper.make_node(
        "MatMulNBits", ["x", "q", "s", "", "", "b"], ["y"],
        domain="com.microsoft", K=k, N=n, bits=bits, block_size=group, accuracy_level=level,
    )  # fmt: skip
    model = graph(
        problem, [node], {"q": codes, "s": scale.reshape(-1), "b": problem.bias}, {"com.microsoft": 1}
    )
    how = f"{bits}-bit g{group}, accuracy level {level}, I/O binding"
    note = f"onnxruntime {onnxruntime.__version__} MatMulNBits {how}"
    return sessions(problem, model.SerializeToString(), codes.nbytes + scale.nbytes, note)
