"""The CUDA kernels around products that torch computes, run on the CPU: weights to floats, the end of an int8
product.
"""

from __future__ import annotations

import itertools
from ctypes import byref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import halfbyte as hb
from corecall import ACTIVATION, CODE, Placed
from cuda_calls import ALIGNMENT, BAD_ARGUMENT, U, address, strided
from halfbyte.cuda.library import Dequantize, Finish, Format, Library, use_library

F32, BF16, F16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def library(emulated_library) -> Library:
    return Library(emulated_library, emulated=True)


def finish(library: Library, acc: Tensor, y: Placed, **more: Any) -> int:
    """One call; tensors by name, and their strides."""
    (m, n), residual = acc.shape, more.pop("residual", None)
    call = Finish(
        acc=acc.data_ptr(), y=y.ptr, ld_acc=acc.stride(0), ldy=y.ld, m=m, n=n, y_type=CODE[y.view.dtype],
        residual=address(residual), ld_residual=0 if residual is None else residual.stride(0),
        residual_type=0 if residual is None else CODE[residual.dtype],
        activation=ACTIVATION[more.pop("activation")], **{what: address(part) for what, part in more.items()},
    )  # fmt: skip
    return library.finish_run(byref(call), None)


def test_finish(library):
    exact = {"none": lambda y: y, "relu": torch.relu}
    exact |= {"gelu": functional.gelu, "silu": functional.silu}
    exact["gelu_tanh"] = lambda y: functional.gelu(y, approximate="tanh")
    shapes = [(1, 1), (3, 7), (5, 8), (4, 33), (9, 512), (2, 516), (6, 1030)]
    for i, ((m, n), layout) in enumerate(itertools.product(shapes, ("dense", "aligned", "padded", "both"))):
        dtype, activation = DTYPES[i % 3], list(exact)[i % 5]
        acc = torch.randint(-(2**30), 2**30, (m, n), dtype=torch.int32)
        x_scale, scale = torch.rand(m) * 2.0**-14, torch.rand(n) * 2.0**-14
        zero = torch.randint(-128, 128, (m,), dtype=torch.int32) if i % 4 else None
        total = torch.randint(-(2**20), 2**20, (n,), dtype=torch.int32) if i % 4 else None
        bias = torch.randn(n) if i % 5 else None
        residual = torch.randn(m, n).to(DTYPES[i // 3 % 3]) if i % 3 else None
        y = Placed(m, n, dtype if activation in ("none", "relu") else F32, layout)
        shifted = acc if zero is None else acc - zero[:, None] * total
        t = (shifted.float() * scale) * x_scale[:, None]
        t = t if bias is None else t + bias
        wanted = exact[activation](t.double()).float()
        assert 0 == finish(
            library, strided(acc, layout), y, x_scale=x_scale, x_zero=zero, scale=scale, total=total,
            bias=bias, activation=activation,
            residual=None if residual is None else strided(residual, layout),
        )  # fmt: skip
        got, where = y.check(), f"{m}x{n} {layout} {activation}"
        if residual is not None:
            wanted = wanted + residual.float()
        if activation in ("none", "relu"):
            assert torch.equal(got, wanted.to(y.view.dtype)), where
        else:
            # erf, tanh and exp err by some units of 1 at most, and multiply v; then the residual's rounding.
            error = 8 * U * (t.abs() + wanted.abs())
            assert ((got - wanted).abs() <= error).all(), where


def test_finish_where_one_operand_is_not_aligned(library):
    m, n = 3, 64
    acc, total = (torch.randint(-1000, 1000, size, dtype=torch.int32) for size in ((m, n), (1, n)))
    residual, scale, bias, x_scale = torch.randn(m, n), torch.rand(1, n), torch.randn(1, n), torch.rand(m)
    zero = torch.arange(m, dtype=torch.int32)
    wanted = ((acc - zero[:, None] * total).float() * scale) * x_scale[:, None] + bias + residual
    for odd in range(6):
        layouts = iter(["both" if i == odd else "dense" for i in range(6)])
        acc, total, residual, scale, bias = (
            strided(part, next(layouts)) for part in (acc, total, residual, scale, bias)
        )
        y = Placed(m, n, F32, next(layouts))
        assert 0 == finish(
            library, acc, y, x_scale=x_scale, x_zero=zero, scale=scale, total=total, bias=bias,
            residual=residual, activation="none",
        )  # fmt: skip
        assert torch.equal(y.check(), wanted)


def test_finish_keeps_nan_and_refuses_what_it_must(library):
    acc, ones = torch.ones(2, 4, dtype=torch.int32), torch.ones(4)
    x_scale = torch.tensor([1.0, torch.nan])
    for activation in ACTIVATION:
        y = Placed(2, 4, F16)
        assert finish(library, acc, y, x_scale=x_scale, scale=ones, activation=activation) == 0
        assert y.check()[0].isfinite().all() and y.check()[1].isnan().all()
    good = {
        "acc": acc.data_ptr(), "y": ones.data_ptr(), "x_scale": ones.data_ptr(), "scale": ones.data_ptr(),
        "m": 1, "n": 4, "ld_acc": 4, "ldy": 4,
    }  # fmt: skip
    assert library.finish_run(byref(Finish(**good)), None) == 0
    assert library.finish_run(byref(Finish(m=0, n=4)), None) == 0
    assert library.finish_run(byref(Finish(m=4, n=0)), None) == 0
    refused = [
        {"m": -1}, {"n": -1}, {"m": 2, "ldy": 3}, {"m": 2, "ld_acc": 3}, {"y_type": 3}, {"activation": 5},
        {"acc": None}, {"y": None}, {"x_scale": None}, {"scale": None}, {"x_zero": ones.data_ptr()},
        {"residual": ones.data_ptr(), "residual_type": 4}, {"n": 2**26, "ld_acc": 2**26, "ldy": 2**26},
    ]  # fmt: skip
    for wrong in refused:
        assert library.finish_run(byref(Finish(**good | wrong)), None) == BAD_ARGUMENT, wrong
    wrong = good | {"y": ones.data_ptr() + 1, "y_type": 1}
    assert library.finish_run(byref(Finish(**wrong)), None) == ALIGNMENT


def packed(library: Library, form: Format, c: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> Tensor:
    """codes c [n, k] (of 4 bits 0..15), scales and offsets [n, groups], each put where api.h says."""
    n, k = c.shape
    size = library.weight_bytes(byref(form), n, k)
    memory = torch.zeros(size + 16, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 16 :][:size]
    memory[:] = 0x77  # padding may hold anything
    to = memory.numpy()
    for i, j in itertools.product(range(n), range(k)):
        byte, shift = divmod(library.code_bit(byref(form), i, j, k), 8)
        if form.bits == 8:
            to[byte] = int(c[i, j]) & 0xFF
        else:
            to[byte] = to[byte] & (0xF0 >> shift) | int(c[i, j]) << shift
    if form.group:
        for i, g in itertools.product(range(n), range(scales.shape[1])):
            parts = [(0, np.float16 if form.scale_bytes == 2 else np.float32, scales)]
            parts += [(1, np.float32, offsets)] * form.offsets
            for which, dtype, part in parts:
                at = library.scale_byte(byref(form), i, g * form.group, k, which)
                to[at : at + dtype().nbytes] = np.array([part[i, g]], dtype).view(np.uint8)
    return memory


FORMATS = [
    Format(bits, group, size, offsets)
    for bits in (4, 8)
    for group, size, offsets in ((0, 2, 0), (32, 2, 0), (64, 4, 0), (128, 2, 1), (32, 4, 1))
]


@pytest.mark.parametrize(
    "form", FORMATS, ids=lambda f: f"{f.bits}_g{f.group}_s{f.scale_bytes}" + "_offsets" * f.offsets
)
def test_dequantize(library, form):
    shapes = [(1, 8), (7, 72), (64, 128), (70, 136), (130, 264)]
    for i, (n, k) in enumerate(shapes):
        groups = -(-k // form.group) if form.group else 1
        u = np.random.randint(0, 16, (n, k)) if form.bits == 4 else np.random.randint(-128, 128, (n, k))
        group_type = np.float16 if form.scale_bytes == 2 else np.float32
        scales = np.random.uniform(0.2, 1, (n, groups)).astype(group_type)
        offsets = np.random.normal(size=(n, groups)).astype(np.float32)
        scale = np.random.uniform(1e-3, 1e-2, n).astype(np.float32)
        value = (u - (8 if form.bits == 4 else 0)).astype(np.float32)
        if form.group:
            value = value * scales.astype(np.float32).repeat(form.group, 1)[:, :k]
        if form.offsets:
            value = value + offsets.repeat(form.group, 1)[:, :k]
        weight, scale = packed(library, form, u, scales, offsets), torch.from_numpy(scale)
        for dtype in (BF16, F16):
            y = Placed(n, k + 24 * (i % 2), dtype)
            call = Dequantize(
                weight=weight.data_ptr(), scale=scale.data_ptr(), y=y.ptr, ldy=y.ld, n=n, k=k,
                y_type=CODE[dtype], format=form,
            )  # fmt: skip
            assert library.dequantize_run(byref(call), None) == 0
            got = y.check()
            assert torch.equal(got[:, :k], (torch.from_numpy(value) * scale[:, None]).to(dtype))
            beyond = got[:, k:].contiguous().view(torch.int16)
            assert (beyond == -1).all(), "columns behind k are not the kernel's"


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16_g32", "w4a16_g128", "w8a8", "w4a8_g64"])
def test_dequantize_is_that_of_the_weight(emulated_library, scheme):
    q = hb.quantize(torch.randn(72, 272), scheme)
    with use_library(emulated_library) as library:
        weight = hb.pack(q)
        y = Placed(72, 272, BF16)
        call = Dequantize(
            weight=weight.weight.data_ptr(), scale=weight.scale.data_ptr(), y=y.ptr, ldy=y.ld, n=72, k=272,
            y_type=CODE[BF16], format=weight.format,
        )  # fmt: skip
        assert library.dequantize_run(byref(call), None) == 0
    assert torch.equal(y.check(), q.dequantize().bfloat16())


def test_weights_that_dequantize_refuses(library):
    weight, scale = torch.zeros(64 * 128 + 16, dtype=torch.uint8), torch.zeros(64)
    y = Placed(64, 128, F16)
    good = {
        "weight": weight.data_ptr() + -weight.data_ptr() % 16, "scale": scale.data_ptr(), "y": y.ptr,
        "ldy": 128, "n": 64, "k": 128, "y_type": CODE[F16],
    }  # fmt: skip

    def run(form: tuple[int, ...] = (8, 0, 2, 0), **changed: Any) -> int:
        return library.dequantize_run(byref(Dequantize(**good | changed, format=Format(*form))), None)

    assert run() == 0 and not y.check().any()
    assert run(n=0) == 0 and run(k=0) == 0
    refused = [
        {"n": -1}, {"k": -8}, {"k": 127}, {"ldy": 120}, {"y_type": 0}, {"y_type": 3}, {"weight": None},
        {"scale": None}, {"y": None}, {"form": (3, 0, 2, 0)}, {"form": (8, 16, 2, 0)},
        {"form": (8, 0, 2, 1)}, {"form": (4, 32, 3, 0)}, {"form": (8, -32, 2, 0)},
        {"n": 2**31 - 1, "k": 2**31 - 8, "ldy": 2**31},
    ]  # fmt: skip
    for wrong in refused:
        assert run(**wrong) == BAD_ARGUMENT, wrong
    for wrong in ({"weight": good["weight"] + 8}, {"y": y.ptr + 2}, {"ldy": 132}, {"scale": y.ptr + 2}):
        assert run(**wrong) == ALIGNMENT, wrong
