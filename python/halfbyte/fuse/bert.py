"""The encoders of transformers that are made like BERT: embeddings, blocks and norms in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attach import Fused, check_input
from .capture import FusedTransformer
from .parts import activation_of, check_dropout, defined_in, layer_norm, origin, origins
from .stack import BlockSpec, CannotFuse, FusedStack, StackSpec, modules_of

_MODELS = "transformers.models."
_ATTENTIONS = (None, "sdpa", "eager")
_UNSET: Any = object()


class _Block(NamedTuple):
    """One block, and what all blocks of a stack have in common."""

    spec: BlockSpec
    heads: int
    head_size: int
    scale: float
    activation: str


class _Extra(NamedTuple):
    """What a call needs beside the stack."""

    embeddings: nn.Module
    word: nn.Module
    table: Tensor  # [positions, features]: the position embeddings with that of token type 0
    project: nn.Module | None  # ELECTRA's, of the normed embeddings
    pooler: nn.Module | None
    output: type  # of what a call returns
    biases: dict[int, Tensor]  # MPNet's, by the number of tokens: of the last call


class FusedBert(FusedTransformer):
    """BertModel. Subclasses say where the others differ."""

    kind = "BERT encoder"
    what = "embedding norm and blocks in one call"
    encoder = "encoder"  # the attribute that holds the layers
    output = "BaseModelOutputWithPoolingAndCrossAttentions"

    # What is known of the family.

    def block(self, source: str, layer: nn.Module) -> _Block:
        """Takes a layer apart."""
        attention, intermediate, output = layer.attention, layer.intermediate, layer.output
        own, after = attention.self, attention.output
        defined_in(source, layer, attention, own, after, intermediate, output)
        for dropout in (own.dropout, after.dropout, output.dropout):
            check_dropout(dropout)
        if getattr(layer, "is_decoder", False) or getattr(own, "is_decoder", False):
            raise CannotFuse("it is a decoder, whose attention is causal")
        hidden = after.dense.out_features
        spec = BlockSpec(
            layer_norm(after.LayerNorm, hidden),
            layer_norm(output.LayerNorm, hidden),
            own.query,
            own.key,
            own.value,
            after.dense,
            intermediate.dense,
            output.dense,
        )
        activation = activation_of(intermediate.intermediate_act_fn)
        heads, size = own.num_attention_heads, own.attention_head_size
        return _Block(spec, heads, size, getattr(own, "scaling", size**-0.5), activation)

    def first_position(self, embeddings: nn.Module) -> int:
        """That of the first token."""
        return 0

    def positions(self, embeddings: nn.Module, ids: Tensor | None) -> Tensor | None:
        """Of the tokens, where they do not just follow each other."""
        return None

    def mask(self, module: nn.Module, extra: _Extra, given: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        """What the core takes for an attention_mask."""
        if given is None:
            return None
        if type(given) is not Tensor or not given.is_cpu:
            raise CannotFuse("its attention_mask is no plain tensor on the CPU")
        if given.ndim == 2:
            if given.shape != (batch, tokens):
                raise CannotFuse("its attention_mask does not have the shape of the tokens")
            return None if given.all() else given.bool()[:, None, None]
        return _ready_mask(module.config, given, batch, tokens)

    # Building.

    def check(self, module: nn.Module) -> None:
        self.spec(module)

    def blocks(self, module: nn.Module) -> int:
        return len(getattr(module, self.encoder).layer)

    def spec(self, module: nn.Module) -> StackSpec:
        """What the stack is made of."""
        source, config = type(module).forward.__module__, module.config
        for setting in ("is_decoder", "add_cross_attention", "is_causal"):
            if getattr(config, setting, False):
                raise CannotFuse(f"its config says {setting}: only encoders are known")
        if (kind := getattr(config, "position_embedding_type", None) or "absolute") != "absolute":
            raise CannotFuse(f"its positions are of the type {kind}")
        try:
            return self._spec(source, module)
        except AttributeError as error:
            raise CannotFuse(f"an unknown variant: {error}") from None

    def _spec(self, source: str, module: nn.Module) -> StackSpec:
        embeddings, encoder = module.embeddings, getattr(module, self.encoder)
        defined_in(source, embeddings, encoder)
        check_dropout(embeddings.dropout)
        if not len(encoder.layer):
            raise CannotFuse("it has no layers")
        found = [self.block(source, layer) for layer in encoder.layer]
        if len({block[1:] for block in found}) > 1:
            raise CannotFuse("its blocks differ in heads or activation")
        block, heads, head_size, scale, activation = found[0]
        hidden = block.o.out_features
        project = module._modules.get("embeddings_project")
        norm = layer_norm(embeddings.LayerNorm, hidden if project is None else project.in_features)
        # A word is looked up by a call of its module.
        tables = [m for name, m in embeddings.named_children() if name != "word_embeddings"]
        return StackSpec(
            hidden=hidden,
            heads=heads,
            kv_heads=heads,
            head_size=head_size,
            scale=scale,
            pre_norm=False,
            rms=False,
            causal=False,
            activation=activation,
            blocks=[block.spec for block in found],
            first_norm=None if project is not None else norm,
            modules=[embeddings, *modules_of(*tables, encoder)],
        )

    def build(self, module: nn.Module) -> tuple[FusedStack, _Extra]:
        self.without_capture(module)
        from transformers import modeling_outputs

        stack = FusedStack(self.spec(module))
        embeddings, children = module.embeddings, module._modules
        return stack, _Extra(
            embeddings,
            embeddings.word_embeddings,
            _table(embeddings),
            children.get("embeddings_project"),
            children.get("pooler"),
            getattr(modeling_outputs, self.output),
            {},
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
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: Any = _UNSET,
        output_attentions: Any = _UNSET,
        return_dict: Any = _UNSET,
        use_cache: Any = None,  # of a decoder
        **others: Any,
    ) -> Any:
        for name, value in others.items():
            if value is not None:
                raise CannotFuse(f"{name} was given")
        settings = object.__getattribute__(module.__dict__["config"], "__dict__")
        if settings.get("_attn_implementation_internal") not in _ATTENTIONS or settings.get("is_causal"):
            raise CannotFuse(f"attention implementation {settings['_attn_implementation_internal']!r}")
        if _choice(output_attentions, settings.get("_output_attentions", False)):
            raise CannotFuse("output_attentions: the core keeps no attention weights")
        hidden = _choice(output_hidden_states, settings.get("output_hidden_states", False))
        as_dict = _choice(return_dict, settings.get("return_dict", True))
        if type(hidden) is not bool or type(as_dict) is not bool:
            raise CannotFuse("output_hidden_states or return_dict is not True or False")
        batch, tokens = _shape(input_ids, inputs_embeds)
        mask = self.mask(module, extra, attention_mask, batch, tokens)
        x = self.embed(extra, input_ids, token_type_ids, position_ids, inputs_embeds, tokens)
        check_input(x)
        if hidden:
            states = _each_state(stack, extra, x, mask)
            last = states[-1]
        else:
            own = extra.project is None and x.is_contiguous()
            states, last = None, stack(x, mask=mask, out=x if own else None)
        pooled = None if extra.pooler is None else extra.pooler(last)
        return self.result(extra, last, pooled, states, as_dict)

    def embed(
        self,
        extra: _Extra,
        ids: Tensor | None,
        types: Tensor | None,
        positions: Tensor | None,
        x: Tensor | None,
        tokens: int,
    ) -> Tensor:
        """The sum of the embeddings, before their norm, in memory of its own; or what ELECTRA projects."""
        embeddings = extra.embeddings
        begin = self.first_position(embeddings)
        if positions is None:
            positions = self.positions(embeddings, ids)
        if begin + tokens > extra.table.shape[0]:
            raise CannotFuse("there are more tokens than positions")
        if x is None:
            x = extra.word(ids)
        if types is not None and (types.shape != x.shape[:2] or types.any()):
            if positions is None:
                positions = embeddings.position_ids[:, begin : begin + tokens]
            x = x + embeddings.token_type_embeddings(types) + embeddings.position_embeddings(positions)
        elif positions is None:
            x = x + extra.table[begin : begin + tokens]
        else:
            x = x + functional.embedding(positions, extra.table)
        return x if extra.project is None else extra.project(embeddings.LayerNorm(x))

    def result(
        self, extra: _Extra, last: Tensor, pooled: Tensor | None, states: tuple[Tensor, ...] | None, as_dict: bool
    ) -> Any:
        """What the model's own forward returns of these."""
        fields = {"last_hidden_state": last}
        if pooled is not None:
            fields["pooler_output"] = pooled
        if states is not None:
            fields["hidden_states"] = states
        return extra.output(**fields) if as_dict else tuple(fields.values())


class FusedRoberta(FusedBert):
    """RobertaModel: positions are counted from the padding token's id on, padding left out."""

    kind = "RoBERTa encoder"

    def first_position(self, embeddings: nn.Module) -> int:
        return embeddings.padding_idx + 1

    def positions(self, embeddings: nn.Module, ids: Tensor | None) -> Tensor | None:
        if ids is None:
            return None
        real = ids.ne(embeddings.padding_idx)
        return None if real.all() else real.cumsum(1) * real + embeddings.padding_idx


class FusedElectra(FusedBert):
    """ElectraModel: embeddings may be narrower than the blocks, and there is no pooler."""

    kind = "ELECTRA encoder"
    output = "BaseModelOutputWithPastAndCrossAttentions"


class FusedDistilBert(FusedBert):
    """DistilBertModel: no token types, no pooler, and other names."""

    kind = "DistilBERT encoder"
    encoder = "transformer"
    output = "BaseModelOutput"

    def block(self, source: str, layer: nn.Module) -> _Block:
        own, mlp = layer.attention, layer.ffn
        defined_in(source, layer, own, mlp)
        check_dropout(own.dropout)
        check_dropout(mlp.dropout)
        hidden = own.out_lin.out_features
        spec = BlockSpec(
            layer_norm(layer.sa_layer_norm, hidden),
            layer_norm(layer.output_layer_norm, hidden),
            own.q_lin,
            own.k_lin,
            own.v_lin,
            own.out_lin,
            mlp.lin1,
            mlp.lin2,
        )
        size = own.attention_head_size
        return _Block(spec, own.n_heads, size, getattr(own, "scaling", size**-0.5), activation_of(mlp.activation))


class FusedMPNet(FusedRoberta):
    """MPNetModel: no token types; the distance of two tokens adds a bias to their score."""

    kind = "MPNet encoder"
    output = "BaseModelOutputWithPooling"

    def block(self, source: str, layer: nn.Module) -> _Block:
        attention, intermediate, output = layer.attention, layer.intermediate, layer.output
        own = attention.attn
        defined_in(source, layer, attention, own, intermediate, output)
        for dropout in (own.dropout, attention.dropout, output.dropout):
            check_dropout(dropout)
        hidden = own.o.out_features
        spec = BlockSpec(
            layer_norm(attention.LayerNorm, hidden),
            layer_norm(output.LayerNorm, hidden),
            own.q,
            own.k,
            own.v,
            own.o,
            intermediate.dense,
            output.dense,
        )
        activation = activation_of(intermediate.intermediate_act_fn)
        return _Block(spec, own.num_attention_heads, own.attention_head_size, own.attention_head_size**-0.5, activation)

    def mask(self, module: nn.Module, extra: _Extra, given: Tensor | None, batch: int, tokens: int) -> Tensor:
        padding = super().mask(module, extra, given, batch, tokens)
        if (bias := extra.biases.get(tokens)) is None:
            with torch.no_grad():
                bias = module.encoder.compute_position_bias(torch.empty(1, tokens, 0)).float()
            extra.biases.clear()
            extra.biases[tokens] = bias
        if padding is None:
            return bias
        if padding.dtype is not torch.bool:
            return bias + padding
        return torch.where(padding, bias, torch.finfo(torch.float32).min)

    def result(
        self, extra: _Extra, last: Tensor, pooled: Tensor | None, states: tuple[Tensor, ...] | None, as_dict: bool
    ) -> Any:
        if as_dict:
            return super().result(extra, last, pooled, states, as_dict)
        return (last, pooled) if states is None else (last, pooled, states)


_FAMILIES = {
    "bert.modeling_bert": {"BertModel": FusedBert},
    "roberta.modeling_roberta": {"RobertaModel": FusedRoberta},
    "xlm_roberta.modeling_xlm_roberta": {"XLMRobertaModel": FusedRoberta},
    "camembert.modeling_camembert": {"CamembertModel": FusedRoberta},
    "electra.modeling_electra": {"ElectraModel": FusedElectra},
    "distilbert.modeling_distilbert": {"DistilBertModel": FusedDistilBert},
    "mpnet.modeling_mpnet": {"MPNetModel": FusedMPNet},
}
_KNOWN = {
    (_MODELS + source, name): cls for source, classes in _FAMILIES.items() for name, cls in classes.items()
}


def family(module: nn.Module) -> type[Fused] | None:
    """What fuses a module, if anything here does. Raises CannotFuse for a subclass with a forward of its own."""
    if (cls := _KNOWN.get(origin(module))) is not None:
        return cls
    for base in origins(module):
        if base in _KNOWN:
            raise CannotFuse(f"a subclass of {base[1]} with a forward of its own")
    return None


def _choice(given: Any, default: Any) -> Any:
    """An argument, or what the config says. None has had both meanings, which differ where that is not so."""
    if given is _UNSET or (given is None and default is False):
        return default
    return given


def _shape(ids: Any, x: Any) -> tuple[int, int]:
    """Batch and tokens of the one of them that is given."""
    if (ids is None) == (x is None):
        raise CannotFuse("input_ids and inputs_embeds do not fit together")  # its own forward says how
    given, dims = (ids, 2) if x is None else (x, 3)
    if type(given) is not Tensor or given.ndim != dims:
        raise CannotFuse("its input is no plain tensor of [batch, tokens]")
    batch, tokens = given.shape[:2]
    if batch == 0 or tokens == 0:
        raise CannotFuse("there are no tokens")
    return batch, tokens


def _ready_mask(config: Any, given: Tensor, batch: int, tokens: int) -> Tensor:
    """A mask that the model hands to its attention as it is."""
    # Eager attention adds a mask, a 1 for a True too.
    kinds = (torch.bool,) if config._attn_implementation == "sdpa" else ()
    if given.ndim != 4 or not (given.is_floating_point() or given.dtype in kinds):
        raise CannotFuse(f"an attention_mask of {given.ndim} dimensions and {given.dtype}")
    whole = (batch, config.num_attention_heads, tokens, tokens)
    if any(size not in (1, full) for size, full in zip(given.shape, whole, strict=True)):
        raise CannotFuse(f"an attention_mask of the shape {tuple(given.shape)}")
    return given


def _each_state(stack: FusedStack, extra: _Extra, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Of the embeddings and after each block."""
    states = [x if stack.spec.first_norm is None else extra.embeddings.LayerNorm(x)]
    for i in range(len(stack.spec.blocks)):
        x = stack(x, mask=mask, blocks=(i, i + 1))
        states.append(x)
    return tuple(states)


def _table(embeddings: nn.Module) -> Tensor:
    """[positions, features]: what is added to the embedding of a word of type 0."""
    positions = embeddings.position_ids[0]
    if not torch.equal(positions, torch.arange(len(positions))):
        raise CannotFuse("its position_ids do not just follow each other")
    with torch.no_grad():
        table = embeddings.position_embeddings(positions)
        if (types := embeddings._modules.get("token_type_embeddings")) is not None:
            if embeddings.token_type_ids.any():
                raise CannotFuse("the token type of its token_type_ids is not 0")
            table = table + types(torch.tensor(0))
    return table
