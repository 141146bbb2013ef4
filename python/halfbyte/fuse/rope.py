"""Tables of the rotary embedding, for as many positions as were met."""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST_ROWS = 256


class Rope:
    """cos and sin of position * frequency, times a scale: float32 [positions, frequencies], as transformers
    computes them. Threads may share one.
    """

    def __init__(self, frequencies: Tensor, scale: float):
        self._frequencies = frequencies.detach().float()
        self._scale = scale
        self._tables = self._make(torch.arange(_FIRST_ROWS))

    def until(self, end: int) -> tuple[Tensor, Tensor]:
        """Tables of the positions 0 .. end - 1, and of more."""
        tables = self._tables
        if end > (rows := tables[0].shape[0]):
            tables = self._tables = self._make(torch.arange(max(end, 2 * rows)))
        return tables

    def at(self, positions: Tensor, limit: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(tables, rows of them) for any positions: where some are outside 0 .. limit - 1, of just these."""
        low, high = (int(x) for x in positions.aminmax())
        if low >= 0 and high < limit:
            return self.until(high + 1), positions
        return self._make(positions.flatten()), torch.arange(positions.numel()).view(positions.shape)

    def _make(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.float()[:, None] * self._frequencies
        return angles.cos() * self._scale, angles.sin() * self._scale
