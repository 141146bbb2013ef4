"""sparsify_: which layers become sparse and in which scheme, and why the others stay as they are."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import halfbyte as hb
from corecall import same
from halfbyte.modules import float_weight
from halfbyte.sparse import choose
from models import TOKENS, Model, assert_untouched, quantized, report, snapshot, tied
from sparse_layers import LINEARS, mask, masked_model, prune_linear, schemes, sparse_layers

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


@pytest.fixture
def times(monkeypatch):
    """Says how long the layer as it is takes, then each of its sparse twins; records what was measured."""
    asked = []

    def set_times(*milliseconds):
        def interleaved(calls):
            for call in calls:
                call()
            asked.append(len(calls))
            return [*milliseconds, *[9.0] * len(calls)][: len(calls)]

        monkeypatch.setattr(choose, "interleaved", interleaved)
        return asked

    return set_times


# Which scheme


@pytest.mark.parametrize(
    ("pattern", "scheme"),
    [
        ("unstructured", "f32+unstructured"),
        ("block16x1", "f32+block16x1"),
        ("block16x4", "f32+block16x1"),  # whose blocks are 4 of these
        ("2:4", "f32+2:4"),
        ("1:4", "f32+1:4"),
        ("4:8", "f32+4:8"),
    ],
)
@pytest.mark.parametrize("removed", [False, True])
def test_float_layers(pattern, scheme, removed):
    model = masked_model(pattern)
    if removed:
        for module in model.modules():
            if prune.is_pruned(module) and isinstance(module, nn.Linear):
                prune.remove(module, "weight")
    want = model(TOKENS)
    weights = {name: float_weight(model.get_submodule(name)) for name in LINEARS}
    assert hb.sparsify_(model, "always", progress=False) is model
    found = schemes(model)
    assert set(found) == set(LINEARS)
    if pattern not in ("1:4", "4:8"):  # the few of a random layer may have another pattern too
        assert all(found[name] == scheme for name in LINEARS[:-1]), found
    for name, weight in weights.items():
        same(model.get_submodule(name).dequantize(), weight + 0)
    torch.testing.assert_close(model(TOKENS), want, rtol=1e-5, atol=1e-5)
    assert all(not name.endswith(("_orig", "_mask")) for name in model.state_dict())
    for name in LINEARS:
        action, reason = report(model)[name]
        assert action == "sparse" and reason.startswith(found[name]) and "density" in reason


def test_bfloat16_layers():
    model = masked_model("block16x1", model=Model().bfloat16())
    weight = float_weight(model.blocks[0].up).float()
    up = hb.sparsify_(model, "always", progress=False).blocks[0].up
    assert str(up.scheme) == "bf16+block16x1" and up.float_dtype == torch.bfloat16
    same(up.dequantize(), weight + 0)


def test_only_one_pattern():
    model = hb.sparsify_(masked_model("1:4"), "always", pattern="2:4")
    assert set(schemes(model).values()) == {"f32+2:4"}
    model = hb.sparsify_(masked_model("unstructured", amount=0.5), "always", pattern="2:4")
    assert not schemes(model)
    reason = report(model)["head"][1]
    assert reason == "50% of its weights are 0, and none of 2:4 leaves out 10% of it: prune it first"
    model = hb.sparsify_(hb.quantize_(masked_model("2:4"), progress=False), "always", scheme="f32+2:4")
    assert "its weights are w8a8; allowed is f32+2:4, which takes others" in report(model)["head"][1]
    model = hb.sparsify_(masked_model("block16x4"), "always", pattern="block16x4")
    reason = report(model)["head"][1]
    assert (
        "are floats; allowed is w8a8+block16x4, w4a8_g32+block16x4, " in reason and "needs scheme=" in reason
    )


def test_layers_without_zeros_stay():
    model = hb.sparsify_(masked_model("block16x1", but=["head", "blocks.1.up"]), "always")
    assert set(schemes(model)) == set(LINEARS) - {"head", "blocks.1.up"}
    action, reason = report(model)["blocks.1.up"]
    assert action == "float" and reason.startswith("0% of its weights are 0, and none of block")
    hb.quantize_(model, progress=False)
    assert report(model)["blocks.0.up"] == ("sparse", "was made sparse before")
    assert report(model)["head"][0] == "quantized" and quantized(model) == {"head", "blocks.1.up"}
    hb.sparsify_(model, "always")
    assert report(model)["blocks.0.up"] == ("sparse", "was made sparse before")
    assert report(model)["head"][0] == "quantized"


# Where it pays


def test_faster(times):
    asked = times(1.0, 0.9, 0.5)
    model = hb.sparsify_(masked_model("block16x1", 0.5))
    ops = {layer.scheme.op for layer in sparse_layers(model).values()}
    assert ops == {"spmm_unstructured_f32"}, "the second of two is the fastest"
    assert asked == [3] * len(LINEARS)
    action, reason = report(model)["blocks.0.up"]
    assert action == "sparse"
    assert "(density 50%) takes 0.500 ms, as it was 1.00 ms, with 128 rows" in reason


@pytest.mark.parametrize(("took", "converted"), [(0.94, True), (0.96, False), (1.5, False)])
def test_the_margin(times, took, converted):
    times(1.0, took)
    model = masked_model("2:4")
    before = snapshot(model)
    hb.sparsify_(model, pattern="2:4")
    assert bool(schemes(model)) == converted
    if not converted:
        reason = f"not faster: f32+2:4 (density 50%) takes {took:#.3g} ms, as it is 1.00 ms, with 128 rows"
        assert report(model)["head"] == ("float", reason)
        del model._halfbyte_report
        assert_untouched(model, before)


def test_rows_are_added_up(times, monkeypatch):
    seen = []

    def interleaved(calls):
        shapes = []
        monkeypatch.setattr(choose.functional, "linear", lambda x, *_: shapes.append(tuple(x.shape)))
        for call in calls:
            call()
        seen.append(shapes[0])
        return [1.0, 0.4] if shapes[0][0] == 7 else [1.0, 1.3]

    monkeypatch.setattr(choose, "interleaved", interleaved)
    model = hb.sparsify_(nn.Sequential(prune_linear(nn.Linear(16, 8), "2:4")), pattern="2:4", rows=[7, 1])
    assert seen == [(7, 16), (1, 16)]
    assert "takes 1.70 ms, as it was 2.00 ms, with 1, 7 rows" in report(model)["0"][1]


class Twice(nn.Module):
    """One layer that is called three times, and one that is not."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = (prune_linear(nn.Linear(16, 16), "2:4") for _ in range(2))

    def forward(self, x):
        return self.used(self.used(self.used(x))[:1])


def test_example_inputs_say_the_rows(times):
    times(1.0, 0.5)
    model = hb.sparsify_(Twice(), pattern="2:4", example_inputs=torch.randn(2, 3, 16))
    assert set(schemes(model)) == {"used"}
    # Twice 6 rows; then of the first of two sequences 3.
    assert "takes 1.50 ms, as it was 3.00 ms, with 3, 6 rows" in report(model)["used"][1]
    assert report(model)["unused"][1] == "example_inputs do not reach it: nothing to measure"
    assert model.training and not model.used._forward_pre_hooks


def test_calls_of_any_kind_and_their_errors(times):
    times(1.0, 0.5)
    for inputs in ((torch.ones(2, 16),), [torch.ones(2, 16)], {"x": torch.ones(2, 16)}):
        assert schemes(hb.sparsify_(Twice(), pattern="2:4", example_inputs=inputs))
    model = Twice()
    hb.sparsify_(model, pattern="2:4", example_inputs=lambda: model(torch.ones(9, 16)))
    assert "with 1, 9 rows" in report(model)["used"][1]
    model = Twice()
    with pytest.raises(RuntimeError):
        hb.sparsify_(model, example_inputs=torch.ones(2, 17))
    assert model.training and len(model.used._forward_pre_hooks) == 1 and not schemes(model)


def test_what_is_predicted_to_be_slow_is_not_measured(times):
    asked = times(1.0, 0.5)
    model = hb.sparsify_(hb.quantize_(masked_model(amount=0.15), "w8a8"), include="blocks.0.up")
    reason = report(model)["blocks.0.up"][1]
    assert not asked and re.search(r"is predicted to take 2\.\d\d times as long", reason)


def test_a_real_measurement():
    torch.manual_seed(1)
    model = nn.Sequential(prune_linear(nn.Linear(64, 64), "block16x4"), nn.Linear(64, 8))
    state = torch.get_rng_state()
    hb.sparsify_(model, rows=(4, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert "ms, as it" in report(model)["0"][1] and "with 1, 4 rows" in report(model)["0"][1]


def test_smaller():
    for amount, smaller in ((0.98, True), (0.3, False)):
        layer = prune_linear(nn.Linear(256, 256), "unstructured", amount)
        model = hb.sparsify_(nn.Sequential(layer), "smaller")
        assert bool(schemes(model)) == smaller
        action, reason = report(model)["0"]
        words = "stored and packed, as it was" if smaller else "not smaller: "
        assert words in reason and " 256.0 KiB" in reason and action == ("sparse" if smaller else "float")


@pytest.mark.parametrize("freed", [False, True])
def test_smaller_than_a_pack(freed):
    model = hb.quantize_(nn.Sequential(prune_linear(nn.Linear(256, 256), "2:4")), progress=False)
    if freed:
        hb.pack_(model)
    hb.sparsify_(model, "smaller", pattern="2:4")
    # 2:4 takes 3/4 of the bytes of int8; a layer that pack_ has freed keeps one of two copies.
    assert bool(schemes(model)) != freed
    assert freed == ("not smaller" in report(model)["0"][1])


# Which layers


def test_include_exclude_and_what_cannot_change():
    model = masked_model("2:4", model=Model(2))
    model.blocks[0].up.register_forward_hook(lambda *_: None)
    hb.quantize_(model, {"blocks.1.up": "w8a16", "_default": None})
    hb.sparsify_(model, "always", exclude="head")
    assert set(schemes(model)) == {"blocks.0.down", "blocks.1.down"}
    assert report(model)["head"] == ("float", "excluded")
    assert report(model)["blocks.0.up"] == ("float", "it has hooks, which a replacement would lose")
    reason = "no sparse kernel has the numbers of w8a16, only of w8a8, w4a8_g32, w4a8_g64, w4a8_g128"
    assert report(model)["blocks.1.up"] == ("quantized", reason)
    with pytest.warns(UserWarning, match="no layer has a name that fits 'nothing'"):
        hb.sparsify_(model, "always", include=["nothing", "re:blocks.*"])
    assert report(model)["head"] == ("float", "not included")


def test_hooks_of_quantized_layers_and_subclasses():
    model = hb.quantize_(masked_model("2:4", model=Model(1)), include="head", progress=False)
    model.head.register_forward_pre_hook(lambda *_: None)

    class Mine(nn.Linear):
        pass

    model.mine = Mine(4, 4)
    hb.sparsify_(model, "always")
    assert report(model)["head"][0] == "quantized" and "hooks" in report(model)["head"][1]
    assert report(model)["mine"] == ("float", "Mine is a subclass of nn.Linear")


def test_layers_that_share_a_weight():
    model = nn.Sequential(*(prune_linear(nn.Linear(16, 16), "2:4") for _ in range(2)), nn.Linear(16, 16))
    model[1] = model[0]
    model.append(nn.Linear(16, 16))
    model[3].weight = model[2].weight
    with torch.no_grad():
        model[2].weight.copy_(float_weight(model[0]))
        want = model(torch.ones(2, 16))
    for quantize in (False, True):
        found = copy.deepcopy(model)
        if quantize:
            want = hb.quantize_(found, progress=False)(torch.ones(2, 16))
        hb.sparsify_(found, "always", progress=False)
        assert found[0] is found[1] and found[2].weight_values is found[3].weight_values
        assert found[2]._prepare() is found[3]._prepare() and found[2] is not found[3]
        torch.testing.assert_close(found(torch.ones(2, 16)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_weight_that_an_embedding_has_too(quantize):
    model = tied()
    with torch.no_grad():
        model.embed.weight.mul_(mask((10, 16), "2:4"))
    if quantize:
        hb.quantize_(model, embeddings="w8a8", progress=False)
    table = model.embed.weight_codes if quantize else model.embed.weight
    hb.sparsify_(model, "always", progress=False)
    assert report(model)["head"][1] == "shares its weight with embed" and "head" not in schemes(model)
    hb.sparsify_(model, "always", include="head", progress=False)
    assert set(schemes(model)) == {"head"}
    assert (model.embed.weight_codes if quantize else model.embed.weight) is table
    assert any(row["name"] == "embed" for row in model._halfbyte_report) == quantize


def test_a_layer_alone_and_conv1d():
    layer = hb.sparsify_(prune_linear(nn.Linear(16, 8), "2:4"), "always")
    assert isinstance(layer, hb.SparseLinear) and layer.training and report(layer)[""][0] == "sparse"
    with pytest.raises(hb.ShapeError, match="^the model: x has"):
        layer(torch.ones(2, 3))
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 16)
    keep = mask((8, 16), "2:4")
    prune.custom_from_mask(conv, "weight", keep.t())
    want, x = conv(torch.ones(3, 16)), torch.ones(3, 16)
    found = hb.sparsify_(nn.Sequential(conv), "always")
    assert schemes(found) == {"0": "f32+2:4"}
    torch.testing.assert_close(found(x), want, rtol=1e-5, atol=1e-5)


def test_codes_that_pack_has_freed():
    model = hb.pack_(hb.quantize_(masked_model("2:4"), progress=False))
    want = model(TOKENS)
    hb.sparsify_(model, "always", include="blocks.0.*")
    same(model(TOKENS), want)
    assert set(schemes(model)) == {"blocks.0.up", "blocks.0.down"}
    assert hb.pack_(model) is model
    same(model(TOKENS), want)


def test_attributes_move_on():
    model = masked_model("2:4")
    model.head.note = "mine"
    hb.sparsify_(model, "always")
    assert model.head.note == "mine"
    with pytest.raises(hb.ShapeError, match=r"^blocks\.0\.up: x has"):
        model.blocks[0].up(torch.ones(2, 3))


# Errors


def test_an_error_leaves_the_model_as_it_was():
    model = masked_model("2:4")
    with torch.no_grad():
        model.head.weight_orig[3, :8] = torch.nan
    before = snapshot(model)
    with pytest.raises(hb.NonFiniteError, match=r"head\.weight holds a NaN .* row 3"):
        hb.sparsify_(model, "always", progress=False)
    assert_untouched(model, before)
    model = masked_model("2:4")
    before = snapshot(model)
    for options, error, message in (
        ({"when": "best"}, ValueError, "when is 'best'; it must be one of faster, smaller, always"),
        ({"pattern": "3:4"}, hb.SchemeError, "no scheme has the pattern 3:4"),
        ({"pattern": "5:4"}, hb.SchemeError, "no pattern of zeros is called '5:4'"),
        ({"scheme": "w4a8+2:4"}, hb.SchemeError, "no kernel runs the sparse scheme"),
        ({"scheme": "w8a8"}, hb.SchemeError, "no kernel runs the sparse scheme"),
        ({"scheme": "w8a8+2:4", "pattern": "4:8"}, hb.SchemeError, "no scheme has the pattern 4:8"),
        ({"rows": 0}, ValueError, "rows is 0; it must be a whole number"),
        ({"rows": [4, True]}, ValueError, "rows is"),
        ({"rows": []}, ValueError, "rows is"),
        ({"rows": 2.5}, ValueError, "rows is 2.5"),
    ):
        with pytest.raises(error, match=message):
            hb.sparsify_(model, **{"when": "always"} | options)
        assert_untouched(model, before)


def test_what_is_no_model():
    with pytest.raises(hb.DTypeError, match="sparsify_ takes a model"):
        hb.sparsify_(torch.ones(2))
    with pytest.raises(hb.ModelError, match="ReLU has no linear layer"):
        hb.sparsify_(nn.ReLU())
    with pytest.raises(hb.DeviceError, match="0.weight is on the meta device"):
        hb.sparsify_(nn.Sequential(nn.Linear(4, 4, device="meta")))
