"""int8 weights with zeros as the GPU kernels read them (csrc/cuda/layout.h): by blocks, and two of four."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

BLOCK = 64  # channels and k of a block
_TILE_K = 128
_AT_ONCE = 1 << 22  # elements that are laid out at once: the places of those take 8 bytes each
_QUADS = [0, 2, 4, 6, 1, 3, 5, 7]  # the quads of 32 k as the mma counts them


def blocks(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 [n, k] -> (uint8 [there, 4096], starts int32 [n blocks + 1], columns int32 [there]): the blocks
    that have something in them, by channel, then k; starts[i] is the first one of the channels i.
    """
    kept, where = [], []
    for c in _slabs(codes, BLOCK):
        rows, depth = len(c) // BLOCK, c.shape[1] // BLOCK
        # piece column, upper, g | block, half, t, s, j
        c = c.view(rows, 4, 2, 8, depth, 2, 4, 2, 4).permute(0, 4, 5, 1, 3, 6, 7, 2, 8)
        c = c.reshape(rows, depth, BLOCK * BLOCK)
        there = c.any(2)
        kept.append(c[there])
        where.append(there)
    there = torch.cat(where)
    starts = padded(there.sum(1).cumsum(0), (1, 0)).int()
    return torch.cat(kept).view(torch.uint8), starts, there.nonzero()[:, 1].int()


def from_blocks(weight: Tensor, starts: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """The way back from `blocks`: int8 [n, k]."""
    n, k = shape
    rows, depth = len(starts) - 1, -(-k // BLOCK)
    c = torch.zeros(rows, depth, BLOCK * BLOCK, dtype=torch.int8, device=weight.device)
    row = torch.arange(rows, device=weight.device).repeat_interleave(starts.diff().long())
    c[row, columns.long()] = weight.view(torch.int8)
    c = c.view(rows, depth, 2, 4, 8, 4, 2, 2, 4).permute(0, 3, 7, 4, 1, 2, 5, 6, 8)
    return c.reshape(rows * BLOCK, depth * BLOCK)[:n, :k].contiguous()


def has_pairs(codes: Tensor) -> bool:
    """Whether at most two of every four consecutive k of int8 [n, k] are not zero."""
    quads = padded(codes, (0, -codes.shape[1] % 4)).view(len(codes), -1, 4)
    return bool(((quads != 0).sum(2) <= 2).all())


def pairs(codes: Tensor) -> Tensor:
    """int8 [n, k] that `has_pairs` -> uint8 [n tiles, k tiles, 4096 + 1024]."""
    return torch.cat([_pairs(c) for c in _slabs(codes, _TILE_K)])


def _slabs(codes: Tensor, depth: int) -> Iterator[Tensor]:
    """The rows of int8 [n, k] some at a time, padded to a multiple of BLOCK, and k to one of depth."""
    n, k = codes.shape
    step = max(1, _AT_ONCE // (BLOCK * max(k, 1))) * BLOCK
    for first in range(0, n, step):
        c = codes[first : first + step]
        yield padded(c, (0, -k % depth, 0, -len(c) % BLOCK)).contiguous()


def _pairs(c: Tensor) -> Tensor:
    """`pairs` of a slab."""
    rows, depth = len(c) // BLOCK, c.shape[1] // _TILE_K
    # piece column, upper, g | tile, piece, half, quad, j
    c = c.view(rows, 4, 2, 8, depth, 2, 2, 8, 4)[..., _QUADS, :]
    # The places of what is not zero, and of as many zeros as that leaves room for, in order.
    places = (c == 0).int().argsort(dim=-1, stable=True)[..., :2].sort(-1)[0]
    two = c.gather(-1, places)
    codes = two.view(rows, 4, 2, 8, depth, 2, 2, 4, 2, 2).permute(0, 4, 5, 1, 3, 7, 6, 2, 8, 9)
    nibbles = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
    indices = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    indices = indices.permute(0, 4, 5, 1, 3, 6, 2, 7)
    parts = [part.reshape(rows, depth, -1).view(torch.uint8) for part in (codes, indices)]
    return torch.cat(parts, 2)


def from_pairs(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """The way back from `pairs`: int8 [n, k]."""
    n, k = shape
    out = torch.zeros(n, k, dtype=torch.int8, device=weight.device)
    step = max(1, _AT_ONCE // (BLOCK * max(k, 1)))
    for first in range(0, len(weight), step):
        at = out[first * BLOCK : (first + step) * BLOCK]
        c = _from_pairs(weight[first : first + step])
        at[:, : c.shape[1]] = c[: len(at), :k]
    return out


def _from_pairs(weight: Tensor) -> Tensor:
    """int8 by whole tiles."""
    rows, depth, _ = weight.shape
    codes, indices = weight.split([4096, 1024], 2)
    two = codes.contiguous().view(torch.int8).view(rows, depth, 2, 4, 8, 4, 2, 2, 2, 2)
    two = two.permute(0, 3, 7, 4, 1, 2, 6, 5, 8, 9).reshape(rows, 4, 2, 8, depth, 2, 2, 8, 2)
    i = indices.reshape(rows, depth, 2, 4, 8, 2, 2, 4).permute(0, 3, 6, 4, 1, 2, 5, 7)
    nibbles = torch.stack([i & 15, i >> 4], -1).flatten(-2)
    places = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
    c = torch.zeros(*places.shape[:-1], 4, dtype=torch.int8, device=weight.device).scatter_(-1, places, two)
    back = [_QUADS.index(quad) for quad in range(8)]
    return c[..., back, :].reshape(rows * BLOCK, depth * _TILE_K)
