"""Dense matrices to the arrays of a SparseTensor and back, in numpy."""

from __future__ import annotations

import numpy as np

from ..errors import PatternError
from ..quantized_tensor import to_nibbles
from .pattern import Pattern

INDEX = np.int32  # of the indices that we make: half the size of int64, and enough for 2^31 values


def compress(dense: np.ndarray, pattern: Pattern) -> dict[str, np.ndarray]:
    """values with crow and columns, or with positions, of a matrix [n, k] that has the pattern.

    Raises PatternError where it does not, naming the place.
    """
    if pattern.kind == "nm":
        return _compress_groups(dense, pattern)
    rows, columns = pattern.rows, pattern.columns
    blocks = _blocks(dense, rows, columns)
    kept = (blocks != 0).any((2, 3))
    crow = np.zeros(len(kept) + 1, INDEX)
    np.cumsum(kept.sum(1), out=crow[1:])
    values = blocks[kept]
    return {
        "values": values.reshape(-1) if pattern.kind == "unstructured" else values,
        "crow": crow,
        "columns": np.nonzero(kept)[1].astype(INDEX),
    }


def expand(parts: dict[str, np.ndarray], pattern: Pattern, shape: tuple[int, int]) -> np.ndarray:
    """The matrix [n, k] of what `compress` gives, of the dtype of its values."""
    n, k = shape
    values = parts["values"]
    if pattern.kind == "nm":
        groups = -(-k // pattern.m)
        out = np.zeros((n, groups, pattern.m), values.dtype)
        positions = unpack_positions(parts["positions"], groups * pattern.n)
        in_groups = n, groups, pattern.n
        np.put_along_axis(out, positions.reshape(in_groups).astype(np.intp), values.reshape(in_groups), 2)
        return out.reshape(n, -1)[:, :k]
    rows, columns = pattern.rows, pattern.columns
    counts = np.diff(parts["crow"])
    out = np.zeros((len(counts), -(-k // columns), rows, columns), values.dtype)
    at = np.repeat(np.arange(len(counts)), counts)
    out[at, parts["columns"]] = values.reshape(-1, rows, columns)
    return out.swapaxes(1, 2).reshape(len(counts) * rows, -1)[:n, :k]


def unpack_positions(positions: np.ndarray, count: int) -> np.ndarray:
    """uint8 [n, count] of two 4-bit positions per byte."""
    return np.stack([positions & 15, positions >> 4], 2).reshape(len(positions), -1)[:, :count]


def _blocks(dense: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[n, k] -> [block rows, block columns, rows, columns]; the last ones are filled up with zeros."""
    n, k = dense.shape
    padded = np.pad(dense, ((0, -n % rows), (0, -k % columns)))
    return padded.reshape(-1, rows, padded.shape[1] // columns, columns).swapaxes(1, 2)


def _compress_groups(dense: np.ndarray, pattern: Pattern) -> dict[str, np.ndarray]:
    n, m = pattern.n, pattern.m
    groups = _blocks(dense, 1, m)[:, :, 0]
    kept = groups != 0
    if (bad := kept.sum(2) > n).any():
        row, group = np.unravel_index(bad.argmax(), bad.shape)
        raise PatternError(
            f"is not {pattern}: its row {row} has {int(kept[row, group].sum())} nonzero values at the "
            f"features {group * m} to {min(group * m + m, dense.shape[1]) - 1}"
        )
    # The positions of nonzero values in order, then those of zeros: the first n of them, in order again.
    chosen = np.sort(np.arange(m, dtype=np.uint8) + np.where(kept, np.uint8(0), np.uint8(m)), 2)[:, :, :n] % m
    chosen.sort(2)
    values = np.take_along_axis(groups, chosen.astype(np.intp), 2)
    return {
        "values": values.reshape(len(dense), -1),
        "positions": to_nibbles(chosen.reshape(len(dense), -1)),
    }
