"""torch's own float32 linear layer (`torch.nn.functional.linear`)."""

import torch
from torch.nn.functional import linear

from . import Layer, Problem


def build(problem: Problem) -> Layer:
    x, bias = torch.from_numpy(problem.x), torch.from_numpy(problem.bias)
    bytes_ = problem.weight.nbytes
    weights = [torch.from_numpy(problem.weight).clone() for _ in range(problem.copies(bytes_))]
    calls = [lambda w=w: linear(x, w, bias) for w in weights]
    return Layer(calls, lambda: calls[0]().numpy(), bytes_, f"torch {torch.__version__} float32")
