"""A quick check of every kernel that this machine can run: bit for bit against the op's scalar kernel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import halfbyte as hb

_SEED = 7
# Around the tile sizes in use (4 to 32 rows, 8 to 32 columns): one row, tails of rows, columns and K, many
# tiles.
_SHAPES = ((1, 64, 64), (5, 33, 67), (13, 40, 130), (70, 96, 256))
_ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def run() -> list[dict]:
    """One row per kernel: op, kernel, isa, status ("ok", "failed" or "not run") and detail."""
    rows = []
    expected = {}
    for kernel in hb.kernels():
        op, isa = kernel["op"], kernel["isa"]
        row = {"op": op, "kernel": kernel["name"], "isa": isa, "status": "not run", "detail": ""}
        rows.append(row)
        if op not in _CHECKS:
            row["detail"] = "this op has no self-test"
        elif not kernel["supported"]:
            row["detail"] = f"this CPU lacks {isa}"
        else:
            if op not in expected:
                expected[op] = _run_forced(op, "scalar")
            row["status"], row["detail"] = _compare(expected[op], _run_forced(op, isa))
    return rows


def _run_forced(op: str, isa: str) -> list[np.ndarray] | Exception:
    try:
        with hb.force_isa(isa):
            return _CHECKS[op](np.random.default_rng(_SEED))
    except Exception as error:  # a kernel that raises is a failed kernel, not a failed doctor
        return error


def _compare(expected: list[np.ndarray] | Exception, got: list[np.ndarray] | Exception) -> tuple[str, str]:
    for result in (expected, got):
        if isinstance(result, Exception):
            return "failed", f"{type(result).__name__}: {result}"
    bad = sum(
        not np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(expected, got, strict=True)
    )
    return (
        ("failed", f"{bad} of {len(got)} results differ from scalar")
        if bad
        else ("ok", f"{len(got)} results equal")
    )


def _rows(rng: np.random.Generator, m: int, k: int) -> np.ndarray:
    """Activations with the awkward rows: all zero, one-sided, huge, tiny, not a number."""
    x = rng.standard_normal((m, k)).astype(np.float32)
    special = (
        np.zeros(k),
        np.abs(x[0]),
        x[0] * 1e30,
        x[0] * 1e-30,
        np.where(np.arange(k) == k // 2, np.nan, x[0]),
    )
    for i, row in enumerate(special[: m - 1], start=1):
        x[i] = row
    return x


def _linear_w8a8(rng: np.random.Generator) -> list[np.ndarray]:
    results = []
    for m, n, k in _SHAPES:
        packed = hb.pack(hb.quantize(rng.standard_normal((n, k)).astype(np.float32), "w8a8"))
        x, bias, residual = (
            _rows(rng, m, k),
            *(rng.standard_normal(s).astype(np.float32) for s in ((n,), (m, n))),
        )
        results.append(hb.linear(x, packed, out_dtype=np.int32))
        results += [hb.linear(x, packed, bias, activation=a, residual=residual) for a in _ACTIVATIONS]
        results.append(hb.linear(x, packed, bias, static=(0.03, 5)))
    return results


def _quantize_rows(rng: np.random.Generator) -> list[np.ndarray]:
    results = []
    for m, _, k in _SHAPES:
        x = _rows(rng, m, k)
        for options in ({}, {"symmetric": True}, {"scale": 0.03, "zero": 5}):
            quantized = hb.quantize_rows(x, **options)
            parts = (quantized.codes, quantized.scale, quantized.zero, quantized.sums)
            results += [np.asarray(part) for part in parts if part is not None]
    return results


_CHECKS: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = {
    "linear_w8a8": _linear_w8a8,
    "quantize_rows": _quantize_rows,
}
