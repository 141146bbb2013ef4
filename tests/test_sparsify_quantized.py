"""sparsify_ on layers that are quantized, or are by it: outputs stay what they are, bit for bit."""

from __future__ import annotations

import copy

import pytest

import halfbyte as hb
from corecall import same
from models import TOKENS, quantized, report
from sparse_layers import LINEARS, masked_model, schemes, sparse_layers

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


@pytest.mark.parametrize("pattern", ["unstructured", "block16x4", "2:4", "1:4", "4:8"])
def test_quantized_layers_stay_exact(pattern):
    model = hb.quantize_(masked_model(pattern), progress=False)
    model.blocks[0].up.static = (0.03, -4)
    model.blocks[0].up.activation = "relu"
    want = model(TOKENS)
    hb.sparsify_(model, "always", progress=False)
    same(model(TOKENS), want)
    assert set(sparse_layers(model)) == set(LINEARS) and not quantized(model)
    assert all(name.startswith("w8a8+") for name in schemes(model).values())
    assert model.blocks[0].up.static == (pytest.approx(0.03), -4) and model.blocks[0].up.activation == "relu"
    if pattern == "block16x4":
        assert schemes(model)["blocks.0.up"] == "w8a8+block16x4"


@pytest.mark.parametrize("when", ["always", "smaller"])
def test_int4_layers_stay_exact(when):
    model = hb.quantize_(masked_model("block16x4"), {"head": "w4a8", "_default": "w4a8_g32"}, progress=False)
    want = model(TOKENS)
    hb.sparsify_(model, when, progress=False)
    same(model(TOKENS), want)
    assert set(schemes(model).values()) == {"w4a8_g32+block16x4"}
    assert report(model)["head"][1].startswith("no sparse kernel has the numbers of w4a8, only of w8a8, ")
    model = hb.sparsify_(
        hb.quantize_(masked_model("2:4"), "w4a8_g64", progress=False), "always", progress=False
    )
    assert not schemes(model) and "none of block16x4 leaves out 10%" in report(model)["head"][1]


@pytest.mark.parametrize("values", ["w8a8", "w4a8_g64"])
def test_a_scheme_quantizes_on_the_way(values):
    model = masked_model("block16x4")
    twin = hb.quantize_(copy.deepcopy(model), values, progress=False)
    hb.sparsify_(model, "always", scheme=f"{values}+block16x4", progress=False)
    assert set(schemes(model).values()) == {f"{values}+block16x4"}
    same(model(TOKENS), twin(TOKENS))
    assert not schemes(hb.sparsify_(masked_model("block16x4"), "always", pattern="block16x4"))
