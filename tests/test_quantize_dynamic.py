"""quantize_dynamic: the signature and the answers of torch's, and a copy that leaves out float weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import halfbyte as hb
from models import Model, assert_untouched, quantized, snapshot, tied


def test_quantize_dynamic_is_a_drop_in():
    model = Model(1)
    before = snapshot(model)
    copied = hb.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert_untouched(model, before)
    assert quantized(copied) == {"head", "blocks.0.up", "blocks.0.down"}
    assert quantized(hb.quantize_dynamic(model)) == quantized(copied)
    assert quantized(hb.quantize_dynamic(model, {"blocks.0"})) == {"blocks.0.up", "blocks.0.down"}
    assert quantized(hb.quantize_dynamic(model, ["head"])) == {"head"}
    assert quantized(hb.quantize_dynamic(model, {nn.Linear}, torch.qint8, None, False)) == quantized(copied)
    assert hb.quantize_dynamic(model, {nn.Linear}, torch.qint8, None, True) is model and quantized(model)


def test_quantize_dynamic_without_a_linear_layer_is_a_copy():
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    copied = hb.quantize_dynamic(model, {nn.Linear})
    assert copied is not model and type(copied[0]) is nn.Conv2d and copied[0] is not model[0]


def test_quantize_dynamic_does_not_copy_what_it_replaces(monkeypatch):
    model = tied()
    copies = []
    deepcopy = nn.Parameter.__deepcopy__
    monkeypatch.setattr(
        nn.Parameter, "__deepcopy__", lambda p, memo: (copies.append(p), deepcopy(p, memo))[1]
    )
    copied = hb.quantize_dynamic(model, {"head", "blocks"})
    held = {id(t) for t in copies}
    assert quantized(copied) == {"head", "blocks.0.up", "blocks.0.down"}
    assert id(model.blocks[0].up.weight) not in held and id(model.embed.weight) in held
    assert copied.embed.weight is not model.embed.weight and not quantized(model)


def test_quantize_dynamic_warns_of_unknown_names():
    with pytest.warns(UserWarning, match="no module is named haed"):
        hb.quantize_dynamic(Model(1), {"head", "haed"})


def test_quantize_dynamic_refuses_what_it_cannot_do():
    model = Model(1)
    before = snapshot(model)
    with pytest.raises(TypeError, match="pattern: scheme"):
        hb.quantize_dynamic(model, {nn.Linear: None})
    for spec in ("head", nn.Linear):
        with pytest.raises(TypeError, match="pass a set"):
            hb.quantize_dynamic(model, spec)
    with pytest.raises(TypeError, match="mapping"):
        hb.quantize_dynamic(model, {nn.Linear}, mapping={nn.Linear: nn.Linear})
    with pytest.raises(TypeError, match="float16"):
        hb.quantize_dynamic(model, dtype=torch.float16)
    with pytest.raises(TypeError, match="neither a module type"):
        hb.quantize_dynamic(model, {3})
    with pytest.warns(UserWarning, match="LSTM stay float"):
        hb.quantize_dynamic(model, {nn.Linear, nn.LSTM})
    assert_untouched(model, before)
