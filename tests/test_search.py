"""search.encode: every method for any numbers, what each promises, and the corners of float32."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfbyte import search
from halfbyte.errors import SchemeError
from halfbyte.quantized_tensor import QuantizedTensor, to_nibbles
from halfbyte.scheme import Scheme

SCHEMES = ("w8a8", "w8a8+asym", "w8a16_g32", "w8a16_g64+asym", "w4a8", "w4a8+asym", "w4a16_g32")
SCHEMES += ("w4a16_g64+asym", "w4a16_g128", "w4a16_g64+nf4")
PAIRS = [(s, m) for s in SCHEMES for m in search.METHODS if m != "hqq" or "_g64+asym" in s]
each_pair = pytest.mark.parametrize("scheme, method", PAIRS)

# Rows with a size of their own between 2^-60 and 2^60, zeros and outliers among the numbers.
matrices = st.builds(
    lambda w, sizes: w * np.float32(2) ** sizes[: len(w), None],
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 150)),
        elements=st.one_of(st.floats(-1, 1, width=32), st.just(0.0), st.floats(-50, 50, width=16)),
    ),
    hnp.arrays(np.int32, 4, elements=st.integers(-60, 60)).map(lambda e: e.astype(np.float32)),
)


def quantized(w: np.ndarray, scheme: str, method: str, **more) -> QuantizedTensor:
    """The result of `encode` as a QuantizedTensor, which checks shapes, dtypes and ranges."""
    parsed = Scheme.parse(scheme)
    parts = search.encode(w, parsed, method, **more)
    codes = parts.pop("codes_unpacked")
    assert codes.shape == w.shape and codes.dtype == (np.uint8 if parsed.weight_bits == 4 else np.int8)
    if parsed.weight_bits == 4:
        assert codes.max() <= 15
        codes = to_nibbles(codes)
    elif not parsed.asym:
        assert codes.min() >= -127
    return QuantizedTensor(codes, scheme=parsed, k=w.shape[1], **parts)


def per_group(x: np.ndarray, group: int) -> np.ndarray:
    """The sums of x [n, k] over each group: [n, groups]."""
    return np.add.reduceat(x, np.arange(0, x.shape[1], group or x.shape[1]), axis=1)


def steps(q: QuantizedTensor) -> np.ndarray:
    """The distance of two neighbouring codes at each element: float64 [n, k]."""
    step = q.scale[:, None].astype(np.float64)
    if q.group_scale is None:
        return np.broadcast_to(step, q.shape)
    return step * np.repeat(q.group_scale.astype(np.float64), q.scheme.group, 1)[:, : q.shape[1]]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_pairs_are_all_that_make_sense():
    assert {m for _, m in PAIRS} == set(search.METHODS) and search.DEFAULT_INT4 in search.METHODS


@each_pair
@settings(max_examples=25, deadline=None)
@given(w=matrices)
def test_any_numbers(scheme, method, w):
    q = quantized(w, scheme, method)
    back = q.dequantize()
    assert np.isfinite(back).all()
    if q.group_scale is not None:
        assert q.group_scale.dtype == np.float16 and q.group_scale.max() <= 1
        assert (np.frexp(q.scale)[0] == 0.5).all(), "a power of two"
    if q.minimum is None:
        assert (back[w == 0] == 0).all()
    assert (back[~w.any(1)] == 0).all()


@pytest.mark.parametrize("scheme, limit", [("w8a16_g32", 0.5), ("w4a8", 0.5), ("w4a16_g32", 0.5)])
@settings(max_examples=50, deadline=None)
@given(w=matrices)
def test_absmax_rounds_to_the_nearest_code(scheme, limit, w):
    q = quantized(w, scheme, "absmax")
    # A group scale rounded to 11 bits moves the largest element by 127 * 2^-11 steps.
    error = np.abs(q.dequantize().astype(np.float64) - w)
    assert (error <= steps(q) * (limit + 127 * 2.0**-11)).all()


@settings(max_examples=50, deadline=None)
@given(w=matrices)
def test_a_rounded_zero_point_costs_up_to_half_a_step(w):
    for scheme in ("w4a8+asym", "w4a16_g64+asym", "w8a8+asym"):
        q = quantized(w, scheme, "absmax")
        assert (np.abs(q.dequantize().astype(np.float64) - w) <= steps(q) * 1.13).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=25, deadline=None)
@given(w=matrices)
def test_a_search_never_loses_to_absmax(scheme, w):
    w /= np.maximum(np.abs(w).max(1, keepdims=True), np.float32(2.0**-70))  # no square underflows

    def loss(method: str, weights: np.ndarray | float = 1.0) -> np.ndarray:
        error = quantized(w, scheme, method).dequantize().astype(np.float64) - w
        return per_group(error**2 * weights, Scheme.parse(scheme).group)

    slack = 1 + 1e-4  # the search adds in float32
    assert (loss("mse") <= loss("absmax") * slack + 1e-12).all()
    if "_g64+asym" not in scheme:  # there, a float minimum takes the place of absmax's zero point
        weights = search.importance(w)
        assert (loss("weighted", weights) <= loss("absmax", weights) * slack + 1e-12).all()


@settings(max_examples=50, deadline=None)
@given(w=matrices)
def test_hqq_lowers_the_sum_of_powers(w):
    group = 64
    q = quantized(w, "w4a16_g64+asym", "hqq")
    cost = per_group((np.abs(q.dequantize() - w) / steps(q)) ** 0.7, group)
    starts = np.arange(0, w.shape[1], group)
    first = q.group_scale.astype(np.float32), np.minimum(np.minimum.reduceat(w, starts, 1), 0)
    low = (first[1] / q.scale[:, None]).astype(np.float16).astype(np.float32)
    scale, low = (np.repeat(a, group, 1)[:, : w.shape[1]] for a in (first[0], low))
    unit = w / q.scale[:, None]
    start = np.clip(np.rint((unit - low) * (1 / scale)), 0, 15) * scale + low
    before = per_group((np.abs(start - unit) / scale) ** 0.7, group)
    # Errors below 1e-4 steps count as proportional to their size in the search.
    assert (cost <= before * (1 + 1e-3) + group * 1e-3).all()


@each_pair
def test_the_number_of_threads_changes_nothing(scheme, method):
    w = normal(70, 3001)
    one, many = (search.encode(w, Scheme.parse(scheme), method, threads=t) for t in (1, 5))
    for field, array in one.items():
        assert (array is None) == (many[field] is None)
        assert array is None or array.tobytes() == many[field].tobytes(), field


@each_pair
def test_rows_do_not_depend_on_their_size(scheme, method):
    w = normal(6, 200)
    sizes = np.float32(2.0) ** np.array([-80, -20, 0, 1, 60, 120], np.float32)
    if method == "weighted":  # its importances come from all rows
        sizes[:] = 2.0**-30
    q, scaled = quantized(w, scheme, method), quantized(w * sizes[:, None], scheme, method)
    assert (q.codes == scaled.codes).all() and (q.scale * sizes == scaled.scale).all()
    for part in ("group_scale", "zero", "minimum"):
        assert np.array_equal(getattr(q, part), getattr(scaled, part))


@each_pair
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 2.0**126, -(2.0**126), 2.0**-90, 1e-45, -1e-38])
@pytest.mark.parametrize("shape", [(1, 1), (2, 65), (1, 128)])
def test_constant_matrices(scheme, method, value, shape):
    w = np.full(shape, value, np.float32)
    q = quantized(w, scheme, method)
    back = q.dequantize()
    if abs(value) < 2.0**-93:
        assert (back == 0).all() and (q.unpacked() == (0 if q.zero is None else q.zero[0, 0])).all()
    else:
        assert np.abs(back / w - 1).max() < 2.0**-9, "an end of the range is nearly exact"


@each_pair
def test_small_groups_beside_a_large_one(scheme, method):
    w = normal(3, 320) * np.repeat(np.float32([1, 2.0**-10, 2.0**-20, 0, 2.0**-40]), 64)
    q = quantized(w, scheme, method)
    back = q.dequantize()
    if q.scheme.group and q.scheme.group <= 64:
        assert (back[:, 192:256] == 0).all()
        for part in (slice(0, 64), slice(64, 128), slice(128, 192)):
            relative = np.linalg.norm((back - w)[:, part]) / np.linalg.norm(w[:, part])
            assert relative < (0.2 if q.scheme.weight_bits == 4 else 0.02)
    assert (np.abs(back[:, 256:]) <= 2.0**-20 * steps(q).max() + steps(q)[:, 256:]).all()


@pytest.mark.parametrize("method", ["weighted", "mse", "absmax"])
def test_weights_on_a_grid_are_met_exactly(method):
    u = np.random.default_rng(1).integers(0, 16, (8, 96))
    u[:, ::32], u[:, 1::32] = 0, 15
    scheme = "w4a16_g32+asym" if method == "weighted" else "w4a16_g32"
    w = ((u - (6.5 if method == "weighted" else 8)) * 2.0**-7).astype(np.float32)
    assert (quantized(w, scheme, method).dequantize() == w).all()


def test_any_array_of_floats():
    w = normal(40, 130)
    want = quantized(w[::2, 1:], "w4a16_g32", "weighted")
    again = quantized(np.asfortranarray(w[::2, 1:]), "w4a16_g32", "weighted")
    assert (want.codes == again.codes).all()
    assert quantized(w.astype(np.float16), "w8a8", "mse").codes.shape == w.shape


def test_importance():
    w = normal(512, 64)
    assert np.median(search.importance(w)) == pytest.approx(1, abs=0.02)
    assert np.abs(np.log(search.importance(w))).max() < 0.7, "columns alike matter alike"
    w[:, 3] /= 4
    w[:, 5] = 0
    w[:, 7] = np.where(np.arange(512) == 9, 1, 2.0**-20)
    for size in (1.0, 2.0**-100, 2.0**110):
        found = search.importance(w * np.float32(size))
        assert 2 < found[3] < 8 and found[5] == 1 and found[7] == 32
    assert (search.importance(np.zeros((3, 4), np.float32)) == 1).all()


def test_weighted_spends_its_error_where_columns_matter_little():
    w = normal(256, 64)
    w[:, :8] /= 3
    plain, weighted = (quantized(w, "w4a16_g64", m).dequantize() - w for m in ("mse", "weighted"))
    assert np.linalg.norm(weighted[:, :8]) < np.linalg.norm(plain[:, :8])


@pytest.mark.parametrize("scheme", ["w4a16_g64", "w4a8+asym", "w8a8", "w4a16_g64+nf4"])
def test_hqq_needs_a_place_for_its_minimum(scheme):
    with pytest.raises(SchemeError, match=r"_g64\+asym"):
        search.encode(normal(2, 64), Scheme.parse(scheme), "hqq")


def test_an_unknown_method_is_named():
    with pytest.raises(SchemeError, match="'best'.*absmax, mse, weighted, hqq"):
        search.encode(normal(2, 64), Scheme.parse("w4a16_g64"), "best")
