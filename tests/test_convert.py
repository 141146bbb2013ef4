"""quantize_: which layers, ties, reports, and models of torch and transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same
from halfbyte.reference import linear_ref
from models import TOKENS, Model, assert_untouched, quantized, report, snapshot, tied


def test_all_linear_layers():
    model = Model().eval()
    twin = copy.deepcopy(model)
    assert hb.quantize_(model) is model
    assert quantized(model) == {"head"} | {f"blocks.{i}.{n}" for i in range(3) for n in ("up", "down")}
    for name in quantized(model):
        new, old = model.get_submodule(name), twin.get_submodule(name)
        q = hb.quantize(old.weight)
        assert torch.equal(new.weight_codes, q.codes) and torch.equal(new.weight_scale, q.scale)
        assert (new.bias is None) == (old.bias is None) and not new.training
        x = torch.randn(2, new.in_features)
        same(new(x), linear_ref(x, q, old.bias))
    y, exact = model(TOKENS), twin(TOKENS)
    assert nn.functional.cosine_similarity(y.flatten(), exact.flatten(), dim=0) > 0.999
    rows = {row["name"]: row for row in model._halfbyte_report}
    assert rows["blocks.0.up"] == {
        "name": "blocks.0.up",
        "shape": (32, 16),
        "action": "quantized",
        "reason": "",
    }


MIXED = {"*.up": "w4a8_g128", "*.0.down": "w4a16_g32+asym", "head": None, "_default": "w8a8"}


@pytest.mark.parametrize("method", [None, "mse"])
def test_a_scheme_for_each_layer(method):
    model = Model().eval()
    twin = copy.deepcopy(model)
    hb.quantize_(model, MIXED, method=method)
    schemes = {name: str(model.get_submodule(name).scheme) for name in quantized(model)}
    assert schemes == {
        **{f"blocks.{i}.up": "w4a8_g128" for i in range(3)},
        "blocks.0.down": "w4a16_g32+asym",
        **{f"blocks.{i}.down": "w8a8" for i in (1, 2)},
    }
    for name, scheme in schemes.items():
        layer, old = model.get_submodule(name), twin.get_submodule(name)
        q, x = hb.quantize(old.weight, scheme, method=method), torch.randn(2, old.in_features)
        same(layer.weight_codes, q.codes)
        same(layer(x), linear_ref(x, q, old.bias))
    y, exact = model(TOKENS), twin(TOKENS)
    assert nn.functional.cosine_similarity(y.flatten(), exact.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("method", "scheme", "parts"),
    [
        ("absmax", "w4a8_g32", {"weight_group_scale"}),
        ("mse", "w4a16_g32+asym", {"weight_group_scale", "weight_zero"}),
        ("hqq", "w4a16_g32+asym", {"weight_group_scale", "weight_minimum"}),
        ("mse", "w4a8", set()),
    ],
)
def test_method_says_how_codes_are_found(method, scheme, parts):
    model = Model(1).eval()
    weight = model.head.weight.detach().clone()
    hb.quantize_(model, scheme, method=method)
    q = hb.quantize(weight, scheme, method=method)
    assert {name for name in model.head.state_dict()} == {"weight_codes", "weight_scale", "bias"} | parts
    same(model.head.quantized.dequantize(), q.dequantize())


@pytest.mark.parametrize(
    ("scheme", "method", "says"),
    [
        ("w8a8", "hqq", "w8a8 has no place for"),
        ("w4a8_g32", "hqq", "w4a8_g32 has no place for"),
        ("w4a8_g32", "gptq", "no method is called 'gptq'"),
    ],
)
def test_a_method_that_does_not_fit_changes_nothing(scheme, method, says):
    model = Model(1)
    before = snapshot(model)
    with pytest.raises(hb.SchemeError, match=says):
        hb.quantize_(model, scheme, method=method)
    assert_untouched(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = hb.quantize_(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype))
    assert model(torch.randn(3, 16, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("scheme", "options", "expected"),
    [
        ("w8a8", {"include": "head"}, {"head"}),
        ("w8a8", {"include": ["*.up", "head"]}, {"blocks.0.up", "blocks.1.up", "head"}),
        ("w8a8", {"exclude": ["*.up", "re:bl.*down"]}, {"head"}),
        ("w8a8", {"include": "blocks.*", "exclude": "*.1.*"}, {"blocks.0.up", "blocks.0.down"}),
        ("w8a8", {"include": r"re:blocks\.[1-9]\..*"}, {"blocks.1.up", "blocks.1.down"}),
        (hb.Scheme(8, 8), {"include": "head"}, {"head"}),
        ({"head": "w8a8"}, {}, {"head"}),
        ({"*.up": None, "_default": "w8a8"}, {}, {"blocks.0.down", "blocks.1.down", "head"}),
        (
            {"*.0.up": "w8a8", "*.up": None, "*.down": hb.Scheme(8, 8)},
            {},
            {"blocks.0.up", "blocks.0.down", "blocks.1.down"},
        ),
        ({"*.up": "w8a8", "_default": None}, {"exclude": "*.0.*"}, {"blocks.1.up"}),
    ],
)
def test_choosing_layers(scheme, options, expected):
    model = hb.quantize_(Model(blocks=2), scheme, **options)
    assert quantized(model) == expected
    assert {name for name, (action, _) in report(model).items() if action == "quantized"} == expected
    assert all(reason for action, reason in report(model).values() if action == "float")


def test_a_pattern_that_fits_nothing_is_warned_of():
    with pytest.warns(UserWarning, match=r"fits '\*\.mpl\.\*', 're:x'"):
        hb.quantize_(Model(1), {"*.mpl.*": None, "_default": "w8a8"}, exclude="re:x")


def test_the_model_itself_is_a_linear():
    linear = nn.Linear(6, 4)
    layer = hb.quantize_(linear)
    assert isinstance(layer, hb.QLinear) and isinstance(linear, nn.Linear)
    assert report(layer) == {"": ("quantized", "")}


class Special(nn.Linear):
    pass


def test_what_stays_float_is_told_why():
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "special": Special(4, 4), "normed": nn.Linear(4, 4),
                           "hooked": nn.Linear(4, 4), "patched": nn.Linear(4, 4), "out": nn.Linear(4, 4),
                           "parametrized": nn.Linear(4, 4)})  # fmt: skip
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model["normed"])
    nn.utils.parametrizations.orthogonal(model["parametrized"])
    model["hooked"].register_forward_hook(lambda *_: None)
    model["patched"].forward = lambda x: x
    hb.quantize_(model, exclude="out")
    assert quantized(model) == {"plain"}
    reasons = {name: reason for name, (_, reason) in report(model).items()}
    for name, says in {
        "special": "subclass",
        "normed": "weight_norm",
        "hooked": "hooks",
        "patched": "forward was replaced",
        "out": "excluded",
        "parametrized": "ParametrizedLinear",
    }.items():
        assert says in reasons[name]


def test_a_second_call_adds_layers():
    model = hb.quantize_(Model(1), include="head")
    head = model.head
    hb.quantize_(model)
    assert model.head is head and quantized(model) == {"head", "blocks.0.up", "blocks.0.down"}
    assert report(model)["head"] == ("quantized", "was quantized before")


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 3)), {}, "no nn.Linear"),
        (Model(1), {"exclude": "*"}, "head: excluded"),
        (Special(3, 3), {}, "the model itself: Special is a subclass"),
    ],
)
def test_nothing_to_quantize(model, options, says):
    before = snapshot(model)
    with pytest.raises(hb.ModelError, match=says):
        hb.quantize_(model, **options)
    assert_untouched(model, before)


def test_a_shared_module_is_replaced_everywhere():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    hb.quantize_(model)
    assert isinstance(model[0], hb.QLinear) and model[2] is model[0]


def test_tied_linears_share_their_codes():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    hb.quantize_(model)
    assert model[0].weight_codes is model[2].weight_codes and model[0].weight_scale is model[2].weight_scale
    assert model[0].weight_codes is not model[3].weight_codes
    x = torch.randn(2, 4)
    for layer in (model[0], model[2]):
        same(layer(x), linear_ref(x, layer.quantized, layer.bias))
    assert model[0]._prepare() is model[2]._prepare()


def test_a_weight_tied_to_an_embedding_stays_float():
    model = hb.quantize_(tied())
    assert type(model.head) is nn.Linear and model.head.weight is model.embed.weight
    assert report(model)["head"] == ("float", "shares its weight with embed, which stays float")


@pytest.mark.parametrize("options", [{"include": ["head"]}, {"scheme": {"head": "w8a8"}}])
def test_unless_it_is_asked_for(options):
    model = tied()
    weight = model.embed.weight.detach().clone()
    hb.quantize_(model, **options)
    assert isinstance(model.head, hb.QLinear)
    assert report(model)["head"] == ("quantized", "no longer shares its weight with embed")
    same(model.embed.weight.detach(), weight)


def test_tied_to_an_excluded_linear():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    hb.quantize_(model, exclude="0")
    assert quantized(model) == {"2"} and "shares its weight with 0" in report(model)["1"][1]


def test_conv1d_of_transformers():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(24, 16), nn.GELU(), conv1d(8, 24))
    nn.init.normal_(model[0].bias)
    twin = copy.deepcopy(model)
    hb.quantize_(model)
    assert quantized(model) == {"0", "2"} and (model[0].in_features, model[0].out_features) == (16, 24)
    q, x = hb.quantize(twin[0].weight.t()), torch.randn(5, 16)
    assert model._halfbyte_report[0]["shape"] == (24, 16)
    same(model[0](x), linear_ref(x, q, twin[0].bias))
    assert (model(x) - twin(x)).abs().max() < 0.02


def test_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        exact = model(ids).logits
        hb.quantize_(model)
        y = model(ids).logits
    assert len(quantized(model)) == 8 and type(model.lm_head) is nn.Linear
    assert "shares its weight with transformer.wte" in report(model)["lm_head"][1]
    assert nn.functional.cosine_similarity(y.flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_transformer_encoder_of_torch(mode):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x = torch.randn(2, 7, 32)
    with mode():
        exact = encoder(x)
        hb.quantize_(encoder)
        ran = []
        encoder.layers[1].linear2.register_forward_hook(lambda *_: ran.append(1))
        y = encoder(x)
    assert quantized(encoder) == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert nn.functional.cosine_similarity(y.flatten(), exact.flatten(), dim=0) > 0.999 and ran
