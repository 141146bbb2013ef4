"""Structured pruning: what is left alone, and the reason that is given."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import halfbyte as hb
from halfbyte.pruning import prune_
from structured import Gated, X, assert_untouched, mlp, report, state


class Net(nn.Module):
    """One whose layers are used in some way that stands in the way."""

    def __init__(self, forward):
        super().__init__()
        self.up, self.down, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.softmax, self.bn = nn.LayerNorm(8), nn.Softmax(-1), nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(()))
        self.run = forward
        self.last = None

    def forward(self, x, flag=False):
        return self.run(self, x)


def stash(net, x):
    net.last = net.up(x)
    return net.down(net.last)


def branch(net, x):
    return net.down(net.up(x)) if x.sum() > 0 else x


def auxiliary(net, x):
    hidden = net.up(x).relu()
    return (net.down(hidden), net.other(hidden)) if net.training else net.down(hidden)


def count(net, x):
    net.seen += 1
    hidden = net.up(x)
    return net.down(hidden) + net.other(hidden)


LEFT = {
    "two users": (lambda n, x: n.down(h := n.up(x).relu()) + n.other(h), "2 operations use its output"),
    "residual": (lambda n, x: n.down(x + n.up(x)), "add combines it with something else"),
    "norm": (lambda n, x: n.down(n.norm(n.up(x))), "LayerNorm, which is not known to keep units apart"),
    "softmax": (lambda n, x: n.down(n.softmax(n.up(x))), "Softmax, which is not known"),
    "reshaped": (lambda n, x: n.down(n.up(x).view(-1, 8)), "view, which is not known"),
    "transposed": (lambda n, x: n.down(n.up(x).transpose(0, 1)), "transpose, which is not known"),
    "weight": (lambda n, x: n.down(n.up(x)) + n.up.weight.sum(), "parameters of up are used without"),
    "twice": (lambda n, x: n.down(n.up(n.up(x))), "up is called 2 times"),
    "user twice": (lambda n, x: n.down(n.down(n.up(x))), "down is called 2 times"),
    "output": (lambda n, x: n.up(x).relu(), "its output is that of the model"),
    "unused": (lambda n, x: (n.up(x), n.down(x))[1], "it is not used"),
    "not called": (lambda n, x: n.down(x), "it makes no units that are known"),
    "index": (lambda n, x: n.down(n.up(x)[:, :8]), "getitem, which is not known"),
    "stash": (stash, "its forward keeps values in attributes"),
    "branch": (branch, "torch.fx cannot trace the Net that calls it: symbolically traced"),
    "training": (auxiliary, "it is used in another way in training mode"),
    "counting": (count, "2 operations use its output"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case):
    forward, reason = LEFT[case]
    model = Net(forward)
    before, modes = state(model), {m: m.training for m in model.modules()}
    with pytest.raises(hb.ModelError, match="no hidden units to prune in this Net: up: ") as error:
        prune_(model, 0.5, pattern="neuron", include="up")
    assert reason in str(error.value)
    assert_untouched(model, before, modes)
    assert model.last is None


INTEGERS = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
HELD = {
    "hook": (lambda n: n.up.register_forward_hook(lambda *_: None), "up has hooks"),
    "hook of the user": (lambda n: n.down.register_forward_pre_hook(lambda *_: None), "down has hooks"),
    "mask": (lambda n: prune.l1_unstructured(n.up, "weight", 0.5), "up has a mask .*remove_masks_ first"),
    "mask of a bias": (lambda n: prune.l1_unstructured(n.up, "bias", 0.5), "up has a mask"),
    "weight norm": (lambda n: parametrizations.weight_norm(n.up), "up: ParametrizedLinear is a subclass"),
    "tied": (lambda n: setattr(n.other, "weight", n.up.weight), "up shares its weight with another layer"),
    "tied user": (lambda n: setattr(n.other, "weight", n.down.weight), "down shares its weight"),
    "same memory": (lambda n: setattr(n.other, "weight", nn.Parameter(n.up.weight.data)), "up shares its"),
    "shared": (lambda n: setattr(n, "more", n.up), "up is a module that the model has at several places"),
    "replaced": (lambda n: setattr(n.up, "forward", n.up.forward), "the forward of up was replaced"),
    "adapter": (lambda n: n.up.register_parameter("lora", nn.Parameter(X)), "up holds lora"),
    "integers": (lambda n: setattr(n.up, "weight", INTEGERS), "the weight of up is of torch.int8"),
}


@pytest.mark.parametrize("case", HELD)
def test_held_by_something(case):
    spoil, reason = HELD[case]
    model = Net(lambda n, x: n.down(n.up(x).relu()))
    spoil(model)
    names = list(model.state_dict())
    with pytest.raises(hb.ModelError, match=reason):
        prune_(model, 0.5, pattern="neuron")
    assert list(model.state_dict()) == names


def test_hooks_in_between_stand_in_the_way():
    model = mlp(10, 3)
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(hb.ModelError, match="its output goes into 1, which has hooks"):
        prune_(model, 0.5, pattern="neuron")


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Conv2d(3, 4, 3, groups=1), nn.Conv2d(4, 4, 1, groups=2)], "Conv2d, which is not known"),
        ([nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1)], "its channels are in 2 groups"),
        ([nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)], "GroupNorm, which is not known"),
        ([nn.Conv2d(3, 4, 3), nn.Linear(4, 4)], "goes into 1 along another dimension"),
        ([nn.Conv2d(3, 4, 3), nn.MaxPool1d(2), nn.Conv2d(4, 4, 3)], "MaxPool1d, which is not known"),
        ([nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Conv1d(4, 4, 3)], "Flatten, which is not known"),
    ],
)
def test_channels_that_are_left_alone(layers, reason):
    with pytest.raises(hb.ModelError, match=reason):
        prune_(nn.Sequential(*layers), 0.5, pattern="channel")


class Untraceable(nn.Module):
    """Whose parts can be traced."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Gated() for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if x.sum() < math.inf else x
        return self.head(x)


def test_parts_of_what_cannot_be_traced():
    model = prune_(Untraceable(), 0.5, pattern="neuron")
    found = report(model)
    assert [found[f"blocks.{i}.gate"][0] for i in range(3)] == [5, 5, 5]
    assert "cannot trace the Untraceable that calls it" in found["head"][1]
    assert found["blocks.0.down"] == (8, "its output is that of the Gated blocks.0")
    assert model(X).shape == (16, 2)
