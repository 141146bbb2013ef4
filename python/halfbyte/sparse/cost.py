"""Predicted times of the sparse kernels, as shares of the time of the dense layer that they replace."""

from __future__ import annotations

from .scheme import SparseScheme

# What a stored value costs a kernel, in units of what a weight costs the dense layer: w8a8 of ours, and for
# floats torch's float32; for many rows, where the multiplier is the limit. Measured with 128 and 512 rows on
# a Zen 5 at 50 to 80 % zeros (benchmarks/results/sparse_*.json), where torch's float32 runs at 38 % of the
# peak.
_COSTS = {
    "spmm_block_w8a8": 1.15,
    "spmm_block_w4a8": 1.5,  # of dense w4a8
    "spmm_nm_w8a8": 1.7,
    "spmm_unstructured_w8a8": 2.5,
    "spmm_block_f32": 0.6,
    "spmm_block_bf16": 0.6,
    "spmm_unstructured_f32": 0.7,
}


def predicted_time(scheme: SparseScheme, density: float) -> float:
    """Of a layer of which the share `density` is stored, with the dense one as 1."""
    return _COSTS[scheme.op] * density


def predicted_break_even(scheme: str | SparseScheme) -> float:
    """The sparsity, the share of weights that are not stored, above which a layer is likely to be faster than
    the dense one that it replaces. That of N:M is 1 - N/M.
    """
    return max(0.0, 1 - 1 / _COSTS[SparseScheme.parse(scheme).op])
