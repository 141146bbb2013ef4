"""Pattern: where the zeros of a pruned weight lie, and which weights go when a share of them has to."""

from __future__ import annotations

import difflib
import math
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DTypeError, SchemeError, ShapeError

if TYPE_CHECKING:  # the names of patterns are read where torch is not installed
    from torch import Tensor

# The patterns that kernels run. Any other N:M and blockRxC can be pruned to.
NAMES = ("unstructured", "1:4", "2:4", "4:8", "block16x4", "block16x1")

# Scores of weights that go before all others: pruned before, and zero as it happens.
PRUNED, ZERO = -2.0, -1.0

_NM = re.compile(r"([1-9]\d*):([1-9]\d*)")
_BLOCK = re.compile(r"block([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True)
class Pattern:
    """Where the zeros of a weight [n output channels, k input features] may lie.

    kind "unstructured": anywhere. "nm", written `N:M`: of each M consecutive input features at most N are not
    zero. "block", written `blockRxC`: blocks of R output channels by C input features are kept or zero as a
    whole. Groups and blocks are aligned; the last ones of a weight that they do not divide are smaller.

    What goes at once is a unit: a weight, or a block. Raises SchemeError for sizes that make no pattern.
    """

    kind: str
    n: int = 0
    m: int = 0
    rows: int = 1
    columns: int = 1

    def __post_init__(self) -> None:
        parsed = {"unstructured": (0, 0, 1, 1), "nm": (self.n, self.m, 1, 1)}
        parsed["block"] = (0, 0, self.rows, self.columns)
        sizes = (self.n, self.m, self.rows, self.columns)
        if not all(type(size) is int for size in sizes) or parsed.get(self.kind) != sizes:
            raise SchemeError(f"no pattern has the kind {self.kind!r} and the sizes {sizes}")
        if (self.kind == "nm" and not 0 < self.n < self.m) or min(self.rows, self.columns) < 1:
            raise SchemeError(_unknown(str(self)))

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """The pattern that `text` names; a Pattern is returned as it is. Raises SchemeError."""
        if isinstance(text, Pattern):
            return text
        if text == "unstructured":
            return cls("unstructured")
        if isinstance(text, str) and (sizes := _NM.fullmatch(text)) and int(sizes[1]) < int(sizes[2]):
            return cls("nm", n=int(sizes[1]), m=int(sizes[2]))
        if isinstance(text, str) and (sizes := _BLOCK.fullmatch(text)):
            return cls("block", rows=int(sizes[1]), columns=int(sizes[2]))
        raise SchemeError(_unknown(text))

    def __str__(self) -> str:
        names = {"nm": f"{self.n}:{self.m}", "block": f"block{self.rows}x{self.columns}"}
        return names.get(self.kind, self.kind)

    @property
    def amount(self) -> float | None:
        """The share of zeros of N:M, 1 - N/M; None where the pattern leaves it open."""
        return 1 - self.n / self.m if self.kind == "nm" else None

    def check_amount(self, amount: float | None) -> float:
        """The share of zeros to reach; None stands for that of N:M.

        Raises DTypeError (no number), SchemeError (outside [0, 1], NaN, or not that of N:M).
        """
        if amount is None and self.amount is not None:
            return self.amount
        if isinstance(amount, bool) or not isinstance(amount, (int, float)):
            raise DTypeError(f"amount must be a number from 0 to 1, the share of zeros, not {_shown(amount)}")
        if not 0 <= amount <= 1:
            raise SchemeError(f"amount is {amount}; it must be a share of zeros from 0 to 1")
        if self.amount is not None and not math.isclose(amount, self.amount, abs_tol=1e-9):
            raise SchemeError(
                f"amount is {amount}, but the pattern {self} has the share {self.amount:g} of zeros and no "
                "other: pass that, or None"
            )
        return float(amount) if self.amount is None else self.amount

    def applies(self, shape: tuple[int, int]) -> bool:
        """Whether a weight [n, k] is large enough for one whole block or group."""
        return shape[0] >= self.rows and shape[1] >= max(self.columns, self.m, 1)

    def units(self, scores: Tensor) -> Tensor:
        """Scores [n, k] of weights -> of units: of a block the sum, of weights and for N:M themselves.

        Negative scores mean PRUNED and ZERO. They add nothing; a block of nothing else has the highest.
        """
        if self.kind != "block":
            return scores
        tiles = self._tiles(scores, 0)
        gone = self._tiles(scores, PRUNED).amax((1, 3))
        return gone.where(gone < 0, tiles.clamp(min=0).sum((1, 3)))

    def expand(self, units: Tensor, shape: tuple[int, int]) -> Tensor:
        """What each unit has, for each weight of [n, k]: the way back from `units`."""
        if self.kind != "block":
            return units
        wide = units.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return wide[: shape[0], : shape[1]]

    def select(self, scores: Tensor, amount: float | None = None, *, per_row: bool = False) -> Tensor:
        """The weights to keep, bool [n, k], when those of the lowest scores go (of equal ones the first).

        Exactly floor(amount * units) go; see `count_of`. For N:M: all but the N best of each group. per_row
        (of weights only): the same share of each row, +-1. Scores must be finite and at least 0, or PRUNED or
        ZERO. Raises as check_amount does, and ShapeError.
        """
        check_matrix(scores, "scores")
        amount = self.check_amount(amount)
        if self.kind == "nm":
            groups = self._tiles(scores, -math.inf)[:, 0]  # [n, groups, m]
            spared = groups.shape[-1] - self.n
            return self._untile(_ranks(groups) >= spared, scores.shape)
        units = self.units(scores)
        count = count_of(amount, units.numel())
        if not per_row or self.kind == "block":
            return self.expand(~lowest(units, count), scores.shape)
        gone = (units == PRUNED).sum(1)
        counts = shares(count, gone.new_full(gone.shape, units.shape[1]), gone)
        return _ranks(units) >= counts[:, None]

    def violations(self, weight: Tensor) -> tuple[int, int] | None:
        """The first (row, column) where a weight or bool mask [n, k] breaks the pattern; None if it fits.

        Of N:M: the start of a group with more than N nonzeros. Of blocks: the start of one that a bool mask
        keeps in part; a weight has zeros in kept blocks too, so none of it can break that.
        """
        check_matrix(weight, "weight")
        if self.kind == "unstructured" or (self.kind == "block" and str(weight.dtype) != "torch.bool"):
            return None
        kept = weight != 0
        if self.kind == "nm":
            bad = self._tiles(kept, False)[:, 0].sum(-1) > self.n
        else:
            bad = self._tiles(kept, False).any(3).any(1) & ~self._tiles(kept, True).all(3).all(1)
        if not bad.any():
            return None
        row, column = divmod(int(bad.flatten().byte().argmax()), bad.shape[1])
        return row * self.rows, column * max(self.columns, self.m)

    def fits(self, weight: Tensor) -> bool:
        """Whether a weight or bool mask [n, k] has the pattern."""
        return self.violations(weight) is None

    def _tiles(self, x: Tensor, fill: float) -> Tensor:
        """[n, k] -> [unit rows, rows, unit columns, columns or m], padded with `fill`."""
        rows, columns = self.rows, max(self.columns, self.m)
        n, k = x.shape
        padded = x.new_full((n + -n % rows, k + -k % columns), fill)
        padded[:n, :k] = x
        return padded.reshape(-(-n // rows), rows, -(-k // columns), columns)

    def _untile(self, groups: Tensor, shape: tuple[int, int]) -> Tensor:
        return groups.reshape(shape[0], -1)[:, : shape[1]]


def count_of(amount: float, total: int) -> int:
    """floor(amount * total). A product within 5e-7 of an integer is that integer: 0.29 * 100 is 29, though
    28.999999999999996 in floating point.
    """
    return math.floor(round(amount * total, 6))


def lowest(scores: Tensor, count: int) -> Tensor:
    """bool, in the shape of `scores`: the `count` lowest, and of equal ones the first."""
    flat = scores.flatten()
    if count <= 0:
        return scores.new_zeros(scores.shape).bool()
    last = flat.kthvalue(count).values
    chosen = flat < last
    equal = (flat == last).nonzero().flatten()
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.reshape(scores.shape)


def shares(total: int, sizes: Tensor, gone: Tensor) -> Tensor:
    """How many of each part go so that `total` go in all: the same share of each, +-1 for the remainder.

    sizes, gone: int64 [parts], what each part has and what is gone of it already, which stays gone: a part
    with more than its share leaves less to the others, and where `gone` is more than `total`, that is it.
    """

    def at(level: float) -> Tensor:
        return (sizes.double() * level).floor().long().maximum(gone)

    low, high = 0.0, 1.0
    if int(at(high).sum()) <= total:
        return at(high)
    for _ in range(60):  # bits of a share of up to 2^60 weights
        middle = (low + high) / 2
        low, high = (middle, high) if int(at(middle).sum()) <= total else (low, middle)
    counts = at(low)
    open_parts = (counts < at(high)).nonzero().flatten()
    counts[open_parts[: max(total - int(counts.sum()), 0)]] += 1
    return counts


def check_matrix(x: Tensor, what: str) -> None:
    """DTypeError or ShapeError unless `x` is a tensor of two dimensions, neither empty."""
    if (torch := sys.modules.get("torch")) is None or not isinstance(x, torch.Tensor):
        raise DTypeError(f"{what} must be a torch tensor [n, k], not {type(x).__name__}")
    if x.ndim != 2 or x.numel() == 0:
        raise ShapeError(f"{what} has the shape {tuple(x.shape)}; it must be [n, k], neither of them 0")


def _ranks(scores: Tensor) -> Tensor:
    """The place of each score among those of its last dimension, from the lowest; of equal ones the first."""
    order = scores.sort(dim=-1, stable=True).indices
    places = order.new_ones(order.shape[-1]).cumsum(0) - 1
    return order.new_empty(order.shape).scatter_(-1, order, places.expand_as(order))


def _shown(value: object) -> str:
    return "None" if value is None else f"{value!r} ({type(value).__name__})"


def _unknown(text: object) -> str:
    nearest = difflib.get_close_matches(str(text), NAMES, 2, 0)
    return (
        f"no pattern of zeros is called {text!r}; the nearest are {', '.join(nearest)}; a pattern is "
        "unstructured, N:M (N below M, such as 2:4) or blockRxC (such as block16x4)"
    )
