"""linear on numpy arrays and torch tensors: shapes, strides, dtypes, options, and the mistakes of callers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import halfbyte as hb
from corecall import same
from halfbyte.reference import linear_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def layer():
    """q, packed, bias of a 33 x 70 layer."""
    q = hb.quantize(torch.randn(33, 70))
    return q, hb.pack(q), torch.randn(33)


def want(x, q, bias=None, **options):
    y = linear_ref(x.reshape(-1, x.shape[-1]), q, bias, **options)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@pytest.mark.parametrize(
    "shape", [(70,), (1, 70), (5, 70), (2, 3, 70), (2, 1, 3, 4, 70), (0, 70), (3, 0, 70)]
)
def test_leading_dimensions(layer, shape):
    q, packed, bias = layer
    x = torch.randn(shape)
    y = hb.linear(x, packed, bias)
    assert y.shape == (*shape[:-1], 33) and y.is_contiguous()
    same(y, want(x, q, bias))


def test_close_to_float(layer):
    q, packed, bias = layer
    x = torch.randn(64, 70)
    exact = torch.nn.functional.linear(x, hb.dequantize(q), bias)
    # Half a step of error in each of 70 activations, times the weights: 3 standard deviations.
    step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / 255
    deviation = step[:, None] / 12**0.5 * hb.dequantize(q).norm(dim=1)
    assert ((hb.linear(x, packed, bias) - exact).abs() < 6 * deviation).all()


VIEWS = {
    "row step": lambda: torch.randn(9, 70)[::2],
    "wide rows": lambda: torch.randn(5, 91)[:, 7:77],
    "column step": lambda: torch.randn(5, 140)[:, ::2],
    "transposed": lambda: torch.randn(70, 5).t(),
    "permuted": lambda: torch.randn(3, 5, 70).transpose(0, 1),
    "expanded": lambda: torch.randn(1, 70).expand(5, 70),
    "broadcast column": lambda: torch.randn(5, 1).expand(5, 70),
    "odd start": lambda: torch.randn(351)[1:].view(5, 70),
    "negated": lambda: torch.view_as_complex(torch.randn(5, 70, 2)).conj().imag,
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(layer, view):
    q, packed, bias = layer
    x = VIEWS[view]()
    same(hb.linear(x, packed, bias), want(x, q, bias))
    same(
        torch.from_numpy(
            hb.linear(
                x.resolve_neg().numpy(),
                hb.pack(hb.QuantizedTensor(q.codes.numpy(), q.scale.numpy(), q.scheme)),
                bias.numpy(),
            )
        ),
        want(x, q, bias),
    )


def test_numpy_views(layer):
    q, packed, bias = layer
    base = np.random.default_rng(0).standard_normal((6, 140)).astype(np.float32)
    packed_fields = np.zeros(6, np.dtype([("flag", "i1"), ("x", np.float32, 70)]))  # rows 281 bytes apart
    packed_fields["x"] = base[:, :70]
    for x in (
        base[::-1, :70],
        base[:, ::-2],
        np.asfortranarray(base)[:, 70:],
        packed_fields["x"],
        base[:, :70].copy(),
    ):
        same(torch.from_numpy(hb.linear(x, packed, bias.numpy())), want(torch.from_numpy(x.copy()), q, bias))


@pytest.mark.parametrize(("x_dtype", "out_dtype", "r_dtype"), [*itertools.product(DTYPES, DTYPES, DTYPES)])
def test_dtypes(layer, x_dtype, out_dtype, r_dtype):
    q, packed, bias = layer
    x, residual = torch.randn(4, 70).to(x_dtype), torch.randn(4, 33).to(r_dtype)
    options = dict(residual=residual, out_dtype=out_dtype, activation="relu")
    same(hb.linear(x, packed, bias.to(r_dtype), **options), want(x, q, bias.to(r_dtype), **options))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations(layer, activation):
    q, packed, bias = layer
    x = torch.randn(20, 70) * 3
    y, exact = hb.linear(x, packed, bias, activation=activation), want(x, q, bias, activation=activation)
    assert ((y - exact).abs() <= 2.0**-20 * exact.abs().clamp(min=1)).all()
    assert not torch.equal(y, want(x, q, bias))


def test_residual_is_added_after_the_activation_and_may_be_strided(layer):
    q, packed, bias = layer
    x, residual = torch.randn(3, 5, 70), torch.randn(5, 3, 40).transpose(0, 1)[..., 4:37]
    y = hb.linear(x, packed, bias, activation="relu", residual=residual)
    same(y, want(x, q, bias, activation="relu") + residual)


def test_int32_gives_the_exact_accumulator(layer):
    q, packed, _ = layer
    x = torch.randn(6, 70)
    same(hb.linear(x, packed, out_dtype=torch.int32), want(x, q, out_dtype=torch.int32))
    assert hb.linear(x.numpy(), packed, out_dtype="int32").dtype == np.int32


@pytest.mark.parametrize(
    "static", [(0.03, -128), (0.01, 5), (torch.tensor(0.02), torch.tensor(-1, dtype=torch.int32))]
)
def test_static(layer, static):
    q, packed, bias = layer
    x = torch.randn(6, 70)
    y = hb.linear(x, packed, bias, static=static)
    same(y, want(x, q, bias, static=tuple(map(float, static))))
    assert not torch.equal(y, hb.linear(x, packed, bias))


def test_rows_with_nan_or_infinity_become_nan_and_no_others(layer):
    q, packed, bias = layer
    x = torch.randn(5, 70)
    clean = hb.linear(x, packed, bias)
    x[1, 69], x[3, 0] = torch.nan, -torch.inf
    y = hb.linear(x, packed, bias)
    assert y[[1, 3]].isnan().all() and torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])


def test_inputs_are_left_alone(layer):
    _, packed, bias = layer
    x, residual = torch.randn(5, 70), torch.randn(5, 33)
    copies = x.clone(), bias.clone(), residual.clone()
    hb.linear(x, packed, bias, residual=residual)
    assert all(map(torch.equal, copies, (x, bias, residual)))


def test_packed_weight_describes_itself(layer):
    _, packed, _ = layer
    assert packed.shape == (33, 70) and packed.scheme == hb.Scheme(8, 8) and packed.nbytes >= 33 * 70
    assert packed.kernel in {row["name"] for row in hb.kernels("linear_w8a8") if row["supported"]}
    assert packed.kernel in repr(packed)
    with hb.force_isa("scalar"):
        assert packed.kernel.endswith("_scalar")


def test_threads_are_counted():
    try:
        hb.set_num_threads(1)
        assert hb.get_num_threads() == 1
    finally:
        hb.set_num_threads(0)
    with pytest.raises(ValueError, match="negative"):
        hb.set_num_threads(-1)


X = torch.randn(5, 70)


@pytest.mark.parametrize(
    ("args", "options", "error", "says"),
    [
        (([1.0],), {}, hb.DTypeError, "x must be a numpy array or a torch tensor, not list"),
        ((X[:, 1:],), {}, hb.ShapeError, r"x has the shape \(5, 69\).* 70 input features"),
        ((torch.tensor(1.0),), {}, hb.ShapeError, "70"),
        ((X.double(),), {}, hb.DTypeError, "x has the dtype torch.float64.*float32, bfloat16, float16"),
        ((X.numpy().astype(">f4"),), {}, hb.DTypeError, "dtype >f4"),
        ((X.to("meta"),), {}, hb.DeviceError, "meta"),
        ((X.to_sparse(),), {}, hb.DeviceError, "dense"),
        ((X,), {"bias": torch.zeros(32)}, hb.ShapeError, r"bias has the shape \(32,\).*\(33,\)"),
        ((X,), {"bias": np.zeros(33, np.float32)}, hb.DTypeError, "bias must be a torch tensor as x is"),
        ((X,), {"bias": torch.zeros(33, dtype=torch.int64)}, hb.DTypeError, "bias has the dtype"),
        ((X,), {"activation": "swish"}, ValueError, "'swish' is none of: none, relu, gelu"),
        ((X,), {"residual": torch.zeros(4, 33)}, hb.ShapeError, r"residual .*\(5, 33\)"),
        ((X,), {"residual": torch.zeros(5, 33).int()}, hb.DTypeError, "residual has the dtype"),
        ((X,), {"residual": np.zeros((5, 33))}, hb.DTypeError, "residual must be a torch tensor"),
        ((X,), {"out_dtype": torch.float64}, hb.DTypeError, "the output has the dtype torch.float64"),
        ((X,), {"out_dtype": torch.int32, "bias": torch.zeros(33)}, ValueError, "accumulator"),
        ((X,), {"out_dtype": torch.int32, "activation": "relu"}, ValueError, "accumulator"),
        ((X,), {"static": (0.0, 0)}, ValueError, "static scale is 0"),
        ((X,), {"static": (0.1, -129)}, ValueError, "zero point is -129"),
        ((X,), {"static": 0.1}, ValueError, "pair"),
        ((X.clone().requires_grad_(),), {}, ValueError, "no_grad"),
    ],
)
def test_mistakes_are_explained(layer, args, options, error, says):
    with pytest.raises(error, match=says):
        hb.linear(args[0], layer[1], **options)


def freed():
    x = torch.randn(5, 70)
    x.untyped_storage().resize_(0)
    return x


def fake():
    with FakeTensorMode():
        return torch.randn(5, 70)


@pytest.mark.parametrize("make", [freed, fake, lambda: torch._efficientzerotensor((5, 70))])
def test_tensors_without_memory_are_refused(layer, make):
    q, packed, _ = layer
    x = make()
    with pytest.raises(hb.DeviceError, match="x has no memory of its own"):
        hb.linear(x, packed)
    with pytest.raises(hb.DeviceError, match="weight has no memory of its own"):
        hb.quantize(x)
    with pytest.raises(hb.DeviceError, match="residual has no memory of its own"):
        hb.linear(X[:, :33], hb.pack(hb.quantize(torch.randn(70, 33))), residual=x)


def test_negated_bias_and_residual(layer):
    q, packed, bias = layer
    residual = torch.randn(5, 33)
    y = hb.linear(X, packed, torch._neg_view(bias), residual=torch._neg_view(residual))
    same(y, hb.linear(X, packed, -bias, residual=-residual))


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), ()])
@pytest.mark.parametrize(("n", "k"), [(4, 0), (0, 6), (0, 0)])
def test_no_channels_and_no_features(n, k, shape, numpy):
    q = hb.QuantizedTensor(torch.empty(n, k, dtype=torch.int8), torch.ones(n), hb.Scheme(8, 8))
    x, bias = torch.randn(*shape, k), torch.randn(n)
    if numpy:
        q = hb.QuantizedTensor(q.codes.numpy(), q.scale.numpy(), q.scheme)
        x, bias = x.numpy(), bias.numpy()
    y = torch.as_tensor(hb.linear(x, hb.pack(q), bias, activation="relu"))
    same(y, torch.as_tensor(bias).relu().expand(*shape, n).contiguous())


def test_quantized_is_not_packed(layer):
    with pytest.raises(hb.DTypeError, match=r"PackedWeight that pack\(\) returns, not QuantizedTensor"):
        hb.linear(X, layer[0])
