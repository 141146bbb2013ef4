"""prune_: bad arguments, data and models are named errors, and every failure leaves the model as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.pruning import prune as pruning
from halfbyte.pruning import prune_
from pruned import assert_same, loss_fn, photograph, zeros

NAN = [torch.full((1, 16), math.nan)]


def bad_layer(kind):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16))
    prune_(model, 0.2, include="0")
    model[3].weight.grad = torch.ones(16, 16)
    model[3].bias.requires_grad_(False)
    model[1].eval()
    if kind == "nan":
        model[3].weight.data[5, 2] = math.nan
    elif kind == "meta":
        model[3].to("meta")
    elif kind == "int":
        model[3].weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int32), requires_grad=False)
    elif kind == "complex":
        model[3].to(torch.complex64)
    elif kind == "empty":
        model[3].weight = nn.Parameter(torch.ones(0, 16))
    elif kind == "mask shape":
        model[0].weight_mask = torch.ones(4, 4)
    elif kind == "mask values":
        model[0].weight_mask *= 0.5
    elif kind == "quantized":
        hb.quantize_(model, include="3")
    return model


def raising(model, batch):
    model(batch)
    raise ZeroDivisionError("mine")


def interrupted(model, batch):
    model(batch)
    raise KeyboardInterrupt


GOOD = [torch.randn(8, 16)]
FAILURES = {
    "above 1": (None, {"amount": 1.5}, hb.SchemeError, "amount is 1.5"),
    "below 0": (None, {"amount": -1e-9}, hb.SchemeError, "amount is -1e-09"),
    "nan": (None, {"amount": math.nan}, hb.SchemeError, "amount is nan"),
    "bool": (None, {"amount": True}, hb.DTypeError, "amount must be a number"),
    "text": (None, {"amount": "0.5"}, hb.DTypeError, "amount must be a number"),
    "none": (None, {"amount": None}, hb.DTypeError, "amount must be a number .* not None"),
    "2:4 at 60 %": (None, {"amount": 0.6, "pattern": "2:4"}, hb.SchemeError, "2:4 has the share 0.5"),
    "both": (None, {"threshold": 0.1}, hb.SchemeError, "without an amount"),
    "threshold of random": (
        None, {"amount": None, "threshold": 0.1, "method": "random"}, hb.SchemeError, "threshold",
    ),
    "threshold of blocks": (
        None, {"amount": None, "threshold": 0.1, "pattern": "block16x4"}, hb.SchemeError, "threshold",
    ),
    "threshold below 0": (None, {"amount": None, "threshold": -1}, hb.SchemeError, "threshold is -1"),
    "threshold nan": (None, {"amount": None, "threshold": math.nan}, hb.SchemeError, "threshold is nan"),
    "threshold text": (None, {"amount": None, "threshold": "1"}, hb.DTypeError, "threshold must be a number"),
    "pattern": (None, {"pattern": "2:5:7"}, hb.SchemeError, "'2:5:7'; the nearest .* neuron, head, channel"),
    "method": (None, {"method": "wander"}, hb.SchemeError, "'wander'; the nearest is wanda"),
    "scope": (None, {"scope": "local"}, hb.SchemeError, "scope is 'local'"),
    "sparsegpt global": (
        None, {"method": "sparsegpt", "scope": "global", "data": GOOD}, hb.SchemeError, 'scope="layer"',
    ),
    "norm": (None, {"norm": 1}, hb.DTypeError, "norm and criterion are for the patterns neuron"),
    "no data": (None, {"method": "wanda"}, hb.DTypeError, "'wanda' needs data"),
    "no data for sparsegpt": (None, {"method": "sparsegpt"}, hb.DTypeError, "'sparsegpt' needs data"),
    "no data for taylor": (None, {"method": "taylor", "loss_fn": loss_fn}, hb.DTypeError, "needs data"),
    "no loss": (None, {"method": "taylor", "data": GOOD}, hb.DTypeError, "needs loss_fn"),
    "a batch for data": (None, {"method": "wanda", "data": GOOD[0]}, hb.DTypeError, "data is a Tensor"),
    "forward": (None, {"method": "wanda", "data": GOOD, "forward": 3}, hb.DTypeError, "forward must be"),
    "no batches": (None, {"method": "wanda", "data": []}, hb.ModelError, "data has no batches"),
    "no batches for sparsegpt": (None, {"method": "sparsegpt", "data": []}, hb.ModelError, "no batches"),
    "not reached": (
        None, {"method": "wanda", "data": GOOD, "forward": lambda m, b: None}, hb.ModelError, "reached none",
    ),
    "nan data": (None, {"method": "wanda", "data": NAN}, hb.NonFiniteError, "an input of 0 holds a NaN"),
    "nan data for sparsegpt": (
        None, {"method": "sparsegpt", "data": GOOD + NAN}, hb.NonFiniteError, "an input of 0 holds a NaN",
    ),
    "nan loss": (
        None, {"method": "taylor", "data": GOOD + NAN, "loss_fn": loss_fn}, hb.NonFiniteError, "of batch 1",
    ),
    "loss without gradient": (
        None, {"method": "taylor", "data": GOOD, "loss_fn": lambda m, b: m(b).sum().detach()}, hb.ModelError,
        "the loss has no gradient",
    ),
    "loss of many": (
        None, {"method": "taylor", "data": GOOD, "loss_fn": lambda m, b: m(b)}, hb.DTypeError, "one number",
    ),
    "infinite gradient": (
        None, {"method": "taylor", "data": GOOD, "loss_fn": lambda m, b: (m(b) * 0).abs().sqrt().sum()},
        hb.NonFiniteError, "the scores of 0 hold a NaN",
    ),
    "raising": (None, {"method": "wanda", "data": GOOD, "forward": raising}, ZeroDivisionError, "mine"),
    "raising loss": (
        None, {"method": "taylor", "data": GOOD, "loss_fn": raising}, ZeroDivisionError, "mine",
    ),
    "ctrl-c": (None, {"method": "sparsegpt", "data": GOOD, "forward": interrupted}, KeyboardInterrupt, None),
    "wrong width": (None, {"method": "sparsegpt", "data": [torch.randn(2, 3)]}, RuntimeError, "shape"),
    "nan weight": ("nan", {}, hb.NonFiniteError, "3.weight holds a NaN"),
    "nan weight at random": ("nan", {"method": "random"}, hb.NonFiniteError, "3.weight holds a NaN"),
    "meta": ("meta", {}, hb.DeviceError, "3.weight is on the meta device"),
    "complex": ("complex", {}, hb.DTypeError, "3.weight has the dtype torch.complex64"),
    "int": ("int", {}, hb.DTypeError, "3.weight has the dtype torch.int32"),
    "empty": ("empty", {}, hb.ShapeError, r"3.weight has the shape \(0, 16\)"),
    "mask shape": ("mask shape", {}, hb.ShapeError, r"0.weight_mask has the shape \(4, 4\)"),
    "mask values": ("mask values", {}, hb.NonFiniteError, "0.weight_mask holds more than zeros and ones"),
    "quantized": ("quantized", {}, hb.ModelError, "3 is a QLinear already; prune the float model, before"),
    "nothing": (None, {"exclude": "*"}, hb.ModelError, "nothing to prune in this Sequential: 0: excluded; 3"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Casting complex", "ignore:Complex modules")
@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_leaves_the_model_as_it_was(case):
    kind, options, error, says = FAILURES[case]
    model = bad_layer(kind)
    before = photograph(model)
    with pytest.raises(error, match=says):
        prune_(model, **{"amount": 0.5, **options})
    assert_same(model, before)


def test_a_failure_in_the_last_group_takes_back_the_first():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    prune_(model, 0.1)
    model(GOOD[0])
    seen = []

    def hook(module, args):
        seen.append(zeros(model)["0"])
        if seen[-1] > 25:
            raise ZeroDivisionError("mine")

    model[2].register_forward_pre_hook(hook)
    before = photograph(model)
    with pytest.raises(ZeroDivisionError, match="mine"):
        prune_(model, 0.5, method="sparsegpt", data=GOOD)
    assert seen[-1] == 128, "the first layer was pruned when the second one was looked at"
    assert_same(model, before)


def test_a_failure_between_two_masks_takes_the_first_off(monkeypatch):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    before, put = photograph(model), pruning.put

    def fail(layer, keep):
        if layer.name == "1":
            assert hasattr(model[0], "weight_mask")
            raise MemoryError
        put(layer, keep)

    monkeypatch.setattr(pruning, "put", fail)
    with pytest.raises(MemoryError):
        prune_(model, 0.5)
    assert_same(model, before)
    assert not hasattr(model, "_halfbyte_pruning")


def test_what_is_no_model_is_an_error():
    with pytest.raises(hb.DTypeError, match="prune_ takes a model"):
        prune_(torch.rand(4, 4), 0.5)


@pytest.mark.parametrize("method", ["wanda", "taylor", "sparsegpt"])
def test_learning_from_data_changes_only_the_masks(method):
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 16))
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones(16, 16)
    model[2].eval()
    batches = (torch.randn(32, 16) for _ in range(3))  # read once only, drawn as they are
    state = torch.get_rng_state()
    with torch.no_grad():
        prune_(model, 0.5, method=method, data=batches, loss_fn=loss_fn)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, False, True]
    assert not model[0].weight_orig.requires_grad and model[3].weight_orig.requires_grad
    assert model[3].weight_orig.grad.equal(torch.ones(16, 16)) and model[3].bias.grad is None
    assert int(model[1].num_batches_tracked) == 0
    assert [len(m._forward_pre_hooks) for m in model] == [1, 0, 0, 1]
