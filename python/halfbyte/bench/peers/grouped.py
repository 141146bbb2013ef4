"""Symmetric weights in groups along k, as several peers take them."""

from __future__ import annotations

import numpy as np


def grouped_codes(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """weight [n, k] -> codes uint8 [n, groups, group], scale float32 [n, groups]: w ~ (code - zero) * scale.

    zero is 2^(bits-1), scale max|w| / (zero - 1), the codes run from 1 to 2^bits - 1. k is padded with zeros
    to whole groups.
    """
    n, k = weight.shape
    groups, zero = -(-k // group), 1 << (bits - 1)
    padded = np.zeros((n, groups * group), np.float32)
    padded[:, :k] = weight
    blocks = padded.reshape(n, groups, group)
    scale = np.abs(blocks).max(axis=-1) / np.float32(zero - 1)
    scale[scale == 0] = 1
    codes = np.clip(np.rint(blocks / scale[..., None]), 1 - zero, zero - 1) + zero
    return codes.astype(np.uint8), scale


def nibbles(codes: np.ndarray) -> np.ndarray:
    """4-bit codes uint8 [..., g] as bytes [..., g / 2]; the element of even index is the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
