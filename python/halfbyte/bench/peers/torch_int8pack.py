"""torch's weight-only int8: `aten::_weight_int8pack_mm` on a bfloat16 input, one scale per output channel."""

import numpy as np
import torch

from . import Layer, Problem


def build(problem: Problem) -> Layer:
    peak = np.abs(problem.weight).max(axis=1, keepdims=True)
    scale = np.where(peak > 0, peak / 127, 1).astype(np.float32)
    codes = torch.from_numpy(np.clip(np.rint(problem.weight / scale), -127, 127).astype(np.int8))
    scale = torch.from_numpy(scale[:, 0]).bfloat16()
    bytes_ = codes.nbytes + scale.nbytes
    x, bias = torch.from_numpy(problem.x), torch.from_numpy(problem.bias).bfloat16()
    copies = [codes.clone() for _ in range(problem.copies(bytes_))]
    multiply = torch.ops.aten._weight_int8pack_mm
    calls = [lambda c=c: multiply(x.bfloat16(), c, scale).add_(bias).float() for c in copies]
    note = f"torch {torch.__version__} _weight_int8pack_mm, bfloat16, casts included"
    return Layer(calls, lambda: calls[0]().numpy(), bytes_, note)
