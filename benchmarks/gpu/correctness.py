"""Every kernel, format and kind of shape against float64 on the same device, through the C interface."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from halfbyte.bench.gpu_clock import Device

from .operands import (
    PATTERNS,
    Codes,
    Output,
    dense,
    linear_call,
    packed_tensor,
    packed_zeros,
    padded_rows,
    random_tensor,
    runner,
    with_zeros,
)
from .record import Wrong

PHASE = "correctness"
REPEATS = 20  # runs that must give the same bits

SHAPES = ((4095, 2880), (192, 10944), (7392, 512), (129, 136), (8, 64), (1, 16), (1024, 4096))  # n, k
ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 192)
TINY_SHAPES, TINY_ROWS = ((70, 144),), (1, 9)
FORCED = ((0, 0), (1, 4), (2, 8), (4, 4), (8, 8))  # splits, warps; 0: chosen
# Relative Frobenius error: float32 sums in another order, and the rounding of y.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# An activation can make all of a small output as good as zero, in float32 exactly zero: errors of values
# below this are not relative to them. Products are about 1.
LEAST_VALUE = 0.03
ACTIVATIONS = (
    lambda v: v, functional.relu, functional.gelu, lambda v: functional.gelu(v, approximate="tanh"),
    functional.silu,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Which instances of the linear kernel a row of results is about."""

    arch: int
    scheme: str
    x: str  # float16, bfloat16, codes, or symmetric codes
    scale_dtype: torch.dtype = torch.float16
    minima: bool = False
    pattern: str = ""  # which zeros are left out

    def __str__(self) -> str:
        parts = [f"sm{self.arch}", self.scheme, self.pattern, self.x]
        parts += ["float32 scales"] * (self.scale_dtype == torch.float32) + ["minima"] * self.minima
        return " ".join(filter(None, parts))


def kinds(archs: tuple[int, ...], tiny: bool) -> Iterator[Kind]:
    """What is used most first."""
    if tiny:
        for arch in archs:
            yield Kind(arch, "w4a16_g128", "bfloat16")
            yield Kind(arch, "w8a8", "codes")
            yield Kind(arch, "w4a8_g32+asym", "codes", minima=True)
            for pattern in PATTERNS:
                yield Kind(arch, "w8a8", "codes", pattern=pattern)
        return
    groups = ("_g128", "", "_g64", "_g32")
    for group, bits, arch in itertools.product(groups, (4, 8), archs):
        forms = [("", {}), ("+asym", {})]
        forms += [("+asym", {"minima": True})] if group else []
        if group == "_g64":
            wide = {"scale_dtype": torch.float32}
            forms += [("", wide), ("+asym", wide | {"minima": True})]
        for asym, more in forms:
            for x in ("bfloat16", "float16"):
                yield Kind(arch, f"w{bits}a16{group}{asym}", x, **more)
            for x in ("codes", "symmetric codes"):
                yield Kind(arch, f"w{bits}a8{group}{asym}", x, **more)
    for pattern, arch, x in itertools.product(PATTERNS, archs, ("codes", "symmetric codes")):
        yield Kind(arch, "w8a8", x, pattern=pattern)


def jobs(device: Device, archs: tuple[int, ...], tiny: bool) -> list[tuple]:
    """One row of results per kind, over shapes, numbers of rows and epilogues."""
    return [(f"linear {kind}", partial(_check_kind, device, kind, tiny)) for kind in kinds(archs, tiny)]


def _check_kind(device: Device, kind: Kind, tiny: bool) -> dict:
    """worst: an error as a share of its tolerance."""
    turns, worst = itertools.count(), 0.0
    for n, k in TINY_SHAPES if tiny else SHAPES:
        q, of_gate = (
            random_tensor(kind.scheme, n, k, device.device, scale_dtype=kind.scale_dtype, minima=kind.minima)
            for _ in range(2)
        )
        case = Case(device, kind, q, of_gate)
        for m in TINY_ROWS if tiny else ROWS:
            try:
                worst = max(worst, case.check(m, next(turns)))
            except Wrong as fault:
                raise Wrong(f"n {n}, k {k}, m {m}: {fault}") from None
    case.repeat(m, 3 if tiny else REPEATS)
    return {"worst": worst, "calls": next(turns)}


class Case:
    """One weight, and a gate of the same format, in calls of different rows and epilogues."""

    def __init__(self, device: Device, kind: Kind, q, of_gate) -> None:
        self.device, self.kind = device, kind
        if kind.pattern:
            q = with_zeros(q, PATTERNS[kind.pattern])
            self.weight, self.gate = packed_zeros(q, PATTERNS[kind.pattern]), None
        else:
            self.weight, self.gate = packed_tensor(q), packed_tensor(of_gate)
        self.codes = q.codes
        self.dense, self.dense_gate = dense(q), dense(of_gate)
        self.n, self.k = q.shape
        self.exact = kind.scheme == "w8a8"

    def _x(self, m: int) -> tuple[torch.Tensor | Codes, torch.Tensor]:
        """What the kernel gets, and its values."""
        if "codes" in self.kind.x:
            codes = Codes.random(m, self.k, self.device.device, symmetric=self.kind.x != "codes")
            return codes, codes.dense()
        x = torch.randn(m, self.k, device=self.device.device).to(getattr(torch, self.kind.x))
        return padded_rows(x), x.double()

    def prepare(self, m: int, turn: int) -> tuple[Output, object, torch.Tensor]:
        """(output, what runs it, float64 values that it should have); epilogues take turns."""
        where = self.device.device
        x, values = self._x(m)
        dtype = (torch.float32, torch.bfloat16, torch.float16)[turn % 3]
        y = Output(m, self.n, dtype, where)
        activation = turn % len(ACTIVATIONS)
        gate = self.gate if turn % 4 == 3 else None
        bias, gate_bias = (torch.randn(self.n, device=where) if (turn >> s) & 1 else None for s in (1, 2))
        residual = torch.randn(m, self.n, device=where, dtype=dtype) if turn % 5 in (1, 2) else None
        splits, warps = FORCED[turn % len(FORCED)]
        call = linear_call(
            self.weight, x, y.value, gate=gate, bias=bias, gate_bias=gate_bias if gate else None,
            residual=residual, activation=activation, arch=self.kind.arch, splits=splits, warps=warps,
        )  # fmt: skip
        run = runner(self.device, call, x, y, gate, bias, gate_bias, residual)
        expected = values @ self.dense.T
        if bias is not None:
            expected += bias
        if gate is not None:
            other = values @ self.dense_gate.T
            expected *= ACTIVATIONS[activation](other if gate_bias is None else other + gate_bias)
        else:
            expected = ACTIVATIONS[activation](expected)
        if residual is not None:
            expected += residual
        if self.exact and gate is None and activation <= 1:
            expected = self._bits(x, bias, activation, residual, dtype)
        return y, run, expected

    def _bits(self, x: Codes, bias, activation: int, residual, dtype: torch.dtype) -> torch.Tensor:
        """w8a8 as halfbyte.reference computes it: exact integers, then float32 operations in one order."""
        codes = self.codes.double()
        acc = x.codes[:, : self.k].double() @ codes.T
        if x.zero is not None:
            acc -= x.zero.double()[:, None] * codes.sum(1)
        y = acc.float() * self.weight.scale * x.scale[:, None]
        y = y if bias is None else y + bias
        y = functional.relu(y) if activation else y
        return (y if residual is None else y + residual.float()).to(dtype)

    def check(self, m: int, turn: int) -> float:
        """The error as a share of its tolerance."""
        y, run, expected = self.prepare(m, turn)
        run()
        self.device.synchronize()
        y.check()
        if expected.dtype == y.value.dtype:
            if not torch.equal(expected, y.value):
                raise Wrong("not the bits of the reference")
            return 0.0
        size = expected.norm().clamp_min(LEAST_VALUE * expected.numel() ** 0.5)
        error = float((y.value.double() - expected).norm() / size)
        if not error <= TOLERANCE[y.value.dtype]:
            raise Wrong(f"relative error {error:.1e} in {y.value.dtype}, turn {turn}")
        return error / TOLERANCE[y.value.dtype]

    def repeat(self, m: int, times: int) -> None:
        """The same bits in every run, and from a replayed graph."""
        for turn in (3, 4):  # with a gate and 4 splits; with 8 splits
            y, run, _ = self.prepare(m, turn)
            run()
            first = y.value.clone()
            replay = self.device.captured([run])
            for i in range(times):
                y.poison()
                run() if i % 2 else replay()
                if not torch.equal(y.value, first):
                    raise Wrong(f"run {i} has other bits than the first")
