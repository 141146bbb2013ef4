"""torch's own ways to run a whole model: bfloat16, torch.ao dynamic int8, and torchao compiled."""

import copy

import torch

from .models import Build, Encoder, Forward


def bfloat16(task: Encoder) -> Build:
    """Every parameter and activation in bfloat16."""
    forward = Forward(copy.deepcopy(task.model).bfloat16(), "whole model in bfloat16")
    return lambda inputs: forward


def int8(task: Encoder) -> Build:
    """torch.ao quantize_dynamic: per-tensor int8 weights and activations."""
    from . import torch_int8

    engine = torch.backends.quantized.engine
    note = f"torch.ao quantize_dynamic, default engine ({engine})"
    forward = Forward(torch_int8.quantized(task.model, engine), note)
    return lambda inputs: forward


def torchao(task: Encoder) -> Build:
    """torchao's dynamic int8, compiled for each shape."""
    from . import torchao_int8

    model = torchao_int8.quantized(task.model)

    def build(inputs) -> Forward:
        call, how = torchao_int8.compiled(lambda **batch: model(**batch), fullgraph=False, **inputs)
        return Forward(call, f"torchao Int8DynamicActivationInt8WeightConfig, {how}")

    return build
