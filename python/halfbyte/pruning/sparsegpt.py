"""SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774): prune a weight and let the rest make up for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..sparse.pattern import PRUNED, Pattern, count_of, lowest, shares
from .inputs import Forward, tracked
from .layers import Layer
from .sequential import Passes, group_by_input, second_moment

BLOCK = 128  # columns whose mask is chosen at once, as published
DAMPING = 0.01  # of the mean diagonal of the Hessian


def prune_layers(
    model: nn.Module,
    layers: list[Layer],
    pattern: Pattern,
    amount: float,
    batches: list,
    forward: Forward,
    progress: bool,
) -> dict[str, Tensor]:
    """Prune the layers in the order in which the model calls them, and return what to keep, bool [n, k] each.

    Layers fed the very same tensors (query, key and value) are one group. Each group is pruned for its inputs
    in the model whose earlier groups are pruned already: weights are written as it goes on, pruned ones as
    zeros. Restoring them after an error is the caller's. Layers that no input reaches are left out.
    """
    kept: dict[str, Tensor] = {}
    passes = Passes(model, layers, batches, forward)
    for group in tracked(group_by_input(layers, passes.whole), "sparsegpt", "layer", progress):
        factor, dead = inverse_factor(second_moment(group, passes.of(group)))
        for layer in group.layers:
            weight = layer.weight
            scores = layer.rank(torch.ones_like(weight))
            new, kept[layer.name] = prune_weight(weight, scores, factor, dead, pattern, amount)
            new = new.to(layer.parameter.dtype)
            if not new.isfinite().all():
                raise NonFiniteError(f"prune_: sparsegpt's update of {layer.name or 'the model'} overflows")
            with torch.no_grad():
                layer.parameter.copy_(layer.turn(new))
    return kept


def inverse_factor(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor U of the inverse of the damped Hessian, inv(H) = U'U, and its dead inputs.

    moment: X'X, float64 [k, k]. dead, bool [k]: inputs that always were 0. They have no part in the damping,
    1 % of the mean diagonal, nor in any compensation: their rows and columns are those of the unit matrix.
    """
    hessian = moment.clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    live = int((~dead).sum())
    diagonal += DAMPING * float(diagonal.sum()) / max(live, 1)
    diagonal[dead] = 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True), dead


def prune_weight(
    weight: Tensor, ranked: Tensor, factor: Tensor, dead: Tensor, pattern: Pattern, amount: float
) -> tuple[Tensor, Tensor]:
    """The updated weight [n, k], and which of it are kept, bool [n, k]: the others are 0 in it.

    ranked: PRUNED and ZERO where weights go before others, at least 0 elsewhere. factor, dead: of
    inverse_factor. Of each 128 columns the same share goes, those of the lowest (w / U_jj)^2, in blocks of a
    pattern those of the lowest sum; of N:M the same holds in each group, as its first column is met. The
    error of each column is spread over those after it.
    """
    w = weight.t().contiguous()  # [k, n]: a column of the weight is what is worked on at once
    u = factor.to(w.dtype)
    # w / U_jj is the error that a weight leaves. Dead inputs leave none.
    importance = (~dead / u.diagonal())[:, None]
    keep = torch.ones_like(w, dtype=torch.bool)
    k = len(w)
    width = _width(pattern)
    spans = [(start, min(start + width, k)) for start in range(0, k, width)]
    counts = _counts(ranked, spans, pattern, amount)

    def select(start: int, stop: int, count: int | None) -> None:
        scores = (w[start:stop] * importance[start:stop]).square().t()
        first = ranked[:, start:stop]
        scores = torch.where(first < 0, first, scores)
        if count is None:
            kept = pattern.select(scores)
        else:
            kept = pattern.expand(~lowest(pattern.units(scores), count), scores.shape)
        keep[start:stop] = (kept & (first != PRUNED)).t()

    for (start, stop), count in zip(spans, counts, strict=True):
        if count is not None:
            select(start, stop, count)
        errors = torch.zeros_like(w[start:stop])
        for j in range(start, stop):
            if count is None and (j - start) % pattern.m == 0:
                select(j, min(j + pattern.m, k), None)
            error = torch.where(keep[j], 0, w[j] / u[j, j])
            w[j:stop].addr_(u[j, j:stop], error, alpha=-1)
            errors[j - start] = error
        w[stop:] -= u[start:stop, stop:].t() @ errors
    return torch.where(keep, w, 0).t(), keep.t()


def _width(pattern: Pattern) -> int:
    """Columns of one step: about 128, and whole groups or blocks."""
    unit = max(pattern.m, pattern.columns)
    return max(BLOCK // unit, 1) * unit


def _counts(
    ranked: Tensor, spans: list[tuple[int, int]], pattern: Pattern, amount: float
) -> list[int | None]:
    """How many units go of each span of columns, so that the total is exact; None for N:M."""
    if pattern.kind == "nm":
        return [None] * len(spans)
    units = [pattern.units(ranked[:, start:stop]) for start, stop in spans]
    sizes = torch.tensor([part.numel() for part in units])
    gone = torch.tensor([int((part == PRUNED).sum()) for part in units])
    return shares(count_of(amount, int(sizes.sum())), sizes, gone).tolist()
