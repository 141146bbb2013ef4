"""Every op x every kernel this machine can run x every case of cases.py against the reference.

Integers, and floats without a transcendental activation, agree bit for bit. GELU and SiLU stay within the
tolerance of csrc/ops/linear_w8a8/op.h, measured against float64, and agree bit for bit between kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch

import cases
import halfbyte as hb
from corecall import linear, pack, quantize_rows, same, unpack
from halfbyte import _core
from halfbyte.reference import linear_ref, quantize_rows_ref
from weights import GROUPED, W8A8, Format, fill_weight

DTYPE = {name: getattr(torch, name) for name in (*cases.FLOAT_DTYPES, "int32")}
OPS = ("linear_w8a8", "linear_w4a8", "linear_w8a16", "linear_w4a16", "quantize_rows")
KERNELS = {op: [row for row in _core.kernels() if row["op"] == op and row["supported"]] for op in OPS}
pytestmark = pytest.mark.usefixtures("one_thread_of_torch")
MANY = 50  # rows: more than any tile
TOLERANCE = 2.0**-20  # of GELU and SiLU, times max(1, |value before the activation|): op.h


def kernels(op: str):
    return pytest.mark.parametrize("kernel", KERNELS[op], ids=lambda row: row["isa"])


def kernels_of(some: list[cases.Linear]):
    """Each case on each kernel of its op. They follow each other, and share the reference's answer."""
    runs = [(kernel, case) for case in some for kernel in KERNELS[case.form.scheme.op]]
    ids = [f"{case.id}-{kernel['isa']}" for kernel, case in runs]
    return pytest.mark.parametrize(("kernel", "case"), runs, ids=ids)


def force(kernel: dict) -> None:
    _core.force_isa(kernel["isa"])
    assert _core.select(kernel["op"]) == kernel["name"]


def linear_operands(case: cases.Linear):
    """x, weight, bias, residual: the same for any number of threads and any layout."""
    return _operands(dataclasses.replace(case, threads=1, layout="dense"))


def expected(case: cases.Linear):
    return _expected(dataclasses.replace(case, threads=1, layout="dense"))


@functools.lru_cache(maxsize=64)
def _operands(case: cases.Linear):
    rng = cases.rng_for(case)
    x = torch.from_numpy(case.fill_x(rng))
    q = fill_weight(case.form, case.w, case.n, case.k, rng)
    bias = torch.from_numpy(rng.standard_normal(case.n).astype(np.float32))
    residual = torch.from_numpy(rng.standard_normal((case.m, case.n)).astype(np.float32))
    return x, q, bias, residual


@functools.lru_cache(maxsize=64)
def _expected(case: cases.Linear):
    x, q, bias, _ = _operands(case)
    acc = linear_ref(x, q, out_dtype=torch.int32) if case.form == W8A8 else None
    return acc, linear_ref(x, q), linear_ref(x, q, bias)


def test_every_op_has_its_scalar_kernel_here():
    for op, rows in KERNELS.items():
        assert rows[-1]["isa"] == "scalar", op
    # These have cases of their own, in test files of their names.
    others = {"attention", "embedding", "linear_f32", "norm", "rope"}
    ops = {row["op"] for row in _core.kernels() if not row["op"].startswith("spmm_")}
    assert ops == {*OPS} | others


@kernels_of(cases.LINEAR)
def test_linear(kernel, case):
    force(kernel)
    x, q, bias, _ = linear_operands(case)
    acc, plain, biased = expected(case)
    packed = pack(q, case.layout)
    where = {"layout": case.layout, "threads": case.threads}
    if acc is not None:
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
        x, q, bias, residual = linear_operands(case)
        packed, x = pack(q), x.to(DTYPE[x_dtype])
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
            want = linear_ref(x, q, b, **options)
            same(linear(packed, x, bias=b, layout=case.layout, **options), want, f"{case.id} {activation}")


@pytest.mark.parametrize("x_dtype, out_dtype", list(itertools.product(cases.FLOAT_DTYPES, repeat=2)))
@kernels_of(cases.GROUPED_EPILOGUE)
def test_grouped_dtypes_and_exact_epilogues(kernel, case, x_dtype, out_dtype):
    force(kernel)
    x, q, bias, residual = linear_operands(case)
    packed, x = pack(q), x.to(DTYPE[x_dtype])
    options = (
        {},
        {"bias": bias, "residual": residual.to(DTYPE[x_dtype])},
        {"bias": bias, "activation": "relu", "residual": residual.to(DTYPE[out_dtype])},
    )
    for some in options:
        some = some | {"out_dtype": DTYPE[out_dtype]}
        same(linear(packed, x, layout=case.layout, **some), linear_ref(x, q, **some), f"{sorted(some)}")


@kernels_of([cases.Linear(m, 35, 70, "mixed", "full", form=form) for m in (3, 14) for form in GROUPED
             if form.scheme.per_token])  # fmt: skip
def test_grouped_static(kernel, case):
    force(kernel)
    x, q, bias, _ = linear_operands(case)
    packed = pack(q)
    for static in cases.STATIC:
        same(linear(packed, x, bias=bias, static=static), linear_ref(x, q, bias, static=static), str(static))


@kernels_of([cases.Linear(7, 65, 130, "huge", "full", form=Format(name)) for name in
             ("w4a8_g64+ag64", "w4a16", "w4a16_g32+asym")])  # fmt: skip
def test_sums_that_leave_float32(kernel, case):
    """Channels 16 to 31 of a panel of 4-bit codes overflow 16 times as early, never to another number."""
    force(kernel)
    rng = cases.rng_for(case)
    x = torch.from_numpy(cases.fill_rows("huge", case.m, case.k, rng))
    q = fill_weight(case.form, case.w, case.n, case.k, rng)
    got, want = linear(pack(q), x), linear_ref(x, q)
    early = torch.arange(case.n) % 32 >= 16
    same(got[:, ~early], want[:, ~early])
    same(got.where(got.isfinite(), want), want)
    small = x * 2.0**-60
    same(linear(pack(q), small), linear_ref(small, q))


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


def w8a8(codes: torch.Tensor) -> hb.QuantizedTensor:
    return hb.QuantizedTensor(codes, torch.ones(len(codes)), W8A8.scheme)


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
    packed = pack(w8a8(torch.zeros(len(v), 1, dtype=torch.int8)))
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
@kernels_of([*cases.EPILOGUE, *cases.GROUPED_EPILOGUE])
def test_order_of_the_epilogue(kernel, case, activation):
    """bias, activation, residual, cast: each step rounds once to float32, the cast rounds half to even."""
    x, q, bias, residual = linear_operands(case)
    packed, where = pack(q), {"layout": case.layout}
    force(kernel)
    before = linear(packed, x, bias=bias, **where)
    same(before, linear_ref(x, q, bias), "before the activation")
    after = linear(packed, x, bias=bias, activation=activation, **where)
    error = (after.double() - activation_truth(activation, before)).abs()
    ok = before.isfinite()
    assert (error <= TOLERANCE * before.double().abs().clamp(min=1))[ok].all()
    for out, res in itertools.product(cases.FLOAT_DTYPES, repeat=2):
        r = residual.to(DTYPE[res])
        got = linear(packed, x, bias=bias, activation=activation, residual=r, out_dtype=DTYPE[out], **where)
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


@pytest.mark.parametrize("case", cases.ROWS, ids=lambda c: c.id)
@kernels("quantize_rows")
def test_quantize_rows_in_groups(kernel, case):
    force(kernel)
    x32 = torch.from_numpy(cases.fill_rows(case.x, case.m, case.k, cases.rng_for(case)))
    groups = (32, 64, 128) if case.k < 2000 else (128,)
    for i, (group, wide) in enumerate(itertools.product(groups, (False, True))):
        x = x32.to(DTYPE[cases.FLOAT_DTYPES[i % 3]])
        got = quantize_rows(x, group=group, wide=wide, layout=case.layout, threads=case.threads)
        want = quantize_rows_ref(x, group=group, wide=wide)
        for name, g, w in zip(("codes", "scale", "zero", "sums"), got, want, strict=True):
            same(g, w, f"{name} of {x.dtype} group={group} wide={wide}")


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("n", cases.AROUND_NR)
def test_pack_round_trip(n, layout):
    for i, k in enumerate(cases.AROUND_K):
        form = (W8A8, *GROUPED)[(n + i) % (len(GROUPED) + 1)]
        q = fill_weight(form, "full", n, k, cases.rng_for((n, k)))
        packed = pack(q, layout, threads=1 + i % 3)
        assert (packed.op, packed.n, packed.k, packed.group) == (q.scheme.op, n, k, q.scheme.group)
        assert packed.nbytes >= n * k * q.scheme.weight_bits // 8
        same(unpack(packed, layout), q.codes, f"codes {n}x{k} of {form}")


@pytest.mark.parametrize("form", (W8A8, *GROUPED), ids=str)
def test_one_pack_serves_every_kernel(form):
    x, q, bias, _ = linear_operands(cases.Linear(MANY, 65, 133, "mixed", "full", form=form))
    packed = pack(q)
    group = q.scheme.group or (128 if q.scheme.activation_bits == 16 else q.scheme.activation_group)
    assert packed.group == q.scheme.group and packed.activation_group in (group, q.scheme.activation_group)
    answers = []
    for kernel in KERNELS[form.scheme.op]:
        force(kernel)
        answers.append(linear(packed, x, bias=bias))
    for answer in answers:
        same(answer, answers[-1])
    same(unpack(packed), q.codes)
