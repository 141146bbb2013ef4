"""Every op x every kernel this machine can run x every case of cases.py against the reference.

Integers, and floats without a transcendental activation, agree bit for bit. GELU and SiLU stay within the
tolerance of csrc/ops/linear_w8a8/op.h, measured against float64, and agree bit for bit between kernels.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

import cases
import truth
from corecall import linear, pack, quantize_rows, same, unpack
from halfbyte import _core
from halfbyte.reference import linear_w8a8_ref, quantize_rows_ref

DTYPE = {name: getattr(torch, name) for name in (*cases.FLOAT_DTYPES, "int32")}
KERNELS = {
    op: [row for row in _core.kernels() if row["op"] == op and row["supported"]]
    for op in ("linear_w8a8", "quantize_rows")
}
TOLERANCE = 2.0**-20  # of GELU and SiLU, times max(1, |value before the activation|): op.h


def kernels(op: str):
    return pytest.mark.parametrize("kernel", KERNELS[op], ids=lambda row: row["isa"])


def force(kernel: dict) -> None:
    _core.force_isa(kernel["isa"])
    assert _core.select(kernel["op"]) == kernel["name"]


@functools.lru_cache(maxsize=16)
def linear_operands(case: cases.Linear):
    rng = cases.rng_for(case)
    x = torch.from_numpy(cases.fill_rows(case.x, case.m, case.k, rng))
    codes = torch.from_numpy(cases.fill_codes(case.w, case.n, case.k, rng))
    scale = torch.from_numpy(cases.fill_scale(case.n, rng))
    bias = torch.from_numpy(rng.standard_normal(case.n).astype(np.float32))
    residual = torch.from_numpy(rng.standard_normal((case.m, case.n)).astype(np.float32))
    return x, codes, scale, bias, residual


@functools.lru_cache(maxsize=16)
def expected(case: cases.Linear):
    x, codes, scale, bias, _ = linear_operands(case)
    return (
        linear_w8a8_ref(x, codes, scale, out_dtype=torch.int32),
        linear_w8a8_ref(x, codes, scale),
        linear_w8a8_ref(x, codes, scale, bias),
    )


def test_every_op_has_its_scalar_kernel_here():
    for op, rows in KERNELS.items():
        assert rows[-1]["isa"] == "scalar", op


# The upper parameter varies faster: all kernels of a case follow each other and share the reference's answer.
@kernels("linear_w8a8")
@pytest.mark.parametrize("case", cases.LINEAR, ids=lambda c: c.id)
def test_linear(kernel, case):
    force(kernel)
    x, codes, scale, bias, _ = linear_operands(case)
    acc, plain, biased = expected(case)
    packed = pack(codes, scale, case.layout)
    where = {"layout": case.layout, "threads": case.threads}
    finite = x.isfinite().all(1)  # a row of x with a NaN has no integers to compare
    same(linear(packed, x, out_dtype=torch.int32, **where)[finite], acc[finite], "int32 accumulators")
    same(linear(packed, x, **where), plain, "float32 output")
    same(linear(packed, x, bias=bias, **where), biased, "float32 output with bias")


@pytest.mark.parametrize("x_dtype, out_dtype", list(itertools.product(cases.FLOAT_DTYPES, repeat=2)))
@pytest.mark.parametrize("static", (None, *cases.STATIC), ids=str)
@kernels("linear_w8a8")
def test_linear_dtypes_and_exact_epilogues(kernel, static, x_dtype, out_dtype):
    force(kernel)
    for case in cases.EPILOGUE:
        x, codes, scale, bias, residual = linear_operands(case)
        packed, x = pack(codes, scale), x.to(DTYPE[x_dtype])
        for activation, b, r in itertools.product(
            ("none", "relu"), (None, bias), (None, *cases.FLOAT_DTYPES)
        ):
            r = None if r is None else residual.to(DTYPE[r])
            options = {
                "activation": activation,
                "residual": r,
                "out_dtype": DTYPE[out_dtype],
                "static": static,
            }
            want = linear_w8a8_ref(x, codes, scale, b, **options)
            same(linear(packed, x, bias=b, layout=case.layout, **options), want, f"{case.id} {activation}")


def preactivations() -> torch.Tensor:
    """float32 values through every regime of an activation: a dense sweep, all magnitudes, special values."""
    rng = np.random.default_rng(1)
    sweep = np.linspace(-12, 12, 60000)
    magnitudes = rng.choice([-1.0, 1.0], 20000) * 2.0 ** rng.uniform(-149, 128, 20000)
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        88.72284,
        -88.72284,
        -103.97,
        3.4028235e38,
        -3.4028235e38,
        1e-45,
        -1e-45,
    ]
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.concatenate([sweep, magnitudes, special]).astype(np.float32))


def activation_truth(name: str, v: torch.Tensor) -> torch.Tensor:
    """The activation of float32 values in float64."""
    v = v.double()
    return {
        "gelu": lambda: 0.5 * v * torch.erfc(-v / 2**0.5),
        "gelu_tanh": lambda: v * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)),
        "silu": lambda: v * torch.sigmoid(v),
    }[name]()


@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh", "silu"))
@kernels("linear_w8a8")
def test_activation_against_float64(kernel, activation):
    # With weights of 0 the accumulator is 0 and the bias is the value before the activation, exactly.
    v = preactivations()
    packed = pack(torch.zeros(len(v), 1, dtype=torch.int8), torch.ones(len(v)))
    x = torch.zeros(1, 1)
    _core.force_isa("scalar")
    spec = linear(packed, x, bias=v, activation=activation)
    force(kernel)
    got = linear(packed, x, bias=v, activation=activation)
    same(got, spec, "the same operations on every ISA")
    want = activation_truth(activation, v)
    assert got[0][v.isnan()].isnan().all()
    assert (got[0][v == torch.inf] == torch.inf).all()
    ok = v.isfinite()
    error = (got[0].double() - want).abs()[ok] / v.double().abs().clamp(min=1)[ok]
    assert error.max() <= TOLERANCE, f"error {error.max():.3g} at {v[ok][error.argmax()].item()!r}"


@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh", "silu"))
@kernels("linear_w8a8")
def test_order_of_the_epilogue(kernel, activation):
    """bias, activation, residual, cast: each step rounds once to float32, the cast rounds half to even."""
    for case in cases.EPILOGUE:
        x, codes, scale, bias, residual = linear_operands(case)
        packed, where = pack(codes, scale), {"layout": case.layout}
        force(kernel)
        before = linear(packed, x, bias=bias, **where)
        same(before, linear_w8a8_ref(x, codes, scale, bias), "before the activation")
        after = linear(packed, x, bias=bias, activation=activation, **where)
        error = (after.double() - activation_truth(activation, before)).abs()
        ok = before.isfinite()
        assert (error <= TOLERANCE * before.double().abs().clamp(min=1))[ok].all()
        for out, res in itertools.product(cases.FLOAT_DTYPES, repeat=2):
            r = residual.to(DTYPE[res])
            got = linear(
                packed, x, bias=bias, activation=activation, residual=r, out_dtype=DTYPE[out], **where
            )
            same(got, (after + r.float()).to(DTYPE[out]), f"{out} of {res} residual")


@pytest.mark.parametrize("case", cases.ROWS, ids=lambda c: c.id)
@kernels("quantize_rows")
def test_quantize_rows(kernel, case):
    force(kernel)
    x32 = torch.from_numpy(cases.fill_rows(case.x, case.m, case.k, cases.rng_for(case)))
    for dtype in cases.FLOAT_DTYPES:
        x = x32.to(DTYPE[dtype])
        for symmetric, static in ((True, None), (False, None), *((False, s) for s in cases.STATIC)):
            got = quantize_rows(
                x, symmetric=symmetric, static=static, layout=case.layout, threads=case.threads
            )
            want = quantize_rows_ref(x, symmetric=symmetric, static=static)
            for name, g, w in zip(("codes", "scale", "zero", "sums"), got, want, strict=True):
                same(g, w, f"{name} of {dtype} symmetric={symmetric} static={static}")


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("n", cases.AROUND_NR)
def test_pack_round_trip(n, layout):
    for k in cases.AROUND_K:
        codes = torch.from_numpy(cases.fill_codes("full", n, k, cases.rng_for((n, k))))
        packed = pack(codes, torch.ones(n), layout)
        assert (packed.op, packed.n, packed.k) == ("linear_w8a8", n, k)
        assert packed.nbytes >= n * k
        same(unpack(packed, layout), codes, f"codes {n}x{k}")


def test_one_pack_serves_every_kernel():
    x, codes, scale, bias, _ = linear_operands(cases.EPILOGUE[-1])
    packed = pack(codes, scale)
    answers = []
    for kernel in KERNELS["linear_w8a8"]:
        force(kernel)
        answers.append(linear(packed, x, bias=bias))
    for answer in answers:
        same(answer, answers[-1])


@pytest.mark.parametrize("case", [c for c in cases.LINEAR if c.k <= 70 and c.x != "tiny"], ids=lambda c: c.id)
def test_the_reference_is_right(case):
    """reference.py against numpy arithmetic written apart from it."""
    x, codes, scale, bias, _ = linear_operands(case)
    qx, sx, zx, sums = truth.quantize_rows(x.numpy())
    for got, want in zip(quantize_rows_ref(x), (qx, sx, zx, sums), strict=True):
        same(got, torch.from_numpy(want))
    finite = np.isfinite(x.numpy()).all(1)
    assert np.array_equal(
        linear_w8a8_ref(x, codes, scale, out_dtype=torch.int32).numpy()[finite],
        truth.accumulate(qx, zx, codes.numpy())[finite],
    )
    same(
        linear_w8a8_ref(x, codes, scale, bias),
        torch.from_numpy(truth.linear(x.numpy(), codes.numpy(), scale.numpy(), bias.numpy())),
    )


@pytest.mark.parametrize("symmetric", (True, False))
def test_quantized_values_are_near(symmetric):
    """|x - dequantized x| <= scale / 2 (plus the rounding of x / scale), and zero is exact."""
    x = torch.from_numpy(cases.fill_rows("mixed", 40, 200, np.random.default_rng(3)))
    x = x[(x.isfinite() & (x.abs() < 1e38)).all(1)]
    x[:, 7] = 0
    codes, scale, zero, _ = quantize_rows(x, symmetric=symmetric)
    back = (codes.double() - zero[:, None]) * scale[:, None].double()
    # A zero point is rounded too: the end of the range that it moves outside saturates, by less than a code.
    bound = scale[:, None].double() * (0.5 if symmetric else 1.0) * (1 + 2.0**-15)
    assert ((back - x.double()).abs() <= bound)[scale != 1].all()
    assert (back[:, 7] == 0).all()
