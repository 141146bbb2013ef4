"""Small models to take units out of, and what tests ask of them."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))


def mlp(*widths, activation=nn.ReLU):
    """Linear layers of these widths, 8 at first, with activations in between."""
    widths = (8, *widths)
    layers = []
    for k, n in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(k, n), activation()]
    return nn.Sequential(*layers[:-1])


class Gated(nn.Module):
    def __init__(self, units=10):
        super().__init__()
        self.gate, self.up = nn.Linear(8, units, bias=False), nn.Linear(8, units)
        self.act, self.down = nn.SiLU(), nn.Linear(units, 8)

    def forward(self, x, scale: float = 1.0, mask=None):
        hidden = self.act(self.gate(x)) * self.up(x)
        return self.down(functional.dropout(hidden, 0.1, training=self.training)) * scale


def report(model):
    return {row["name"]: (row["after"], row["reason"]) for row in model._halfbyte_pruning}


def state(model):
    return {name: (id(p), p.clone(), p.requires_grad) for name, p in model.state_dict(keep_vars=True).items()}


def assert_untouched(model, before, modes):
    assert {m: m.training for m in model.modules()} == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not hasattr(model, "_halfbyte_pruning") and not hasattr(model, "_halfbyte_units")
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (identity, value, grad) in before.items():
        assert id(after[name]) == identity and after[name].requires_grad == grad, name
        assert torch.equal(after[name].nan_to_num(9), value.nan_to_num(9)), name


def widths(model):
    return [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]


def run(model, x):
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, torch.Tensor) else y[0]


def rows(model):
    """Of the report, those of layers that became smaller."""
    return [row for row in model._halfbyte_pruning if row["action"] == "pruned"]


def kept(before, after, name, units):
    """Which units a layer has still: its weights, or biases, are compared with what they were."""
    old, new = before.get_submodule(name), after.get_submodule(name)
    values = [layer.weight if layer.bias is None else layer.bias[None] for layer in (old, new)]
    if values[0].shape[0] != 1:
        values = [value.t() for value in values]  # outputs last
    merged = name.endswith("c_attn")  # of which the first is looked at
    size = before.get_submodule(name.rpartition(".")[0]).head_dim if merged else values[0].shape[1] // units
    return (values[0][:, ::size, None] == values[1][:, None]).all(0).any(1)[:units]


def without(model, pruned):
    """The model with the inputs of consumers zeroed for all units that `pruned` has lost."""
    masked = copy.deepcopy(model)
    for row in rows(pruned):
        stays = kept(model, pruned, row["layers"][0], row["before"])
        assert int(stays.sum()) == row["after"] < row["before"]
        user = masked.get_submodule(row["layers"][-1])
        weight = user.weight.detach()
        weight = weight if isinstance(user, (nn.Linear, nn.Conv2d)) else weight.t()
        columns = weight.shape[1] // row["before"]
        weight[:, (~stays).repeat_interleave(columns)] = 0
    return masked


def check_same(model, pruned, x):
    want, got = run(without(model, pruned), x), run(pruned, x)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert not torch.allclose(got, run(model, x), rtol=0.01)  # something did go
