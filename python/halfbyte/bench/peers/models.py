"""Other tools that can run a whole encoder: the rows of `halfbyte bench model`, in modules imported lazily.

Each entry names a module here and its function `(task: Encoder) -> Build`. That function does once what does
not depend on the shape of the input; the Build makes the forward pass for one shape. A forward pass takes the
keyword arguments input_ids and attention_mask as torch tensors, as ours does, and returns something with
`last_hidden_state`, a torch tensor: whatever conversion a tool needs is part of the call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import failures_are_reasons

PEERS = {
    "torch-bf16": "torch_model.bfloat16",
    "torch-int8": "torch_model.int8",
    "torchao": "torch_model.torchao",
    "onnxruntime-fp32": "onnxruntime_model.fp32",
    "onnxruntime-int8": "onnxruntime_model.int8",
    "openvino-fp32": "openvino_model.fp32",
    "openvino-bf16": "openvino_model.bfloat16",
    "openvino-int8": "openvino_model.int8_static",
    "openvino-dynamic": "openvino_model.int8_dynamic",
}


@dataclass(frozen=True)
class Encoder:
    """What a peer gets: transformers' BertModel in float32, and real text for those that calibrate."""

    model: Any
    threads: int
    calibration: Callable[[], Sequence[Mapping[str, Any]]]  # tokenized, each of its own length


@dataclass(frozen=True)
class Output:
    """What a forward pass returns, as transformers calls it; the next call may overwrite it."""

    last_hidden_state: Any


@dataclass(frozen=True)
class Forward:
    """A forward pass for one shape, and exactly what it is."""

    call: Callable[..., Any]
    note: str


Build = Callable[[Mapping[str, Any]], Forward]


def prepare(name: str, task: Encoder) -> Build:
    """Get peer `name` ready for any shape; what goes wrong, here or in the Build, is an UnavailableError."""
    module, _, function = PEERS[name].partition(".")
    with failures_are_reasons():
        build = getattr(importlib.import_module(f".{module}", __package__), function)(task)

    def checked(inputs: Mapping[str, Any]) -> Forward:
        with failures_are_reasons():
            return build(inputs)

    return checked
