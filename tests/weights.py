"""Formats of weights, and weights with any codes and scales: also such as quantize() never gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import halfbyte as hb
from halfbyte.quantized_tensor import to_nibbles


@dataclass(frozen=True)
class Format:
    """A scheme and what it leaves open: zero points or minima, and the dtype of group scales and minima."""

    name: str
    minimum: bool = False
    floats: str = "float16"

    @property
    def scheme(self) -> hb.Scheme:
        return hb.Scheme.parse(self.name)

    def __str__(self) -> str:
        return self.name + ":min" * self.minimum + ":f32" * (self.floats == "float32")


W8A8 = Format("w8a8")

# Every way in which a kernel can be asked for a product in groups: bits of both sides, with and without group
# scales, zero points, minima and activation scales per group, both widths of stored floats, each group size.
GROUPED = (
    Format("w8a8+asym"),
    Format("w8a8_g32"),
    Format("w8a8_g64+asym"),
    Format("w8a8_g128+asym", minimum=True),
    Format("w8a8_g64", floats="float32"),
    Format("w8a8+ag64"),
    Format("w8a8+asym+ag32"),
    Format("w8a8_g32+ag32"),
    Format("w4a8"),
    Format("w4a8+asym"),
    Format("w4a8_g32"),
    Format("w4a8_g64"),
    Format("w4a8_g128"),
    Format("w4a8_g32+asym"),
    Format("w4a8_g64+asym", minimum=True),
    Format("w4a8_g32+asym", minimum=True, floats="float32"),
    Format("w4a8_g128", floats="float32"),
    Format("w4a8+ag128"),
    Format("w4a8_g64+ag64"),
    Format("w4a8_g32+asym+ag32", minimum=True),
    Format("w4a8_g32+asym+ag32", floats="float32"),
    Format("w8a16"),
    Format("w8a16+asym"),
    Format("w8a16_g32"),
    Format("w8a16_g64+asym"),
    Format("w8a16_g32+asym", minimum=True, floats="float32"),
    Format("w4a16"),
    Format("w4a16+asym"),
    Format("w4a16_g32"),
    Format("w4a16_g64"),
    Format("w4a16_g128", floats="float32"),
    Format("w4a16_g32+asym"),
    Format("w4a16_g64+asym", floats="float32"),
    Format("w4a16_g64+asym", minimum=True),
    Format("w4a16_g32+nf4"),
    Format("w4a16_g128+nf4", floats="float32"),
)

FILLINGS = ("normal", "full", "max", "min", "rows", "alternating", "zeros")


def fill_weight(form: Format, kind: str, n: int, k: int, rng: np.random.Generator) -> hb.QuantizedTensor:
    """A weight [n, k] of torch tensors, its codes of the named kind.

    full: any code and zero point, group scales and minima over all that float16 holds. max and min: codes and
    zero points at opposite ends, so that sums are at their largest. rows, alternating: either, in turn.
    """
    scheme = form.scheme
    low, high = (0, 15) if scheme.weight_bits == 4 else (-128, 127)
    upper = {
        "max": np.ones((n, 1), bool),
        "min": np.zeros((n, 1), bool),
        "rows": np.arange(n)[:, None] % 2 == 1,
        "alternating": (np.arange(n)[:, None] + np.arange(k)) % 2 == 1,
    }
    groups = scheme.groups(k)
    zero = rng.integers(low, high + 1, (n, groups))
    if kind in upper:
        codes = np.broadcast_to(np.where(upper[kind], high, low), (n, k))
        zero = np.broadcast_to(np.where(upper[kind][:, :1], low, high), (n, groups))
    elif kind == "full":
        codes = rng.integers(low, high + 1, (n, k))
    else:
        middle = (low + high + 1) / 2
        deviation = (high - low) / 6 if kind == "normal" else 0
        codes = np.clip(np.rint(middle + deviation * rng.standard_normal((n, k))), low, high)
    wide = kind == "full"
    parts = {"scale": (10.0 ** rng.uniform(-5, 0, n)).astype(np.float32)}
    parts["codes"] = to_nibbles(codes.astype(np.uint8)) if scheme.weight_bits == 4 else codes.astype(np.int8)
    if scheme.group:
        powers = (
            2.0 ** rng.uniform(-24, 15.9, (n, groups)) if wide else 2.0 ** rng.uniform(-6, 0, (n, groups))
        )
        parts["group_scale"] = powers.astype(form.floats)
    if scheme.asym and form.minimum:
        spread = 2.0 ** rng.uniform(-24, 15.9, (n, groups)) if wide else 1.0
        parts["minimum"] = (np.clip(rng.standard_normal((n, groups)), -1, 1) * spread).astype(form.floats)
    elif scheme.asym:
        parts["zero"] = zero.astype(np.int8)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
    return hb.QuantizedTensor(**tensors, scheme=scheme, k=k)
