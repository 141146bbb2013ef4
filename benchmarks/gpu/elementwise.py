"""The kernels around the products: rows to codes, integer sums to outputs, packed weights to matrices."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch.nn import functional

import halfbyte as hb
from halfbyte.bench.gpu_clock import Device
from halfbyte.cuda.library import Dequantize, Finish
from halfbyte.reference import quantize_rows_ref

from .correctness import ACTIVATIONS, TOLERANCE
from .operands import TYPES, Output, address, dense, packed_tensor, random_tensor, runner
from .record import Wrong

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ROW_SHAPES = ((1, 1), (3, 100), (17, 4096), (5, 11008), (2, 40000), (64, 896), (300, 2048))
WEIGHT_SHAPES = ((4095, 2880), (129, 136), (64, 128), (1, 8))
TINY = ((3, 72),)


def jobs(device: Device, tiny: bool) -> list[tuple]:
    """One row of results per kind and dtype."""
    found = [
        *((f"rows {kind} {str(dtype)[6:]}", _rows, kind, dtype) for kind in KINDS for dtype in FLOATS),
        *((f"finish {str(dtype)[6:]}", _finish, dtype) for dtype in FLOATS),
        *(
            (f"dequantize {scheme} {str(dtype)[6:]}", _dequantize, scheme, dtype)
            for scheme in ("w4a16_g128", "w4a16", "w4a16_g32+asym", "w8a16", "w8a16_g64+asym")
            for dtype in FLOATS[:2]
        ),
    ]
    return [(name, partial(job, device, tiny, *arguments)) for name, job, *arguments in found]


def _normalized(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """RMSNorm, or with a bias LayerNorm, in float64."""
    h, weight = h.double(), weight.double()
    if bias is not None:
        return functional.layer_norm(h, h.shape[1:], weight, bias.double(), 1e-5)
    return h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-6) * weight


KINDS = ("plain", "static", "layernorm", "rmsnorm", "silu_mul")


def _rows(device: Device, tiny: bool, kind: str, dtype: torch.dtype) -> dict:
    for (m, k), symmetric in itertools.product(TINY if tiny else ROW_SHAPES, (False, True)):
        x, other = (torch.randn(m, k, device=device.device).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(k, device=device.device) for _ in range(2))
        where = f"m {m}, k {k}, symmetric {symmetric}: "
        if kind in ("plain", "static"):
            static = (0.03, -7) if kind == "static" else None
            if static and symmetric:
                continue
            grid = {} if static is None else {"scale": static[0], "zero": static[1]}
            got = hb.quantize_rows(x, symmetric=symmetric, **grid)
            expected = quantize_rows_ref(x.cpu(), symmetric=symmetric, static=static)
            for part, name in zip(expected, expected._fields, strict=True):
                if not torch.equal(getattr(got, name).cpu(), part):
                    raise Wrong(f"{where}{name} are not those of the reference")
            continue
        if kind == "silu_mul":
            got = hb.silu_mul_quantize(x, other, symmetric=symmetric)
            y = functional.silu(x.double()) * other.double()
        else:
            bias = bias if kind == "layernorm" else None
            options = {"residual": other, "return_sum": True, "symmetric": symmetric}
            if bias is None:
                got, total = hb.rmsnorm_quantize(x, weight, **options)
            else:
                got, total = hb.layernorm_quantize(x, weight, bias, **options)
            h = x.float() + other.float()
            if not torch.equal(total, h.to(dtype)):
                raise Wrong(f"{where}the sum is not x + residual")
            y = _normalized(h, weight, bias)
        back = (got.codes.double() - got.zero.double()[:, None]) * got.scale.double()[:, None]
        # Half a step of rounding; and as much again of float32's error as a row of 40000 may have.
        if not ((back - y).abs() <= got.scale.double()[:, None] * 0.505 + 1e-4 * y.abs().amax(1, True)).all():
            raise Wrong(f"{where}codes are more than half a step away")
    return {}


def _finish(device: Device, tiny: bool, dtype: torch.dtype) -> dict:
    turns = itertools.count()
    for m, n in ((5, 70),) if tiny else ((33, 4095), (256, 1024), (1, 8), (129, 7392)):
        for _ in range(len(ACTIVATIONS)):
            turn, where = next(turns), device.device
            acc = torch.randint(-(10**6), 10**6, (m, n), dtype=torch.int32, device=where)
            x_scale, scale = torch.rand(m, device=where), torch.rand(n, device=where) * 1e-4
            zero = torch.randint(-128, 128, (m,), dtype=torch.int32, device=where) if turn % 3 else None
            total = torch.randint(-999, 999, (n,), dtype=torch.int32, device=where)
            bias = torch.randn(n, device=where) if turn % 2 else None
            residual = torch.randn(m, n, device=where).to(dtype) if turn % 4 > 1 else None
            y, activation = Output(m, n, dtype, where), turn % len(ACTIVATIONS)
            call = Finish(
                acc=acc.data_ptr(), x_scale=x_scale.data_ptr(), x_zero=address(zero), scale=scale.data_ptr(),
                total=total.data_ptr(), bias=address(bias), residual=address(residual), y=y.value.data_ptr(),
                ld_acc=n, ldy=y.value.stride(0), ld_residual=n, m=m, n=n, y_type=TYPES[dtype],
                residual_type=TYPES[dtype], activation=activation,
            )  # fmt: skip
            runner(device, call)()
            exact = acc if zero is None else acc - zero[:, None] * total
            v = exact.float() * scale * x_scale[:, None]
            v = ACTIVATIONS[activation](v if bias is None else v + bias)
            expected = (v if residual is None else v + residual.float()).to(dtype)
            y.check()
            error = float((y.value.double() - expected.double()).norm() / expected.double().norm())
            if not error <= (0 if activation <= 1 else TOLERANCE[dtype]):
                raise Wrong(f"m {m}, n {n}, turn {turn}: error {error:.1e}")
    return {}


def _dequantize(device: Device, tiny: bool, scheme: str, dtype: torch.dtype) -> dict:
    for n, k in TINY if tiny else WEIGHT_SHAPES:
        q = random_tensor(scheme, n, k, device.device)
        packed, y = packed_tensor(q), Output(n, k, dtype, device.device)
        call = Dequantize(
            weight=packed.weight.data_ptr(), scale=packed.scale.data_ptr(), y=y.value.data_ptr(),
            ldy=y.value.stride(0), n=n, k=k, y_type=TYPES[dtype], format=packed.format,
        )  # fmt: skip
        runner(device, call)()
        exact = dense(q)
        error = (y.value.double() - exact).abs()
        # float32 in three steps, then one rounding to 11 or 8 bits.
        y.check()
        if not (error <= exact.abs() * 2**-8 + 1e-6).all():
            raise Wrong(f"n {n}, k {k}: wrong values")
        if not torch.equal(y.value, packed.dequantize(dtype)):
            raise Wrong(f"n {n}, k {k}: not the float32 values rounded once")
    return {}
