"""Sparse weights on a GPU: int8 two of four, in blocks of 64 x 64 or dense; int4 dense; floats by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arrays import place_of
from ..pack import GpuWeight
from ..sparse.scheme import SparseScheme
from ..sparse.tensor import SparseTensor
from .library import Format
from .pack import (
    W8A8,
    CudaPackedWeight,
    TorchWeight,
    check_not_captured,
    finish,
    format_for,
    no_kernel,
)
from .zeros import BLOCK, blocks, from_blocks, from_pairs, has_pairs, pairs

TWO_OF_FOUR, BLOCKS = 1, 2  # halfbyte_cuda_pattern
MOST_BLOCKS = 0.6  # of a weight, for the others to be left out: what two of four takes. An estimate
# Up to here the kernel of blocks, whose time falls with them, is taken for many rows too: dense int8 products
# of many rows run about twice as fast as its own. An estimate
FEW_BLOCKS = 0.4
_NO_ROWS = (
    "many rows are multiplied by a dense copy of the sparse codes, which would be made here: call the model "
    "once with as many rows as will be captured"
)
FLOATS = "no kernel for sparse floats"


class CudaSparseWeight(CudaPackedWeight):
    """int8 codes without the zeros of a pattern; made by `pack`."""

    __slots__ = ("starts", "columns", "few_blocks", "_dense")

    def __init__(self, codes: Tensor, scale: Tensor, scheme: SparseScheme, pattern: int):
        """codes: int8 [n, k]."""
        GpuWeight.__init__(self, tuple(codes.shape), scheme, codes.device)
        self.format, self.activation_bits = pattern_format(pattern), 8
        self.scale = scale.detach().clone(memory_format=torch.contiguous_format)
        self.total = codes.sum(1, dtype=torch.int32)
        self.starts = self.columns = self._dense = None
        self.few_blocks = False
        if pattern == BLOCKS:
            self.weight, self.starts, self.columns = blocks(codes)
            n, k = codes.shape
            self.few_blocks = len(self.columns) <= FEW_BLOCKS * -(-n // BLOCK) * -(-k // BLOCK)
        else:
            self.weight = pairs(codes)

    @property
    def nbytes(self) -> int:
        parts = (self.weight, self.scale, self.total, self.starts, self.columns, self._dense)
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self) -> Tensor:
        """int8 codes with their zeros for torch._int_mm, n and k padded as it wants them; once made, kept."""
        if self._dense is None:
            check_not_captured(self.weight, _NO_ROWS)
            n, k = self.shape
            shape = n + -n % 8, k + -k % 16
            if self.starts is None:
                self._dense = from_pairs(self.weight, shape)
            else:
                self._dense = from_blocks(self.weight, self.starts, self.columns, shape)
            finish(self.device)
        return self._dense

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        n, k = self.shape
        return (self.rows()[:n, :k].float() * self.scale[:, None]).to(dtype)


def pack(weight: SparseTensor) -> GpuWeight:
    """In the layout that leaves out the most zeros, or none where that is not worth it."""
    kind = place_of(weight.values, "values")
    for what, part in weight.parts().items():
        kind.check_memory(part, what)
    check_not_captured(weight.values)
    with torch.no_grad():
        packed = _pack(weight)
    finish(packed.device)
    return packed


def _pack(weight: SparseTensor) -> GpuWeight:
    scheme, shape, device = weight.scheme, weight.shape, weight.values.device
    if not scheme.quantized:
        return TorchWeight(weight.to_dense().to(weight.values.dtype), scheme, FLOATS)
    q = weight.to_quantized()
    form, why = format_for(q.scheme, shape, device, q.group_scale)
    if why:
        packed = TorchWeight(q, scheme, why)
        packed.shares_codes = False  # these are its own
        return packed

    def runs(pattern: int) -> bool:
        return q.scheme == W8A8 and not no_kernel(pattern_format(pattern), 8, shape, device)

    if runs(BLOCKS) and share_of_blocks(q.codes) <= MOST_BLOCKS:
        return CudaSparseWeight(q.codes, q.scale, scheme, BLOCKS)
    if runs(TWO_OF_FOUR) and has_pairs(q.codes):
        return CudaSparseWeight(q.codes, q.scale, scheme, TWO_OF_FOUR)
    packed = CudaPackedWeight(q, form)
    packed.scheme = scheme
    return packed


def pattern_format(pattern: int) -> Format:
    """How the kernels read codes without the zeros of a pattern."""
    return Format(8, 0, 4, 0, pattern)


def share_of_blocks(codes: Tensor) -> float:
    """The share of the blocks of 64 x 64 that have something in them."""
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes != 0, (0, -k % BLOCK, 0, -n % BLOCK))
    return padded.view(-(-n // BLOCK), BLOCK, -1, BLOCK).any(3).any(1).float().mean().item()
