"""SparseTensor: exact to the bit from and to dense matrices, torch and scipy."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import halfbyte as hb
from corecall import same
from halfbyte.sparse.cost import predicted_break_even, predicted_time
from halfbyte.sparse.pattern import Pattern
from halfbyte.sparse.scheme import NAMES
from sparse_layers import CODES, SHAPES, mask, pruned, sparse

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")
schemes = pytest.mark.parametrize("name", NAMES)
SPARSE_TORCH = "ignore:Sparse (CSR|BSR)"  # a beta, says torch


def expected(weight, name):
    """The float32 weight that a scheme stores of one that fits its pattern."""
    if name in CODES:
        return hb.quantize(weight, dense(name)).dequantize()
    return weight.bfloat16().float() if name.startswith("bf16") else weight


def dense(name):
    """The scheme of the dense weight with the same codes."""
    return name.partition("+")[0]


# Schemes


@schemes
def test_schemes_parse_and_print(name):
    scheme = hb.SparseScheme.parse(name)
    assert str(scheme) == name and hb.SparseScheme.parse(scheme) is scheme
    values, pattern = name.split("+")
    assert (scheme.values, scheme.pattern) == (values, Pattern.parse(pattern))
    assert scheme == hb.SparseScheme(values, Pattern.parse(pattern)) and len({scheme, scheme}) == 1
    assert scheme.op.startswith("spmm_") and scheme.op.endswith(values.partition("_")[0])
    assert scheme.per_token == scheme.quantized == (values[0] == "w")
    assert scheme.group == (hb.Scheme.parse(values).group if scheme.quantized else 0)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("w8a8+block16x1", r"w8a8\+block16x4"),
        ("w4a8+2:4", r"w8a8\+2:4"),
        ("w8a8", r"w8a8\+"),
        ("2:4", r"\+2:4"),
        ("f32 + 2:4", r"f32\+2:4"),
        (None, ""),
        (hb.Scheme.parse("w8a8"), ""),
    ],
)
def test_unknown_schemes(text, nearest):
    with pytest.raises(hb.SchemeError, match=f"no kernel runs the sparse scheme .*{nearest}"):
        hb.SparseScheme.parse(text)
    with pytest.raises(hb.SchemeError):
        hb.sparsify(torch.ones(4, 4), text)


def test_patterns_that_no_kernel_runs():
    with pytest.raises(hb.SchemeError, match="no kernel runs"):
        hb.SparseScheme("f32", Pattern.parse("block2x2"))
    with pytest.raises(hb.SchemeError, match="no pattern of zeros"):
        Pattern.parse("4:2")


@pytest.mark.parametrize("function", [hb.quantize, lambda w, s: hb.quantize_(torch.nn.Linear(4, 4), s)])
def test_sparse_schemes_elsewhere_point_to_sparsify(function):
    with pytest.raises(hb.SchemeError, match=r"sparse weights: call sparsify_\(model, scheme='w8a8\+2:4'"):
        function(torch.ones(4, 4), "w8a8+2:4")


# From dense, and back


@schemes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(name, shape):
    weight = pruned(shape, name)
    tensor = hb.sparsify(weight, name)
    same(tensor.to_dense(), expected(weight, name))
    assert tensor.shape == shape and str(tensor.scheme) == name
    assert tensor.nnz == int((expected(weight, name) != 0).sum())
    assert tensor.nbytes == sum(part.nbytes for part in tensor.parts().values())
    if name in CODES:
        q, twin = hb.quantize(weight, dense(name)), tensor.to_quantized()
        same(tensor.codes(), q.unpacked())
        assert (twin.scheme, twin.shape) == (q.scheme, q.shape)
        for what in ("codes", "scale") + (("group_scale",) if q.scheme.group else ()):
            same(getattr(twin, what), getattr(q, what), what)
    else:
        with pytest.raises(hb.SchemeError, match="has no codes"):
            tensor.codes()
        with pytest.raises(hb.SchemeError, match="has no codes"):
            tensor.to_quantized()


@schemes
def test_numpy_gives_the_same(name):
    weight = pruned((33, 70), name)
    if name.startswith("bf16"):
        with pytest.raises(hb.DTypeError, match="numpy has no bfloat16"):
            hb.sparsify(weight.numpy(), name)
        return
    tensor, twin = hb.sparsify(weight.numpy(), name), hb.sparsify(weight, name)
    for what, part in tensor.parts().items():
        assert isinstance(part, np.ndarray)
        same(torch.from_numpy(part), getattr(twin, what), what)
    same(torch.from_numpy(tensor.to_dense()), twin.to_dense())
    if name in CODES:
        same(torch.from_numpy(tensor.codes()), twin.codes())
    assert isinstance(tensor.rows(3, 9).values, np.ndarray)


@schemes
def test_strides_dtypes_and_gradients_of_the_weight_do_not_matter(name):
    weight = pruned((33, 70), name).bfloat16()
    want = hb.sparsify(weight.float(), name).to_dense()
    for other in (weight, weight.t().contiguous().t(), weight.clone().requires_grad_()):
        same(hb.sparsify(other, name).to_dense(), want)


@pytest.mark.parametrize("name", CODES)
def test_of_a_quantized_tensor(name):
    q = hb.quantize(pruned((33, 70), name), dense(name))
    tensor = hb.sparsify(q, name)
    same(tensor.codes(), q.unpacked())
    assert tensor.scale is q.scale and tensor.group_scale is q.group_scale
    zero, least = (0x88, 0) if q.scheme.group else (0, -128)  # that no float weight is rounded to
    q = dataclasses.replace(q, codes=torch.where(q.codes == zero, q.codes, least).to(q.codes.dtype))
    same(hb.sparsify(q, name).codes(), q.unpacked())


@pytest.mark.parametrize(("quantized", "name"), [
    ("w8a8", "f32+2:4"), ("w8a8+asym", "w8a8+2:4"), ("w4a8_g32", "w8a8+block16x4"),
    ("w4a8_g32", "w4a8_g64+block16x4"), ("w4a8_g64+asym", "w4a8_g64+block16x4"),
])  # fmt: skip
def test_of_another_quantized_tensor(quantized, name):
    q = hb.quantize(pruned((8, 8), name), quantized)
    with pytest.raises(
        hb.SchemeError, match=f"quantized as {q.scheme}, .*cannot become {name}".replace("+", ".")
    ):
        hb.sparsify(q, name)


def test_stored_share():
    zeros = torch.zeros(64, 64)
    one = zeros.clone()
    one[17, 5] = 2.0
    assert [hb.sparsify(w, "w8a8+block16x4").density for w in (zeros, one)] == [0, 1 / 64]
    assert [hb.sparsify(w, "f32+block16x1").density for w in (zeros, one)] == [0, 1 / 256]
    assert [hb.sparsify(w, "f32+unstructured").density for w in (zeros, one)] == [0, 1 / 4096]
    assert [hb.sparsify(w, "w8a8+1:4").density for w in (zeros, one)] == [0.25, 0.25]
    tensor = hb.sparsify(one, "w8a8+block16x4")
    assert repr(tensor).startswith("SparseTensor(64x64, scheme=w8a8+block16x4, density=0.0156, nbytes=")
    assert tensor.nnz == 1 and tensor.values.shape == (1, 16, 4) and tensor.crow.tolist() == [0, 0, 1, 1, 1]
    assert tensor.columns.tolist() == [1]


def test_positions_are_nibbles_in_order():
    weight = torch.tensor([[0, 1, 0, 2, 3, 0, 0, 0, 0, 4.0]])
    tensor = hb.sparsify(weight, "f32+2:4")
    assert tensor.values.tolist() == [[1, 2, 3, 0, 4, 0]] or tensor.values.tolist() == [[1, 2, 3, 0, 0, 4]]
    low_high = [n for byte in tensor.positions[0].tolist() for n in (byte & 15, byte >> 4)]
    assert low_high == [1, 3, 0, 1, 0, 1]


@schemes
@pytest.mark.parametrize("rows", [(0, 33), (0, 16), (5, 6), (15, 33)])
def test_rows(name, rows):
    tensor = sparse((33, 70), name)
    part = tensor.rows(*rows)
    assert part.shape == (rows[1] - rows[0], 70) and part.scheme == tensor.scheme
    same(part.to_dense(), tensor.to_dense()[slice(*rows)])


@pytest.mark.parametrize(
    "name, shape",
    [("w8a8", (7, 65)), ("w4a8_g32", (5, 33)), ("w4a16_g32+asym", (6, 40)), ("w8a8+asym", (3, 9))],
)
def test_rows_of_a_quantized_tensor(name, shape):
    q = hb.quantize(torch.randn(shape), name)
    part = q.rows(1, 3)
    assert part.shape == (2, shape[1])
    same(part.dequantize(), q.dequantize()[1:3])


@schemes
def test_from_mask(name):
    weight, keep = torch.randn(33, 70), mask((33, 70), hb.SparseScheme.parse(name).pattern)
    want = hb.sparsify(weight.masked_fill(~keep, 0), name).to_dense()
    for given_mask in (keep, keep.float(), keep.to(torch.uint8)):
        same(hb.SparseTensor.from_mask(weight, given_mask, name).to_dense(), want)
    weight[~keep] = torch.inf  # what is pruned does not count
    same(hb.SparseTensor.from_mask(weight, keep, name).to_dense(), want)
    with pytest.raises(hb.ShapeError, match=r"the shape \(70,\); it must be that of head, \(33, 70\)"):
        hb.SparseTensor.from_mask(weight, keep[0], name, name="head")
    with pytest.raises(hb.DTypeError, match="the mask must be"):
        hb.SparseTensor.from_mask(weight, keep.numpy(), name)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_round_trips(data):
    """Any zeros, any sizes, numpy or torch: nothing is lost, whichever way a weight goes."""
    name = data.draw(st.sampled_from(NAMES))
    shape = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    amount, seed = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 9))
    weight = pruned(shape, name, amount=amount, seed=seed)
    if name.startswith("bf16"):
        weight = weight.bfloat16().float()
    tensor = hb.sparsify(weight, name)
    want = expected(weight, name)
    same(tensor.to_dense(), want)
    same(hb.SparseTensor(**tensor.parts(), scheme=tensor.scheme, shape=shape).to_dense(), want)
    wide = {k: p.long() if p.dtype == torch.int32 else p for k, p in tensor.parts().items()}
    same(hb.SparseTensor(**wide, scheme=tensor.scheme, shape=shape).to_dense(), want)
    floats = "f32+block16x1" if "block16x4" in name else name.replace("w8a8", "f32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = tensor.to_torch()
    same(there.to_dense(), want)
    same(hb.SparseTensor.from_torch(there, floats).to_dense(), want)
    scipy = pytest.importorskip("scipy.sparse")
    there = tensor.to_scipy()
    assert scipy.issparse(there)
    same(torch.from_numpy(there.toarray()), want)
    if not name.startswith("bf16"):
        same(torch.from_numpy(hb.SparseTensor.from_scipy(there, floats).to_dense()), want)


# torch and scipy


@pytest.mark.filterwarnings(SPARSE_TORCH)
@pytest.mark.parametrize(
    ("block", "dtype", "name"),
    [
        (None, torch.float32, "f32+unstructured"),
        (None, torch.bfloat16, "f32+unstructured"),
        ((16, 1), torch.float32, "f32+block16x1"),
        ((16, 1), torch.bfloat16, "bf16+block16x1"),
    ],
)
def test_the_scheme_of_a_torch_tensor(block, dtype, name):
    weight = pruned((32, 64), name).to(dtype)
    source = weight.to_sparse_csr() if block is None else weight.to_sparse_bsr(block)
    tensor = hb.SparseTensor.from_torch(source)
    assert str(tensor.scheme) == name
    same(tensor.to_dense(), weight.float())
    assert tensor.to_torch().layout is (torch.sparse_csr if block is None else torch.sparse_bsr)


@pytest.mark.filterwarnings(SPARSE_TORCH)
def test_blocks_of_int8_and_other_ways():
    weight = pruned((32, 64), "w8a8+block16x4")
    source = weight.to_sparse_bsr((16, 4))
    with pytest.raises(hb.SchemeError, match=r"blocks of 16 x 4, .* give a scheme: one of w8a8\+block16x4"):
        hb.SparseTensor.from_torch(source)
    tensor = hb.SparseTensor.from_torch(source, "w8a8+block16x4")
    same(tensor.codes(), hb.quantize(weight).codes)
    same(hb.SparseTensor.from_torch(weight, "w8a8+block16x4").codes(), tensor.codes())
    with pytest.raises(hb.SchemeError, match="dense tensor, which says no pattern"):
        hb.SparseTensor.from_torch(weight)
    with pytest.raises(hb.DTypeError, match="to_sparse_csr"):
        hb.SparseTensor.from_torch(weight.to_sparse())
    with pytest.raises(hb.DTypeError, match="from_torch takes a torch tensor, not ndarray"):
        hb.SparseTensor.from_torch(weight.numpy())
    # Blocks that do not divide the weight are none to torch.
    assert sparse((33, 64), "f32+block16x1").to_torch().layout is torch.sparse_csr


def test_scipy_formats():
    scipy = pytest.importorskip("scipy.sparse")
    weight = pruned((32, 64), "f32+block16x1").numpy()
    for make in (scipy.csr_array, scipy.csr_matrix):
        tensor = hb.SparseTensor.from_scipy(make(weight))
        assert str(tensor.scheme) == "f32+unstructured" and np.array_equal(tensor.to_dense(), weight)
    tensor = hb.SparseTensor.from_scipy(scipy.bsr_array(weight, blocksize=(16, 1)))
    assert str(tensor.scheme) == "f32+block16x1" and np.array_equal(tensor.to_dense(), weight)
    assert tensor.to_scipy().format == "bsr"
    assert np.array_equal(hb.SparseTensor.from_scipy(scipy.csr_array(weight), "w8a8+unstructured").codes(),
                          hb.quantize(weight).codes)  # fmt: skip
    for other in (scipy.coo_array(weight), weight, None):
        with pytest.raises(hb.DTypeError, match="from_scipy takes a matrix .* call .tocsr"):
            hb.SparseTensor.from_scipy(other)
    double = scipy.csr_array(weight.astype(np.float64))  # scipy's default
    assert np.array_equal(hb.SparseTensor.from_scipy(double).to_dense(), weight)
    double.data[3] = 1e300
    with pytest.raises(hb.NonFiniteError):
        hb.SparseTensor.from_scipy(double)
    with pytest.raises(hb.DTypeError):
        hb.SparseTensor.from_scipy(scipy.csr_array(weight.astype(np.int32)))


@pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR)")
def test_float64_of_torch_is_rounded():
    weight = pruned((32, 64), "f32+block16x1")
    for source in (weight.double().to_sparse_csr(), weight.double().to_sparse_bsr((16, 1))):
        same(hb.SparseTensor.from_torch(source).to_dense(), weight)
    same(hb.SparseTensor.from_torch(weight.double(), "f32+unstructured").to_dense(), weight)


# Costs


@schemes
def test_predicted_costs(name):
    scheme = hb.SparseScheme.parse(name)
    sparsity = predicted_break_even(name)
    assert 0 <= sparsity < 0.7
    expected = pytest.approx(1) if sparsity > 0 else pytest.approx(predicted_time(scheme, 1))
    assert predicted_time(scheme, 1 - sparsity) == expected and predicted_time(scheme, 1 - sparsity) <= 1.001
    assert predicted_time(scheme, 0.1) == pytest.approx(predicted_time(scheme, 0.2) / 2)
