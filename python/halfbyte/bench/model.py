"""`halfbyte bench model`: MiniLM with its linear layers replaced, against float32 and other tools' int8."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..extras import require
from . import footprint, minilm
from .engine import Timed, median_of_ratios, progress, run_rounds
from .linear import OURS, kernel_name, thread_counts
from .machine import describe
from .peers import UnavailableError, failures_are_reasons

FLOAT = "torch-fp32"
PEERS = ("torch-bf16", "torch-int8", "torchao")
_SCHEME = "w8a8"


@dataclass(frozen=True)
class Settings:
    """Batch x tokens pairs, peers, threads and how long."""

    shapes: Sequence[tuple[int, int]]
    vs: Sequence[str]
    threads: int
    rounds: int = 11
    round_seconds: float = 0.03


def run(settings: Settings) -> dict:
    """Measure every shape; the result holds plain JSON values, with every sample."""
    torch = require("torch", extra="demo", purpose="halfbyte bench model")
    import halfbyte as hb

    with thread_counts(settings.threads):
        base, tokenizer = minilm.load()
        linears = sum(type(module) is torch.nn.Linear for module in base.modules())
        ours = hb.quantize_(copy.deepcopy(base), _SCHEME, progress=False)
        replaced = sum(isinstance(module, hb.QLinear) for module in ours.modules())
        results = []
        for batch, tokens in settings.shapes:
            inputs = minilm.fixed_batch(tokenizer, batch, tokens)
            results.append(_measure(base, ours, inputs, settings))
        return {
            "format": "halfbyte-bench",
            "version": 1,
            "kind": "model",
            "machine": describe(settings.threads),
            "settings": dataclasses.asdict(settings),
            "model": minilm.NAME,
            "replaced": f"{replaced} of {linears}" if replaced != linears else "all",
            "kernel": kernel_name(_SCHEME),
            "bytes": {FLOAT: footprint.resident_bytes(base), OURS: footprint.resident_bytes(ours)},
            "results": results,
        }


def _measure(base, ours, inputs: dict, settings: Settings) -> dict:
    batch, tokens = inputs["input_ids"].shape
    label = f"{batch}x{tokens}"
    forwards: dict[str, Callable] = {FLOAT: base, OURS: ours}
    notes = {FLOAT: "float32", OURS: kernel_name(_SCHEME)}
    unavailable = {}
    for name in settings.vs:
        progress(f"{label}: building {name}")
        try:
            forwards[name], notes[name] = _peer(name, base, inputs)
        except UnavailableError as error:
            unavailable[name] = str(error)
    exact = minilm.embed(base, inputs)
    cosines = {
        name: float((minilm.embed(forward, inputs) * exact).sum(1).min())
        for name, forward in forwards.items()
    }
    timed = [
        Timed(name, [lambda forward=forward: forward(**inputs)], settings.round_seconds, warm_calls=1)
        for name, forward in forwards.items()
    ]
    samples = run_rounds(timed, settings.rounds, label)
    rows = [
        {
            "name": name,
            "note": notes[name],
            "ms": statistics.median(samples[name]) * 1e3,
            "speedup": median_of_ratios(samples[FLOAT], samples[name]),
            "ours_is_faster_by": None if name == OURS else median_of_ratios(samples[name], samples[OURS]),
            "min_cosine": cosines[name],
            "samples_ms": [s * 1e3 for s in samples[name]],
        }
        for name in forwards
    ]
    return {"batch": batch, "tokens": tokens, "rows": rows, "unavailable": unavailable}


def _peer(name: str, base, inputs: dict) -> tuple[Callable, str]:
    """(forward, what it is)."""
    with failures_are_reasons():
        if name == "torch-bf16":
            return copy.deepcopy(base).bfloat16(), "whole model in bfloat16"
        if name == "torch-int8":
            import torch

            from .peers import torch_int8

            engine = torch.backends.quantized.engine
            return torch_int8.quantized(base, engine), f"torch.ao quantize_dynamic, default engine ({engine})"
        from .peers import torchao_int8

        model = torchao_int8.quantized(base)
        forward, how = torchao_int8.compiled(lambda **batch: model(**batch), fullgraph=False, **inputs)
        return forward, f"torchao Int8DynamicActivationInt8WeightConfig, {how}"
