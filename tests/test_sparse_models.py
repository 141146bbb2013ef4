"""Models with sparse layers: calibrated, fused, profiled, summarized, generated with, packed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same
from fusing import X, encoder, fused_calls, roused
from halfbyte import _core
from halfbyte.fuse.stack import BlockSpec, FusedStack, NormSpec, Rows, StackSpec
from halfbyte.sparse.cost import predicted_break_even
from halfbyte.sparse.scheme import NAMES
from models import TOKENS, Model
from profiles import checked, rows
from sparse_layers import CODES, prune_linear, sparse, sparse_layers

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")
schemes = pytest.mark.parametrize("name", NAMES)
each_layout = pytest.mark.parametrize(
    "name", [name for name in NAMES if not name.endswith(("1:4", "4:8", "f32+2:4"))]
)


def make_sparse(model, name, fits=lambda name: True):
    """Linear layers whose names fit pruned and sparse."""
    for layer, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and fits(layer):
            prune_linear(module, hb.SparseScheme.parse(name).pattern)
    return hb.sparsify_(model, "always", scheme=name, progress=False)


def densely(model):
    """The same model with dense layers of the same codes in the place of int8 sparse ones."""
    model = copy.deepcopy(model)
    for name, layer in sparse_layers(model).items():
        twin = hb.QLinear(layer.sparse.to_quantized(), layer.bias, activation=layer.activation)
        twin.static = layer.static
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, twin)
    return model


# calibrate


@pytest.mark.parametrize("name", CODES)
def test_calibrate(name):
    model = make_sparse(Model(1).eval(), name)
    model.blocks[0].down = nn.Linear(32, 16)
    hb.quantize_(model, {"blocks.0.down": "w8a16"}, progress=False)
    with hb.calibrate(model):
        model(TOKENS)
    assert model.blocks[0].up.static and model.head.static and model.blocks[0].down.static is None
    same(model(TOKENS), densely(model)(TOKENS))
    hb.decalibrate_(model)
    assert model.head.static is None


def test_nothing_to_calibrate():
    model = make_sparse(Model(1).eval(), "f32+2:4")
    with pytest.raises(hb.ModelError, match=r"have the scheme f32\+2:4, whose activations .* or none"):
        with hb.calibrate(model):
            pass


# fuse_


@each_layout
def test_bert(name):
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 72}
    config = transformers.BertConfig(vocab_size=67, max_position_embeddings=24, **sizes)
    ids = torch.randint(3, 67, (2, 7))
    torch.manual_seed(0)
    float_model = roused(transformers.BertModel(config))
    # All layers; then sparse beside dense int8 and float ones, among query, key and value too.
    for some in (False, True):
        fits = (lambda n: n.endswith(("query", "output.dense"))) if some else (lambda n: True)
        model = make_sparse(copy.deepcopy(float_model), name, fits)
        if some:
            hb.quantize_(model, "w8a8", exclude=["*.key", "*intermediate*"], progress=False)
        with torch.no_grad():
            want = model(ids).last_hidden_state
            hb.fuse_(model)
            with fused_calls(model):
                got = model(ids).last_hidden_state
        assert torch.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.9999
        if name in CODES:
            twin = hb.fuse_(densely(hb.unfuse_(model)))
            with torch.no_grad():
                same(twin(ids).last_hidden_state, got)


@each_layout
def test_llama_with_a_cache(name):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=96, intermediate_size=136, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, initializer_range=0.15, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    make_sparse(model, name, lambda n: n.endswith(("q_proj", "v_proj", "up_proj", "gate_proj", "o_proj")))
    hb.quantize_(model, "w8a8", include="*.down_proj", progress=False)
    ids = torch.randint(3, 97, (1, 9))
    with torch.no_grad():
        want = model(ids).logits
        hb.fuse_(model)
        got = model(ids, use_cache=False).logits
        assert torch.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.9999
        past = model(ids[:, :5]).past_key_values
        step = model(ids[:, 5:], past_key_values=past).logits
    assert torch.cosine_similarity(step.flatten(), got[:, 5:].flatten(), 0) > 0.9999
    if name in CODES:
        with torch.no_grad():
            same(hb.fuse_(densely(hb.unfuse_(model)))(ids, use_cache=False).logits, got)


@each_layout
def test_a_merged_projection(name):
    """Rows of one sparse layer as query, key and value."""
    merged = hb.SparseLinear(sparse((96, 32), name), torch.randn(96))
    layers = [hb.QLinear.from_linear(nn.Linear(i, o)) for i, o in ((32, 32), (32, 40), (40, 32))]
    ones = NormSpec(torch.ones(32), torch.zeros(32), 1e-5)

    def stack(q, k, v):
        block = BlockSpec(ones, ones, q, k, v, layers[0], layers[1], layers[2])
        options = {"scale": 8**-0.5, "pre_norm": True, "rms": False, "causal": False, "activation": "gelu"}
        return FusedStack(StackSpec(32, 4, 4, 8, **options, blocks=[block]))

    def part(i):
        bias = merged.bias[32 * i : 32 * i + 32]
        return hb.SparseLinear(merged.sparse.rows(32 * i, 32 * i + 32), bias)

    same(
        stack(*(Rows(merged, 32 * i, 32 * i + 32) for i in range(3)))(X),
        stack(*(part(i) for i in range(3)))(X),
    )


@schemes
def test_patterns_among_layers(name):
    model = make_sparse(Model(2).eval(), name)
    with torch.no_grad():
        want = model(TOKENS)
        hb.fuse_(model)
        for _ in range(2):
            with fused_calls(model.blocks[0]):
                torch.testing.assert_close(model(TOKENS), want, rtol=1e-5, atol=1e-5)


def test_torch_encoder_layers_run_their_parts():
    model = encoder()
    for layer in model.layers:
        make_sparse(layer, "w8a8+block16x4", lambda n: n.startswith("linear"))
    with torch.no_grad():
        want = densely(model)(X)
        same(model(X), want)
        hb.fuse_(model)
        torch.testing.assert_close(model(X), want, rtol=1e-3, atol=1e-3)


# profile and summary


@each_layout
def test_profile(name):
    model = make_sparse(Model(1).eval(), name)
    found = rows(checked(model, TOKENS))
    up = model.blocks[0].up
    row, count = found["blocks.0.up", ""], TOKENS.numel()
    assert (row.op, row.kernel, row.shape) == (up.scheme.op, _core.select(up.scheme.op), "16 -> 32")
    assert row.operations == pytest.approx(2 * count * 16 * 32 * up.density)
    hb.fuse_(model)
    found = rows(checked(model, TOKENS))
    row = found["blocks.0", ""]
    total = sum(layer.density for layer in (up, model.blocks[0].down))
    assert row.op == up.scheme.op and row.operations == pytest.approx(2 * count * 16 * 32 * total)


def test_profile_of_a_stack():
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 72}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=67, **sizes)).eval()
    make_sparse(model, "w8a8+2:4", lambda n: n.endswith(("query", "intermediate.dense")))
    hb.fuse_(hb.quantize_(model, progress=False))
    ids = torch.randint(3, 67, (2, 7))
    with torch.no_grad():
        found = rows(checked(model, ids))
    by_phase = {phase: row for (_, phase), row in found.items() if phase}
    assert by_phase["qkv"].op == "spmm_nm_w8a8+linear_w8a8" and by_phase["up"].op == "spmm_nm_w8a8"
    assert by_phase["qkv"].operations == pytest.approx(2 * 14 * 48 * 48 * 2.5)
    assert by_phase["up"].operations == pytest.approx(2 * 14 * 48 * 72 * 0.5)


@schemes
def test_summary(name):
    model = make_sparse(Model(1).eval(), name)
    summary = hb.summary(model, TOKENS)
    found = {layer.name: layer for layer in summary.layers}
    up, layer = found["blocks.0.up"], model.blocks[0].up
    assert (up.scheme, up.kernel) == (name, _core.select(layer.scheme.op))
    assert up.density == layer.density and up.break_even == predicted_break_even(name)
    assert up.float_bytes == 4 * (16 * 32 + 32)
    assert up.bytes == layer.sparse.nbytes + layer.bias.nbytes + layer._prepare().nbytes
    assert up.ms > 0 and up.float_ms > 0 and up.error < (0.05 if name in CODES else 1e-6)
    text = str(summary)
    assert "break-even sparsity" in text and "3 of 3 linear layers quantized or sparse" in text
    plain = hb.summary(hb.quantize_(Model(1), progress=False))
    assert plain.layers[0].density is None and "density" not in str(plain)


# pack_ and copies


def test_pack_leaves_sparse_layers_alone():
    model = make_sparse(Model(1).eval(), "w8a8+2:4", lambda n: n != "head")
    with pytest.raises(hb.ModelError, match="has no QLinear"):
        hb.pack_(model)
    hb.quantize_(model, progress=False)
    want = model(TOKENS)
    hb.pack_(model)
    same(model(TOKENS), want)
    assert model.blocks[0].up.weight_values.numel()
    same(copy.deepcopy(model)(TOKENS), want)


def test_a_checkpoint_over_sparse_layers():
    model = make_sparse(Model(1).eval(), "w8a8+2:4")
    model.head.static, model.head.activation = (0.02, 1), "relu"
    q = hb.quantize(torch.randn(10, 16))
    with pytest.warns(UserWarning, match="the checkpoint has no"):
        hb.load_quantized_(model, {"head.weight": q, "head.bias": torch.zeros(10)}, strict=False)
    assert isinstance(model.head, hb.QLinear) and model.head.static == (pytest.approx(0.02), 1)
    assert model.head.activation == "relu" and isinstance(model.blocks[0].up, hb.SparseLinear)
