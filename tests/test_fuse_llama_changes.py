"""Which decoders and calls are left to the model, and what happens to a fused one: copies, changes."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch

import halfbyte as hb
from decoders import (
    all_fused,
    close,
    core_threads,
    make,
    pair,
    prompts,
    row_of,
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


# what is left alone


def test_hooks_of_calls_before_fuse():
    """transformers installs hooks at the first call that asks for outputs of layers, and leaves them."""
    model = make()
    ids = prompts(1, 6)
    want = model(ids, output_hidden_states=True).hidden_states
    assert model.model.layers[0]._forward_hooks
    got = hb.fuse_(model)(ids, output_hidden_states=True).hidden_states
    for a, b in zip(got, want, strict=True):
        close(a, b)
    all_fused(model, 1)


def test_attentions_are_left_to_the_model_and_it_stays_fused():
    model, fused = pair()
    model.set_attn_implementation("eager")
    fused.set_attn_implementation("eager")
    ids = prompts(1, 6)
    for _ in range(2):
        want, got = (m(ids, output_attentions=True) for m in (model, fused))
        assert torch.equal(got.attentions[2], want.attentions[2])
        close(fused(ids).logits, want.logits)
    row = row_of(fused)
    assert row.fused_calls == 2 and list(row.unfused_calls.values()) == [2]
    assert not row.reason


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda m: m.model.layers[1].mlp.register_forward_hook(lambda *a: None), "hook"),
        (lambda m: setattr(m.model.layers[0].self_attn, "forward", lambda *a, **k: None), "forward"),
        (lambda m: m.model.layers[0].self_attn.train() and m.config, "dropout"),
        (lambda m: setattr(m.model.layers[2], "mlp", torch.nn.Identity()), "forward of its own|variant"),
        (lambda m: setattr(m.model.layers[2].mlp, "act_fn", torch.nn.Tanh()), "activation"),
        (lambda m: setattr(m.model.layers[1].mlp, "up_proj", torch.nn.Bilinear(2, 2, 2)), "Bilinear"),
    ],
)
def test_spoiled_models_say_why(spoil, reason):
    model = make("llama", attention_dropout=0.1)
    hb.fuse_(model)
    model(prompts())
    spoil(model)
    assert re.search(reason, row_of(model).reason), row_of(model)
    assert row_of(model).blocks == 0


def test_variants_that_are_left_alone():
    tiny = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for name, options, reason in [
        ("Qwen3", {"head_dim": 16}, "none of the decoders"),
        ("Gemma", {"head_dim": 16}, "none of the decoders"),
        ("Llama", {"rope_parameters": dynamic}, "dynamic"),
        ("Llama", {"partial": "layer_idx"}, "layer 1 of it"),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "differ in attention"),
    ]:
        config = getattr(transformers, f"{name}Config")(**tiny | options)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        if "partial" in options:
            model.model.layers[1].self_attn.layer_idx = 0
        hb.fuse_(model)
        assert "forward" not in vars(model.model)
        (row,) = hb.fusion_report(model).left_alone
        assert reason in row.reason and not hb.fusion_report(model).fused

    class Own(transformers.LlamaModel):
        def forward(self, input_ids):
            return super().forward(input_ids)

    (row,) = hb.fusion_report(hb.fuse_(Own(make().config))).left_alone
    assert "subclass" in row.reason


def test_gradients_are_left_to_the_model():
    model, fused = (m.requires_grad_(True) for m in pair())
    ids = prompts(1, 5)
    with torch.enable_grad():
        for m in (model, fused):
            m(ids, labels=ids).loss.backward()
    assert torch.equal(fused.lm_head.weight.grad, model.lm_head.weight.grad)
    assert "gradient" in why_unfused(fused)


def test_compile_sees_the_model():
    model, fused = pair(num_hidden_layers=1)
    compiled = torch.compile(fused, backend="eager")
    ids = prompts(1, 5)
    close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


# the object in the place of forward


def test_copies_and_pickles_are_fused():
    _, fused = pair()
    ids = prompts()
    want = fused(ids).logits
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other.model.forward is not fused.model.forward
        assert torch.equal(other(ids).logits, want)
        all_fused(other, 1)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.zero_()
    assert not torch.equal(other(ids).logits, want) and torch.equal(fused(ids).logits, want)


def test_fuse_twice_and_unfuse():
    model, fused = pair()
    ids, names = prompts(), list(fused.state_dict())
    first = fused.model.forward
    assert hb.fuse_(fused).model.forward is first and names == list(model.state_dict())
    assert hb.unfuse_(fused) is fused and "forward" not in vars(fused.model)
    assert torch.equal(fused(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.model.layers[0].mlp.up_proj.weight.mul_(2),
        lambda m: m.model.layers[1].input_layernorm.weight.add_(1),
        lambda m: m.model.norm.weight.zero_(),
        lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(torch.ones(97, 96))),
        lambda m: setattr(m.model.layers[1].mlp.up_proj, "weight", torch.nn.Parameter(torch.ones(136, 96))),
        lambda m: m.model.rotary_emb.inv_freq.mul_(1.5),
        lambda m: m.model.embed_tokens.weight.mul_(3),
        lambda m: setattr(m.model, "norm", copy.deepcopy(m.model.layers[0].input_layernorm)),
        lambda m: m.model.layers.__setitem__(0, copy.deepcopy(m.model.layers[0]).double().float()),
        lambda m: m.load_state_dict(make(seed=5).state_dict()),
        lambda m: m.resize_token_embeddings(50),
    ],
)
def test_changes_of_a_model_are_noticed(change):
    model, fused = pair()
    ids = prompts() % 50
    fused(ids)
    change(model)
    change(fused)
    close(fused(ids).logits, model(ids).logits)
    all_fused(fused, 2)
