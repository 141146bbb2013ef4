"""attention: every kernel against the reference, bit for bit, and float64; what changes no bit; errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

import halfbyte as hb
from corecall import CODE, Placed, same
from halfbyte import _core
from halfbyte.reference import attention_ref

KERNELS = [row for row in _core.kernels() if row["op"] == "attention" and row["supported"]]
STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
# batch, heads, kv heads, queries, keys, head size: around the sizes of vectors (8, 16), of blocks of keys and
# rows (64), of tiles (6, or 32 keys), and of the rows that the kernel for few takes (4 at a time up to 12).
SHAPES = (
    (1, 1, 1, 1, 1, 1),
    (2, 2, 1, 5, 63, 7),
    (1, 3, 1, 1, 65, 64),
    (1, 9, 3, 4, 200, 64),
    (2, 4, 4, 13, 64, 32),
    (1, 2, 2, 97, 70, 40),
    (1, 1, 1, 31, 129, 128),
    (1, 4, 2, 3, 97, 80),
    (1, 1, 1, 17, 33, 256),
    (1, 8, 1, 11, 12, 96),
)


def operands(shape, storage=torch.float32, dtype=torch.float32, spread=1.0):
    """q, k, v of random numbers, and the scales of int8 as keyword arguments."""
    batch, heads, kv_heads, queries, keys, d = shape
    q = (torch.randn(batch, heads, queries, d) * spread).to(dtype)
    k, v = torch.randn(2, batch, kv_heads, keys, d)
    if storage == torch.int8:
        (k, k_scale), (v, v_scale) = hb.quantize_kv(k), hb.quantize_kv(v)
        return (q, k, v), {"k_scale": k_scale, "v_scale": v_scale}
    return (q, k.to(storage), v.to(storage)), {}


def masks(shape):
    """Masks of both kinds and many shapes, some of which rule out all keys of a query."""
    batch, heads, _, queries, keys, _ = shape
    sizes = [
        (batch, heads, queries, keys), (batch, 1, queries, keys), (batch, 1, 1, keys), (heads, 1, keys),
        (queries, keys), (queries, 1), (keys,), (1, 1, 1, 1),
    ]  # fmt: skip
    seen = [torch.rand(size) < 0.6 for size in sizes]
    added = [torch.randn(size) * 3 for size in sizes]
    infinite = [bias.masked_fill(torch.rand(bias.shape) < 0.4, -math.inf) for bias in added]
    transposed = (torch.rand(keys, queries) < 0.5).T, torch.randn(keys, queries).T
    lowest = torch.where(torch.rand(queries, keys) < 0.5, torch.finfo(torch.float32).min, 0.0)
    return *seen, *added, *infinite, *transposed, lowest, lowest.clamp(min=-1e30), added[4].half()


def truth(q, k, v, *, mask=None, causal=False, window=0, scale=None, k_scale=None, v_scale=None):
    """attention in float64 all at once, and the bound of op.h on the error of a float32 result."""
    u, (queries, d), keys = 2.0**-24, q.shape[2:], k.shape[2]
    if 0 in (queries, keys):
        return q.double() * 0, q.double() * 0
    k, v = (
        x.double() if s is None else x.double() * s.double()[..., None]
        for x, s in ((k, k_scale), (v, v_scale))
    )
    q, k, v = q.double(), *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scale = 1 / math.sqrt(d) if scale is None else scale
    s, size = q @ k.mT * scale, q.abs() @ k.abs().mT * abs(scale)
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    seen = ((distance >= 0) | (not causal)) & ((distance < window) | (window == 0)) & (s == s)
    bias = torch.zeros(())
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
        bias = bias if mask.dtype == torch.bool else mask.double().where(mask != -math.inf, 0)
    s = (s + bias).where(seen, -math.inf)
    p = s.softmax(-1).nan_to_num(0)
    largest = torch.maximum(s.where(seen, 0).abs(), (bias * seen).abs()).amax(-1, keepdim=True)
    reach = size.where(seen, 0).amax(-1, keepdim=True)
    w = ((d + 4) * reach + 3 * largest + 3) * u
    return p @ v, (2 * w + (keys + 6 * math.ceil(keys / 64) + 20) * u) * (p @ v.abs())


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda row: row["isa"])
def test_every_kernel_gives_the_bits_of_the_reference(kernel, storage, one_thread_of_torch):
    _core.force_isa(kernel["isa"])
    assert _core.select("attention") == kernel["name"]
    options = ({}, {"causal": True}, {"causal": True, "window": 9}, {"window": 70, "scale": -0.3})
    for i, shape in enumerate(SHAPES):
        dtype = STORAGE[i % 3]
        given, scales = operands(shape, storage, dtype)
        for option in options:
            same(
                hb.attention(*given, **scales, **option),
                attention_ref(*given, **scales, **option),
                f"{shape} {option}",
            )


@pytest.mark.parametrize(
    "shape", [(2, 2, 1, 5, 63, 7), (1, 9, 3, 4, 200, 64), (2, 4, 4, 13, 64, 32), (1, 2, 2, 97, 70, 40)]
)
def test_masks(shape, one_thread_of_torch):
    given, _ = operands(shape)
    for mask, causal in itertools.product(masks(shape), (False, True)):
        option = {"mask": mask, "causal": causal, "window": 30 * causal}
        want = attention_ref(*given, **option)
        for kernel in KERNELS:
            _core.force_isa(kernel["isa"])
            what = f"{kernel['isa']} {mask.dtype} {tuple(mask.shape)} {causal=}"
            same(hb.attention(*given, **option), want, what)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_the_error_is_within_the_bound(storage, spread):
    for shape in SHAPES:
        given, scales = operands(shape, storage, spread=spread)
        for option in ({}, {"causal": True}, {"mask": torch.randn(shape[3], shape[4]) * 4}):
            got = hb.attention(*given, **scales, **option)
            want, bound = truth(*given, **scales, **option)
            excess = ((got.double() - want).abs() - bound - want.abs() * 2.0**-24).max()
            assert excess <= 0, f"{shape} {option} exceeds the bound by {excess}"


@pytest.mark.parametrize(("keys", "queries"), list(itertools.product((0, 1, 63, 64, 65, 200), (0, 1, 5, 97))))
def test_sizes(keys, queries, one_thread_of_torch):
    for d, option in ((1, {}), (32, {"causal": True}), (40, {"causal": True, "window": 7})):
        given, _ = operands((1, 3, 1, queries, keys, d))
        got = hb.attention(*given, **option)
        same(got, attention_ref(*given, **option), f"{d=} {option}")
        want, bound = truth(*given, **option)
        assert ((got.double() - want).abs() <= bound + want.abs() * 2.0**-24).all()


def test_torch_agrees():
    """Where torch means the same: its causal mask begins at the first key, and it has no window."""
    shape = (2, 9, 3, 50, 50, 64)
    given, _ = operands(shape)
    for mask in (None, *masks(shape)):
        if mask is not None and (mask.dtype == torch.float16 or mask.ndim < 2):
            continue
        for causal in (False, True) if mask is None else (False,):
            want = sdpa(*given, attn_mask=mask, is_causal=causal, enable_gqa=True)
            torch.testing.assert_close(
                hb.attention(*given, mask=mask, causal=causal), want, atol=2e-6, rtol=1e-5
            )


@pytest.mark.parametrize("queries", [1, 3, 20])
def test_who_may_see_nothing_gets_zeros(queries):
    q, k, v = operands((1, 3, 1, queries, 130, 64))[0]
    seen = torch.rand(queries, 130) < 0.5
    seen[queries // 2] = False
    for mask in (seen, torch.zeros(queries, 130).masked_fill(~seen, -math.inf)):
        got = hb.attention(q, k, v, mask=mask)
        assert not got[:, :, queries // 2].any() and got.isfinite().all()
        assert queries == 1 or got[:, :, 0].any()
    assert not hb.attention(q, k[:, :, :0], v[:, :, :0]).any()
    # More queries than keys: the first ones stand before the first key.
    got = hb.attention(q, k[:, :, :1], v[:, :, :1], causal=True)
    assert not got[:, :, : queries - 1].any() and (got[:, :, -1] == v[:, :, 0]).all()
    # The lowest number is a bias like others: where all have it, all count alike.
    got = hb.attention(q, k, v, mask=torch.full((130,), torch.finfo(torch.float32).min))
    torch.testing.assert_close(got, v.mean(2, keepdim=True).expand_as(got), atol=1e-6, rtol=0)


@pytest.mark.parametrize("queries", [2, 3, 40])
def test_nan_stays_where_it_is(queries):
    q, k, v = operands((1, 2, 1, queries, 90, 64))[0]
    clean = hb.attention(q, k, v)
    q[0, 1, 1, 5] = math.nan
    got = hb.attention(q, k, v)
    assert got[0, 1, 1].isnan().all()
    got[0, 1, 1] = clean[0, 1, 1]
    same(got, clean, "the others")
    q = operands((1, 2, 1, queries, 90, 64))[0][0]
    mask = torch.ones(90, dtype=torch.bool)
    mask[7] = mask[80] = False
    clean = hb.attention(q, k, v, mask=mask)
    k[0, 0, 7] = k[0, 0, 80] = math.nan
    same(hb.attention(q, k, v, mask=mask), clean, "keys ruled out by a mask")
    assert hb.attention(q, k, v).isnan().all()
    k[0, 0, 7] = k[0, 0, 80] = 1
    clean = hb.attention(q, k, v, causal=True)
    k[0, 0, -1] = math.nan
    same(hb.attention(q, k, v, causal=True)[:, :, :-1], clean[:, :, :-1], "keys ruled out by position")
    bias = torch.zeros(queries, 90)
    bias[0, 3] = math.nan
    got = hb.attention(q, k.nan_to_num(), v, mask=bias)
    assert got[:, :, 0].isnan().all() and got[:, :, 1:].isfinite().all()
    k[0, 0, -1], q[0, 0, 0] = 1, math.inf
    assert hb.attention(q, k, v)[0, 0, 0].isnan().all()


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("option", [{}, {"window": 50}], ids=str)
def test_a_cache_gives_what_the_whole_sequence_gives(storage, option):
    """Each query alone, four by four, and with all others: the same bits."""
    (q, k, v), scales = operands((1, 6, 2, 150, 150, 64), storage)
    whole = hb.attention(q, k, v, causal=True, **scales, **option)
    for step in (1, 4, 23):
        for first in range(0, 150, step):
            end = min(150, first + step)
            some = {name: scale[:, :, :end] for name, scale in scales.items()}
            got = hb.attention(
                q[:, :, first:end], k[:, :, :end], v[:, :, :end], causal=True, **some, **option
            )
            same(got, whole[:, :, first:end], f"queries {first} to {end}")


def test_padding_changes_nothing():
    q, k, v = operands((3, 4, 4, 30, 200, 32))[0]
    lengths = (200, 65, 7)
    seen = (torch.arange(200) < torch.tensor(lengths)[:, None])[:, None, None]
    masked = hb.attention(q, k, v, mask=seen)
    for i, n in enumerate(lengths):
        same(masked[i, None], hb.attention(q[i, None], k[i, None, :, :n], v[i, None, :, :n]), f"{n} keys")


@pytest.mark.parametrize("storage", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("queries", [1, 300])
def test_threads_change_nothing(storage, queries):
    given, scales = operands((3, 6, 3, queries, 4000 // queries + 300, 64), storage)
    try:
        results = []
        for threads in (1, 2, 3, 8):
            hb.set_num_threads(threads)
            results.append(hb.attention(*given, causal=True, **scales))
    finally:
        hb.set_num_threads(0)
    for result in results[1:]:
        same(result, results[0], "threads")


def test_views_are_read_in_place():
    """Heads inside rows, heads and sequences that repeat, keys in a longer cache, elements that lie apart."""
    packed = torch.randn(2, 21, 3 * 4 * 40)
    q, k, v = packed.view(2, 21, 3, 4, 40).permute(2, 0, 3, 1, 4)
    plain = [x.contiguous() for x in (q, k, v)]
    want = hb.attention(*plain, causal=True)
    same(hb.attention(q, k, v, causal=True), want, "packed")
    cache = torch.full((2, 2, 4, 64, 40), math.nan)
    cache[:, :, :, :21] = torch.stack((k, v))
    same(hb.attention(q, *cache[:, :, :, :21], causal=True), want, "cache")
    apart = [x.mT.contiguous().mT for x in plain]
    same(hb.attention(*apart, causal=True), want, "apart")
    k, v = (x[:1, :1].expand(2, 4, 21, 40) for x in (k, v))
    same(hb.attention(q, k, v), hb.attention(q, k.contiguous(), v.contiguous()), "repeated")
    mask = torch.randn(21, 1, 21, 2)[..., 1].permute(1, 0, 2)
    same(hb.attention(q, k, v, mask=mask), hb.attention(q, k, v, mask=mask.contiguous()), "mask")
    out = hb.attention(q, k, v)
    assert (
        out.swapaxes(1, 2).is_contiguous()
        and out.swapaxes(1, 2).reshape(2, 21, 160).data_ptr() == out.data_ptr()
    )


def test_numpy():
    given, _ = operands((2, 6, 2, 19, 70, 40))
    q, k, v = (x.numpy() for x in given)
    want = hb.attention(*given, causal=True)
    got = hb.attention(q, k, v, causal=True)
    assert isinstance(got, np.ndarray)
    same(torch.from_numpy(got), want, "numpy")
    backwards = [np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1] for x in (q, k, v)]
    same(torch.from_numpy(hb.attention(*backwards, causal=True)), want, "negative strides")
    unaligned = np.frombuffer(b"x" + q.tobytes(), np.uint8)[1:].view(np.float32).reshape(q.shape)
    assert not unaligned.flags.aligned
    same(torch.from_numpy(hb.attention(unaligned, k, v, causal=True)), want, "unaligned")
    seen = np.random.default_rng(0).random((19, 70)) < 0.5
    want = hb.attention(*given, mask=torch.from_numpy(seen))
    same(torch.from_numpy(hb.attention(q, k, v, mask=seen)), want, "mask")
    half = [x.astype(np.float16) for x in (q, k, v)]
    want = hb.attention(*(x.half() for x in given), mask=torch.from_numpy(seen))
    got = torch.from_numpy(hb.attention(*half, mask=np.where(seen, 0.0, -np.inf)))  # float64
    same(got, want, "float16")


@pytest.mark.parametrize("queries", [1, 3, 30])
@pytest.mark.parametrize("dtype", STORAGE[:3], ids=str)
def test_nothing_but_the_output_is_written(queries, dtype):
    (q, k, v), _ = operands((1, 2, 1, queries, 70, 33), dtype, dtype)
    for kernel in KERNELS:
        _core.force_isa(kernel["isa"])
        out = Placed(queries * 2, 33, dtype, "both")
        _core.attention(
            1, queries, 70, 2, 1, 33, q.data_ptr(), (0, 33, queries * 33), CODE[dtype], k.data_ptr(),
            (0, 33, 0), v.data_ptr(), (0, 33, 0), CODE[dtype], 0, (0, 0, 0), 0, (0, 0, 0), 0.2, True,
            70 - queries, 0, 0, 0, (0, 0, 0, 0), out.ptr, (0, 2 * out.ld, out.ld), CODE[dtype], 1,
        )  # fmt: skip
        got = out.check().view(1, queries, 2, 33).swapaxes(1, 2)
        same(got, attention_ref(q, k, v, causal=True, scale=0.2), "output")


def test_quantize_kv():
    x = torch.randn(2, 3, 5, 64)
    codes, scale = hb.quantize_kv(x)
    assert codes.dtype == torch.int8 and scale.shape == (2, 3, 5)
    assert ((codes * scale[..., None] - x).abs() <= scale[..., None] * 0.5001).all()
    same(scale, x.abs().amax(-1) / 127, "scale")
    x[0, 0, 0, 0] = math.nan
    assert hb.quantize_kv(x).scale.isnan().sum() == 1
    assert hb.quantize_kv(np.ones((2, 0, 4), np.float32)).codes.shape == (2, 0, 4)
    with pytest.raises(hb.ShapeError, match="single number"):
        hb.quantize_kv(torch.tensor(1.0))


Q, K = torch.zeros(2, 6, 5, 8), torch.zeros(2, 3, 7, 8)
CODES, SCALES = torch.zeros(2, 3, 7, 8, dtype=torch.int8), torch.ones(2, 3, 7)


@pytest.mark.parametrize(
    ("given", "options", "error", "says"),
    [
        (([1], K, K), {}, hb.DTypeError, "q must be a numpy array or a torch tensor, not list"),
        ((Q, K.numpy(), K), {}, hb.DTypeError, "k must be a torch tensor as q is"),
        ((Q.double(), K, K), {}, hb.DTypeError, "q has the dtype torch.float64"),
        ((Q, K, K.half()), {}, hb.DTypeError, "k has the dtype torch.float32 and v torch.float16"),
        ((Q, K.double(), K.double()), {}, hb.DTypeError, "k has the dtype torch.float64"),
        ((Q[0], K, K), {}, hb.ShapeError, r"q has the shape \(6, 5, 8\); it must be \[batch, heads,"),
        ((Q, K, K[:, :, :3]), {}, hb.ShapeError, "they must be equal"),
        ((Q[:1], K, K), {}, hb.ShapeError, "their batch and head_size must be equal"),
        ((Q[:, :4], K, K), {}, hb.ShapeError, "q has 4 heads of 8 elements and k 3 heads"),
        ((Q[..., :0], K[..., :0], K[..., :0]), {}, hb.ShapeError, "none of them zero"),
        ((Q, K[:, :0], K[:, :0]), {}, hb.ShapeError, "none of them zero"),
        ((Q, K, K), {"mask": torch.zeros(5, 6)}, hb.ShapeError, r"to .* here \(2, 6, 5, 7\)"),
        ((Q, K, K), {"mask": torch.zeros(5, 7, dtype=int)}, hb.DTypeError, "boolean or floating point"),
        ((Q, K, K), {"mask": np.zeros((5, 7))}, hb.DTypeError, "mask must be a torch tensor"),
        ((Q, K, K), {"window": -1}, ValueError, "window is -1"),
        ((Q, K, K), {"window": 2.5}, ValueError, "window is 2.5"),
        ((Q, K, K), {"k_scale": SCALES}, ValueError, "k_scale and v_scale are for int8 codes"),
        ((Q, CODES, CODES), {"k_scale": SCALES}, ValueError, "int8 keys and values need v_scale"),
        ((Q, CODES, CODES), {"k_scale": SCALES, "v_scale": SCALES[:1]}, hb.ShapeError, "v_scale has"),
        ((Q, CODES, CODES), {"k_scale": SCALES.half(), "v_scale": SCALES}, hb.DTypeError, "must be float32"),
        ((Q, torch.zeros_like(K, requires_grad=True), K), {}, ValueError, "k requires a gradient"),
        ((Q.to("meta"), K, K), {}, hb.DeviceError, "q is on the meta device"),
    ],
)  # fmt: skip
def test_bad_arguments(given, options, error, says):
    with pytest.raises(error, match=says):
        hb.attention(*given, **options)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"queries": -1}, "negative shape"),
        ({"heads": 3}, "3 heads are no multiple of 2"),
        ({"head_size": 0}, "heads of 0 elements"),
        ({"q_type": 3}, "queries and output must be"),
        ({"out_type": 3}, "queries and output must be"),
        ({"kv_type": 4}, "unknown code 4"),
        ({"kv_type": 3}, "int8 keys and values need their scales"),
        ({"k_scale": 1}, "only int8 keys and values have scales"),
        ({"mask_kind": 1}, "a mask needs a kind and memory"),
        ({"mask": 1}, "a mask needs a kind and memory"),
        ({"mask_kind": 3, "mask": 1}, "unknown code 3"),
        ({"window": -1}, "a window of -1"),
        ({"offset": 2**41}, "offset"),
        ({"q": 0}, "queries or output have no memory"),
        ({"v": 0}, "keys or values have no memory"),
        ({"out_strides": (64, 3, 4)}, "output rows overlap"),
        ({"out_strides": (64, 8, 3)}, "output heads overlap"),
    ],
)  # fmt: skip
def test_the_core_checks_its_arguments(changed, says):
    p, strides = torch.zeros(256).data_ptr(), (64, 16, 4)
    given = {
        "batch": 1, "queries": 2, "keys": 2, "heads": 2, "kv_heads": 2, "head_size": 4, "q": p,
        "q_strides": strides,
        "q_type": 0, "k": p, "k_strides": strides, "v": p, "v_strides": strides, "kv_type": 0, "k_scale": 0,
        "k_scale_strides": (0, 0, 0), "v_scale": 0, "v_scale_strides": (0, 0, 0), "scale": 1.0,
        "causal": False, "offset": 0, "window": 0, "mask": 0, "mask_kind": 0, "mask_strides": (0, 0, 0, 0),
        "out": p, "out_strides": strides, "out_type": 0, "threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=says):
        _core.attention(*(given | changed).values())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_calls(data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    kv_heads, group = draw(1, 2, 3), draw(1, 2, 3, 5)
    sizes = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 140)), data.draw(st.integers(1, 70))
    shape = (draw(1, 2), kv_heads * group, kv_heads, *sizes)
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    given, options = operands(shape, draw(*STORAGE), draw(*STORAGE[:3]), draw(0.1, 1.0, 20.0))
    options |= {"causal": draw(False, True), "window": draw(0, 1, 30, 100), "mask": draw(None, *masks(shape))}
    with hb.force_isa(draw(*(row["isa"] for row in KERNELS))):
        same(hb.attention(*given, **options), attention_ref(*given, **options), f"{shape}")
