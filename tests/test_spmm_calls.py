"""Packing and calls of the sparse ops: what is stored, several weights in one call, mistakes."""

from __future__ import annotations

import pytest
import torch

import corecall
from corecall import Placed, linear, same
from halfbyte import _core
from sparse_cases import CODES, FLOAT, INT8, PATTERNS, Sparse, each_kernel, force, pack, pack_case

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")


def some_weight(op: str, m: int, n: int, kept: str = "0.5"):
    """A packed weight of 70 features, and a bias."""
    _, weight, scale, bias, _ = Sparse(op, PATTERNS[op][0], m, n, 70, kept).operands()
    return pack(op, weight, scale if op in CODES else None), bias


@pytest.mark.parametrize("n, k", [(0, 0), (0, 5), (33, 0)])
@pytest.mark.parametrize("op", PATTERNS)
def test_no_channels_and_no_features(op, n, k):
    dtype = torch.int8 if op in CODES else torch.float32
    packed = pack(op, torch.zeros(n, k, dtype=dtype), torch.ones(n) if op in CODES else None)
    bias = torch.randn(n)
    for m in (3, 60):
        same(linear(packed, torch.randn(m, k), bias=bias), bias.expand(m, n).contiguous())


@pytest.mark.parametrize("op", PATTERNS)
def test_fewer_values_are_fewer_bytes(op):
    sizes = []
    for kept in ("0", "0.1", "0.5", "1"):
        case = Sparse(op, PATTERNS[op][0], 1, 256, 256, kept)
        _, weight, scale, *_ = case.operands()
        packed = pack_case(case, weight, scale)
        sizes.append((packed.stored, packed.nbytes))
        per_value = {"spmm_block_bf16": 2, "spmm_block_w4a8": 0.5}.get(op, 1 if op in INT8 else 4)
        assert packed.nbytes >= per_value * packed.stored
    if op == "spmm_nm_w8a8":  # groups have a fixed number of values, zeros or not
        assert len({stored for stored, _ in sizes}) == 1 and sizes[0][0] == 256 * 256 // 2
    else:
        assert sizes == sorted(sizes) and sizes[0][0] == 0 and sizes[-1][0] >= 256 * 256
        assert sizes[1][0] < 0.3 * sizes[-1][0]


@pytest.mark.parametrize("op", PATTERNS)
def test_several_weights_on_one_input(op):
    """linears() gives what linear() gives; a weight of another op is refused."""
    for m in (1, 5, 40):
        x = torch.randn(m, 70)
        weights = [some_weight(op, m, n, kept) for n, kept in ((33, "0.5"), (64, "0.1"), (1, "1"))]
        packs, biases = map(list, zip(*weights, strict=True))
        outputs = [Placed(m, p.n, torch.float32) for p in packs]
        entries = [(p, y.ptr, y.ld, b.data_ptr()) for p, y, b in zip(packs, outputs, biases, strict=True)]
        _core.linears(entries, m, x.data_ptr(), 70, 0, 0, corecall.ACTIVATION["silu"], 0.0, 0, 2)
        for p, y, b in zip(packs, outputs, biases, strict=True):
            same(y.check(), linear(p, x, bias=b, activation="silu"))
        other, _ = some_weight(next(o for o in PATTERNS if o != op), m, 64)
        with pytest.raises(ValueError, match="linears: weight 1"):
            _core.linears([entries[0], (other, *entries[1][1:])], m, x.data_ptr(), 70, 0, 0, 0, 0.0, 0, 2)


@each_kernel(PATTERNS)
def test_gated(op, kernel):
    """(x up^T + bias) * activation(x gate^T + gate bias), as of the results of each."""
    force(kernel)
    for m in (1, 7, 50):
        x = torch.randn(m, 70)
        (up, b), (gate, g) = some_weight(op, m, 65), some_weight(op, m, 65, "0.1")
        y = Placed(m, 65, torch.float32)
        operands = (up, m, x.data_ptr(), 70, 0, y.ptr, y.ld, 0, b.data_ptr(), corecall.ACTIVATION["gelu"])
        _core.linear(*operands, 0, 0, 0, 0.0, 0, 2, gate, g.data_ptr())
        same(y.check(), linear(up, x, bias=b) * linear(gate, x, bias=g, activation="gelu"))


@pytest.mark.parametrize("pattern, row, group", [("2:4", 5, 3), ("1:4", 0, 0), ("4:8", 32, 1)])
def test_a_broken_pattern_is_named(pattern, row, group):
    n, k = 33, 16
    size, most = int(pattern[-1]), int(pattern[0])
    codes = torch.zeros(n, k, dtype=torch.int8)
    codes[row, group * size : group * size + most + 1] = 1
    says = rf"channel {row} has {most + 1} nonzero.* input feature {group * size};.* {pattern} allows {most}"
    with pytest.raises(ValueError, match=says):
        pack("spmm_nm_w8a8", codes, torch.ones(n), pattern=pattern)
    codes[row, group * size] = 0
    pack("spmm_nm_w8a8", codes, torch.ones(n), pattern=pattern)


@pytest.mark.parametrize("bad", (0.0, -1.0, torch.nan, torch.inf))
@pytest.mark.parametrize("op", CODES)
def test_a_bad_scale_is_named(op, bad):
    codes = torch.zeros(4, 8, dtype=torch.int8)
    scale = torch.ones(4)
    scale[2] = bad
    with pytest.raises(ValueError, match=f"{op}.*scale of output channel 2 is"):
        pack(op, codes, scale)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("op", FLOAT)
def test_a_weight_that_is_not_finite_counts_as_nonzero(op, bad):
    weight = torch.zeros(4, 8)
    weight[2, 5] = bad
    y = linear(pack(op, weight), torch.ones(3, 8))
    assert not y[:, 2].isfinite().any()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"n": -1}, "negative shape"),
        ({"k": -1}, "negative shape"),
        ({"ld": 7}, "row stride 7 is below the 8"),
        ({"weight": 0}, "no memory"),
        ({"op": "spmm_block_w2a8"}, "no linear op 'spmm_block_w2a8'"),
        ({"group": 64}, "takes no groups"),
        ({"op": "linear_w8a8"}, r"linear_w8a8\): packs weights without zeros"),
        ({"scale": 0}, "codes need scales"),
        ({"nonzero": 3}, "no kernel for the pattern 3:4"),
        ({"nonzero": 4}, "no kernel for the pattern 4:4"),
        ({"of": 0}, "a pattern N:M has an M"),
        ({"op": "spmm_block_w8a8"}, "no kernel for the pattern 2:4"),
        ({"k": 65793, "ld": 65793}, "in_features 65793 exceed 65792"),
    ],
    ids=str,
)
def test_mistakes_are_explained(change, says):
    codes, scale = torch.zeros(4, 65793, dtype=torch.int8), torch.ones(4)
    args = {"op": "spmm_nm_w8a8", "weight": codes.data_ptr(), "dtype": 0, "n": 4, "k": 8, "ld": 8}
    args |= {"scale": scale.data_ptr(), "nonzero": 2, "of": 4}
    _core.pack_sparse(**args)
    with pytest.raises(ValueError, match=says):
        _core.pack_sparse(**(args | change))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"group": 0}, "group 0 is none of 32, 64, 128"),
        ({"group": 48}, "group 48 is none of 32, 64, 128"),
        ({"group_scale": 0}, "needs group scales"),
        ({"group_scale_type": 1}, "float32 or float16"),
        ({"nonzero": 2, "of": 4}, "no kernel for the pattern 2:4"),
    ],
    ids=str,
)
def test_mistakes_in_groups_are_explained(change, says):
    codes, scale, groups = torch.zeros(4, 70, dtype=torch.int8), torch.ones(4), torch.ones(4, 3)
    args = {"op": "spmm_block_w4a8", "weight": codes.data_ptr(), "dtype": 0, "n": 4, "k": 70, "ld": 70}
    args |= {"scale": scale.data_ptr(), "group": 32, "group_scale": groups.data_ptr(), "group_scale_type": 0}
    _core.pack_sparse(**args)
    with pytest.raises(ValueError, match=says):
        _core.pack_sparse(**(args | change))
    for place, bad in ((codes, -9), (codes, 8), (groups, 0.0), (groups, torch.inf), (groups, torch.nan)):
        before, place[3, 2] = place[3, 2].item(), bad
        what = "input feature 2 is" if place is codes else "group 2, is"
        with pytest.raises(ValueError, match=f"output channel 3, {what}"):
            _core.pack_sparse(**args)
        place[3, 2] = before


@pytest.mark.parametrize("op", PATTERNS)
def test_calls_are_checked(op):
    packed, _ = some_weight(op, 3, 33)
    codes = torch.zeros(33, 70, dtype=torch.int8)
    with pytest.raises(ValueError, match="unpack_linear"):
        _core.unpack_linear(packed, codes.data_ptr(), 70)
    if op in FLOAT:
        with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
            _core.pack_sparse(op, codes.data_ptr(), 3, 33, 17, 17)
