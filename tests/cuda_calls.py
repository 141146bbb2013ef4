"""What tests that call libhalfbyte_cuda by its C interface share."""

from __future__ import annotations

import torch
from torch import Tensor

from corecall import Placed, place

BAD_ARGUMENT, ALIGNMENT = -10001, -10002  # halfbyte_cuda_status
U = 2.0**-24  # half a unit in the last place of float32, relative


def address(x: Tensor | Placed | None) -> int | None:
    return None if x is None else x.ptr if isinstance(x, Placed) else x.data_ptr()


def strided(x: Tensor, layout: str) -> Tensor:
    """The same rows elsewhere. aligned: at a stride of whole vectors, larger than a row; else as Placed."""
    if layout != "aligned":
        return place(x, layout).view
    m, k = x.shape
    wide = torch.full((m, (k + 15) // 8 * 8 + 8), -1 if x.dtype == torch.int32 else torch.nan, dtype=x.dtype)
    wide[:, :k] = x
    return wide[:, :k]
