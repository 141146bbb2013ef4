"""Structured pruning: how many units go, by which scores, and what errors leave."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.pruning import PruneSchedule, prune_
from structured import Gated, X, assert_untouched, mlp, report, state, widths

# How many


@pytest.mark.parametrize("amount", [0.0, 0.05, 0.29, 0.3, 0.5, 0.999, 1.0, 0])
def test_exactly_so_many_go_and_one_stays(amount):
    model = prune_(mlp(100, 7, 3), amount, pattern="neuron")
    gone = [min(math.floor(round(amount * units, 6)), units - 1) for units in (100, 7)]
    assert widths(model) == [100 - gone[0], 7 - gone[1], 3]
    assert model(X).shape == (16, 3)


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.37, 0.8, 1.0])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_exactly_so_many_go_of_all_together(amount, method):
    model = prune_(mlp(100, 7, 40, 3), amount, method=method, pattern="neuron", scope="global")
    gone = min(math.floor(round(amount * 147, 6)), 147 - 3)
    assert sum(widths(model)) == 147 - gone + 3 and min(widths(model)[:3]) >= 1
    assert model(X).shape == (16, 3)


def test_the_amount_is_of_what_there_was_at_first():
    steps, once = mlp(100, 12, 3), mlp(100, 12, 3)
    for amount in (0.05, 0.1, 0.3, 0.2, 0.55):
        prune_(steps, amount, pattern="neuron")
    prune_(once, 0.55, pattern="neuron")
    assert widths(steps) == widths(once) == [45, 6, 3]
    again = copy.deepcopy(steps)
    prune_(again, 0.55, pattern="neuron", scope="global")
    assert widths(again) == [45, 6, 3]
    assert report(again)["0"] == (45, "as many of its units are gone already, or one is left")


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_a_schedule_reaches_the_very_number(kind):
    model = mlp(12, 100, 3)
    schedule = PruneSchedule(model, 0.5, 10, kind, pattern="neuron")
    for step in schedule:
        left = [units - math.floor(round(step.amount * units, 6)) for units in (12, 100)]
        assert widths(model) == [*left, 3]
    assert widths(model) == [6, 50, 3]


def test_a_schedule_that_stops_brings_back_what_it_took():
    model = mlp(12, 3)
    schedule = PruneSchedule(
        model, 0.5, 4, "linear", pattern="neuron", tolerance=4, metric=lambda m: m[0].out_features
    )
    for _ in schedule:
        model(X).sum().backward()
    assert [step.kept for step in schedule.history] == [True, True, True, False]
    assert schedule.stopped and widths(model) == [8, 3]
    assert widths(prune_(model, 0.5, pattern="neuron")) == [6, 3]


def test_of_equal_scores_the_first_go():
    model = mlp(10, 3)
    nn.init.ones_(model[0].weight)
    model[0].bias.data = torch.arange(10.0)
    prune_(model, 0.4, pattern="neuron")
    assert model[0].bias.tolist() == [4, 5, 6, 7, 8, 9]


def test_dead_layers_are_ranked():
    model = mlp(6, 6, 3)
    nn.init.zeros_(model[0].weight)
    prune_(model, 0.5, pattern="neuron", scope="global")
    assert widths(model) == [1, 5, 3]


# Which


def units_left(before, after):
    """Of a Gated, by the biases of `up`."""
    return [i for i, b in enumerate(before.up.bias) if b in after.up.bias]


def best(scores, count):
    return sorted(scores.topk(count).indices.tolist())


@pytest.mark.parametrize("norm", [None, 1, 2, 3.5, math.inf])
def test_norms_of_the_weights_that_make_a_unit(norm):
    model = Gated()
    rows = torch.cat([model.gate.weight, model.up.weight], 1).detach()
    pruned = prune_(copy.deepcopy(model), 0.5, method="ln_structured", pattern="neuron", norm=norm)
    assert units_left(model, pruned) == best(rows.norm(2 if norm is None else norm, dim=1), 5)


@pytest.mark.parametrize("criterion", [None, "mean", "apoz"])
def test_activations(criterion):
    model = mlp(10, 3)
    model.insert(2, nn.Dropout(0.5))
    with torch.no_grad():
        hidden = torch.cat([model[:2](X), model[:2](3 * X), model[:2](X[:2])])
    values = (hidden > 0).double() if criterion == "apoz" else hidden.abs()
    pruned = copy.deepcopy(model).train()
    options = {"method": "activation", "pattern": "neuron", "criterion": criterion}
    prune_(pruned, 0.5, data=[X, (3 * X,), {"input": X[:2]}], **options)
    assert [model[0].bias[i] for i in best(values.mean(0), 5)] == list(pruned[0].bias)
    assert pruned.training and pruned[2].training
    together = torch.cat([X, 3 * X, X[:2]])
    again = prune_(model, 0.5, data=iter([7]), forward=lambda m, _: m(together), **options)
    assert torch.equal(again[0].bias, pruned[0].bias)


def test_activations_of_channels_and_heads():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6 * 4, 3))
    images = torch.randn(4, 2, 6, 6)
    with torch.no_grad():
        scores = model[:3](images).abs().mean((0, 2, 3))
    pruned = prune_(copy.deepcopy(model), 0.5, method="activation", pattern="channel", data=[images])
    assert [model[0].bias[i] for i in best(scores, 3)] == list(pruned[0].bias)


def loss_of(model, batch):
    return model(batch).square().sum()


def test_taylor():
    model = Gated().eval()
    scores = 0
    for batch in (X, 2 * X):
        model.zero_grad()
        loss_of(model, batch).backward()
        products = [(layer.weight * layer.weight.grad).abs().sum(1) for layer in (model.gate, model.up)]
        scores = scores + sum(products)
    model.zero_grad()
    model.up.weight.requires_grad_(False)
    options = {"method": "taylor", "pattern": "neuron", "loss_fn": loss_of}
    pruned = prune_(copy.deepcopy(model).train(), 0.5, data=[X, 2 * X], **options)
    assert units_left(model, pruned) == best(scores, 5)
    assert [p.requires_grad for p in pruned.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in pruned.parameters())
    with torch.no_grad():
        again = prune_(copy.deepcopy(model), 0.5, data=[X, 2 * X], **options)
    assert torch.equal(again.up.bias, pruned.up.bias)


def test_random_by_seed():
    model, options = mlp(50, 3), {"method": "random", "pattern": "neuron"}
    found = [prune_(copy.deepcopy(model), 0.5, seed=seed, **options)[0].bias for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_scores_of_different_layers_are_compared_by_their_mean():
    model = mlp(20, 20, 3)
    with torch.no_grad():
        model[2].weight.mul_(100)
    prune_(model, 0.5, pattern="neuron", scope="global")
    assert all(5 < width < 15 for width in widths(model)[:2])


def test_a_fused_model_is_measured_unfused():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().requires_grad_(False)
    fused = hb.fuse_(copy.deepcopy(model))
    options = {"method": "activation", "pattern": "neuron", "data": [X[None]]}
    for m in (model, fused):
        prune_(m, 0.5, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fused.parameters(), strict=True))
    row = hb.fusion_report(fused).rows[0]
    assert not row.fused_calls and not row.unfused_calls


# What it leaves


def test_parameters_keep_what_they_were():
    model = Gated().to(torch.bfloat16)
    model.up.weight.requires_grad_(False)
    model.gate.weight.tag = "kept"
    model.gate.weight.grad = torch.ones_like(model.gate.weight)
    prune_(model, 0.3, pattern="neuron")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert isinstance(model.gate.weight, nn.Parameter) and model.gate.weight.tag == "kept"
    assert model.gate.weight.grad is None and not model.up.weight.requires_grad
    assert report(model) == {"gate": (7, ""), "down": (8, "its output is that of the model")}
    clone = copy.deepcopy(model)
    clone.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    model(X.bfloat16()).sum().backward()
    optimizer.step()


def test_the_report():
    model = prune_(mlp(10, 4, 3), 0.5, pattern="neuron", exclude="4")
    assert model._halfbyte_pruning == [
        {"name": "0", "layers": ["0", "2"], "before": 10, "after": 5, "action": "pruned", "reason": ""},
        {"name": "2", "layers": [], "before": 4, "after": 4, "action": "left alone", "reason": "excluded"},
        {"name": "4", "layers": [], "before": 3, "after": 3, "action": "left alone", "reason": "excluded"},
    ]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"include": "0"}, [5, 4, 3]),
        ({"include": "2"}, [10, 2, 3]),
        ({"include": "re:[02]"}, [5, 2, 3]),
        ({"exclude": "0"}, [10, 2, 3]),
        ({"exclude": "2"}, None),
        ({"include": "4"}, None),
    ],
)
def test_include_and_exclude(options, left):
    model = mlp(10, 4, 3)
    if left is None:
        with pytest.raises(hb.ModelError, match="no hidden units to prune in this Sequential: 0: "):
            prune_(model, 0.5, pattern="neuron", **options)
    else:
        assert widths(prune_(model, 0.5, pattern="neuron", **options)) == left


def test_patterns_that_fit_nothing_are_said():
    with pytest.warns(UserWarning, match="no layer has a name that fits 'nothing'"):
        prune_(mlp(10, 3), 0.5, pattern="neuron", exclude="nothing")


# Errors


def nan_weight(model):
    model[2].weight.data[3, 1] = torch.nan


def broken_data():
    yield X
    raise RuntimeError("the disk is gone")


def no_loss(model, batch):
    return model(batch)


def nan_loss(model, batch):
    return model(batch).sum() * torch.nan


ACTIVATION = {"method": "activation"}
TAYLOR = {"method": "taylor", "data": [X], "loss_fn": loss_of}
ERRORS = [
    ({"amount": 1.5}, hb.SchemeError, "amount is 1.5"),
    ({"amount": -0.1}, hb.SchemeError, "amount is -0.1"),
    ({"amount": math.nan}, hb.SchemeError, "amount is nan"),
    ({"amount": True}, hb.DTypeError, "amount must be a number"),
    ({"amount": None}, hb.DTypeError, "amount must be a number"),
    ({"scope": "all"}, hb.SchemeError, "scope is 'all'"),
    ({"method": "wanda"}, hb.SchemeError, "method 'wanda' does not score whole units"),
    ({"threshold": 0.1, "amount": 0.5}, hb.SchemeError, "threshold"),
    ({"norm": 1}, hb.SchemeError, "norm is for method 'ln_structured'"),
    ({"method": "ln_structured", "norm": "fro"}, hb.DTypeError, "norm must be a number"),
    ({"criterion": "apoz"}, hb.SchemeError, "criterion is for method 'activation'"),
    (ACTIVATION | {"data": [X], "criterion": "max"}, hb.SchemeError, "no criterion is called 'max'"),
    (ACTIVATION, hb.DTypeError, "method 'activation' needs data"),
    (ACTIVATION | {"data": X}, hb.DTypeError, "data is a Tensor"),
    (ACTIVATION | {"data": []}, hb.ModelError, "data has no batches"),
    (ACTIVATION | {"data": [X], "forward": 3}, hb.DTypeError, "forward must be called"),
    (ACTIVATION | {"data": [X], "forward": lambda m, x: x}, hb.ModelError, "no batch of data reached 0, 2"),
    (ACTIVATION | {"data": [X * torch.inf]}, hb.NonFiniteError, "the scores of 0 hold a NaN or an infinity"),
    (ACTIVATION | {"data": broken_data()}, RuntimeError, "the disk is gone"),
    (ACTIVATION | {"data": [X[:, :3]]}, RuntimeError, "shapes cannot be multiplied"),
    (TAYLOR | {"loss_fn": None}, hb.DTypeError, "needs loss_fn"),
    (TAYLOR | {"data": None}, hb.DTypeError, "needs data"),
    (TAYLOR | {"loss_fn": no_loss}, hb.DTypeError, "must return a tensor of one number"),
    (TAYLOR | {"loss_fn": nan_loss}, hb.NonFiniteError, "the loss of batch 0 is nan"),
    (TAYLOR | {"loss_fn": lambda m, x: m[:3](x).sum()}, None, ""),
    (TAYLOR | {"loss_fn": lambda m, x: m[0](x).sum()}, hb.ModelError, "no batch of data reached 2"),
    ({"include": "re:("}, ValueError, "'re:\\('"),
    ({"exclude": [0]}, hb.DTypeError, "0 is no pattern"),
    ({"seed": "a", "method": "random"}, hb.DTypeError, "seed must be an integer"),
    ({"pattern": "neurons"}, hb.SchemeError, "neurons"),
    ({"pattern": "channel"}, hb.ModelError, "no channels to prune in this Sequential: it has no layer"),
    ({"pattern": "head"}, hb.ModelError, "no attention heads to prune in this Sequential"),
]


@pytest.mark.parametrize(("options", "error", "says"), ERRORS)
def test_errors_leave_the_model_as_it_was(options, error, says):
    model = mlp(10, 10, 3).train()
    model[1].eval()
    before, modes = state(model), {m: m.training for m in model.modules()}
    options = {"amount": 0.5, "pattern": "neuron"} | options
    amount = options.pop("amount")
    if error is None:
        prune_(model, amount, **options)
        return
    with pytest.raises(error, match=says):
        prune_(model, amount, **options)
    assert_untouched(model, before, modes)


def test_a_nan_is_named():
    model = mlp(10, 10, 3)
    nan_weight(model)
    before, modes = state(model), {m: m.training for m in model.modules()}
    with pytest.raises(hb.NonFiniteError, match="the scores of 2 hold a NaN or an infinity at unit 3"):
        prune_(model, 0.5, pattern="neuron")
    assert_untouched(model, before, modes)


def test_quantized_and_meta_models():
    model = mlp(10, 10, 3)
    hb.quantize_(model, include="4")
    with pytest.raises(hb.ModelError, match="4 is a QLinear already"):
        prune_(model, 0.5, pattern="neuron")
    with pytest.raises(hb.DeviceError, match="0.weight is on the meta device"):
        prune_(mlp(10, 3).to("meta"), 0.5, pattern="neuron")
    for nothing in (None, X, nn.Linear):
        with pytest.raises(hb.DTypeError, match=r"takes a model \(an nn.Module\)"):
            prune_(nothing, 0.5, pattern="neuron")


def test_a_swap_that_fails_is_undone():
    transformers = pytest.importorskip("transformers", reason="a config")
    settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20, "num_hidden_layers": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **settings))

    class Stubborn(type(model.config)):
        def __setattr__(self, name, value):
            if name == "intermediate_size" and value != 20:
                raise RuntimeError("it is frozen")
            super().__setattr__(name, value)

    object.__setattr__(model.config, "__class__", Stubborn)
    before, modes = state(model), {m: m.training for m in model.modules()}
    with pytest.raises(RuntimeError, match="it is frozen"):
        prune_(model, 0.5, pattern="neuron")
    assert_untouched(model, before, modes)
    assert model.encoder.layer[0].intermediate.dense.out_features == 20
