"""linear on the GPU: which road a call takes, and what it computes, by the emulated library."""

from __future__ import annotations

import ctypes

import pytest
import torch

import halfbyte as hb
from cuda_weights import WEIGHTS, make
from halfbyte.cuda import linear as roads
from halfbyte.cuda.linear import DEQUANTIZE, INT_MM, KERNEL, TORCH, road
from halfbyte.reference import linear_ref, linear_w8a8_ref

N, K = 70, 200
ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def by_name(case):
    return "-".join(str(part).removeprefix("torch.") for part in case if part is not None)


def expected(x, q, bias=None, activation="none", residual=None, static=None, gate=None, gate_bias=None):
    """float32: the op with activations as the scheme has them; where it says a16, a GPU takes the floats."""

    def product(weight, b, act):
        if q.scheme.activation_bits == 8:
            return linear_ref(x.float(), weight, b, activation=act, static=static)
        y = x.double() @ weight.dequantize().double().T
        return ACTIVATIONS[act](y if b is None else y + b.double()).float()

    if gate is None:
        y = product(q, bias, activation)
    else:
        y = product(q, bias, "none") * product(gate, gate_bias, activation)
    return y if residual is None else y + residual.float()


def near(y, want, dtype=torch.float32, slack=1.0):
    """Errors in the unit of the largest output, of sums in float32 and of the rounding of y."""
    assert y.dtype == dtype and y.shape == want.shape
    rounding = {torch.float32: 0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    bound = slack * (rounding + 1e-5) * want.abs().max().item()
    assert (y.float() - want).abs().max().item() <= bound


def taken(monkeypatch) -> list[str]:
    """The names of the roads that the calls from now on take."""
    seen = []

    def spy(name, run):
        return lambda *args: (seen.append(name), run(*args))[1]

    monkeypatch.setattr(roads, "_ROADS", {name: spy(name, run) for name, run in roads._ROADS.items()})
    return seen


@pytest.mark.parametrize("m", [1, 5, 16, 33])
@pytest.mark.parametrize("case", WEIGHTS, ids=by_name)
def test_few_rows(gpu, case, m):
    q = make(N, K, *case)
    x, bias = torch.randn(m, K).half(), torch.randn(N)
    y = hb.linear(x, hb.pack(q), bias, out_dtype=torch.float32)
    near(y, expected(x, q, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", ["w4a16_g64", "w8a16", "w8a8", "w4a8_g32", "w8a8+asym"])
def test_dtypes_of_x_and_y(gpu, scheme, dtype):
    q = make(33, 64, scheme)
    x, residual = torch.randn(2, 3, 64).to(dtype), torch.randn(2, 3, 33).to(dtype)
    want = expected(x.view(6, 64), q, residual=residual.view(6, 33)).view(2, 3, 33)
    near(hb.linear(x, hb.pack(q), residual=residual), want, dtype, slack=2)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        near(hb.linear(x, hb.pack(q), residual=residual, out_dtype=out), want, out, slack=2)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("rows", [1, 9, 200])
def test_w8a8_is_that_of_the_cpu_bit_for_bit(gpu, rows, activation):
    for n, k in ((33, 70), (64, 128), (200, 600)):
        q, x = make(n, k, "w8a8"), torch.randn(rows, k)
        bias, residual = torch.randn(n), torch.randn(rows, n)
        x[0, 0] = torch.nan
        y = hb.linear(x, hb.pack(q), bias, activation=activation, residual=residual)
        want = linear_w8a8_ref(x, q.codes, q.scale, bias, activation=activation, residual=residual)
        assert torch.equal(y[1:], want[1:]) and y[0].isnan().all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("case", [WEIGHTS[3], WEIGHTS[9], WEIGHTS[14]], ids=by_name)
def test_activations(gpu, case, activation):
    q, x, bias = make(40, 70, *case), torch.randn(5, 70).half(), torch.randn(40)
    y = hb.linear(x, hb.pack(q), bias, activation=activation, out_dtype=torch.float32)
    near(y, expected(x, q, bias, activation))


# A call of each road: the scheme, the dtype of x, the rows that it takes.
ROADS = [
    (KERNEL, "w4a16_g64", torch.float16, 5),
    (KERNEL, "w8a8", torch.float32, 5),
    (DEQUANTIZE, "w4a16_g64", torch.bfloat16, 200),
    (DEQUANTIZE, "w8a16+asym", torch.float16, 200),
    (DEQUANTIZE, "w4a8_g32", torch.float16, 140),
    (INT_MM, "w8a8", torch.float16, 140),
    (TORCH, "w4a16_g64", torch.float32, 5),
    (TORCH, "w4a8_g32", torch.float32, 140),
    (TORCH, "w4a16_g64+nf4", torch.float16, 5),
    (TORCH, "w8a8+ag64", torch.bfloat16, 5),
]


@pytest.mark.parametrize(("way", "scheme", "dtype", "m"), ROADS, ids=str)
@pytest.mark.parametrize("k", [96, 75])
def test_every_road_computes_the_op(gpu, monkeypatch, way, scheme, dtype, m, k):
    seen = taken(monkeypatch)
    q = make(40, k, scheme)
    x, bias, residual = torch.randn(m, k).to(dtype), torch.randn(40), torch.randn(m, 40).to(dtype)
    y = hb.linear(x, hb.pack(q), bias, activation="silu", residual=residual)
    assert seen == [way]
    in_floats = way in (DEQUANTIZE, TORCH)  # where the weight and what lies between are rounded as x is
    if in_floats:
        want = x.double() @ q.dequantize().double().T + bias.double()
        want = (torch.nn.functional.silu(want) + residual.double()).float()
    else:
        want = expected(x, q, bias, "silu", residual)
    near(y, want, dtype, slack=4 if in_floats else 2)


@pytest.mark.parametrize(("way", "scheme", "dtype", "m"), ROADS, ids=str)
def test_gates_on_every_road(gpu, monkeypatch, way, scheme, dtype, m):
    seen = taken(monkeypatch)
    up, gate = make(40, 75, scheme), make(40, 75, scheme)
    x, biases, residual = torch.randn(m, 75).to(dtype), torch.randn(2, 40), torch.randn(m, 40)
    y = hb.gated_linear(x, hb.pack(up), hb.pack(gate), *biases, residual=residual)
    assert seen == ([way] if way == KERNEL else [way, way])
    if way in (DEQUANTIZE, TORCH):
        p, g = (x.double() @ q.dequantize().double().T + b for q, b in zip((up, gate), biases, strict=True))
        want = (p * torch.nn.functional.silu(g) + residual).float()
    else:
        want = expected(x, up, biases[0], "silu", residual, None, gate, biases[1])
    near(y, want, dtype, slack=4)


def test_a_gate_of_another_format(gpu, monkeypatch):
    """Scales of groups in float16 and float32: no kernel reads both at once."""
    seen = taken(monkeypatch)
    up, gate = make(40, 64, "w4a16_g32"), make(40, 64, "w4a16_g32", None, torch.float32)
    x = torch.randn(3, 64).half()
    y = hb.gated_linear(x, hb.pack(up), hb.pack(gate), out_dtype=torch.float32)
    assert seen == [KERNEL, KERNEL]
    near(y, expected(x, up, None, "silu", None, None, gate))


@pytest.mark.parametrize("m", [3, 140])
def test_static_quantization_of_x(gpu, m):
    q, x, static = make(40, 75, "w8a8"), torch.randn(m, 75), (0.03, -7)
    y = hb.linear(x, hb.pack(q), static=static)
    assert torch.equal(y, linear_w8a8_ref(x, q.codes, q.scale, static=static))
    q = make(40, 75, "w4a8_g32")
    near(hb.linear(x[:3], hb.pack(q), static=static), expected(x[:3], q, static=static))


@pytest.mark.parametrize("m", [0, 1, 20, 140])
@pytest.mark.parametrize("shape", [(40, 75), (64, 96)], ids=str)
def test_the_int32_accumulator(gpu, m, shape):
    q, x = make(*shape, "w8a8"), torch.randn(m, shape[1])
    y = hb.linear(x, hb.pack(q), out_dtype=torch.int32)
    assert torch.equal(y, linear_w8a8_ref(x, q.codes, q.scale, out_dtype=torch.int32) if m else y)
    assert y.shape == (m, shape[0]) and y.dtype == torch.int32


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16_g64"])
def test_several_weights_at_once(gpu, scheme, monkeypatch):
    quantized = []
    real = roads.codes_of
    monkeypatch.setattr(roads, "codes_of", lambda x, **k: (quantized.append(len(x)), real(x, **k))[1])
    weights = [make(n, 64, scheme) for n in (40, 8, 8)]
    packs, biases = [hb.pack(q) for q in weights], [torch.randn(40), None, torch.randn(8)]
    for m in (5, 200):
        x = torch.randn(m, 64).half()
        for y, p, b in zip(hb.linears(x, packs, biases), packs, biases, strict=True):
            assert torch.equal(y, hb.linear(x, p, b))
    assert quantized == ([5] * 4 + [200] * 4 if scheme == "w8a8" else [])


def test_a_gated_mlp(gpu):
    up, gate, down = (make(*shape, "w4a16_g32") for shape in ((96, 64), (96, 64), (64, 96)))
    x = torch.randn(4, 64).half()
    h = expected(x, up, None, "silu", None, None, gate).half()
    y = hb.gated_mlp(x, *map(hb.pack, (up, gate, down)), residual=x)
    near(y, expected(h, down, None, "none", x), torch.float16, slack=3)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (1, 1, 64)], ids=str)
def test_shapes_of_x(gpu, shape):
    for scheme in ("w8a8", "w4a16_g64", "w4a16_g64+nf4"):
        q, x = make(40, 64, scheme), torch.randn(shape).half()
        y = hb.linear(x, hb.pack(q), torch.ones(40))
        assert y.shape == (*shape[:-1], 40) and y.dtype == torch.float16
        if y.numel() and scheme != "w4a16_g64+nf4":
            near(y.float().view(-1, 40), expected(x.view(-1, 64), q, torch.ones(40)), slack=100)


VIEWS = {
    "columns of a larger matrix": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "not aligned": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    "an odd stride": lambda x: torch.nn.functional.pad(x, (0, 3))[:, :-3],
    "transposed": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row for all": lambda x: x[:1].expand(x.shape),
    "negated lazily": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("scheme", ["w4a16_g64", "w8a8", "w4a8_g32"])
def test_views(gpu, scheme, view):
    packed, x = hb.pack(make(40, 64, scheme)), torch.randn(9, 64).half()
    other, residual = VIEWS[view](x), VIEWS[view](torch.randn(9, 40).half())
    assert torch.equal(hb.linear(other, packed), hb.linear(other.clone(), packed))
    y = hb.linear(x, packed, residual=residual)
    assert torch.equal(y, hb.linear(x, packed, residual=residual.clone()))


def test_roads_follow_the_numbers_of_a_call():
    a16, a8 = roads.KERNEL_ROWS[16], roads.KERNEL_ROWS[8]
    assert (a16, a8) == (128, 128)
    for bits, group in ((4, 64), (8, 0)):
        assert [road(bits, group, 16, 16, m) for m in (1, a16, a16 + 1)] == [KERNEL, KERNEL, DEQUANTIZE]
        assert road(bits, group, 16, 32, 1) == road(bits, group, 16, 32, 10**6) == TORCH
    for x_bits, many in ((16, DEQUANTIZE), (32, TORCH)):
        assert [road(8, 0, 8, x_bits, m) for m in (1, a8, a8 + 1)] == [KERNEL, KERNEL, INT_MM]
        assert [road(4, 0, 8, x_bits, m) for m in (a8, a8 + 1)] == [KERNEL, many]
        assert [road(8, 128, 8, x_bits, m) for m in (a8, a8 + 1)] == [KERNEL, many]


def test_a_rows_result_does_not_depend_on_the_others(gpu):
    for scheme in ("w4a16_g64", "w8a8_g32"):
        packed, x = hb.pack(make(70, 300, scheme)), torch.randn(33, 300).half()
        y = hb.linear(x, packed)
        assert torch.equal(torch.cat([hb.linear(row[None], packed) for row in x]), y)


@pytest.mark.parametrize("arch", [80, 90])
def test_a_kernel_takes_many_rows_some_at_a_time(gpu, monkeypatch, arch):
    emulate, calls = ctypes.CDLL(gpu.path).halfbyte_cuda_emulate, []
    run = gpu.linear_run
    monkeypatch.setattr(gpu, "linear_run", lambda call, on: calls.append(call._obj.m) or run(call, on))
    try:
        emulate(arch, 132, 166912 if arch == 80 else 232448, 0)
        for scheme in ("w8a8", "w4a16_g64"):
            packed, x = hb.pack(make(40, 600, scheme)), torch.randn(100, 600).half()
            residual = torch.randn(100, 80).bfloat16()[:, ::2]
            bias = torch.randn(40)
            y = hb.linear(x, packed, bias, residual=residual, out_dtype=torch.float32)
            calls.clear()
            with monkeypatch.context() as patch:
                patch.setattr(roads, "ROWS_AT_ONCE", 33)
                other = hb.linear(x, packed, bias, residual=residual, out_dtype=torch.float32)
            assert torch.equal(other, y) and calls == [33, 33, 33, 1]
            assert torch.equal(hb.linear(x, packed, bias), hb.linear(x.clone(), packed, bias))
    finally:
        emulate(90, 132, 232448, 0)


REFUSED = [
    (lambda p, x: hb.linear(x[:, 1:], p), hb.ShapeError, "64 input features"),
    (lambda p, x: hb.linear(x.double(), p), hb.DTypeError, "float64"),
    (lambda p, x: hb.linear(x, p, torch.randn(3)), hb.ShapeError, "bias"),
    (lambda p, x: hb.linear(x, p, residual=torch.randn(3, 3)), hb.ShapeError, "residual"),
    (lambda p, x: hb.linear(x, p, activation="tanh"), ValueError, "activation 'tanh'"),
    (lambda p, x: hb.linear(x, p, out_dtype=torch.int32), ValueError, "int32"),
    (lambda p, x: hb.linear(x, p, static=(0.1, 0)), ValueError, "static"),
    (lambda p, x: hb.linear(x.to("meta"), p), hb.DeviceError, "meta"),
    (lambda p, x: hb.linear(x.to_sparse(), p), hb.DeviceError, "dense"),
    (lambda p, x: hb.linear(x.numpy(), p), hb.DeviceError, "the weight on 'cpu'"),
    (lambda p, x: hb.linear(x.requires_grad_(), p), ValueError, "gradient"),
    (lambda p, x: hb.gated_linear(x, p, hb.pack(make(40, 32, "w4a16_g64"))), hb.ShapeError, "gate is"),
    (lambda p, x: hb.gated_linear(x, p, None), hb.DTypeError, "gate must be a PackedWeight"),
    (lambda p, x: hb.linears(x, [p, hb.pack(make(8, 32, "w4a16_g64"))]), hb.ShapeError, "32 input features"),
]


@pytest.mark.parametrize(("call", "error", "match"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_arguments_that_are_refused(gpu, call, error, match):
    with pytest.raises(error, match=match):
        call(hb.pack(make(40, 64, "w4a16_g64")), torch.randn(3, 64))


def test_a_weight_packed_for_the_cpu_is_not_for_the_gpu(emulated_library):
    from halfbyte.cuda.library import use_library

    q, x = make(8, 32, "w8a8"), torch.randn(2, 32)
    on_cpu = hb.pack(q)
    with use_library(emulated_library):
        on_gpu = hb.pack(q)
        with pytest.raises(hb.DeviceError, match="x is on the device 'cpu' and the weight on 'cpu'"):
            hb.linear(x, on_cpu)
        with pytest.raises(hb.DeviceError):
            hb.gated_linear(x, on_gpu, on_cpu)
    with pytest.raises(hb.DeviceError):
        hb.linear(x, on_gpu)
    with pytest.raises(hb.DeviceError):
        hb.gated_linear(x, on_cpu, on_gpu)
