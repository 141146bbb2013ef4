"""norm: every kernel against the reference, bit for bit, and within the error bound of op.h."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import cases
import halfbyte as hb
from corecall import CODE, Placed, place, same
from halfbyte import _core
from halfbyte.reference import norm_ref, quantize_rows_ref

KERNELS = [row for row in _core.kernels() if row["op"] == "norm" and row["supported"]]
F32, BF16, F16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around the widths of the vectors and the 16 partial sums; real models' sizes.
SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 31, 33, 47, 64, 95, 100, 384, 576, 1000, 4096)
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda row: row["isa"])
each_kind = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])


def call(
    x: Placed,
    *,
    rms: bool = False,
    eps: float = 1e-5,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: Placed | None = None,
    total: Placed | None = None,
    out: Placed | None = None,
    codes: dict[str, Any] | None = None,
    threads: int = 1,
) -> tuple[torch.Tensor, ...]:
    """One call of the core. codes: options of quantize_rows_ref; returns codes, scale, zero and sums then."""
    m, k = x.view.shape

    def matrix(p: Placed | None) -> tuple[int, int, int]:
        return (0, 0, 0) if p is None else (p.ptr, p.ld, CODE[p.view.dtype])

    vectors = [None if v is None else place(v[None], "unaligned") for v in (weight, bias)]
    arguments, parts = (0, 0, 0, 0, 0, False, 0.0, 0, 0, False), ()
    if codes is not None:
        group, wide = codes.get("group", 0), codes.get("wide", False)
        symmetric, groups = codes.get("symmetric", False) or group > 0, -(-k // group) if group else 1
        parts = (
            Placed(m, k, torch.int16 if wide else torch.int8, "both"),
            Placed(1, m * groups, F32),
            Placed(1, m, torch.int32),
            Placed(1, m * groups, torch.int32),
        )
        q, scale, zero, sums = parts
        s, z = codes.get("static") or (0.0, 0)
        zero_ptr = 0 if symmetric else zero.ptr
        arguments = (q.ptr, q.ld, scale.ptr, zero_ptr, sums.ptr, symmetric, s, z, group, wide)
    _core.norm(
        rms, m, k, *matrix(x), *matrix(residual), *(0 if v is None else v.ptr for v in vectors), eps,
        *matrix(total), *matrix(out), *arguments, threads,
    )  # fmt: skip
    return tuple(part.check() for part in parts)


def operands(i: int, m: int, k: int, *, mean: float = 0.0) -> dict[str, torch.Tensor]:
    """The i-th mix of dtypes and of absent parts, so that all pairs of them occur over a few i."""
    x_type, r_type = DTYPES[i % 3], DTYPES[i // 3 % 3]
    given = {"x": (torch.randn(m, k) * 3 + mean).to(x_type)}
    if i % 4:
        given["residual"] = torch.randn(m, k).to(r_type)
    if i % 5:
        given["weight"] = torch.randn(k)
    if i % 2:
        given["bias"] = torch.randn(k)
    return given


@each_kernel
@each_kind
def test_bits_of_the_reference(kernel, rms):
    _core.force_isa(kernel["isa"])
    assert _core.select("norm") == kernel["name"]
    for (j, k), step in itertools.product(enumerate(SIZES), range(6)):
        i = 7 * j + 11 * step
        given = operands(i, 3, k, mean=(0, 100)[j % 2])
        if rms:
            given.pop("bias", None)
        layout = cases.LAYOUTS[i % 4]
        y, h = norm_ref(**given, rms=rms, eps=1e-5)
        x = place(given.pop("x"), layout)
        residual = place(given.pop("residual"), layout) if "residual" in given else None
        sum_type, out_type = DTYPES[i // 2 % 3], DTYPES[(i // 3 + j) % 3]
        total = Placed(3, k, sum_type, layout) if step % 3 else None
        out = Placed(3, k, out_type, layout)
        call(x, rms=rms, residual=residual, total=total, out=out, threads=1 + i % 2, **given)
        same(out.check(), y.to(out_type), f"y, {k=} {i=}")
        if total is not None:
            same(total.check(), h.to(sum_type), f"h, {k=} {i=}")
            total = Placed(3, k, sum_type, layout)
            call(x, rms=rms, residual=residual, total=total)
            same(total.check(), h.to(sum_type), f"h alone, {k=} {i=}")


CODES = (
    {}, {"symmetric": True}, {"static": (0.03, -7)}, {"group": 32}, {"group": 64, "wide": True},
    {"group": 128},
)  # fmt: skip


@each_kernel
@each_kind
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_codes_are_those_of_the_float32_rows(kernel, rms, codes):
    _core.force_isa(kernel["isa"])
    for i, k in enumerate((1, 7, 16, 17, 96, 384, 1000)):
        given = operands(i + 1, 4, k)
        if rms:
            given.pop("bias", None)
        y, h = norm_ref(**given, rms=rms, eps=1e-5)
        want = quantize_rows_ref(y, **codes)
        wants = want.codes, want.scale, want.zero, want.sums
        x = place(given.pop("x"))
        residual = place(given.pop("residual")) if "residual" in given else None
        for out_type, sum_type in itertools.product((None, *DTYPES), (None, F32, F16)):
            out = None if out_type is None else Placed(4, k, out_type, "both")
            total = None if sum_type is None else Placed(4, k, sum_type, "both")
            got = call(x, rms=rms, residual=residual, total=total, out=out, codes=codes, **given)
            for part, expected, what in zip(got, wants, want._fields, strict=True):
                if what != "zero" or not (codes.get("symmetric") or codes.get("group")):
                    same(part.reshape(expected.shape), expected, f"{what}, {k=} {out_type} {sum_type}")
            if out is not None:
                same(out.check(), y.to(out_type), "y")
            if total is not None:
                same(total.check(), h.to(sum_type), "h")


@each_kernel
@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(kernel, rms, dtype):
    """The sum over x or the residual, the output over x."""
    _core.force_isa(kernel["isa"])
    for k in (5, 33, 384):
        x, r = torch.randn(4, k).to(dtype), torch.randn(4, k).to(dtype)
        y, h = norm_ref(x, rms=rms, residual=r)
        for sum_over, out_over in itertools.product("xr", "xro"):
            places = {"x": place(x, "both"), "r": place(r, "both"), "o": Placed(4, k, dtype, "both")}
            if sum_over == out_over:
                continue
            total, out = places[sum_over], places[out_over]
            call(places["x"], rms=rms, residual=places["r"], total=total, out=out)
            same(total.check(), h.to(dtype), f"h over {sum_over}")
            same(out.check(), y.to(dtype), f"y over {out_over}")
        alone, out = norm_ref(x, rms=rms)[0], place(x, "both")
        codes = call(out, rms=rms, out=out, codes={})[0]
        same(out.check(), alone.to(dtype), "y over x")
        same(codes, quantize_rows_ref(alone).codes, "codes")


@each_kernel
@each_kind
@pytest.mark.parametrize("filling", ["normal", "outlier", "constant", "offset", "small"])
def test_error_bound(kernel, rms, filling):
    """|y^ - y| against float64, with the constants that op.h derives."""
    _core.force_isa(kernel["isa"])
    rng, u = np.random.default_rng(3), 2.0**-24
    for k, eps in itertools.product((1, 7, 16, 17, 384, 576, 1000, 4096, 65536), (1e-5, 1e-12)):
        if filling in ("offset", "small"):
            size, means = (1, [10, -300, 1e4, 1e6]) if filling == "offset" else (1e-4, [0, 0, 0, 0])
            rows = (rng.standard_normal((4, k)) * size + np.array(means)[:, None]).astype(np.float32)
        else:
            rows = cases.fill_rows(filling, 4, k, rng)
        w, b = rng.standard_normal((2, k)).astype(np.float32)
        if rms:
            b = np.zeros_like(b)
        out = Placed(4, k, F32)
        given = {"weight": torch.from_numpy(w)} | ({} if rms else {"bias": torch.from_numpy(b)})
        call(place(torch.from_numpy(rows)), rms=rms, eps=eps, out=out, **given)
        h, c, eps = rows.astype(np.float64), -(-k // 16), float(np.float32(eps))
        d = h if rms else h - h.mean(1, keepdims=True)
        v = (d**2).mean(1, keepdims=True) + eps
        z = d / np.sqrt(v)
        y = z * w + b
        if rms:
            bound = (c / 2 + 7) * u * np.abs(y)
        else:
            t = (c + 4) * u * np.abs(h).mean(1, keepdims=True) / np.sqrt(v)
            bound = np.abs(w) * (np.abs(z) * ((c / 2 + 8) * u + t**2 / 2) + t) + u * np.abs(y)
        error = np.abs(out.check().numpy() - y)
        worst = (error - (1 + 2.0**-10) * bound).max()
        assert worst <= 1e-30, f"{k=} {eps=}: beyond the bound by {worst}"
        if k == 4096 and filling == "normal":
            assert np.median(bound / np.abs(y)) < 3e-5, "a bound that everything keeps"


@each_kernel
@each_kind
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_any_number_of_threads(kernel, rms, threads):
    _core.force_isa(kernel["isa"])
    x, r = torch.randn(700, 100), torch.randn(700, 100).to(BF16)
    results = []
    for count in (1, threads):
        out, total = Placed(700, 100, F16), Placed(700, 100, BF16)
        parts = call(place(x), rms=rms, residual=place(r), out=out, total=total, codes={}, threads=count)
        results.append((out.check(), total.check(), *parts))
    for one, several in zip(*results, strict=True):
        same(several, one, f"{threads} threads")


@each_kernel
@each_kind
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(kernel, rms, bad):
    _core.force_isa(kernel["isa"])
    for k, at in ((1, 0), (40, 3), (40, 39), (384, 383)):
        x = torch.randn(3, k)
        x[1, at] = bad
        out = Placed(3, k, F32)
        codes, scale, *_ = call(place(x), rms=rms, weight=torch.ones(k), out=out, codes={})
        y = out.check()
        same(y, norm_ref(x, torch.ones(k), rms=rms)[0])
        assert y[[0, 2]].isfinite().all() and y[1, at].isnan()
        assert scale.view(-1).isnan().tolist() == [False, True, False] and not codes[1].any()
        if not rms or np.isnan(bad):
            assert y[1].isnan().all()
        else:
            assert (y[1, torch.arange(k) != at] == 0).all()


@each_kernel
def test_special_rows(kernel):
    """Zeros, constants, subnormal and huge numbers: as the reference; zeros give zeros, or the bias."""
    _core.force_isa(kernel["isa"])
    for filling, rms, eps in itertools.product(cases.FILLINGS, (False, True), (1e-5, 0.0)):
        x = torch.from_numpy(cases.fill_rows(filling, 5, 70, np.random.default_rng(1)))
        out = Placed(5, 70, F32)
        call(place(x), rms=rms, eps=eps, out=out)
        same(out.check(), norm_ref(x, rms=rms, eps=eps)[0], f"{filling} {rms=} {eps=}")
    out, bias = Placed(2, 20, F32), torch.randn(20)
    call(place(torch.zeros(2, 20)), bias=bias, out=out)
    same(out.check(), bias.expand(2, 20), "bias")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"m": -1}, "negative shape"),
        ({"k": -1}, "negative shape"),
        ({"k": 2**24}, "exceeds 16777215"),
        ({"x": 0}, "x has no memory"),
        ({"x_type": 3}, "x must be float32, bfloat16 or float16"),
        ({"ldx": 3}, "rows of x overlap: stride 3 for 4"),
        ({"ldr": 3}, "rows of the residual overlap"),
        ({"residual_type": 3}, "the residual must be"),
        ({"rms": True}, "an rms norm has no bias"),
        ({"eps": -1e-5}, "eps must be finite and not negative"),
        ({"eps": float("nan")}, "eps must be finite and not negative"),
        ({"lds": 3}, "rows of the sum overlap"),
        ({"sum_type": 3}, "the sum must be"),
        ({"ldo": 3}, "rows of the output overlap"),
        ({"out_type": 3}, "the output must be"),
        ({"sum_out": 0, "out": 0, "scale": 0}, "no sum, output or codes to write"),
        ({"codes": 0}, "codes, scale or sum have no memory"),
        ({"ldc": 3}, "rows of codes overlap"),
        ({"k": 0}, "rows of no elements have no codes"),
        ({"static_scale": float("inf")}, "static scale must be finite"),
        ({"static_scale": 1.0, "static_zero": 128}, "static zero point"),
        ({"wide16": True}, "16-bit codes have a scale per group"),
    ],
    ids=str,
)
def test_the_core_checks_its_arguments(changed, says):
    memory = torch.zeros(64)
    p = memory.data_ptr()
    given = {
        "rms": False, "m": 2, "k": 4, "x": p, "ldx": 4, "x_type": 0, "residual": p, "ldr": 4,
        "residual_type": 0, "weight": p, "bias": p, "eps": 1e-5, "sum_out": p, "lds": 4, "sum_type": 0,
        "out": p, "ldo": 4, "out_type": 0, "codes": p, "ldc": 4, "scale": p, "zero": p, "sum": p,
        "symmetric": False, "static_scale": 0.0, "static_zero": 0, "group": 0, "wide16": False, "threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=says):
        _core.norm(*(given | changed).values())
    assert not memory.any()


@pytest.mark.parametrize("shape", [(17,), (3, 17), (2, 3, 17), (0, 17), (3, 0), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layernorm_and_rmsnorm_of_torch(shape, dtype):
    x, r = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    w, b = torch.randn(shape[-1:]).to(dtype), torch.randn(shape[-1:])
    y, h = norm_ref(x, w.float(), b, residual=r, eps=1e-3)
    got = hb.layernorm(x, w, b, residual=r, eps=1e-3, return_sum=True)
    same(got[0], y.to(dtype), "y")
    same(got[1], h.to(dtype), "h")
    same(hb.layernorm(x, w, b, residual=r, eps=1e-3, out_dtype=F32), y, "float32")
    y = norm_ref(x, w.float(), rms=True, eps=1e-6)[0]
    same(hb.rmsnorm(x, w), y.to(dtype), "rms")
    if dtype == F32 and x.numel():
        torch.testing.assert_close(hb.layernorm(x, w, b), functional.layer_norm(x, shape[-1:], w, b))
        torch.testing.assert_close(hb.rmsnorm(x, w), functional.rms_norm(x, shape[-1:], w, 1e-6))


def test_numpy_and_strides():
    x, w = np.random.default_rng(0).standard_normal((6, 2, 40)).astype(np.float32), np.ones(40, np.float16)
    want = norm_ref(torch.from_numpy(x), torch.ones(40), rms=True, eps=1e-6)[0].numpy()
    assert np.array_equal(hb.rmsnorm(x, w), want)
    for view in (x[::2], x[:, 1], x.transpose(1, 0, 2), x[:, :, :33], x[..., ::2]):
        want = norm_ref(torch.from_numpy(view.copy()), residual=torch.from_numpy(view.copy()))
        y, h = hb.layernorm(view, residual=view, return_sum=True)
        assert np.array_equal(y, want[0].numpy()) and np.array_equal(h, want[1].numpy())
        tensor = torch.from_numpy(view)
        same(hb.layernorm(tensor, residual=tensor), torch.from_numpy(y))
    assert hb.layernorm(x.astype(np.float16)).dtype == np.float16
    assert hb.layernorm(x, out_dtype="float16").dtype == np.float16


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"scale": 0.05, "zero": 3}], ids=str)
def test_quantized_rows(options):
    x, r, w, b = torch.randn(2, 3, 50), torch.randn(2, 3, 50), torch.randn(50), torch.randn(50)
    for dtype in DTYPES:
        x, r = x.to(dtype), r.to(dtype)
        y, h = norm_ref(x, w, b, residual=r)
        q, total = hb.layernorm_quantize(x, w, b, residual=r, return_sum=True, **options)
        same(total, h.to(dtype), "h")
        for part, want in zip(q, hb.quantize_rows(y.view(6, 50), **options), strict=True):
            assert part.shape[:2] == (2, 3)
            same(part.view(want.shape), want)
        q = hb.rmsnorm_quantize(x.float().numpy(), w.numpy(), **options)
        y = norm_ref(x, w, rms=True, eps=1e-6)[0]
        for part, want in zip(q, hb.quantize_rows(y.view(6, 50), **options), strict=True):
            same(torch.from_numpy(part).view(want.shape), want)
    assert hb.layernorm_quantize(x[:0]).codes.shape == (0, 3, 50)
    assert hb.rmsnorm_quantize(x[0, 0]).scale.shape == ()


X = torch.randn(3, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (([1.0],), hb.DTypeError, "x must be a numpy array or a torch tensor"),
        ((X.double(),), hb.DTypeError, r"x has the dtype torch\.float64"),
        ((X.to("meta"),), hb.DeviceError, "x is on the meta device"),
        ((torch.tensor(1.0),), hb.ShapeError, "x is a single number"),
        ((X, torch.ones(7)), hb.ShapeError, r"weight has the shape \(7,\)"),
        ((X, np.ones(8)), hb.DTypeError, "weight must be a torch tensor as x is"),
        ((X, None, torch.ones(8, 1)), hb.ShapeError, r"bias has the shape \(8, 1\)"),
        ((X, {"residual": X[:2]}), hb.ShapeError, r"residual has the shape \(2, 8\); x has \(3, 8\)"),
        ((X, {"residual": X.int()}), hb.DTypeError, "residual has the dtype"),
        ((X, {"eps": -1.0}), ValueError, "eps must be finite and not negative, got -1"),
        ((X.clone().requires_grad_(),), ValueError, "layernorm: x requires a gradient"),
        ((X, {"residual": X.clone().requires_grad_()}), ValueError, "layernorm: x requires a gradient"),
        ((X, {"out_dtype": torch.int32}), hb.DTypeError, "the output has the dtype"),
        ((X, {"scale": 0.5}), ValueError, "layernorm_quantize: give scale and zero together"),
        ((X, {"scale": 0.5, "zero": 1, "symmetric": True}), ValueError, "nothing for symmetric=True"),
        ((X, {"scale": 0.0, "zero": 1}), ValueError, "the static scale is 0.0"),
        ((X[:, :0], {"scale": 0.5, "zero": 1}), hb.ShapeError, "rows of 0 elements"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(arguments, error, says):
    options = arguments[-1] if isinstance(arguments[-1], dict) else {}
    function = hb.layernorm_quantize if "scale" in options else hb.layernorm
    with pytest.raises(error, match=says):
        function(*(a for a in arguments if not isinstance(a, dict)), **options)


def test_without_recording_a_gradient_is_no_obstacle():
    with torch.no_grad():
        same(hb.layernorm(X.clone().requires_grad_()), hb.layernorm(X))
