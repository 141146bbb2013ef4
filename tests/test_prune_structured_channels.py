"""Structured pruning of convolutional nets: channels, and what belongs to them in the layers behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fusing import roused
from halfbyte.pruning import prune_
from structured import check_same, kept, rows, run

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))


class Convolutional(nn.Module):
    """conv-bn-relu-pool-conv-flatten-linear, flattened in one of several ways."""

    def __init__(self, flatten):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.slope = nn.PReLU(12)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(48, 20)
        self.between = nn.BatchNorm1d(20)
        self.head = nn.Linear(20, 5)
        self.flatten = flatten

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.norm(self.first(x))), 2)
        x = self.pool(self.slope(self.second(self.depthwise(x))))
        return self.head(torch.tanh(self.between(self.hidden(self.flatten(x)))))


def unpacked(x):
    n, _, _, _ = x.shape
    return x.reshape((n, -1))


FLATTENS = {
    "flatten": lambda x: torch.flatten(x, 1),
    "method": lambda x: x.flatten(start_dim=1),
    "view": lambda x: x.view(x.size(0), -1),
    "shape": lambda x: x.reshape(x.shape[0], -1),
    "unpacked": unpacked,
}


@pytest.mark.parametrize("flatten", FLATTENS)
def test_channels_of_a_convolutional_net(flatten):
    model = roused(Convolutional(FLATTENS[flatten]))
    model(IMAGES)
    with torch.no_grad():
        for norm in (model.norm, model.between):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
    pruned = prune_(copy.deepcopy(model), 0.5, pattern="channel")
    assert [(row["layers"], row["after"]) for row in rows(pruned)] == [
        (["first", "norm", "depthwise", "second"], 4),
        (["second", "slope", "hidden"], 6),
    ]
    assert (pruned.norm.num_features, pruned.norm.running_var.shape) == (4, (4,))
    assert (pruned.depthwise.groups, pruned.second.weight.shape) == (4, (6, 4, 3, 3))
    assert (pruned.hidden.in_features, pruned.slope.num_parameters) == (24, 6)
    assert run(pruned, IMAGES).shape == (2, 5)
    prune_(pruned, 0.5, pattern="neuron")
    assert [(row["layers"], row["after"]) for row in rows(pruned)] == [(["hidden", "between", "head"], 10)]
    run(pruned, IMAGES)
    loss = pruned.train()(IMAGES).square().sum()
    loss.backward()
    assert pruned.second.weight.grad.shape == pruned.second.weight.shape


def test_channels_equal_masked_ones():
    model = roused(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.SiLU(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5),
        )
    )  # fmt: skip
    for scope in ("layer", "global"):
        pruned = prune_(copy.deepcopy(model), 0.25, pattern="channel", scope=scope)
        assert sum(row["before"] - row["after"] for row in rows(pruned)) == 5
        check_same(model, pruned, IMAGES)
        assert pruned[11].weight.shape == (5, 20)


def test_transposed_and_one_dimensional_convolutions():
    model = roused(
        nn.Sequential(
            nn.Conv1d(3, 8, 3), nn.InstanceNorm1d(8, affine=True), nn.ReLU(), nn.ConvTranspose1d(8, 6, 2),
            nn.ELU(), nn.Conv1d(6, 2, 1),
        )
    )  # fmt: skip
    pruned = prune_(copy.deepcopy(model), 0.5, pattern="channel")
    assert [layer.weight.shape for layer in pruned if hasattr(layer, "weight")] == [
        (4, 3, 3), (4,), (4, 3, 2), (2, 3, 1),
    ]  # fmt: skip
    x = torch.randn(2, 3, 9)
    stays = [kept(model, pruned, name, units) for name, units in (("0", 8), ("3", 6))]
    with torch.no_grad():
        model[3].weight[~stays[0]] = 0
        model[5].weight[:, ~stays[1]] = 0
    assert torch.allclose(run(model, x), run(pruned, x), atol=1e-5)
