"""Decoders of transformers that are made like Llama: blocks, cache and last norm in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .attach import check_input, fused_of, recorder
from .cache import KVCache, Shape, cache_dtype, kv_of, publish
from .capture import FusedTransformer
from .causal import mask_of, positions_of
from .parts import activation_of, defined_in, origin, origins, rms_norm
from .rope import Rope
from .stack import BlockSpec, CannotFuse, FusedStack, StackSpec, modules_of

_MODELS = "transformers.models."
_ATTENTIONS = (None, "sdpa", "eager")
_LONG = 1 << 16  # positions that the tables of the rotary embedding may grow to, in any model
_UNSET: Any = object()


class _Extra(NamedTuple):
    """What a call needs beside the stack."""

    embed: nn.Module
    rope: Rope
    layers: int
    window: int
    positions: int  # that the table of the rotary embedding may grow to
    kv_heads: int
    head_size: int

    def shape(self, batch: int, dtype: torch.dtype) -> Shape:
        return Shape(self.layers, batch, self.kv_heads, self.head_size, dtype)


class FusedDecoder(FusedTransformer):
    """LlamaModel. Subclasses say where the others differ."""

    kind = "Llama decoder"
    what = "blocks, rotary embedding, key-value cache and last norm in one call"
    returns_unused_cache = True  # whether a cache that was given comes back under use_cache=False

    # What is known of the family.

    def window(self, module: nn.Module) -> int:
        """Keys that a query sees, 0: all."""
        return 0

    def check(self, module: nn.Module) -> None:
        self.spec(module)

    def blocks(self, module: nn.Module) -> int:
        return len(_layers(module))

    def spec(self, module: nn.Module) -> StackSpec:
        """What the stack is made of."""
        source, layers, rotary = type(module).forward.__module__, _layers(module), module.rotary_emb
        if not layers:
            raise CannotFuse("it has no layers")
        try:
            defined_in(source, module.norm, rotary)
            blocks = [self._block(source, layer, i) for i, layer in enumerate(layers)]
            attention, mlp = layers[0].self_attn, layers[0].mlp
            kind = rotary.rope_type
            if "dynamic" in kind or kind == "longrope":
                raise CannotFuse(f"its rotary embedding ({kind}) changes with the length of the text")
            size, frequencies = attention.head_dim, rotary.inv_freq.numel()
            if 2 * frequencies != size:
                raise CannotFuse(f"{frequencies} frequencies of its rotary embedding, for heads of {size}")
            alike = {(a.head_dim, a.scaling, activation_of(m.act_fn)) for a, m in _parts(layers)}
            if len(alike) > 1:
                raise CannotFuse("its blocks differ in heads or activation")
            return StackSpec(
                hidden=attention.q_proj.in_features,
                heads=attention.q_proj.out_features // size,
                kv_heads=attention.k_proj.out_features // size,
                head_size=size,
                scale=attention.scaling,
                pre_norm=True,
                rms=True,
                causal=True,
                window=self.window(module),
                activation=activation_of(mlp.act_fn),
                rotary_dims=size,
                blocks=blocks,
                last_norm=rms_norm(module.norm),
                modules=modules_of(*layers, module.norm, rotary),
                settings=[(module.config, name) for name in ("sliding_window", "use_sliding_window")],
            )
        except AttributeError as error:
            raise CannotFuse(f"an unknown variant: {error}") from None

    def _block(self, source: str, layer: nn.Module, index: int) -> BlockSpec:
        own, mlp = layer.self_attn, layer.mlp
        norms = layer.input_layernorm, layer.post_attention_layernorm
        defined_in(source, layer, own, mlp, *norms)
        if own.layer_idx != index:
            raise CannotFuse(f"layer {index} of it keeps its keys as layer {own.layer_idx} of the cache")
        if own.training and own.attention_dropout:
            raise CannotFuse("its attention has dropout in training mode: call .eval() first")
        return BlockSpec(
            *(rms_norm(norm) for norm in norms),
            own.q_proj,
            own.k_proj,
            own.v_proj,
            own.o_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.gate_proj,
        )

    def build(self, module: nn.Module) -> tuple[FusedStack, _Extra]:
        self.without_capture(module)
        spec, rotary = self.spec(module), module.rotary_emb
        return FusedStack(spec), _Extra(
            module.embed_tokens,
            Rope(rotary.inv_freq, rotary.attention_scaling),
            len(spec.blocks),
            spec.window,
            max(_LONG, module.config.max_position_embeddings),
            spec.kv_heads,
            spec.head_size,
        )

    # Calling.

    def run(
        self,
        module: nn.Module,
        stack: FusedStack,
        extra: _Extra,
        /,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: Any = _UNSET,
        output_attentions: Any = _UNSET,
        return_dict: Any = _UNSET,
        cache_position: Any = None,  # says again where the cache ends
        **others: Any,
    ) -> Any:
        settings = settings_of(module)
        if settings["num_hidden_layers"] != extra.layers:
            raise CannotFuse("config.num_hidden_layers was changed after the first call")
        for name, value in others.items():
            if value is not None:
                raise CannotFuse(f"{name} was given")
        if _choice(output_attentions, settings.get("_output_attentions", False)):
            raise CannotFuse("output_attentions: the core keeps no attention weights")
        hidden = _choice(output_hidden_states, settings.get("output_hidden_states", False))
        if type(hidden) is not bool or (hidden and settings.get("tie_last_hidden_states") is False):
            raise CannotFuse("output_hidden_states selects some, or the last one without its norm")
        if (input_ids is None) == (inputs_embeds is None):
            raise CannotFuse("input_ids and inputs_embeds do not fit together")  # its own forward says how
        x = extra.embed(input_ids) if inputs_embeds is None else inputs_embeds
        check_input(x)
        if x.ndim != 3 or not x.numel():
            raise CannotFuse(f"its input has {x.ndim} dimensions or no tokens")

        use_cache = settings.get("use_cache", False) if use_cache is None else use_cache
        cache = past_key_values
        if cache is None and use_cache:
            cache = _new_cache(module.config)
        kv = None if cache is None else _kv_of(cache, extra, x)
        sdpa = settings.get("_attn_implementation_internal") == "sdpa"
        arguments = _arguments(extra, kv, x, attention_mask, position_ids, sdpa)
        if hidden:
            states = _each_state(stack, x, extra.layers, arguments)
            y = states[-1]
        else:
            states = None
            y = stack(x, **arguments)
        if kv is not None:
            length = kv.length + x.shape[1]
            if kv is cache:
                kv.length = length
            else:
                publish(cache, kv, length, extra.window)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        result = BaseModelOutputWithPast(
            last_hidden_state=y,
            past_key_values=cache if use_cache or self.returns_unused_cache else None,
            hidden_states=states,
        )
        as_tuple = _choice(return_dict, settings.get("return_dict", True)) is False
        return result.to_tuple() if as_tuple else result

    def original(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, KVCache) for value in (*args, *kwargs.values())):
            raise ModelError(
                "only a fused call can use a KVCache, and this one cannot be fused; "
                "print(halfbyte.fusion_report(model)) says why"
            )
        return super().original(module, *args, **kwargs)

    # For generate.

    def ready(self) -> tuple[FusedStack, _Extra]:
        """What a call would use. Raises ModelError where it would not be fused."""
        module = self.module
        try:
            if reason := recorder():
                raise CannotFuse(reason)
            settings_of(module)
            built = self._ready(module)
        except CannotFuse as reason:
            raise ModelError(f"the fused {type(module).__name__} cannot run as it is now: {reason}") from None
        return built.stack, built.extra

    def new_cache(self, batch: int, dtype: str | torch.dtype | None, capacity: int) -> KVCache:
        """An empty one; dtype None: that of the embeddings."""
        _, extra = self.ready()
        dtype = extra.embed.weight.dtype if dtype is None else cache_dtype(dtype)
        return KVCache(*extra.shape(batch, dtype)[:4], dtype=dtype, capacity=capacity)


class FusedMistral(FusedDecoder):
    """MistralModel: all layers have one window."""

    kind = "Mistral decoder"
    returns_unused_cache = False

    def window(self, module: nn.Module) -> int:
        return module.config.sliding_window or 0


class FusedQwen2(FusedDecoder):
    """Qwen2Model: each layer may have a window; a stack has one for all."""

    kind = "Qwen2 decoder"
    returns_unused_cache = False

    def window(self, module: nn.Module) -> int:
        kinds = set(module.config.layer_types[: len(_layers(module))])
        if kinds == {"full_attention"}:
            return 0
        if kinds == {"sliding_attention"}:
            return module.config.sliding_window
        raise CannotFuse(f"its layers differ in attention: {', '.join(sorted(kinds))}")


_KNOWN = {
    (_MODELS + "llama.modeling_llama", "LlamaModel"): FusedDecoder,
    (_MODELS + "mistral.modeling_mistral", "MistralModel"): FusedMistral,
    (_MODELS + "qwen2.modeling_qwen2", "Qwen2Model"): FusedQwen2,
}
_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")


def family(module: nn.Module) -> type[FusedDecoder] | None:
    """What fuses a module, if anything here does. Raises CannotFuse for a relative that nothing does."""
    found = origin(module)
    if found in _KNOWN:
        return _KNOWN[found]
    if any(base in _KNOWN for base in origins(module)):
        raise CannotFuse(f"a subclass, {type(module).__name__}, with a forward of its own")
    if found[0].startswith(_MODELS) and all(name in module._modules for name in _PARTS):
        names = ", ".join(name for _, name in _KNOWN)
        raise CannotFuse(f"{found[1]} is none of the decoders that are known: {names}")
    return None


def decoder_of(model: nn.Module) -> FusedDecoder:
    """The one fused decoder in a model. Raises ModelError."""
    found = [fused for m in model.modules() if isinstance(fused := fused_of(m), FusedDecoder)]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(found) or 'no'} fused decoders, and one is needed: call "
            "halfbyte.fuse_(model), and print(halfbyte.fusion_report(model)) to see what was fused"
        )
    return found[0]


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of its config, whose own access takes microseconds. Raises CannotFuse for attention that
    is not causal, or computed by something else.
    """
    settings = object.__getattribute__(module.__dict__["config"], "__dict__")
    if settings.get("_attn_implementation_internal") not in _ATTENTIONS:
        raise CannotFuse(f"attention implementation {settings['_attn_implementation_internal']!r}")
    if settings.get("is_causal") is False:
        raise CannotFuse("config.is_causal is False")
    return settings


def _kv_of(cache: Any, extra: _Extra, x: Tensor) -> KVCache:
    """Ours, as it is or as it is behind a DynamicCache, with room for the tokens of x."""
    shape = extra.shape(x.shape[0], x.dtype)
    if not isinstance(cache, KVCache):
        cache = kv_of(cache, shape, extra.window)
    elif cache.shape[:4] != shape[:4]:
        raise ModelError(
            f"the KVCache is of {cache.shape[:4]} (blocks, batch, heads, size), the call of {shape[:4]}"
        )
    cache.make_room(x.shape[1], extra.window)
    return cache


def _arguments(
    extra: _Extra, kv: KVCache | None, x: Tensor, attention_mask: Any, position_ids: Any, sdpa: bool
) -> dict[str, Any]:
    """Of a call of the stack."""
    batch, tokens, _ = x.shape
    past, dropped = (0, 0) if kv is None else (kv.length, kv.dropped)
    mask = mask_of(attention_mask, batch, tokens, past, dropped, kv is not None, sdpa, extra.window)
    seen = past + dropped
    positions = positions_of(position_ids, batch, tokens, seen, kv is None and attention_mask is None)
    if positions is None and dropped:
        positions = torch.arange(seen, seen + tokens).expand(batch, tokens)
    if positions is None:
        rope = extra.rope.until(seen + tokens)
    else:
        rope, positions = extra.rope.at(positions, max(extra.positions, seen + tokens))
    return {"mask": mask, "cache": kv, "past": past, "positions": positions, "rope": rope}


def _each_state(stack: FusedStack, x: Tensor, layers: int, arguments: dict) -> tuple[Tensor, ...]:
    """Of the embeddings and after each block, the last one normed."""
    states, y = [x], x.float()
    for i in range(layers):
        y = stack(y, **arguments, blocks=(i, i + 1))
        states.append(y.to(x.dtype))
    return tuple(states)


def _choice(given: Any, default: Any) -> Any:
    """An argument, or what the config says. None has had both meanings, which differ where that is not so."""
    return default if given is _UNSET or (given is None and default is False) else given


def _new_cache(config: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _layers(module: nn.Module) -> list[nn.Module]:
    """Those that it runs."""
    return list(module.layers)[: module.config.num_hidden_layers]


def _parts(layers: list[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    return [(layer.self_attn, layer.mlp) for layer in layers]
