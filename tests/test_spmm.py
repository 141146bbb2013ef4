"""Every sparse op x every kernel this machine can run x every case of sparse_cases.py.

int8: what the dense op and the reference give for the same codes, bit for bit; int4: what the dense op gives.
float: as close to the float64 product as the bound of its op.h, and what linear_f32 gives, bit for bit, but
for the exception there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import corecall
from corecall import linear, same
from halfbyte import _core
from halfbyte.reference import linear_ref
from sparse_cases import (
    CASES,
    CODES,
    EPILOGUE,
    FLOAT,
    INT8,
    KERNELS,
    PATTERNS,
    Sparse,
    dense,
    each_kernel,
    force,
    kernels_of,
    pack,
    pack_case,
)

DTYPE = {name: getattr(torch, name) for name in cases.FLOAT_DTYPES}
U = 2.0**-24
pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


def stored(op: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight that the op multiplies by, in float32."""
    return weight.bfloat16().float() if op == "spmm_block_bf16" else weight.float()


def in_order(case: Sparse, kernel: dict) -> bool:
    """Whether the products are added in the order of k."""
    return not (case.op == "spmm_unstructured_f32" and kernel["isa"].startswith("avx512") and case.m <= 4)


def pack_float(weight: torch.Tensor):
    """The pack of linear_f32."""
    n, k = weight.shape
    return _core.pack_float(weight.data_ptr(), 0, n, k, k, 1)


def operands(case: Sparse):
    """The same for any number of threads and any layout."""
    return _operands(dataclasses.replace(case, threads=1, layout="dense"))


@functools.lru_cache(maxsize=64)
def _operands(case: Sparse):
    return case.operands()


@functools.lru_cache(maxsize=64)
def _expected(case: Sparse):
    x, codes, scale, bias, _ = _operands(case)
    q = dense(case.op, codes, scale)
    return linear_ref(x, q, out_dtype=torch.int32), linear_ref(x, q, bias)


@functools.lru_cache(maxsize=64)
def _exact(case: Sparse):
    """x W^T in float64, and the bound of its error: one rounding for each nonzero weight of a channel."""
    x, weight, *_ = _operands(case)
    x, weight = x.double(), stored(case.op, weight).double()
    count = (weight != 0).sum(1)
    return x @ weight.T, count * U / (1 - count * U) * (x.abs() @ weight.abs().T)


def check_float(got, exact, bound, bias=None, residual=None) -> None:
    """got: float32; exact, bound: of the product. The additions of bias and residual round once each."""
    for term in (bias, residual):
        if term is not None:
            exact = exact + term.double()
            bound = bound + U * (exact.abs() + bound)
    error = (got.double() - exact).abs()
    assert got.dtype == torch.float32 and (error <= bound).all(), (
        f"off by {error.max():.3g}, {(error / bound.clamp(min=1e-300)).max():.3g} times the bound"
    )


def test_every_op_has_its_scalar_kernel_here():
    for op, rows in KERNELS.items():
        assert rows and rows[-1]["isa"] == "scalar", op
    assert set(PATTERNS) == {row["op"] for row in _core.kernels() if row["op"].startswith("spmm_")}


@kernels_of([case for op in INT8 for case in CASES[op]])
def test_int8(kernel, case):
    force(kernel)
    x, codes, scale, bias, _ = operands(case)
    acc, want = _expected(dataclasses.replace(case, threads=1, layout="dense"))
    packed = pack_case(case, codes, scale)
    assert (packed.op, packed.n, packed.k) == (case.op, case.n, case.k)
    assert packed.stored >= int((codes != 0).sum())
    where = {"layout": case.layout, "threads": case.threads}
    finite = x.isfinite().all(1)  # a row of x with a NaN has no integers to compare
    same(linear(packed, x, out_dtype=torch.int32, **where)[finite], acc[finite], "int32 accumulators")
    got = linear(packed, x, bias=bias, **where)
    same(got, want, "float32 output")
    same(
        got,
        linear(corecall.pack(dense(case.op, codes, scale)), x, bias=bias),
        "float32 output of the dense op",
    )


@kernels_of(CASES["spmm_block_w4a8"])
def test_int4(kernel, case):
    """What the dense op gives, which test_grouped_linear.py holds to the reference."""
    force(kernel)
    x, codes, scale, bias, _ = operands(case)
    packed = pack_case(case, codes, scale)
    assert (packed.op, packed.n, packed.k) == (case.op, case.n, case.k)
    assert packed.stored >= int((codes != 0).sum())
    got = linear(packed, x, bias=bias, layout=case.layout, threads=case.threads)
    same(got, linear(corecall.pack(dense(case.op, codes, scale)), x, bias=bias), "output of the dense op")


@kernels_of([case for op in FLOAT for case in CASES[op]])
def test_float(kernel, case):
    force(kernel)
    x, weight, _, bias, residual = operands(case)
    exact, bound = _exact(dataclasses.replace(case, threads=1, layout="dense"))
    packed = pack_case(case, weight, None)
    assert (packed.op, packed.n, packed.k) == (case.op, case.n, case.k)
    assert packed.stored >= int((weight != 0).sum())
    where = {"layout": case.layout, "threads": case.threads}
    got = linear(packed, x, **where)
    check_float(got, exact, bound)
    if in_order(case, kernel):
        same(got, linear(pack_float(stored(case.op, weight)), x), "output of linear_f32")
    check_float(linear(packed, x, bias=bias, residual=residual, **where), exact, bound, bias, residual)


@pytest.mark.parametrize("x_dtype, out_dtype", list(itertools.product(cases.FLOAT_DTYPES, repeat=2)))
@pytest.mark.parametrize("static", (None, *cases.STATIC), ids=str)
@each_kernel(CODES)
def test_epilogues_of_codes(op, kernel, static, x_dtype, out_dtype):
    """Of the dense op, for every activation."""
    force(kernel)
    for i, case in enumerate(EPILOGUE[op]):
        x, codes, scale, bias, residual = operands(case)
        packed, twin = pack_case(case, codes, scale), corecall.pack(dense(case.op, codes, scale))
        x, r = x.to(DTYPE[x_dtype]), residual.to(DTYPE[cases.FLOAT_DTYPES[i % 3]])
        for activation, b, res in itertools.product(cases.ACTIVATIONS, (None, bias), (None, r)):
            options = {"bias": b, "activation": activation, "residual": res, "static": static}
            options |= {"out_dtype": DTYPE[out_dtype], "layout": case.layout}
            same(linear(packed, x, **options), linear(twin, x, **options), f"{case.id} {activation}")


@pytest.mark.parametrize("x_dtype, out_dtype", list(itertools.product(cases.FLOAT_DTYPES, repeat=2)))
@each_kernel(FLOAT)
def test_float_epilogues(op, kernel, x_dtype, out_dtype):
    """bias, activation, residual, cast: each step rounds once; activations are those of the dense op."""
    force(kernel)
    for i, case in enumerate(EPILOGUE[op]):
        x, weight, _, bias, residual = operands(case)
        packed, where = pack_case(case, weight, None), {"layout": case.layout}
        x, r = x.to(DTYPE[x_dtype]), residual.to(DTYPE[cases.FLOAT_DTYPES[i % 3]])
        t = linear(packed, x, out_dtype=torch.float32, **where)
        same(linear(packed, x.float(), **where), t, "x is converted to float32 first")
        for activation, b in itertools.product(cases.ACTIVATIONS, (None, bias)):
            v = t if b is None else t + b
            after = activated(v, activation)
            options = {"activation": activation, "bias": b, "out_dtype": DTYPE[out_dtype], **where}
            same(linear(packed, x, **options), after.to(DTYPE[out_dtype]), f"{case.id} {activation}")
            got = linear(packed, x, residual=r, **options)
            same(got, (after + r.float()).to(DTYPE[out_dtype]), f"{case.id} {activation} with residual")


def activated(v: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of float32 values as the kernels compute it: the bias of a product that is 0."""
    packed = pack_float(torch.zeros(v.numel(), 1))
    return linear(packed, torch.zeros(1, 1), bias=v.flatten(), activation=activation).view(v.shape)


@pytest.mark.parametrize("weight_dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("op", FLOAT)
def test_half_weights_are_what_they_are_in_float32(op, weight_dtype):
    x, weight, *_ = Sparse(op, PATTERNS[op][0], 13, 65, 70).operands()
    weight = weight.to(weight_dtype)
    same(linear(pack(op, weight), x), linear(pack(op, weight.float()), x))


@pytest.mark.parametrize("op", PATTERNS)
def test_threads_and_kernels_of_packing_do_not_show(op):
    """One pack serves every kernel; by how many threads it is made and read leaves no trace."""
    for case in (Sparse(op, PATTERNS[op][0], m, 257, 130, "panels") for m in (1, 6, 40, 129)):
        x, weight, scale, bias, _ = case.operands()
        packs = [pack_case(dataclasses.replace(case, threads=t), weight, scale) for t in (1, 2, 3)]
        assert len({p.nbytes for p in packs}) == len({p.stored for p in packs}) == 1
        for kernel in KERNELS[op]:
            force(kernel)
            got = [linear(p, x, bias=bias, threads=t) for p in packs for t in (1, 2, 3)]
            for y in got[1:]:
                same(y, got[0], kernel["name"])


@each_kernel(PATTERNS)
def test_other_rows_do_not_show(op, kernel):
    force(kernel)
    for m in (2, 5, 13, 30, 60):
        x, weight, scale, *_ = Sparse(op, PATTERNS[op][0], m, 65, 70).operands()
        packed = pack(op, weight, scale if op in CODES else None)
        y = linear(packed, x)
        for i in {0, m // 2, m - 1}:
            other = torch.randn(m, 70)
            other[i] = x[i]
            same(linear(packed, other)[i], y[i], f"row {i} of {m}")


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
@each_kernel(FLOAT)
def test_float_rows_with_nan_and_infinity(op, kernel, bad):
    """Such a row is not finite where it meets a weight, and only there; no other row is touched."""
    force(kernel)
    for m, kept in ((1, "0.5"), (4, "0.5"), *((m, "0.1") for m in (1, 4, 5, 8, 16, 30)), (30, "panels")):
        x, weight, _, bias, _ = Sparse(op, PATTERNS[op][0], m, 65, 70, kept).operands()
        packed = pack(op, weight)
        clean = linear(packed, x, bias=bias)
        rows = list(range(0, m, 7))
        features = [(11 * i + 69) % 70 for i in rows]
        x[rows, features] = bad
        y = linear(packed, x, bias=bias)
        for i, j in zip(rows, features, strict=True):
            assert not y[i, weight[:, j] != 0].isfinite().any()
            if op == "spmm_unstructured_f32":  # a block has weights that are 0
                assert y[i, weight[:, j] == 0].isfinite().all()
        others = [i for i in range(m) if i not in rows]
        same(y[others], clean[others])


@each_kernel(CODES)
def test_rows_of_codes_with_nan_and_infinity_become_nan(op, kernel):
    force(kernel)
    for m, kept in ((4, "0.5"), (30, "0")):
        x, codes, scale, bias, _ = Sparse(op, PATTERNS[op][0], m, 65, 70, kept).operands()
        packed = pack(op, codes, scale)
        clean = linear(packed, x, bias=bias)
        x[0, 69], x[2, 0] = torch.nan, -torch.inf
        y = linear(packed, x, bias=bias)
        others = [i for i in range(m) if i not in (0, 2)]
        assert y[[0, 2]].isnan().all()
        same(y[others], clean[others])


@settings(max_examples=120, deadline=None)
@given(
    op=st.sampled_from(sorted(PATTERNS)),
    m=st.integers(1, 60),
    n=st.integers(1, 140),
    k=st.integers(1, 200),
    kept=st.floats(0, 1),
    seed=st.integers(0, 2**20),
    threads=st.integers(1, 3),
)
def test_any_shape(op, m, n, k, kept, seed, threads):
    pattern = PATTERNS[op][seed % len(PATTERNS[op])]
    case = Sparse(op, pattern, m, n, k, str(kept), threads=threads)
    x, weight, scale, bias, _ = case.operands()
    got = linear(pack_case(case, weight, scale), x, bias=bias, threads=threads)
    if op in CODES:
        same(got, linear(corecall.pack(dense(op, weight, scale)), x, bias=bias))
    else:
        check_float(got, *_exact(dataclasses.replace(case, threads=1)), bias)
