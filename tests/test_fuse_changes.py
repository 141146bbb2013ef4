"""Fused models that are copied, pickled, saved, changed and quantized afterwards."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import halfbyte as hb
from fusing import Holder, X, check_close, encoder, error, forward_of, fused_calls, roused
from halfbyte.pack_inplace import is_freed


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("used", [False, True])
@torch.no_grad()
def test_copies(how, used):
    model = Holder().eval()
    want = model(X)
    hb.fuse_(model)
    if used:
        model(X)
    twin = COPIES[how](model)
    assert (
        forward_of(twin.encoder).module is twin.encoder and forward_of(model.encoder).module is model.encoder
    )
    twin.encoder.layers[0].linear1.weight.mul_(2)
    with fused_calls(model.encoder), fused_calls(twin.encoder):
        check_close(model(X), want)
        assert error(twin(X), want) > 1e-3
    del model
    gc.collect()
    twin(X)


def test_a_shallow_copy_that_lost_its_model_says_so():
    model = hb.fuse_(encoder())
    twin = copy.copy(model)
    del model
    gc.collect()
    with pytest.raises(ReferenceError, match="fuse_ on the copy"):
        twin(X)
    hb.unfuse_(twin)
    twin(X)


@torch.no_grad()
def test_a_model_goes_with_its_last_reference():
    model = hb.fuse_(encoder())
    model(X)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


CHANGES = {
    "in place": lambda m: m.layers[0].linear1.weight.mul_(1.5),
    "norm": lambda m: m.layers[1].norm1.bias.add_(1),
    "data": lambda m: setattr(m.layers[0].linear2.weight, "data", torch.randn(32, 40)),
    "parameter": lambda m: setattr(m.layers[1].linear2, "bias", nn.Parameter(torch.randn(32))),
    "merged": lambda m: m.layers[0].self_attn.in_proj_weight[40:50].mul_(3),
    "module": lambda m: setattr(m.layers[0], "linear2", nn.Linear(40, 32)),
    "layer": lambda m: m.layers.__setitem__(1, encoder(1, norm_first=m.layers[0].norm_first).layers[0]),
    "removed": lambda m: m.layers.__delitem__(1),
    "all": lambda m: setattr(m, "layers", encoder(3, norm_first=m.layers[0].norm_first).layers[1:]),
    "final norm": lambda m: setattr(m, "norm", nn.LayerNorm(32).eval()),
    "load": lambda m: m.load_state_dict(roused(encoder(), seed=5).state_dict()),
    "there and back": lambda m: m.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_changes_after_fuse_(change, norm_first):
    model = hb.fuse_(encoder(norm_first=norm_first))
    before = model(X)
    CHANGES[change](model)
    with fused_calls(model):
        y = model(X)
    assert error(y, before) > 1e-4
    check_close(y, hb.unfuse_(model)(X))


@torch.no_grad()
def test_an_activation_that_is_exchanged():
    model = hb.fuse_(encoder())
    model(X)
    for layer in model.layers:
        layer.activation = nn.Tanh()
    hb.unfuse_(hb.fuse_(model))
    hb.fuse_(model)
    assert "no activation Tanh" in hb.fusion_report(model).rows[0].reason


@torch.no_grad()
def test_quantize_before_and_after():
    first = hb.fuse_(hb.quantize_(encoder(), "w8a8", progress=False))
    then = hb.fuse_(encoder())
    then(X)
    hb.quantize_(then, "w8a8", progress=False)
    with fused_calls(first), fused_calls(then):
        y = first(X)
        assert torch.equal(then(X), y)
    check_close(y, hb.unfuse_(first)(X), "w8a8")
    assert isinstance(then.layers[0].linear1, hb.QLinear)


@torch.no_grad()
def test_summary_save_and_load(tmp_path):
    model = hb.fuse_(hb.quantize_(encoder(), "w4a8_g32", progress=False))
    y = model(X)
    assert "w4a8_g32" in str(hb.summary(model, X))
    hb.save(model, tmp_path / "model")
    twin = hb.fuse_(hb.load(encoder(), tmp_path / "model"))
    with fused_calls(twin):
        assert torch.equal(twin(X), y)


@torch.no_grad()
def test_calibrate_after_fuse_():
    model = hb.fuse_(hb.quantize_(encoder(), "w8a8", progress=False))
    dynamic = model(X)
    with hb.calibrate(model):
        model(X)
    assert model.layers[0].linear1.static is not None
    with fused_calls(model):
        y = model(X)
    assert error(y, dynamic) > 1e-4
    check_close(y, hb.unfuse_(model)(X), "w8a8")
    hb.decalibrate_(hb.fuse_(model))
    with fused_calls(model):
        assert torch.equal(model(X), dynamic)


@torch.no_grad()
def test_packed_layers_stay_packed():
    model = hb.quantize_(encoder(), "w8a8", progress=False)
    hb.fuse_(hb.pack_(model))
    y = model(X)
    layer = model.layers[0].linear1
    assert is_freed(layer), "fusing asks for no codes"
    layer.weight_codes.neg_()  # made again
    assert not is_freed(layer)
    with fused_calls(model):
        assert error(model(X), y) > 1e-3


@torch.no_grad()
def test_pack_after_fuse_():
    model = hb.fuse_(hb.quantize_(encoder(), "w8a8", progress=False))
    y, layer = model(X), model.layers[0].linear1
    codes = weakref.ref(layer.weight_codes)
    hb.pack_(model)
    with fused_calls(model):
        assert torch.equal(model(X), y)
    assert is_freed(layer) and codes() is None, "the memory of the codes is free, after a call at the latest"
    layer.weight_codes.neg_()
    with fused_calls(model):
        assert error(model(X), y) > 1e-3
    check_close(model(X), hb.unfuse_(model)(X), "w8a8")
