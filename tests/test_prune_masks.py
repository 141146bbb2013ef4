"""Masks put on, shared, checked and taken off; amounts of every kind of number."""

from __future__ import annotations

import copy
import fractions
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import halfbyte as hb
from halfbyte.pruning import PruneSchedule, prune_, remove_masks_, sparsity
from models import TOKENS, Model, tied
from pruned import assert_same, photograph


class Tied(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))
        for layer in self.layers:
            layer.weight = self.layers[0].weight

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers])


def corner(row):
    mask = torch.ones(8, 8)
    mask[row] = 0
    return mask


def test_modules_with_one_weight_and_different_masks_get_a_weight_each():
    model, x = Tied(4), torch.randn(3, 8)
    weight = model.layers[0].weight
    for layer, row in zip(model.layers, (0, 1, 0, 1), strict=True):
        prune.custom_from_mask(layer, "weight", corner(row))
    y = model(x)
    remove_masks_(model)
    a, b, c, d = (layer.weight for layer in model.layers)
    assert torch.equal(model(x), y) and not prune.is_pruned(model)
    assert a is c is weight and b is d and b is not a
    assert not a[0].any() and a[1].all() and not b[1].any() and b[0].all()


def test_what_has_no_mask_keeps_the_weight_and_equal_masks_stay_tied():
    model, x = Tied(), torch.randn(3, 8)
    weight = model.layers[0].weight
    for layer in model.layers[1:]:
        prune.custom_from_mask(layer, "weight", corner(2))
    y = model(x)
    remove_masks_(model)
    assert torch.equal(model(x), y)
    assert model.layers[0].weight is weight and weight.all()
    assert model.layers[1].weight is model.layers[2].weight and not model.layers[1].weight[2].any()


def test_tied_layers_share_one_mask():
    model = Tied()
    for layer in model.layers:
        prune.custom_from_mask(layer, "weight", corner(1))
    for amount in (0.5, 0.75):
        prune_(model, amount)
        masks = [layer.weight_mask for layer in model.layers]
        assert masks[0] is masks[1] is masks[2]
        assert not masks[0][1].any() and int((masks[0] == 0).sum()) == 64 * amount


def test_a_mask_of_another_shape_is_named_and_nothing_changes():
    model = prune_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.5)
    model[1].weight_mask = torch.ones(1, 8)
    before = photograph(model)
    for function in (remove_masks_, sparsity):
        says = rf"{function.__name__}: 1\.weight_mask has the shape \(1, 8\), the weight \(8, 8\)"
        with pytest.raises(hb.ShapeError, match=says):
            function(model)
        assert_same(model, before)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_pruned_becomes_0_whatever_it_was(value):
    layer = nn.Linear(8, 8)
    prune.custom_from_mask(layer, "weight", corner(3))
    prune.custom_from_mask(layer, "bias", torch.arange(8) != 5)
    layer.weight_orig.data[3, 1] = layer.bias_orig.data[5] = value
    remove_masks_(layer)
    assert not layer.weight[3].any() and layer.bias[5] == 0 and bool(layer.weight.isfinite().all())


def test_an_update_that_the_dtype_of_the_weight_cannot_hold_is_an_error():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    layer.weight.data = torch.full((8, 8), 6e4)
    x = torch.randn(64, 1, generator=generator).repeat(1, 8)  # any input makes up for all of the others
    layer.half()
    before = photograph(layer)
    with pytest.raises(hb.NonFiniteError, match="sparsegpt's update of the model overflows"):
        prune_(layer, 0.5, method="sparsegpt", data=[x], forward=lambda m, b: m(b.half()))
    assert_same(layer, before)


@pytest.mark.parametrize("pattern", ["unstructured", "block16x4", "neuron"])
@pytest.mark.parametrize("amount", [1, 5, np.int64(1)])
def test_integers_are_not_numbers_of_weights(pattern, amount):
    model = Model(1)
    before = photograph(model)
    for function in (prune_, PruneSchedule):
        with pytest.raises(hb.DTypeError, match="1.0 prunes everything; torch's integer amounts"):
            function(model, amount, pattern=pattern)
    assert_same(model, before)


@pytest.mark.parametrize("amount", [np.float32(0.5), np.float64(0.5), fractions.Fraction(1, 2)])
def test_other_kinds_of_numbers_are_shares(amount):
    assert sparsity(prune_(nn.Linear(8, 8), amount)).amount == 0.5
    assert PruneSchedule(nn.Linear(8, 8), amount, tolerance=amount, metric=len).amounts == (0.5,)
    layer = prune_(nn.Linear(8, 8), threshold=amount)
    assert torch.equal(layer.weight_mask == 1, layer.weight_orig.abs() > 0.5)
    assert sparsity(prune_(Model(1), 0)).zeros == 0


CURVES = {"linear": lambda left: left, "cubic": lambda left: left**3}


@pytest.mark.parametrize("kind", CURVES)
def test_a_schedule_starts_where_the_model_is(kind):
    model = prune_(Model(1), 0.5, exclude="head")
    schedule = PruneSchedule(model, 0.9, 4, kind, exclude="head")
    assert schedule.start == 0.5
    assert schedule.amounts == pytest.approx([0.9 - 0.4 * CURVES[kind](1 - i / 4) for i in (1, 2, 3, 4)])
    seen = [sparsity(model).layers[0].amount for _ in schedule]
    assert seen == sorted(set(seen)) and seen[0] > 0.5
    remove_masks_(model)
    assert PruneSchedule(model, 0.9, 4, kind, include="blocks.*").start == pytest.approx(0.9, abs=0.01)
    assert PruneSchedule(model, 0.5, 2, kind, include="blocks.*").amounts == (0.5, 0.5)


def test_a_schedule_counts_blocks_and_units_as_its_steps_do():
    layer = nn.Linear(8, 32)
    layer.weight.data[:16, :4] = 0
    layer.weight.data[16:, 0] = 0
    assert PruneSchedule(layer, 0.75, 2, "linear", pattern="block16x4").amounts == (0.5, 0.75)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 6))
    prune_(model, 0.2, pattern="neuron")
    schedule = PruneSchedule(model, 0.6, 2, "linear", pattern="neuron")
    assert schedule.amounts == pytest.approx((0.4, 0.6))
    assert [model[0].out_features for _ in schedule] == [12, 8]


def test_a_model_that_ran_with_gradients_is_copied_without_its_masks_or_by_its_state():
    model = prune_(Model(1), 0.5)
    model(TOKENS).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):  # as with masks of torch
        copy.deepcopy(model)
    fresh = prune_(Model(1), 0.0)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    remove_masks_(model)
    assert torch.equal(copy.deepcopy(model)(TOKENS), fresh(TOKENS))


def test_a_half_sparse_model_loads_where_the_same_layers_have_masks(tmp_path):
    model = prune_(Model(1), 0.5, pattern="block16x4", exclude="head")
    hb.sparsify_(model, "always", scheme="w8a8+block16x4", include="blocks.0.up")
    assert hasattr(model.blocks[0].down, "weight_mask")
    hb.save(model, tmp_path)
    fresh = prune_(Model(1), 0.0, pattern="block16x4", exclude="head")
    hb.load(fresh, tmp_path)
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    with pytest.raises(hb.HalfbyteError):
        hb.load(Model(1), tmp_path)


def test_an_embedding_keeps_what_a_tied_head_lost():
    model = prune_(tied(), 0.5, include="head")
    embedded, y = model.embed.weight.detach().clone(), model(TOKENS)
    remove_masks_(model)
    assert torch.equal(model.embed.weight, embedded) and torch.equal(model(TOKENS), y)
