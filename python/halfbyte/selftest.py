"""A quick check of every kernel that this machine can run: bit for bit against the op's scalar kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np

import halfbyte as hb

from . import _core
from .arrays import F32, NUMPY

_SEED = 7
# Around the tile sizes in use (4 to 32 rows, 8 to 32 columns): one row, tails of rows, columns and K, many
# tiles.
_SHAPES = ((1, 64, 64), (5, 33, 67), (13, 40, 130), (70, 96, 256))
_ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
# Per op: schemes and how their weights are quantized, so that each part of a weight and of the activations'
# scales occurs.
_SCHEMES = {
    "linear_w8a8": (
        ("w8a8", "absmax"),
        ("w8a8+asym", "absmax"),
        ("w8a8_g32", "absmax"),
        ("w8a8_g64+asym", "hqq"),
        ("w8a8+ag128", "absmax"),
    ),
    "linear_w4a8": (
        ("w4a8", "absmax"),
        ("w4a8_g128+asym", "absmax"),
        ("w4a8_g64+asym", "hqq"),
        ("w4a8_g32+ag32", "absmax"),
    ),
    "linear_w8a16": (
        ("w8a16", "absmax"),
        ("w8a16_g32+asym", "absmax"),
        ("w8a16_g64+asym", "hqq"),
    ),
    "linear_w4a16": (
        ("w4a16", "absmax"),
        ("w4a16_g128", "absmax"),
        ("w4a16_g32+asym", "absmax"),
        ("w4a16_g64+asym", "hqq"),
        ("w4a16_g64+nf4", "absmax"),
    ),
}
_SPARSE_OPS = (
    "spmm_block_w8a8",
    "spmm_block_w4a8",
    "spmm_nm_w8a8",
    "spmm_unstructured_w8a8",
    "spmm_block_f32",
    "spmm_block_bf16",
    "spmm_unstructured_f32",
)


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


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _rows(rng: np.random.Generator, m: int, k: int) -> np.ndarray:
    """Activations with the awkward rows: all zero, one-sided, huge, tiny, not a number."""
    x = _normal(rng, m, k)
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


def _linear(op: str, rng: np.random.Generator) -> list[np.ndarray]:
    results = []
    for (m, n, k), (scheme, method) in itertools.product(_SHAPES, _SCHEMES[op]):
        packed = hb.pack(hb.quantize(_normal(rng, n, k), scheme, method=method))
        x, bias, residual = _rows(rng, m, k), _normal(rng, n), _normal(rng, m, n)
        results += [hb.linear(x, packed, bias, activation=a, residual=residual) for a in _ACTIVATIONS]
        if packed.scheme.per_token:
            results.append(hb.linear(x, packed, bias, static=(0.03, 5)))
        if scheme == "w8a8":
            results.append(hb.linear(x, packed, out_dtype=np.int32))
    return results


def _linear_f32(rng: np.random.Generator) -> list[np.ndarray]:
    """Through the core, which fused blocks alone use it from."""
    results = []
    for m, n, k in _SHAPES:
        x, weight, bias, residual = _rows(rng, m, k), _normal(rng, n, k), _normal(rng, n), _normal(rng, m, n)
        packed = _core.pack_float(NUMPY.pointer(weight), F32, n, k, k)
        for activation in range(len(_ACTIVATIONS)):
            out = np.empty((m, n), np.float32)
            pointers = [NUMPY.pointer(a) for a in (x, out, bias, residual)]
            _core.linear(
                packed, m, pointers[0], k, F32, pointers[1], n, F32, pointers[2], activation, pointers[3], n,
                F32, 0.0, 0, NUMPY.threads(),
            )  # fmt: skip
            results.append(out)
    return results


def _sparse(op: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Through the core: weights with zeros where the op wants them, one panel empty."""
    results = []
    for m, n, k in _SHAPES:
        x, bias, scale = _rows(rng, m, k), _normal(rng, n), np.abs(_normal(rng, n)) + 0.1
        exact = op == "spmm_unstructured_f32"  # whose kernels add in different orders: exact sums
        if exact:
            x = np.rint(4 * _normal(rng, m, k))
        wide = 1 if op in ("spmm_block_f32", "spmm_block_bf16") else 4
        blocks = rng.random((-(-n // 16), -(-k // wide))) < 0.3
        kept = np.kron(blocks, np.ones((16, wide), bool))[:n, :k]
        if "_block_" not in op:
            kept = rng.random((n, k)) < 0.3
        pattern = (0, 0)
        if op == "spmm_nm_w8a8":
            pattern, kept = (2, 4), kept & (np.arange(k) % 4 < 2)
        kept[:16] = False
        nibbles, codes = op.endswith("w4a8"), op.endswith("a8")
        most = 7 if nibbles else 127
        integers = codes or exact
        weight = rng.integers(-most, most + 1, (n, k)) * kept if integers else _normal(rng, n, k) * kept
        group_scale = np.abs(_normal(rng, n, -(-k // 64))) + 0.1
        groups = (64, NUMPY.pointer(group_scale), F32) if nibbles else ()
        weight = np.ascontiguousarray(weight, np.int8 if codes else np.float32)
        packed = _core.pack_sparse(
            op, NUMPY.pointer(weight), F32, n, k, k, NUMPY.pointer(scale), *pattern, *groups
        )
        for activation in range(len(_ACTIVATIONS)):
            out = np.empty((m, n), np.float32)
            _core.linear(
                packed, m, NUMPY.pointer(x), k, F32, NUMPY.pointer(out), n, F32, NUMPY.pointer(bias),
                activation, 0, 0, F32, 0.0, 0, NUMPY.threads(),
            )  # fmt: skip
            results.append(out)
    return results


def _embedding(rng: np.random.Generator) -> list[np.ndarray]:
    """Through the core, because QEmbedding needs torch; the weights of every scheme above, each once."""
    results = []
    schemes = {(s.replace("a8", "a16"), m) for op in _SCHEMES for s, m in _SCHEMES[op] if "+ag" not in s}
    for (m, n, k), (scheme, method) in itertools.product(_SHAPES, sorted(schemes)):
        q = hb.quantize(_normal(rng, n, k), scheme, method=method)
        ids, out = rng.integers(0, n, m), np.empty((m, k), np.float32)
        groups = [0 if part is None else NUMPY.pointer(part) for part in (q.group_scale, q.zero, q.minimum)]
        _core.embedding(
            NUMPY.pointer(q.codes),
            n,
            k,
            q.codes.shape[1],
            q.scheme.weight_bits,
            q.scheme.nf4,
            NUMPY.pointer(q.scale),
            q.scheme.group,
            groups[0],
            F32 if q.group_scale is None else NUMPY.codes[q.group_scale.dtype],
            *groups[1:],
            NUMPY.pointer(ids),
            m,
            NUMPY.pointer(out),
            k,
            F32,
            NUMPY.threads(),
        )
        results.append(out)
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


def _norm(rng: np.random.Generator) -> list[np.ndarray]:
    results = []
    for m, _, k in _SHAPES:
        x, residual, weight, bias = _rows(rng, m, k), _normal(rng, m, k), _normal(rng, k), _normal(rng, k)
        with np.errstate(over="ignore"):
            half = x.astype(np.float16)
        results += hb.layernorm(x, weight, bias, residual=residual, return_sum=True)
        results += hb.rmsnorm(half, weight, residual=residual, return_sum=True)
        results += hb.layernorm_quantize(x, weight, bias)
        results += hb.rmsnorm_quantize(half, weight, residual=x, symmetric=True)
    return results


def _rope(rng: np.random.Generator) -> list[np.ndarray]:
    results = []
    for tokens, heads, head_size in ((1, 9, 64), (5, 3, 38), (13, 2, 128)):
        x, positions = _normal(rng, 2, tokens, heads, head_size), rng.integers(0, 4096, tokens)
        for options in ({}, {"interleaved": True}, {"rotary_dims": head_size // 4 * 2}):
            results.append(hb.rope(x, positions, **options))
            results.append(hb.rope(x.astype(np.float16), positions, **options))
    return results


def _attention(rng: np.random.Generator) -> list[np.ndarray]:
    """Few query rows and many, grouped heads, masks, windows, every storage of keys and values."""
    results = []
    for queries, keys, heads, head_size in ((1, 70, 3, 64), (5, 33, 1, 40), (9, 81, 2, 24)):
        q = _normal(rng, 1, heads, queries, head_size)
        k, v = _normal(rng, 2, 1, 1, keys, head_size)
        seen, added = rng.random((queries, keys)) < 0.7, _normal(rng, 1, heads, 1, keys)
        (k8, k_scale), (v8, v_scale) = hb.quantize_kv(k), hb.quantize_kv(v)
        results += [
            hb.attention(q, k, v),
            hb.attention(q, k, v, causal=True, window=20),
            hb.attention(q, k, v, mask=seen),
            hb.attention(q.astype(np.float16), k.astype(np.float16), v.astype(np.float16), mask=added),
            hb.attention(q, k8, v8, k_scale=k_scale, v_scale=v_scale, causal=True),
        ]
    return results


_CHECKS: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = {
    **{op: partial(_linear, op) for op in _SCHEMES},
    "linear_f32": _linear_f32,
    **{op: partial(_sparse, op) for op in _SPARSE_OPS},
    "attention": _attention,
    "embedding": _embedding,
    "norm": _norm,
    "quantize_rows": _quantize_rows,
    "rope": _rope,
}
