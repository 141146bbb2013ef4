"""SparseLinear and the linear functions on sparse weights: as dense with the same zeros, int8 bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same
from halfbyte import _core, packed_layer
from halfbyte.sparse import linear as sparse_linear_module
from halfbyte.sparse.scheme import NAMES
from sparse_layers import CODES, FLOAT, pruned, sparse

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")
schemes = pytest.mark.parametrize("name", NAMES)
codes = pytest.mark.parametrize("name", CODES)
N, K = 33, 70
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(scheme, n=N, k=K, bias=True, **options):
    return hb.SparseLinear(sparse((n, k), scheme), torch.randn(n) if bias else None, **options).eval()


def close(y, x, weight, bias):
    """As float products are: k roundings of float32 in any order, one of the bias and one to the dtype."""
    want = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert y.dtype == x.dtype
    eps = (x.shape[-1] + 1) * 2.0**-24 + torch.finfo(y.dtype).eps
    assert ((y.double() - want).abs() <= eps * size + torch.finfo(torch.float16).tiny).all()


def want(layer, x):
    """Of an int8 layer: what the QLinear with the same codes gives."""
    twin = hb.QLinear(layer.sparse.to_quantized(), layer.bias, activation=layer.activation)
    twin.static = layer.static
    return twin(x)


def check(layer, x):
    y = layer(x)
    same(layer(x), y)  # the short way
    assert y.shape == (*x.shape[:-1], layer.out_features)
    if layer.scheme.per_token:
        same(y, want(layer, x))
    else:
        close(y, x, layer.dequantize(), torch.zeros(()) if layer.bias is None else layer.bias)
    return y


# The layer


@schemes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward(name, dtype, bias):
    layer = make(name, bias=bias)
    for shape in ((K,), (0, K), (5, K), (2, 3, K), (40, K)):
        check(layer, torch.randn(shape).to(dtype))


@schemes
def test_the_short_way_is_taken(name, monkeypatch):
    layer, x = make(name), torch.randn(3, K)
    y = layer(x)
    monkeypatch.setattr(packed_layer, "run_linear", None)
    monkeypatch.setattr(sparse_linear_module, "sparse_linear", None)
    same(layer(x), y)
    for other in (torch.randn(K), torch.randn(2, 3, K).bfloat16(), torch.randn(2, 1, 3, K)):
        assert layer(other).shape == (*other.shape[:-1], N)


@codes
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_and_static_scales(name, activation):
    layer, x = make(name, activation=activation), torch.randn(9, K)
    check(layer, x)
    layer.static = (0.03, -5)
    check(layer, x)
    layer.static = None
    check(layer, x)


def test_static_scales_of_floats_are_refused():
    layer = make("f32+2:4")
    with pytest.raises(ValueError, match=r"with f32\+2:4 activations have none, as they stay floats"):
        layer.static = (0.03, -5)
    assert layer.static is None and "static" not in repr(layer)


def test_relu_of_floats():
    layer, x = make("f32+unstructured", activation="relu"), torch.randn(9, K)
    y = layer(x)
    layer.activation = "none"
    same(y, layer(x).relu())


@schemes
def test_every_instruction_set(name):
    layer, x = make(name), torch.randn(7, K)
    supported = [isa for isa, there in hb.cpu_features().items() if there]
    for isa in supported:
        with hb.force_isa(isa):
            check(layer, x)


def test_no_weights_at_all():
    for name in NAMES:
        layer = hb.SparseLinear(hb.sparsify(torch.zeros(N, K), name), torch.randn(N))
        same(layer(torch.randn(4, K)), layer.bias.expand(4, N))


@schemes
def test_what_it_says(name):
    layer = make(name, name="up")
    kernel, share = _core.select(layer.scheme.op), f"{layer.density:.3g}"
    assert f"scheme={name}, kernel={kernel}" in repr(layer) and f"density={share}" in repr(layer)
    assert layer.density == layer.sparse.density
    view = layer.weight
    assert (view.shape, view.dtype, view.device.type) == ((N, K), torch.float32, "cpu")
    same(torch.relu(view), layer.sparse.to_dense().relu())
    with pytest.raises(hb.ShapeError, match="^up: x has the shape"):
        layer(torch.randn(2, K + 1))
    with pytest.raises(hb.ShapeError, match="^up: x has the shape"):
        layer(torch.randn(2, K + 1, requires_grad=True))
    with pytest.raises(ValueError, match="activation 'tanh'"):
        layer.activation = "tanh"


def test_what_it_takes():
    for bad in (pruned((4, 4), "f32+2:4"), hb.sparsify(pruned((4, 4), "f32+2:4").numpy(), "f32+2:4")):
        with pytest.raises(hb.DTypeError, match="SparseTensor of torch tensors"):
            hb.SparseLinear(bad)
    linear = nn.Linear(K, N).bfloat16().eval()
    twin = hb.SparseLinear.from_linear(linear, "f32+unstructured", name="up")
    assert twin.float_dtype == torch.bfloat16 and not twin.training and twin.name == "up"
    same(twin.dequantize(), linear.weight.detach().float())
    with pytest.raises(hb.PatternError, match=r"^up\.weight is not 2:4"):
        hb.SparseLinear.from_linear(linear, "f32+2:4", name="up")


# Its state


@schemes
def test_a_changed_buffer_is_packed_again(name):
    layer, x = make(name), torch.randn(3, K)
    y = check(layer, x)
    values = layer.weight_values
    values.neg_()
    assert not torch.equal(check(layer, x), y)
    values.data = torch.full_like(values, 0x88 if layer.scheme.group else 0)  # two codes of 0 in a byte
    same(check(layer, x), layer.bias.expand(3, N))
    layer.weight_values = sparse((N, K), name).values
    same(check(layer, x), y)


def test_layers_that_share_a_weight_share_its_pack():
    tensor = sparse((N, K), "w8a8+block16x4")
    layers = [hb.SparseLinear(tensor, b) for b in (None, torch.randn(N))]
    packs = [layer._prepare() for layer in layers]
    assert packs[0] is packs[1]
    other = hb.SparseLinear(dataclasses.replace(tensor, scale=2 * tensor.scale))
    assert other.weight_values is layers[0].weight_values and other._prepare() is not packs[0]


def test_layers_made_in_inference_mode_count_their_changes():
    with torch.inference_mode():
        layer = make("w8a8+2:4")
        layer(torch.randn(2, K))
    assert not any(buffer.is_inference() for buffer in layer.buffers())
    layer.weight_values.neg_()
    check(layer, torch.randn(2, K))


@schemes
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(name, way):
    layer, x = make(name, name="up", activation="relu" if name in CODES else "none"), torch.randn(3, K)
    y = check(layer, x)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    same(check(twin, x), y)
    assert (twin.name, twin.activation, str(twin.scheme)) == ("up", layer.activation, name)
    twin.weight_values.zero_()
    same(check(layer, x), y)


@schemes
def test_half_keeps_the_numbers(name):
    layer, x = make(name), torch.randn(3, K).half()
    y = check(layer, x)
    layer.half()
    assert layer.weight.dtype == torch.float16 and layer.bias.dtype == torch.float32
    same(check(layer, x), y)
    assert layer.to("meta").device.type == "meta"
    with pytest.raises(hb.DeviceError, match="meta"):
        layer(x)


@schemes
def test_state_dicts_of_other_zeros(name):
    layer, x = make(name), torch.randn(3, K)
    layer(x)
    other = hb.SparseLinear(sparse((N, K), name, amount=0.3, seed=7), torch.randn(N))
    if layer.scheme.per_token:
        other.static = (0.02, 3)
    layer.load_state_dict(other.state_dict())
    same(layer(x), other(x))
    assert layer.static == other.static and layer.density == other.density
    names = {"positions"} if "crow" not in other.sparse.parts() else {"crow", "columns"}
    names |= {"values"} | ({"scale"} if layer.scheme.per_token else set())
    names |= {"group_scale"} if layer.scheme.group else set()
    own = {f"weight_{part}" for part in names} | {"bias"}
    assert set(other.state_dict()) - {"input_scale", "input_zero"} == own


def test_a_state_with_group_scales_of_another_dtype():
    for dtype in (torch.float16, torch.float32):
        layer = make("w4a8_g32+block16x4")
        other = sparse((N, K), "w4a8_g32+block16x4", seed=7)
        scale = other.group_scale.to(dtype) * (1.2345 if dtype == torch.float32 else 1)
        other = hb.SparseLinear(dataclasses.replace(other, group_scale=scale), torch.randn(N))
        layer.load_state_dict(other.state_dict())
        same(layer.weight_group_scale, scale)
        x = torch.randn(3, K)
        same(layer(x), other(x))


def test_states_of_another_kind():
    layer = make("w8a8+2:4")
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"of the scheme w8a8\+4:8 and this layer of w8a8\+2:4"):
        layer.load_state_dict(make("w8a8+4:8").state_dict())
    with pytest.raises(RuntimeError, match="weight is float and this layer is sparse: load it before"):
        layer.load_state_dict(nn.Linear(K, N).state_dict(), strict=False)
    quantized = hb.QLinear.from_linear(nn.Linear(K, N))
    with pytest.raises(RuntimeError, match="weight_codes is of a dense layer and this is sparse"):
        layer.load_state_dict(quantized.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="weight_values is of a sparse layer and this one is not"):
        quantized.load_state_dict(layer.state_dict(), strict=False)
    for key, value in layer.state_dict().items():
        if key != "bias":
            same(value, before[key], key)


def test_a_damaged_state_is_noticed():
    layer, state = make("f32+unstructured"), make("f32+unstructured").state_dict()
    state["weight_columns"][5] = 1000
    before, x = layer.state_dict(), torch.randn(2, K)
    y = layer(x)
    kept = {name: value.clone() for name, value in before.items()}
    model = nn.Sequential(layer)
    for strict, assign in ((True, False), (False, False), (True, True)):
        with pytest.raises(RuntimeError, match=r"the sparse weight of 0: columns\[5\] is 1000") as caught:
            model.load_state_dict({f"0.{n}": v for n, v in state.items()}, strict=strict, assign=assign)
        assert str(caught.value).count("\n\t") == 1
    for name, bad in (("crow", state["weight_crow"][:-1]), ("values", torch.zeros(3)), ("values", [1.0]),
                      ("columns", before["weight_columns"].long() + 2**32)):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"the sparse weight of SparseLinear: .*{name}"):
            layer.load_state_dict(before | {f"weight_{name}": bad})
    for name, value in layer.state_dict().items():
        same(value, kept[name], name)
    same(layer(x), y)
    layer.weight_columns[5] = 1000
    for _ in range(2):
        with pytest.raises(hb.PatternError, match=r"^SparseLinear: columns\[5\] is 1000"):
            layer(torch.randn(2, K))


# The functions


@codes
def test_linear_on_numpy_and_torch(name):
    tensor = sparse((N, K), name)
    packed, twin = hb.pack(tensor), hb.pack(tensor.to_quantized())
    x, bias, residual = torch.randn(6, K), torch.randn(N), torch.randn(6, N)
    for options in ({}, {"activation": "gelu", "residual": residual}, {"static": (0.02, 3)}):
        y = hb.linear(x, packed, bias, **options)
        same(y, hb.linear(x, twin, bias, **options))
        arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        same(torch.from_numpy(hb.linear(x.numpy(), packed, bias.numpy(), **arrays)), y)
    if tensor.scheme.group:
        with pytest.raises(ValueError, match=f"one integer sum .*; {name} adds floats".replace("+", ".")):
            hb.linear(x, packed, out_dtype=torch.int32)
    else:
        accumulated = hb.linear(x, packed, out_dtype=torch.int32)
        same(accumulated, hb.linear(x, twin, out_dtype=torch.int32))
    from_numpy = hb.pack(hb.sparsify(pruned((N, K), name).numpy(), name))
    same(torch.from_numpy(hb.linear(x.numpy(), from_numpy)), hb.linear(x, packed))


@pytest.mark.parametrize("name", FLOAT)
def test_linear_of_floats(name):
    tensor = sparse((N, K), name)
    packed, x = hb.pack(tensor), torch.randn(6, K)
    close(hb.linear(x, packed), x, tensor.to_dense(), torch.zeros(()))
    y = hb.linear(x, packed, residual=torch.ones(6, N), out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="int32 output"):
        hb.linear(x, packed, out_dtype=torch.int32)
    with pytest.raises(ValueError, match="give none"):
        hb.linear(x, packed, static=(0.1, 0))
    assert str(packed.scheme) == name and packed.kernel in repr(packed) and packed.shape == (N, K)


@schemes
def test_several_weights(name):
    tensors = [sparse((n, K), name, seed=n) for n in (N, 16, 5)]
    packs, x = [hb.pack(t) for t in tensors], torch.randn(6, K)
    biases = [torch.randn(N), None, torch.randn(5)]
    for y, packed, bias in zip(hb.linears(x, packs, biases), packs, biases, strict=True):
        same(y, hb.linear(x, packed, bias))
    gate = hb.pack(sparse((N, K), name, seed=9))
    y = hb.gated_linear(x, packs[0], gate, biases[0])
    up, gated = hb.linear(x, packs[0], biases[0]), hb.linear(x, gate, activation="silu")
    torch.testing.assert_close(y, up * gated, rtol=1e-6, atol=1e-6)
    if name in CODES:
        twins = [hb.pack(t.to_quantized()) for t in tensors]
        for y, own in zip(hb.linears(x, twins, biases), hb.linears(x, packs, biases), strict=True):
            same(own, y)
    other = hb.pack(sparse((N, K), next(n for n in NAMES if n != name)))
    for call in (lambda: hb.linears(x, [packs[0], other]), lambda: hb.gated_linear(x, packs[0], other)):
        with pytest.raises(hb.ShapeError, match=r"a weight is|gate is"):
            call()


def test_x_with_a_nan_and_gradients():
    packed, x = hb.pack(sparse((N, K), "w8a8+block16x4")), torch.randn(4, K)
    x[2, 5] = torch.nan
    y = hb.linear(x, packed)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()
    with pytest.raises(ValueError, match="SparseLinear"):
        hb.linear(torch.randn(4, K, requires_grad=True), packed)
    with pytest.raises(hb.DTypeError, match="SparseTensor"):
        hb.pack(torch.ones(2, 2))


def test_numpy_arrays_of_other_kinds_are_refused():
    packed = hb.pack(sparse((N, K), "w8a8+2:4"))
    with pytest.raises(hb.DTypeError):
        hb.linear(np.ones((2, K), np.int8), packed)
