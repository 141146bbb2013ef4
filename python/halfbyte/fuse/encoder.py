"""Encoders of transformers: embeddings, blocks and norms in one call; what all families have in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attach import check_input
from .capture import FusedTransformer
from .parts import check_dropout, defined_in, layer_norm
from .stack import _GLOBAL_HOOKS, _HOOKS, BlockSpec, CannotFuse, FusedStack, StackSpec, modules_of

_ATTENTIONS = (None, "sdpa", "eager")
_UNSET: Any = object()


class Block(NamedTuple):
    """One block, and what all blocks of a stack have in common."""

    spec: BlockSpec
    heads: int
    head_size: int
    scale: float
    activation: str


class Extra(NamedTuple):
    """What a call needs beside the stack."""

    embeddings: nn.Module
    word: nn.Module
    types: nn.Module | None
    table: Tensor  # [positions, features]: the position embeddings with that of token type 0
    rows: dict[int, Tensor]  # of the table, by the number of tokens: those of the last call
    biases: dict[int, Tensor]  # MPNet's, in the same way
    project: nn.Module | None  # ELECTRA's, of the normed embeddings
    pooler: nn.Module | None
    output: Callable[[dict[str, Any]], Any]  # makes what a call returns
    old: bool  # transformers 4, which prepares masks, and puts absent outputs into tuples


class FusedEncoder(FusedTransformer):
    """A model of embeddings, post-norm blocks and perhaps a pooler. Subclasses know what a block is."""

    what = "embedding norm and blocks in one call"
    encoder = "encoder"  # the attribute that holds the layers
    output = "BaseModelOutput"  # the name of the class that a call returns
    absent_in_tuples = False  # whether tuples have a None for what there is not

    # What is known of the family.

    def block(self, source: str, layer: nn.Module) -> Block:
        """Takes a layer apart, whose classes are defined in the module of that name."""
        raise NotImplementedError

    def first_position(self, embeddings: nn.Module) -> int:
        """That of the first token."""
        return 0

    def positions(self, embeddings: nn.Module, ids: Tensor | None) -> Tensor | None:
        """Of the tokens, where they do not just follow each other."""
        return None

    def mask(
        self, module: nn.Module, extra: Extra, given: Tensor | None, batch: int, tokens: int
    ) -> Tensor | None:
        """What the core takes for an attention_mask."""
        if given is None:
            return None
        if type(given) is not Tensor or not given.is_cpu:
            raise CannotFuse("its attention_mask is no plain tensor on the CPU")
        if given.ndim == 2:
            if given.shape != (batch, tokens):
                raise CannotFuse("its attention_mask does not have the shape of the tokens")
            return None if given.all() else given.bool()[:, None, None]
        if extra.old:
            raise CannotFuse(f"an attention_mask of {given.ndim} dimensions")
        return _ready_mask(module.config, given, batch, tokens)

    # Building.

    def check(self, module: nn.Module) -> None:
        self.spec(module)

    def blocks(self, module: nn.Module) -> int:
        return len(getattr(module, self.encoder).layer)

    def spec(self, module: nn.Module) -> StackSpec:
        """What the stack is made of."""
        config = module.config
        for setting in ("is_decoder", "add_cross_attention", "is_causal"):
            if getattr(config, setting, False):
                raise CannotFuse(f"its config says {setting}: only encoders are known")
        if (kind := getattr(config, "position_embedding_type", None) or "absolute") != "absolute":
            raise CannotFuse(f"its positions are of the type {kind}")
        try:
            return self._spec(type(module).forward.__module__, module)
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
        first, heads, head_size, scale, activation = found[0]
        hidden = first.o.out_features
        project = module._modules.get("embeddings_project")
        norm = layer_norm(embeddings.LayerNorm, hidden if project is None else project.in_features)
        # A word is looked up by its module, hooks and all.
        tables = [child for name, child in embeddings.named_children() if name != "word_embeddings"]
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
            first_norm=norm if project is None else None,
            modules=[embeddings, *modules_of(*tables, encoder)],
        )

    def build(self, module: nn.Module) -> tuple[FusedStack, Extra]:
        import transformers
        from transformers import modeling_outputs

        self.without_capture(module)
        stack = FusedStack(self.spec(module))
        embeddings, children = module.embeddings, module._modules
        return stack, Extra(
            embeddings,
            embeddings.word_embeddings,
            embeddings._modules.get("token_type_embeddings"),
            _table(embeddings),
            {},
            {},
            children.get("embeddings_project"),
            children.get("pooler"),
            _maker(getattr(modeling_outputs, self.output)),
            transformers.__version__.startswith("4."),
        )

    # Calling.

    def run(
        self,
        module: nn.Module,
        stack: FusedStack,
        extra: Extra,
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
        # Attributes of a config take 1 us each.
        settings = object.__getattribute__(module.__dict__["config"], "__dict__")
        if (attention := settings.get("_attn_implementation_internal")) not in _ATTENTIONS:
            raise CannotFuse(f"the attention implementation {attention!r}")
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
        values: dict[str, Any] = {"last_hidden_state": last}
        if pooled is not None:
            values["pooler_output"] = pooled
        elif not as_dict and (extra.old or self.absent_in_tuples) and hasattr(module, "pooler"):
            values["pooler_output"] = None
        if states is not None:
            values["hidden_states"] = states
        return extra.output(values) if as_dict else tuple(values.values())

    def embed(
        self,
        extra: Extra,
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
            x = _look_up(extra.word, ids)
        if types is not None and extra.types is not None and (types.shape != x.shape[:2] or types.any()):
            if positions is None:
                positions = embeddings.position_ids[:, begin : begin + tokens]
            x = x + extra.types(types) + embeddings.position_embeddings(positions)
        elif positions is None:
            if (rows := extra.rows.get(tokens)) is None:
                extra.rows.clear()
                rows = extra.rows[tokens] = extra.table[begin : begin + tokens]
            x = x + rows
        else:
            x = x + functional.embedding(positions, extra.table)
        return x if extra.project is None else extra.project(embeddings.LayerNorm(x))


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


def _look_up(word: nn.Module, ids: Tensor) -> Tensor:
    """word(ids); a plain one in 2.5 us instead of 4."""
    own = vars(word)
    if (
        type(word) is not nn.Embedding
        or word.max_norm is not None
        or "forward" in own
        or any(map(own.__getitem__, _HOOKS))
        or any(_GLOBAL_HOOKS)
    ):
        return word(ids)
    return torch.embedding(own["_parameters"]["weight"], ids)


def _each_state(stack: FusedStack, extra: Extra, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
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


def _maker(cls: type) -> Callable[[dict[str, Any]], Any]:
    """A function that makes a ModelOutput of the fields that have a value. Its own constructor takes 9 us, of
    the 350 that a small model takes. This way takes one, where it makes the same.
    """
    absent = dict.fromkeys(field.name for field in fields(cls))

    def make(values: dict[str, Any]) -> Any:
        output = OrderedDict.__new__(cls)
        vars(output).update(absent)
        vars(output).update(values)
        for name, value in values.items():
            OrderedDict.__setitem__(output, name, value)
        return output

    example = {"last_hidden_state": torch.zeros(0)}
    want, found = cls(**example), make(example)
    if vars(want) == vars(found) and list(want.items()) == list(found.items()):
        return make
    return lambda values: cls(**values)
