"""torch.nn.TransformerEncoder and TransformerEncoderLayer: their blocks in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attach import Fused, check_input
from .parts import activation_of, check_dropout, layer_norm
from .stack import BlockSpec, CannotFuse, FusedStack, Rows, StackSpec, modules_of

_Layer, _Encoder = nn.TransformerEncoderLayer, nn.TransformerEncoder
_METHODS = ("forward", "_sa_block", "_ff_block")


class _Shape(NamedTuple):
    """What the layers of a stack have in common."""

    hidden: int
    heads: int
    activation: str
    pre_norm: bool
    batch_first: bool


class _FusedTorch(Fused):
    """What both have in common."""

    def layers(self, module: nn.Module) -> list[nn.Module]:
        raise NotImplementedError

    def inside(self, module: nn.Module) -> list[nn.Module]:
        """The modules whose work the stack does in any case, with all that is in them."""
        return list(module.children())

    def last_norm(self, module: nn.Module) -> nn.Module | None:
        """A norm behind the last layer."""
        return None

    def blocks(self, module: nn.Module) -> int:
        return len(self.layers(module))

    def check(self, module: nn.Module) -> None:
        self.spec(module)

    def spec(self, module: nn.Module) -> tuple[StackSpec, _Shape]:
        """What the stack is made of."""
        layers = self.layers(module)
        if not layers:
            raise CannotFuse("it has no layers")
        try:
            found = [_block(layer) for layer in layers]
        except AttributeError as error:
            raise CannotFuse(f"an unknown variant: {error}") from None
        if len({shape for _, shape in found}) > 1:
            raise CannotFuse("its layers differ in shape, activation or order")
        shape = found[0][1]
        norm, size = self.last_norm(module), shape.hidden // shape.heads
        in_stack = [norm] if _in_stack(norm, shape) else []
        spec = StackSpec(
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.heads,
            head_size=size,
            scale=size**-0.5,
            pre_norm=shape.pre_norm,
            rms=False,
            causal=False,
            activation=shape.activation,
            blocks=[block for block, _ in found],
            last_norm=layer_norm(norm, shape.hidden) if in_stack else None,
            modules=modules_of(*self.inside(module), *in_stack),
        )
        return spec, shape

    def build(self, module: nn.Module) -> tuple[FusedStack, tuple[_Shape, nn.Module | None]]:
        for layer in self.layers(module):
            if layer.self_attn.training and layer.self_attn.dropout > 0:
                raise CannotFuse("its dropout is in training mode: call .eval() first")
        spec, shape = self.spec(module)
        norm = self.last_norm(module)
        return FusedStack(spec), (shape, None if _in_stack(norm, shape) else norm)

    def run(
        self,
        module: nn.Module,
        stack: FusedStack,
        extra: tuple[_Shape, nn.Module | None],
        /,
        src: Any = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        **masks: Tensor | None,
    ) -> Tensor:
        shape, norm = extra
        mask = masks.pop(self.mask_name, None)
        if masks:
            raise CannotFuse("its arguments do not fit")  # its own forward says which
        if is_causal and mask is None:
            raise CannotFuse("is_causal without a mask, whose meaning depends on how torch computes it")
        check_input(src)
        if src.ndim not in (2, 3):
            raise CannotFuse("its input is not [batch, tokens, features]")
        alone = src.ndim == 2
        swapped = not alone and not shape.batch_first
        x = src.unsqueeze(0) if alone else src.transpose(0, 1) if swapped else src
        batch, tokens, features = x.shape
        if features != shape.hidden or not batch or not tokens:
            raise CannotFuse("its input does not have the shape that it takes, or is empty")
        padding = src_key_padding_mask
        if padding is not None and alone:
            padding = padding.unsqueeze(0)
        y = stack(x, mask=_mask(mask, padding, batch, tokens, shape.heads))
        if norm is not None:
            y = norm(y)
        return y.squeeze(0) if alone else y.transpose(0, 1).contiguous() if swapped else y


class FusedTorchLayer(_FusedTorch):
    """A TransformerEncoderLayer that stands alone."""

    kind = "torch encoder layer"
    what = "attention and MLP with their norms in one call"
    mask_name = "src_mask"

    def layers(self, module: nn.Module) -> list[nn.Module]:
        return [module]


class FusedTorchEncoder(_FusedTorch):
    """A TransformerEncoder, whose layers are alike."""

    kind = "torch encoder"
    what = "all layers in one call"
    mask_name = "mask"

    def layers(self, module: nn.Module) -> list[nn.Module]:
        return list(module.layers)

    def last_norm(self, module: nn.Module) -> nn.Module | None:
        return module.norm

    def inside(self, module: nn.Module) -> list[nn.Module]:
        return [module.layers]


def family(module: nn.Module) -> type[Fused] | None:
    """What fuses a module, if anything here does. Raises CannotFuse for what is known and left alone."""
    if isinstance(module, nn.TransformerDecoder):
        raise CannotFuse("a decoder that attends to another sequence")
    for base, fused in ((_Layer, FusedTorchLayer), (_Encoder, FusedTorchEncoder)):
        if isinstance(module, base):
            if type(module).forward is not base.forward:
                raise CannotFuse(f"a subclass of {base.__name__} with a forward of its own")
            return fused
    return None


def _in_stack(norm: nn.Module | None, shape: _Shape) -> bool:
    """Whether the stack does the norm behind the last layer."""
    return type(norm) is nn.LayerNorm and shape.pre_norm


def _block(layer: nn.Module) -> tuple[BlockSpec, _Shape]:
    if not isinstance(layer, _Layer) or any(
        getattr(type(layer), name) is not getattr(_Layer, name) for name in _METHODS
    ):
        raise CannotFuse(f"its {type(layer).__name__} is not torch's TransformerEncoderLayer")
    attention, hidden = layer.self_attn, layer.self_attn.embed_dim
    if type(attention) is not nn.MultiheadAttention:
        raise CannotFuse(f"its attention is a {type(attention).__name__}, not torch's MultiheadAttention")
    if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
        raise CannotFuse("its attention has separate key and value weights, bias_k or add_zero_attn")
    for dropout in (layer.dropout, layer.dropout1, layer.dropout2):
        check_dropout(dropout)
    bias = attention.in_proj_bias
    q, k, v = (
        Rows(
            attention.in_proj_weight,
            i * hidden,
            (i + 1) * hidden,
            None if bias is None else bias[i * hidden : (i + 1) * hidden],
        )
        for i in range(3)
    )
    norms = layer_norm(layer.norm1, hidden), layer_norm(layer.norm2, hidden)
    spec = BlockSpec(*norms, q, k, v, attention.out_proj, layer.linear1, layer.linear2)
    activation = activation_of(layer.activation)
    return spec, _Shape(hidden, attention.num_heads, activation, layer.norm_first, attention.batch_first)


def _mask(mask: Tensor | None, padding: Tensor | None, batch: int, tokens: int, heads: int) -> Tensor | None:
    """Torch masks out where a bool is True; the core attends there."""
    parts = []
    if padding is not None:
        if padding.shape != (batch, tokens):
            raise CannotFuse("its src_key_padding_mask does not have the shape of the tokens")
        if padding.any():
            parts.append(padding[:, None, None])
    if mask is not None:
        if mask.shape == (tokens, tokens):
            parts.append(mask[None, None])
        elif mask.shape == (batch * heads, tokens, tokens):
            parts.append(mask.view(batch, heads, tokens, tokens))
        else:
            raise CannotFuse(f"a mask of the shape {tuple(mask.shape)}")
    if any(part.dtype is not torch.bool and not part.is_floating_point() for part in parts):
        raise CannotFuse("a mask that is neither bool nor floating point")
    if not parts:
        return None
    if all(part.dtype is torch.bool for part in parts):
        return ~parts[0] if len(parts) == 1 else ~(parts[0] | parts[1])
    added = [torch.where(p, -torch.inf, 0.0) if p.dtype is torch.bool else p.float() for p in parts]
    return added[0] if len(added) == 1 else added[0] + added[1]
