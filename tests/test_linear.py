"""QLinear: the same answers on its short way as on the checked one, and a state that survives its users."""

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
from corecall import same
from halfbyte import _core, packed_layer, qlinear
from halfbyte.reference import linear_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(n=33, k=70, bias=True, **kwargs):
    return hb.QLinear.from_linear(nn.Linear(k, n, bias=bias, **kwargs)).eval()


def want(layer, x):
    y = linear_ref(
        x.reshape(-1, x.shape[-1]),
        layer.quantized,
        layer.bias,
        activation=layer.activation,
        static=layer.static,
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def twice(layer, x):
    """The answers of the checked way, which packs, and of the short way after it."""
    first = layer(x)
    assert layer._plan is not None
    second = layer(x)
    same(first, second)
    return second


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(70,), (0, 70), (5, 70), (2, 3, 70), (2, 0, 70), (2, 1, 3, 70)])
def test_forward(shape, bias, dtype):
    layer, x = make(bias=bias), torch.randn(shape).to(dtype)
    y = twice(layer, x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 33)
    same(y, want(layer, x))


def test_the_short_way_is_taken(monkeypatch):
    layer, x = make(), torch.randn(3, 70)
    layer(x)
    monkeypatch.setattr(packed_layer, "run_linear", None)
    monkeypatch.setattr(qlinear, "linear", None)
    for other in (x, torch.randn(70), torch.randn(2, 3, 70).bfloat16(), torch.randn(2, 1, 3, 70)):
        same(layer(other), want(layer, other))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activation_may_be_assigned(activation):
    layer, x = make(), torch.randn(4, 70)
    plain = twice(layer, x)
    layer.activation = activation
    y = twice(layer, x)
    assert (y - want(layer, x)).abs().max() < 2e-5 and not torch.equal(y, plain)


def test_strided_input():
    layer = make()
    layer(torch.randn(1, 70))
    for x in (torch.randn(70, 5).t(), torch.randn(5, 90)[:, 3:73], torch.randn(1, 70).expand(4, 70)):
        same(layer(x), want(layer, x))


def test_from_linear_leaves_the_linear_alone_and_keeps_its_mode():
    linear = nn.Linear(9, 5)
    before = copy.deepcopy(linear.state_dict())
    layer = hb.QLinear.from_linear(linear, "w8a8", name="head")
    assert layer.training and not hb.QLinear.from_linear(linear.eval()).training
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    q = hb.quantize(before["weight"])
    assert torch.equal(layer.weight_codes, q.codes) and torch.equal(layer.bias, before["bias"])
    assert not any(b.requires_grad for b in layer.buffers()) and not list(layer.parameters())
    linear.weight.data[1, 2] = torch.nan
    with pytest.raises(hb.NonFiniteError, match="head.weight.*row 1"):
        hb.QLinear.from_linear(linear, name="head")


def test_repr():
    text = repr(make())
    assert "in_features=70, out_features=33, bias=True, scheme=w8a8" in text and "static=None" in text
    assert f"kernel={_core.select('linear_w8a8')}" in text


def test_state_dict():
    layer = make()
    assert list(layer.state_dict()) == ["weight_codes", "weight_scale", "bias"]
    assert list(make(bias=False).state_dict()) == ["weight_codes", "weight_scale"]
    layer.static = (0.05, -3)
    assert list(layer.state_dict()) == ["weight_codes", "weight_scale", "bias", "input_scale", "input_zero"]


def test_load_state_dict_replaces_the_pack():
    a, b, x = make(), make(), torch.randn(4, 70)
    ya, yb = twice(a, x), twice(b, x)
    assert not torch.equal(ya, yb)
    a.load_state_dict(b.state_dict())
    same(twice(a, x), yb)
    a.load_state_dict(make().state_dict(), assign=True)
    same(twice(a, x), want(a, x))


def test_load_state_dict_decides_whether_the_layer_is_static():
    fixed, free, x = make(), make(), torch.randn(4, 70)
    fixed.static = (0.05, -3)
    yf, yd = twice(fixed, x), twice(free, x)
    states = copy.deepcopy((fixed.state_dict(), free.state_dict()))
    free.load_state_dict(states[0])
    assert free.static == pytest.approx((0.05, -3))
    same(twice(free, x), yf)
    fixed.load_state_dict(states[1])
    assert fixed.static is None
    same(twice(fixed, x), yd)


CHANGES = {
    "codes in place": lambda m: m.weight_codes.neg_(),
    "codes replaced": lambda m: setattr(m, "weight_codes", -m.weight_codes),
    "codes replaced behind its back": lambda m: m._buffers.update(weight_codes=-m.weight_codes),
    "scale in place": lambda m: m.weight_scale.mul_(2),
    "scale replaced": lambda m: setattr(m, "weight_scale", m.weight_scale * 2),
    "bias in place": lambda m: m.bias.add_(1),
    "bias replaced": lambda m: setattr(m, "bias", m.bias + 1),
    "bias of another dtype": lambda m: setattr(m, "bias", (m.bias + 1).bfloat16()),
    "bias strided": lambda m: setattr(m, "bias", torch.randn(66)[::2]),
    "bias dropped": lambda m: setattr(m, "bias", None),
    "static": lambda m: setattr(m, "static", (0.05, 7)),
    "static in place": lambda m: (setattr(m, "static", (0.05, 7)), m(torch.ones(70)), m.input_scale.mul_(2)),
    "codes given other memory": lambda m: setattr(m.weight_codes, "data", -m.weight_codes.data),
    "scale given other memory": lambda m: setattr(m.weight_scale, "data", m.weight_scale.data * 2),
    "bias given other memory": lambda m: setattr(m.bias, "data", m.bias.data + 1),
    "zero point in place": lambda m: (
        setattr(m, "static", (0.05, 7)),
        m(torch.ones(70)),
        m.input_zero.add_(1),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_buffers_are_noticed(change):
    layer, x = make(), torch.randn(4, 70)
    before = twice(layer, x)
    CHANGES[change](layer)
    y = twice(layer, x)
    assert not torch.equal(y, before)
    same(y, want(layer, x))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_casts_leave_the_numbers_alone(cast):
    layer = make()
    layer.static = (0.05, 7)
    before, x = {k: v.clone() for k, v in layer.state_dict().items()}, torch.randn(4, 70)
    y = twice(layer, x)
    cast(layer)
    for name, value in layer.state_dict().items():
        same(value, before[name])
    same(twice(layer, x), y)


def test_weight_stands_for_the_dequantized_weight():
    layer, x = make(dtype=torch.bfloat16), torch.randn(4, 70)
    weight, exact = layer.weight, hb.dequantize(layer.quantized)
    assert (weight.dtype, weight.device, weight.shape) == (torch.bfloat16, torch.device("cpu"), (33, 70))
    same(weight.dequantize(), exact)
    same(nn.functional.linear(x.bfloat16(), weight), nn.functional.linear(x.bfloat16(), exact.bfloat16()))
    assert layer.half().weight.dtype == torch.float16 and layer.float().weight.dtype == torch.float32
    same(torch.matmul(x, layer.weight.dequantize().T), x @ exact.T)
    assert "weight" not in dict(layer.named_parameters()) and "weight" not in layer.state_dict()


def test_meta_and_back():
    layer = make().to("meta")
    assert layer(torch.empty(5, 70, device="meta")).shape == (5, 33)
    with pytest.raises(hb.DeviceError, match="meta"):
        layer(torch.randn(5, 70))
    assert {b.dtype for b in layer.to_empty(device="cpu").buffers()} == {torch.int8, torch.float32}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_copies_do_not_share_the_pack(clone):
    layer, x = make(), torch.randn(4, 70)
    layer.static = (0.05, 7)
    y = twice(layer, x)
    if clone == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = clone(layer)
    assert other._plan is None and layer._plan is not None
    same(twice(other, x), y)
    other.weight_codes.zero_()
    same(twice(layer, x), y)


def test_packs_are_shared_by_codes_and_die_with_them():
    q = hb.quantize(torch.randn(8, 16))
    a, b = hb.QLinear(q), hb.QLinear(q)
    x = torch.randn(2, 16)
    same(a(x), b(x))
    core = weakref.ref(q.codes)
    assert a._prepare() is b._prepare()
    del a, b, q
    gc.collect()
    assert core() is None


def test_gradient_of_x_is_that_of_the_dequantized_layer():
    layer = make()
    weight = hb.dequantize(layer.quantized)
    for shape in ((70,), (5, 70), (2, 3, 70)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        same(y.detach(), want(layer, x.detach()))
        grad = torch.randn_like(y)
        (got,) = torch.autograd.grad(y, x, grad)
        torch.testing.assert_close(got, grad @ weight)
        with torch.no_grad():
            assert not layer(x).requires_grad


def test_no_gradient_through_an_activation():
    layer = make()
    layer.activation = "relu"
    y = layer(torch.randn(2, 70, requires_grad=True))
    with pytest.raises(NotImplementedError, match="activation='relu'"):
        y.sum().backward()


def test_inference_mode():
    with torch.inference_mode():
        layer, x = make(), torch.randn(4, 70)
        y = twice(layer, x)
        layer.weight_codes.neg_()
        same(twice(layer, x), want(layer, x))
        assert y.is_inference()
    same(twice(layer, x.clone()), want(layer, x))


def test_default_device_and_dtype_do_not_leak_in():
    layer, x = make(), torch.randn(4, 70)
    y = twice(layer, x)
    with torch.device("meta"):
        same(layer(x), y)
        same(hb.linear(x, hb.pack(layer.quantized), layer.bias), y)
    torch.set_default_dtype(torch.float64)
    try:
        same(layer(x), y)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_forward_of_the_instance_is_called():
    """As accelerate puts one there."""
    layer, x = make(), torch.randn(5, 70)
    y, own = layer(x), layer.forward
    assert layer._plan is not None
    layer.forward = lambda x: own(x) + 1
    same(layer(x), y + 1)
    del layer.forward
    same(layer(x), y)



def test_threads():
    seen = []
    layer, x = make(), torch.randn(4, 70)
    layer(x)
    plan = layer._plan
    layer._plan = lambda *args: (seen.append(args[2]), plan(*args))[1]
    try:
        for threads in (0, 1):
            hb.set_num_threads(threads)
            layer(x), layer(x)
    finally:
        hb.set_num_threads(0)
    assert seen == [torch.get_num_threads()] * 2 + [1] * 2


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.randn(5, 69), hb.ShapeError, r"\(5, 69\).*70 input features"),
        (torch.tensor(1.0), hb.ShapeError, "70"),
        (torch.randn(5, 70).double(), hb.DTypeError, "torch.float64"),
        (torch.ones(5, 70).int(), hb.DTypeError, "torch.int32"),
        (torch.randn(5, 70).to_sparse(), hb.DeviceError, "dense"),
        ([1.0], hb.DTypeError, "torch tensor, not list"),
    ],
)
def test_mistakes_are_explained(x, error, says):
    layer = make()
    for _ in range(2):  # before and after packing
        with pytest.raises(error, match=says):
            layer(x)
        layer(torch.randn(1, 70))


@pytest.mark.parametrize("activation", ["swish", None, ["relu"]])
def test_activation_must_be_one_that_is_known(activation):
    layer = make()
    with pytest.raises(ValueError, match="is none of: none, relu"):
        layer.activation = activation
    with pytest.raises(ValueError, match="is none of: none, relu"):
        hb.QLinear(layer.quantized, activation=activation)
    assert layer.activation == "none"
    assert hb.QLinear(layer.quantized, activation="silu").activation == "silu"


def test_errors_name_the_layer_and_the_cure():
    layer = hb.QLinear.from_linear(nn.Linear(4, 4), name="head")
    assert "name" not in layer.state_dict() and copy.deepcopy(layer).name == "head"
    for x in (torch.ones(2, 4).double(), torch.ones(2, 4, requires_grad=True).double()):
        with pytest.raises(hb.DTypeError, match="^head: x has the dtype torch.float64.*cast it"):
            layer(x)


def test_layers_made_in_inference_mode_count_their_changes(monkeypatch):
    with torch.inference_mode():
        layer = make()
        layer.static = (0.02, 3)
    assert not any(buffer.is_inference() for buffer in layer.buffers())
    packs = []
    pack = hb.pack
    monkeypatch.setattr("halfbyte.torch_ops.pack", lambda q: (packs.append(q), pack(q))[1])
    x = torch.randn(2, 70, requires_grad=True)
    for _ in range(3):
        layer(x)
    assert len(packs) == 1


def test_static_must_be_a_quantization():
    layer = make()
    for bad in ((0.0, 0), (float("inf"), 0), (0.1, 200), 0.1):
        with pytest.raises(ValueError, match="static"):
            layer.static = bad
    assert layer.static is None


def test_numpy_codes_are_refused():
    with pytest.raises(hb.DTypeError, match="torch tensors"):
        hb.QLinear(hb.quantize(torch.randn(3, 4).numpy()))


@torch.no_grad()
def test_layers_together():
    """What `LinearPlan.together` makes of one x, and what it leaves to the long way."""
    x, layers = torch.randn(2, 3, 70), [make(33), make(5, bias=False), make(33)]
    y = [twice(layer, x) for layer in layers]
    plans, together = [layer._plan for layer in layers], _core.LinearPlan.together
    outs = together(x, tuple((plan, 0, None, None) for plan in plans), None, 2)
    assert all(map(torch.equal, outs, y))
    (out,) = together(x, ((plans[0], 1, plans[2], y[0]),), None, 1)
    assert torch.equal(out, y[0] * y[2].relu() + y[0])

    one = (plans[0], 0, None, None)
    for given in ((), (one,) * 4, ((None, 0, None, None),)):
        with pytest.raises(ValueError, match="layer"):
            together(x, given, None, 1)
    with pytest.raises(ValueError, match="activation"):
        together(x, ((plans[0], 9, None, None),), None, 1)
    with pytest.raises(ValueError, match="eps"):
        together(x, (one,), (True, 0, 0, -1.0), 1)
    for bad in (None, x.double(), x[..., 1:], x.clone().requires_grad_()):
        assert together(bad, (one,), None, 1) is None
    for residual in (x, y[0].half(), y[0][0], y[0].clone().requires_grad_(), y[0].transpose(0, 1), y[1]):
        assert together(x, ((plans[0], 0, None, residual),), None, 1) is None
    assert together(x, ((plans[0], 0, plans[1], None),), None, 1) is None, "a gate of another width"
    layers[2].static = (0.02, 3)
    assert together(x, (one, (plans[2], 0, None, None)), None, 1) is None, "which has changed"
    layers[2](x)
    for given in ((one, (layers[2]._plan, 0, None, None)), ((plans[0], 0, layers[2]._plan, None),)):
        assert together(x, given, None, 1) is None, "which quantizes x in its own way"
