"""Fused torch.nn.TransformerEncoder and TransformerEncoderLayer against their own forward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import halfbyte as hb
from fusing import check_close, cosine, error, fused_calls, left_alone, roused

WIDTH, HEADS, BATCH, TOKENS = 40, 4, 3, 6
CAUSAL = nn.Transformer.generate_square_subsequent_mask(TOKENS)
PADDING = torch.arange(TOKENS) >= torch.tensor([[6], [4], [1]])  # True: not there


def make(layers=2, norm=None, scheme=None, seed=0, width=WIDTH, heads=HEADS, **options):
    settings = {"dim_feedforward": 56, "batch_first": True, "dropout": 0.1} | options
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(width, heads, **settings)
    model = nn.TransformerEncoder(layer, layers, norm=norm, enable_nested_tensor=False)
    roused(model, seed)
    return model if scheme is None else hb.quantize_(model, scheme, progress=False)


def inputs(batch_first=True, batch=BATCH, tokens=TOKENS, width=WIDTH):
    return torch.randn((batch, tokens, width) if batch_first else (tokens, batch, width))


@torch.no_grad()
def check_call(model, *args, scheme=None, padding=None, swapped=False, **kwargs):
    want = model(*args, **kwargs)
    hb.fuse_(model)
    with fused_calls(model):
        found = model(*args, **kwargs)
    hb.unfuse_(model)
    assert found.is_contiguous()
    if padding is not None:
        there = ~(padding.t() if swapped else padding)
        found, want = found[there], want[there]
    check_close(found, want, scheme)


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "function": torch.relu,
}


@pytest.fixture(autouse=True)
def as_documented():
    """torch's own fast path takes nn.GELU("tanh") for nn.GELU(), and every number in a mask for a True."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encoders(norm_first, batch_first, activation):
    for bias in (True, False):
        options = {
            "norm_first": norm_first,
            "batch_first": batch_first,
            "activation": ACTIVATIONS[activation],
            "bias": bias,
        }
        check_call(make(**options), inputs(batch_first))
        check_call(make(1, **options).layers[0], inputs(batch_first))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False, eps=0.1), nn.RMSNorm(WIDTH)]
)
def test_a_norm_behind_the_last_layer(norm_first, norm):
    check_call(make(norm=norm, norm_first=norm_first), inputs())


MASKS = {
    "causal": {"mask": CAUSAL},
    "causal bool": {"mask": CAUSAL < 0},
    "causal hint": {"mask": CAUSAL, "is_causal": True},
    "no hint": {"mask": CAUSAL, "is_causal": False},
    "added": {"mask": torch.randn(TOKENS, TOKENS)},
    "per head": {"mask": torch.randn(BATCH * HEADS, TOKENS, TOKENS)},
    "per head bool": {"mask": torch.eye(TOKENS).expand(BATCH * HEADS, -1, -1) * torch.rand(12, 1, 1) > 0.5},
    "padding": {"src_key_padding_mask": PADDING},
    "padding added": {"src_key_padding_mask": torch.zeros(BATCH, TOKENS).masked_fill(PADDING, -torch.inf)},
    "no padding": {"src_key_padding_mask": torch.zeros(BATCH, TOKENS, dtype=torch.bool)},
    "both bool": {"mask": CAUSAL < 0, "src_key_padding_mask": PADDING},
    "both": {"mask": torch.randn(TOKENS, TOKENS), "src_key_padding_mask": PADDING.float() * -3},
    "mixed": {"mask": CAUSAL, "src_key_padding_mask": PADDING},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks(name, batch_first):
    arguments, x = MASKS[name], inputs(batch_first)
    padding = arguments.get("src_key_padding_mask")
    padding = padding if padding is None or padding.dtype is torch.bool else padding == -torch.inf
    options = {"padding": padding, "swapped": not batch_first}
    check_call(make(batch_first=batch_first), x, **arguments, **options)
    renamed = {
        name.replace("mask", "src_mask") if name == "mask" else name: m for name, m in arguments.items()
    }
    check_call(make(1, batch_first=batch_first).layers[0], x, **renamed, **options)


@pytest.mark.parametrize("name", ["causal", "padding", "added"])
@torch.no_grad()
def test_masks_matter(name):
    model, x = hb.fuse_(make()), inputs()
    assert error(model(x, **MASKS[name])[1, :3], model(x)[1, :3]) > 1e-3


def test_one_sequence_without_a_batch():
    x = torch.randn(TOKENS, WIDTH)
    for batch_first in (True, False):
        check_call(make(batch_first=batch_first), x)
        check_call(make(batch_first=batch_first), x, mask=CAUSAL)
        check_call(make(batch_first=batch_first), x, src_key_padding_mask=PADDING[1], padding=PADDING[1])
        check_call(make(batch_first=batch_first), x, mask=torch.randn(HEADS, TOKENS, TOKENS))


def test_inputs_that_are_not_contiguous():
    x = torch.randn(TOKENS, BATCH, 2 * WIDTH)[..., ::2].transpose(0, 1)
    kept = x.clone()
    check_call(make(), x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w4a16_g32+asym"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_quantized(scheme, norm_first):
    model = make(scheme=scheme, norm_first=norm_first, activation="gelu")
    assert isinstance(model.layers[0].linear1, hb.QLinear)
    assert type(model.layers[0].self_attn.out_proj) is not hb.QLinear  # a subclass of nn.Linear
    check_call(model, inputs(), scheme=scheme)
    check_call(model, inputs(), scheme=scheme, src_key_padding_mask=PADDING, padding=PADDING)


def test_all_of_it_quantized():
    model = make()
    for layer in model.layers:
        layer.self_attn.out_proj = hb.QLinear.from_linear(layer.self_attn.out_proj, "w8a8")
    hb.quantize_(model, "w8a8", progress=False)
    hb.fuse_(model)
    with torch.no_grad(), fused_calls(model):
        y = model(inputs())
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sixteen_bits(dtype):
    model, x = make(activation="gelu"), inputs()
    truth = model(x)
    model, x = model.to(dtype), x.to(dtype)
    want = model(x)
    hb.fuse_(model)
    with fused_calls(model):
        y = model(x)
    assert y.dtype is dtype and cosine(y, want) > 0.999 and cosine(y.float(), truth) > 0.999


@torch.no_grad()
def test_calls_that_are_not_known():
    model, x = make(), inputs()
    model.to(torch.float32)
    asked = {
        "is_causal without a mask": ((x,), {"is_causal": True}),
        "a mask of the shape": ((x, CAUSAL[:4]), {}),
        "src_key_padding_mask": ((x,), {"src_key_padding_mask": PADDING[:2]}),
        "neither bool nor": ((x, (CAUSAL < 0).int()), {}),
        "float64": ((x.double(),), {}),
        "does not have the shape": ((x[..., :7],), {}),
        "its arguments do not fit": ((x,), {"src_mask": CAUSAL}),
        "not [batch, tokens, features]": ((x[None],), {}),
    }
    for reason, (args, kwargs) in asked.items():
        hb.unfuse_(model)
        try:
            want = model(*args, **kwargs)
        except Exception as failure:
            want = failure
        hb.fuse_(model)
        with left_alone(model, reason):
            if isinstance(want, Exception):
                with pytest.raises(type(want)):
                    model(*args, **kwargs)
            else:
                assert torch.equal(model(*args, **kwargs), want)


class OwnLayer(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return super()._ff_block(x) * 2


class OwnEncoder(nn.TransformerEncoder):
    def forward(self, src):
        return super().forward(src) + 1


def reasons(model):
    return {row.name: row.reason for row in hb.fusion_report(hb.fuse_(model)).rows}


def test_variants_that_are_left_alone():
    model = make()
    model.layers[1].norm_first = True
    found = reasons(model)
    assert "differ" in found[""] and not found["layers.0"] and not found["layers.1"]
    with torch.no_grad(), fused_calls(model.layers[0]), fused_calls(model.layers[1]):
        model(inputs())
    assert "OwnLayer is not torch's" in reasons(OwnLayer(WIDTH, HEADS))[""]
    assert "OwnLayer is not torch's" in reasons(nn.TransformerEncoder(OwnLayer(WIDTH, HEADS), 1))[""]
    assert "forward of its own" in reasons(OwnEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS), 1))[""]
    assert "no activation Tanh" in reasons(make(activation=nn.Tanh()))[""]
    for options in ({"kdim": 8, "vdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        layer = make(1).layers[0]
        layer.self_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        assert "bias_k or add_zero_attn" in reasons(layer)[""]
    layer = make(1).layers[0]
    layer.dropout = nn.AlphaDropout()
    assert "AlphaDropout" in reasons(layer)[""]
    both = reasons(nn.Transformer(WIDTH, HEADS, 1, 1, 8).eval())
    assert both == {"encoder": "", "decoder": "a decoder that attends to another sequence"}


@torch.no_grad()
def test_in_a_whole_transformer():
    model = roused(nn.Transformer(WIDTH, HEADS, 2, 1, 56))
    x, y = inputs(False), inputs(False)
    want = model(x, y)
    hb.fuse_(model)
    with fused_calls(model.encoder):
        check_close(model(x, y), want)


@given(
    heads=st.integers(1, 4),
    size=st.sampled_from([2, 5, 8, 16, 32, 40]),
    layers=st.integers(1, 3),
    inner=st.integers(1, 70),
    batch=st.integers(1, 4),
    count=st.integers(1, 40),
    norm_first=st.booleans(),
    scheme=st.sampled_from([None, None, "w8a8", "w4a8_g32"]),
    causal=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_random_shapes(heads, size, layers, inner, batch, count, norm_first, scheme, causal):
    width = heads * size
    assume(width > 2)  # a norm of two features multiplies rounding errors: torch is 2e-4 from float64
    scheme = scheme if width > 16 else None
    model = make(layers, None, scheme, width=width, heads=heads, dim_feedforward=inner, norm_first=norm_first)
    mask = nn.Transformer.generate_square_subsequent_mask(count) if causal else None
    check_call(model, inputs(True, batch, count, width), mask=mask, scheme=scheme and f"rough {scheme}")
