"""The torch operator: opcheck, torch.compile without graph breaks, export, tracing, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import halfbyte as hb
from corecall import same
from halfbyte.reference import linear_w8a8_ref
from halfbyte.torch_ops import linear_w8a8


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(k=24, n=12):
    return hb.QLinear.from_linear(nn.Linear(k, n)).eval()


def operands(shape, dtype=torch.float32, grad=False, **options):
    layer = make()
    x = torch.randn(shape).to(dtype).requires_grad_(grad)
    residual = torch.randn(*shape[:-1], 12).requires_grad_(grad) if options.pop("residual", False) else None
    static = (
        (torch.tensor(0.02), torch.tensor(-7, dtype=torch.int32))
        if options.pop("static", False)
        else (None, None)
    )
    return (x, layer.weight_codes, layer.weight_scale, layer.bias if options.pop("bias", True) else None,
            options.pop("activation", "none"), residual, *static)  # fmt: skip


@pytest.mark.parametrize(
    "args",
    [
        {"shape": (5, 24)},
        {"shape": (24,), "grad": True},
        {"shape": (2, 3, 24), "grad": True, "residual": True},
        {"shape": (0, 24), "bias": False},
        {"shape": (2, 24), "activation": "gelu", "residual": True},
        {"shape": (2, 24), "static": True, "grad": True},
        {"shape": (4, 24), "dtype": torch.bfloat16, "grad": True},
    ],
    ids=str,
)
def test_opcheck(args):
    torch.library.opcheck(linear_w8a8, operands(**args))


def test_operator_options():
    x, codes, scale, bias, _, residual, *static = args = operands((5, 24), residual=True, static=True)
    want = linear_w8a8_ref(x, codes, scale, bias, residual=residual, static=tuple(t.item() for t in static))
    same(linear_w8a8(*args), want)
    same(linear_w8a8(x, codes, scale), linear_w8a8_ref(x, codes, scale))


def test_gradients_of_bias_and_residual():
    x, codes, scale, bias, *_ = operands((2, 3, 24))
    bias.requires_grad_()
    residual = torch.randn(2, 3, 12, requires_grad=True)
    grad = torch.randn(2, 3, 12)
    linear_w8a8(x, codes, scale, bias, "none", residual).backward(grad)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))
    same(residual.grad, grad)
    with pytest.raises(NotImplementedError, match="not for codes and scales"):
        linear_w8a8(x, codes, scale.requires_grad_()).sum().backward()


def test_changed_codes_are_packed_again():
    x, codes, scale, *_ = operands((2, 24))
    y = linear_w8a8(x, codes, scale)
    codes.neg_()
    same(linear_w8a8(x, codes, scale), -y)
    scale.mul_(2)
    same(linear_w8a8(x, codes, scale), -2 * y)
    same(linear_w8a8(x, codes, scale.clone() / 2), -y)
    y = linear_w8a8(x, codes, scale)
    codes.data = -codes.data  # the same tensor, of the same version
    same(linear_w8a8(x, codes, scale), -y)
    scale.data = scale.data * 2
    same(linear_w8a8(x, codes, scale), -2 * y)
    # Memory that is freed and used again must not bring an old pack back.
    for _ in range(20):
        q = hb.quantize(torch.randn(12, 24))
        same(linear_w8a8(x, q.codes, q.scale), linear_w8a8_ref(x, q.codes, q.scale))
        del q


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_without_graph_breaks(backend):
    model = hb.quantize_(Net()).eval()
    with hb.calibrate(model):
        model(torch.randn(64, 24))
    hb.decalibrate_(model.up)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for shape in ((5, 24), (7, 24), (2, 3, 24)):
        x = torch.randn(shape)
        with torch.no_grad():
            y, exact = compiled(x), model(x)
        # Compilers may order the float operations between our layers differently, which moves a code by one.
        torch.testing.assert_close(y, exact, rtol=0, atol=0.03 if backend == "inductor" else 0)


def test_compile_sees_changed_buffers():
    layer, x = make(), torch.randn(3, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same(compiled(x), layer(x))
        layer.load_state_dict(make().state_dict())
        same(compiled(x), layer(x))
        layer.static = (0.02, 3)
        same(compiled(x), layer(x))
        layer.activation = "relu"
        same(compiled(x), layer(x))


def test_compiled_training_has_the_gradient_of_eager():
    model = hb.quantize_(Net())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 24)
    grads = []
    for f in (model, compiled):
        leaf = x.clone().requires_grad_()
        f(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_compile_with_dynamic_batch():
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for m in (2, 3, 17):
            x = torch.randn(m, 24)
            same(compiled(x), layer(x))


def test_export():
    layer, x = make(), torch.randn(3, 24)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=1)},))
    assert any(node.target is linear_w8a8 for node in program.graph.nodes)
    x = torch.randn(7, 24)
    with torch.no_grad():
        same(program.module()(x), layer(x))


@pytest.mark.parametrize("packed", [False, True])
def test_tracers_record_the_operator(packed):
    layer, x, other = make(), torch.randn(3, 24), torch.randn(3, 24)
    with torch.no_grad():
        if packed:
            layer(x)
        traced = torch.jit.trace(layer, x)
        same(traced(other), layer(other))
        same(make_fx(layer)(x)(other), layer(other))


@pytest.mark.parametrize("packed", [False, True])
def test_fake_tensors(packed):
    layer = make()
    if packed:
        layer(torch.randn(3, 24))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(torch.randn(2, 5, 24)).bfloat16())
    assert y.shape == (2, 5, 12) and y.dtype == torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(3, 24)).shape == (3, 12)


def test_a_wrong_shape_is_found_while_compiling():
    compiled = torch.compile(make(), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="last dimension must be 24"):
        compiled(torch.randn(3, 23))


def test_tensor_subclasses_go_through_the_operator():
    layer, x = make(), torch.randn(3, 24)
    with torch.no_grad():
        same(layer(nn.Parameter(x)), layer(x))
