"""quantize_ with embeddings and methods: which tables, ties with heads, failures, and what summary says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same
from halfbyte import _core
from halfbyte.embedding import QEmbedding
from models import TOKENS, Model, assert_untouched, quantized, report, snapshot, tied


def embeddings_of(model):
    return {name for name, module in model.named_modules() if isinstance(module, QEmbedding)}


@pytest.mark.parametrize(
    ("scheme", "embeddings"),
    [("w8a8", "w8a16"), ("w4a8_g32", "w4a16_g32"), ("w4a16_g32+asym", hb.Scheme.parse("w4a16_g32+asym"))],
)
def test_a_tied_head_shares_the_codes(scheme, embeddings):
    model = tied()
    weight = model.embed.weight.detach().clone()
    hb.quantize_(model, scheme, embeddings=embeddings)
    assert embeddings_of(model) == {"embed"} and "head" in quantized(model)
    for name, buffer in model.embed._buffers.items():
        assert model.head._buffers[name] is buffer
    assert str(model.head.scheme) == scheme and model.embed.scheme == hb.Scheme.parse(embeddings)
    same(model.embed.quantized.dequantize(), hb.quantize(weight, embeddings).dequantize(), "table")
    rows = {row["name"]: row for row in model._halfbyte_report}
    assert rows["head"]["tied_to"] == "embed" and rows["embed"]["shape"] == (10, 16)
    assert report(model)["embed"] == report(model)["head"] == ("quantized", "")
    same(model(TOKENS), copy.deepcopy(model)(TOKENS), "forward of a copy")
    assert (twin := copy.deepcopy(model)).embed.weight_codes is twin.head.weight_codes
    model.half()
    assert model.embed.weight_codes is model.head.weight_codes
    assert model.embed.weight_scale is model.head.weight_scale


def test_formats_that_differ_make_two_sets_of_codes():
    model = tied()
    weight = model.embed.weight.detach().clone()
    hb.quantize_(model, "w8a8", embeddings="w4a16_g32")
    same(model.head.weight_codes, hb.quantize(weight, "w8a8").codes, "head")
    same(model.embed.weight_codes, hb.quantize(weight, "w4a16_g32").codes, "embedding")
    assert report(model)["head"][1].startswith("no longer shares its weight with embed: the formats")


def test_without_embeddings_nothing_changes():
    model = hb.quantize_(tied())
    assert type(model.head) is nn.Linear and "embed" not in report(model)


@pytest.mark.parametrize("options", [{"exclude": "head"}, {"include": "blocks.*"}])
def test_an_embedding_stays_float_with_its_head(options):
    model = hb.quantize_(tied(), embeddings="w8a16", **options)
    assert not embeddings_of(model) and model.embed.weight is model.head.weight
    assert report(model)["embed"] == ("float", "shares its weight with head, which stays float")


def test_which_embeddings_stay_float():
    class Scaled(nn.Embedding):
        pass

    model = nn.ModuleDict({
        "plain": nn.Embedding(5, 4, padding_idx=0), "sub": Scaled(5, 4), "out": nn.Embedding(5, 4),
        "norm": nn.Embedding(5, 4, max_norm=1), "sparse": nn.Embedding(5, 4, sparse=True),
        "freq": nn.Embedding(5, 4, scale_grad_by_freq=True), "hooked": nn.Embedding(5, 4),
        "bag": nn.EmbeddingBag(5, 4),
    })  # fmt: skip
    model["hooked"].register_forward_hook(lambda *_: None)
    model["plain"].tag = "x"
    assert hb.quantize_(model, embeddings="w4a16", exclude="out") is model
    assert embeddings_of(model) == {"plain"} and model["plain"].tag == "x" and model["plain"].padding_idx == 0
    reasons = {name: reason for name, (_, reason) in report(model).items()}
    for name, says in {
        "sub": "Scaled is a subclass of nn.Embedding",
        "norm": "max_norm=1",
        "sparse": "sparse=True",
        "freq": "scale_grad_by_freq=True",
        "hooked": "hooks",
        "out": "excluded",
    }.items():
        assert says in reasons[name]
    assert "bag" not in reasons


def test_a_second_call_keeps_what_there_is():
    model = hb.quantize_(Model(1), {}, embeddings="w8a16")
    table = model.embed
    hb.quantize_(model, embeddings="w4a16")
    assert model.embed is table and report(model)["embed"] == ("quantized", "was quantized before")


def test_patterns_of_excluded_embeddings_are_not_idle(recwarn):
    hb.quantize_(Model(1), embeddings="w8a16", exclude="embed")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="no layer has a name that fits 'embed'"):
        hb.quantize_(Model(1), exclude="embed")


def test_two_embeddings_of_one_weight():
    model = nn.ModuleList([nn.Embedding(5, 4), nn.Embedding(5, 4), nn.Embedding(5, 4)])
    model[1].weight = model[0].weight
    hb.quantize_(model, embeddings="w8a16")
    assert model[0].weight_codes is model[1].weight_codes is not model[2].weight_codes


def test_the_model_itself_is_an_embedding():
    layer = hb.quantize_(nn.Embedding(6, 4), embeddings="w8a16")
    assert isinstance(layer, QEmbedding) and layer.name == "the model"


@pytest.mark.parametrize(
    ("scheme", "method", "head", "embed"),
    [
        ("w4a16_g32+asym", "hqq", "weight_minimum", None),
        ("w4a16_g32+asym", "mse", "weight_zero", None),
        ({"head": "w4a16_g32+asym", "_default": "w8a8"}, "hqq", "weight_minimum", None),
        ("w8a8", "hqq", None, "weight_minimum"),
    ],
)
def test_method(scheme, method, head, embed):
    model = Model(1)
    weight = model.head.weight
    hb.quantize_(model, scheme, method=method, embeddings="w4a16_g32+asym" if embed else "w8a16")
    for layer, offset in ((model.head, head), (model.embed, embed)):
        assert [name for name in ("weight_zero", "weight_minimum") if layer._buffers[name] is not None] == (
            [offset] if offset else []
        )
    if head:
        want = hb.quantize(weight, "w4a16_g32+asym", method=method)
        same(model.head.quantized.dequantize(), want.dequantize(), method)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"embeddings": "w9a9"}, hb.SchemeError, "w9a9"),
        ({"method": "best"}, hb.SchemeError, "no method is called 'best'"),
        ({"method": "hqq"}, hb.SchemeError, "which w8a8 has no place for"),
        ({"method": "hqq", "embeddings": "w8a16_g32"}, hb.SchemeError, "w8a16_g32, w8a8 has no place for"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(options, error, says):
    model = Model(1)
    before = snapshot(model)
    with pytest.raises(error, match=says):
        hb.quantize_(model, **options)
    assert_untouched(model, before)


def spoil_embedding(model):
    model.embed.weight.data[7, 2] = torch.inf


def spoil_head(model):
    model.head.weight.data[4, 0] = torch.nan


@pytest.mark.parametrize("method", ["mse", "hqq"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [(spoil_embedding, r"embed\.weight .*row 7"), (spoil_head, r"head\.weight .*row 4")],
)
def test_the_rehearsal_finds_what_a_search_would_find(monkeypatch, spoil, says, method):
    model = Model(1)
    spoil(model)
    before, seen, quantize = snapshot(model), [], hb.quantize

    def watched(*args, method, **kwargs):
        seen.append(method)
        return quantize(*args, method=method, **kwargs)

    monkeypatch.setattr("halfbyte.convert.quantize", watched)
    with pytest.raises(hb.NonFiniteError, match=says):
        hb.quantize_(model, "w4a16_g32+asym", method=method, embeddings="w4a16_g64+asym")
    assert_untouched(model, before)
    assert set(seen) == {"absmax"}, "no search before the rehearsal is over"
    fresh = hb.quantize_(Model(1), "w4a16_g32+asym", method=method, embeddings="w4a16_g64+asym")
    assert seen[-4:] == [method] * 4 and embeddings_of(fresh)


def test_summary():
    model = tied()
    float_bytes = sum(t.nbytes for t in model.parameters())
    model.extra = nn.Embedding(7, 4)
    hb.quantize_(model, "w8a8", embeddings="w8a16", exclude="extra")
    summary = hb.summary(model, TOKENS)
    rows = {row.name: row for row in summary.layers}
    embed, head, extra = rows["embed"], rows["head"], rows["extra"]
    assert (embed.in_features, embed.out_features, embed.scheme) == (10, 16, "w8a16")
    assert embed.kernel == _core.select("embedding") and embed.float_bytes == 4 * 10 * 16
    assert embed.bytes == 10 * 16 + 4 * 10 and embed.tied_to == ""
    assert embed.ms > 0 and embed.float_ms > 0 and embed.error == 0
    assert head.tied_to == "embed" and head.float_bytes == 4 * 10
    assert head.bytes == 4 * 10 + hb.pack(model.head.quantized).nbytes
    assert (extra.scheme, extra.kernel, extra.why_float) == ("float", "torch", "excluded")
    total = sum(row.float_bytes for row in summary.layers) + summary.other_bytes
    assert total == float_bytes + 4 * 7 * 4
    text = str(summary)
    assert "3 of 3 linear layers and 1 of 2 embeddings quantized" in text and "tied to" in text
    model = hb.quantize_(tied().bfloat16(), "w8a8", embeddings="w4a16_g32")
    rows = {row.name: row for row in hb.summary(model).layers}
    assert rows["embed"].float_bytes == 2 * 10 * 16 and rows["head"].float_bytes == 2 * 10
    assert rows["head"].tied_to == ""


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32"])
def test_a_tied_llama_of_transformers(scheme):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 96, (2, 7))
    with torch.no_grad():
        exact = model(ids).logits
        hb.quantize_(model, scheme, embeddings=scheme)
        y = model(ids).logits
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    table = model.get_input_embeddings()
    assert isinstance(table, QEmbedding) and isinstance(model.get_output_embeddings(), hb.QLinear)
    assert model.get_output_embeddings().weight_codes is table.weight_codes
    assert nn.functional.cosine_similarity(y.flatten(), exact.flatten(), dim=0) > 0.97
    assert tokens.shape == (2, 11) and table.weight.shape == (96, 64)
