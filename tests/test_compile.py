"""The torch operator: opcheck, torch.compile without graph breaks, export, tracing, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import halfbyte as hb
from corecall import same
from halfbyte.reference import linear_ref
from halfbyte.torch_ops import linear


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# int8 as ever; 4 bits in groups with a shorter last one; 16-bit activations with an odd k, and both offsets.
LAYERS = [
    ("w8a8", 24, None),
    ("w4a8_g64", 96, None),
    ("w4a16_g32+asym", 75, "absmax"),
    ("w4a16_g32+asym", 64, "hqq"),
    ("w8a8_g32+ag32", 40, None),
]


def make(k=24, n=12, scheme="w8a8", method=None):
    return hb.QLinear.from_linear(nn.Linear(k, n), scheme, method=method).eval()


def operands(shape, scheme="w8a8", method=None, dtype=torch.float32, grad=False, **options):
    """Arguments of halfbyte::linear."""
    layer = make(shape[-1], 12, scheme, method)
    x = torch.randn(shape).to(dtype).requires_grad_(grad)
    residual = torch.randn(*shape[:-1], 12).requires_grad_(grad) if options.pop("residual", False) else None
    static = (
        (torch.tensor(0.02), torch.tensor(-7, dtype=torch.int32))
        if options.pop("static", False)
        else (None, None)
    )
    return (x, scheme, layer.weight_codes, layer.weight_scale, layer.weight_group_scale, layer.weight_zero,
            layer.weight_minimum, layer.bias if options.pop("bias", True) else None,
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
        *(
            {"shape": (3, k), "scheme": scheme, "method": method, "grad": True}
            for scheme, k, method in LAYERS[1:]
        ),
        {"shape": (2, 3, 65), "scheme": "w4a8_g64", "residual": True, "grad": True},
        {"shape": (2, 64), "scheme": "w4a8_g64", "static": True},
    ],
    ids=str,
)
def test_opcheck(args):
    torch.library.opcheck(linear, operands(**args))


@pytest.mark.parametrize(("scheme", "k", "method"), LAYERS)
def test_operator_options(scheme, k, method):
    args = operands(
        (5, k), scheme, method, residual=True, static=(static := "+ag" not in scheme and "a8" in scheme)
    )
    x, _, codes, scale, *rest, bias, _, residual, input_scale, input_zero = args
    q = hb.QuantizedTensor(codes, scale, hb.Scheme.parse(scheme), k, *rest)
    fixed = (input_scale.item(), input_zero.item()) if static else None
    same(linear(*args), linear_ref(x, q, bias, residual=residual, static=fixed))
    same(linear(x, scheme, codes, scale, *rest), linear_ref(x, q))


@pytest.mark.parametrize(("scheme", "k", "method"), LAYERS)
def test_gradients_of_x_bias_and_residual(scheme, k, method):
    x, _, codes, scale, *rest, bias, _, residual, _, _ = operands(
        (2, 3, k), scheme, method, residual=True, grad=True
    )
    bias.requires_grad_()
    grad = torch.randn(2, 3, 12)
    linear(x, scheme, codes, scale, *rest, bias, "none", residual).backward(grad)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))
    same(residual.grad, grad)
    q = hb.QuantizedTensor(codes, scale, hb.Scheme.parse(scheme), k, *rest)
    torch.testing.assert_close(x.grad, grad @ q.dequantize())
    with pytest.raises(NotImplementedError, match="not for codes and scales"):
        linear(x, scheme, codes, scale.requires_grad_(), *rest).sum().backward()


def test_changed_codes_are_packed_again():
    x, scheme, codes, scale, *_ = operands((2, 24))
    y = linear(x, scheme, codes, scale)
    codes.neg_()
    same(linear(x, scheme, codes, scale), -y)
    scale.mul_(2)
    same(linear(x, scheme, codes, scale), -2 * y)
    same(linear(x, scheme, codes, scale.clone() / 2), -y)
    y = linear(x, scheme, codes, scale)
    codes.data = -codes.data  # the same tensor, of the same version
    same(linear(x, scheme, codes, scale), -y)
    scale.data = scale.data * 2
    same(linear(x, scheme, codes, scale), -2 * y)
    # Memory that is freed and used again must not bring an old pack back.
    for _ in range(20):
        q = hb.quantize(torch.randn(12, 24))
        same(linear(x, scheme, q.codes, q.scale), linear_ref(x, q))
        del q


@pytest.mark.parametrize("part", ["group_scale", "zero", "minimum"])
def test_changed_groups_are_packed_again(part):
    method = "hqq" if part == "minimum" else "absmax"
    x, scheme, *weight = operands((2, 64), "w4a16_g32+asym", method)[:7]
    at = 2 + ("group_scale", "zero", "minimum").index(part)

    def want():
        codes, scale, *rest = weight
        return linear_ref(x, hb.QuantizedTensor(codes, scale, hb.Scheme.parse(scheme), 64, *rest))

    def less(t):
        return t // 2 if part == "zero" else t / 2

    answers = [linear(x, scheme, *weight)]
    for change in (lambda t: t.copy_(less(t)), lambda t: setattr(t, "data", less(t.data))):
        change(weight[at])
        answers.append(linear(x, scheme, *weight))
        same(answers[-1], want())
        assert not torch.equal(answers[-1], answers[-2])
    weight[at] = less(weight[at])
    same(linear(x, scheme, *weight), want())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


SCHEMES = ["w8a8", "w4a8_g64", "w4a16_g32+asym", {"up": "w4a8_g64", "down": "w8a16_g32"}]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_without_graph_breaks(backend, scheme):
    model = hb.quantize_(Net(), scheme).eval()
    if model.down.scheme.per_token:
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


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g64"])
def test_compile_sees_changed_buffers(scheme):
    layer, x = make(scheme=scheme), torch.randn(3, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same(compiled(x), layer(x))
        layer.load_state_dict(make(scheme=scheme).state_dict())
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


@pytest.mark.parametrize(("scheme", "k", "method"), LAYERS)
def test_compile_with_dynamic_batch(scheme, k, method):
    layer = make(k, 12, scheme, method)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for m in (2, 3, 17):
            x = torch.randn(m, k)
            same(compiled(x), layer(x))


@pytest.mark.parametrize(("scheme", "k", "method"), LAYERS)
def test_export(scheme, k, method):
    layer, x = make(k, 12, scheme, method), torch.randn(3, k)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=1)},))
    assert any(node.target is linear for node in program.graph.nodes)
    x = torch.randn(7, k)
    with torch.no_grad():
        same(program.module()(x), layer(x))


@pytest.mark.parametrize(("scheme", "k", "method"), LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_tracers_record_the_operator(packed, scheme, k, method):
    layer, x, other = make(k, 12, scheme, method), torch.randn(3, k), torch.randn(3, k)
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
