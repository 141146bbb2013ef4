"""Predicted times of the sparse kernels, as shares of the time of the dense layer that they replace."""

from __future__ import annotations

from .scheme import SparseScheme

# What a stored value costs a kernel, in units of what a weight costs the dense layer: w8a8 of ours, and for
# floats torch's float32; for many rows, where the multiplier is the limit.
_COSTS = {
    "spmm_block_w8a8": 1.07,
    "spmm_nm_w8a8": 1.33,
    "spmm_unstructured_w8a8": 1.67,
    "spmm_block_f32": 1.07,
    "spmm_block_bf16": 1.07,
    "spmm_unstructured_f32": 2.0,
}


def predicted_time(scheme: SparseScheme, density: float) -> float:
    """Of a layer of which the share `density` is stored, with the dense one as 1."""
    return _COSTS[scheme.op] * density


def predicted_break_even(scheme: str | SparseScheme) -> float:
    """The sparsity, the share of weights that are not stored, above which a layer is likely to be faster than
    the dense one that it replaces. That of N:M is 1 - N/M.
    """
    return 1 - 1 / _COSTS[SparseScheme.parse(scheme).op]
