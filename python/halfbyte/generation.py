"""generate: text from a fused decoder, with one call into the core per token for all its blocks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .errors import DTypeError, ModelError, ShapeError
from .fuse.attach import fused_of
from .fuse.cache import KVCache
from .fuse.llama import FusedDecoder, decoder_of
from .fuse.parts import origin
from .sampling import Pick, greedy, sampler

_MODELS = "transformers.models."
# Models that are a decoder, `model`, with a linear layer, `lm_head`, on what it gives.
_KNOWN = {
    (_MODELS + "llama.modeling_llama", "LlamaForCausalLM"),
    (_MODELS + "mistral.modeling_mistral", "MistralForCausalLM"),
    (_MODELS + "qwen2.modeling_qwen2", "Qwen2ForCausalLM"),
}
# Settings of a generation_config that change the tokens, which `generate` does not have: where they do not.
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": None,
    "num_beams": 1,
    "guidance_scale": 1.0,
}
_ROOM = 1024  # tokens that memory is taken for at first, if more are asked for


class Streamer(Protocol):
    """What transformers calls a streamer: takes the prompt [batch, tokens], then each new token [batch]."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def generate(
    model: nn.Module,
    ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    streamer: Callable[[Tensor], Any] | Streamer | None = None,
    cache_dtype: str | torch.dtype | None = None,
) -> Tensor:
    """Continue each row of `ids` by up to `max_new_tokens` tokens: int64 [batch, prompt + new].

    model: a causal language model of transformers (Llama, SmolLM, Mistral, Qwen2) after `fuse_`.
    ids: the prompts, [batch, tokens]; shorter ones padded on the left, with attention_mask 0 there. Without a
        mask tokens equal to pad_token_id are padding, unless that is an end token too.
    do_sample: draw tokens, with `temperature`, `top_k` and `top_p`, from torch's global generator,
        `generator`, or one that starts from `seed`; otherwise the likeliest token is taken.
    eos_token_id: token or tokens that end a row, by default those of model.generation_config; [] for none.
        What follows in the row is pad_token_id, by default that of the generation_config, or the first end
        token. It stops when all rows have ended.
    streamer: called with the new tokens [batch] after each step; or a streamer of transformers.
    cache_dtype: of keys and values: "float32", "bfloat16", "float16" or "int8"; default: as the embeddings.

    The tokens are those of model.generate with the same arguments, drawn ones included where the seed is the
    same; a cache_dtype below that of the model changes logits a little. Other settings of the
    generation_config are not used, and those that would change the tokens are named in a warning.

    Raises ModelError for a model that is not fused or cannot run fused as it is now, and ShapeError,
    DTypeError and ValueError for arguments that do not fit.
    """
    decoder = _decoder(model)
    _check_prompt(ids, max_new_tokens)
    _warn_of_settings(model)
    ends, pad = _ends(model, eos_token_id, pad_token_id)
    mask = _mask(ids, attention_mask, ends, pad)
    if not do_sample:
        if (temperature, top_k, top_p, seed, generator) != (1.0, 0, 1.0, None, None):
            raise ValueError("temperature, top_k, top_p, seed and generator are for do_sample=True")
        pick = greedy
    else:
        if seed is not None:
            if generator is not None:
                raise ValueError("give a seed or a generator, not both")
            generator = torch.Generator().manual_seed(seed)
        pick = sampler(temperature, top_k, top_p, generator)
    batch, prompt = ids.shape
    out = torch.empty(batch, prompt + max_new_tokens, dtype=torch.int64)  # not of inference mode
    out[:, :prompt] = ids
    if max_new_tokens == 0:
        return out
    cache = decoder.new_cache(batch, cache_dtype, prompt + min(max_new_tokens, _ROOM))
    with torch.inference_mode(), _streaming(streamer, ids) as put:
        step = _Step(model, decoder, cache, mask)
        length = _loop(step, pick, out, prompt, ends, pad, put)
    return out if length == out.shape[1] else out[:, :length].clone()


def _loop(
    step: _Step,
    pick: Pick,
    out: Tensor,
    prompt: int,
    ends: tuple[int, ...],
    pad: int | None,
    put: Callable[[Tensor], Any] | None,
) -> int:
    """Fills `out` from column `prompt` on; returns the column after the last."""
    columns, new = out.numpy(), out[:, :prompt]
    done = np.zeros(len(columns), dtype=bool)
    for column in range(prompt, columns.shape[1]):
        tokens = pick(step(new))
        if ends:
            if done.any():
                tokens = np.where(done, pad, tokens)
            for end in ends:
                done |= tokens == end
        columns[:, column] = tokens
        new = out[:, column : column + 1]
        if put is not None:
            put(out[:, column].clone())
        if ends and done.all():
            return column + 1
    return columns.shape[1]


class _Step:
    """The logits after some more tokens."""

    def __init__(self, model: nn.Module, decoder: FusedDecoder, cache: KVCache, mask: Tensor | None):
        self._stack, self._extra = decoder.ready()
        self._decoder, self._head, self._cache = decoder, model.lm_head, cache
        self._padding: Tensor | None = None  # bool [batch, 1, 1, tokens there is room for]: which count
        self._positions: Tensor | None = None  # of the next tokens, where padding does not count
        if mask is not None:
            self._padding = mask[:, None, None]
            self._positions = mask.cumsum(1).sub_(1).masked_fill_(~mask, 0)

    def __call__(self, ids: Tensor) -> Tensor:
        """Of ids [batch, tokens]: float32 [batch, vocabulary] after the last."""
        extra, cache, tokens = self._extra, self._cache, ids.shape[1]
        x = extra.embed(ids)
        cache.make_room(tokens, extra.window)
        past, dropped = cache.length, cache.dropped
        end = dropped + past + tokens
        positions, mask = self._positions, None
        if positions is not None:
            mask = self._mask(dropped, end)
        elif dropped:
            positions = torch.arange(end - tokens, end).expand(ids.shape)
        y = self._stack(x, mask=mask, cache=cache, past=past, positions=positions, rope=extra.rope.until(end))
        cache.length = past + tokens
        self._decoder.calls += 1
        if self._positions is not None:
            self._positions = self._positions[:, -1:] + 1
        return self._head(y[:, -1].contiguous()).float()

    def _mask(self, begin: int, end: int) -> Tensor:
        """Of the columns begin .. end - 1; the generated ones count."""
        if end > (room := self._padding.shape[-1]):
            self._padding = nn.functional.pad(self._padding, (0, max(room, end - room)), value=True)
        return self._padding[:, :, :, begin:end]


def _decoder(model: nn.Module) -> FusedDecoder:
    """The fused decoder of a model whose own forward does nothing but call it and the head."""
    if not isinstance(model, nn.Module):
        raise DTypeError(f"generate takes a model of torch, not a {type(model).__name__}")
    decoder = decoder_of(model)
    if origin(model) not in _KNOWN:
        names = ", ".join(sorted(name for _, name in _KNOWN))
        raise ModelError(f"generate knows {names}; for a {type(model).__name__} use its own generate")
    for module in (model, model.model):
        if "forward" in vars(module) and fused_of(module) is None:
            raise ModelError(f"the forward of the {type(module).__name__} was replaced on the instance")
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(f"a hook on the {type(module).__name__} would not run: use model.generate")
    return decoder


def _warn_of_settings(model: nn.Module) -> None:
    """Say which settings of the generation_config would make model.generate give other tokens."""
    config = getattr(model, "generation_config", None)
    given = {name: getattr(config, name, None) for name in _NEUTRAL}
    used = [f"{name}={value}" for name, value in given.items() if value not in (None, _NEUTRAL[name])]
    if used:
        warnings.warn(
            f"generate does not use {', '.join(used)} of the model's generation_config; model.generate does, "
            "and runs on the fused model as well",
            stacklevel=3,
        )


def _check_prompt(ids: Tensor, max_new_tokens: int) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise DTypeError(f"ids must be a tensor of int64, not {kind}")
    if ids.ndim != 2 or not ids.numel():
        raise ShapeError(f"ids have the shape {tuple(ids.shape)}; they must be [batch, tokens], neither 0")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise DTypeError(f"max_new_tokens {max_new_tokens!r} must be an integer")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} must not be negative")


def _ends(
    model: nn.Module, eos: int | Sequence[int] | None, pad: int | None
) -> tuple[tuple[int, ...], int | None]:
    """The tokens that end a row, and the one that follows them."""
    config = getattr(model, "generation_config", None)
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    if pad is None:
        pad = getattr(config, "pad_token_id", None)
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(int(end) for end in eos)
    return ends, ends[0] if pad is None and ends else pad


def _mask(ids: Tensor, given: Tensor | None, ends: tuple[int, ...], pad: int | None) -> Tensor | None:
    """bool [batch, tokens], False for padding; None where there is none."""
    if given is None:
        if pad is None or pad in ends:
            return None
        given = ids != pad
    elif not isinstance(given, Tensor) or given.shape != ids.shape:
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ShapeError(f"attention_mask is {shape}; it must have the shape of ids, {tuple(ids.shape)}")
    mask = given.bool()
    return None if mask.all() else mask


@contextlib.contextmanager
def _streaming(streamer: Any, ids: Tensor) -> Iterator[Callable[[Tensor], Any] | None]:
    """What to call with each new token."""
    if streamer is None:
        yield None
    elif callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None)):
        streamer.put(ids)
        try:
            yield streamer.put
        finally:
            streamer.end()  # whoever waits for more need not wait for ever
    elif callable(streamer):
        yield streamer
    else:
        raise DTypeError(
            f"streamer is a {type(streamer).__name__}: not callable, and without put() and end()"
        )
