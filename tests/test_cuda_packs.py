"""Packs of layers on the GPU: made when a buffer changes, gone with what they were made of, never made while
a graph is captured; emulated.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import halfbyte as hb
from cuda_weights import make
from halfbyte import arrays, packed_layer, torch_ops
from halfbyte.cuda import pack
from halfbyte.cuda.pack import CudaPackedWeight


def layer_of(n=40, k=64, scheme="w8a8", **options):
    return hb.QLinear(make(n, k, scheme), torch.randn(n), **options)


def moved(model):
    """As after .to() of another device and back: all buffers are new tensors."""
    return model._apply(torch.clone)


def test_packs_follow_the_buffers(gpu):
    layer, x = layer_of(), torch.randn(3, 64)
    y, packed = layer(x), layer._prepare()
    assert isinstance(packed, CudaPackedWeight) and layer._prepare() is packed
    moved(layer)
    assert torch.equal(layer(x), y) and layer._prepare() is not packed
    packed = layer._prepare()
    with torch.no_grad():
        layer.weight_scale.mul_(2)
        layer.bias.mul_(2)
    assert torch.equal(layer(x), 2 * y) and layer._prepare() is not packed
    layer.bias = torch.zeros(40)
    assert torch.equal(layer(x), hb.linear(x, hb.pack(layer.quantized)))
    layer.load_state_dict(layer_of().state_dict())
    assert torch.equal(layer(x), hb.linear(x, hb.pack(layer.quantized), layer.bias))


def test_a_layer_that_ran_on_the_cpu_runs_on_the_gpu(emulated_library):
    """The plan of the CPU goes with the buffers that it was made of."""
    from halfbyte.cuda.library import use_library

    layer, x = layer_of(), torch.randn(3, 64)
    y = layer(x)
    assert torch.equal(layer(x), y) and layer._plan is not None
    with use_library(emulated_library):
        moved(layer)
        assert torch.equal(layer(x), y) and layer._plan is None
        assert isinstance(layer._prepare(), CudaPackedWeight)
    moved(layer)
    assert torch.equal(layer(x), y) and layer._plan is not None


def test_moving_frees_what_was_packed(gpu):
    layer = layer_of()
    layer(torch.randn(2, 64))
    packed = weakref.ref(layer._prepare())
    layer.to("meta")
    gc.collect()
    assert packed() is None and layer(torch.empty(2, 64, device="meta")).shape == (2, 40)


def test_packs_are_shared_by_codes_and_die_with_them(gpu):
    for scheme in ("w8a8", "w4a16_g64+nf4"):
        q, x = make(40, 64, scheme), torch.randn(2, 64).half()
        a, b = hb.QLinear(q), hb.QLinear(q)
        assert torch.equal(a(x), b(x))
        assert (a._prepare() is b._prepare()) == (scheme == "w8a8"), "the other holds nothing of its own"
        codes = weakref.ref(q.codes)
        del a, b, q
        gc.collect()
        assert codes() is None


def test_static_layers_read_their_scale_once(gpu, monkeypatch):
    layer, x = layer_of(), torch.randn(3, 64)
    layer.static = (0.04, 3)
    want = hb.linear(x, hb.pack(layer.quantized), layer.bias, static=(0.04, 3))
    assert torch.equal(layer(x), want)
    monkeypatch.setattr(packed_layer, "static_of", lambda *tensors: pytest.fail("was read again"))
    assert torch.equal(layer(x), want)
    monkeypatch.undo()
    layer.static = None
    assert not torch.equal(layer(x), want)


def test_a_buffer_that_lies_where_another_lay_is_another(gpu, monkeypatch):
    """Its id and its address can be those of the one before."""
    monkeypatch.setattr(packed_layer, "state", lambda tensor: (0, 0))
    layer, x = hb.QLinear(make(8, 32, "w8a8")), torch.randn(2, 32)
    for _ in range(50):
        y, flipped = layer(x), (-layer.weight_codes).numpy().copy()
        layer.weight_codes = None
        layer.weight_codes = torch.from_numpy(flipped)
        torch.testing.assert_close(layer(x), -y)


def test_a_layer_keeps_no_codes_alive(gpu):
    layer = layer_of()
    layer(torch.randn(2, 64))
    codes = weakref.ref(layer.weight_codes)
    layer.weight_codes = layer.weight_codes.clone()
    assert codes() is None


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_buffers_that_a_state_brings_lie_with_the_others(gpu):
    static, asym = layer_of(), layer_of(scheme="w4a16_g32+asym")
    static.static = (0.02, 3)
    other = hb.QLinear(make(40, 64, "w4a16_g32+asym", "absmax"), torch.randn(40))
    assert {asym.weight_zero is None, other.weight_zero is None} == {True, False}
    for saved, layer in ((static, layer_of().to("meta")), (other, asym.to("meta"))):
        layer.load_state_dict(saved.state_dict())
        assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    tables = [hb.QEmbedding(layer.quantized) for layer in (layer_of(scheme="w4a16_g32+asym"), other)]
    tables[0].to("meta").load_state_dict(tables[1].state_dict())
    assert {buffer.device.type for buffer in tables[0].buffers()} == {"meta"}


def test_a_static_zero_that_lies_where_another_lay_is_another(gpu, monkeypatch):
    monkeypatch.setattr(torch_ops, "state", lambda tensor: (0, 0))
    scale = torch.tensor(0.5)
    for zero in range(50):
        assert torch_ops.static_of(scale, torch.full((), zero, dtype=torch.int32)) == (0.5, zero)


def test_buffers_of_others_do_no_harm(gpu):
    layer, x = layer_of(), torch.randn(2, 64)
    y = layer(x)
    layer.register_buffer("other", torch.zeros(1))
    assert torch.equal(layer(x), y) and torch.equal(layer(x), y)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8+2:4"])
def test_nothing_is_packed_while_a_graph_is_captured(gpu, monkeypatch, scheme):
    weight, x = torch.randn(40, 64) * (torch.arange(64) % 4 < 2), torch.randn(3, 64)
    made = hb.sparsify(weight, scheme) if "+" in scheme else hb.quantize(weight, scheme)
    layer = (hb.SparseLinear if "+" in scheme else hb.QLinear)(made)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "_capturing", lambda tensor: True)
        with pytest.raises(hb.CudaError, match="call the model once before a CUDA graph is captured"):
            layer(x)
    y = layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "_capturing", lambda tensor: True)
        assert torch.equal(layer(x), y)
        layer.static = (0.02, 1)
        with pytest.raises(hb.CudaError, match="captured"):
            layer(x)


@pytest.mark.parametrize("m", [3, 140])
def test_levels_are_copied_to_the_gpu_once(gpu, monkeypatch, m):
    layer, x = layer_of(scheme="w4a16_g64+nf4"), torch.randn(m, 64)
    monkeypatch.setattr(arrays, "_tables", {})
    with monkeypatch.context() as patch:
        patch.setattr(pack, "_capturing", lambda tensor: True)
        with pytest.raises(hb.CudaError, match="call the model once before"):
            layer(x)
    layer._prepare()
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: pytest.fail("was copied again"))
    monkeypatch.setattr(pack, "_capturing", lambda tensor: True)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T + layer.bias)
    assert layer_of(scheme="w4a16_g64+nf4")(x).shape == (m, 40)


def test_a_fake_table_of_levels_is_not_kept(gpu, monkeypatch):
    monkeypatch.setattr(arrays, "_tables", {})
    layer = layer_of(scheme="w4a16_g64+nf4")
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.dequantize()
    with torch.inference_mode():
        layer.dequantize()
    assert [type(table) for table in arrays._tables.values()] == [torch.Tensor]
    assert not any(table.is_inference() for table in arrays._tables.values())


def test_the_dense_copy_of_sparse_codes_is_not_captured(gpu, monkeypatch):
    layer = hb.SparseLinear(hb.sparsify(torch.randn(40, 64) * (torch.arange(64) % 4 < 2), "w8a8+2:4"))
    layer(torch.randn(3, 64))
    with monkeypatch.context() as patch:
        patch.setattr(pack, "_capturing", lambda tensor: True)
        with pytest.raises(hb.CudaError, match="call the model once with as many rows as will be captured"):
            layer(torch.randn(140, 64))
    y = layer(torch.randn(140, 64))
    monkeypatch.setattr(pack, "_capturing", lambda tensor: True)
    assert layer(torch.randn(140, 64)).shape == y.shape
