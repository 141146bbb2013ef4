"""The CUDA kernels that turn rows into codes, run on the CPU: bit for bit as the reference says."""

from __future__ import annotations

import itertools
from ctypes import byref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from corecall import CODE, Placed
from cuda_calls import ALIGNMENT, BAD_ARGUMENT, U, address, strided
from halfbyte.cuda.library import Library, Rows
from halfbyte.exact import fma, sqrt
from halfbyte.reference import norm_ref, quantize_rows_ref

F32, BF16, F16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN, LAYERNORM, RMSNORM, SILU_MUL = range(4)
FEW, MANY, MOST = 16, 64, 512  # values that a thread keeps, threads of a block: csrc/cuda/rows.cuh
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])


@pytest.fixture(scope="module")
def library(emulated_library) -> Library:
    return Library(emulated_library, emulated=True)


def rows_call(rows: Tensor, **more: Any) -> Rows:
    m, k = rows.shape
    common = {"x": rows.data_ptr(), "ldx": rows.stride(0), "m": m, "k": k, "x_type": CODE[rows.dtype]}
    return Rows(**common | more)


def quantized(
    library: Library,
    x: Tensor,
    *,
    kind: int = PLAIN,
    layout: str = "dense",
    k_padded: int = 0,
    symmetric: bool = False,
    static: tuple[float, int] = (0.0, 0),
    residual: Tensor | None = None,
    total: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, zero) of one call, with a check that nothing beside them was written."""
    m, k = x.shape
    k_padded = max(k, k_padded)
    codes, scale = Placed(m, k_padded, torch.int8, layout), Placed(1, m, F32)
    zero = None if symmetric else Placed(1, m, torch.int32)
    call = rows_call(
        x, kind=kind, codes=codes.ptr, ldc=codes.ld, k_padded=k_padded, scale=scale.ptr,
        zero=address(zero), residual=address(residual), sum=address(total), weight=address(weight),
        bias=address(bias), ld_residual=0 if residual is None else residual.stride(0),
        ld_sum=0 if total is None else total.stride(0), symmetric=symmetric, eps=eps,
        static_scale=static[0], static_zero=static[1],
    )  # fmt: skip
    assert library.rows_run(byref(call), None) == 0
    q = codes.check()
    assert not q[:, k:].any()
    return q[:, :k], scale.check()[0], None if zero is None else zero.check()[0]


def same_codes(got: tuple[Tensor, Tensor, Tensor | None], x: Tensor, **options: Any) -> None:
    wanted = quantize_rows_ref(x, **options)
    torch.testing.assert_close(got[0], wanted.codes, rtol=0, atol=0)
    torch.testing.assert_close(got[1], wanted.scale, rtol=0, atol=0, equal_nan=True)
    if got[2] is not None:
        torch.testing.assert_close(got[2], wanted.zero, rtol=0, atol=0)


def rows_of_all_kinds(k: int, dtype: torch.dtype) -> Tensor:
    """One-sided, shifted, zeros, about the smallest scale, the largest numbers, ties; NaN, infinities."""
    x = torch.randn(13, k) * 3
    x[1], x[2] = x[1].abs(), -x[2].abs() - 5
    x[3] = 0
    x[4] *= 2.0**-101 * 127
    x[5] *= 2.0**-130
    x[6] = (torch.rand(k) * 2 - 1) * torch.finfo(dtype).max
    x[7] = torch.arange(k) % 255 - 127.5  # the scale of these is near 1: codes on both sides of ties
    x[8, k // 2] = torch.nan
    x[9, k - 1] = torch.inf
    x[10, 0], x[11] = -torch.inf, torch.nan
    return x.to(dtype)


# Around a vector of eight; a warp and more; around what registers hold, 8192 and 32768.
SIZES = (1, 7, 8, 33, 256, 264, 1000, 4096 + 3, 8192, 8200, 20000, 32768 + 8)


@each_dtype
@pytest.mark.parametrize("k", SIZES)
def test_rows_are_those_of_the_reference(library, k, dtype):
    x = rows_of_all_kinds(k, dtype)
    layouts = ("dense", "aligned", "padded", "unaligned", "both")
    modes = ({}, {"symmetric": True}, {"static": (0.03, -7)}, {"static": (2.0**-100, 127)})
    if k > 4096:  # every layout and every mode, but not every pair
        x = x[[0, 1, 7, 8, 9]]
        cases = [("dense", modes[0]), ("aligned", modes[2]), ("both", modes[1]), ("unaligned", modes[0])]
    else:
        cases = list(itertools.product(layouts, modes))
    for i, (layout, mode) in enumerate(cases):
        placed = "dense" if layout == "aligned" else layout
        k_padded = (0, -(-k // 16) * 16, k + 3, k + 128)[i % 4]
        got = quantized(library, strided(x, layout), layout=placed, k_padded=k_padded, **mode)
        same_codes(got, x, **mode)


def test_rows_of_one_are_those_of_many(library):
    """A row's codes do not depend on the rows beside it, nor a sum's order on where the row lies."""
    x, weight = torch.randn(5, 1000).half(), torch.randn(1000)
    given = {"kind": LAYERNORM, "weight": weight, "bias": weight.flip(0), "eps": 1e-5}
    together = quantized(library, x, **given)
    for i, layout in enumerate(("dense", "aligned", "unaligned", "both", "padded")):
        alone = quantized(library, strided(x, layout)[i : i + 1], layout="unaligned", **given)
        assert all(torch.equal(a, t[i : i + 1]) for a, t in zip(alone, together, strict=True)), layout


def block_sum(v: Tensor, square: bool = False) -> Tensor:
    """The float32 sums over rows v [m, k] in the order of rows.cuh."""
    m, k = v.shape
    values = FEW if k <= FEW * MOST else MANY if k <= MANY * MOST else 0
    threads = 32 * -(-k // (32 * values)) if values else MOST
    parts = functional.pad(v, (0, -k % (8 * threads))).view(m, -1, threads, 8)
    t = torch.zeros(m, threads)
    for c, j in itertools.product(range(parts.shape[1]), range(8)):
        e = parts[:, c, :, j]
        t = fma(e, e, t) if square else t + e
    t = t.view(m, threads // 32, 32)
    for half in (16, 8, 4, 2, 1):
        t = t[..., :half] + t[..., half : 2 * half]
    total = t[:, 0, 0]
    for warp in range(1, threads // 32):
        total = total + t[:, warp, 0]
    return total


def normalized(
    h: Tensor, kind: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """norm_ref, but with these sums."""
    k = torch.tensor(float(h.shape[1]))
    d = h - (block_sum(h) / k)[:, None] if kind == LAYERNORM else h
    y = d * (1 / sqrt(block_sum(d, square=True) / k + torch.tensor(eps)))[:, None]
    if weight is not None:
        return y * weight if bias is None else fma(y, weight, bias)
    return y if bias is None else y + bias


def near_the_reference(got: tuple[Tensor, Tensor, Tensor], y: Tensor) -> None:
    """The codes of values that differ from y by the order of their sums.

    For rows whose mean is at most as large as their deviation, the bounds of csrc/ops/norm/op.h, for sums of
    depth 64 + 20 in place of ceil(k / 16) + 4 and of both computations, come to less than 200 u (|z| + 1)
    |weight|, which is below 2^-15 of the row's range. In steps of its 255th part that is below 1/100: a
    rounding may turn out otherwise, that of the zero point, too, but no code moves by two steps. Where it
    does, y / scale lies within that of a tie, which one in 50 values does.
    """
    wanted = quantize_rows_ref(y)
    assert ((got[1] - wanted.scale).abs() <= 2.0**-15 * wanted.scale).all()
    assert ((got[2] - wanted.zero).abs() <= 1).all()
    inside = (wanted.codes > -127) & (wanted.codes < 126)
    steps = (got[0].int() - got[2][:, None]) - (wanted.codes.int() - wanted.zero[:, None])
    assert (steps[inside].abs() <= 1).all() and (steps[inside] != 0).float().mean() < 0.02


@pytest.mark.parametrize("kind", [LAYERNORM, RMSNORM], ids=["layer", "rms"])
@pytest.mark.parametrize("k", SIZES)
def test_norms(library, k, kind):
    m, layouts = (2 if k > 4096 else 4), ("dense", "aligned", "padded", "unaligned")
    for i in range(3 if k > 4096 else 8):
        dtype, layout = DTYPES[i % 3], layouts[i % 4]
        x = (torch.randn(m, k) + (0, 0.5)[i % 2]).to(dtype)
        residual = torch.randn(m, k).to(dtype) if i % 4 else None
        weight = torch.rand(k) + 0.5 if i % 3 != 1 else None
        bias = torch.randn(k) / 4 if kind == LAYERNORM and i % 2 else None
        mode = ({}, {"symmetric": True}, {"static": (0.05, 3)})[i % 3 if i < 6 else 0]
        h = x.float() if residual is None else x.float() + residual.float()
        total = Placed(m, k, dtype, "dense" if layout == "aligned" else layout) if i % 4 != 2 else None
        got = quantized(
            library, strided(x, layout), kind=kind, eps=1e-5, weight=weight, bias=bias, **mode,
            residual=None if residual is None else strided(residual, layout),
            total=None if total is None else total.view, k_padded=k + 8 * i,
        )  # fmt: skip
        same_codes(got, normalized(h, kind, weight, bias, 1e-5), **mode)
        if total is not None:
            torch.testing.assert_close(total.check(), h.to(dtype), rtol=0, atol=0)
        if not mode and k > 1:
            y, _ = norm_ref(x, weight, bias, rms=kind == RMSNORM, residual=residual)
            near_the_reference(got, y)


def test_one_operand_that_is_not_aligned(library):
    k = 256
    x, residual, weight, bias = torch.randn(2, k), torch.randn(2, k), torch.rand(1, k), torch.randn(1, k)
    y = normalized(x + residual, LAYERNORM, weight[0], bias[0], 1e-5)
    for odd in range(6):
        layouts = ["both" if i == odd else "dense" for i in range(6)]
        parts = zip((x, residual, weight, bias), layouts, strict=False)
        operands = [strided(part, layout) for part, layout in parts]
        total = Placed(2, k, F32, layouts[4])
        got = quantized(
            library, operands[0], kind=LAYERNORM, residual=operands[1], weight=operands[2],
            bias=operands[3], total=total.view, layout=layouts[5], eps=1e-5,
        )  # fmt: skip
        same_codes(got, y)
        assert torch.equal(total.check(), x + residual)


@each_dtype
@pytest.mark.parametrize("k", [33, 1024, 32768 + 8])
def test_the_sum_takes_the_place_of_an_operand(library, k, dtype):
    x, residual = torch.randn(2, k).to(dtype), torch.randn(2, k).to(dtype)
    h = x.float() + residual.float()
    for replaced in range(2):
        operands = [x.clone(), residual.clone()]
        got = quantized(
            library, operands[0], kind=RMSNORM, residual=operands[1], total=operands[replaced], eps=1e-6
        )
        same_codes(got, normalized(h, RMSNORM, None, None, 1e-6))
        assert torch.equal(operands[replaced], h.to(dtype))
        assert torch.equal(operands[1 - replaced], (residual, x)[replaced])


@pytest.mark.parametrize("k", [8, 33, 33000])
@pytest.mark.parametrize("kind", [LAYERNORM, RMSNORM], ids=["layer", "rms"])
def test_norms_of_rows_that_are_not_finite(library, k, kind):
    x = torch.randn(5, k)
    x[1, k - 1], x[2, 0], x[3], x[4] = torch.nan, torch.inf, 3e38, 0
    codes, scale, zero = quantized(library, x, kind=kind, eps=1e-5)
    assert scale.isnan().tolist() == [False, True, True, kind == LAYERNORM, False]
    assert not codes[1:3].any() and not zero[1:3].any()
    # The squares overflow, 1 / sqrt is 0; of a LayerNorm the sum has overflowed before.
    assert not codes[3:].any() and not zero[3:].any()
    same_codes((codes[:1], scale[:1], zero[:1]), normalized(x[:1], kind, None, None, 1e-5))


@each_dtype
@pytest.mark.parametrize("k", [1, 8, 33, 1000, 20000, 32768 + 8])
def test_silu_mul(library, k, dtype):
    """exp of at most 2 units in the last place, and a rounding in each of 1 + exp, the quotient and the
    product: |v^ - v| < 8 u |v|; beyond exp's range silu becomes 0, 2^-100 at most away.
    """
    gate, up = (torch.randn(3, k) * 6).to(dtype), torch.randn(3, k).to(dtype)
    if k > 1:
        gate[0, k // 2], gate[1, 0] = -200, 100
    v = functional.silu(gate.double()) * up.double()
    error = 8 * U * v.abs() + 2.0**-100 * up.double().abs()
    for layout, symmetric in (("dense", False), ("unaligned", False), ("aligned", True)):
        codes, scale, zero = quantized(
            library, strided(gate, layout), kind=SILU_MUL, residual=strided(up, layout), symmetric=symmetric
        )
        s, z = scale.double()[:, None], 0 if zero is None else zero[:, None]
        value = (codes.int() - z) * s
        # Half a step, and the roundings of 1 / s, of v / s and of s itself on up to 255 steps.
        assert ((value - v).abs() <= s / 2 * (1 + 2.0**-13) + error).all()
        low, high = v.amin(1).clamp(max=0), v.amax(1).clamp(min=0)
        wanted = torch.maximum(-low, high) / 127 if symmetric else (high - low) / 255
        assert ((scale - wanted).abs() <= 12 * U * wanted).all()
    up[0, 0], gate[1, k - 1] = torch.inf, torch.nan
    codes, scale, _ = quantized(library, gate, kind=SILU_MUL, residual=up)
    assert scale.isnan().tolist() == [True, True, False] and not codes[:2].any()


def test_no_rows_and_no_static_scale(library):
    assert library.rows_run(byref(Rows(m=0, k=8, k_padded=8)), None) == 0
    x = torch.randn(2, 8)  # a zero point without a scale is not read
    same_codes(quantized(library, x, symmetric=True, static=(0.0, 5)), x, symmetric=True)


def test_rows_that_are_refused(library):
    x, weight = torch.zeros(2, 16), torch.zeros(16)
    codes, numbers = torch.zeros(2, 16, dtype=torch.int8), torch.zeros(2, dtype=torch.int32)
    good = {
        "x": x.data_ptr(), "codes": codes.data_ptr(), "scale": numbers.data_ptr(),
        "zero": numbers.data_ptr(), "ldc": 16, "k_padded": 16,
    }  # fmt: skip
    assert library.rows_run(byref(rows_call(x, **good)), None) == 0
    p, tiny = weight.data_ptr(), 2.0**-101
    refused = [
        {"m": -1}, {"k": 0}, {"k": 1 << 24, "k_padded": 1 << 24, "ldc": 1 << 24}, {"k_padded": 15},
        {"ldc": 15}, {"x_type": 3}, {"kind": 4}, {"kind": -1}, {"x": None}, {"codes": None}, {"scale": None},
        {"zero": None}, {"weight": p}, {"bias": p}, {"sum": p}, {"residual": p}, {"kind": SILU_MUL},
        {"kind": RMSNORM, "bias": p}, {"kind": RMSNORM, "eps": -1e-5}, {"kind": RMSNORM, "eps": torch.nan},
        {"kind": RMSNORM, "eps": torch.inf}, {"kind": RMSNORM, "sum": p, "ld_sum": 15},
        {"static_scale": tiny}, {"static_scale": -1.0}, {"static_scale": torch.inf},
        {"static_scale": torch.nan}, {"static_scale": 1.0, "static_zero": 128},
        {"static_scale": 1.0, "static_zero": -129}, {"static_scale": 1.0, "symmetric": 1},
    ]  # fmt: skip
    for wrong in refused:
        assert library.rows_run(byref(rows_call(x, **good | wrong)), None) == BAD_ARGUMENT, wrong
    for what, offset in (("x", 2), ("scale", 1), ("zero", 2)):
        wrong = good | {what: good[what] + offset}
        assert library.rows_run(byref(rows_call(x, **wrong)), None) == ALIGNMENT, what
