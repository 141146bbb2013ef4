"""QLinear and linear with every kind of weight: what test_linear.py asks of w8a8, where group scales, zero
points, minima and 16-bit activations make a difference.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same
from halfbyte import packed_layer, qlinear
from halfbyte.reference import linear_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
K = 75  # odd, and no multiple of a group
SCHEMES = [
    ("w8a8+asym", None),
    ("w8a8_g32+ag32", None),
    ("w4a8", None),
    ("w4a8_g64", "mse"),
    ("w4a8_g32+asym", "hqq"),
    ("w8a16", None),
    ("w4a16_g32+asym", "absmax"),
    ("w4a16_g32+asym", "hqq"),
    ("w4a16_g64+nf4", None),
]
schemes = pytest.mark.parametrize(("scheme", "method"), SCHEMES)
asymmetric = pytest.mark.parametrize(("scheme", "method"), [s for s in SCHEMES if "_g32+asym" in s[0]])


def make(scheme, method=None, n=33, k=K, **kwargs):
    return hb.QLinear.from_linear(nn.Linear(k, n, **kwargs), scheme, method=method).eval()


def want(layer, x):
    flat = x.reshape(-1, x.shape[-1])
    y = linear_ref(flat, layer.quantized, layer.bias, activation=layer.activation, static=layer.static)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def twice(layer, x):
    """The answers of the checked way, which packs, and of the short way after it."""
    first = layer(x)
    assert layer._plan is not None
    second = layer(x)
    same(first, second)
    return second


@pytest.mark.parametrize("dtype", DTYPES)
@schemes
def test_forward(scheme, method, dtype):
    layer = make(scheme, method)
    for shape in ((K,), (0, K), (5, K), (2, 3, K)):
        x = torch.randn(shape).to(dtype)
        y = twice(layer, x)
        assert y.dtype == dtype and y.shape == (*shape[:-1], 33)
        same(y, want(layer, x))


@schemes
def test_the_short_way_is_taken(scheme, method, monkeypatch):
    layer, x = make(scheme, method), torch.randn(3, K)
    layer(x)
    monkeypatch.setattr(packed_layer, "run_linear", None)
    monkeypatch.setattr(qlinear, "linear", None)
    for other in (x, torch.randn(K), torch.randn(2, 3, K).bfloat16()):
        same(layer(other), want(layer, other))


@schemes
def test_numpy_gives_the_same_bits(scheme, method):
    w, x, bias = (np.random.randn(*s).astype(np.float32) for s in ((33, K), (2, 7, K), (33,)))
    q = hb.quantize(w, scheme, method=method)
    twin = hb.quantize(torch.from_numpy(w), scheme, method=method)
    same(torch.from_numpy(q.codes), twin.codes, "codes")
    same(torch.from_numpy(q.dequantize()), twin.dequantize(), "weight")
    y = torch.from_numpy(hb.linear(x[::-1], hb.pack(q), bias, activation="relu"))
    x, bias = torch.from_numpy(x[::-1].copy()), torch.from_numpy(bias)
    same(y, hb.linear(x, hb.pack(twin), bias, activation="relu"))
    same(y.reshape(14, 33), linear_ref(x.reshape(14, K), twin, bias, activation="relu"))


@schemes
def test_close_to_the_float_layer(scheme, method):
    linear, x = nn.Linear(512, 64), torch.randn(20, 512)
    y, exact = hb.QLinear.from_linear(linear, scheme, method=method)(x), linear(x)
    limit = 0.13 if scheme == "w4a8" else 0.11 if scheme.startswith("w4") else 0.012
    assert (y - exact).norm() < limit * exact.norm()


@schemes
def test_static_is_of_tokens(scheme, method):
    layer, x = make(scheme, method), torch.randn(4, K)
    if layer.scheme.per_token:
        y = twice(layer, x)
        layer.static = (0.03, -7)
        assert not torch.equal(twice(layer, x), y)
        same(layer(x), want(layer, x))
        assert ", static=(" in repr(layer)
        return
    with pytest.raises(ValueError, match=f"{layer.scheme}".replace("+", r"\+")):
        layer.static = (0.03, -7)
    with pytest.raises(ValueError, match="activations have scales per group"):
        hb.linear(x, hb.pack(layer.quantized), static=(0.03, -7))
    assert layer.static is None and "static" not in repr(layer)


@schemes
def test_there_is_no_int32_output(scheme, method):
    layer = make(scheme, method)
    with pytest.raises(ValueError, match="int32 output is the one integer sum"):
        hb.linear(torch.randn(4, K), hb.pack(layer.quantized), out_dtype=torch.int32)


@schemes
def test_rows_with_nan_or_infinity_become_nan_and_no_others(scheme, method):
    layer, x = make(scheme, method), torch.randn(5, K)
    clean = layer(x)
    x[1, 74], x[3, 0] = torch.nan, -torch.inf
    y = layer(x)
    assert y[[1, 3]].isnan().all() and torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])


def less(t):
    """Other numbers that fit in the same place."""
    return t // 2 if t.dtype in (torch.int8, torch.uint8) else t / 2


CHANGES = {
    "in place": lambda m, name: getattr(m, name).copy_(less(getattr(m, name))),
    "replaced": lambda m, name: setattr(m, name, less(getattr(m, name))),
    "replaced behind its back": lambda m, name: m._buffers.update({name: less(getattr(m, name))}),
    "given other memory": lambda m, name: setattr(getattr(m, name), "data", less(getattr(m, name).data)),
}


@pytest.mark.parametrize("change", CHANGES)
@asymmetric
def test_changed_buffers_are_noticed(scheme, method, change):
    x = torch.randn(4, K)
    for name in ("weight_codes", "weight_scale", "weight_group_scale", "weight_zero", "weight_minimum"):
        layer = make(scheme, method)
        if getattr(layer, name) is None:
            continue
        before = twice(layer, x)
        CHANGES[change](layer, name)
        y = twice(layer, x)
        assert not torch.equal(y, before), name
        same(y, want(layer, x), name)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
@schemes
def test_casts_leave_the_numbers_alone(scheme, method, cast):
    layer = make(scheme, method)
    before, x = {k: v.clone() for k, v in layer.state_dict().items()}, torch.randn(4, K)
    y = twice(layer, x)
    cast(layer)
    for name, value in layer.state_dict().items():
        same(value, before[name])
    same(twice(layer, x), y)


@schemes
def test_copies_and_state_dicts(scheme, method):
    layer, x = make(scheme, method), torch.randn(4, K)
    y = twice(layer, x)
    q = layer.quantized
    parts = ("codes", "scale", "group_scale", "zero", "minimum")
    names = [f"weight_{part}" for part in parts if getattr(q, part) is not None] + ["bias"]
    assert list(layer.state_dict()) == names
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), make(scheme, method)):
        twin.load_state_dict(layer.state_dict())
        same(twice(twin, x), y)
    with torch.inference_mode():
        same(twice(layer, x.clone()), y)


def test_load_state_dict_follows_what_the_scheme_leaves_open():
    zeros, minima = make("w4a16_g32+asym", "absmax"), make("w4a16_g32+asym", "hqq")
    x = torch.randn(4, K)
    answers, states = (
        (twice(zeros, x), twice(minima, x)),
        [copy.deepcopy(m.state_dict()) for m in (zeros, minima)],
    )
    wide = {name: v.float() if v.dtype == torch.float16 else v for name, v in states[1].items()}
    zeros.load_state_dict(wide)
    assert zeros.weight_zero is None and zeros.weight_minimum.dtype == torch.float32
    same(twice(zeros, x), answers[1])
    minima.load_state_dict(states[0])
    assert minima.weight_minimum is None and minima.weight_group_scale.dtype == torch.float16
    same(twice(minima, x), answers[0])


@schemes
def test_gradient_of_x_is_that_of_the_dequantized_layer(scheme, method):
    layer = make(scheme, method)
    x = torch.randn(2, 3, K, requires_grad=True)
    y = layer(x)
    same(y.detach(), want(layer, x.detach()))
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(got, grad @ layer.quantized.dequantize())


@schemes
def test_weight_and_meta(scheme, method):
    layer, x = make(scheme, method, dtype=torch.bfloat16), torch.randn(4, K)
    exact = hb.dequantize(layer.quantized)
    same(layer.weight.dequantize(), exact)
    same(
        nn.functional.linear(x.bfloat16(), layer.weight), nn.functional.linear(x.bfloat16(), exact.bfloat16())
    )
    layer.to("meta")
    assert layer(torch.empty(5, K, device="meta")).shape == (5, 33)
    with pytest.raises(hb.DeviceError, match="meta"):
        layer(torch.randn(5, K))


@pytest.mark.parametrize("scheme", ["w4a8_g32", "w4a16"])
def test_an_odd_number_of_features_is_not_the_even_one(scheme):
    layer = make(scheme)
    for _ in range(2):  # before and after packing
        for k in (K - 1, K + 1):
            with pytest.raises(hb.ShapeError, match=rf"\(5, {k}\).* {K}"):
                layer(torch.randn(5, k))
            with pytest.raises(hb.ShapeError, match=rf"\(5, {k}\).* {K}"):
                layer(torch.randn(5, k, requires_grad=True))
        layer(torch.randn(1, K))


@schemes
def test_layers_of_nothing(scheme, method):
    q = hb.quantize(torch.randn(4, 64), scheme, method=method)
    for n, k in ((0, 64), (4, 0), (0, 0)):
        groups = q.scheme.groups(k)
        parts = {
            what: None if (part := getattr(q, what)) is None else part[:n, :groups]
            for what in ("group_scale", "zero", "minimum")
        }
        columns = k // 2 if q.scheme.weight_bits == 4 else k
        empty = hb.QuantizedTensor(q.codes[:n, :columns], q.scale[:n], q.scheme, k, **parts)
        bias = torch.randn(n)
        for shape in ((5,), (0,), (2, 3)):
            y = hb.linear(torch.randn(*shape, k), hb.pack(empty), bias, activation="relu")
            same(y, bias.relu().expand(*shape, n).contiguous())
