"""calibrate: the ranges that each observer finds, what becomes static, and what an error leaves behind."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same
from halfbyte.calibration import static_range
from halfbyte.reference import linear_w8a8_ref, quantize_rows_ref


def make():
    return hb.quantize_(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))).eval()


def statics(model):
    return [m.static for m in model if isinstance(m, hb.QLinear)]


def test_minmax_is_the_range_of_all_batches():
    model = make()
    batches = [torch.randn(4, 16) * scale for scale in (1, 5, 2)]
    hidden = [model[1](model[0](x)) for x in batches]
    with hb.calibrate(model) as inside:
        assert inside is model
        for x in batches:
            model(x)
    for static, seen in zip(statics(model), (batches, hidden), strict=True):
        want = quantize_rows_ref(torch.cat(seen).reshape(1, -1))
        assert static == (want.scale.item(), want.zero.item())
    y = model[0](batches[1])
    q = model[0]
    same(y, linear_w8a8_ref(batches[1], q.weight_codes, q.weight_scale, q.bias, static=q.static))


def test_static_answers_are_close_to_dynamic_ones():
    model, x = make(), torch.randn(256, 16)
    dynamic = model(x)
    for observer in ("minmax", "percentile", "mse"):
        with hb.calibrate(model, observer):
            model(x)
        assert all(statics(model))
        static = model(x)
        assert not torch.equal(static, dynamic)
        assert nn.functional.cosine_similarity(static.flatten(), dynamic.flatten(), dim=0) > 0.999
    hb.decalibrate_(model)
    same(model(x), dynamic)
    assert statics(model) == [None, None]


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-2.0, -1.0), (0, 0), (-1e-35, 1e-35), (-3e38, 3e38)]
)
def test_static_range_is_that_of_a_row(low, high):
    want = quantize_rows_ref(torch.tensor([[low, high]]))
    assert static_range(low, high) == (want.scale.item(), want.zero.item())


def feed(observer, x, batches=4, **options):
    """(scale, zero) of one layer calibrated on x [m, 16]."""
    layer = hb.QLinear.from_linear(nn.Linear(16, 4))
    with hb.calibrate(layer, observer, **options):
        for part in x.chunk(batches):
            layer(part)
    return layer.static


def test_percentile_holds_the_central_part():
    x = torch.randn(20000, 16)
    x[0, 0], x[1, 1] = 1000, -500
    scale, zero = feed("percentile", x, percentile=99.0)
    low, high = (-128 - zero) * scale, (127 - zero) * scale
    want = np.quantile(x.numpy(), [0.005, 0.995])
    # Bins of the histogram are 2048/8192 wide, since the largest value is near 1000.
    np.testing.assert_allclose([low, high], want, atol=0.25 + scale)
    assert feed("percentile", x, percentile=100)[0] == pytest.approx(1500 / 255)


def test_the_histogram_does_not_depend_on_the_order_of_sizes():
    x = torch.randn(4000, 16) * torch.logspace(-6, 3, 4000)[:, None]
    for observer in ("percentile", "mse"):
        assert feed(observer, x) == pytest.approx(feed(observer, x.flip(0)), rel=0.02)


def squared_error(x, static):
    q = quantize_rows_ref(x.reshape(1, -1), static=static)
    return ((q.codes.double() - static[1]) * static[0] - x.reshape(1, -1)).square().mean().item()


@pytest.mark.parametrize("shape", ["normal", "outliers", "one-sided", "uniform"])
def test_mse_is_no_worse_than_the_others_and_better_with_outliers(shape):
    x = torch.randn(20000, 16)
    if shape == "outliers":
        x = torch.randn(60000, 16)
        x[0, 3] = 30.0
    elif shape == "one-sided":
        x = nn.functional.gelu(x)
    elif shape == "uniform":
        x = torch.rand(20000, 16)
    errors = {name: squared_error(x, feed(name, x)) for name in ("mse", "minmax", "percentile")}
    assert errors["mse"] <= 1.01 * min(errors.values())
    if shape == "outliers":
        assert errors["mse"] < 0.9 * errors["minmax"]


def test_only_zeros():
    for observer in ("minmax", "percentile", "mse"):
        assert feed(observer, torch.zeros(8, 16)) == (1.0, 0)


def test_half_precision_and_empty_batches():
    model = make()
    with hb.calibrate(model):
        model(torch.randn(3, 16).bfloat16())
        model(torch.empty(0, 16))
    assert all(statics(model))


def test_inputs_passed_by_name():
    class ByName(nn.Sequential):
        def forward(self, x):
            return self[0](x=x)

    model, x = hb.quantize_(ByName(nn.Linear(16, 8))), torch.randn(3, 16)
    with hb.calibrate(model):
        model(x)
    want = quantize_rows_ref(x.reshape(1, -1))
    assert statics(model) == [(want.scale.item(), want.zero.item())]


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_ranges_up_to_the_largest_float32(observer):
    x = torch.full((4, 16), 3e38)
    x[:2] = -3e38
    scale, zero = feed(observer, x)
    assert scale == pytest.approx(6e38 / 255, rel=0.1) and zero in (-1, 0)


def test_only_modules_are_calibrated():
    with pytest.raises(hb.DTypeError, match="calibrate takes a model"), hb.calibrate(None):
        pass
    with pytest.raises(hb.DTypeError, match="decalibrate_ takes a model"):
        hb.decalibrate_(torch.zeros(3))


def test_layers_that_did_not_run_are_named_and_kept():
    model = make()
    model[2].static = (0.5, 1)
    with pytest.warns(UserWarning, match="no input reached 2;") as caught, hb.calibrate(model):
        model[0](torch.randn(3, 16))
    assert caught[0].filename == __file__
    assert model[0].static and model[2].static == (0.5, 1)


def test_recalibration_runs_dynamic_inside():
    model, x = make(), torch.randn(5, 16)
    dynamic = model(x)
    with hb.calibrate(model):
        model(x)
    with hb.calibrate(model):
        same(model(x), dynamic)


@pytest.mark.parametrize("why", ["own", "nan"])
def test_an_error_changes_nothing(why):
    model = make()
    model[2].static = (0.5, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    error, says = (KeyError, "own") if why == "own" else (hb.NonFiniteError, "input of 0 holds a NaN")
    with pytest.raises(error, match=says), hb.calibrate(model):
        model(torch.randn(3, 16))
        if why == "own":
            raise KeyError("own")
        model(torch.full((1, 16), torch.nan))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"observer": "max"}, ValueError, "'max' is none of: minmax, percentile, mse"),
        ({"observer": "percentile", "percentile": 0}, ValueError, "percentile is 0"),
        ({"observer": "percentile", "percentile": 100.1}, ValueError, "at most 100"),
    ],
)
def test_bad_arguments(options, error, says):
    with pytest.raises(error, match=says), hb.calibrate(make(), **options):
        pass


def test_a_float_model_cannot_be_calibrated():
    with pytest.raises(hb.ModelError, match="quantize_"), hb.calibrate(nn.Linear(2, 2)):
        pass


def test_clean_calibration_is_silent():
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hb.calibrate(model, "mse"):
            model(torch.randn(3, 16))
