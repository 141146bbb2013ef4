"""torch's bfloat16 linear layer, with the casts of a float32 input and output around it."""

import torch
from torch.nn.functional import linear

from . import Layer, Problem


def build(problem: Problem) -> Layer:
    x, bias = torch.from_numpy(problem.x), torch.from_numpy(problem.bias).bfloat16()
    bytes_ = problem.weight.size * 2
    weights = [torch.from_numpy(problem.weight).bfloat16() for _ in range(problem.copies(bytes_))]
    calls = [lambda w=w: linear(x.bfloat16(), w, bias).float() for w in weights]
    return Layer(
        calls, lambda: calls[0]().numpy(), bytes_, f"torch {torch.__version__} bfloat16, casts included"
    )
