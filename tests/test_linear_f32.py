"""linear_f32: the float weights of fused blocks, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte import _core

ISAS = [row["isa"] for row in hb.kernels("linear_f32") if row["supported"]]
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SHAPES = [
    (1, 1, 1),
    (1, 32, 64),
    (1, 130, 70),
    (3, 5, 3),
    (7, 33, 65),
    (12, 64, 96),
    (13, 100, 1000),
    (130, 97, 384),
]


def pack(weight, threads=1):
    n, k = weight.shape
    return _core.pack_float(weight.data_ptr(), CODES[weight.dtype], n, k, max(k, 1), threads)


def linear(x, packed, bias=None, residual=None, activation="none", threads=1, out_dtype=torch.float32):
    m, n = len(x), packed.n
    out = torch.full((m, n), torch.nan, dtype=out_dtype)
    _core.linear(
        packed,
        m,
        x.data_ptr(),
        packed.k,
        CODES[x.dtype],
        out.data_ptr(),
        n,
        CODES[out_dtype],
        0 if bias is None else bias.data_ptr(),
        ACTIVATIONS[activation],
        0 if residual is None else residual.data_ptr(),
        n,
        0,
        0.0,
        0,
        threads,
    )
    return out


def check(y, x, weight, bias, residual):
    x, weight = x.double(), weight.double()
    exact = x @ weight.T + bias.double()
    u, k = 2.0**-24, x.shape[1]
    bound = k * u * (1 + 2**-10) * (x.abs() @ weight.abs().T)  # op.h
    bound += 2 * u * (exact.abs() + bound + (exact + residual).abs())  # the additions of bias and residual
    assert ((y.double() - (exact + residual)).abs() <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_against_float64(isa, m, n, k):
    x, weight, bias, residual = (torch.randn(*shape) for shape in ((m, k), (n, k), (n,), (m, n)))
    with hb.force_isa(isa):
        check(linear(x, pack(weight), bias, residual), x, weight, bias, residual)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_and_activations_are_exact_float32(isa, dtype):
    x, weight = torch.randn(9, 75).to(dtype), torch.randn(40, 75).to(dtype)
    with hb.force_isa(isa):
        assert torch.equal(linear(x, pack(weight)), linear(x.float(), pack(weight.float())))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_isas_and_thread_counts_give_the_same_bits(activation):
    for m, n, k in [*SHAPES, (200, 160, 256)]:
        x, weight, bias, residual = (torch.randn(*shape) for shape in ((m, k), (n, k), (n,), (m, n)))
        got = []
        for isa in ISAS:
            with hb.force_isa(isa):
                got += [linear(x, pack(weight, t), bias, residual, activation, t) for t in (1, 2, 3)]
        assert all(torch.equal(y, got[0]) for y in got)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 140), k=st.integers(1, 200), threads=st.integers(1, 3))
def test_any_shape(m, n, k, threads):
    x, weight, bias, residual = (torch.randn(*shape) for shape in ((m, k), (n, k), (n,), (m, n)))
    check(linear(x, pack(weight), bias, residual, threads=threads), x, weight, bias, residual)


def test_rows_do_not_mix():
    x, weight = torch.randn(30, 64), torch.randn(50, 64)
    x[7, 3], x[21, 0] = torch.nan, torch.inf
    y = linear(x, pack(weight))
    bad = ~y.isfinite().all(1)
    assert bad.nonzero().flatten().tolist() == [7, 21]


def test_no_input_features():
    y = linear(torch.empty(3, 0), pack(torch.empty(5, 0)), bias=torch.arange(5.0))
    assert torch.equal(y, torch.arange(5.0).expand(3, 5))


def test_errors():
    weight = torch.randn(4, 8)
    with pytest.raises(ValueError, match="row stride 7 is below the 8 elements"):
        _core.pack_float(weight.data_ptr(), 0, 4, 8, 7)
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        _core.pack_float(weight.data_ptr(), 3, 4, 8, 8)
    with pytest.raises(ValueError, match="has no memory"):
        _core.pack_float(0, 0, 4, 8, 8)
    with pytest.raises(ValueError, match="negative shape"):
        _core.pack_float(weight.data_ptr(), 0, -4, 8, 8)
    packed = pack(weight)
    with pytest.raises(ValueError, match="has no dense codes"):
        _core.unpack_linear(packed, weight.data_ptr(), 8)
    with pytest.raises(ValueError, match="takes a float weight"):
        _core.pack_linear("linear_f32", weight.data_ptr(), 4, 8, 8, weight.data_ptr())
