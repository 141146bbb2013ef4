"""PruneSchedule: prune in steps, fine-tune in between, stop when a metric falls too far."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import DTypeError, ModelError, NonFiniteError, SchemeError
from ..modules import check_module, float_weight, is_linear
from ..sparse.pattern import Pattern
from .layers import Choice, find
from .prune import STRUCTURED, prune_, share_of
from .state import State
from .structured import gone_share

KINDS = ("one-shot", "linear", "cubic")


@dataclass
class Step:
    """One step of a schedule. `metric` and `kept` are known once the caller has fine-tuned."""

    number: int  # from 1
    amount: float  # what this step prunes to
    sparsity: float  # the share of the weights that linear layers and convolutions had which is now 0 or gone
    metric: float | None = None
    kept: bool = True  # False: the metric fell too far, and the model is that of the step before again


class PruneSchedule:
    """Prunes `model` in place step by step. Iterate over it and fine-tune in the body of the loop.

    A masked step of prune_ never revives a weight, so what the last step prunes includes all earlier ones.

    amount, options: as of prune_. steps: how many. kind: the amount of step i of n. "one-shot": all of it at
    the first step, the others only fine-tune. "linear": amount + (start - amount) * (1 - i/n). "cubic":
    amount + (start - amount) * (1 - i/n)^3, much at first and little at last (Zhu and Gupta 2017,
    arXiv:1710.01878). `start` is what the layers to prune have when the schedule is made, all of them
    together: the share of weights that are 0 or masked, of blocks that are so as a whole, of units that an
    earlier call took out; at most `amount`.
    fine_tune(model, step): what `run` calls in place of the loop's body.
    metric(model) -> number, higher is better: measured before the first step (`baseline`) and after the
    fine-tuning of each. With `tolerance`: a metric more than that below the baseline, or NaN, ends the
    schedule (`stopped`), and the model becomes what it was after the last good step: modules, values, masks
    and config; gradients go. A copy of all values is kept for that.

    `amounts` are those of the steps, `history` the steps that were made. A schedule runs once. A structured
    pattern shrinks the layers, so an optimizer has to be made anew in each step.

    Raises SchemeError and DTypeError for bad arguments, TypeError for options that prune_ lacks,
    NonFiniteError for a baseline of NaN, and what prune_ raises; the model is as it was before that step.
    """

    def __init__(
        self,
        model: nn.Module,
        amount: float | None = None,
        steps: int = 1,
        kind: str = "cubic",
        *,
        fine_tune: Callable[[nn.Module, Step], object] | None = None,
        metric: Callable[[nn.Module], float] | None = None,
        tolerance: float | None = None,
        **options: Any,
    ):
        check_module(model, "PruneSchedule")
        inspect.signature(prune_).bind(model, amount, **options)
        if kind not in KINDS:
            raise SchemeError(f"PruneSchedule: kind is {kind!r}; it must be one of: {', '.join(KINDS)}")
        if type(steps) is not int or steps < 1:
            raise DTypeError(f"PruneSchedule: steps must be a whole number above 0, not {steps!r}")
        if options.get("threshold") is not None:
            raise SchemeError("PruneSchedule: a schedule has amounts; a threshold is for prune_")
        if isinstance(options.get("data"), Iterator):
            raise DTypeError("PruneSchedule: each step reads data anew; pass a list and no iterator")
        pattern = options.get("pattern", "unstructured")
        parsed = Pattern("unstructured") if pattern in STRUCTURED else Pattern.parse(pattern)
        amount = parsed.check_amount(share_of(amount))
        if parsed.kind == "nm" and kind != "one-shot" and steps > 1:
            raise SchemeError(
                f'PruneSchedule: {parsed} has one amount, so it has no steps to it: use kind="one-shot"'
            )
        for name, function in (("fine_tune", fine_tune), ("metric", metric)):
            if function is not None and not callable(function):
                raise DTypeError(f"PruneSchedule: {name} must be a function, not {type(function).__name__}")
        if tolerance is not None and metric is None:
            raise DTypeError("PruneSchedule: a tolerance needs a metric that it is of")
        if tolerance is not None and not (isinstance(tolerance, Real) and tolerance >= 0):
            raise SchemeError(f"PruneSchedule: tolerance is {tolerance!r}; it must be a number of at least 0")
        self.model, self.options = model, options
        self.fine_tune, self.metric, self.tolerance = fine_tune, metric, tolerance
        self.start = min(_start(model, pattern, parsed, options), amount)
        self.amounts = tuple(_amount(kind, self.start, amount, i, steps) for i in range(1, steps + 1))
        self.baseline: float | None = None
        self.history: list[Step] = []
        self.stopped = False
        self._begun = False

    def __iter__(self) -> Iterator[Step]:
        """Prune, yield the step for the caller to fine-tune, measure; and so on."""
        if self._begun:
            raise ModelError("PruneSchedule: a schedule runs once; make another one")
        self._begun = True
        if self.metric is not None:
            self.baseline = self._measure()
            if self.tolerance is not None and math.isnan(self.baseline):
                raise NonFiniteError("PruneSchedule: the metric is NaN before anything is pruned")
        good = self._state()
        total = _weights(self.model)[1]
        for number, amount in enumerate(self.amounts, 1):
            if number == 1 or amount > self.amounts[number - 2]:
                prune_(self.model, amount, **self.options)
            step = Step(number, amount, 1 - _weights(self.model)[0] / total)
            self.history.append(step)
            yield step
            if self.metric is None:
                continue
            step.metric = self._measure()
            if self.tolerance is None or step.metric >= self.baseline - self.tolerance:
                good = self._state() if number < len(self.amounts) else None
                continue
            step.kept, self.stopped = False, True
            good.restore()
            return

    def run(self) -> nn.Module:
        """Go through all steps, calling fine_tune(model, step) in each; return the model."""
        if self.fine_tune is None:
            raise DTypeError("PruneSchedule: run needs fine_tune, called as fine_tune(model, step)")
        for step in self:
            self.fine_tune(self.model, step)
        return self.model

    def _measure(self) -> float:
        value = self.metric(self.model)
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            raise DTypeError(
                f"PruneSchedule: metric(model) must return a number, not {type(value).__name__}"
            ) from None

    def _state(self) -> State | None:
        return State(self.model, values=True) if self.tolerance is not None else None


def _weights(model: nn.Module) -> tuple[int, int]:
    """Of the linear layers and convolutions: how many weights are not 0, and how many there are."""
    layers = [m for m in model.modules() if is_linear(m) or isinstance(m, nn.Linear | _ConvNd)]
    weights = [float_weight(module) for module in layers]
    return sum(int(w.count_nonzero()) for w in weights), sum(w.numel() for w in weights)


def _start(model: nn.Module, pattern: object, parsed: Pattern, options: dict[str, Any]) -> float:
    """The share that the layers to prune have of what `amount` counts: zeros, blocks of them, units gone."""
    choice = Choice(options.get("include"), options.get("exclude"))
    if pattern in STRUCTURED:
        return gone_share(model, pattern, choice)
    layers, _ = find(model, choice, parsed, updates=options.get("method") == "sparsegpt")
    units = [parsed.units(layer.rank(torch.ones_like(layer.weight))) for layer in layers]
    return sum(int((u < 0).sum()) for u in units) / max(sum(u.numel() for u in units), 1)


def _amount(kind: str, start: float, amount: float, i: int, steps: int) -> float:
    if kind == "one-shot" or i == steps:
        return amount
    left = 1 - i / steps
    return amount + (start - amount) * (left if kind == "linear" else math.pow(left, 3))
