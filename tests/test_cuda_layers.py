"""Layers and models on the GPU: the same calls, the operator, compile, pack_, summary; emulated."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import halfbyte as hb
from cuda_weights import make
from halfbyte.cuda.pack import TorchWeight
from halfbyte.torch_ops import linear

SCHEMES = ["w8a8", "w4a16_g32+asym", "w4a8_g64", "w8a16", "w4a16_g64+nf4", "w8a8+ag32"]


def layer_of(n=40, k=64, scheme="w8a8", **options):
    return hb.QLinear(make(n, k, scheme), torch.randn(n), **options)


def moved(model):
    """As after .to() of another device and back: all buffers are new tensors."""
    return model._apply(torch.clone)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.head = nn.Linear(64, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_is_the_op(gpu, scheme, dtype):
    layer = layer_of(scheme=scheme, activation="silu")
    for shape in ((64,), (3, 64), (2, 3, 64), (0, 64)):
        x = torch.randn(shape).to(dtype)
        y = layer(x)
        assert torch.equal(y, hb.linear(x, hb.pack(layer.quantized), layer.bias, activation="silu"))
        assert torch.equal(y, layer(x)) and y.dtype == dtype
    assert layer._plan is None


def test_errors_name_the_layer(gpu):
    layer = layer_of(name="block.up")
    with pytest.raises(hb.ShapeError, match="block.up: x has the shape"):
        layer(torch.randn(3, 65))


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g64+nf4", "w8a8", "w8a8+ag32"])
def test_autocast(gpu, compiled, scheme):
    """As nn.Linear, but where x is quantized: there it costs no accuracy to return what was given."""
    layer, x = layer_of(scheme=scheme), torch.randn(3, 64)
    cast = scheme.startswith("w4a16")
    want = layer(x.bfloat16() if cast else x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert layer(x.double().half()).dtype == (torch.bfloat16 if cast else torch.float16)
        assert y.dtype == want.dtype == compiled(layer)(x).dtype
        if "+ag" not in scheme:  # its product is torch's own, which autocast rounds
            assert torch.equal(y, want) and torch.equal(compiled(layer)(x), want)
        x.requires_grad_()
        layer(x).sum().backward()
        assert x.grad.dtype == torch.float32


def operands(shape, scheme="w8a8", grad=False, static=False, dtype=torch.float32):
    layer = layer_of(12, shape[-1], scheme)
    x = torch.randn(shape).to(dtype).requires_grad_(grad)
    numbers = (torch.tensor(0.02), torch.tensor(-7, dtype=torch.int32)) if static else (None, None)
    return (x, scheme, *layer._weight(), layer.bias, "none", None, *numbers)


def test_the_operator_reads_static_scales_once(gpu, monkeypatch):
    args = operands((3, 40), static=True)
    y = linear(*args)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda self: pytest.fail("was read again"))
        assert torch.equal(linear(*args), y)
    args[-2].mul_(2)
    packed = hb.pack(hb.QuantizedTensor(*args[2:4], scheme=hb.Scheme(8, 8)))
    assert torch.equal(linear(*args), hb.linear(args[0], packed, args[7], static=(0.04, -7)))


CALLS = [
    {"shape": (5, 24)},
    {"shape": (2, 3, 24), "grad": True},
    {"shape": (3, 65), "scheme": "w4a8_g64", "grad": True},
    {"shape": (3, 40), "scheme": "w4a16_g32", "dtype": torch.float16, "grad": True},
    {"shape": (3, 40), "scheme": "w4a16_g32+asym", "dtype": torch.bfloat16},
    {"shape": (200, 32), "scheme": "w4a16_g32", "dtype": torch.float16},
    {"shape": (140, 40)},
    {"shape": (3, 40), "scheme": "w4a16_g32+nf4"},
    {"shape": (2, 24), "static": True},
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_opcheck(gpu, call):
    torch.library.opcheck(linear, operands(**call))


def test_gradients_are_those_of_the_weight(gpu):
    layer, x = layer_of(), torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 64))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16_g32"])
def test_compiled_models(gpu, compiled, scheme):
    model = hb.quantize_(Mlp(), scheme, embeddings=scheme, progress=False).eval().half()
    with torch.no_grad():
        y = model(IDS)
        assert torch.equal(compiled(model)(IDS), y)
        assert torch.equal(compiled(model)(IDS[:1]), model(IDS[:1]))


def test_tracing(gpu):
    layer, x = layer_of().eval(), torch.randn(3, 64)
    graph = make_fx(layer)(x)
    assert any("halfbyte.linear" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(x), layer(x))


def fake(device, n=12, k=24, m=3, x_on=None):
    codes = torch.empty(n, k, dtype=torch.int8, device=device)
    return torch.empty(m, k, device=x_on or device), "w8a8", codes, torch.empty(n, device=device)


def test_fake_tensors_of_a_gpu():
    with FakeTensorMode():
        y = linear(*fake("cuda"))
        assert y.shape == (3, 12) and y.device.type == "cuda"
        with pytest.raises(hb.DeviceError, match="x is on the device 'cpu' and codes on 'cuda:0'"):
            linear(*fake("cuda", x_on="cpu"))
        with pytest.raises(hb.DeviceError, match="x is on the device 'cuda:0' and codes on 'cpu'"):
            linear(*fake("cpu", x_on="cuda"))
        with pytest.raises(hb.DeviceError, match="no memory of its own"):
            hb.quantize_rows(torch.empty(2, 3, device="cuda"))


def test_the_operator_has_a_cuda_side():
    for name in ("linear", "sparse_linear", "sparse_values", "embedding"):
        import halfbyte.embedding
        import halfbyte.sparse.torch_ops  # noqa: F401

        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"halfbyte::{name}", key)


def test_quantize_on_the_gpu_is_quantize_on_the_cpu(emulated_library):
    from halfbyte.cuda.library import use_library

    weight = torch.randn(24, 70).bfloat16()
    for scheme in (*SCHEMES, "w4a16_g32"):
        q = hb.quantize(weight, scheme)
        with use_library(emulated_library):
            other = hb.quantize(weight, scheme)
            with pytest.raises(hb.NonFiniteError, match="lm.weight holds a NaN"):
                hb.quantize(weight / 0, scheme, name="lm.weight")
        for what in ("codes", "scale", "group_scale", "zero", "minimum"):
            a, b = getattr(q, what), getattr(other, what)
            assert a is b is None or torch.equal(a, b)


def test_a_model(gpu):
    torch.manual_seed(1)
    model = Mlp().eval()
    want = model(IDS)
    hb.quantize_(model, {"head": "w8a8", "_default": "w4a16_g32"}, embeddings="w8a8", progress=False)
    with torch.no_grad():
        y = model(IDS)
    assert (y - want).norm() < 0.2 * want.norm()
    assert torch.equal(copy.deepcopy(model)(IDS), y) and torch.equal(moved(model)(IDS), y)


# pack_


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16_g32+asym", "w4a8_g64"])
def test_codes_are_freed_and_made_again(gpu, scheme):
    model = nn.Sequential(hb.QLinear(make(40, 65, scheme)), hb.QLinear(make(24, 40, scheme))).half()
    x, few = torch.randn(200, 65).half(), torch.randn(3, 65).half()
    y, y_few, state = model(x), model(few), copy.deepcopy(model.state_dict())
    hb.pack_(model)
    assert "_freed" in vars(model[0]) and "_freed" in vars(model[1])
    assert torch.equal(model(few), y_few) and torch.equal(model(x), y) and "_freed" in vars(model[0])
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert "_freed" not in vars(model[0]) and torch.equal(model(x), y)
    hb.pack_(model)
    with FakeTensorMode():
        codes = model[0].weight_codes
    assert type(codes) is torch.Tensor and torch.equal(codes, state["0.weight_codes"])


def test_codes_that_torch_computes_from_stay(gpu):
    model = nn.Sequential(hb.QLinear(make(40, 64, "w4a16_g64+nf4")), hb.QLinear(make(24, 40, "w8a8")))
    hb.pack_(model)
    assert "_freed" not in vars(model[0]) and "_freed" in vars(model[1])
    assert isinstance(model[0]._prepare(), TorchWeight) and model(torch.randn(2, 64)).shape == (2, 24)


# sparse layers and embeddings


@pytest.mark.parametrize(
    "scheme", ["w8a8+2:4", "w8a8+4:8", "w4a8_g32+block16x4", "f32+2:4", "bf16+block16x1"]
)
def test_sparse_layers(gpu, scheme):
    weight = torch.randn(40, 64) * (torch.arange(64) % 4 < 2) * (torch.arange(64) < 40)
    sparse, x = hb.sparsify(weight, scheme), torch.randn(5, 64)
    layer = hb.SparseLinear(sparse, torch.randn(40), activation="relu")
    y = layer(x)
    if sparse.scheme.quantized:
        dense = hb.QLinear(sparse.to_quantized(), layer.bias)
        assert torch.equal(y, torch.relu(dense(x)))
    else:
        torch.testing.assert_close(y, torch.relu(x @ sparse.to_dense().T + layer.bias))
    assert layer._prepare() is layer._prepare() and not layer._prepare().shares_codes
    assert layer._prepare().kernel in repr(layer) and "not packed yet" in repr(hb.SparseLinear(sparse))
    row = hb.summary(nn.Sequential(layer)).layers[0]
    assert row.kernel.startswith(layer._prepare().kernel) and row.break_even is None
    assert row.why_torch == ("" if sparse.scheme.quantized else "no kernel for sparse floats")
    x.requires_grad_()
    layer.activation = "none"
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, sparse.to_dense().sum(0).expand(5, 64))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_embeddings(gpu, scheme):
    table = hb.QEmbedding(make(20, 33, scheme), float_dtype=torch.bfloat16)
    ids = torch.tensor([[0, 19, 3], [7, 7, 1]], dtype=torch.int32)
    assert torch.equal(table(ids), table.dequantize()[ids.long()].bfloat16())
    assert table(ids[:0]).shape == (0, 3, 33)
    wild = table(torch.tensor([-1, 2, 20]))
    assert wild[[0, 2]].isnan().all() and torch.equal(wild[1], table(torch.tensor(2)))
    with pytest.raises(hb.DTypeError, match="ids have the dtype"):
        table(torch.randn(2))


def test_ids_on_another_device_than_the_table():
    table = hb.QEmbedding(make(20, 32, "w8a8"), name="wte")
    on_gpu, parts = copy.copy(table), table._buffers
    with FakeTensorMode():
        on_gpu._buffers = {
            name: None if b is None else torch.empty(b.shape, dtype=b.dtype, device="cuda")
            for name, b in parts.items()
        }
    match = "wte: ids are on the device 'cpu' and the table on 'cuda:0': move the ids there"
    with pytest.raises(hb.DeviceError, match=match):
        on_gpu(torch.tensor([1, 2]))
    match = "ids are on the device 'cuda:0' and the table on 'cpu'"
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(hb.DeviceError, match=match):
        table(torch.empty(2, dtype=torch.int64, device="cuda"))


# summary


def test_summary_names_the_kernels(gpu):
    model = Mlp().half()
    schemes = {"up": "w4a16_g32", "down": "w8a8", "head": "w8a8+ag32"}
    hb.quantize_(model, schemes, embeddings="w8a8", progress=False)
    rows = {row.name: row for row in hb.summary(model).layers}
    assert rows["up"].kernel == "linear_w4a16_8x64x128_sm90; above 128 rows dequantize + mm"
    assert rows["down"].kernel == "linear_w8a8_8x64x128_sm90; above 128 rows _int_mm"
    assert rows["head"].kernel == "torch" and "+ag" in rows["head"].why_torch
    assert rows["embed"].kernel == "torch" and "embeddings" in rows["embed"].why_torch
    assert rows["up"].why_torch == "" and "why torch" in str(hb.summary(model))
    assert rows["up"].bytes > rows["up"].in_features * rows["up"].out_features // 2
    assert rows["up"].kernel in repr(model.up) and "kernel=torch" in repr(model.embed)
    measured = {row.name: row for row in hb.summary(model, IDS).layers}
    assert measured["up"].ms > 0 and measured["up"].error < 0.01
    rows = {row.name: row for row in hb.summary(model.float()).layers}
    assert rows["up"].kernel == "torch" and rows["up"].why_torch.startswith("x is float32")
    assert rows["down"].kernel == "linear_w8a8_8x64x128_sm90; above 128 rows _int_mm"


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_kernels_by_architecture(gpu, arch):
    emulate = ctypes.CDLL(gpu.path).halfbyte_cuda_emulate
    gated, exact, x = make(40, 600, "w4a16_g64"), make(40, 600, "w8a8"), torch.randn(5, 600).half()
    try:
        emulate(90, 132, 232448, 0)
        want = hb.gated_linear(x, hb.pack(gated), hb.pack(gated)), hb.linear(x, hb.pack(exact))
        emulate(arch, 108, 101376 if arch == 89 else 166912, 0)
        packed = hb.pack(gated)  # of few channels and many features: blocks share the features
        assert packed.kernel.endswith("_sm90" if arch == 90 else "_sm80")
        torch.testing.assert_close(hb.gated_linear(x, packed, packed), want[0], rtol=1e-2, atol=1e-3)
        assert torch.equal(hb.linear(x, hb.pack(exact)), want[1])
    finally:
        emulate(90, 132, 232448, 0)
