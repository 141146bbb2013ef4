"""Fused encoders of the BERT family against their own forward: every family, argument and scheme."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import halfbyte as hb
from fusing import check_close, cosine, error, forward_of, fused_calls, left_alone, roused

transformers = pytest.importorskip("transformers", minversion="5", reason="models to fuse")

_COMMON = {"vocab_size": 67, "max_position_embeddings": 24, "attn_implementation": "sdpa"}
_SIZES = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 72}
_DISTIL = {"dim": 48, "n_heads": 4, "n_layers": 3, "hidden_dim": 72}
# name: (class, what its configuration differs in)
FAMILIES = {
    "bert": ("Bert", {}),
    "bert relu": ("Bert", {"hidden_act": "relu"}),
    "bert tanh": ("Bert", {"hidden_act": "gelu_new"}),
    "bert silu": ("Bert", {"hidden_act": "silu"}),
    "roberta": ("Roberta", {}),
    "xlm-roberta": ("XLMRoberta", {}),
    "camembert": ("Camembert", {}),
    "electra": ("Electra", {"embedding_size": 48}),
    "electra narrow": ("Electra", {"embedding_size": 20}),
    "distilbert": ("DistilBert", {}),
    "distilbert sinus": ("DistilBert", {"sinusoidal_pos_embds": True, "activation": "relu"}),
    "mpnet": ("MPNet", {}),
}
family = pytest.mark.parametrize("name", FAMILIES)
SCHEMES = [None, "w8a8", "w4a8_g32", "w8a16", "w4a16_g32+asym"]
BATCH, TOKENS = 3, 7


def make(name="bert", scheme=None, seed=0, **changes):
    """A model of a family, evaluation mode, its layers quantized where there is a scheme."""
    kind, differs = FAMILIES[name]
    common = dict(_COMMON)
    if kind == "MPNet":
        common.pop("attn_implementation")  # it has none
    options = common | (_DISTIL if kind == "DistilBert" else _SIZES) | differs | changes
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = roused(getattr(transformers, f"{kind}Model")(config), seed)
    return model if scheme is None else hb.quantize_(model, scheme, progress=False)


def tokens(batch=BATCH, count=TOKENS, seed=0):
    return torch.randint(3, 67, (batch, count), generator=torch.Generator().manual_seed(seed))


def padding(batch=BATCH, count=TOKENS):
    """Row i ends i tokens early, and the first row is whole."""
    return (torch.arange(count) < count - torch.arange(batch)[:, None] % count).long()


def check_same(found, want, scheme=None, mask=None):
    """Outputs of a model, fused and not: same class, same fields, close values where no padding is."""
    assert type(found) is type(want) and len(found) == len(want)
    if isinstance(want, dict):
        assert list(found) == list(want)
        assert vars(found).keys() == vars(want).keys()
        found, want = found.to_tuple(), want.to_tuple()
    for y, expected in zip(found, want, strict=True):
        if isinstance(expected, tuple):
            check_same(y, expected, scheme, mask)
        elif expected is None:
            assert y is None
        else:
            if mask is not None and expected.ndim == 3:
                y, expected = y[mask.bool()], expected[mask.bool()]
            check_close(y, expected, scheme)


@torch.no_grad()
def check_call(model, *args, scheme=None, mask=None, **kwargs):
    want = model(*args, **kwargs)
    hb.fuse_(model)
    with fused_calls(model):
        found = model(*args, **kwargs)
    check_same(found, want, scheme, mask)
    hb.unfuse_(model)


@family
@pytest.mark.parametrize("scheme", SCHEMES)
def test_families_and_schemes(name, scheme):
    model, mask = make(name, scheme), padding()
    check_call(model, tokens(), scheme=scheme)
    check_call(model, tokens(), attention_mask=mask, scheme=scheme, mask=mask)


@family
def test_outputs(name):
    model, ids, mask = make(name), tokens(), padding()
    check_call(model, ids, mask, mask=mask, output_hidden_states=True)
    check_call(model, ids, return_dict=False)
    check_call(model, input_ids=ids, output_hidden_states=True, return_dict=False)
    model.config.output_hidden_states = True
    check_call(model, ids)
    model.config.output_hidden_states, model.config.return_dict = False, False
    check_call(model, ids)


@family
def test_hidden_states_of_quantized(name):
    check_call(make(name, "w8a8"), tokens(), scheme="w8a8", output_hidden_states=True)


@pytest.mark.parametrize(
    "kind", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16]
)
def test_masks_of_zeros_and_ones(kind):
    model, ids, mask = make(), tokens(), padding()
    check_call(model, ids, attention_mask=mask.to(kind), mask=mask)
    check_call(model, ids, attention_mask=torch.ones_like(mask).to(kind))


@pytest.mark.parametrize("name", ["bert", "distilbert", "mpnet"])
def test_masks_of_four_dimensions(name):
    model, ids = make(name), tokens()
    added = torch.randn(BATCH, 1, TOKENS, TOKENS)
    for mask in (
        added,
        torch.randn(BATCH, 4, TOKENS, TOKENS),
        torch.randn(1, 1, 1, TOKENS),
        added.bfloat16().float(),
    ):
        check_call(model, ids, attention_mask=mask)
    if name != "mpnet":
        seen = torch.rand(BATCH, 1, TOKENS, TOKENS) > 0.4
        seen[..., 0] = True
        check_call(model, ids, attention_mask=seen)


def test_a_mask_matters():
    model, ids, mask = hb.fuse_(make()), tokens(), padding()
    with torch.no_grad():
        changed = ids.clone()
        changed[mask == 0] = 5
        assert not torch.equal(changed, ids)
        y, other = model(ids, mask)[0], model(changed, mask)[0]
        assert torch.equal(y[mask.bool()], other[mask.bool()])
        assert error(model(ids)[0][1:, 0], y[1:, 0]) > 1e-3


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "electra narrow"])
def test_token_types(name):
    model, ids = make(name, type_vocab_size=3), tokens()
    check_call(model, ids, token_type_ids=torch.zeros_like(ids))
    check_call(model, ids, token_type_ids=torch.randint(0, 3, ids.shape))
    check_call(model, ids, token_type_ids=torch.ones(1, TOKENS, dtype=torch.long))


@family
def test_positions_and_embeddings(name):
    model, ids = make(name), tokens()
    positions = torch.randint(0, 20, (BATCH, TOKENS))
    check_call(model, ids, position_ids=positions)
    check_call(model, ids, position_ids=positions[:1])
    inputs = model.get_input_embeddings()(ids).detach()
    check_call(model, inputs_embeds=inputs)
    check_call(model, inputs_embeds=inputs.transpose(0, 1).contiguous().transpose(0, 1))
    kept = inputs.clone()
    with torch.no_grad():
        hb.fuse_(model)(inputs_embeds=inputs)
    assert torch.equal(inputs, kept)


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "camembert", "mpnet"])
def test_positions_count_from_the_padding_token(name):
    model, ids, mask = make(name), tokens(), padding()
    check_call(model, torch.where(mask == 1, ids, 1), attention_mask=mask, mask=mask)
    ids[:, 2] = 1  # in the middle, without a mask
    check_call(model, ids)


def test_sizes():
    for batch, count in ((1, 1), (1, 24), (5, 2), (2, 17)):
        check_call(make(), tokens(batch, count))
    model = hb.fuse_(make())
    with torch.no_grad(), left_alone(model, "more tokens than positions"), pytest.raises(RuntimeError):
        model(tokens(1, 25))
    with torch.no_grad(), pytest.raises(IndexError):
        model(torch.full((1, 3), 67))


@pytest.mark.parametrize("name", ["bert", "distilbert", "mpnet"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [None, "w8a8"])
@torch.no_grad()
def test_sixteen_bits(name, dtype, scheme):
    exact, mask = make(name), padding()
    truth = exact(tokens(), mask)[0][mask.bool()]
    model = exact.to(dtype) if scheme is None else hb.quantize_(exact.to(dtype), scheme, progress=False)
    want = model(tokens(), mask)
    hb.fuse_(model)
    with fused_calls(model, 2):
        found = model(tokens(), mask)
        states = model(tokens(), mask, output_hidden_states=True).hidden_states
    assert all(y.dtype is dtype for y in (*found.values(), *states))
    y = found[0][mask.bool()]
    assert cosine(y, want[0][mask.bool()]) > 0.995
    assert cosine(y.float(), truth) > 0.99


def test_quantized_embeddings_and_static_activations():
    model = hb.quantize_(make(), "w8a8", embeddings="w8a8", progress=False)
    assert isinstance(model.embeddings.word_embeddings, hb.QEmbedding)
    check_call(model, tokens(), scheme="w8a8")
    model = make("bert", "w8a8")
    with hb.calibrate(model):
        model(tokens())
    assert model.encoder.layer[0].output.dense.static is not None
    check_call(model, tokens(), scheme="w8a8")


def test_mixed_schemes():
    schemes = {
        "*.0.attention.*": "w8a8",
        "*.1.attention.self.query": "w4a16_g32",
        "*.intermediate.*": "w4a8_g32",
    }
    model = hb.quantize_(make(), schemes, progress=False)
    check_call(model, tokens(), scheme="mixed")


@torch.no_grad()
def test_pooler_or_none():
    model = roused(transformers.BertModel(make().config, add_pooling_layer=False))
    check_call(model, tokens())
    assert model(tokens()).pooler_output is None
    check_call(model, tokens(), return_dict=False)
    check_call(
        roused(transformers.MPNetModel(make("mpnet").config, add_pooling_layer=False)),
        tokens(),
        return_dict=False,
    )


@torch.no_grad()
def test_models_that_contain_one():
    model = roused(transformers.BertForSequenceClassification(make().config))
    want = model(tokens(), padding())
    assert hb.fuse_(model) is model
    with fused_calls(model.bert):
        check_same(model(tokens(), padding()), want)
    want = model(tokens(), padding(), return_dict=False)
    check_same(model(tokens(), padding(), return_dict=False), want)
    holder = nn.ModuleDict({"a": make(), "b": make("distilbert")})
    assert [row.name for row in hb.fusion_report(hb.fuse_(holder)).fused] == ["a", "b"]


@torch.no_grad()
def test_a_hook_on_the_word_embeddings_runs():
    model, note = hb.fuse_(make()), []
    want = model(tokens())[0]
    model.embeddings.word_embeddings.register_forward_hook(lambda m, args, y: note.append(y) or 2 * y)
    with fused_calls(model):
        y = model(tokens())[0]
    assert len(note) == 1 and error(y, want) > 1e-3
    check_close(y, hb.unfuse_(model)(tokens())[0])
    hb.fuse_(model).embeddings.register_forward_hook(lambda *_: note.append(1))
    with left_alone(model, "hook on its BertEmbeddings"):
        model(tokens())


@torch.no_grad()
def test_patterns_in_what_is_left_alone():
    model = make(is_decoder=True)
    hb.quantize_(model, "w8a8", progress=False)
    want = model(tokens())[0]
    whole, *rows = hb.fusion_report(hb.fuse_(model)).rows
    assert "is_decoder" in whole.reason
    assert [row.name for row in rows] == [f"encoder.layer.{i}.intermediate" for i in range(3)]
    check_close(model(tokens())[0], want, "w8a8")
    assert forward_of(model.encoder.layer[2].intermediate).calls == 1


VARIANTS = {
    "is_decoder": {"is_decoder": True},
    "cross": {"is_decoder": True, "add_cross_attention": True},
    "activation QuickGELUActivation": {"hidden_act": "quick_gelu"},
    "positions are of the type relative_key": {"position_embedding_type": "relative_key"},
}


@pytest.mark.parametrize("reason", VARIANTS)
@torch.no_grad()
def test_unknown_variants_are_left_alone(reason):
    model = make(**VARIANTS[reason])
    want = model(tokens())[0]
    (row,) = hb.fusion_report(hb.fuse_(model)).rows
    assert reason.replace("cross", "is_decoder") in row.reason and not row.blocks
    assert "forward" not in vars(model) and torch.equal(model(tokens())[0], want)


class OwnAttention(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


class OwnBert(transformers.BertModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class PlainSubclass(transformers.BertModel):
    pass


def test_foreign_parts_are_left_alone():
    model = make()
    model.encoder.layer[1].attention.self = OwnAttention()
    assert "its OwnAttention has a forward of its own" in hb.fusion_report(hb.fuse_(model)).rows[0].reason
    model = make()
    model.encoder.layer[0].output.LayerNorm = nn.RMSNorm(48)
    assert "norm is a RMSNorm" in hb.fusion_report(hb.fuse_(model)).rows[0].reason
    model = make()
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    assert "blocks differ" in hb.fusion_report(hb.fuse_(model)).rows[0].reason
    own = hb.fusion_report(hb.fuse_(OwnBert(make().config).eval()))
    assert own.rows[0].reason == "a subclass of BertModel with a forward of its own"
    check_call(roused(PlainSubclass(make().config)), tokens())


@torch.no_grad()
def test_arguments_that_are_not_known():
    model, ids, mask = make(attn_implementation="eager"), tokens(), padding()
    asked = {
        "output_attentions": {"output_attentions": True},
        "encoder_hidden_states was given": {"encoder_hidden_states": torch.randn(BATCH, 4, 48)},
        "3 dimensions": {"attention_mask": mask[:, None].expand(-1, TOKENS, -1)},
        "torch.bool": {"attention_mask": mask[:, None, None].bool()},
        "not True or False": {"output_hidden_states": [1]},
        "shape of the tokens": {"attention_mask": mask[:, :5]},
    }
    for reason, arguments in asked.items():
        hb.unfuse_(model)
        try:
            want = model(ids, **arguments)
        except Exception as failure:
            want = failure
        hb.fuse_(model)
        with left_alone(model, reason):
            if isinstance(want, Exception):
                with pytest.raises(type(want)):
                    model(ids, **arguments)
            else:
                check_same(model(ids, **arguments), want)
        assert forward_of(model).unfused.total() == 1
        with fused_calls(model):  # hooks that a call left there are no obstacle
            model(ids)


@torch.no_grad()
def test_attention_that_is_changed_later():
    model = hb.fuse_(make())
    model.set_attn_implementation("eager")
    with fused_calls(model):
        model(tokens())
    model.config._attn_implementation = "flash_attention_9"
    with left_alone(model, "flash_attention_9"), pytest.raises(KeyError):
        model(tokens())


@given(
    heads=st.integers(1, 4),
    size=st.sampled_from([2, 3, 8, 16, 32, 40, 64]),
    layers=st.integers(1, 3),
    inner=st.integers(1, 90),
    batch=st.integers(1, 4),
    count=st.integers(1, 24),
    name=st.sampled_from(["bert", "roberta", "electra narrow", "distilbert", "mpnet"]),
    scheme=st.sampled_from([None, None, "w8a8", "w4a8_g32"]),
    padded=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_random_shapes(heads, size, layers, inner, batch, count, name, scheme, padded):
    if name == "distilbert":
        options = {"dim": heads * size, "n_heads": heads, "n_layers": layers, "hidden_dim": inner}
    else:
        options = {
            "hidden_size": heads * size,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "intermediate_size": inner,
        }
    if name in ("roberta", "mpnet"):
        count = min(count, 22)
    model = make(name, scheme if heads * size > 16 else None, **options)
    mask = padding(batch, count) if padded else None
    bound = scheme and f"rough {scheme}"
    check_call(model, tokens(batch, count), attention_mask=mask, mask=mask, scheme=bound)
