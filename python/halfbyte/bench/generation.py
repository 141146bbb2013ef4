"""Greedy generation with a key-value cache, timed: `hb.generate` of fused models, a plain loop of others."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ..errors import ModelError
from .engine import Sampler, run_rounds

CACHE = "bfloat16"  # of keys and values, where hb.generate runs


def prefill(model, ids):
    """Run the prompt [1, tokens]: (cache, next token [1, 1])."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return out.past_key_values, out.logits[:, -1:].argmax(-1)


def step(model, cache, token):
    """One token [1, 1] more: (cache, next token [1, 1])."""
    out = model(input_ids=token, past_key_values=cache, use_cache=True)
    return out.past_key_values, out.logits[:, -1:].argmax(-1)


def generate(model, ids, tokens: int, **options):
    """`hb.generate` of the likeliest tokens after ids [1, n], with the cache that is measured."""
    import torch

    import halfbyte as hb

    return hb.generate(model, ids, tokens, attention_mask=torch.ones_like(ids), cache_dtype=CACHE, **options)


def is_fused(model) -> bool:
    """Whether `hb.generate` runs it."""
    from ..fuse.llama import decoder_of

    try:
        decoder_of(model)
    except ModelError:
        return False
    return True


def continuation(model, tokenizer, prompt: str, tokens: int) -> str:
    """What follows `prompt`: at most `tokens` tokens, the likeliest each time, until the text ends."""
    import torch

    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    end = tokenizer.eos_token_id
    if is_fused(model):
        found = generate(model, ids, tokens, eos_token_id=[] if end is None else end)[0, ids.shape[1] :]
        return tokenizer.decode([token for token in found.tolist() if token != end])
    found = []
    with torch.inference_mode():
        cache, token = prefill(model, ids)
        while len(found) < tokens and int(token) != end:
            found.append(int(token))
            cache, token = step(model, cache, token)
    return tokenizer.decode(found)


class Prefill:
    """Seconds to run the prompt."""

    def __init__(self, name: str, model, ids):
        self.name, self.model, self.ids = f"prefill {name}", model, ids
        prefill(model, ids)  # packs the weights

    def sample(self) -> float:
        start = time.perf_counter()
        prefill(self.model, self.ids)
        return time.perf_counter() - start


class Decode:
    """Seconds for `tokens` tokens after the prompt, one at a time."""

    def __init__(self, name: str, model, ids, tokens: int):
        self.name, self.model, self.tokens = f"decode {name}", model, tokens
        self.prompt_tokens = ids.shape[1]
        self.cache, self.token = prefill(model, ids)

    def sample(self) -> float:
        if (appended := self.cache.get_seq_length() - self.prompt_tokens) > 0:
            self.cache.crop(-appended)  # what the previous sample left
        token = self.token
        start = time.perf_counter()
        for _ in range(self.tokens):
            self.cache, token = step(self.model, self.cache, token)
        return time.perf_counter() - start


class FusedPrefill:
    """Seconds to the first token of `hb.generate`."""

    def __init__(self, name: str, model, ids):
        self.name, self.model, self.ids = f"prefill {name}", model, ids
        self.sample()  # packs the weights

    def sample(self) -> float:
        start = time.perf_counter()
        generate(self.model, self.ids, 1, eos_token_id=[])
        return time.perf_counter() - start


class FusedDecode:
    """Seconds of `hb.generate` for `tokens` tokens after the first."""

    def __init__(self, name: str, model, ids, tokens: int):
        self.name, self.model, self.ids, self.tokens = f"decode {name}", model, ids, tokens

    def sample(self) -> float:
        times: list[float] = []
        generate(
            self.model, self.ids, self.tokens + 1, eos_token_id=[],
            streamer=lambda token: times.append(time.perf_counter()),
        )  # fmt: skip
        return times[-1] - times[0]


def samplers(name: str, model, ids, prompts: Sequence[int], tokens: int) -> tuple[list[Sampler], Sampler]:
    """(of each length of a prompt that ids [1, n] start with, of `tokens` tokens after ids)."""
    first, after = (FusedPrefill, FusedDecode) if is_fused(model) else (Prefill, Decode)
    labels = [name] if len(prompts) == 1 else [f"{n} {name}" for n in prompts]
    prefills = [first(label, model, ids[:, :n]) for label, n in zip(labels, prompts, strict=True)]
    return prefills, after(name, model, ids, tokens)


def speeds(models: Mapping[str, object], ids, tokens: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """{model: {"prefill_s": samples, "decode_s": samples}} for a prompt [1, n] and `tokens` more, batch 1.

    Rounds are interleaved as in the other benchmarks.
    """
    import torch

    with torch.inference_mode():
        found = [samplers(name, model, ids, [ids.shape[1]], tokens) for name, model in models.items()]
        flat = [*(prefill for (prefill,), _ in found), *(decode for _, decode in found)]
        samples = run_rounds(flat, rounds, "tokens per second")
    return {
        name: {"prefill_s": samples[f"prefill {name}"], "decode_s": samples[f"decode {name}"]}
        for name in models
    }
