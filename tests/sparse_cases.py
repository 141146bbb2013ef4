"""What every kernel of the sparse ops must get right: shapes, where the zeros lie, and how numbers are made.

Blocks are 16 output channels by 4 or 1 input features and panels 16 or 32 channels; tiles have up to some 50
rows. Sizes sit on both sides of these and of their multiples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import cases
import halfbyte as hb
from cases import FILLINGS
from corecall import CODE, place
from halfbyte import _core
from halfbyte.quantized_tensor import to_nibbles
from halfbyte.sparse.pattern import Pattern

INT8 = ("spmm_block_w8a8", "spmm_nm_w8a8", "spmm_unstructured_w8a8")
CODES = (*INT8, "spmm_block_w4a8")
FLOAT = ("spmm_block_f32", "spmm_block_bf16", "spmm_unstructured_f32")
PATTERNS = {
    "spmm_block_w8a8": ("block16x4",),
    "spmm_block_w4a8": ("block16x4",),
    "spmm_nm_w8a8": ("2:4", "1:4", "4:8"),
    "spmm_unstructured_w8a8": ("unstructured",),
    "spmm_block_f32": ("block16x1",),
    "spmm_block_bf16": ("block16x1",),
    "spmm_unstructured_f32": ("unstructured",),
}

KERNELS = {op: [row for row in _core.kernels() if row["op"] == op and row["supported"]] for op in PATTERNS}

ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 23, 24, 25, 48, 49, 127, 128, 129, 200)
COLUMNS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 101)
FEATURES = (1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 1001)

# Where weights (or blocks) are kept: a density; one of them; panels of 16 channels, or channels, of densities
# of their own, some empty and some full; few input features, whole; the first or the last input feature.
KEPT = ("0.5", "0.1", "1", "0.02", "panels", "0", "one", "rows", "features", "first", "last")
WEIGHTS = ("normal", "full", "max", "min")


@dataclass(frozen=True)
class Sparse:
    """y[m,n] = x[m,k] w[n,k]^T by `op`, zeros of w where `kept` says, numbers and layout by name."""

    op: str
    pattern: str
    m: int
    n: int
    k: int
    kept: str = "0.5"
    x: str = "normal"
    w: str = "normal"
    layout: str = "dense"
    threads: int = 1

    @property
    def id(self) -> str:
        tail = "".join(f"-{v}" for v in (self.x, self.w, self.layout) if v not in ("normal", "dense"))
        tail += f"-t{self.threads}" if self.threads > 1 else ""
        return f"{self.op}-{self.pattern}-{self.m}x{self.n}x{self.k}-{self.kept}{tail}"

    def mask(self, rng: np.random.Generator) -> np.ndarray:
        """bool [n, k]: the weights that are kept."""
        return mask(Pattern.parse(self.pattern), self.n, self.k, self.kept, rng)

    def operands(self):
        """x float32 [m, k], weight [n, k] (codes in int8, or float32), scale, bias [n], residual [m, n]."""
        rng = cases.rng_for((self.op, self.pattern, self.m, self.n, self.k, self.kept, self.x, self.w))
        x = cases.fill_rows(self.x, self.m, self.k, rng)
        if self.op in CODES:
            shape, high = (self.n, self.k), 127 if self.op in INT8 else 7
            codes = {
                "normal": lambda: np.clip(np.rint(high / 3 * rng.standard_normal(shape)), -high, high),
                "full": lambda: rng.integers(-high - 1, high + 1, shape),
                "max": lambda: np.full(shape, high),
                "min": lambda: np.full(shape, -high - 1),
            }
            weight = (codes[self.w]() * self.mask(rng)).astype(np.int8)
        else:
            weight = rng.standard_normal((self.n, self.k)) * 10.0 ** rng.uniform(-2, 2, (self.n, 1))
            weight = (weight * self.mask(rng)).astype(np.float32)
        scale = (10.0 ** rng.uniform(-5, 0, self.n)).astype(np.float32)
        bias = rng.standard_normal(self.n).astype(np.float32)
        residual = rng.standard_normal((self.m, self.n)).astype(np.float32)
        return tuple(map(torch.from_numpy, (x, weight, scale, bias, residual)))


def mask(pattern: Pattern, n: int, k: int, kept: str, rng: np.random.Generator) -> np.ndarray:
    """bool [n, k] with the pattern; of N:M all of a group's N are kept only at density 1."""
    rows, columns = -(-n // pattern.rows), -(-k // pattern.columns)
    panels = rng.permutation(np.resize((1, 0, 0.03, 0.5, 0.1), -(-n // 16)))
    density = {
        "one": lambda: np.zeros((rows, columns)),
        "panels": lambda: panels[np.arange(rows) // max(16 // pattern.rows, 1)][:, None],
        "rows": lambda: rng.choice((0.0, 0.01, 0.3, 1.0), (rows, 1)),
        "features": lambda: (rng.random((1, columns)) < 0.1).astype(float),
        "first": lambda: np.arange(columns)[None] == 0,
        "last": lambda: np.arange(columns)[None] == columns - 1,
    }
    share = density[kept]() if kept in density else float(kept)
    keep = np.broadcast_to(rng.random((rows, columns)) < share, (rows, columns)).copy()
    if kept == "one":
        keep[rng.integers(rows), rng.integers(columns)] = True
    keep = keep.repeat(pattern.rows, 0).repeat(pattern.columns, 1)[:n, :k]
    if pattern.kind == "nm":  # of what is kept of a group, N at random
        groups = np.pad(keep, ((0, 0), (0, -k % pattern.m))).reshape(n, -1, pattern.m)
        ranks = (rng.random(groups.shape) + ~groups).argsort(2).argsort(2)
        keep = (groups & (ranks < pattern.n)).reshape(n, -1)[:, :k]
    return keep


def group_scales(op: str, n: int, k: int) -> tuple[int, torch.Tensor | None]:
    """The group of an int4 weight of that shape, and its scales: float16, or float32 that are no float16."""
    if op in INT8:
        return 0, None
    group = (32, 64, 128)[k % 3]
    groups = -(-k // group)
    scale = 2 ** (torch.arange(n * groups) * 0.37 % 9 - 6).reshape(n, groups)
    return group, scale if k % 2 else scale.half()


def dense(op: str, codes: torch.Tensor, scale: torch.Tensor) -> hb.QuantizedTensor:
    """The weight that `pack` makes of codes, zeros included."""
    k, (group, group_scale) = codes.shape[1], group_scales(op, *codes.shape)
    if group_scale is None:
        return hb.QuantizedTensor(codes, scale, hb.Scheme(8, 8))
    nibbles = torch.from_numpy(to_nibbles((codes + 8).numpy().astype(np.uint8)))
    return hb.QuantizedTensor(nibbles, scale, hb.Scheme(4, 8, group), k, group_scale)


def pack(op: str, weight: torch.Tensor, scale=None, *, pattern="", layout="dense", threads=1, **options):
    """The core's pack of a dense weight: codes in int8 with `scale` [n], or floats; placed by `layout`."""
    parsed = Pattern.parse(pattern or PATTERNS[op][0])
    placed = place(weight, layout)
    scales = None if scale is None else place(scale[None], layout)
    groups = {"nonzero": parsed.n, "of": parsed.m} if parsed.kind == "nm" else {}
    if op in CODES and op not in INT8:
        group, group_scale = group_scales(op, *weight.shape)
        placed_scales = place(group_scale, "unaligned" if layout in ("unaligned", "both") else "dense")
        groups = {"group": group, "group_scale": placed_scales.ptr}
        groups["group_scale_type"] = CODE[group_scale.dtype]
    return _core.pack_sparse(
        op,
        placed.ptr,
        0 if weight.dtype == torch.int8 else CODE[weight.dtype],
        *weight.shape,
        placed.ld,
        scale=scales.ptr if scales else 0,
        threads=threads,
        **(groups | options),
    )


def pack_case(case: Sparse, weight: torch.Tensor, scale: torch.Tensor):
    """The pack of what `case.operands()` gives."""
    scale = scale if case.op in CODES else None
    return pack(case.op, weight, scale, pattern=case.pattern, layout=case.layout, threads=case.threads)


def _cases(op: str) -> list[Sparse]:
    patterns = PATTERNS[op]
    cases_ = [(m, 33, 37) for m in ROWS] + [(7, n, 20) for n in COLUMNS]
    cases_ += [(13, 33, k) for k in FEATURES] + [(1, 65, k) for k in FEATURES]
    cases_ += [(m, n, k) for m in (1, 8, 12, 25) for n in (1, 16, 31, 65) for k in (1, 5, 64, 131)]
    cases_ += [(m, 129, 40) for m in (1, 2, 3, 4, 6, 8)]
    some = [
        # What is kept, and layouts, in turn, at steps that share no divisor with the other sizes.
        Sparse(op, patterns[i % len(patterns)], *s, KEPT[i % len(KEPT)], layout=cases.LAYOUTS[i // 3 % 4])
        for i, s in enumerate(cases_)
    ]
    some += [
        Sparse(op, pattern, m, 101, 70, kept)
        for pattern in patterns
        for kept in KEPT
        for m in (1, 3, 25)
    ]  # fmt: skip
    fillings = FILLINGS if op in CODES else ("normal", "onesided", "outlier", "onehot")
    some += [Sparse(op, patterns[0], m, 35, 70, "0.5", x) for m in (1, 14) for x in fillings]
    if op in CODES:
        some += [
            Sparse(op, pattern, m, 34, 67, kept, x, w)
            for pattern in patterns
            for m, kept, x in ((1, "1", "constant"), (13, "0.5", "two_valued"), (13, "1", "constant"))
            for w in ("full", "max", "min")
        ]
        # K to the end of what an int32 holds, every product at its largest; and indices beyond 16 bits.
        some += [
            Sparse(op, patterns[0], 2, 33, cases.K_MAX, kept, "constant", "max") for kept in ("1", "last")
        ]
    some += [Sparse(op, patterns[0], 2, 17, 65600, kept) for kept in ("0.02", "last")]
    some += [
        Sparse(op, patterns[t % len(patterns)], *s, kept, threads=t)
        for t in (2, 3, 8)
        for s, kept in (
            ((1, 1000, 1001), "0.1"),
            ((5, 257, 300), "panels"),
            ((130, 257, 300), "panels"),
            ((129, 101, 255), "0.1"),
            ((200, 64, 64), "0.5"),
        )
    ]
    # Rows that are longer than what a core's first cache holds of a tile.
    some += [
        Sparse(op, patterns[i % len(patterns)], m, 35, k, ("0.5", "0.1")[i % 2])
        for i, (m, k) in enumerate(((13, 2049), (49, 4100), (130, 2111), (5, 9001), (1, 11008)))
    ]
    some += [Sparse(op, patterns[0], 1100, 35, 300, "0.1", threads=2), Sparse(op, patterns[0], 0, 64, 64)]
    return list(dict.fromkeys(some))


CASES = {op: _cases(op) for op in PATTERNS}
# The epilogue does not depend on k: a whole tile, an edge in both directions, a single row, empty panels.
EPILOGUE = {
    op: [
        Sparse(op, patterns[0], 1, 33, 40),
        Sparse(op, patterns[0], 24, 64, 64),
        Sparse(op, patterns[-1], 14, 35, 21, "panels", layout="both"),
    ]
    for op, patterns in PATTERNS.items()
}


def kernels_of(some):
    """Each case on each kernel of its op. They follow each other, and share the reference's answer."""
    runs = [(kernel, case) for case in some for kernel in KERNELS[case.op]]
    return pytest.mark.parametrize(
        ("kernel", "case"), runs, ids=[f"{case.id}-{kernel['isa']}" for kernel, case in runs]
    )


def each_kernel(ops):
    runs = [(op, kernel) for op in ops for kernel in KERNELS[op]]
    return pytest.mark.parametrize(("op", "kernel"), runs, ids=[f"{op}-{k['isa']}" for op, k in runs])


def force(kernel: dict) -> None:
    _core.force_isa(kernel["isa"])
    assert _core.select(kernel["op"]) == kernel["name"]
