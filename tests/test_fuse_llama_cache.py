"""Fused decoders in the generate of transformers, and with its caches and ours."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

import halfbyte as hb
from decoders import (
    BOUND,
    VARIANT,
    all_fused,
    close,
    core_threads,
    make,
    padded,
    pair,
    prompts,
    relative_error,
    row_of,
    transformers,
)
from halfbyte.fuse.stack import FusedStack


@pytest.fixture(autouse=True)
def two_threads(one_thread_of_torch):
    with core_threads(2):
        yield


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# transformers' generate and its caches


def generated(model, ids, **options):
    return model.generate(ids, max_new_tokens=14, **{"do_sample": False} | options)


@VARIANT
def test_generate_greedy(variant):
    model, fused = pair(variant)
    ids, mask = padded("left")
    assert torch.equal(generated(fused, ids, attention_mask=mask), generated(model, ids, attention_mask=mask))
    assert torch.equal(generated(fused, ids[:1]), generated(model, ids[:1]))
    all_fused(fused, 28)


@pytest.mark.parametrize("variant", ["llama", "mistral window"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20, "temperature": 0.8},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"repetition_penalty": 1.3},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: " ".join(options),
)
def test_generate_in_other_ways(options, variant):
    if "prompt_lookup_num_tokens" in options and "window" in variant:
        pytest.skip("transformers cannot crop this cache")
    model, fused = pair(variant)
    ids = prompts(1, 9) if "prompt_lookup_num_tokens" in options else prompts(2, 9)
    found = []
    for m in (model, fused):
        torch.manual_seed(3)
        found.append(generated(m, ids, **options))
    assert torch.equal(*found)
    all_fused(fused)


def test_static_caches_are_left_to_the_model():
    model, fused = pair()
    ids = prompts(1, 6)
    found = [generated(m, ids, cache_implementation="static") for m in (model, fused)]
    assert torch.equal(*found)
    assert set(row_of(fused).unfused_calls) == {"past_key_values is a StaticCache"}


def test_the_cache_holds_views_and_the_unfused_model_goes_on_with_it():
    model, fused = pair()
    ids = prompts(2, 12)
    whole = model(ids).logits
    cache = fused(ids[:, :5]).past_key_values
    first = cache.layers[0].keys
    fused(ids[:, 5:6], past_key_values=cache)
    assert cache.layers[0].keys.data_ptr() == first.data_ptr(), "the tokens before were copied"
    close(model(ids[:, 6:8], past_key_values=cache).logits, whole[:, 6:8])
    close(fused(ids[:, 8:], past_key_values=cache).logits, whole[:, 8:])
    all_fused(fused, 3)


def edits():
    def crop(cache):
        cache.crop(-2)

    def reset(cache):
        cache.reset()

    def zero(cache):
        for layer in cache.layers:
            layer.keys.zero_()

    def replace(cache):
        for layer in cache.layers:
            layer.values = layer.values * 2

    def one_layer(cache):
        cache.layers[1].keys = cache.layers[1].keys + 1

    def reorder(cache):
        cache.reorder_cache(torch.tensor([1, 1]))

    def select(cache):
        cache.batch_select_indices(torch.tensor([1, 0]))

    def shift(cache):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]

    def swap(cache):
        for layer in cache.layers:
            layer.keys, layer.values = layer.values, layer.keys

    return [crop, reset, zero, replace, one_layer, reorder, select, shift, swap]


@pytest.mark.parametrize("edit", edits(), ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("variant", ["llama", "mistral window"])
@pytest.mark.parametrize("inference", [False, True])
def test_edits_of_a_cache_count(edit, variant, inference):
    model, fused = pair(variant)
    tokens = 4 if edit.__name__ in ("crop", "shift") else 9  # before the window is full
    caches = []
    for m in (model, fused):
        with torch.inference_mode(inference):
            caches.append(m(prompts(2, tokens)).past_key_values)
            edit(caches[-1])
    if edit.__name__ == "shift" and "window" in variant:
        for cache in caches:
            for layer in cache.layers:
                layer.cumulative_length -= 1
    for tokens in (1, 3, 70):
        ids = prompts(2, tokens, seed=tokens)
        want, got = (m(ids, past_key_values=c).logits for m, c in zip((model, fused), caches, strict=True))
        close(got, want)
    all_fused(fused, 4)


@pytest.mark.parametrize("variant", ["llama", "mistral window"])
def test_an_interrupted_call_leaves_the_cache(variant, monkeypatch):
    """Also where it has moved what the cache holds to other memory."""
    model, fused = pair(variant)
    ids = prompts(1, 150)
    whole = model(ids).logits

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    cache = None
    for i in range(149):
        if cache is not None:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(FusedStack, "__call__", interrupt)
                fused(ids[:, i : i + 1], past_key_values=cache)
            assert cache.get_seq_length() == i
        if cache is not None:
            close(model(ids[:, i : i + 1], past_key_values=copy.deepcopy(cache)).logits[:, 0], whole[:, i])
        cache = fused(ids[:, i : i + 1], past_key_values=cache).past_key_values
    all_fused(fused)


def test_copies_of_a_cache_are_on_their_own():
    model, fused = pair()
    ids = prompts(2, 9)
    whole = model(ids).logits
    cache = fused(ids[:, :5]).past_key_values
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    fused(prompts(2, 4, seed=9), past_key_values=cache)
    for other in copies:
        assert other.get_seq_length() == 5
        close(fused(ids[:, 5:], past_key_values=other).logits, whole[:, 5:])
    all_fused(fused)


@pytest.mark.parametrize("variant", ["llama", "mistral window"])
def test_forks_that_share_tensors(variant):
    """The cheap way to fork a cache, which works as the cache of transformers never writes to a tensor."""
    model, fused = pair(variant)
    ids, other = prompts(1, 100), prompts(1, 100, seed=2)
    other[:, :5] = ids[:, :5]
    first = fused(ids[:, :5]).past_key_values
    second = copy.copy(first)
    second.layers = [copy.copy(layer) for layer in first.layers]
    texts = [(first, ids, model(ids).logits), (second, other, model(other).logits)]
    for steps in (range(5, 80), range(80, 100)):
        for cache, text, whole in texts:
            for i in steps:
                got = fused(text[:, i : i + 1], past_key_values=cache).logits
                close(got[:, 0], whole[:, i])
    all_fused(fused)


def test_the_memory_of_a_window_is_bounded():
    _, fused = pair("mistral window")
    cache = None
    for i in range(400):
        cache = fused(prompts(1, 1, seed=i), past_key_values=cache).past_key_values
    assert cache.get_seq_length() == 400
    assert cache.layers[0].keys.shape == (1, 3, 4, 40)
    assert cache.layers[0].keys.untyped_storage().nbytes() < 3 * 3 * 160 * 40 * 4
    all_fused(fused, 400)


def test_memory_goes_with_the_cache():
    _, fused = pair()
    cache = fused(prompts()).past_key_values
    memory = weakref.ref(cache._halfbyte.kv)
    del cache
    gc.collect()
    assert memory() is None
    model = weakref.ref(fused)
    del fused
    gc.collect()
    assert model() is None


def test_caches_that_do_not_fit():
    model, fused = pair()
    cache = fused(prompts(2, 5)).past_key_values
    with pytest.raises(RuntimeError):  # of torch.cat, as the model itself
        fused(prompts(3, 1), past_key_values=cache)
    sliding = transformers.DynamicCache(config=make("mistral window").config)
    found = [m(prompts(1, 5), past_key_values=copy.deepcopy(sliding)).logits for m in (model, fused)]
    assert torch.equal(*found)
    assert any("window" in reason for reason in row_of(fused).unfused_calls)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_our_own_cache(dtype):
    model, fused = pair()
    ids = prompts(2, 40)
    whole = model(ids).logits
    cache = hb.KVCache.for_model(fused, 2, dtype=dtype)
    got = [fused(ids[:, :7], past_key_values=cache).logits]
    for i in range(7, 40):
        out = fused(ids[:, i : i + 1], past_key_values=cache)
        assert out.past_key_values is cache
        got.append(out.logits)
    assert cache.get_seq_length() == 40
    if dtype == "float32":
        close(torch.cat(got, 1), whole)
    else:
        assert relative_error(torch.cat(got, 1), whole) < 0.05
    cache.crop(-39)
    again = fused(ids[:, 1:3], past_key_values=cache).logits
    assert relative_error(again, whole[:, 1:3]) < (BOUND if dtype == "float32" else 0.05)
    all_fused(fused)
    with pytest.raises(hb.ModelError, match=r"\(3, 2, 3, 40\).*\(3, 1, 3, 40\)"):
        fused(ids[:1, :1], past_key_values=cache)
    with pytest.warns(match="output_attentions"), pytest.raises(hb.ModelError, match="fusion_report"):
        fused(ids[:, :1], past_key_values=cache, output_attentions=True)
    assert cache.get_seq_length() == 3
