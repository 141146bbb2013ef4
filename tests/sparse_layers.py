"""Pruned weights and models for the tests of sparse tensors and layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

import halfbyte as hb
from halfbyte.sparse.pattern import Pattern
from halfbyte.sparse.scheme import NAMES, SparseScheme

INT8 = [name for name in NAMES if name.startswith("w8a8")]
FLOAT = [name for name in NAMES if not name.startswith("w8a8")]
# Rows and columns that no block and no group divides, that all do, and less than one block.
SHAPES = [(33, 70), (32, 64), (5, 7), (1, 1), (16, 3), (50, 16)]


def mask(shape, pattern, amount=0.6, seed=0):
    """A random mask of the pattern, bool [n, k]."""
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    pattern = Pattern.parse(pattern)
    return pattern.select(scores, None if pattern.kind == "nm" else amount)


def pruned(shape, scheme, amount=0.6, seed=0):
    """A random weight [n, k] with the pattern of a scheme."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    return weight.masked_fill(~mask(shape, SparseScheme.parse(scheme).pattern, amount, seed), 0)


def sparse(shape, scheme, **options):
    return hb.sparsify(pruned(shape, scheme, **options), scheme)


def prune_linear(linear: nn.Linear, pattern, amount=0.6):
    """Mask the weight as torch.nn.utils.prune does."""
    keep = mask((linear.out_features, linear.in_features), pattern, amount)
    with torch.no_grad():  # a weight without history can be deep-copied
        prune.custom_from_mask(linear, "weight", keep)
    return linear


def dense(tensor: hb.SparseTensor) -> hb.QuantizedTensor:
    """The same int8 weight with its zeros."""
    return hb.QuantizedTensor(tensor.codes(), tensor.scale, hb.Scheme.parse("w8a8"))


def sparse_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, hb.SparseLinear)}
