"""A gated MLP with its norm and its sum, made of what fuse_ looks for; and its numbers by the core."""

from __future__ import annotations

import torch
from torch import nn

import halfbyte as hb
from fusing import roused

K = 48
X = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(2))
NORMS = {
    "layer": lambda: nn.LayerNorm(K),
    "layer without bias": lambda: nn.LayerNorm(K, bias=False),
    "plain layer": lambda: nn.LayerNorm(K, eps=1e-3, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(K, eps=1e-5),
    "rms of torch's eps": lambda: nn.RMSNorm(K),
    "plain rms": lambda: nn.RMSNorm(K, eps=1e-6, elementwise_affine=False),
}


class PreNorm(nn.Module):
    """A gated MLP of a block, with its norm and its sum."""

    def __init__(self, norm=None, act=None):
        super().__init__()
        self.norm = NORMS["layer"]() if norm is None else norm
        self.gate, self.up, self.down = nn.Linear(K, 72), nn.Linear(K, 72, bias=False), nn.Linear(72, K)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(self.act(self.gate(y)) * self.up(y))


def made(model, scheme="w8a8"):
    return hb.quantize_(roused(model), scheme, progress=False)


def what(model):
    return hb.fusion_report(model).rows[0].what


def normed(norm, x):
    """By the core."""
    if isinstance(norm, nn.LayerNorm):
        return hb.layernorm(x, norm.weight, norm.bias, eps=norm.eps)
    return hb.rmsnorm(x, norm.weight, eps=torch.finfo(torch.float32).eps if norm.eps is None else norm.eps)


def product(layer, x, **options):
    return hb.linear(x, hb.pack(layer.packable), layer.bias, static=layer.static, **options)


def parts(model, x, norm=None):
    """The parts of a PreNorm one after the other; `norm` instead of the core's."""
    y = normed(model.norm, x) if norm is None else norm(x)
    gate, up = hb.pack(model.gate.packable), hb.pack(model.up.packable)
    y = hb.gated_linear(y, up, gate, model.up.bias, model.gate.bias, static=model.up.static)
    return product(model.down, y, residual=x)
