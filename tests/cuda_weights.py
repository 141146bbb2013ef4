"""Weights for the tests of the emulated GPU, whose fixture `gpu` is in conftest.py."""

from __future__ import annotations

import torch

import halfbyte as hb

# Every kind that the kernels read: the scheme, how it is quantized, the dtype of the scales of groups.
WEIGHTS = [
    ("w4a16", None, torch.float16),
    ("w4a16_g32", None, torch.float16),
    ("w4a16_g64", None, torch.float32),
    ("w4a16_g128+asym", "absmax", torch.float16),
    ("w4a16_g32+asym", "hqq", torch.float32),
    ("w4a16+asym", "absmax", torch.float16),
    ("w8a16", None, torch.float16),
    ("w8a16_g128", None, torch.float16),
    ("w8a16_g64+asym", "absmax", torch.float16),
    ("w8a8", None, torch.float16),
    ("w8a8+asym", None, torch.float16),
    ("w8a8_g32", None, torch.float32),
    ("w8a8_g128+asym", "absmax", torch.float16),
    ("w4a8", None, torch.float16),
    ("w4a8_g64", None, torch.float16),
    ("w4a8_g128+asym", "absmax", torch.float32),
    ("w4a8+asym", "absmax", torch.float16),
]


def make(n: int, k: int, scheme: str, method: str | None = None, scales: torch.dtype = torch.float16):
    """A QuantizedTensor of random weights whose channels have means of their own."""
    weight = torch.randn(n, k) / k**0.5 + torch.randn(n, 1) / k
    q = hb.quantize(weight, scheme, method=method)
    if q.group_scale is None or q.group_scale.dtype == scales:
        return q
    parts = {what: getattr(q, what) for what in ("codes", "scale", "zero", "minimum")}
    if q.minimum is not None:
        parts["minimum"] = q.minimum.to(scales)
    return hb.QuantizedTensor(**parts, group_scale=q.group_scale.to(scales), scheme=q.scheme, k=k)
