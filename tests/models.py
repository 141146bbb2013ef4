"""Models to quantize, and what tests ask of one: its quantized layers, its report, and that it is whole."""

from __future__ import annotations

import torch
from torch import nn

import halfbyte as hb


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up, self.act, self.down = (
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, width, bias=False),
        )

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Model(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def quantized(model):
    return {name for name, module in model.named_modules() if isinstance(module, hb.QLinear)}


def report(model):
    return {row["name"]: (row["action"], row["reason"]) for row in model._halfbyte_report}


def snapshot(model):
    return (
        [(name, type(m), id(m)) for name, m in model.named_modules()],
        {k: v.clone() if not v.is_meta else v for k, v in model.state_dict().items()},
    )


def assert_untouched(model, before):
    modules, state = snapshot(model)
    assert modules == before[0] and list(state) == list(before[1])
    for name, value in state.items():
        if not value.is_meta:
            assert torch.equal(value.nan_to_num(99), before[1][name].nan_to_num(99)), name
    assert not hasattr(model, "_halfbyte_report")


def tied():
    model = Model(1)
    model.head.weight = model.embed.weight
    return model
