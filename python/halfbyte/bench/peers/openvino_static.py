"""OpenVINO with int8 weights and a static int8 activation range, calibrated on the measured input itself.

The graph is what `nncf.quantize` produces: FakeQuantize on the input, then the MatMul with int8 constant
weights. No range is measured at run time, so this does less work per call than the dynamic methods.
"""

import numpy as np
import openvino
from openvino import opset13 as ops

from . import Layer, Problem
from .openvino_weights import int8_weight, layer, product, version

_LEVELS = 256


def build(problem: Problem) -> Layer:
    weight_bytes = problem.weight.size + 4 * problem.weight.shape[0]
    note = f"OpenVINO {version()} int8 weights, static int8 activations"
    return layer(problem, lambda: _model(problem), {}, weight_bytes, note)


def _model(problem: Problem) -> openvino.Model:
    m, _, k = problem.mnk
    x = ops.parameter([m, k], np.float32, name="x")
    low, high = (ops.constant(np.array([[v]], np.float32)) for v in (problem.x.min(), problem.x.max()))
    codes = ops.fake_quantize(x, low, high, low, high, _LEVELS)
    return openvino.Model([product(problem, codes, int8_weight(problem))], [x], "linear")
