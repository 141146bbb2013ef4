"""Fused decoders against the unfused ones: prefill, decoding, padding, dtypes, threads."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte as hb
from decoders import (
    VARIANT,
    VOCABULARY,
    all_fused,
    close,
    core_threads,
    make,
    padded,
    pair,
    prompts,
    relative_error,
    transformers,
    why_unfused,
)


@pytest.fixture(autouse=True)
def two_threads(one_thread_of_torch):
    with core_threads(2):
        yield


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# float32


@VARIANT
@pytest.mark.parametrize("batch, tokens", [(1, 1), (1, 17), (3, 9)])
def test_prefill(variant, batch, tokens):
    model, fused = pair(variant)
    ids = prompts(batch, tokens)
    want, got = model(ids), fused(ids)
    close(got.logits, want.logits)
    assert want.logits.std() > 0.5, "the weights are too small to test anything"
    for layer, own in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        close(layer.keys, own.keys)
        close(layer.values, own.values)
        assert layer.get_seq_length() == own.get_seq_length() == tokens
    all_fused(fused, 1)


@VARIANT
def test_decode_with_the_cache(variant):
    """Past the capacity that the cache has at first, the window, and the positions the model was made for."""
    model, fused = pair(variant)
    ids = prompts(2, 90)
    whole = model(ids, use_cache=False).logits
    out = fused(ids[:, :6])
    for i in range(6, 90, 3):
        chunk = ids[:, i : i + 1] if i % 2 else ids[:, i : i + 3]
        out = fused(chunk, past_key_values=out.past_key_values)
        close(out.logits, whole[:, i : i + chunk.shape[1]])
        if i % 2:
            out = fused(ids[:, i + 1 : i + 3], past_key_values=out.past_key_values)
            close(out.logits, whole[:, i + 1 : i + 3])
    assert out.past_key_values.get_seq_length() == 90
    all_fused(fused)


@VARIANT
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(variant, side):
    model, fused = pair(variant)
    ids, mask = padded(side)
    real = mask.bool()
    want, got = model(ids, attention_mask=mask), fused(ids, attention_mask=mask)
    close(got.logits[real], want.logits[real])
    assert got.logits.isfinite().all()
    for _ in range(3):
        ids, mask = prompts(3, 1), torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        want = model(ids, attention_mask=mask, past_key_values=want.past_key_values)
        got = fused(ids, attention_mask=mask, past_key_values=got.past_key_values)
        close(got.logits, want.logits)
    all_fused(fused, 4)


def test_padding_does_not_reach_other_tokens():
    """Each row of a padded batch is what it is alone."""
    _, fused = pair()
    ids, mask = padded("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = fused(ids, attention_mask=mask, position_ids=positions).logits
    for row, keep in enumerate(mask.bool()):
        close(got[row, keep], fused(ids[row : row + 1, keep]).logits[0])
    all_fused(fused)


def test_padding_far_beyond_a_window():
    """The cache forgets tokens, the mask has columns for all."""
    model, fused = pair("mistral window")
    ids, mask = padded("left", (6, 2, 4))
    want, got = (m(ids, attention_mask=mask) for m in (model, fused))
    for i in range(40):
        ids = prompts(3, 1 + i % 7, seed=i)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        if i == 30:
            mask[1, -5] = 0
        want = model(ids, attention_mask=mask, past_key_values=want.past_key_values)
        got = fused(ids, attention_mask=mask, past_key_values=got.past_key_values)
        close(got.logits, want.logits)
    assert got.past_key_values._halfbyte.kv.dropped
    all_fused(fused, 41)


def test_a_mask_of_ones_of_another_dtype_and_a_row_without_any_token():
    model, fused = pair()
    ids = prompts(2, 5)
    for ones in (torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.int32)):
        close(fused(ids, attention_mask=ones).logits, model(ids).logits)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1] = 0
    got = fused(ids, attention_mask=mask).logits
    close(got[0], model(ids).logits[0])
    assert got.isfinite().all()
    all_fused(fused)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("variant", ["llama", "mistral window"])
def test_masks_of_four_dimensions(kind, variant):
    model, fused = pair(variant)
    ids = prompts(2, 7)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    if "window" in variant:
        mask &= torch.ones(7, 7, dtype=torch.bool).triu(-4)
    mask = mask.expand(2, 1, 7, 7).clone()
    mask[1, :, 3:, 1] = False
    ready = mask if kind == "bool" else torch.where(mask, 0.25, torch.finfo(torch.float32).min)
    close(fused(ids, attention_mask=ready).logits, model(ids, attention_mask=ready).logits)
    all_fused(fused, 1)
    seeing = torch.ones_like(mask) if kind == "bool" else torch.zeros_like(ready)
    close(fused(ids, attention_mask=seeing).logits, model(ids, attention_mask=seeing).logits)
    assert "later ones" in why_unfused(fused)


def test_position_ids():
    model, fused = pair()
    ids = prompts(2, 6)
    plain = torch.arange(6)[None]
    spread = torch.tensor([[3, 5, 6, 9, 70, 200000], [0, 0, 1, 2, 3, 40]])
    for positions in (plain, plain.expand(2, 6), plain + 11, plain - 3, spread, spread - 7):
        want, got = (m(ids, position_ids=positions) for m in (model, fused))
        # sin and cos of 2e5 radians hang on the last bits of the angle, which both round alike
        close(got.logits, want.logits)
    all_fused(fused, 6)


def test_several_texts_in_a_row_are_left_to_the_model():
    model, fused = pair()
    ids, positions = prompts(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    want, got = (m(ids, position_ids=positions, use_cache=False) for m in (model, fused))
    assert torch.equal(got.logits, want.logits)
    assert "several texts" in why_unfused(fused)


@VARIANT
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_and_tuples(variant, masked):
    model, fused = pair(variant)
    ids, mask = padded("right") if masked else (prompts(2, 6), None)
    want, got = (m.model(ids, attention_mask=mask, output_hidden_states=True) for m in (model, fused))
    assert len(got.hidden_states) == len(want.hidden_states) == 4
    real = slice(None) if mask is None else mask.bool()
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        close(a[real], b[real])
    assert got.hidden_states[-1] is got.last_hidden_state
    assert torch.equal(got.last_hidden_state, fused.model(ids, attention_mask=mask).last_hidden_state)
    x = fused.model.embed_tokens(ids)
    y, cache = fused.model(inputs_embeds=x, attention_mask=mask, return_dict=False, use_cache=True)
    assert torch.equal(y, got.last_hidden_state) and cache.get_seq_length() == ids.shape[1]
    assert torch.equal(x, fused.model.embed_tokens(ids)), "the input was written to"
    assert fused.model(ids, use_cache=False).past_key_values is None
    caches = [
        m.model(prompts(), past_key_values=transformers.DynamicCache(), use_cache=False)[1:]
        for m in (model, fused)
    ]
    assert len(caches[0]) == len(caches[1]), "whether a cache comes back that was given"
    all_fused(fused, 5)


def test_positional_arguments_and_inspection():
    import inspect

    model, fused = pair()
    ids, mask = padded("left")
    close(fused.model(ids, mask)[0], fused.model(input_ids=ids, attention_mask=mask)[0], 0)
    assert inspect.signature(fused.model.forward) == inspect.signature(model.model.forward)
    with pytest.raises(ValueError, match="exactly one"):
        fused.model()
    with pytest.raises(IndexError):
        fused(torch.tensor([[VOCABULARY]]))


def test_a_decoder_alone_and_other_heads():
    for cls in ("LlamaModel", "LlamaForSequenceClassification"):
        torch.manual_seed(0)
        model = getattr(transformers, cls)(make().config).eval().requires_grad_(False)
        fused = hb.fuse_(copy.deepcopy(model))
        ids = prompts(1, 6)
        close(fused(ids)[0], model(ids)[0])
        all_fused(fused, 1)


# other dtypes, quantized layers


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_half_precision(dtype, bound):
    """The fused model computes in float32 in between: nearer to the float model than the unfused one."""
    model, fused = pair("llama")
    ids, mask = padded("left")
    real, want = mask.bool(), model(ids, attention_mask=mask).logits
    half, fused = model.to(dtype), fused.to(dtype)
    unfused = half(ids, attention_mask=mask).logits
    out = fused(ids, attention_mask=mask)
    assert out.logits.dtype is dtype and out.past_key_values.layers[0].keys.dtype is dtype
    error = relative_error(out.logits[real], want[real])
    assert error < bound and error < 1.2 * relative_error(unfused[real], want[real])
    states = fused(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert {state.dtype for state in states} == {dtype}
    assert torch.equal(fused.lm_head(states[-1]), out.logits)
    out = fused(
        ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=out.past_key_values
    )
    assert out.logits.isfinite().all()
    all_fused(fused, 3)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w8a8+ag32", "w4a16_g32"])
def test_quantized(scheme):
    """A rounding may put a code of an activation on the other side: far less than quantization costs."""
    model = make("llama", hidden_size=192, intermediate_size=192, head_dim=32)
    ids = prompts(2, 24)
    exact = model(ids).logits
    hb.quantize_(model, scheme, method="absmax", progress=False)
    want = model(ids).logits
    before = hb.fuse_(copy.deepcopy(model))
    got = before(ids)
    cost = relative_error(want, exact)
    assert relative_error(got.logits, want) < 0.3 * cost < 0.3
    step = before(ids[:, :1], past_key_values=got.past_key_values).logits
    whole = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    assert relative_error(step, whole) < 0.3 * cost
    all_fused(before, 2)
    # And in the other order, with the stack that ran before it.
    after = hb.fuse_(make("llama", hidden_size=192, intermediate_size=192, head_dim=32))
    close(after(ids).logits, exact)
    hb.quantize_(after, scheme, method="absmax", progress=False)
    assert torch.equal(after(ids).logits, got.logits)
    all_fused(after, 2)


def test_quantized_embedding_and_head():
    model = make("llama tied")
    schemes = {"lm_head": "w8a8", "_default": "w8a8"}
    hb.quantize_(model, schemes, embeddings="w8a16", method="absmax", progress=False)
    fused = hb.fuse_(copy.deepcopy(model))
    ids = prompts(2, 9)
    assert relative_error(fused(ids).logits, model(ids).logits) < 0.02
    all_fused(fused, 1)


# threads


def test_the_number_of_threads_changes_nothing():
    model = make("llama")
    hb.quantize_(model, {"*.mlp.*": "w8a8", "_default": None}, method="absmax", progress=False)
    hb.fuse_(model)
    ids, mask = padded("left", (33, 20, 1))
    found = []
    for count in (1, 2, 3):
        with core_threads(count):
            out = model(ids, attention_mask=mask)
            step = model(ids[:, :1], past_key_values=out.past_key_values)
            found.append((out.logits, step.logits, *(layer.keys for layer in out.past_key_values.layers)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    all_fused(model)


def test_two_models_in_two_threads():
    models = [hb.fuse_(make("llama", seed=1)), hb.fuse_(make("mistral window", seed=2))]
    ids, mask = padded("left")
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    want = [m.generate(ids, **options) for m in models]
    found = [[], []]

    def work(i):
        for _ in range(4):
            found[i].append(models[i].generate(ids, **options))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for rows, one in zip(found, want, strict=True):
        assert len(rows) == 4 and all(torch.equal(row, one) for row in rows)


# any configuration


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_configuration(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kv_heads, groups = draw(1, 4), draw(1, 3)
    heads = kv_heads * groups
    variant = data.draw(st.sampled_from(["llama", "llama biases", "llama gelu", "mistral", "mistral window"]))
    changes = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "head_dim": 2 * draw(1, 36),
        "hidden_size": heads * draw(1, 24),
        "intermediate_size": draw(1, 150),
        "num_hidden_layers": draw(1, 3),
    }
    if "window" in variant:
        changes["sliding_window"] = draw(2, 12)  # of 1 the cache of transformers keeps all
    model, fused = pair(variant, seed=draw(0, 5), **changes)
    side = data.draw(st.sampled_from(["left", "right", None]))
    lengths = [draw(1, 20) for _ in range(draw(1, 3))]
    with torch.no_grad():
        ids, mask = padded(side or "left", lengths)
        mask = None if side is None else mask
        want, got = (m(ids, attention_mask=mask) for m in (model, fused))
        keep = slice(None) if mask is None else mask.bool()
        close(got.logits[keep], want.logits[keep])
        tokens = draw(1, 5)
        more = prompts(len(lengths), tokens)
        if mask is not None:
            mask = torch.cat([mask, torch.ones(len(lengths), tokens, dtype=mask.dtype)], 1)
        want = model(more, attention_mask=mask, past_key_values=want.past_key_values)
        got = fused(more, attention_mask=mask, past_key_values=got.past_key_values)
        close(got.logits, want.logits)
    all_fused(fused, 2)
