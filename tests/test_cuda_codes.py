"""quantize_rows and what is fused before it, on the GPU (emulated), by torch there, and on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import halfbyte as hb
from halfbyte.cuda import library
from halfbyte.reference import norm_ref, quantize_rows_ref, silu_mul_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [{}, {"symmetric": True}, {"scale": 0.05, "zero": -9}]
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 3, 200)]
F32, BF16, F16 = DTYPES
PAIRS = [(F32, F32), (BF16, BF16), (F16, F32)]  # of x and its second operand


@pytest.fixture(params=["kernel", "torch"])
def road(request, gpu, monkeypatch):
    """The kernels, and torch where there are none."""
    if request.param == "torch":
        monkeypatch.setattr(library, "obstacle", lambda index: "no kernels here")
    return request.param


def wanted(floats, grid):
    static = (grid["scale"], grid["zero"]) if "scale" in grid else None
    rows = floats.reshape(-1, floats.shape[-1])
    return quantize_rows_ref(rows, symmetric=grid.get("symmetric", False), static=static)


def check(got, want, shape, exact=False):
    """Floats that differ in their last bits may have neighbouring codes."""
    assert got.codes.shape == shape and got.scale.shape == got.zero.shape == got.sums.shape == shape[:-1]
    assert (got.codes.dtype, got.scale.dtype) == (torch.int8, torch.float32)
    assert (got.zero.dtype, got.sums.dtype) == (torch.int32, torch.int32)
    assert torch.equal(got.sums, got.codes.sum(-1, dtype=torch.int32))
    codes, scale, zero = got.codes.view(want.codes.shape), got.scale.view(-1), got.zero.view(-1)
    if exact:
        assert torch.equal(codes, want.codes) and torch.equal(zero, want.zero)
        torch.testing.assert_close(scale, want.scale, rtol=0, atol=0, equal_nan=True)
        return
    torch.testing.assert_close(scale, want.scale, rtol=1e-5, atol=0)
    off = (codes.int() - zero[:, None]) - (want.codes.int() - want.zero[:, None])
    assert off.abs().max() <= 1 and (off != 0).float().mean() < 0.02


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rows(road, dtype, grid):
    for m, k in ((1, 1), (3, 7), (5, 64), (4, 300)):
        x = torch.randn(m, k).to(dtype)
        x[0, 0] = torch.inf
        check(hb.quantize_rows(x, **grid), wanted(x, grid), (m, k), exact=True)
        wide = torch.cat([x, x], 1)[:, :k]
        check(hb.quantize_rows(wide, **grid), wanted(x, grid), (m, k), exact=True)
    assert hb.quantize_rows(torch.randn(0, 5)).codes.shape == (0, 5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rms", [True, False], ids=["rmsnorm", "layernorm"])
def test_norms(road, rms, shape, grid):
    op = hb.rmsnorm_quantize if rms else hb.layernorm_quantize
    eps = 1e-6 if rms else 1e-5
    for dtype, other in PAIRS:
        x, weight = torch.randn(shape).to(dtype), torch.rand(shape[-1]) + 0.5
        bias = {} if rms else {"bias": torch.randn(shape[-1])}
        residual = torch.randn(shape).to(other)
        got, total = op(x, weight, **bias, residual=residual, return_sum=True, **grid)
        floats, h = norm_ref(x, weight, *bias.values(), rms=rms, eps=eps, residual=residual)
        assert total.dtype == dtype and torch.equal(total, h.to(dtype))
        check(got, wanted(floats, grid), shape)
        check(op(x, **grid), wanted(norm_ref(x, rms=rms, eps=eps)[0], grid), shape)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul(road, shape, grid):
    for dtype, other in PAIRS:
        gate, up = torch.randn(shape).to(dtype), torch.randn(shape).to(other)
        check(hb.silu_mul_quantize(gate, up, **grid), wanted(silu_mul_ref(gate, up), grid), shape)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul_on_the_cpu(shape, grid):
    for dtype in DTYPES:
        gate, up = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        check(hb.silu_mul_quantize(gate, up, **grid), wanted(silu_mul_ref(gate, up), grid), shape)
    gate = np.random.randn(*shape).astype(np.float32)
    gate.reshape(-1)[0] = -500  # exp(500) is an infinity, silu(-500) nearly 0
    got = hb.silu_mul_quantize(gate, np.full(shape, 2, np.float32), **grid)
    got = type(got)(*(torch.from_numpy(part) for part in got))
    check(got, wanted(silu_mul_ref(torch.from_numpy(gate), torch.full(shape, 2.0)), grid), shape)


REFUSED = [
    (lambda x: hb.quantize_rows(x[0]), hb.ShapeError, "must be a matrix"),
    (lambda x: hb.quantize_rows(x[:, :0]), hb.ShapeError, "no elements"),
    (lambda x: hb.quantize_rows(x.int()), hb.DTypeError, "int32"),
    (lambda x: hb.quantize_rows(x, scale=0.0, zero=0), ValueError, "static scale"),
    (lambda x: hb.rmsnorm_quantize(x, torch.ones(3)), hb.ShapeError, "weight has the shape"),
    (lambda x: hb.rmsnorm_quantize(x, eps=-1.0), ValueError, "eps"),
    (lambda x: hb.layernorm_quantize(x, residual=x[:1]), hb.ShapeError, "residual has the shape"),
    (lambda x: hb.layernorm_quantize(x, scale=0.1), ValueError, "together"),
    (lambda x: hb.layernorm_quantize(x, np.ones(7, np.float32)), hb.DTypeError, "torch tensor"),
    (lambda x: hb.layernorm_quantize(x, torch.ones(7, device="meta")), hb.DeviceError, "meta"),
    (lambda x: hb.silu_mul_quantize(x, x[:1]), hb.ShapeError, "up has the shape"),
    (lambda x: hb.silu_mul_quantize(x.requires_grad_(), x), ValueError, "gradient"),
]


@pytest.mark.parametrize(("call", "error", "match"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_arguments_that_are_refused(gpu, call, error, match):
    with pytest.raises(error, match=match):
        call(torch.randn(4, 7))
