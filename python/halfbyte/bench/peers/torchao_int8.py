"""torchao Int8DynamicActivationInt8WeightConfig: per-token activations, compiled where that works."""

import copy

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from ..machine import package_version
from . import Layer, Problem, first_line
from .torch_int8 import linear_module


def quantized(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of `model` with torchao's int8 tensors as weights."""
    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def compiled(call, *example, fullgraph: bool = True, **named):
    """(compiled call, "compiled"), or (call, "eager because ...") where torch.compile fails here."""
    # Earlier problems count against the recompile limit, past which torch.compile would run eagerly in
    # silence.
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            fast = torch.compile(call, dynamic=False, fullgraph=fullgraph)
            fast(*example, **named)
        return fast, "compiled"
    except Exception as error:  # no C++ compiler, an unsupported platform: torchao still runs in eager mode
        return call, f"eager because torch.compile failed ({type(error).__name__}: {first_line(error, 80)})"


def build(problem: Problem) -> Layer:
    x, model = torch.from_numpy(problem.x), linear_module(problem)
    bytes_ = problem.weight.size + 4 * problem.weight.shape[0]
    layers = [quantized(model)[0] for _ in range(problem.copies(bytes_))]
    # One compiled function for all copies: torch.compile guards on the layer's structure, not on its weights.
    call, how = compiled(lambda layer, x: layer(x), layers[0], x)
    calls = [lambda layer=layer: call(layer, x) for layer in layers]
    note = f"torchao {package_version('torchao')} Int8DynamicActivationInt8WeightConfig, {how}"
    return Layer(calls, lambda: calls[0]().numpy(), bytes_, note)
