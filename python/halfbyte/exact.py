"""float32 arithmetic as the kernels do it, in plain torch: fma, sqrt, and csrc/simd/sum16.h."""

from __future__ import annotations

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 tensors, rounded once.

    The product is exact in float64, which has 53 bits for twice 24. The sum may not be. Where it is not,
    which Knuth's TwoSum tells, it becomes the neighbor whose last bit is 1 ("round to odd"), so that rounding
    it to float32 does not take it for a tie (Boldo, Melquiond 2008, doi:10.1109/TC.2007.70819).
    """
    product, c = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + c
    other = total - product
    error = (product - (total - other)) + (c - other)
    bits = total.view(torch.int64)
    inexact = (error != 0) & total.isfinite()
    toward = torch.where((error > 0) == (total > 0), 1, -1)  # away from zero, or back to it
    odd = torch.where(inexact & (bits & 1 == 0), bits + toward, bits)
    return odd.view(torch.float64).float()


def sqrt(x: Tensor) -> Tensor:
    """Rounded once, which torch.sqrt of float32 is not where MKL computes it. A root of 24 bits is never as
    close to halfway between two float32 as the error of a float64 root.
    """
    return x.double().sqrt().float()


def sum16(x: Tensor) -> Tensor:
    """The float32 sum of x [..., n] over its last dimension: element i joins partial sum i mod 16."""
    partial = x.new_zeros(*x.shape[:-1], 16)
    for block in _blocks(x):
        partial = partial + block
    return _tree(partial)


def sum16_of_squares(x: Tensor) -> Tensor:
    """That of x * x, each product joined by fma."""
    partial = x.new_zeros(*x.shape[:-1], 16)
    for block in _blocks(x):
        partial = fma(block, block, partial)
    return _tree(partial)


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    """16 elements each, with zeros in the place of missing ones: they add nothing."""
    n = x.shape[-1]
    return torch.nn.functional.pad(x, (0, -n % 16)).split(16, -1) if n else ()


def _tree(partial: Tensor) -> Tensor:
    for half in (8, 4, 2, 1):
        partial = partial[..., :half] + partial[..., half : 2 * half]
    return partial[..., 0]
