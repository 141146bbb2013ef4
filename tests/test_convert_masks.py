"""Layers with masks of torch.nn.utils.prune, ours or torch's, in quantize_, load and the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import halfbyte as hb
from corecall import same
from halfbyte.modules import float_bias, float_weight, obstacle, weight_parameter
from models import TOKENS, Model, quantized, report, tied
from sparse_layers import mask, prune_linear

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


def masked(model, amount=0.5):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune_linear(module, "unstructured", amount)
    return model.eval()


def unmasked(model):
    """The same model without masks."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and prune.is_pruned(module):
            prune.remove(module, "weight")
    return model


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w8a16_g32", "w4a16_g32+nf4"])
def test_the_masked_weight_is_quantized(scheme):
    model = masked(Model(1))
    want = hb.quantize_(unmasked(model), scheme, method="absmax", progress=False)
    zeros = {name: float_weight(m) == 0 for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert hb.quantize_(model, scheme, method="absmax", progress=False) is model
    same(model(TOKENS), want(TOKENS))
    assert quantized(model) == set(zeros) and list(model.state_dict()) == list(want.state_dict())
    for name, zero in zeros.items():
        assert 0.4 < zero.float().mean() < 0.6
        assert (model.get_submodule(name).quantized.dequantize()[zero] == 0).all()


@pytest.mark.parametrize(
    "method",
    [
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0),
        lambda m: (prune.random_unstructured(m, "weight", 0.3), prune.l1_unstructured(m, "weight", 0.3)),
        lambda m: (prune.l1_unstructured(m, "weight", 0.5), prune.l1_unstructured(m, "bias", 0.5)),
        lambda m: prune.l1_unstructured(m, "bias", 0.5),
        lambda m: prune.global_unstructured([(m, "weight")], prune.L1Unstructured, amount=0.4),
    ],
)
def test_masks_that_torch_makes(method):
    linear, x = nn.Linear(24, 12), torch.randn(3, 24)
    method(linear)
    weight, bias = linear.weight.detach() + 0, linear.bias.detach() + 0
    same(float_weight(linear).detach() + 0, weight)
    same(float_bias(linear).detach() + 0, bias)
    layer = hb.QLinear.from_linear(linear)
    same(layer.bias, bias)
    same(layer.weight_codes, hb.quantize(weight).codes)
    found = hb.quantize_(nn.Sequential(linear), progress=False)[0]
    same(found(x), layer(x))
    assert isinstance(linear.weight_orig if prune.is_pruned(linear) and hasattr(linear, "weight_orig")
                      else linear.weight, nn.Parameter), "the layer itself stays as it was"  # fmt: skip


def test_values_that_were_trained_since_the_mask():
    """The attribute `weight` of a masked layer is that of the last call."""
    linear = prune_linear(nn.Linear(24, 12), "2:4")
    with torch.no_grad():
        linear.weight_orig.mul_(3)
        want = linear.weight_orig * linear.weight_mask
    same(hb.QLinear.from_linear(linear).quantized.codes, hb.quantize(want).codes)


def test_what_is_pruned_may_be_anything():
    linear = prune_linear(nn.Linear(24, 12), "2:4")
    with torch.no_grad():
        linear.weight_orig[linear.weight_mask == 0] = torch.nan
    assert hb.QLinear.from_linear(linear)(torch.randn(2, 24)).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_other_hooks_are_still_obstacles():
    linear = prune_linear(nn.Linear(24, 12), "2:4")
    assert obstacle(linear) == "" and weight_parameter(linear) is linear.weight_orig
    linear.register_forward_pre_hook(lambda *_: None)
    assert "hooks" in obstacle(linear)
    linear = prune_linear(nn.Linear(24, 12), "2:4")
    linear.register_buffer("other_mask", torch.ones(1))
    assert obstacle(linear) == "it holds other_mask, which a replacement would lose"
    normed = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    assert "hook (weight_norm?)" in obstacle(normed)


def test_conv1d_and_embeddings():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 16)
    prune.custom_from_mask(conv, "weight", mask((16, 8), "unstructured"))
    weight = conv.weight.detach().t() + 0
    embedding = nn.Embedding(10, 16)
    prune.custom_from_mask(embedding, "weight", mask((10, 16), "unstructured"))
    table = embedding.weight.detach() + 0
    model = hb.quantize_(nn.Sequential(embedding, conv), embeddings="w8a8", progress=False)
    same(model[1].quantized.codes, hb.quantize(weight).codes)
    same(model[0].quantized.codes, hb.quantize(table).codes)


def test_shared_weights_and_masks():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[2].weight = model[0].weight
    keep = mask((16, 16), "2:4")
    for i, own in enumerate((keep, keep.clone(), ~keep)):
        prune.custom_from_mask(model[i], "weight", own)
    weights = [float_weight(layer) for layer in model]
    hb.quantize_(model, progress=False)
    for layer, weight in zip(model, weights, strict=True):
        same(layer.weight_codes, hb.quantize(weight).codes)
    assert model[0].weight_codes is model[1].weight_codes is not model[2].weight_codes
    assert report(model)["1"] == ("quantized", "")
    assert report(model)["2"] == ("quantized", "no longer shares its weight with 0: their masks differ")
    model = tied()
    prune.custom_from_mask(model.head, "weight", mask((10, 16), "2:4"))
    hb.quantize_(model, progress=False)
    assert report(model)["head"] == ("float", "shares its weight with embed, which stays float")


def test_quantize_dynamic_leaves_the_model_alone():
    model = nn.Sequential(prune_linear(nn.Linear(16, 16), "2:4"), nn.ReLU(), nn.Linear(16, 4))
    want = hb.quantize_(unmasked(model), progress=False)
    found = hb.quantize_dynamic(model)
    same(found(torch.ones(2, 16)), want(torch.ones(2, 16)))
    assert prune.is_pruned(model[0]) and isinstance(model[2], nn.Linear)
    with torch.no_grad():
        model(torch.ones(2, 16))


def test_loading_into_a_masked_model(tmp_path):
    model = hb.quantize_(masked(Model(1)), progress=False)
    hb.save(model, tmp_path)
    fresh = hb.load(masked(Model(1)), tmp_path)
    same(fresh(TOKENS), model(TOKENS))
    assert list(fresh.state_dict()) == list(model.state_dict())


def test_fusing_and_summary_of_a_masked_model():
    model = masked(Model(1))
    want = model(TOKENS).detach()
    hb.fuse_(model)
    same(model(TOKENS).detach(), want)
    assert all(layer.scheme == "float" for layer in hb.summary(model).layers)
    hb.quantize_(model, progress=False)
    torch.testing.assert_close(model(TOKENS), want, rtol=0.2, atol=0.2)
