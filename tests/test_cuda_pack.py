"""Weights for the GPU: packed by torch operations as csrc/cuda/layout.h says, and back; no GPU needed."""

from __future__ import annotations

import contextlib
import copy
import pickle
from ctypes import byref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import halfbyte as hb
from cuda_weights import WEIGHTS, make
from halfbyte.cuda import pack, zeros
from halfbyte.cuda import sparse as sparse_pack
from halfbyte.cuda.linear import INT_MM, KERNEL, road_of
from halfbyte.cuda.pack import CudaPackedWeight, TorchWeight, dequantized
from halfbyte.cuda.sparse import BLOCKS
from halfbyte.cuda.zeros import blocks, from_blocks, from_pairs, pairs
from halfbyte.pack import GpuWeight

SHAPES = [(1, 1), (7, 33), (64, 128), (70, 200), (129, 385)]


def by_name(case):
    return "-".join(str(part).removeprefix("torch.") for part in case if part is not None)


def offsets_of(q):
    """float32 [n, groups]: what the layout says the zero or the minimum becomes."""
    scale = 1.0 if q.group_scale is None else q.group_scale.float()
    up = 8 if q.scheme.weight_bits == 4 else 0
    return (up - q.zero.float()) * scale if q.zero is not None else q.minimum.float() + up * scale


@pytest.mark.parametrize("case", WEIGHTS, ids=by_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_is_where_the_library_looks_for_it(gpu, case, shape):
    (n, k), q = shape, make(*shape, *case)
    packed = hb.pack(q)
    form, memory = packed.format, packed.weight.reshape(-1)
    assert memory.numel() == gpu.weight_bytes(byref(form), n, k)
    stored = q.unpacked().int() - (8 if q.zero is not None or q.minimum is not None else 0)
    if q.scheme.weight_bits == 8:
        stored = q.codes.int()
    rows = range(n) if n * k < 30000 else range(0, n, 7)
    for row in rows:
        bits = torch.tensor([gpu.code_bit(byref(form), row, column, k) for column in range(k)])
        codes = memory[bits // 8].int() >> bits % 8
        codes = (codes & 15) - 8 if form.bits == 4 else codes.to(torch.int8).int()
        assert torch.equal(codes, stored[row])
    if not form.group:
        return
    for row in rows:
        for group in range(-(-k // form.group)):
            at = gpu.scale_byte(byref(form), row, group * form.group, k, 0)
            kind = torch.float16 if form.scale_bytes == 2 else torch.float32
            want = 1.0 if q.group_scale is None else q.group_scale[row, group].item()
            assert memory[at : at + form.scale_bytes].clone().view(kind).item() == want
            if form.offsets:
                at = gpu.scale_byte(byref(form), row, group * form.group, k, 1)
                columns = offsets_of(q).expand(n, -(-k // form.group))
                assert memory[at : at + 4].clone().view(torch.float32).item() == columns[row, group].item()


@pytest.mark.parametrize("case", WEIGHTS, ids=by_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_loses_nothing(gpu, case, shape):
    q = make(*shape, *case)
    packed = hb.pack(q)
    assert isinstance(packed, CudaPackedWeight) and not packed.shares_codes
    codes = torch.empty_like(q.codes)
    packed.unpack_into(codes)
    assert torch.equal(codes, q.codes)
    # (c - zero) * scale and c * scale + offset round differently.
    near = {"rtol": 0, "atol": 1e-6 if q.scheme.asym else 0}
    torch.testing.assert_close(packed.dequantize(torch.float32), q.dequantize(), **near)


@pytest.mark.parametrize("case", WEIGHTS, ids=by_name)
def test_padding_adds_nothing(gpu, case):
    q = make(70, 200, *case)
    packed = hb.pack(q)
    everything = packed._split()
    inside = torch.zeros(128, 256, dtype=torch.bool)
    inside[:70, :200] = True
    codes = packed.matrix(everything[0]).int() - (8 if packed.format.bits == 4 else 0)
    assert not codes[~inside].any()
    for part, size in zip(everything[1:], (packed.format.scale_bytes, 4), strict=True):
        if part is not None:
            spread, group = packed._spread(part, size), packed.format.group
            assert not spread[70:].any() and not spread[:, -(-200 // group) * group :].any()


@pytest.mark.parametrize("case", [case for case in WEIGHTS if "a8" in case[0]], ids=by_name)
def test_totals_are_the_sums_of_the_weight(gpu, case):
    q = make(70, 200, *case)
    total = hb.pack(q).total
    exact = (q.dequantize().double() / q.scale.double()[:, None]).sum(1)
    if q.scheme == hb.Scheme(8, 8):
        assert total.dtype == torch.int32 and torch.equal(total, q.codes.sum(1, dtype=torch.int32))
    else:
        assert total.dtype == torch.float32
        torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-3)


LAYOUTS = {
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "not aligned": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", ["w4a16_g32+asym", "w4a8_g64", "w8a8"])
@pytest.mark.parametrize("shape", [(128, 256), (96, 160)], ids=str)
def test_views_are_packed_as_what_they_show(gpu, shape, scheme, layout):
    q = make(*shape, scheme)
    parts = {what: getattr(q, what) for what in ("codes", "scale", "group_scale", "zero", "minimum")}
    views = {what: None if p is None else LAYOUTS[layout](p) for what, p in parts.items() if what != "scale"}
    other = hb.pack(hb.QuantizedTensor(**views, scale=parts["scale"], scheme=q.scheme, k=q.k))
    packed, x = hb.pack(q), torch.randn(140, shape[1]).half()
    assert torch.equal(other.weight, packed.weight)
    assert packed.total is None or torch.equal(packed.total, other.total)
    for m in (3, 140):
        assert torch.equal(hb.linear(x[:m], other), hb.linear(x[:m], packed))
    assert torch.equal(hb.pack(q.rows(64, 96)).weight, hb.pack(copied(q.rows(64, 96))).weight)


def copied(q):
    parts = {what: getattr(q, what) for what in ("codes", "scale", "group_scale", "zero", "minimum")}
    parts = {what: None if part is None else part.clone() for what, part in parts.items()}
    return hb.QuantizedTensor(**parts, scheme=q.scheme, k=q.k)


def test_a_pack_is_a_copy(gpu):
    q = make(8, 32, "w8a8")
    packed = hb.pack(q)
    before = packed.rows().clone()
    assert packed.rows().data_ptr() == q.codes.data_ptr(), "as long as they are as they were"
    q.codes.zero_()
    assert packed.rows().data_ptr() != q.codes.data_ptr() and torch.equal(packed.rows()[:8, :32], before)


def test_what_a_pack_says_of_itself(gpu):
    packed = hb.pack(make(70, 200, "w4a16_g64"))
    assert isinstance(packed, GpuWeight) and packed.shape == (70, 200) and str(packed.scheme) == "w4a16_g64"
    assert packed.kernel == "linear_w4a16_8x64x128_sm90" and packed.kernel in repr(packed)
    assert packed.nbytes == 2 * 2 * (4096 + 256) + 70 * 4 and packed.device == torch.device("cpu")


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8+2:4", "w4a16_g64+nf4"])
def test_a_pack_is_neither_pickled_nor_copied(gpu, scheme):
    weight = zeroed(40, 64, "2:4")
    packed = hb.pack(hb.sparsify(weight, scheme) if ":" in scheme else hb.quantize(weight, scheme))
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=f"a {type(packed).__name__} is a cache of one GPU.*or the layer"):
            way(packed)


def test_packs_are_done_before_another_stream_reads_them(gpu, monkeypatch):
    finished = []
    monkeypatch.setattr(pack, "finish", finished.append)
    monkeypatch.setattr(sparse_pack, "finish", finished.append)
    packed = hb.pack(make(40, 64, "w8a8"))
    packed.unpack_into(torch.empty(40, 64, dtype=torch.int8))
    sparse = hb.pack(hb.sparsify(zeroed(40, 64, "2:4"), "w8a8+2:4"))
    sparse.rows(), sparse.rows()
    assert finished == 4 * [torch.device("cpu")]
    monkeypatch.undo()
    waited = SimpleNamespace(synchronize=lambda: finished.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: finished.append(device) or waited)
    pack.finish(torch.device("cuda", 1))
    pack.finish(torch.device("cpu"))
    assert finished[4:] == [torch.device("cuda", 1), "waited"]


def test_the_device_of_a_tensor_says_whether_it_is_captured(monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def on(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(pack, "on", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    tensors = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)) for index in (0, 1)]
    pack.check_not_captured(tensors[0])
    with pytest.raises(hb.CudaError, match="captured"):
        pack.check_not_captured(tensors[1])


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        parts = made if isinstance(made, (tuple, list)) else (made,)
        self.bytes = max(self.bytes, *(p.nbytes for p in parts if isinstance(p, torch.Tensor)))
        return made


WAYS = [("2:4", pairs, from_pairs), ("blocks", blocks, from_blocks)]


@pytest.mark.parametrize(("pattern", "to", "back"), WAYS)
@pytest.mark.parametrize("shape", [(640, 256), (650, 330)], ids=str)
def test_zeros_are_left_out_of_some_rows_at_a_time(monkeypatch, pattern, to, back, shape):
    codes = zeroed(*shape, pattern).mul(30).round().to(torch.int8)
    whole = to(codes)
    monkeypatch.setattr(zeros, "_AT_ONCE", 128 * shape[1])
    with Largest() as largest:
        made = to(codes)
    whole, made = (p if isinstance(p, tuple) else (p,) for p in (whole, made))
    assert all(torch.equal(a, b) for a, b in zip(made, whole, strict=True))
    assert largest.bytes <= 3 * codes.nbytes
    assert torch.equal(back(*made, shape), codes)


NO_KERNEL = [("w4a16_g64+nf4", "nf4"), ("w8a8+ag64", "ag"), ("w4a8_g32+ag32", "ag")]


@pytest.mark.parametrize(("scheme", "why"), NO_KERNEL)
def test_weights_without_a_kernel_are_left_to_torch(gpu, scheme, why):
    q = make(20, 70, scheme)
    packed = hb.pack(q)
    assert isinstance(packed, TorchWeight) and packed.shares_codes and packed.nbytes == 0
    assert packed.kernel == "torch" and why in packed.why
    assert torch.equal(packed.dequantize(torch.float32), q.dequantize())


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16_g32+asym"])
def test_a_weight_without_channels(gpu, scheme):
    packed = hb.pack(make(8, 32, scheme).rows(0, 0))
    assert packed.kernel == "torch" and "no output channels" in packed.why
    assert hb.linear(torch.randn(3, 32).half(), packed).shape == (3, 0)


def test_dequantizing_some_rows_at_a_time_changes_nothing(gpu, monkeypatch):
    for case in WEIGHTS:
        q = make(150, 70, *case)
        packed, whole = hb.pack(q), q.dequantize()
        at_once = packed.dequantize(torch.bfloat16)
        monkeypatch.setattr(pack, "_MAKE_AT_ONCE", 300)
        assert torch.equal(dequantized(q, torch.float32), whole)
        assert torch.equal(packed.dequantize(torch.bfloat16), at_once)
        monkeypatch.undo()


def zeroed(n, k, pattern):
    """A weight with zeros two of four, in blocks, or anywhere."""
    weight = torch.randn(n, k)
    if pattern == "2:4":
        places = torch.rand(n, -(-k // 4), 4).argsort(2).view(n, -1)[:, :k]
        return weight * (places < 2)
    if pattern == "blocks":
        kept = (torch.arange(-(-n // 64))[:, None] + torch.arange(-(-k // 64))) % 2
        return weight * torch.kron(kept, torch.ones(64, 64))[:n, :k]
    return weight * (torch.rand(n, k) < 0.5)


SPARSE = [
    ("w8a8+2:4", "2:4", "spmm_nm_w8a8"),
    ("w8a8+unstructured", "2:4", "spmm_nm_w8a8"),
    ("w8a8+block16x4", "blocks", "spmm_block_w8a8"),
    ("w8a8+unstructured", "blocks", "spmm_block_w8a8"),
    ("w8a8+unstructured", "", "linear_w8a8"),
    ("w4a8_g64+block16x4", "blocks", "linear_w4a8"),
    ("f32+unstructured", "", "torch"),
    ("bf16+block16x1", "blocks", "torch"),
]


@pytest.mark.parametrize("shape", [(1, 1), (70, 200), (130, 320)], ids=str)
@pytest.mark.parametrize(("scheme", "pattern", "kernel"), SPARSE)
def test_sparse_weights(gpu, scheme, pattern, kernel, shape):
    sparse = hb.sparsify(zeroed(*shape, pattern), scheme)
    packed = hb.pack(sparse)
    assert str(packed.scheme) == scheme and packed.shape == shape and not packed.shares_codes
    if shape[1] > 64:
        assert packed.kernel.startswith(kernel)
    torch.testing.assert_close(packed.dequantize(torch.float32), sparse.to_dense(), rtol=0, atol=0)
    if scheme.startswith("w8a8"):
        n, k = shape
        codes = packed.rows()
        assert torch.equal(codes[:n, :k], sparse.codes()) and not codes[n:].any() and not codes[:, k:].any()
        x = torch.randn(140, k)
        dense = hb.pack(sparse.to_quantized())
        left = packed.weight.numel() / dense.weight.numel()
        assert left <= 0.625 or not kernel.startswith("spmm") or k < 64
        for m in (1, 5, 33, 140):
            assert torch.equal(hb.linear(x[:m], packed), hb.linear(x[:m], dense))
        y = hb.gated_linear(x[:5], packed, packed)
        torch.testing.assert_close(y, hb.gated_linear(x[:5], dense, dense), rtol=1e-6, atol=1e-6)


def test_a_sparse_weight_of_nothing(gpu):
    sparse = hb.sparsify(torch.zeros(70, 200), "w8a8+block16x4")
    packed, bias = hb.pack(sparse), torch.randn(70)
    assert packed.kernel.startswith("spmm_block") and packed.weight.numel() == 0
    for m in (3, 140):
        assert torch.equal(hb.linear(torch.randn(m, 200), packed, bias), bias.expand(m, 70))


def blocks_mask(kept: int) -> torch.Tensor:
    mask = torch.zeros(2, 5)
    mask.view(-1)[torch.randperm(10)[:kept]] = 1
    return mask.repeat_interleave(64, 0).repeat_interleave(64, 1)


def test_few_blocks_are_for_many_rows_too(gpu):
    """Of few blocks the kernel takes any number of rows; of more, torch takes those above 128."""
    weight = torch.randn(128, 320)
    for kept, road in ((4, KERNEL), (5, INT_MM)):  # of ten blocks
        sparse = hb.sparsify(weight * blocks_mask(kept), "w8a8+block16x4")
        packed, x = hb.pack(sparse), torch.randn(130, 320)
        assert packed.format.pattern == BLOCKS and packed.few_blocks == (road == KERNEL)
        assert road_of(packed, x.dtype, 128) == KERNEL and road_of(packed, x.dtype, 129) == road
        dense = hb.pack(hb.QuantizedTensor(sparse.codes(), sparse.scale, hb.Scheme(8, 8)))
        assert torch.equal(hb.linear(x, packed), hb.linear(x, dense))
