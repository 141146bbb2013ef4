"""What SparseTensor and sparsify refuse: indices, shapes, numbers, weights without the pattern; and why."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import halfbyte as hb
from corecall import same
from sparse_layers import sparse

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


BAD_CSR = {
    "unsorted": ([0, 2, 3], [2, 0, 1], r"columns\[1\], which is 0, is unsorted in its row 0"),
    "twice": ([0, 1, 3], [2, 1, 1], r"columns\[2\], which is 1, is there twice in its row 1"),
    "too far": ([0, 2, 3], [0, 4, 1], r"columns\[1\] is 4; it must be from 0 to 3"),
    "negative": ([0, 2, 3], [-1, 2, 1], r"columns\[0\] is -1"),
    "crow falls": ([0, 4, 3], [0, 1, 2], r"crow\[2\] is 3, below crow\[1\], which is 4"),
    "crow starts late": ([1, 2, 3], [0, 1, 2], "crow goes from 1 to 3; it must go from 0"),
    "crow ends early": ([0, 1, 2], [0, 1, 2], "crow goes from 0 to 2"),
}


@pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR)")
@pytest.mark.parametrize(("crow", "columns", "message"), BAD_CSR.values(), ids=BAD_CSR)
def test_bad_indices(crow, columns, message):
    values = torch.tensor([1.0, 2.0, 3.0])
    crow, columns = torch.tensor(crow), torch.tensor(columns)
    with pytest.raises(hb.PatternError, match=message):
        hb.SparseTensor(values, hb.SparseScheme.parse("f32+unstructured"), (2, 4), crow, columns)
    csr = torch.sparse_csr_tensor(crow, columns, values, size=(2, 4), check_invariants=False)
    with pytest.raises(hb.PatternError, match=message):
        hb.SparseTensor.from_torch(csr)
    scipy = pytest.importorskip("scipy.sparse")
    matrix = scipy.csr_array((2, 4), dtype=np.float32)
    matrix.data, matrix.indices, matrix.indptr = values.numpy(), columns.numpy(), crow.numpy()
    with pytest.raises(hb.PatternError, match=message):
        hb.SparseTensor.from_scipy(matrix)


# What is refused


def test_a_weight_without_the_pattern():
    weight = torch.zeros(6, 10)
    weight[4, 8:] = 1
    weight[2, 4:7] = 1
    with pytest.raises(
        hb.PatternError,
        match=r"^head is not 2:4: its row 2 has 3 nonzero values at the features 4 to 7; prune it .*'2:4'",
    ):
        hb.sparsify(weight, "w8a8+2:4", name="head")
    weight[2] = 0
    same(hb.sparsify(weight, "f32+2:4").to_dense(), weight)
    with pytest.raises(hb.PatternError, match=r"is not 1:4: its row 4 has 2 .* features 8 to 9"):
        hb.sparsify(weight, "f32+1:4")


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.tensor([[0.0, 1], [torch.nan, 0]]), hb.NonFiniteError, "^head holds .* row 1"),
        (torch.tensor([[torch.inf, 1]]), hb.NonFiniteError, "^head holds .* row 0"),
        (torch.ones(4), hb.ShapeError, "head has the shape"),
        (torch.ones(0, 4), hb.ShapeError, "head has the shape"),
        (torch.ones(2, 2, dtype=torch.float64), hb.DTypeError, "head has the dtype torch.float64"),
        (torch.ones(2, 2, device="meta"), hb.DeviceError, "head is on the meta device"),
        ([[1.0]], hb.DTypeError, "head must be a numpy array or a torch tensor"),
    ],
)
@pytest.mark.parametrize("name", ["f32+unstructured", "bf16+block16x1", "w8a8+unstructured"])
def test_weights_that_are_refused(weight, error, message, name):
    with pytest.raises(error, match=message):
        hb.sparsify(weight, name, name="head")


def test_bfloat16_that_overflows():
    with pytest.raises(hb.NonFiniteError):
        hb.sparsify(torch.full((2, 2), 3.4e38), "bf16+block16x1")


INT4 = "w4a8_g32+block16x4"


def change(name, **parts):
    """A SparseTensor 33 x 70 with other parts."""
    tensor = sparse((33, 70), name)
    made = {what: new(getattr(tensor, what)) if callable(new) else new for what, new in parts.items()}
    return lambda: dataclasses.replace(tensor, **made)


def put(index, value):
    def changed(part):
        part = part.clone()
        part[index] = value
        return part

    return changed


REFUSED = {
    "no columns": (change("f32+unstructured", columns=None), hb.ShapeError, "lacks columns"),
    "no positions": (change("f32+2:4", positions=None), hb.ShapeError, "lacks positions"),
    "no scale": (change("w8a8+2:4", scale=None), hb.ShapeError, "lacks scale"),
    "a scale": (change("f32+2:4", scale=torch.ones(33)), hb.ShapeError, "takes no scale"),
    "crow of N:M": (change("f32+2:4", crow=torch.zeros(34)), hb.ShapeError, "takes no crow"),
    "numpy part": (change("f32+2:4", positions=lambda p: p.numpy()), hb.DTypeError, "positions must be"),
    "float codes": (change("w8a8+2:4", values=lambda v: v.float()), hb.DTypeError, "values has the dtype"),
    "float index": (change("f32+unstructured", crow=lambda c: c.float()), hb.DTypeError, "int32 or int64"),
    "half scale": (change("w8a8+2:4", scale=lambda s: s.half()), hb.DTypeError, "scale has the dtype"),
    "short crow": (change("w8a8+block16x4", crow=lambda c: c[:-1]), hb.ShapeError, r"crow .* must be \(4,\)"),
    "more values": (change("f32+unstructured", values=lambda v: v.repeat(2)), hb.ShapeError, "values has"),
    "other blocks": (change("w8a8+block16x4", values=lambda v: v[:, :8]), hb.ShapeError, "values has"),
    "flat columns": (change("f32+unstructured", columns=lambda c: c[:, None]), hb.ShapeError, "columns has"),
    "short positions": (change("f32+2:4", positions=lambda p: p[:, :-1]), hb.ShapeError, "positions has"),
    "shape": (change("f32+2:4", shape=(33, 80)), hb.ShapeError, "33 x 80"),
    "no shape": (change("f32+2:4", shape=33), hb.ShapeError, "pair of integers"),
    "empty": (change("f32+2:4", shape=(0, 4)), hb.ShapeError, "nothing in such a weight"),
    "nan": (change("f32+unstructured", values=put(3, torch.nan)), hb.NonFiniteError, r"values\[3\] is a NaN"),
    "inf": (change("bf16+block16x1", values=put((3, 2, 0), torch.inf)), hb.NonFiniteError, r"\[3, 2, 0\]"),
    "zero scale": (change("w8a8+2:4", scale=put(7, 0.0)), ValueError, r"scale\[7\] is not positive"),
    "nan scale": (change("w8a8+2:4", scale=put(7, torch.nan)), hb.NonFiniteError, r"scale\[7\] is a NaN"),
    "position": (change("w8a8+2:4", positions=put((4, 1), 0x41)), hb.PatternError, "row 4: one is 4; "),
    "equal positions": (change("w8a8+2:4", positions=put((4, 1), 0x22)), hb.PatternError, "row 4 do not"),
    "falling positions": (change("f32+4:8", positions=put((4, 1), 0x12)), hb.PatternError, "do not ascend"),
    "behind the last feature": (
        change("f32+2:4", values=put((5, -1), 1.0), positions=put((5, -1), 0x31)),
        hb.PatternError, "values of row 5: .* behind its last feature, 69",
    ),
    "no group scale": (change(INT4, group_scale=None), hb.ShapeError, "lacks group_scale"),
    "a group scale": (change("w8a8+2:4", group_scale=torch.ones(33, 1)), hb.ShapeError, "takes no group"),
    "int8 nibbles": (change(INT4, values=lambda v: v.char()), hb.DTypeError, "values has the"),
    "whole bytes": (change(INT4, values=lambda v: v.repeat(1, 1, 2)), hb.ShapeError, "values has"),
    "other groups": (change(INT4, group_scale=lambda s: s[:, :2]), hb.ShapeError, r"\(33, 3\)"),
    "zero group scale": (
        change(INT4, group_scale=put((7, 2), 0.0)), ValueError, r"scale\[7, 2\] is not pos",
    ),
    "nan group scale": (
        change(INT4, group_scale=put((7, 2), torch.nan)), hb.NonFiniteError, r"group_scale\[7, 2",
    ),
    "nibbles behind the last feature": (
        change(INT4, values=lambda v: torch.full_like(v, 0x19), columns=put(10, 17)),
        hb.PatternError, "behind the last column, 69",
    ),
    "columns twice": (change("w8a8+block16x4", columns=put(1, 0)), hb.PatternError, "columns"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_parts_that_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("place", [(2, 3), (0, 17)])
def test_values_outside_of_the_weight(place):
    """A weight 17 x 18 has 2 x 5 blocks of 16 x 4: the last ones hold 1 row and 2 columns."""
    tensor = hb.sparsify(torch.ones(17, 18), "w8a8+block16x4")
    row, column = {(2, 3): (15, 0), (0, 17): (0, 2)}[place]
    values = tensor.values.clone()
    values[-1, row, column] = 1
    with pytest.raises(hb.PatternError, match="values: a block has one that is not 0 behind the last"):
        dataclasses.replace(tensor, values=values)


def test_numbers_that_are_not_there_are_not_looked_at():
    tensor = sparse((33, 70), "w8a8+unstructured")
    meta = {what: part.to("meta") for what, part in tensor.parts().items()}
    twin = hb.SparseTensor(**meta, scheme=tensor.scheme, shape=tensor.shape)
    assert twin.density == tensor.density and twin.nbytes == tensor.nbytes
    with pytest.raises(hb.DeviceError, match="values is on the meta device"):
        twin.to_dense()
    with FakeTensorMode() as mode:
        fake = {what: mode.from_tensor(part) for what, part in tensor.parts().items()}
        hb.SparseTensor(**fake, scheme=tensor.scheme, shape=tensor.shape)


def test_the_tensor_is_immutable():
    tensor = sparse((8, 8), "f32+2:4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        tensor.values = None
