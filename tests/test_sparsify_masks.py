"""sparsify_ and from_linear: masks of torch.nn.utils.prune on shared weights and of wrong shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import halfbyte as hb
from corecall import same
from halfbyte.modules import float_weight
from models import assert_untouched, report, snapshot
from sparse_layers import mask, prune_linear, sparse_layers

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


def shared(*masks):
    """Layers 16 -> 16 with one weight and a mask each, or none."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in masks))
    for layer in model:
        layer.weight = model[0].weight
    for layer, keep in zip(model, masks, strict=True):
        if keep is not None:
            prune.custom_from_mask(layer, "weight", keep)
    return model


def test_equal_masks_on_a_shared_weight():
    keep = mask((16, 16), "2:4")
    model = shared(keep, keep.clone(), keep.float(), ~keep)
    weights = [float_weight(layer) for layer in model]
    assert len({id(layer.weight_mask) for layer in model}) == 4
    hb.sparsify_(model, "always", progress=False)
    assert model[0].weight_values is model[1].weight_values is model[2].weight_values
    assert model[3].weight_values is not model[0].weight_values
    assert model[0]._prepare() is model[1]._prepare() is not model[3]._prepare()
    for layer, weight in zip(model, weights, strict=True):
        same(layer.dequantize(), weight)


def test_a_shared_weight_with_and_without_a_mask():
    model = shared(None, mask((16, 16), "2:4"), None)
    hb.sparsify_(model, "always", include=["0", "1", "2"], progress=False)
    assert set(sparse_layers(model)) == {"1"} and model[0].weight is model[2].weight


@pytest.mark.parametrize("shape", [(8,), (6, 1), (1, 8), (3, 5)], ids=str)
@pytest.mark.parametrize("function", [lambda m: hb.sparsify_(m, "always", progress=False), hb.quantize_])
def test_a_mask_of_another_shape(shape, function):
    model = nn.Sequential(nn.ReLU(), prune_linear(nn.Linear(8, 6), "2:4"))
    model[1].weight_mask = torch.ones(shape)
    before = snapshot(model)
    message = rf"^1\.weight_mask is \[{', '.join(map(str, shape))}\], the weight \[6, 8\]"
    with pytest.raises(hb.ShapeError, match=message):
        function(model)
    assert_untouched(model, before)
    for make in (lambda: hb.QLinear.from_linear(model[1], name="1"),
                 lambda: hb.SparseLinear.from_linear(model[1], "f32+2:4", name="1")):  # fmt: skip
        with pytest.raises(hb.ShapeError, match=message):
            make()


def test_a_mask_of_another_shape_on_a_bias():
    model = nn.Sequential(prune_linear(nn.Linear(8, 6), "2:4"))
    prune.l1_unstructured(model[0], "bias", 0.5)
    model[0].bias_mask = torch.ones(1)
    for function in (lambda m: hb.sparsify_(m, "always", progress=False), hb.quantize_):
        with pytest.raises(hb.ShapeError, match=r"^0\.bias_mask is \[1\], the bias \[6\]"):
            function(model)


@pytest.mark.parametrize("features", [(8, 16), (16, 16)], ids=str)
def test_from_linear_of_a_conv1d(features):
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(*features)
    prune.custom_from_mask(conv, "weight", mask(features, "2:4").t())
    weight, x = float_weight(conv).t(), torch.randn(3, features[1])
    layer = hb.SparseLinear.from_linear(conv, "f32+2:4")
    same(layer.dequantize(), weight)
    torch.testing.assert_close(layer(x), conv(x).detach(), rtol=1e-5, atol=1e-5)
    same(hb.QLinear.from_linear(conv).weight_codes, hb.quantize(weight).codes)


@pytest.mark.parametrize("other", [nn.Embedding(4, 4), nn.Bilinear(2, 2, 2), nn.ReLU(), torch.ones(2, 2)])
def test_from_linear_of_something_else(other):
    for make in (hb.QLinear.from_linear, lambda m: hb.SparseLinear.from_linear(m, "f32+2:4")):
        with pytest.raises(hb.DTypeError, match=rf"from_linear takes .*, not {type(other).__name__}"):
            make(other)


@pytest.mark.parametrize("when", ["always", "smaller"])
def test_float64_layers_stay(when):
    model = nn.Sequential(*(prune_linear(nn.Linear(16, 16), "1:4") for _ in range(2)))
    model[0].double()
    hb.sparsify_(model, when, progress=False)
    assert isinstance(model[0], nn.Linear)
    assert report(model)["0"][0] == "float" and "its weight is torch.float64" in report(model)["0"][1]


def test_loading_where_only_one_has_masks(tmp_path):
    def fresh():
        return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

    model = fresh()
    prune_linear(model[0], "2:4")
    hb.quantize_(model, exclude="0", progress=False)
    hb.save(model, tmp_path / "masked")
    x = torch.ones(2, 16)
    want = model(x).detach()
    message = r"call halfbyte.prune_\(model, 0.0, include=\['0'\]\) before, or remove_masks_ before saving"
    with pytest.raises(hb.FormatError, match=message):
        hb.load(fresh(), tmp_path / "masked")
    masked = hb.prune_(fresh(), 0.0, include=["0"], progress=False)
    same(hb.load(masked, tmp_path / "masked")(x).detach(), want)
    hb.save(hb.remove_masks_(model), tmp_path / "plain")
    same(hb.load(fresh(), tmp_path / "plain")(x).detach(), want)
    masked = hb.prune_(fresh(), 0.0, include=["0"], progress=False)
    with pytest.raises(hb.FormatError, match=r"call halfbyte.remove_masks_\(model\) before$"):
        hb.load(masked, tmp_path / "plain")
    same(hb.load(hb.remove_masks_(masked), tmp_path / "plain")(x).detach(), want)
