"""embedding: every kernel against the dequantized table, bit for bit; and QEmbedding, its module."""

from __future__ import annotations

import copy
import itertools
import pickle
import zlib

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import halfbyte as hb
from corecall import CODE, Placed, place, same
from halfbyte import _core
from halfbyte.embedding import QEmbedding, embedding
from halfbyte.quantized_tensor import NF4_CODES, to_nibbles
from halfbyte.reference import embedding_ref
from models import TOKENS, tied

KERNELS = [row for row in _core.kernels() if row["op"] == "embedding" and row["supported"]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("dense", "padded", "unaligned", "both")
SCHEMES = ("w8a16", "w8a16+asym", "w4a16", "w4a16+asym") + tuple(
    f"w{bits}a16_g{group}{suffix}"
    for bits, suffix in ((8, ""), (8, "+asym"), (4, ""), (4, "+asym"), (4, "+nf4"))
    for group in (32, 64, 128)
)
# Around the widths of the vectors and of the groups, and odd: half a byte of 4-bit codes is left over.
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 161, 300)


def random_table(scheme: str, n: int, k: int, *, minimum: bool = False, wide: bool = False):
    """Any codes and scales of the scheme, also such as quantize() never gives. wide: float32 group scales."""
    rng = np.random.default_rng(zlib.crc32(repr((scheme, n, k, minimum, wide)).encode()))
    parsed = hb.Scheme.parse(scheme)
    four, groups = parsed.weight_bits == 4, parsed.groups(k)
    floats = np.float32 if wide else np.float16
    smallest = 1e-30 if wide else 6e-8
    parts = {}
    if parsed.group:
        scales = 10.0 ** rng.uniform(np.log10(smallest), 0, (n, groups))
        parts["group_scale"] = np.maximum(scales, smallest).astype(floats)
    if parsed.asym and minimum:
        parts["minimum"] = (rng.standard_normal((n, groups)) * rng.integers(0, 2, (n, groups))).astype(floats)
    elif parsed.asym:
        low, high = (0, 16) if four else (-128, 128)
        parts["zero"] = rng.integers(low, high, (n, groups)).astype(np.int8)
    codes = rng.integers(0, 16, (n, k)).astype(np.uint8) if four else rng.integers(-128, 128, (n, k))
    parts["codes"] = to_nibbles(codes) if four else codes.astype(np.int8)
    parts["scale"] = (10.0 ** rng.uniform(-5, 2, n)).astype(np.float32)
    return hb.QuantizedTensor(
        **{name: torch.from_numpy(part) for name, part in parts.items()}, scheme=parsed, k=k
    )


def call(q, ids, dtype, layout="dense", threads=1) -> torch.Tensor:
    """[m, k] of one call of the core, the codes and the output placed as the layout says."""
    codes, out = place(q.codes, layout), Placed(len(ids), q.k, dtype, layout)
    others = [
        None if part is None else place(part, "unaligned" if part.dtype == torch.int8 else "dense")
        for part in (q.group_scale, q.zero, q.minimum)
    ]
    group_scale, zero, minimum = (0 if part is None else part.ptr for part in others)
    scale = place(q.scale[None])
    _core.embedding(
        codes.ptr, *q.shape, codes.ld, q.scheme.weight_bits, q.scheme.nf4, scale.ptr, q.scheme.group,
        group_scale, 0 if q.group_scale is None else CODE[q.group_scale.dtype], zero, minimum,
        ids.data_ptr(), len(ids), out.ptr, out.ld, CODE[dtype], threads,
    )  # fmt: skip
    return out.check()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda row: row["isa"])
def test_rows_are_those_of_the_dequantized_table(kernel, scheme):
    _core.force_isa(kernel["isa"])
    assert _core.select("embedding") == kernel["name"]
    ids = torch.tensor([3, 0, 8, 8, 5, 1])
    for i, k in enumerate(SIZES):
        grouped, asym = hb.Scheme.parse(scheme).group, hb.Scheme.parse(scheme).asym
        for minimum, wide in itertools.product((False, True)[: 1 + (asym and grouped > 0)], (False, True)):
            q = random_table(scheme, 9, k, minimum=minimum, wide=wide)
            for dtype in DTYPES:
                got = call(q, ids, dtype, LAYOUTS[i % 4], 1 + i % 3)
                same(got, embedding_ref(ids, q, dtype), f"{scheme} k={k} {dtype} {minimum=} {wide=}")


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16_g32+asym"])
def test_many_rows_on_many_threads(scheme, threads):
    q = random_table(scheme, 40, 300)
    ids = torch.randint(0, 40, (700,))
    same(call(q, ids, torch.float32, "padded", threads), embedding_ref(ids, q), "700 rows")
    assert call(q, ids[:0], torch.float32).shape == (0, 300)


@pytest.mark.parametrize("bad", [-1, 9, -(2**40), 2**63 - 1])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda row: row["isa"])
def test_a_bad_id_is_found_before_anything_is_written(kernel, bad):
    _core.force_isa(kernel["isa"])
    q, ids, out = random_table("w8a16", 9, 20), torch.tensor([1, 2, bad, 99]), torch.full((4, 20), 7.0)
    with pytest.raises(IndexError, match=rf"id {bad} at position 2 is outside the table of 9 rows"):
        _core.embedding(
            q.codes.data_ptr(), 9, 20, 20, 8, False, q.scale.data_ptr(), 0, 0, 0, 0, 0,
            ids.data_ptr(), 4, out.data_ptr(), 20, 0, 2,
        )  # fmt: skip
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"bits": 5}, "8 or 4 bits"),
        ({"nf4": True}, "nf4 codes have 4 bits"),
        ({"group": 48}, "no multiple of 32"),
        ({"group_scale_type": 1}, "float32 or float16"),
        ({"ld": 3}, "rows overlap"),
        ({"ldo": 3}, "output rows overlap"),
        ({"out_type": 3}, "float32, bfloat16 or float16"),
        ({"scale": 0}, "no memory"),
        ({"ids": 0}, "the ids have no memory"),
        ({"out": 0}, "the output has no memory"),
        ({"m": -1}, "negative number of ids"),
        ({"n": -1}, "negative shape"),
    ],
)
def test_the_core_checks_its_arguments(changed, says):
    p = torch.zeros(64).data_ptr()
    given = {
        "codes": p, "n": 2, "k": 4, "ld": 4, "bits": 8, "nf4": False, "scale": p, "group": 0,
        "group_scale": 0, "group_scale_type": 0, "zero": 0, "minimum": 0, "ids": p, "m": 2, "out": p,
        "ldo": 4, "out_type": 0, "threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=says):
        _core.embedding(*(given | changed).values())


def test_the_levels_of_nf4_agree():
    """The table in the C++ files is the one that quantize() encodes with."""
    codes = torch.arange(16, dtype=torch.uint8)
    q = hb.QuantizedTensor(
        codes[None, 0::2] | codes[None, 1::2] << 4, torch.ones(1), hb.Scheme.parse("w4a16_g32+nf4"),
        group_scale=torch.ones(1, 1),
    )  # fmt: skip
    for kernel in KERNELS:
        _core.force_isa(kernel["isa"])
        assert call(q, torch.tensor([0]), torch.float32)[0].tolist() == list(NF4_CODES)


def table(scheme="w4a16_g32+asym", n=50, k=33, **options):
    return QEmbedding(hb.quantize(torch.randn(n, k), scheme), **options)


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a16", "w4a16_g32+asym", "w4a16_g64+nf4"])
def test_from_embedding(scheme):
    old = nn.Embedding(50, 33, padding_idx=3).eval()
    layer = QEmbedding.from_embedding(old, scheme)
    ids = torch.randint(0, 50, (2, 3, 4))
    same(layer(ids), hb.quantize(old.weight, scheme).dequantize()[ids], "rows")
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (50, 33, 3)
    assert not layer.training and "scheme=" + scheme in repr(layer) and "padding_idx=3" in repr(layer)
    assert layer(torch.tensor([3])).abs().max() == 0
    assert layer.weight.shape == (50, 33) and layer.weight.dtype == torch.float32
    same(layer.weight.dequantize(), layer.quantized.dequantize(), "weight")


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_what_a_table_of_codes_cannot_do(option):
    with pytest.raises(hb.ModelError, match=f"wte cannot be quantized: {next(iter(option))}"):
        QEmbedding.from_embedding(nn.Embedding(5, 4, **option), "w8a16", name="wte")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2, 3), (2, 1, 4)])
def test_ids_of_any_integer_dtype_and_shape(dtype, shape):
    layer, ids = table(), torch.randint(0, 50, shape).to(dtype)
    same(layer(ids), layer.quantized.dequantize()[ids.long()], "rows")


def test_strided_ids():
    layer, ids = table(), torch.arange(48).reshape(6, 8)
    same(layer(ids.t()[1::2]), layer.quantized.dequantize()[ids.t()[1::2]], "rows")


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        (torch.tensor([[0, 1], [50, 0]]), IndexError, "wte: id 50 at position 2 is outside the table of 50"),
        (torch.tensor(-1), IndexError, "wte: id -1 at position 0"),
        (torch.zeros(2), hb.DTypeError, r"wte: ids have the dtype torch\.float32"),
        (torch.zeros(2, dtype=torch.bool), hb.DTypeError, r"wte: ids have the dtype torch\.bool"),
        ([1, 2], hb.DTypeError, "wte: ids must be a torch tensor, not list"),
        (torch.zeros(2, dtype=torch.int64).to_sparse(), hb.DeviceError, "wte: ids has the layout"),
    ],
)
def test_errors_name_the_module(ids, error, says):
    with pytest.raises(error, match=says):
        table(name="wte")(ids)


def test_tables_without_data():
    layer = table(name="wte").to("meta")
    with pytest.raises(hb.DeviceError, match="wte: weight_codes is on the meta device"):
        layer(torch.tensor([1]))
    assert layer(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 33)
    layer = table()
    layer.weight_scale = layer.weight_scale.to("meta")
    with pytest.raises(hb.DeviceError, match="weight_scale is on the meta device"):
        layer(torch.tensor([1]))
    with pytest.raises(hb.DTypeError, match="QEmbedding takes a QuantizedTensor of torch tensors"):
        QEmbedding(hb.quantize(np.ones((3, 4), np.float32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_the_output_only(dtype):
    layer = table()
    before = {name: buffer.clone() for name, buffer in layer.state_dict().items()}
    codes = layer.weight_codes
    layer.to(dtype)
    assert layer.weight_codes is codes and layer.float_dtype == layer.weight.dtype == dtype
    for name, buffer in layer.state_dict().items():
        same(buffer, before[name], name)
    ids = torch.arange(50)
    same(layer(ids), layer.quantized.dequantize().to(dtype)[ids], "rows")
    with pytest.raises(hb.DTypeError, match="float64"):
        layer.double()(ids)


def test_changed_buffers_are_seen():
    layer, ids = table("w8a16"), torch.arange(50)
    first = layer(ids)
    layer.weight_scale.mul_(2)
    same(layer(ids), first * 2, "in place")
    layer.weight_codes = torch.zeros_like(layer.weight_codes)
    assert not layer(ids).any()
    layer.weight_scale[3] = torch.nan
    with pytest.raises(hb.NonFiniteError, match=r"scale\[3\] is a NaN"):
        layer(ids)
    with torch.inference_mode():
        layer = table("w8a16")
        same(layer(ids), layer.quantized.dequantize(), "inference mode")


@pytest.mark.parametrize("method", ["mse", "hqq"])
def test_state_dict(method):
    weight = torch.randn(20, 70)
    saved = QEmbedding(hb.quantize(weight, "w4a16_g32+asym", method=method))
    names = {"weight_codes", "weight_scale", "weight_group_scale"}
    offset = "weight_minimum" if method == "hqq" else "weight_zero"
    assert set(saved.state_dict()) == names | {offset}
    fresh = QEmbedding(hb.quantize(torch.randn(20, 70), "w4a16_g32+asym"))
    fresh.load_state_dict(saved.state_dict())
    ids = torch.arange(20)
    same(fresh(ids), saved(ids), "loaded")
    for twin in (copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        same(twin(ids), saved(ids), "copied")
    with pytest.raises(RuntimeError, match="weight is float and this embedding is quantized"):
        fresh.load_state_dict({"weight": weight})


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w4a16_g32+asym", "w4a16_g32+nf4"])
def test_the_torch_operator(scheme):
    layer, ids = table(scheme), torch.randint(0, 50, (2, 3))
    for dtype in DTYPES:
        torch.library.opcheck(embedding, (ids, scheme, 33, dtype, *layer._parts()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        rows = layer(mode.from_tensor(ids))
    assert rows.shape == (2, 3, 33) and rows.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic):
    torch._dynamo.reset()
    model = hb.quantize_(tied(), "w8a8", embeddings="w8a16").eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for tokens in (TOKENS, TOKENS[:, :1], TOKENS.int()):
            same(compiled(tokens), model(tokens), "compiled")
