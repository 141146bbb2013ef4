"""rope: every kernel against the reference, bit for bit, and within the error bound of op.h."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import halfbyte as hb
from corecall import CODE, Placed, same
from halfbyte import _core
from halfbyte.reference import rope_ref

KERNELS = [row for row in _core.kernels() if row["op"] == "rope" and row["supported"]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda row: row["isa"])
# (head size, rotary dims): models' sizes, and around the widths of the vectors
SIZES = (
    (2, 2), (3, 2), (6, 4), (14, 14), (16, 16), (17, 16), (18, 18), (30, 30), (32, 32), (34, 34), (37, 10),
    (40, 16), (64, 64), (64, 32), (66, 62), (80, 32), (96, 96), (128, 128), (129, 66), (256, 64),
)  # fmt: skip


def tables(length: int, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, dims, 2) / dims)
    return tuple(torch.from_numpy(f(angles).astype(np.float32)) for f in (np.cos, np.sin))


class Cache:
    """[batch, tokens, heads, head_size] in guarded memory, with its dimensions in any order and space
    between them.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, order: str = "bthd", pad: int = 0):
        sizes = dict(zip("bthd", shape, strict=True))
        inner = sizes[order[1]] * sizes[order[2]] * (sizes["d"] + pad)
        assert order[3] == "d"
        self.memory = Placed(sizes[order[0]], inner + pad, dtype, "unaligned" if pad else "dense")
        strides = {"d": 1, order[2]: sizes["d"] + pad, order[1]: sizes[order[2]] * (sizes["d"] + pad)}
        strides[order[0]] = inner + pad
        self.strides = tuple(strides[axis] for axis in "bth")
        self.view = torch.as_strided(
            self.memory.view, shape, (*self.strides, 1), self.memory.view.storage_offset()
        )

    def fill(self, values: torch.Tensor) -> Cache:
        self.view.copy_(values)
        return self

    def check(self) -> torch.Tensor:
        self.memory.check()
        return self.view.clone()


def call(
    x: Cache, out: Cache, cos, sin, positions=None, *, interleaved=False, first_position=0, threads=1
) -> None:
    batch, tokens, heads, head_size = x.view.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    _core.rope(
        batch * tokens, tokens, heads, head_size,
        x.memory.ptr, CODE[x.view.dtype], x.strides, out.memory.ptr, CODE[out.view.dtype], out.strides,
        2 * cos.shape[1], interleaved, cos.data_ptr(), sin.data_ptr(), len(cos),
        0 if positions is None else positions.data_ptr(), first_position, threads,
    )  # fmt: skip


@each_kernel
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_bits_of_the_reference(kernel, interleaved):
    _core.force_isa(kernel["isa"])
    assert _core.select("rope") == kernel["name"]
    for i, (size, dims) in enumerate(SIZES):
        cos, sin = tables(50, dims)
        for j, (x_type, out_type) in enumerate(itertools.product(DTYPES, DTYPES)):
            shape = 2, 3, 1 + (i + j) % 3, size
            x = torch.randn(shape).to(x_type)
            positions = torch.randint(0, 50, (2, 3))
            want = rope_ref(x, cos, sin, positions, interleaved=interleaved, out_dtype=out_type)
            placed = Cache(shape, x_type, ("bthd", "bhtd", "tbhd")[i % 3], pad=j % 2).fill(x)
            out = Cache(shape, out_type, ("bhtd", "bthd", "htbd", "hbtd")[j % 4], pad=i % 3)
            call(placed, out, cos, sin, positions, interleaved=interleaved, threads=1 + j % 3)
            same(out.check(), want, f"{size=} {dims=} {x_type} {out_type}")
            if x_type == out_type:
                call(placed, placed, cos, sin, positions, interleaved=interleaved)
                same(placed.check(), want, f"in place, {size=} {dims=}")


@each_kernel
def test_positions_that_count_up(kernel):
    """Of each batch from the first position on; into a part of a longer cache, which stays as it was."""
    _core.force_isa(kernel["isa"])
    cos, sin = tables(20, 32)
    x, cache = torch.randn(2, 5, 3, 32), Cache((2, 20, 3, 32), torch.float32, "bhtd").fill(torch.tensor(7.0))
    want = rope_ref(x, cos, sin, torch.arange(15, 20).expand(2, 5))
    _core.rope(
        10, 5, 3, 32, x.data_ptr(), 0, (480, 96, 32), cache.view[:, 15:].data_ptr(), 0, cache.strides,
        32, False, cos.data_ptr(), sin.data_ptr(), 20, 0, 15, 1,
    )  # fmt: skip
    same(cache.check()[:, 15:], want)
    assert (cache.check()[:, :15] == 7).all()


@each_kernel
def test_no_dimensions_to_rotate_are_a_copy(kernel):
    _core.force_isa(kernel["isa"])
    x = torch.randn(2, 5, 3, 37)
    out = Cache((2, 5, 3, 37), torch.bfloat16, "bhtd", pad=3)
    _core.rope(
        10, 5, 3, 37, x.data_ptr(), 0, (555, 111, 37), out.memory.ptr, 1, out.strides,
        0, False, 0, 0, 0, 0, 0, 2,
    )  # fmt: skip
    same(out.check(), x.bfloat16())


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_any_number_of_threads(threads):
    cos, sin = tables(300, 64)
    x = Cache((2, 300, 9, 64), torch.float32).fill(torch.randn(2, 300, 9, 64))
    one, several = (Cache((2, 300, 9, 64), torch.bfloat16) for _ in range(2))
    call(x, one, cos, sin)
    call(x, several, cos, sin, threads=threads)
    same(several.check(), one.check())


@each_kernel
@pytest.mark.parametrize("interleaved", [False, True])
def test_error_bound(kernel, interleaved):
    _core.force_isa(kernel["isa"])
    cos, sin = tables(100, 64)
    x, positions = torch.randn(1, 100, 4, 64) * 10.0 ** torch.randint(-3, 4, (64,)), torch.arange(100)
    out = Cache((1, 100, 4, 64), torch.float32)
    call(Cache((1, 100, 4, 64), torch.float32).fill(x), out, cos, sin, interleaved=interleaved)
    a, b = x.double().unflatten(-1, (32, 2)).unbind(-1) if interleaved else x.double().chunk(2, -1)
    ya, yb = out.check().unflatten(-1, (32, 2)).unbind(-1) if interleaved else out.check().chunk(2, -1)
    c, s = (t[positions][:, None].double() for t in (cos, sin))
    for got, first, second, sign in ((ya, a * c, b * s, -1), (yb, b * c, a * s, 1)):
        exact = first + sign * second
        bound = 2.0**-24 * (first.abs() + second.abs() + exact.abs()) * (1 + 2.0**-20)
        assert ((got.double() - exact).abs() <= bound).all()


def test_rotate_half_of_transformers():
    """Its formula, written out: x * cos + rotate_half(x) * sin, the tables twice side by side."""
    cos, sin = tables(10, 64)
    x = torch.randn(2, 10, 3, 64)
    turned = torch.cat((-x[..., 32:], x[..., :32]), -1)
    want = x * torch.cat((cos, cos), -1)[:, None] + turned * torch.cat((sin, sin), -1)[:, None]
    same(hb.rope(x, torch.arange(10), cos_sin=(cos, sin)), want)


@each_kernel
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_pair(kernel, bad):
    _core.force_isa(kernel["isa"])
    x = torch.randn(1, 2, 2, 40)
    x[0, 1, 1, 5] = bad
    for interleaved, pair in ((False, [5, 25]), (True, [4, 5])):
        with hb.force_isa(kernel["isa"]):
            y = hb.rope(x, torch.arange(1, 3), interleaved=interleaved)
        found = (~y.isfinite()).nonzero().tolist()
        assert found == [[0, 1, 1, i] for i in pair]


@each_kernel
@pytest.mark.parametrize(("bad", "at"), [(-1, 2), (6, 1), (2**62, 0), (-(2**63), 3)])
def test_a_bad_position_is_found_before_anything_is_written(kernel, bad, at):
    _core.force_isa(kernel["isa"])
    cos, sin = tables(6, 8)
    x, out = (Cache((2, 2, 1, 8), torch.float32).fill(torch.ones(2, 2, 1, 8)) for _ in range(2))
    positions = torch.tensor([1, 2, 3, 4])
    positions[at] = bad
    with pytest.raises(IndexError, match=f"position {bad} of row {at} is outside the table of 6 positions"):
        call(x, out, cos, sin, positions)
    for first in (-1, 5, 2**63 - 2):
        with pytest.raises(IndexError, match="is outside the table"):
            call(x, out, cos, sin, first_position=first)
    with pytest.raises(ValueError, match="too large"):
        call(x, out, cos, sin, first_position=2**63 - 1)
    call(x, out, cos, sin, first_position=4)
    assert (out.check() != 1).any()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"m": -1}, "negative shape"),
        ({"heads": -1}, "negative shape"),
        ({"head_size": -4}, "negative shape"),
        ({"tokens": 0}, "tokens must be positive"),
        ({"rotary_dims": 3}, "rotary_dims 3 must be even"),
        ({"rotary_dims": -2}, "rotary_dims -2 must be even, not negative"),
        ({"rotary_dims": 6}, "at most the head size 4"),
        ({"x": 0}, "x has no memory"),
        ({"out": 0}, "the output has no memory"),
        ({"x_type": 3}, "x must be float32"),
        ({"out_type": 3}, "the output must be float32"),
        ({"cos": 0}, "the table has no memory"),
        ({"out_strides": (16, 8, 3)}, "rows or heads of the output overlap: a stride of 3 for 4"),
        ({"out_strides": (16, 7, 4)}, "a stride of 7 for 8 elements"),
        ({"out_strides": (4, 8, 4)}, "a stride of 4 for 8 elements"),
    ],
    ids=str,
)
def test_the_core_checks_its_arguments(changed, says):
    memory = torch.zeros(256)
    p = memory.data_ptr()
    given = {
        "m": 4, "tokens": 2, "heads": 2, "head_size": 4, "x": p, "x_type": 0, "x_strides": (16, 8, 4),
        "out": p + 512, "out_type": 0, "out_strides": (16, 8, 4), "rotary_dims": 4, "interleaved": False,
        "cos": p, "sin": p, "table": 9, "positions": 0, "first_position": 0, "threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=says):
        _core.rope(*(given | changed).values())
    for change in ({"out_type": 1}, {"out_strides": (32, 16, 4)}):
        with pytest.raises(ValueError, match="another type or other strides"):
            _core.rope(*(given | {"out": p} | change).values())
    _core.rope(*(given | {"x_strides": (0, 0, 0)}).values())  # x is only read
    for empty in ({"m": 0, "tokens": 0}, {"heads": 0}):
        _core.rope(*(given | {"x": 0, "out": 0} | empty).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(5,), (3, 5), (2, 3, 5), (0, 5), (2, 0)], ids=str)
def test_rope_of_torch_and_numpy(leading, dtype):
    x = torch.randn(*leading, 4, 24).to(dtype)
    tokens, cos, sin = leading[-1], *tables(60, 24)
    shared, own = torch.randint(0, 60, (tokens,)), torch.randint(0, 60, leading, dtype=torch.int32)
    for interleaved in (False, True):
        for positions in (shared, own):
            want = rope_ref(x, cos, sin, positions.long(), interleaved=interleaved)
            same(hb.rope(x, positions, interleaved=interleaved), want, "theta")
            same(hb.rope(x, positions, interleaved=interleaved, cos_sin=(cos, sin)), want, "tables")
            if dtype != torch.bfloat16:
                y = hb.rope(x.numpy(), positions.numpy(), interleaved=interleaved)
                same(torch.from_numpy(y), want, "numpy")
    wide = torch.randn(*leading, 6, 24).to(dtype)[..., 1:5, :]
    same(hb.rope(wide, shared), rope_ref(wide, cos, sin, shared), "heads cut out")
    cos, sin = tables(60, 10)
    want = rope_ref(x, cos, sin, shared)
    same(hb.rope(x, shared, rotary_dims=10), want, "partial")
    same(hb.rope(x, shared, rotary_dims=10, cos_sin=(cos.double().half(), sin)), rope_ref(
        x, cos.half().float(), sin, shared), "partial tables of float16")  # fmt: skip


def test_far_positions_turn_by_exact_angles():
    x, far = torch.randn(1, 1, 16), 2**40 + 1
    angles = far * 500000.0 ** (-np.arange(0, 16, 2) / 16)
    cos, sin = (torch.from_numpy(f(angles).astype(np.float32))[None] for f in (np.cos, np.sin))
    want = rope_ref(x, cos, sin, torch.tensor([0]))
    same(hb.rope(x, torch.tensor([far]), theta=500000.0), want)
    same(hb.rope(hb.rope(x, torch.tensor([3])), torch.tensor([0])), hb.rope(x, torch.tensor([3])))


X, P = torch.randn(2, 3, 4, 8), torch.arange(3)
COS = torch.ones(5, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((X[0, 0], P), {}, hb.ShapeError, r"must be \[..., tokens, heads, head_size\]"),
        ((X.int(), P), {}, hb.DTypeError, "x has the dtype"),
        ((X.clone().requires_grad_(), P), {}, ValueError, "rope: x requires a gradient"),
        ((X, P.float()), {}, hb.DTypeError, "positions have the dtype"),
        ((X, P.bool()), {}, hb.DTypeError, "positions have the dtype"),
        ((X, P.numpy()), {}, hb.DTypeError, "positions must be a torch tensor as x is"),
        ((X, P[:2]), {}, hb.ShapeError, r"positions have the shape \(2,\)"),
        ((X, P.expand(1, 3)), {}, hb.ShapeError, r"positions have the shape \(1, 3\)"),
        ((X, P), {"rotary_dims": 3}, hb.ShapeError, "rotary_dims is 3"),
        ((X, P), {"rotary_dims": 10}, hb.ShapeError, "rotary_dims is 10"),
        ((X[..., :7], P), {}, hb.ShapeError, "rotary_dims is 7"),
        ((X, P), {"theta": 0.0}, ValueError, "theta is 0.0"),
        ((X, P), {"theta": float("nan")}, ValueError, "theta is nan"),
        ((X, P), {"cos_sin": (COS, COS[:4])}, hb.ShapeError, "cos and sin have the shapes"),
        ((X, P), {"cos_sin": (COS, COS.long())}, hb.DTypeError, "sin has the dtype"),
        ((X, P), {"cos_sin": (COS, COS), "rotary_dims": 4}, hb.ShapeError, "the tables are for 8"),
        ((X[..., :6], P), {"cos_sin": (COS, COS)}, hb.ShapeError, "rotary_dims is 8"),
        ((X, P + 3), {"cos_sin": (COS, COS)}, IndexError, "position 5 of row 2 is outside the table of 5"),
        ((X, P - 1), {"cos_sin": (COS, COS)}, IndexError, "position -1 of row 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(arguments, options, error, says):
    with pytest.raises(error, match=says):
        hb.rope(*arguments, **options)
