"""What fused modules notice, what they never write to, that they allocate nothing: on small random models."""

from __future__ import annotations

import pytest
import torch

import halfbyte as hb
from halfbyte import _core

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def bert(**options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes["initializer_range"] = 0.3  # so that what is changed shows
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes | options)).eval()


def llama(**options):
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = transformers.LlamaConfig(vocab_size=51, num_key_value_heads=3, **sizes | options)
    return transformers.LlamaForCausalLM(config).eval()


def own(model, **inputs):
    """What the model gives without fuse_."""
    forward = vars(model).pop("forward")
    try:
        return model(**inputs).last_hidden_state
    finally:
        vars(model)["forward"] = forward


@torch.inference_mode()
def check(model, changed_from=None):
    found, exact = model(input_ids=IDS).last_hidden_state, own(model, input_ids=IDS)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    if changed_from is not None:
        assert not torch.allclose(found, changed_from, rtol=1e-3, atol=1e-3)
    return found


def _eps(model):
    model.encoder.layer[0].output.LayerNorm.eps = 0.5


def _scaling(model):
    for layer in model.encoder.layer:
        layer.attention.self.scaling = 0.9


def _activation(model):
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.ReLU()


def _append(model):
    layer = type(model.encoder.layer[0])(model.config)
    model.encoder.layer.append(layer.eval())


def _data(model):
    weight = model.encoder.layer[1].output.dense.weight
    weight.data = weight.data * 3


def _in_place(model):
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.mul_(3)


@pytest.mark.parametrize("change", [_eps, _scaling, _activation, _append, _data, _in_place])
def test_a_change_is_noticed(change):
    model = hb.fuse_(bert())
    before = check(model)
    change(model)
    calls = vars(model)["forward"].calls
    check(model, changed_from=before)
    assert vars(model)["forward"].calls == calls + 1, "fused again"


def test_tensors_whose_changes_are_not_counted_are_left_alone():
    with torch.inference_mode():
        model = bert()
    hb.fuse_(model)
    with pytest.warns(UserWarning, match="inference_mode"):
        before = check(model)
    with torch.inference_mode():
        model.encoder.layer[0].output.dense.weight.mul_(5)
    check(model, changed_from=before)


@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("scheme", [None, "w8a8", "w4a8_g32"])
def test_the_core_allocates_nothing_after_the_first_call(build, scheme):
    model = build()
    if scheme:
        hb.quantize_(model, scheme, progress=False)
    hb.fuse_(model)
    with torch.inference_mode():
        model(input_ids=IDS)
        before = _core.buffer_allocations()
        for tokens in (7, 3, 1):
            model(input_ids=IDS[:, :tokens])
        assert _core.buffer_allocations() == before
        if build is llama:
            hb.generate(model, IDS, 4)
            before = _core.buffer_allocations()
            hb.generate(model, IDS, 9)
            assert _core.buffer_allocations() == before


@pytest.mark.parametrize("build", [bert, llama])
def test_what_an_embedding_returned_is_not_written_to(build):
    model = hb.fuse_(build())
    embedding = model.get_input_embeddings()
    kept = []
    embedding.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    with torch.inference_mode():
        model(input_ids=IDS)
        if build is llama:
            hb.generate(model, IDS, 3)
    assert kept and all(torch.equal(output, copy) for output, copy in kept)


def test_an_embedding_of_another_layout():
    model = llama()
    with torch.inference_mode():
        exact = model(IDS).logits
        hb.fuse_(model)
        model.model.embed_tokens.register_forward_hook(
            lambda module, args, output: output.transpose(1, 2).contiguous().transpose(1, 2)
        )
        torch.testing.assert_close(model(IDS).logits, exact, rtol=1e-4, atol=1e-4)


def test_gate_and_up_of_different_schemes():
    model = llama()
    hb.quantize_(model, {"*gate_proj": "w8a16", "*up_proj": "w8a8", "_default": None}, progress=False)
    with torch.inference_mode():
        exact = model(IDS).logits
        hb.fuse_(model)
        torch.testing.assert_close(model(IDS).logits, exact, rtol=1e-3, atol=1e-3)
    assert vars(model.model)["forward"].calls == 1


def test_generate_names_the_settings_that_it_does_not_use():
    model = hb.fuse_(llama())
    model.generation_config.repetition_penalty = 3.0
    with pytest.warns(UserWarning, match=r"repetition_penalty=3\.0"):
        hb.generate(model, IDS, 2)


def test_an_argument_of_another_name_is_the_modules_own_error():
    class Mlp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)

        def forward(self, x):
            return self.down(self.act(self.up(x)))

    model = hb.fuse_(hb.quantize_(Mlp().eval(), "w8a8", progress=False))
    x = torch.randn(3, 8)
    with torch.inference_mode():
        model(x=x)
        with pytest.raises(TypeError), pytest.warns(UserWarning):
            model(y=x)
