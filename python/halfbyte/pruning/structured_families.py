"""Blocks of transformers and of torch that are known: where the hidden units of the MLP and the heads lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from ..fuse.parts import defined_in, origin
from ..fuse.stack import CannotFuse
from ..modules import is_linear, join, shape_of
from .structured_units import CannotPrune, Group, Size, is_elementwise


class _Mlp(NamedTuple):
    """Where the MLP of a block is, in names within the block."""

    up: tuple[str, ...]
    down: str
    activation: str
    modules: tuple[str, ...]  # whose forward is that of the family
    setting: str  # of the config: how many hidden units


class _Family(NamedTuple):
    """A kind of block."""

    mlp: _Mlp
    heads: Callable[[nn.Module, str, Any], Iterator[Group]]  # of a block, its name and its config


def neurons(model: nn.Module) -> tuple[list[Group], set[nn.Module]]:
    """The MLPs of all known blocks, and the blocks in which there is nothing else to look for."""
    groups, done = [], set()
    for name, block, family in _blocks(model):
        try:
            groups.append(_neurons(model, name, block, family.mlp))
            done.add(block)
        except (CannotPrune, CannotFuse, AttributeError):  # an unknown variant, whose parts may be traceable
            continue
    return groups, done


def heads(model: nn.Module) -> list[Group]:
    """The attentions of all known blocks; those that are left alone, and of unknown blocks, with a reason."""
    groups, done = [], set()
    for name, block, family in _blocks(model):
        try:
            groups += list(family.heads(block, name, config_of(model, name)))
            done.update(block.modules())
        except (CannotPrune, CannotFuse, AttributeError) as error:
            groups.append(Group(name, 0, reason=f"a {type(block).__name__} of an unknown variant: {error}"))
            done.update(block.modules())
    for name, module in model.named_modules():
        if module not in done and type(module).__name__.endswith("Attention") and any(module.children()):
            reason = "an attention that halfbyte does not know"
            if isinstance(module, nn.MultiheadAttention):
                reason = "nn.MultiheadAttention has as many features in its heads as the model has in all"
            groups.append(Group(name, getattr(module, "num_heads", 0), reason=reason))
            done.update(module.modules())
    return groups


def is_known(module: nn.Module) -> bool:
    """Whether it is a block of a known family."""
    return _family(module) is not None


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Family]]:
    for name, module in model.named_modules():
        if (family := _family(module)) is not None:
            yield name, module, family


def _family(module: nn.Module) -> _Family | None:
    for base in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        if isinstance(module, base):
            own = all(getattr(type(module), name) is getattr(base, name) for name in ("forward", "_ff_block"))
            return _TORCH if own else None
    source, cls = origin(module)
    known = _BLOCKS.get(source.removeprefix("transformers.models."))
    return known[1] if known is not None and known[0] == cls else None


def config_of(model: nn.Module, name: str) -> Any:
    """The config of the nearest module around, None where there is none."""
    while True:
        if (config := vars(model.get_submodule(name)).get("config")) is not None or not name:
            return config
        name = name.rpartition(".")[0]


def _neurons(model: nn.Module, name: str, block: nn.Module, mlp: _Mlp) -> Group:
    defined_in(origin(block)[0], *(attrgetter(part)(block) for part in mlp.modules))
    layers = [_linear(block, part) for part in (*mlp.up, mlp.down)]
    if not is_elementwise(activation := attrgetter(mlp.activation)(block)):
        raise CannotPrune(f"its activation {activation} is not known to treat every unit by itself")
    group = Group(join(name, mlp.up[0]), shape_of(layers[0])[0])
    for part, layer in zip(mlp.up, layers, strict=False):
        group.add_maker(join(name, part), layer)
    group.set_user(join(name, mlp.down), layers[-1])
    config = config_of(model, name)
    if mlp.setting and config is not None and hasattr(config, mlp.setting):
        group.settings.append(Size(config, mlp.setting, 1))
    return group


def _linear(block: nn.Module, name: str) -> nn.Module:
    if not is_linear(layer := attrgetter(name)(block)):
        raise CannotPrune(f"its {name} is a {type(layer).__module__}.{type(layer).__name__}, no plain layer")
    return layer


def _attention(
    block: nn.Module, name: str, own: str, makers: tuple[str, ...], user: str, units: int
) -> Group:
    """Makers and user are named within `own`, the module that splits heads; `user` perhaps beside it."""
    group = Group(join(name, own), units)
    for maker in makers:
        group.add_maker(join(name, maker), _linear(block, maker))
    group.set_user(join(name, user), _linear(block, user))
    return group


_NO_SETTING = (
    "config.{} stays {}: in this family it also says how large a head is, so no config has fewer heads"
)


def _bert_heads(block: nn.Module, name: str, config: Any) -> Iterator[Group]:
    for prefix in ("attention", "crossattention"):
        if prefix == "attention" or hasattr(block, prefix):
            attention = getattr(block, prefix)
            own = attention.self
            defined_in(origin(block)[0], attention, own, attention.output)
            makers = tuple(f"{prefix}.self.{layer}" for layer in ("query", "key", "value"))
            units, size = own.num_attention_heads, own.attention_head_size
            group = _attention(block, name, prefix, makers, f"{prefix}.output.dense", units)
            group.sizes += [Size(own, "num_attention_heads", 1), Size(own, "all_head_size", size)]
            group.note = _NO_SETTING.format(
                "num_attention_heads", getattr(config, "num_attention_heads", "as it is")
            )
            yield group


def _distilbert_heads(block: nn.Module, name: str, config: Any) -> Iterator[Group]:
    own = block.attention
    defined_in(origin(block)[0], own)
    makers = ("attention.q_lin", "attention.k_lin", "attention.v_lin")
    group = _attention(block, name, "attention", makers, "attention.out_lin", own.n_heads)
    group.sizes += [Size(own, "n_heads", 1), Size(own, "dim", own.dim // own.n_heads)]
    group.note = _NO_SETTING.format("n_heads", getattr(config, "n_heads", "as it is"))
    yield group


def _mpnet_heads(block: nn.Module, name: str, config: Any) -> Iterator[Group]:
    reason = "all layers of MPNet share one bias of positions, which has a column for each head"
    yield Group(join(name, "attention"), block.attention.attn.num_attention_heads, reason=reason)


def _llama_heads(block: nn.Module, name: str, config: Any) -> Iterator[Group]:
    own = block.self_attn
    defined_in(origin(block)[0], own)
    makers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    units, shared = shape_of(own.k_proj)[0] // own.head_dim, own.num_key_value_groups
    if shape_of(own.q_proj)[0] != units * shared * own.head_dim:
        raise CannotPrune(f"its queries are not {shared} heads for each of {units} keys")
    group = _attention(block, name, "self_attn", makers, "self_attn.o_proj", units)
    kept = (Size(own, "num_heads", shared), Size(own, "num_key_value_heads", 1))  # of older versions
    group.sizes += [size for size in kept if hasattr(own, size.attribute)]
    if config is not None:
        group.settings += [
            Size(config, "num_attention_heads", shared),
            Size(config, "num_key_value_heads", 1),
        ]
        group.fixed.append((config, "head_dim", own.head_dim))
    yield group


def _gpt2_heads(block: nn.Module, name: str, config: Any) -> Iterator[Group]:
    for prefix in ("attn", "crossattention"):
        if prefix == "attn" or hasattr(block, prefix):
            own = getattr(block, prefix)
            defined_in(origin(block)[0], own)
            group = Group(join(name, prefix), own.num_heads)
            merged = shape_of(own.c_attn)[0] // (own.num_heads * own.head_dim)
            group.add_maker(join(name, f"{prefix}.c_attn"), _linear(block, f"{prefix}.c_attn"), merged)
            if own.is_cross_attention:
                group.add_maker(join(name, f"{prefix}.q_attn"), _linear(block, f"{prefix}.q_attn"))
            group.set_user(join(name, f"{prefix}.c_proj"), _linear(block, f"{prefix}.c_proj"))
            group.sizes += [Size(own, "num_heads", 1), Size(own, "split_size", own.head_dim)]
            group.note = _NO_SETTING.format("n_head", getattr(config, "n_head", "as it is"))
            yield group


def _torch_heads(block: nn.Module, name: str, config: Any) -> Iterator[Group]:
    reason = "nn.MultiheadAttention has as many features in its heads as the model has in all"
    for prefix in ("self_attn", "multihead_attn"):
        if hasattr(block, prefix):
            yield Group(join(name, prefix), getattr(block, prefix).num_heads, reason=reason)


_BERT = _Family(
    _Mlp(
        ("intermediate.dense",), "output.dense", "intermediate.intermediate_act_fn",
        ("intermediate", "output"), "intermediate_size",
    ),
    _bert_heads,
)  # fmt: skip
_LLAMA = _Family(
    _Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "mlp.act_fn", ("mlp",), "intermediate_size"),
    _llama_heads,
)
_TORCH = _Family(_Mlp(("linear1",), "linear2", "activation", (), ""), _torch_heads)
_BLOCKS = {
    "bert.modeling_bert": ("BertLayer", _BERT),
    "roberta.modeling_roberta": ("RobertaLayer", _BERT),
    "xlm_roberta.modeling_xlm_roberta": ("XLMRobertaLayer", _BERT),
    "camembert.modeling_camembert": ("CamembertLayer", _BERT),
    "electra.modeling_electra": ("ElectraLayer", _BERT),
    "mpnet.modeling_mpnet": ("MPNetLayer", _Family(_BERT.mlp, _mpnet_heads)),
    "distilbert.modeling_distilbert": (
        "TransformerBlock",
        _Family(_Mlp(("ffn.lin1",), "ffn.lin2", "ffn.activation", ("ffn",), "hidden_dim"), _distilbert_heads),
    ),
    "llama.modeling_llama": ("LlamaDecoderLayer", _LLAMA),
    "mistral.modeling_mistral": ("MistralDecoderLayer", _LLAMA),
    "qwen2.modeling_qwen2": ("Qwen2DecoderLayer", _LLAMA),
    "gpt2.modeling_gpt2": (
        "GPT2Block",
        _Family(_Mlp(("mlp.c_fc",), "mlp.c_proj", "mlp.act", ("mlp",), "n_inner"), _gpt2_heads),
    ),
}
