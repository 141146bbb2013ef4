"""The BERT family of transformers: where what lies in each of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attach import Fused
from .encoder import Block, Extra, FusedEncoder
from .parts import activation_of, check_dropout, defined_in, layer_norm, origin, origins
from .stack import BlockSpec, CannotFuse


class FusedBert(FusedEncoder):
    """BertModel."""

    kind = "BERT encoder"
    output = "BaseModelOutputWithPoolingAndCrossAttentions"

    def block(self, source: str, layer: nn.Module) -> Block:
        attention, intermediate, output = layer.attention, layer.intermediate, layer.output
        own, after = attention.self, attention.output
        defined_in(source, layer, attention, own, after, intermediate, output)
        for dropout in (own.dropout, after.dropout, output.dropout):
            check_dropout(dropout)
        if getattr(layer, "is_decoder", False) or getattr(own, "is_decoder", False):
            raise CannotFuse("it is a decoder, whose attention is causal")
        hidden = after.dense.out_features
        spec = BlockSpec(
            attention_norm=layer_norm(after.LayerNorm, hidden),
            mlp_norm=layer_norm(output.LayerNorm, hidden),
            q=own.query,
            k=own.key,
            v=own.value,
            o=after.dense,
            up=intermediate.dense,
            down=output.dense,
        )
        activation = activation_of(intermediate.intermediate_act_fn)
        return Block(spec, own.num_attention_heads, own.attention_head_size, _scale(own), activation)


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


class FusedDistilBert(FusedEncoder):
    """DistilBertModel: no token types, no pooler, and other names."""

    kind = "DistilBERT encoder"
    encoder = "transformer"
    output = "BaseModelOutput"

    def block(self, source: str, layer: nn.Module) -> Block:
        own, mlp = layer.attention, layer.ffn
        defined_in(source, layer, own, mlp)
        check_dropout(own.dropout)
        check_dropout(mlp.dropout)
        hidden = own.out_lin.out_features
        spec = BlockSpec(
            attention_norm=layer_norm(layer.sa_layer_norm, hidden),
            mlp_norm=layer_norm(layer.output_layer_norm, hidden),
            q=own.q_lin,
            k=own.k_lin,
            v=own.v_lin,
            o=own.out_lin,
            up=mlp.lin1,
            down=mlp.lin2,
        )
        return Block(spec, own.n_heads, own.attention_head_size, _scale(own), activation_of(mlp.activation))


class FusedMPNet(FusedRoberta):
    """MPNetModel: no token types; the distance of two tokens adds a bias to their score."""

    kind = "MPNet encoder"
    output = "BaseModelOutputWithPooling"
    absent_in_tuples = True

    def block(self, source: str, layer: nn.Module) -> Block:
        attention, intermediate, output = layer.attention, layer.intermediate, layer.output
        own = attention.attn
        defined_in(source, layer, attention, own, intermediate, output)
        for dropout in (own.dropout, attention.dropout, output.dropout):
            check_dropout(dropout)
        hidden = own.o.out_features
        spec = BlockSpec(
            attention_norm=layer_norm(attention.LayerNorm, hidden),
            mlp_norm=layer_norm(output.LayerNorm, hidden),
            q=own.q,
            k=own.k,
            v=own.v,
            o=own.o,
            up=intermediate.dense,
            down=output.dense,
        )
        activation = activation_of(intermediate.intermediate_act_fn)
        return Block(spec, own.num_attention_heads, own.attention_head_size, _scale(own), activation)

    def mask(self, module: nn.Module, extra: Extra, given: Tensor | None, batch: int, tokens: int) -> Tensor:
        padding = super().mask(module, extra, given, batch, tokens)
        if (bias := extra.biases.get(tokens)) is None:
            with torch.no_grad():
                bias = module.encoder.compute_position_bias(torch.empty(1, tokens, 0)).float()
            extra.biases.clear()
            extra.biases[tokens] = bias
        if padding is None:
            return bias
        if padding.dtype is torch.bool:
            return torch.where(padding, bias, torch.finfo(torch.float32).min)
        return bias + padding


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
    (f"transformers.models.{source}", name): fused
    for source, classes in _FAMILIES.items()
    for name, fused in classes.items()
}


def family(module: nn.Module) -> type[Fused] | None:
    """What fuses a module, if anything here does. CannotFuse for a subclass with a forward of its own."""
    if (fused := _KNOWN.get(origin(module))) is not None:
        return fused
    for base in origins(module):
        if base in _KNOWN:
            raise CannotFuse(f"a subclass of {base[1]} with a forward of its own")
    return None


def _scale(attention: nn.Module) -> float:
    return getattr(attention, "scaling", attention.attention_head_size**-0.5)
