"""Gated products and several weights on one input: what the linear op gives for each, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte.errors import DTypeError, ShapeError

SCHEMES = ("w8a8", "w8a8+ag64", "w4a8_g32", "w4a8_g64+asym", "w4a16_g32", "w8a16")
ISAS = [row["isa"] for row in hb.kernels("linear_w8a8") if row["supported"]]


def packed(n, k, scheme):
    return hb.pack(hb.quantize(torch.randn(n, k), scheme, method="absmax"))


def composed(x, up, gate, bias, gate_bias, activation, residual):
    """float32, in the order of core/gemm.h."""
    y = hb.linear(x, up, bias) * hb.linear(x, gate, gate_bias, activation=activation)
    return y if residual is None else y + residual


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("isa", ISAS)
def test_gated_is_the_product_of_two(isa, scheme):
    with hb.force_isa(isa):
        for m, n, k in [(1, 5, 3), (2, 33, 70), (13, 96, 64), (130, 160, 200)]:
            x, residual, b, g = (torch.randn(*shape) for shape in ((m, k), (m, n), (n,), (n,)))
            up, gate = packed(n, k, scheme), packed(n, k, scheme)
            got = hb.gated_linear(x, up, gate, b, g, activation="gelu", residual=residual)
            assert torch.equal(got, composed(x, up, gate, b, g, "gelu", residual))
            assert torch.equal(hb.gated_linear(x, up, gate), composed(x, up, gate, None, None, "silu", None))


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 60),
    n=st.integers(1, 150),
    k=st.integers(1, 130),
    scheme=st.sampled_from(SCHEMES),
    activation=st.sampled_from(["none", "relu", "gelu", "gelu_tanh", "silu"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    threads=st.integers(1, 3),
)
def test_any_gated_product(m, n, k, scheme, activation, dtype, threads):
    x = torch.randn(m, k).to(dtype)
    up, gate = packed(n, k, scheme), packed(n, k, scheme)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = hb.gated_linear(x, up, gate, activation=activation)
    finally:
        torch.set_num_threads(before)
    assert got.dtype == dtype and got.shape == (m, n)
    exact = composed(x.float(), up, gate, None, None, activation, None)
    assert torch.equal(got, exact.to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linears_are_the_results_of_each(scheme):
    for m, sizes, k in [
        (1, (5,), 3),
        (3, (64, 32, 32), 96),
        (16, (384, 384, 384), 384),
        (150, (33, 1, 70), 65),
    ]:
        x = torch.randn(m, k)
        weights = [packed(n, k, scheme) for n in sizes]
        biases = [torch.randn(n) for n in sizes]
        for y, w, b in zip(hb.linears(x, weights, biases, activation="silu"), weights, biases, strict=True):
            assert torch.equal(y, hb.linear(x, w, b, activation="silu"))


def test_linears_with_a_static_scale():
    x, weights = torch.randn(4, 6, 8), [packed(n, 8, "w8a8") for n in (3, 9)]
    for y, w in zip(hb.linears(x, weights, static=(0.05, 3)), weights, strict=True):
        assert torch.equal(y, hb.linear(x, w, static=(0.05, 3))) and y.shape[:2] == (4, 6)


def test_gated_mlp():
    x, residual = torch.randn(2, 7, 64), torch.randn(2, 7, 64)
    up, gate, down = packed(96, 64, "w8a8"), packed(96, 64, "w8a8"), packed(64, 96, "w8a8")
    expected = hb.linear(composed(x, up, gate, None, None, "silu", None), down, residual=residual)
    assert torch.equal(hb.gated_mlp(x, up, gate, down, residual=residual), expected)


def test_numpy():
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    up, gate = packed(32, 64, "w8a8"), packed(32, 64, "w8a8")
    tensor = torch.from_numpy(x)
    assert np.array_equal(hb.gated_linear(x, up, gate), hb.gated_linear(tensor, up, gate).numpy())
    assert np.array_equal(hb.linears(x, [up, gate])[1], hb.linear(tensor, gate).numpy())


def test_errors():
    x, up = torch.randn(3, 64), packed(32, 64, "w8a8")
    with pytest.raises(ShapeError, match=r"gate is \(16, 64\) in w8a8; it must be \(32, 64\)"):
        hb.gated_linear(x, up, packed(16, 64, "w8a8"))
    with pytest.raises(ShapeError, match="in w4a8_g32"):
        hb.gated_linear(x, up, packed(32, 64, "w4a8_g32"))
    with pytest.raises(DTypeError, match="gate must be a PackedWeight"):
        hb.gated_linear(x, up, torch.randn(32, 64))
    with pytest.raises(ShapeError, match="gate_bias has the shape"):
        hb.gated_linear(x, up, up, gate_bias=torch.randn(5))
    with pytest.raises(ValueError, match="residual or gate"):
        hb.gated_linear(x, up, up, activation="none", out_dtype=torch.int32)
    with pytest.raises(ValueError, match="gradient"):
        hb.gated_linear(x.requires_grad_(), up, up)
    x = x.detach()
    with pytest.raises(ShapeError, match="1 to 3 weights, not 4"):
        hb.linears(x, [up] * 4)
    with pytest.raises(ShapeError, match="all must be of 64 input features and of w8a8"):
        hb.linears(x, [up, packed(32, 64, "w8a16")])
    with pytest.raises(ShapeError, match="2 biases for 1 weights"):
        hb.linears(x, [up], [None, None])
