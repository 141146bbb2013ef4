"""torch's 4-bit weights in groups: `aten::_weight_int4pack_mm_for_cpu` on a bfloat16 input, which torchao's
Int4WeightOnlyConfig calls too.
"""

import numpy as np
import torch

from . import Layer, Problem, UnavailableError
from .grouped import grouped_codes

_N_MULTIPLE = 16


def build(problem: Problem) -> Layer:
    _, n, k = problem.mnk
    group = problem.group
    if n % _N_MULTIPLE or k % group:
        raise UnavailableError(f"n must be a multiple of {_N_MULTIPLE}, k of the group {group}")
    codes, scale = grouped_codes(problem.weight, 4, group)
    wide = torch.from_numpy(codes.reshape(n, k).astype(np.int32))
    # [groups, n, 2]: scale, and the float value of code 8, which is 0 for symmetric codes.
    pairs = torch.stack([torch.from_numpy(scale).T, torch.zeros(k // group, n)], -1).bfloat16().contiguous()
    bytes_ = codes.size // 2 + pairs.nbytes
    x, bias = torch.from_numpy(problem.x), torch.from_numpy(problem.bias).bfloat16()
    ops = torch.ops.aten
    packs = [ops._convert_weight_to_int4pack_for_cpu(wide, 1) for _ in range(problem.copies(bytes_))]
    calls = [
        lambda p=p: ops._weight_int4pack_mm_for_cpu(x.bfloat16(), p, group, pairs).add_(bias).float()
        for p in packs
    ]
    note = f"torch {torch.__version__} _weight_int4pack_mm_for_cpu g{group}, bfloat16, casts included"
    return Layer(calls, lambda: calls[0]().numpy(), bytes_, note)
