"""KVCache by itself: growing, windows, cropping, choosing sequences, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte as hb

DTYPES = ["float32", "bfloat16", "float16", "int8"]
BLOCKS, BATCH, HEADS, SIZE = 2, 3, 2, 5


def make(dtype="float32", capacity=0, batch=BATCH):
    return hb.KVCache(BLOCKS, batch, HEADS, SIZE, dtype=dtype, capacity=capacity)


def tensors(cache):
    return [t for t in (cache.k, cache.v, cache.k_scale, cache.v_scale) if t is not None]


def append(cache, first, count, window=0):
    """Token i has the value i + its sequence / 8 everywhere, in v with the other sign."""
    before = cache.k.data_ptr()
    cache.make_room(count, window)
    ids = torch.arange(first, first + count) + torch.arange(cache.shape.batch)[:, None] / 8
    for t, sign in zip(tensors(cache), (1, -1, 1, -1), strict=False):
        values = sign * ids[None, :, None, :]
        t[:, :, :, cache.length : cache.length + count] = values if t.ndim == 4 else values[..., None]
    cache.length += count
    return cache.k.data_ptr() != before


def held(cache, sequence=0):
    """The tokens of a sequence, checked everywhere."""
    for t, sign in zip(tensors(cache), (1, -1, 1, -1), strict=False):
        part = t[:, sequence, :, : cache.length].float() * sign
        rows = part if t.ndim == 4 else part[..., 0]
        assert (part == (rows[:1, :1] if t.ndim == 4 else rows[:1, :1, :, None])).all()
    return (cache.k[0, sequence, 0, : cache.length, 0].float() - sequence / 8).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory(dtype):
    cache = make(dtype, capacity=7)
    assert cache.dtype is getattr(torch, dtype) and cache.capacity == 7 and cache.get_seq_length() == 0
    assert cache.k.shape == cache.v.shape == (BLOCKS, BATCH, HEADS, 7, SIZE)
    elements = BLOCKS * BATCH * HEADS * 7
    scales = 2 * 4 * elements if dtype == "int8" else 0
    assert cache.nbytes == 2 * elements * SIZE * cache.dtype.itemsize + scales
    assert (cache.k_scale is None) == (dtype != "int8")
    assert dtype in repr(cache) and "0 tokens" in repr(cache)
    assert make(cache.dtype).dtype is cache.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_growing_keeps_what_is_held(dtype):
    cache = make(dtype)
    moves = sum(append(cache, i, 1) for i in range(120))
    assert moves <= 3, "it should double"
    # int8 holds whole numbers only, as bytes: what it is given is not quantized here
    if dtype != "int8":
        assert held(cache) == list(range(120))
        assert held(cache, 1) == list(range(120)) or dtype != "float32"
    before = cache.capacity
    cache.grow(before)
    assert cache.capacity == before
    cache.grow(before + 1)
    assert cache.capacity == 2 * before


def test_memory_made_in_inference_mode_is_like_any_other():
    with torch.inference_mode():
        cache = make(capacity=4)
    assert not cache.k.is_inference()


def test_crop_and_reset():
    cache = make()
    append(cache, 0, 10)
    cache.crop(-3)
    assert held(cache) == list(range(7))
    append(cache, 50, 2)
    assert held(cache, 2) == [*range(7), 50, 51]
    cache.crop(0)
    assert cache.length == 9
    for wrong in (1, -10):
        with pytest.raises(ValueError, match="9 are held"):
            cache.crop(wrong)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.capacity


@pytest.mark.parametrize("window", [1, 2, 7, 40])
def test_a_window_drops_what_it_needs_no_more(window):
    cache = make()
    for i in range(500):
        append(cache, i, 1, window)
        assert cache.get_seq_length() == i + 1
        assert held(cache)[-min(window, i + 1) :] == list(range(i + 1))[-window:]
        assert cache.dropped == held(cache)[0]
    assert cache.version <= 500 / min(50, window + 32)
    assert cache.capacity <= max(200, 4 * window)
    with pytest.raises(ValueError, match="dropped"):
        cache.crop(-1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.lists(st.integers(1, 60), max_size=30))
def test_any_chunks_through_any_window(window, chunks):
    cache, seen = make(batch=1), 0
    for count in chunks:
        append(cache, seen, count, window)
        seen += count
        assert cache.dropped + cache.length == seen
        assert held(cache) == list(range(cache.dropped, seen))
        assert cache.length >= min(seen, count + window - 1)
        assert cache.capacity < 4 * (max(chunks) + window + 64)


def test_sequences():
    cache = make()
    append(cache, 0, 6)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert cache.k[0, :, 0, 3, 0].tolist() == [3.25, 3.25, 3.0]
    cache.batch_repeat_interleave(2)
    assert cache.shape.batch == 6 and cache.v[1, :, 1, 2, 4].tolist() == [-2.25] * 4 + [-2.0] * 2
    cache.batch_select_indices(torch.tensor([5]))
    assert cache.shape.batch == 1 and held(cache) == list(range(6))
    append(cache, 6, 100)
    assert held(cache) == list(range(106))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies(copied):
    cache = make()
    append(cache, 0, 6)
    other = copied(cache)
    append(cache, 70, 1)
    append(other, 6, 1)
    assert held(other) == list(range(7)) and held(cache) == [*range(6), 70]


def test_arguments():
    with pytest.raises(hb.DTypeError, match="float32, bfloat16, float16, int8"):
        make("int4")
    with pytest.raises(hb.DTypeError):
        make(torch.float64)
    with pytest.raises(hb.ShapeError):
        make(batch=0)
    with pytest.raises(hb.ShapeError):
        make(capacity=-1)
    with pytest.raises(hb.ModelError, match="fuse_"):
        hb.KVCache.for_model(torch.nn.Linear(2, 2))
