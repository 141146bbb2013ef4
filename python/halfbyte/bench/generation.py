"""Greedy generation with a key-value cache, in a plain loop that is the same for every model, timed."""

from __future__ import annotations

import time
from collections.abc import Mapping

from .engine import run_rounds


def prefill(model, ids):
    """Run the prompt [1, tokens]: (cache, next token [1, 1])."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return out.past_key_values, out.logits[:, -1:].argmax(-1)


def step(model, cache, token):
    """One token [1, 1] more: (cache, next token [1, 1])."""
    out = model(input_ids=token, past_key_values=cache, use_cache=True)
    return out.past_key_values, out.logits[:, -1:].argmax(-1)


def continuation(model, tokenizer, prompt: str, tokens: int) -> str:
    """What follows `prompt`: at most `tokens` tokens, the likeliest each time, until the text ends."""
    import torch

    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    found: list[int] = []
    with torch.inference_mode():
        cache, token = prefill(model, ids)
        while len(found) < tokens and int(token) != tokenizer.eos_token_id:
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


def speeds(models: Mapping[str, object], ids, tokens: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """{model: {"prefill_s": samples, "decode_s": samples}} for a prompt [1, n] and `tokens` more, batch 1.

    Rounds are interleaved as in the other benchmarks.
    """
    import torch

    with torch.inference_mode():
        samplers = [Prefill(name, model, ids) for name, model in models.items()]
        samplers += [Decode(name, model, ids, tokens) for name, model in models.items()]
        samples = run_rounds(samplers, rounds, "tokens per second")
    return {
        name: {"prefill_s": samples[f"prefill {name}"], "decode_s": samples[f"decode {name}"]}
        for name in models
    }
