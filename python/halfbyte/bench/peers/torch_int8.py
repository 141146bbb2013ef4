"""torch.ao quantize_dynamic: per-tensor int8 weights and activations, the fastest of torch's engines."""

import torch
from torch.ao.quantization import quantize_dynamic

from ..engine import fastest
from . import Layer, Problem, UnavailableError

_ENGINES = ("x86", "onednn", "fbgemm")


def quantized(model: torch.nn.Module, engine: str) -> torch.nn.Module:
    """A copy of `model` with its nn.Linear layers replaced; weights are packed for `engine`."""
    previous = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        return quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = previous


def linear_module(problem: Problem) -> torch.nn.Sequential:
    """The problem's layer as a model of one nn.Linear."""
    _, n, k = problem.mnk
    layer = torch.nn.Linear(k, n, device="meta")  # its own values would be discarded
    layer.weight = torch.nn.Parameter(torch.from_numpy(problem.weight), requires_grad=False)
    layer.bias = torch.nn.Parameter(torch.from_numpy(problem.bias), requires_grad=False)
    return torch.nn.Sequential(layer).eval()


def build(problem: Problem) -> Layer:
    x, model = torch.from_numpy(problem.x), linear_module(problem)
    engines = [e for e in _ENGINES if e in torch.backends.quantized.supported_engines]
    if not engines:
        raise UnavailableError(f"torch has none of the quantized engines {', '.join(_ENGINES)}")
    variants = {e: _call(quantized(model, e)[0], x) for e in engines}  # a packed weight keeps its engine
    engine = fastest(variants)
    bytes_ = problem.weight.size
    layers = [quantized(model, engine)[0] for _ in range(problem.copies(bytes_))]
    calls = [_call(layer, x) for layer in layers]
    tried = f"engine {engine}, the fastest of {', '.join(engines)}"
    return Layer(
        calls, lambda: calls[0]().numpy(), bytes_, f"torch.ao quantize_dynamic {torch.__version__}, {tried}"
    )


def _call(layer: torch.nn.Module, x: torch.Tensor):
    return lambda: layer(x)
