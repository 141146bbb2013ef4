"""onnxruntime's MatMulNBits: 8-bit weights in groups of 128 along K, int8 compute (accuracy level 4)."""

import numpy as np
import onnxruntime
from onnx import helper

from . import Layer, Problem
from .onnxruntime_int8 import graph, sessions

_GROUP = 128


def build(problem: Problem) -> Layer:
    _, n, k = problem.mnk
    groups = -(-k // _GROUP)
    padded = np.zeros((n, groups * _GROUP), np.float32)
    padded[:, :k] = problem.weight
    grouped = padded.reshape(n, groups, _GROUP)
    scale = np.abs(grouped).max(axis=-1) / 127
    scale[scale == 0] = 1
    codes = (np.clip(np.rint(grouped / scale[..., None]), -127, 127) + 128).astype(np.uint8)
    node = helper.make_node(
        "MatMulNBits", ["x", "q", "s", "", "", "b"], ["y"],
        domain="com.microsoft", K=k, N=n, bits=8, block_size=_GROUP, accuracy_level=4,
    )  # fmt: skip
    model = graph(
        problem, [node], {"q": codes, "s": scale.reshape(-1), "b": problem.bias}, {"com.microsoft": 1}
    )
    note = f"onnxruntime {onnxruntime.__version__} MatMulNBits 8-bit g128, accuracy level 4, I/O binding"
    return sessions(problem, model.SerializeToString(), codes.nbytes + scale.nbytes, note)
