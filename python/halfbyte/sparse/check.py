"""The numbers of a SparseTensor: indices in order and in range, values and scales finite."""

from __future__ import annotations

import numpy as np

from ..errors import NonFiniteError, PatternError
from .layout import unpack_positions
from .scheme import SparseScheme


def check_values(parts: dict[str, np.ndarray], scheme: SparseScheme, shape: tuple[int, int]) -> None:
    """PatternError, NonFiniteError or ValueError naming the array, where its shape is right already."""
    (n, k), p = shape, scheme.pattern
    values = parts["values"]
    if values.dtype.kind == "f":
        _check_finite("values", values)
    if p.kind == "nm":
        groups = -(-k // p.m)
        positions = unpack_positions(parts["positions"], groups * p.n).reshape(n, groups, p.n)
        _check_positions(positions, p.m)
        in_last = values.reshape(n, groups, p.n)[:, -1]
        outside = (in_last != 0) & (positions[:, -1] >= k - (groups - 1) * p.m)
        if outside.any():
            row = int(outside.any(1).argmax())
            raise PatternError(
                f"values of row {row}: the last group has one that is not 0 behind its last feature, {k - 1}"
            )
    else:
        block_columns = -(-k // p.columns)
        check_compressed(parts["crow"], parts["columns"], block_columns)
        if p.kind == "block":
            _check_outside(values, parts["crow"], parts["columns"], n, k)
    for what in ("scale", "group_scale"):
        if (scale := parts.get(what)) is not None:
            _check_finite(what, scale)
            if (scale <= 0).any():
                at = [int(i) for i in np.unravel_index((scale <= 0).argmax(), scale.shape)]
                raise ValueError(f"{what}{at} is not positive, as scales must be")


def check_compressed(crow: np.ndarray, columns: np.ndarray, column_count: int) -> None:
    """PatternError unless they are the indices of CSR or BSR, sorted and unique."""
    crow = crow.astype(np.int64)  # so that no difference wraps around
    if crow[0] != 0 or crow[-1] != len(columns):
        raise PatternError(
            f"crow goes from {crow[0]} to {crow[-1]}; it must go from 0 to {len(columns)}, as many as there "
            "are columns"
        )
    counts = np.diff(crow)
    if (counts < 0).any():
        row = int((counts < 0).argmax())
        raise PatternError(f"crow[{row + 1}] is {crow[row + 1]}, below crow[{row}], which is {crow[row]}")
    outside = (columns < 0) | (columns >= column_count)
    if outside.any():
        i = int(outside.argmax())
        raise PatternError(f"columns[{i}] is {columns[i]}; it must be from 0 to {column_count - 1}")
    steps = np.diff(columns)
    starts = crow[1:-1]  # the step to the first column of a row may be any
    inside = np.ones(len(steps), bool)
    inside[starts[(starts > 0) & (starts < len(columns))] - 1] = False
    for bad, what in (((steps == 0) & inside, "is there twice"), ((steps < 0) & inside, "is unsorted")):
        if bad.any():
            i = int(bad.argmax()) + 1
            row = int(np.searchsorted(crow, i, "right")) - 1
            raise PatternError(
                f"columns[{i}], which is {columns[i]}, {what} in its row {row}; the columns of a row must "
                "ascend"
            )


def _check_positions(positions: np.ndarray, m: int) -> None:
    if (bad := (positions >= m).any((1, 2))).any():
        row = int(bad.argmax())
        raise PatternError(f"positions of row {row}: one is {positions[row].max()}; they must be below {m}")
    if (bad := (positions[:, :, 1:] <= positions[:, :, :-1]).any((1, 2))).any():
        raise PatternError(f"positions of row {int(bad.argmax())} do not ascend within each group")


def _check_outside(values: np.ndarray, crow: np.ndarray, columns: np.ndarray, n: int, k: int) -> None:
    """PatternError for the last blocks of a weight with something behind its last row or column."""
    rows, width = values.shape[1:]
    last_rows = values[crow[-2] :, n % rows :] if n % rows else values[:0]
    last_columns = values[columns == k // width, :, k % width :] if k % width else values[:0]
    for part, what in ((last_rows, f"row, {n - 1}"), (last_columns, f"column, {k - 1}")):
        if part.any():
            raise PatternError(f"values: a block has one that is not 0 behind the last {what}, of the weight")


def _check_finite(what: str, part: np.ndarray) -> None:
    finite = np.isfinite(part)
    if not finite.all():
        at = [int(i) for i in np.unravel_index(finite.argmin(), part.shape)]
        raise NonFiniteError(f"{what}{at} is a NaN or an infinity")
