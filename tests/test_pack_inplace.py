"""pack_: forward needs no codes, they come back exactly, ties hold, and reported bytes are true."""

from __future__ import annotations

import copy
import ctypes
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same
from halfbyte import _core
from halfbyte.bench import footprint
from halfbyte.pack_inplace import freed_bytes, is_freed
from halfbyte.packed_layer import held
from halfbyte.torch_ops import linear
from test_linear import CHANGES, twice, want

# Codes of 8 and of 4 bits, an odd number of features, every kind of offset, and NF4.
SCHEMES = [
    ("w8a8", 70, None),
    ("w4a8", 71, None),
    ("w4a16_g32", 64, None),
    ("w4a16_g32+asym", 75, "absmax"),
    ("w4a16_g64+asym", 130, "hqq"),
    ("w4a16_g32+nf4", 96, None),
    ("w8a16_g32", 33, None),
    ("w8a8_g32+ag32", 40, None),
]


def make(scheme="w8a8", k=70, method=None, n=33):
    torch.manual_seed(3)
    return hb.QLinear.from_linear(nn.Linear(k, n), scheme, method=method).eval()


def net(scheme="w4a16_g32"):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False), nn.LayerNorm(64))
    return hb.quantize_(model.eval(), scheme, progress=False)


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def layers(model):
    return [module for module in model.modules() if isinstance(module, hb.QLinear)]


def freed(model):
    return [is_freed(layer) for layer in layers(model)]


def same_state(got, expected):
    assert list(got) == list(expected)
    for name in got:
        assert torch.equal(got[name], expected[name]), name


@pytest.fixture
def no_unpacking(monkeypatch):
    """Within the test, nothing may ask for freed codes."""

    def refuse(*args):
        raise AssertionError("the codes were asked for")

    monkeypatch.setattr(_core, "unpack_linear", refuse)


@pytest.mark.parametrize(("scheme", "k", "method"), SCHEMES)
def test_forward_needs_no_codes_and_the_codes_come_back_exactly(scheme, k, method, monkeypatch):
    layer, x = make(scheme, k, method), torch.randn(4, k)
    y, codes, text = twice(layer, x), layer.weight_codes.clone(), repr(layer)
    gone = weakref.ref(layer.weight_codes)
    with monkeypatch.context() as patch:
        patch.setattr(_core, "unpack_linear", None)
        assert hb.pack_(layer) is layer
        assert is_freed(layer) and gone() is None and held(layer)["weight_codes"].is_meta
        same(twice(layer, x), y)
        same(twice(layer, x.bfloat16()[:, None]), want(make(scheme, k, method), x.bfloat16()[:, None]))
        assert repr(layer) == text and type(layer).__name__ == "QLinear" and isinstance(layer, hb.QLinear)
        assert layer.weight.shape == (33, k) and layer.weight.device.type == "cpu"
        assert freed_bytes(layer) == codes.nbytes
    same(layer.weight_codes, codes)
    assert not is_freed(layer) and type(layer) is hb.QLinear and freed_bytes(layer) == 0
    same(twice(layer, x), y)


def test_packing_is_done_once(monkeypatch):
    packs, pack = [], hb.pack
    monkeypatch.setattr("halfbyte.torch_ops.pack", lambda q: (packs.append(q), pack(q))[1])
    layer, x = make(), torch.randn(4, 70)
    for _ in range(3):
        hb.pack_(layer)
        twice(layer, x)
        _ = layer.quantized
        twice(layer, x)
    assert len(packs) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_changed_buffers_are_noticed(change):
    layer, x = make(), torch.randn(4, 70)
    before = twice(hb.pack_(layer), x)
    CHANGES[change](layer)
    y = twice(layer, x)
    assert not torch.equal(y, before)
    same(y, want(layer, x))
    same(twice(hb.pack_(layer), x), y)


def test_nothing_but_the_asking_brings_codes_back(no_unpacking):
    model = hb.pack_(net("w8a8"))
    with hb.calibrate(model):
        model(X)
    assert model[0].static is not None
    hb.decalibrate_(model)
    model[0].activation = "relu"
    model.train().eval()
    handle = model[0].register_forward_hook(lambda *args: None)
    model(X)
    handle.remove()
    with hb.force_isa("scalar"):
        y = model(X)
    with torch.inference_mode():
        same(model(X), y)
    assert model[0].weight.dtype == torch.float32 and "QLinear" in repr(model)
    hb.pack_(model)
    assert hb.summary(model).layers[0].kernel == model[0]._prepare().kernel
    with pytest.raises(hb.ShapeError, match="64"):
        model[0](torch.randn(2, 63))
    assert all(freed(model))


def test_a_changed_bias_and_static_need_no_codes(no_unpacking):
    layer, other, x = hb.pack_(make()), make(), torch.randn(2, 70)
    for changed in (layer, other):
        changed.bias.mul_(2)
        changed.static = (0.05, 3)
    same(twice(layer, x), twice(other, x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.free = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.free(self.two(self.one(x)))


@pytest.mark.parametrize("scheme", ["w4a8_g32", {"one": "w4a8_g32", "_default": "w4a16_g32"}], ids=str)
def test_tied_layers_are_freed_and_come_back_together(scheme):
    torch.manual_seed(0)
    model = hb.quantize_(Tied(), scheme, progress=False).eval()
    y = model(X)
    hb.pack_(model)
    assert freed(model) == [True] * 3 and held(model.one)["weight_codes"] is held(model.two)["weight_codes"]
    assert freed_bytes(model) == 2 * 64 * 32
    same(model(X), y)
    _ = model.two.weight_codes
    assert freed(model) == [False, False, True]
    assert model.one.weight_codes is model.two.weight_codes
    model.one.weight_codes.fill_(0x99)
    assert not torch.equal(model(X), y) and torch.equal(model.two.quantized.codes, model.one.weight_codes)
    expected = model(X)
    same(hb.pack_(model)(X), expected)
    other = copy.deepcopy(model)
    assert other.one.weight_codes is other.two.weight_codes is not model.one.weight_codes
    same(other(X), expected)


class Lm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mid = nn.Embedding(50, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mid(self.embed(ids)))


def test_codes_of_an_embedding_are_kept():
    model = hb.quantize_(Lm(), "w4a16_g32", embeddings="w4a16_g32", progress=False).eval()
    ids = torch.arange(9)
    y, packs = model(ids), [hb.pack(layer.quantized).nbytes for layer in (model.mid, model.head)]
    hb.pack_(model)
    assert (is_freed(model.mid), is_freed(model.head)) == (True, False)
    assert model.head.weight_codes is model.embed.weight_codes
    same(model(ids), y)
    rows = {row.name: row for row in hb.summary(model).layers}
    mid = model.mid
    rest = sum(t.nbytes for t in (mid.weight_scale, mid.weight_group_scale, mid.bias))
    assert is_freed(mid) and rows["mid"].bytes == rest + packs[0]
    assert rows["head"].bytes == packs[1] and rows["head"].tied_to == "embed"


def test_reported_bytes(monkeypatch):
    model = net()
    before, on_disk = footprint.resident_bytes(model), footprint.byte_count(model)
    rows = hb.summary(model)
    codes = [layer.weight_codes.nbytes for layer in layers(model)]
    hb.pack_(model)
    with monkeypatch.context() as patch:
        patch.setattr(_core, "unpack_linear", None)
        assert footprint.resident_bytes(model) == before - sum(codes)
        assert footprint.byte_count(model) == on_disk
        packed = hb.summary(model)
    assert [a.bytes - b.bytes for a, b in zip(rows.layers, packed.layers, strict=True)] == codes
    assert [row.float_bytes for row in packed.layers] == [row.float_bytes for row in rows.layers]
    assert packed.other_bytes == rows.other_bytes and str(packed) != str(rows)
    measured = hb.summary(model, X)
    assert measured.layers[0].error is not None and measured.layers[0].bytes == packed.layers[0].bytes
    assert all(freed(model)), "summary frees again what it asked for"
    _ = model.state_dict()
    assert footprint.resident_bytes(model) == before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_the_system_gets_the_memory_back():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    model = hb.quantize_(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(12))), progress=False)
    model(torch.randn(1, 1024))
    before = resident()
    hb.pack_(model)
    assert before - resident() > 12 * 1024 * 1024 / 2


def test_the_stand_in_has_nothing_to_read():
    layer, x = hb.pack_(make()), torch.randn(4, 70)
    stand_in = held(layer)["weight_codes"]
    assert stand_in.is_meta and stand_in.shape == (33, 70) and stand_in.dtype == torch.int8
    for use in (
        lambda: linear(x, "w8a8", stand_in, layer.weight_scale),
        lambda: linear(x.requires_grad_(), "w8a8", stand_in, layer.weight_scale),
        lambda: hb.pack(hb.QuantizedTensor(stand_in, layer.weight_scale, layer.scheme)),
        lambda: hb.QLinear(hb.QuantizedTensor(stand_in, layer.weight_scale * 2, layer.scheme))(x.detach()),
    ):
        with pytest.raises(hb.DeviceError, match="meta device, without data"):
            use()


def test_packs_and_codes_die_with_the_model():
    model = hb.pack_(net())
    alive = [weakref.ref(model[0]), weakref.ref(held(model[0])["weight_codes"])]
    freed_codes = weakref.ref(vars(model[0])["_freed"].codes)
    del model
    gc.collect()
    assert [ref() for ref in (*alive, freed_codes)] == [None] * 3


def test_errors_name_the_layer_and_leave_the_model():
    with pytest.raises(hb.ModelError, match="no QLinear.*quantize_"):
        hb.pack_(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(hb.DTypeError, match="pack_ takes a model"):
        hb.pack_("model")
    for spoil, error, says in (
        (lambda m: m[2].to("meta"), hb.DeviceError, "pack_: 2: .*meta device"),
        (lambda m: m[2].weight_scale.fill_(torch.nan), hb.NonFiniteError, "pack_: 2: scale"),
        (lambda m: setattr(m[2], "weight_scale", torch.ones(3)), hb.ShapeError, "pack_: 2: codes"),
    ):
        model = net()
        y, codes = model[0](X), model[0].weight_codes
        spoil(model)
        with pytest.raises(error, match=says):
            hb.pack_(model)
        assert freed(model) == [False, False] and model[0].weight_codes is codes
        same(model[0](X), y)


def test_an_error_of_the_core_leaves_the_model():
    """A layer whose sums do not fit int32 is found while packing, when others are freed already."""
    codes = torch.zeros(1, 1 << 18, dtype=torch.int8)
    long = hb.QLinear(hb.QuantizedTensor(codes, torch.ones(1), hb.Scheme.parse("w8a8")))
    big = nn.Sequential(make(k=64, n=64), long)
    y, state = big[0](X), copy.deepcopy(big.state_dict())
    with pytest.raises(ValueError, match="pack_: 1: .*int32"):
        hb.pack_(big)
    assert freed(big) == [False, False]
    same_state(big.state_dict(), state)
    same(big[0](X), y)
