"""The reference itself: against numpy arithmetic written apart from it, and against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import cases
import halfbyte as hb
import truth
from corecall import linear, pack, quantize_rows, same
from halfbyte.reference import fma, linear_ref, quantize_rows_ref
from weights import GROUPED, W8A8, fill_weight

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


def operands(case: cases.Linear):
    rng = cases.rng_for(case)
    x = torch.from_numpy(case.fill_x(rng))
    q = fill_weight(case.form, case.w, case.n, case.k, rng)
    return x, q, torch.from_numpy(rng.standard_normal(case.n).astype(np.float32))


@pytest.mark.parametrize(
    "case",
    [c for c in cases.LINEAR if c.form == W8A8 and c.k <= 70 and c.x != "tiny" and c.threads == 1],
    ids=lambda c: c.id,
)
def test_without_groups(case):
    x, q, bias = operands(case)
    qx, sx, zx, sums = truth.quantize_rows(x.numpy())
    for got, want in zip(quantize_rows_ref(x), (qx, sx, zx, sums), strict=True):
        same(got, torch.from_numpy(want))
    finite = np.isfinite(x.numpy()).all(1)
    assert np.array_equal(
        linear_ref(x, q, out_dtype=torch.int32).numpy()[finite],
        truth.accumulate(qx, zx, q.codes.numpy())[finite],
    )
    want = truth.linear(x.numpy(), q.codes.numpy(), q.scale.numpy(), bias.numpy())
    same(linear_ref(x, q, bias), torch.from_numpy(want))


def stored(q: hb.QuantizedTensor) -> np.ndarray:
    """The integers that codes stand for, by the letter of QuantizedTensor: int64 [n, k]."""
    codes = q.codes.numpy()
    if q.scheme.weight_bits == 8:
        return codes.astype(np.int64)
    nibbles = np.empty((len(codes), 2 * codes.shape[1]), np.int64)
    nibbles[:, 0::2], nibbles[:, 1::2] = codes % 16, codes // 16
    nibbles = nibbles[:, : q.k]
    if q.scheme.nf4:
        table = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)
        return np.array(table)[nibbles]
    return nibbles if q.scheme.asym else nibbles - 8


SMALL = [
    cases.Linear(m, n, k, x, w, form=form)
    for i, form in enumerate(GROUPED)
    for m, n, k, x, w in (
        (4, 7, (1, 31, 33, 64, 129, 161)[i % 6], "mixed", "full"),
        (11, 3, 140 + i, "mixed", "normal"),
        (2, 4, 97, "ties", "max"),
        (3, 2, 258, "nonfinite", "rows"),
    )
]


@pytest.mark.parametrize("static", [None, (0.05, 3)], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.id)
def test_with_groups(case, static):
    x, q, bias = operands(case)
    scheme = q.scheme
    if static and not scheme.per_token:
        return
    kind = "token" if scheme.per_token else f"int{scheme.activation_bits}"
    group = scheme.group or scheme.activation_group or (128 if scheme.activation_bits == 16 else case.k)
    parts = {
        w: None if (p := getattr(q, w)) is None else p.numpy() for w in ("group_scale", "zero", "minimum")
    }
    want = truth.linear_grouped(
        x.numpy(), stored(q), q.scale.numpy(), group, kind, bias=bias.numpy(), static=static, **parts
    )
    same(linear_ref(x, q, bias, static=static), torch.from_numpy(want))


@pytest.mark.parametrize(("group", "wide"), [(32, False), (128, True)])
@pytest.mark.parametrize("x", [x for x in cases.FILLINGS if x != "tiny"])
def test_quantized_groups(x, group, wide):
    rows = cases.fill_rows(x, 6, 150, np.random.default_rng(4))
    codes, scale = truth.quantize_groups(rows, group, 32639 if wide else 127)
    got = quantize_rows_ref(torch.from_numpy(rows), group=group, wide=wide)
    assert np.array_equal(got.codes.numpy(), codes) and not got.zero.any()
    same(got.scale, torch.from_numpy(scale))
    sums = [codes[:, g * group : (g + 1) * group].sum(1) for g in range(scale.shape[1])]
    assert np.array_equal(got.sums.numpy(), np.stack(sums, 1))


def floats(rng: np.random.Generator, count: int, low: int, high: int) -> np.ndarray:
    """float32 of any mantissa, powers of two among them, and exponents of low .. high - 1."""
    mantissa = rng.integers(2**23, 2**24, count) | rng.choice([0, 1, 2**22, 2**23 - 1], count)
    mantissa = np.where(rng.random(count) < 0.3, 2**23, mantissa)
    value = rng.choice([-1.0, 1.0], count) * mantissa * 2.0 ** (rng.integers(low, high, count) - 23)
    return value.astype(np.float32)


def adversarial(rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
    """a, b, c with a sum halfway between two float32, or a hair beside it; and of subnormal size."""
    c = floats(rng, count, -3, 3)
    half = np.spacing(np.abs(c)) / 2
    hair = np.float32(1) + rng.choice([0, 1, -1], count) * np.float32(2.0**-23)
    a = half * hair * rng.choice([1, 1, 3, 0.5], count).astype(np.float32)
    b = rng.choice([-1.0, 1.0], count).astype(np.float32) * (
        np.float32(1) + rng.choice([0, 1, -1], count) * np.float32(2.0**-23)
    )
    shrink = np.where(rng.random(count) < 0.3, np.float32(2.0**-125), np.float32(1))
    return a, b * shrink, c * shrink


def test_fma_rounds_once():
    rng = np.random.default_rng(2)
    random = [floats(rng, 3000, -20, 20), floats(rng, 3000, -20, 20), floats(rng, 3000, -45, 45)]
    far = [floats(rng, 1000, -60, 60), floats(rng, 1000, -60, 60), floats(rng, 1000, -120, 120)]
    tiny = [floats(rng, 1000, -80, -60), floats(rng, 1000, -75, -60), floats(rng, 1000, -126, -120)]
    sets = [random, far, tiny, adversarial(rng, 6000)]
    a, b, c = (np.concatenate([s[i] for s in sets]) for i in range(3))
    got = fma(*map(torch.from_numpy, (a, b, c))).numpy()
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    for i in range(len(a)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert got[i] == truth.round_fraction(exact), f"fma({a[i]!r}, {b[i]!r}, {c[i]!r})"
    assert (got != twice).sum() > 100, "these numbers tell one rounding from two"
    assert np.array_equal(truth.fma(a, b, c), got)


def test_fma_of_special_values():
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-45])
    a, b, c = (t.reshape(-1) for t in torch.meshgrid(values, values, values, indexing="ij"))
    want = (a.double() * b.double() + c.double()).float()  # none of these sums lies near a tie
    same(fma(a, b, c), want)


WIDE = [form for form in GROUPED if form.scheme.activation_bits == 16]


def exact_product(x: torch.Tensor, q: hb.QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T in float64, and the same sum of sizes: max|x| of the group times (|c - zero| s + |minimum|)."""
    group = q.scheme.fold_group
    c = torch.from_numpy(stored(q)).double()
    spread = lambda part: part.double().repeat_interleave(q.scheme.group or q.k, 1)[:, : q.k]  # noqa: E731
    if q.zero is not None:
        c = c - spread(q.zero)
    if q.group_scale is not None:
        c = c * spread(q.group_scale)
    minimum = torch.zeros_like(c) if q.minimum is None else spread(q.minimum)
    padded = torch.nn.functional.pad(x.double(), (0, -q.k % group)).reshape(len(x), -1, group)
    largest = padded.abs().amax(2).repeat_interleave(group, 1)[:, : q.k]
    scale = q.scale.double()[:, None]
    return x.double() @ ((c + minimum) * scale).T, largest @ ((c.abs() + minimum.abs()) * scale).T


@pytest.mark.parametrize("form", WIDE, ids=str)
def test_16_bit_activations_lose_little(form):
    """|error| <= 2^-15 sum_k max|x of the group| |w|.

    An activation is off by at most half a step of max|x| / 32639, (1 + 2^-7) 2^-15.99 of max|x| with the
    rounding of 1/scale; the float32 sum of G groups adds (G + 4) 2^-24 of the same sum, little up to
    G = 100. Half of the bound is left over.
    """
    for i, x_kind in enumerate(("normal", "outlier", "onesided", "constant", "two_valued")):
        rng = np.random.default_rng(i)
        x = torch.from_numpy(cases.fill_rows(x_kind, 9, 1001, rng))
        q = fill_weight(form, ("normal", "full", "rows")[i % 3], 40, 1001, rng)
        exact, size = exact_product(x, q)
        error = (linear(pack(q), x).double() - exact).abs()
        assert (error <= 2.0**-15 * size).all(), f"{x_kind}: {(error / size).max() * 2**15:.3f} of the bound"


@pytest.mark.parametrize("scheme", ["w8a16", "w8a16_g32", "w4a16_g32", "w4a16_g64+asym", "w4a16_g64+nf4"])
def test_16_bit_activations_beat_bfloat16(scheme):
    """On normal numbers the error is below an eighth of what rounding x and w to bfloat16 costs."""
    x, w = torch.randn(64, 1024), torch.randn(256, 1024) * 0.03
    q = hb.quantize(w, scheme)
    exact, _ = exact_product(x, q)
    rounded = x.bfloat16().double() @ q.dequantize().bfloat16().double().T
    ours, theirs = hb.linear(x, hb.pack(q)).double() - exact, rounded - exact
    assert ours.square().mean() < theirs.square().mean() / 64
    assert ours.abs().max() < theirs.abs().max() / 8


@pytest.mark.parametrize(("group", "wide"), [(0, False), (32, False), (64, True), (128, True)])
@pytest.mark.parametrize("symmetric", (True, False))
def test_quantized_values_are_near(symmetric, group, wide):
    """|x - dequantized x| <= scale / 2 (plus the rounding of x / scale), and zero is exact."""
    if group and not symmetric:
        return
    x = torch.from_numpy(cases.fill_rows("mixed", 40, 200, np.random.default_rng(3)))
    x = x[(x.isfinite() & (x.abs() < 1e38)).all(1)]
    x[:, 7] = 0
    codes, scale, zero, _ = quantize_rows(x, symmetric=symmetric, group=group, wide=wide)
    per_row = (t.repeat_interleave(group or 200, -1).reshape(len(x), -1)[:, :200] for t in (scale, zero))
    scale, zero = (t.double() for t in per_row)
    back = (codes.double() - zero) * scale
    # A zero point is rounded too: the end of the range that it moves outside saturates, by less than a code.
    bound = scale * (0.5 if symmetric else 1.0) * (1 + (2.0**-7 if wide else 2.0**-14))
    assert ((back - x.double()).abs() <= bound)[scale != 1].all()
    assert (back[:, 7] == 0).all()
