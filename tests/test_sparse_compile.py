"""halfbyte::sparse_linear: opcheck, torch.compile without graph breaks, export, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import halfbyte as hb
from corecall import same
from halfbyte.sparse.scheme import NAMES
from halfbyte.sparse.torch_ops import sparse_linear
from sparse_layers import sparse

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")
schemes = pytest.mark.parametrize("name", NAMES)
each_layout = pytest.mark.parametrize(
    "name", ["w8a8+block16x4", "w8a8+2:4", "f32+unstructured", "bf16+block16x1"]
)
N, K = 33, 70


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(name, n=N, k=K):
    return hb.SparseLinear(sparse((n, k), name), torch.randn(n)).eval()


def operands(name, shape=(5, K), grad=False, **options):
    layer = make(name)
    x = torch.randn(shape).requires_grad_(grad)
    residual = torch.randn(*shape[:-1], N).requires_grad_(grad) if options.pop("residual", False) else None
    static = (torch.tensor(0.02), torch.tensor(-7, dtype=torch.int32)) if options.get("static") else ()
    return (x, name, N, K, *layer._weight(), layer.bias, options.get("activation", "none"), residual, *static)


@each_layout
@pytest.mark.parametrize("options", [{"grad": True}, {"residual": True}, {"activation": "silu"}], ids=str)
def test_opcheck(name, options):
    torch.library.opcheck(sparse_linear, operands(name, **options))


def test_opcheck_static():
    torch.library.opcheck(sparse_linear, operands("w8a8+2:4", (2, 3, K), static=True, residual=True))


@schemes
def test_gradients(name):
    x, *weight, bias, _, residual = operands(name, (2, 3, K), grad=True, residual=True)
    bias = bias.clone().requires_grad_()
    grad = torch.randn(2, 3, N)
    sparse_linear(x, *weight, bias, "none", residual).backward(grad)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))
    same(residual.grad, grad)
    torch.testing.assert_close(x.grad, grad @ sparse((N, K), name).to_dense())
    with pytest.raises(NotImplementedError, match="sparse_linear has no gradient with activation='relu'"):
        sparse_linear(x, *weight, bias, "relu").sum().backward()
    if name.startswith("f32"):
        weight[3].requires_grad_()
        with pytest.raises(NotImplementedError, match="gradients for x, bias and residual, not for values"):
            sparse_linear(x, *weight).sum().backward()


class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(K), make(name, 48), make(name, K, 48)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@each_layout
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(name, backend):
    model = Net(name).eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for shape in ((5, K), (7, K), (2, 3, K)):
        x = torch.randn(shape)
        with torch.no_grad():
            same(compiled(x), model(x))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for call, leaf in zip((model, compiled), leaves, strict=True):
        call(leaf).square().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-4)
    assert leaves[0].grad.abs().sum() > 0


def test_export():
    model, x = Net("w8a8+block16x4").eval(), torch.randn(5, K)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        same(program.module()(x), model(x))
    assert any("sparse_linear" in str(node.target) for node in program.graph.nodes)
