"""prune_structured_: hidden units, attention heads and channels that go, with all that belongs to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import DTypeError, ModelError, SchemeError
from ..modules import check_module, sites
from ..rules import Patterns
from ..sparse.pattern import count_of
from .inputs import Forward, call
from .layers import Choice, refuse_quantized
from .scores import LossFunction
from .structured_families import config_of, heads, neurons
from .structured_graph import traced
from .structured_scores import Measure, score
from .structured_shrink import shrink
from .structured_units import Group, check, is_layer, outputs_of

PATTERNS = {"neuron": "hidden units", "head": "attention heads", "channel": "channels"}
SCOPES = ("layer", "global")
_UNSAID = "halfbyte does not know what in the model's config says how many units it has"


def prune_structured_(
    model: nn.Module,
    amount: float,
    method: str = "magnitude",
    pattern: str = "neuron",
    scope: str = "layer",
    data: Iterable | None = None,
    loss_fn: LossFunction | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    forward: Forward | None = None,
    norm: float | None = None,
    criterion: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Take whole units out of `model`, in place: its layers become smaller. Returns the model.

    pattern "neuron": hidden units of an MLP, the outputs of a linear layer (and of its gate) with the inputs
    of the layer that uses them. "head": attention heads, the outputs of query, key and value with the inputs
    of the output projection; where several queries share a key, the whole group is one unit. "channel": the
    outputs of a convolution with what belongs to them in norms and depthwise convolutions behind it and in
    the layer that uses them. Outputs of a model never go, nor what more than one layer uses.

    amount: the share of units to be gone, 0 to 1, of those that a layer had when it was first pruned so in
    this model: exactly floor(amount * units), in each layer or, with scope "global", in all together. At
    least one unit of each layer stays; of equal scores the first go.

    method: "ln_structured", the Lp norm (`norm`, 2 by default) of the weights that make a unit, gates
    included, biases and what uses it not; "magnitude" is that with p = 2. "activation": mean of |a|, or with
    criterion "apoz" the share of a != 0 (Hu et al. 2016, arXiv:1607.03250), where the unit is used. "taylor":
    the sum over the weights that make a unit of the mean over batches of |w * dL/dw|, in the manner of
    Molchanov et al. (2017, arXiv:1611.06440), for weights. "random", by `seed`. With scope "global" all but
    taylor and random are divided by their mean over the layer.
    data, loss_fn, forward, include, exclude: as in prune_; a pattern of `exclude` holds what it fits, one of
    `include` has to fit a layer that makes units, or the attention.

    Modules stay, with smaller parameters (without gradients: make optimizers anew) and the sizes that they
    note themselves, such as in_features or num_attention_heads. A config of transformers gets the new number
    where all layers under it agree. `model._halfbyte_pruning` lists, per layer that makes units: name, layers
    (the names of all that changed), before, after (units), action ("pruned" or "left alone") and reason,
    which may be a note on a pruned one. An error leaves the model as it was.

    Raises SchemeError, DTypeError, ModelError (nothing to prune, a quantized model, data that does not reach
    a layer), NonFiniteError and DeviceError, naming the layer.
    """
    check_module(model, "prune_")
    _check(amount, pattern, scope)
    measure = Measure(
        method, norm, criterion, data, loss_fn, call if forward is None else forward, seed, progress
    )
    choice = Choice(include, exclude)
    refuse_quantized(model)
    groups = _groups(model, pattern)
    if idle := _choose(model, groups, choice):
        warnings.warn(f"prune_: no layer has a name that fits {', '.join(idle)}", stacklevel=3)
    open_groups = [group for group in groups if not group.reason]
    if not open_groups:
        nearest = sorted(groups, key=lambda group: not group.made_by)
        reasons = [f"{group.name or 'the model itself'}: {group.reason}" for group in nearest]
        raise ModelError(
            f"no {PATTERNS[pattern]} to prune in this {type(model).__name__}: "
            + ("; ".join(reasons[:8]) or "it has no layer that makes any")
        )
    before = _before(model, pattern, open_groups)
    scores = score(model, open_groups, measure)
    gone = _select(scores, before, amount, scope, normal=method not in ("taylor", "random"))
    kept = {group.name: keep for group, keep in zip(open_groups, gone, strict=True)}
    keeps = [kept.get(group.name) for group in groups]
    shrink(groups, keeps)
    model._halfbyte_pruning = [_row(group, keep) for group, keep in zip(groups, keeps, strict=True)]
    model._halfbyte_units = vars(model).get("_halfbyte_units", {}) | {
        (pattern, group.name): units for group, units in zip(open_groups, before, strict=True)
    }
    return model


def gone_share(model: nn.Module, pattern: str, choice: Choice) -> float:
    """The share of its units that earlier calls took out of the layers that prune_structured_ would prune."""
    refuse_quantized(model)
    groups = _groups(model, pattern)
    _choose(model, groups, choice)
    left = [group for group in groups if not group.reason]
    before = sum(_before(model, pattern, left))
    return 1 - sum(group.units for group in left) / before if before else 0.0


def _before(model: nn.Module, pattern: str, groups: list[Group]) -> list[int]:
    """How many units each group had when it was first pruned with this pattern."""
    had = vars(model).get("_halfbyte_units", {})
    return [max(had.get((pattern, group.name), 0), group.units) for group in groups]


def _check(amount: object, pattern: object, scope: object) -> None:
    if pattern not in PATTERNS:
        raise SchemeError(
            f"prune_: no pattern of units is called {pattern!r}; there are: {', '.join(PATTERNS)}"
        )
    if scope not in SCOPES:
        raise SchemeError(f"prune_: scope is {scope!r}; it must be one of: {', '.join(SCOPES)}")
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise DTypeError(f"prune_: amount must be a number from 0 to 1, not {amount!r}")
    if not 0 <= amount <= 1:
        raise SchemeError(f"prune_: amount is {amount}; it must be a share of units from 0 to 1")


def _groups(model: nn.Module, pattern: str) -> list[Group]:
    """All units, in the order of the model; those that cannot go have a reason."""
    reasons: dict[str, str] = {}
    if pattern == "head":
        groups = heads(model)
    else:
        known, done = neurons(model) if pattern == "neuron" else ([], set())
        found, reasons = traced(model, pattern, done)
        for group in found:
            group.in_config = config_of(model, group.name) is not None
        groups = [*known, *found]
    check(groups, model)
    layers = {part.name for group in groups for part in (*group.made_by, *group.others)}
    order = {}
    for i, (names, module, _) in enumerate(sites(model)):
        order[names[0]] = i
        if pattern == "head" or not layers.isdisjoint(names):
            continue
        if is_layer(module, pattern):
            reason = next(
                (reasons[name] for name in names if name in reasons), "it makes no units that are known"
            )
            groups.append(Group(names[0], outputs_of(module), reason=reason))
        elif isinstance(module, base := nn.Linear if pattern == "neuron" else _ConvNd):
            units = module.out_features if base is nn.Linear else module.out_channels
            groups.append(Group(names[0], units, reason=f"{type(module).__name__} is a subclass"))
    return sorted(groups, key=lambda group: order.get(group.name, -1))


def _choose(model: nn.Module, groups: list[Group], choice: Choice) -> list[str]:
    """Give those that the caller does not want a reason to be left alone; return idle patterns."""
    names = {found[0]: found for found, _, _ in sites(model)}
    seen = []
    for group in groups:
        makers = [group.name, *(part.name for part in group.made_by)]
        every = [name for layer in {*makers, *group.layers()} for name in names.get(layer, [layer])]
        asked = [name for layer in makers for name in names.get(layer, [layer])]
        seen += every
        if any(pattern.fits(*every) for pattern in choice.exclude):
            group.reason = "excluded"
        elif choice.include is not None and not choice.asked(asked):
            group.reason = group.reason or "not included"
        elif group.in_config:
            group.note = _UNSAID
            if choice.include is None:
                group.reason = group.reason or f"{_UNSAID}; name it in include to prune it all the same"
    return choice.idle(seen) if seen else []


def _select(
    scores: list[Tensor], before: list[int], amount: float, scope: str, normal: bool
) -> list[Tensor | None]:
    """The units to keep of each layer, ascending; None for all.

    before: how many units each layer had at first. normal: whether scores of different layers are compared
    after each is divided by the mean of its layer.
    """
    gone = [had - len(values) for had, values in zip(before, scores, strict=True)]
    if scope == "layer":
        counts = [count_of(amount, had) - lost for had, lost in zip(before, gone, strict=True)]
        lowest = [
            _order(values)[: max(min(count, len(values) - 1), 0)]
            for values, count in zip(scores, counts, strict=True)
        ]
    else:
        lowest = _lowest_of_all(scores, count_of(amount, sum(before)) - sum(gone), normal)
    keeps: list[Tensor | None] = []
    for values, out in zip(scores, lowest, strict=True):
        stays = torch.ones(len(values), dtype=torch.bool)
        stays[out] = False
        keeps.append(stays.nonzero().flatten() if len(out) else None)
    return keeps


def _lowest_of_all(scores: list[Tensor], count: int, normal: bool) -> list[Tensor]:
    """Of each layer the units that are among the `count` lowest of all; the best of each layer is not."""
    if normal:
        scores = [values / mean if (mean := values.mean()) > 0 else values for values in scores]
    spared = [values.index_fill(0, _order(values)[-1:], torch.inf) for values in scores]
    chosen = torch.zeros(sum(map(len, scores)), dtype=torch.bool)
    chosen[_order(torch.cat(spared))[: max(min(count, len(chosen) - len(scores)), 0)]] = True
    return [part.nonzero().flatten() for part in chosen.split([len(values) for values in scores])]


def _order(scores: Tensor) -> Tensor:
    """From the lowest to the highest, of equal ones in their order."""
    return scores.sort(stable=True).indices


def _row(group: Group, keep: Tensor | None) -> dict[str, Any]:
    """Of the report."""
    after = group.units if keep is None else len(keep)
    pruned = keep is not None
    reason = group.note if pruned else group.reason or "as many of its units are gone already, or one is left"
    return {
        "name": group.name,
        "layers": group.layers() if pruned else [],
        "before": group.units,
        "after": after,
        "action": "pruned" if pruned else "left alone",
        "reason": reason,
    }
