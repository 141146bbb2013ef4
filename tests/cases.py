"""The shape list: every case that every kernel of every op must get right, and how its numbers are made.

Tiles have MR = 4, 6, 12, 32 or 48 rows and NR = 32 columns, up to four of them side by side for few rows;
codes are consumed in quads along K, 64 make a 512-bit vector or a row of an AMX tile, AVX2 walks K in steps
of 512. Sizes sit on both sides of each of these and of their multiples.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from weights import FILLINGS as WEIGHT_FILLINGS
from weights import GROUPED, W8A8, Format

MR, NR, KR, KV = 12, 32, 4, 64
K_MAX = 65792  # floor((2^31 - 1) / (255 * 128)): beyond it an int32 accumulator of these codes can overflow

AROUND_MR = (1, 2, 3, 5, MR - 1, MR, MR + 1, 2 * MR - 1, 2 * MR, 2 * MR + 1, 3 * MR + 1)
AROUND_NR = (1, 2, 15, 16, 17, NR - 1, NR, NR + 1, 2 * NR - 1, 2 * NR, 2 * NR + 1, 3 * NR + 5)
AROUND_K = (
    1,
    2,
    3,
    KR,
    KR + 1,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    KV - 4,
    KV - 3,
    KV - 1,
    KV,
    KV + 1,
    KV + 3,
    KV + 4,
    KV + 5,
    2 * KV - 1,
    2 * KV,
    2 * KV + 1,
    3 * KV - 1,
    3 * KV + 1,
    255,
    257,
    1001,
)

# dense: aligned, rows touch. padded: leading dimensions larger than the row. unaligned: the first element is
# one element past a 64-byte boundary. both: padded and unaligned.
LAYOUTS = ("dense", "padded", "unaligned", "both")

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
STATIC = (
    (0.02, -128),
    (0.05, 3),
    (0.001, 127),
    (0.5, -1),
)  # (scale, zero): one-sided, general, saturating, coarse


# Fillings of x that every kernel meets.
FILLINGS = (
    "normal",
    "onesided",
    "negative",
    "zeros",
    "constant",
    "two_valued",
    "onehot",
    "outlier",
    "tiny",
    "denormal",
    "huge",
    "ties",
    "nonfinite",
    "mixed",
)


@dataclass(frozen=True)
class Linear:
    """y[m,n] = x[m,k] w[n,k]^T with named fillings of x and w, and a memory layout of every operand."""

    m: int
    n: int
    k: int
    x: str = "normal"
    w: str = "normal"
    layout: str = "dense"
    threads: int = 1
    form: Format = W8A8

    @property
    def id(self) -> str:
        tail = "".join(f"-{v}" for v in (self.x, self.w, self.layout) if v not in ("normal", "dense"))
        tail += f"-t{self.threads}" if self.threads > 1 else ""
        return f"{self.form}-{self.m}x{self.n}x{self.k}{tail}"

    def fill_x(self, rng: np.random.Generator) -> np.ndarray:
        """float32 [m, k] of the filling x, within what the sums of the format can hold.

        In a panel of 4-bit codes channels 16 to 31 count 16 times (csrc/core/gemm.h). Where activations have
        scales per group, which are factors of the sums, those overflow at 2^124 in place of 2^128.
        """
        x = fill_rows(self.x, self.m, self.k, rng)
        scheme = self.form.scheme
        if scheme.weight_bits == 4 and not scheme.per_token:
            with np.errstate(invalid="ignore"):
                x = np.where(np.abs(x) > 2.0**80, x * np.float32(2.0**-60), x)
        return x


@dataclass(frozen=True)
class Rows:
    """Rows x[m,k] to quantize, with a filling and a memory layout."""

    m: int
    k: int
    x: str = "normal"
    layout: str = "dense"
    threads: int = 1

    @property
    def id(self) -> str:
        tail = "".join(f"-{v}" for v in (self.x, self.layout) if v not in ("normal", "dense"))
        return f"{self.m}x{self.k}{tail}" + (f"-t{self.threads}" if self.threads > 1 else "")


def rng_for(case: object) -> np.random.Generator:
    """The same numbers for the same case on every machine and in every order."""
    return np.random.default_rng(zlib.crc32(repr(case).encode()))


def _mixed(m: int, k: int, rng: np.random.Generator) -> np.ndarray:
    kinds = (
        "normal",
        "zeros",
        "onesided",
        "nonfinite",
        "constant",
        "negative",
        "tiny",
        "huge",
        "ties",
        "two_valued",
    )
    rows = [fill_rows(kinds[i % len(kinds)], 1, k, rng) for i in range(m)]
    return np.concatenate(rows) if rows else np.zeros((0, k), np.float32)


def _ties(m: int, k: int, rng: np.random.Generator) -> np.ndarray:
    # Each row spans 255 steps of 2^-5 (or 254 of them around zero), so that scale and its inverse are nearly
    # exact and the values lie halfway between two codes.
    x = (rng.integers(-127, 127, (m, k)) + 0.5) * 2.0**-5
    if k:
        x[:, 0], x[:, -1] = -127 * 2.0**-5, 127 * 2.0**-5
    if k > 2:
        x[0::2, 1] = 128 * 2.0**-5
    return x


def _nonfinite(m: int, k: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal((m, k))
    values = (np.nan, np.inf, -np.inf, -np.nan)
    for i in range(m):
        if k and i % 3 != 2:  # every third row stays finite: its neighbors must not leak into it
            x[i, (0, k - 1, k // 2, i % k)[i % 4]] = values[(i // 3) % 4]
    return x


def fill_rows(kind: str, m: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [m, k] activations (or float weights) of the named kind."""
    normal = rng.standard_normal((m, k))
    sign = np.where(np.arange(m) % 2 == 0, 1.0, -1.0)[:, None]
    makers = {
        "normal": lambda: normal * 10.0 ** rng.uniform(-3, 3, (m, 1)),
        "onesided": lambda: np.abs(normal),
        "negative": lambda: -np.abs(normal),
        "zeros": lambda: normal * 0.0,
        "constant": lambda: np.broadcast_to(
            sign * 3.7, (m, k)
        ),  # one end of the range: |q - z| = 255 everywhere
        "two_valued": lambda: np.where(normal > 0, 1.0, -1.0) * 2.5,
        "onehot": lambda: np.eye(m, k) * 5.0 * sign,
        "outlier": lambda: normal + 1000.0 * (np.arange(k) == k // 3),
        "tiny": lambda: normal * 2.0 ** rng.uniform(-96, -88, (m, 1)),  # scale falls on both sides of 2^-100
        "denormal": lambda: normal * 1e-40,
        "huge": lambda: np.clip(normal * 2e38, -3.4e38, 3.4e38),
        "ties": lambda: _ties(m, k, rng),
        "nonfinite": lambda: _nonfinite(m, k, rng),
        "mixed": lambda: _mixed(m, k, rng),
    }
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(makers[kind](), dtype=np.float32)


def _linear_cases() -> list[Linear]:
    cases = [Linear(m, 33, 37) for m in range(0, 3 * MR + 2)]
    cases += [Linear(7, n, 20) for n in AROUND_NR] + [Linear(13, 32, k) for k in AROUND_K]
    cases += [Linear(m, 33, 37) for m in (47, 48, 49, 63, 64, 65, 95, 97)] + [
        Linear(1, 65, k) for k in AROUND_K
    ]
    cases += [Linear(m, 41, k) for m in (6, 13, 49) for k in (511, 512, 513, 1024, 1025, 1537)]
    cases += [
        Linear(m, n, 40) for m in (1, 2, 3, 4, 6, 8) for n in (63, 96, 97, 127, 128, 129, 161, 257, 289)
    ]
    # Corners: each size next to the others' edges, with the layouts taken in turn.
    corners = [
        (m, n, k)
        for m in (1, MR - 1, MR, MR + 1, 2 * MR + 1)
        for n in (1, NR - 1, NR, NR + 1, 2 * NR + 1)
        for k in (1, KR + 1, KV - 1, KV, KV + 1, 2 * KV + 3)
    ]
    cases += [Linear(*s, "mixed", "full", LAYOUTS[i % 4]) for i, s in enumerate(corners)]
    cases += [Linear(m, 35, 70, x, w) for m, w in ((3, "full"), (14, "normal")) for x in FILLINGS]
    codes = [w for w in WEIGHT_FILLINGS if w not in ("normal", "full")]
    cases += [Linear(m, 34, 67, x, w) for m in (2, 13) for x in ("constant", "two_valued") for w in codes]
    # K to the end of what an int32 holds, with every product at its largest and of one sign.
    cases += [
        Linear(m, 33, k, "constant", w)
        for m in (1, 13)
        for k in (65536, K_MAX)
        for w in ("max", "min", "rows")
    ]
    cases += [Linear(2, 3, 65535, "two_valued", "alternating"), Linear(3, 5, 4097, "normal", "full", "both")]
    # Large enough that a driver blocks and splits them, in one, two and more threads than rows or cores.
    cases += [
        Linear(m, n, k, "normal", "normal", "dense", t)
        for t in (1, 2, 3, 8)
        for m, n, k in ((1, 1000, 1001), (5, 1536, 384), (130, 257, 300), (97, 97, 1025), (300, 64, 64))
    ]
    # More rows than the driver quantizes at once.
    cases += [
        Linear(1100, 35, 4097, "normal", "full", "dense", 2),
        Linear(300, 3, 65536, "constant", "full", "dense", 2),
    ]
    cases += [
        Linear(0, 1, 1),
        Linear(0, 64, 64, layout="padded"),
        Linear(1, 1, 1),
        Linear(1, 1, 1, "nonfinite"),
    ]
    return list(dict.fromkeys(cases))


def _grouped_cases() -> list[Linear]:
    cases = []
    rows, columns = (1, 13, 2, 5, 33, 4, 6, 7, 3, 12, 25, 49), (33, 65, 1, 31, 97, 16, 32, 129, 17, 34)
    # Each format with each k around its groups; the rest in turn, at steps that share no divisor.
    for i, form in enumerate(GROUPED):
        group = form.scheme.fold_group or 64
        sizes = (1, 3, 31, group - 1, group, group + 1, 65, 2 * group, 3 * group + 7, 257)
        for j, k in enumerate(sizes):
            m, n = rows[(i + 5 * j) % len(rows)], columns[(i + 3 * j) % len(columns)]
            w = WEIGHT_FILLINGS[(i + 2 * j) % len(WEIGHT_FILLINGS)]
            cases.append(Linear(m, n, k, FILLINGS[(i + j) % len(FILLINGS)], w, LAYOUTS[j % 4], 1, form))
        cases += [Linear(m, 35, 2 * group + 6, "mixed", "full", form=form) for m in (7, 14)]
        cases += [Linear(5, 35, group + 34, x, "full", form=form) for x in FILLINGS if x != "mixed"]
        cases += [Linear(13, 34, 2 * group, x, w, form=form)
                  for x in ("constant", "two_valued") for w in ("max", "min", "rows")]  # fmt: skip
    # Rows and panels of every tile: activations of 8 bits per token and per group, and of 16 bits.
    some = [form for form in GROUPED if str(form) in
            ("w4a8_g32", "w4a8_g64+ag64", "w8a8_g64+asym", "w4a16_g64+asym:min", "w8a16")]  # fmt: skip
    cases += [Linear(m, 33, 101, form=form) for form in some for m in (*range(0, 27), 31, 32, 47, 48, 95)]
    cases += [
        Linear(m, n, 100, w="full", form=form)
        for form in some
        for m in (1, 2, 3, 4, 6, 8, 12)
        for n in (64, 97, 128, 161, 289)
    ]
    # Long rows: sums of one group to the end of what an int32 holds, and many groups.
    for form in GROUPED:
        if form.name in ("w4a8", "w4a8+asym", "w8a8+asym"):
            cases += [Linear(2, 33, K_MAX, "constant", w, form=form) for w in ("max", "min", "rows")]
        elif str(form) in ("w4a8_g128", "w8a8_g32", "w4a16_g32+asym", "w8a16", "w4a8+ag128"):
            cases.append(Linear(3, 33, 65536 + 131, "two_valued", "rows", form=form))
    cases += [
        Linear(m, n, k, "normal", "normal", "dense", t, form)
        for t in (2, 3, 8)
        for form in some
        for m, n, k in ((1, 1000, 1001), (5, 1536, 384), (130, 257, 300), (300, 64, 64))
    ]
    cases += [Linear(700, 35, 2050, "normal", "full", "dense", 2, form) for form in (some[0], some[-2])]
    return list(dict.fromkeys(cases))


def _rows_cases() -> list[Rows]:
    cases = [Rows(5, k, "mixed", LAYOUTS[i % 4]) for i, k in enumerate(AROUND_K)]
    cases += [Rows(7, k, x) for x in FILLINGS for k in (3, 70, 256)]
    cases += [Rows(m, 50, "normal", "both") for m in (0, 1, 2, 31, 33)]
    cases += [Rows(2, k, x) for k in (65536, K_MAX) for x in ("constant", "normal")]
    cases += [Rows(5, k, "mixed", LAYOUTS[i % 4]) for i, k in enumerate((95, 96, 97, 161, 383, 385))]
    cases += [Rows(m, k, "mixed", "padded", t) for t in (2, 8) for m, k in ((3, 10), (64, 257), (300, 64))]
    return list(dict.fromkeys(cases))


LINEAR = [*_linear_cases(), *_grouped_cases()]
ROWS = _rows_cases()
# The epilogue does not depend on K: a whole tile, an edge in both directions, and a single row are enough.
EPILOGUE = [
    Linear(1, 33, 40, "normal", "full"),
    Linear(MR, NR, KV, "mixed", "full"),
    Linear(MR + 2, NR + 3, 21, "mixed", "full", "both"),
]
# It has two forms, for sums without and with groups, and the latter with a scale per row or none.
GROUPED_EPILOGUE = [
    Linear(MR + 2, NR + 3, 69, "mixed", "full", "both", form=Format(name))
    for name in ("w4a8_g32", "w8a8_g64+ag64", "w8a16", "w4a16_g64+asym")
]
