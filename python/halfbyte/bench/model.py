"""`halfbyte bench model`: MiniLM quantized and fused, against float32 and other tools."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..extras import require
from . import footprint, fusion, minilm
from .engine import Timed, median_of_ratios, progress, run_rounds
from .linear import OURS, kernel_name, thread_counts
from .machine import describe
from .peers import UnavailableError
from .peers.models import Build, Encoder, Forward, prepare

FLOAT = "torch-fp32"
FUSED, FUSED_FLOAT = f"{OURS}-fused", f"{OURS}-fused-fp32"
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
        models = {
            FLOAT: base,
            OURS: ours,
            FUSED: hb.fuse_(copy.deepcopy(ours)),
            FUSED_FLOAT: hb.fuse_(copy.deepcopy(base)),
        }
        builds, unavailable = _prepare(settings, base, tokenizer)
        results = []
        for batch, tokens in settings.shapes:
            inputs = minilm.fixed_batch(tokenizer, batch, tokens)
            result = _measure(models, inputs, builds, settings)
            results.append(result | {"unavailable": unavailable | result["unavailable"]})
        return {
            "format": "halfbyte-bench",
            "version": 1,
            "kind": "model",
            "machine": describe(settings.threads),
            "settings": dataclasses.asdict(settings),
            "model": minilm.NAME,
            "replaced": f"{replaced} of {linears}" if replaced != linears else "all",
            "kernel": kernel_name(_SCHEME),
            "ours": FUSED,  # what ours_is_faster_by is about
            "bytes": {name: footprint.resident_bytes(models[name]) for name in (FLOAT, OURS, FUSED)},
            "results": results,
        }


def _prepare(settings: Settings, base, tokenizer) -> tuple[dict[str, Build], dict[str, str]]:
    """Peers ready for any shape, and why the others are not."""
    task = Encoder(base, settings.threads, lambda: minilm.calibration(tokenizer))
    builds, unavailable = {}, {}
    for name in settings.vs:
        progress(f"preparing {name}")
        try:
            builds[name] = prepare(name, task)
        except UnavailableError as error:
            unavailable[name] = str(error)
    return builds, unavailable


def _measure(models: dict, inputs: dict, builds: dict[str, Build], settings: Settings) -> dict:
    batch, tokens = inputs["input_ids"].shape
    label = f"{batch}x{tokens}"
    kernels = dict.fromkeys((OURS, FUSED), kernel_name(_SCHEME))
    forwards = {name: Forward(model, kernels.get(name, "float32")) for name, model in models.items()}
    unavailable = {}
    for name, build in builds.items():
        progress(f"{label}: building {name}")
        try:
            forwards[name] = build(inputs)
        except UnavailableError as error:
            unavailable[name] = str(error)
    exact = minilm.embed(models[FLOAT], inputs)
    cosines = {
        name: float((minilm.embed(forward.call, inputs) * exact).sum(1).min())
        for name, forward in forwards.items()
    }
    timed = [
        Timed(name, [lambda call=forward.call: call(**inputs)], settings.round_seconds, warm_calls=1)
        for name, forward in forwards.items()
    ]
    samples = run_rounds(timed, settings.rounds, label)
    fused = {name: f"; {fusion.describe(models[name])}" for name in (FUSED, FUSED_FLOAT)}
    rows = [
        {
            "name": name,
            "note": forward.note + fused.get(name, ""),
            "ms": statistics.median(samples[name]) * 1e3,
            "speedup": median_of_ratios(samples[FLOAT], samples[name]),
            "ours_is_faster_by": None if name == FUSED else median_of_ratios(samples[name], samples[FUSED]),
            "min_cosine": cosines[name],
            "samples_ms": [s * 1e3 for s in samples[name]],
        }
        for name, forward in forwards.items()
    ]
    return {"batch": batch, "tokens": tokens, "rows": rows, "unavailable": unavailable}
