"""Pruned weights and models for the tests of sparse tensors and layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

import halfbyte as hb
from halfbyte.sparse.pattern import Pattern
from halfbyte.sparse.scheme import NAMES, SparseScheme
from models import Model

CODES = [name for name in NAMES if SparseScheme.parse(name).quantized]
FLOAT = [name for name in NAMES if name not in CODES]
LINEARS = [*(f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")), "head"]  # of Model
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


def sparse_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, hb.SparseLinear)}


def masked_model(pattern="unstructured", amount=0.8, model=None, but=()):
    """A model whose linear layers have masks."""
    model = (Model() if model is None else model).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in but:
            prune_linear(module, pattern, amount)
    return model


def schemes(model):
    return {name: str(layer.scheme) for name, layer in sparse_layers(model).items()}
