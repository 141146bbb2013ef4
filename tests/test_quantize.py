"""quantize, dequantize, quantize_rows, pack: against the reference, and properties of any numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import halfbyte as hb
from corecall import same, unpack
from halfbyte.reference import quantize_rows_ref

# The bounds on the rounding error, in steps. x * (1/s) is off by two roundings, 2^-23 of up to 127.5 codes of
# a weight and 255 of an activation, and may end on the other side of a half.
HALF_STEP = 0.5 * (1 + 2.0**-15)
HALF_STEP_OF_ROWS = 0.5 * (1 + 2.0**-14)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# float32 of any size whose square still fits, subnormals and both zeros included
matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.floats(-(2.0**60), 2.0**60, width=32),
)


@settings(max_examples=200, deadline=None)
@given(matrices)
def test_weights_come_back_within_half_a_step(w):
    q = hb.quantize(w)
    back = hb.dequantize(q).astype(np.float64)
    large = np.abs(w).max(1) >= 2.0**-90  # below it rows may count as zeros
    assert (np.abs(back - w)[large] <= q.scale[large, None].astype(np.float64) * HALF_STEP).all()
    assert (back[w == 0] == 0).all() and np.isfinite(back).all()
    assert (np.abs(q.codes).max(1)[large] == 127).all() and (q.scale > 0).all() and q.codes.min() >= -127


@settings(max_examples=200, deadline=None)
@given(matrices)
def test_rows_come_back_within_half_a_step(x):
    q = hb.quantize_rows(x)
    steps = q.codes.astype(np.float64) - q.zero[:, None]
    span = np.maximum(x.max(1), 0).astype(np.float64) - np.minimum(x.min(1), 0)
    large = span >= 2.0**-90
    error = np.abs(steps * q.scale[:, None] - x)[large]
    # A rounded zero point moves both ends of the range by up to half a step, where codes are clipped.
    assert (error <= q.scale[large, None].astype(np.float64) * (1 + 2.0**-16)).all()
    inside = np.abs(q.codes[large] + 0.5) < 127
    half = q.scale[large, None].astype(np.float64) * HALF_STEP_OF_ROWS * np.ones_like(error)
    assert (error[inside] <= half[inside]).all()
    assert (steps[x == 0] == 0).all()
    assert (q.sums == q.codes.sum(1, dtype=np.int32)).all()


@settings(max_examples=100, deadline=None)
@given(matrices, st.booleans())
def test_bit_for_bit_the_reference(x, symmetric):
    for got, want in zip(
        hb.quantize_rows(x, symmetric=symmetric),
        quantize_rows_ref(torch.from_numpy(x), symmetric=symmetric),
        strict=True,
    ):
        same(torch.from_numpy(got), want)


@settings(max_examples=50, deadline=None)
@given(matrices, st.sampled_from([0.25, 1.0, 2.0, 2.0**20]))
def test_scaling_by_a_power_of_two_scales_the_scale(w, factor):
    w = np.clip(w, -(2.0**30), 2.0**30)
    w[np.abs(w) < 2.0**-60] = 0
    one, two = hb.quantize(w), hb.quantize(w * np.float32(factor))
    assert np.array_equal(one.codes, two.codes)
    some = w.any(1)
    assert np.array_equal(one.scale[some] * np.float32(factor), two.scale[some])


@settings(max_examples=50, deadline=None)
@given(matrices)
def test_pack_keeps_every_code(w):
    q = hb.quantize(torch.from_numpy(w))
    packed = hb.pack(q)
    assert packed.shape == q.shape == w.shape
    assert torch.equal(unpack(packed.core), q.codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_read_as_their_float32(dtype):
    w = torch.randn(17, 33).to(dtype)
    q, wide = hb.quantize(w), hb.quantize(w.float())
    assert torch.equal(q.codes, wide.codes) and torch.equal(q.scale, wide.scale)
    same(q.codes, quantize_rows_ref(w, symmetric=True).codes)


def test_the_kind_of_the_input_is_kept():
    w = np.random.default_rng(0).standard_normal((5, 9), np.float32)
    for q, kind in ((hb.quantize(w), np.ndarray), (hb.quantize(torch.from_numpy(w)), torch.Tensor)):
        assert isinstance(q.codes, kind) and isinstance(q.scale, kind) and isinstance(hb.dequantize(q), kind)
        assert q.shape == (5, 9) and q.nbytes == 5 * 9 + 5 * 4 and q.scheme == hb.Scheme.parse("w8a8")
        assert "5x9" in repr(q) and "w8a8" in repr(q)


def test_a_parameter_and_a_transposed_view():
    w = torch.nn.Parameter(torch.randn(12, 7))
    assert torch.equal(hb.quantize(w.t()).codes, hb.quantize(w.t().contiguous()).codes)
    assert not hb.quantize(w).scale.requires_grad


def test_known_codes():
    q = hb.quantize(np.array([[127.0, -64.0, 0.5, 1.5, -2.5], [0, 0, 0, 0, 0]], np.float32))
    assert q.codes.tolist() == [[127, -64, 0, 2, -2], [0, 0, 0, 0, 0]] and q.scale.tolist() == [1.0, 1.0]
    rows = hb.quantize_rows(np.array([[0, 255.0, 0.5, 1.5], [-255.0, 0, -127.5, 1e-30]], np.float32))
    assert rows.codes.tolist() == [[-128, 127, -128, -126], [-128, 127, -1, 127]]
    assert rows.scale.tolist() == [1.0, 1.0] and rows.zero.tolist() == [-128, 127]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(bad):
    w = np.ones((6, 40), np.float32)
    w[4, 39] = w[5, 0] = bad
    with pytest.raises(hb.NonFiniteError, match=r"encoder\.fc\.weight .*row 4"):
        hb.quantize(w, name="encoder.fc.weight")


def test_a_row_that_is_not_finite_is_marked():
    q = hb.quantize_rows(torch.tensor([[1.0, torch.inf], [1.0, 2.0], [torch.nan, 0.0]]))
    assert q.scale.isnan().tolist() == [True, False, True]
    assert q.codes[0].tolist() == q.codes[2].tolist() == [0, 0] and q.sums.tolist()[::2] == [0, 0]


def test_static_rows():
    x = torch.tensor([[-1.0, 0.0, 0.26, 100.0]])
    q = hb.quantize_rows(x, scale=0.5, zero=-3)
    assert q.codes.tolist() == [[-5, -3, -2, 127]] and q.scale.tolist() == [0.5] and q.zero.tolist() == [-3]


W = np.ones((3, 4), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: hb.quantize([[1.0]]), hb.DTypeError, "numpy array or a torch tensor, not list"),
        (
            lambda: hb.quantize(W.astype(np.float64), name="up"),
            hb.DTypeError,
            "up has the dtype float64.*float32",
        ),
        (lambda: hb.quantize(torch.ones(3, 4, dtype=torch.int8)), hb.DTypeError, "torch.int8.*bfloat16"),
        (lambda: hb.quantize(W[0], name="up"), hb.ShapeError, r"up has the shape \(4,\)"),
        (lambda: hb.quantize(W[:0]), hb.ShapeError, "nothing in it"),
        (lambda: hb.quantize(W[:, :0]), hb.ShapeError, "nothing in it"),
        (lambda: hb.quantize(np.ones((1, 65793), np.float32)), hb.ShapeError, "65792"),
        (
            lambda: hb.quantize(torch.ones(3, 4, device="meta"), name="up"),
            hb.DeviceError,
            "up is on the meta device",
        ),
        (lambda: hb.quantize(torch.eye(3).to_sparse()), hb.DeviceError, "to_dense"),
        (lambda: hb.quantize(W, "w9a9"), hb.SchemeError, "w9a9"),
        (lambda: hb.quantize_rows(W, scale=0.1), ValueError, "together"),
        (lambda: hb.quantize_rows(W, scale=0.1, zero=0, symmetric=True), ValueError, "symmetric"),
        (lambda: hb.quantize_rows(W, scale=0.1, zero=128), ValueError, "zero point is 128"),
        (lambda: hb.quantize_rows(W, scale=0.1, zero=0.5), ValueError, "zero point is 0.5"),
        (lambda: hb.quantize_rows(W, scale=np.nan, zero=0), ValueError, "scale is nan"),
        (lambda: hb.quantize_rows(W, scale=1e-40, zero=0), ValueError, "at least"),
        (lambda: hb.quantize_rows(W[:, :0]), hb.ShapeError, "k must be at least 1"),
        (lambda: hb.pack(W), hb.DTypeError, "QuantizedTensor"),
        (lambda: hb.QuantizedTensor(W, W[:, 0], hb.Scheme(8, 8)), hb.DTypeError, "codes.*int8"),
        (lambda: hb.QuantizedTensor(W.astype(np.int8), W[0], hb.Scheme(8, 8)), hb.ShapeError, r"\[n\]"),
        (
            lambda: hb.QuantizedTensor(W.astype(np.int8), torch.ones(3), hb.Scheme(8, 8)),
            hb.DTypeError,
            "numpy",
        ),
    ],
)
def test_mistakes_are_explained(call, error, says):
    with pytest.raises(error, match=says):
        call()
