"""torch.sparse: a float32 weight in CSR, the fastest of the ways to multiply by it and of the layouts of x.

The indices are int32, which torch's MKL reads as they are. x is given row by row or column by column in
memory, and the result has the layout that comes out: nothing is converted in a call.
"""

import warnings
from collections.abc import Callable

import torch

from ..engine import fastest
from . import Layer, Problem


def build(problem: Problem) -> Layer:
    weight = _csr(torch.from_numpy(problem.weight))
    ways = _ways(torch.from_numpy(problem.x), torch.from_numpy(problem.bias))
    way = fastest({name: lambda call=call: call(weight) for name, call in ways.items()})
    bytes_ = sum(part.nbytes for part in (weight.values(), weight.col_indices(), weight.crow_indices()))
    weights = [weight.clone() for _ in range(problem.copies(bytes_))]
    calls = [lambda w=w: ways[way](w) for w in weights]
    note = f"torch {torch.__version__} CSR, {way}, the fastest of {', '.join(ways)}"
    return Layer(calls, lambda: calls[0]().numpy(), bytes_, note)


def _csr(weight: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that CSR is in beta
        wide = weight.to_sparse_csr()
    indices = wide.crow_indices().int(), wide.col_indices().int()
    return torch.sparse_csr_tensor(*indices, wide.values(), wide.shape)


def _ways(x: torch.Tensor, bias: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Weight -> x @ weight.T + bias."""
    column, by_columns = bias[:, None], x.t().contiguous()
    ways = {
        "F.linear": lambda w: torch.nn.functional.linear(x, w, bias),
        "addmm": lambda w: torch.addmm(column, w, x.t()).t(),
        "addmm on a column-major x": lambda w: torch.addmm(column, w, by_columns).t(),
    }
    if len(x) == 1:
        ways["addmv"] = lambda w: torch.addmv(bias, w, x[0])[None]
    return ways
