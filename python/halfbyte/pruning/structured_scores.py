"""How much each unit matters: by its weights, its outputs on data, the loss without it, or by chance."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DeviceError, DTypeError, ModelError, NonFiniteError, SchemeError
from ..modules import join
from .inputs import Forward, batches_of, evaluation, watching
from .scores import LossFunction, _check_loss
from .structured_units import Group, Part

METHODS = ("magnitude", "ln_structured", "activation", "taylor", "random")
DRIVEN = ("activation", "taylor")  # by data
CRITERIA = ("mean", "apoz")


@dataclass(frozen=True)
class Measure:
    """How units are scored, and on what. Raises SchemeError for what there is not, DTypeError for what is
    missing or of another type.
    """

    method: str
    norm: float | None  # the p of the Lp norm of ln_structured; None: 2
    criterion: str | None  # of activation; None: "mean"
    data: object
    loss_fn: LossFunction | None
    forward: Forward
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SchemeError(
                f"prune_: method {self.method!r} does not score whole units; those that do are: "
                f"{', '.join(METHODS)}"
            )
        for option, value, method in (
            ("norm", self.norm, METHODS[1]),
            ("criterion", self.criterion, METHODS[2]),
        ):
            if value is not None and self.method != method:
                raise SchemeError(f"prune_: {option} is for method {method!r}, not for {self.method!r}")
        norm = 2 if self.norm is None else self.norm
        if isinstance(norm, bool) or not isinstance(norm, (int, float)) or norm != norm:
            raise DTypeError(f"prune_: norm must be a number, the p of the Lp norm, not {norm!r}")
        if self.criterion not in (None, *CRITERIA):
            raise SchemeError(
                f"prune_: no criterion is called {self.criterion!r}; there are: {', '.join(CRITERIA)}"
            )
        if self.method == "taylor" and not callable(self.loss_fn):
            raise DTypeError("prune_: method 'taylor' needs loss_fn, called as loss_fn(model, batch)")
        if not callable(self.forward):
            raise DTypeError("prune_: forward must be called as forward(model, batch)")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise DTypeError(f"prune_: seed must be an integer, not {self.seed!r}")
        if self.method in DRIVEN:
            batches_of(self.data, self.method, False)

    def batches(self) -> Iterable:
        return batches_of(self.data, self.method, self.progress)


def score(model: nn.Module, groups: list[Group], measure: Measure) -> list[Tensor]:
    """Of each group the scores of its units, float64 [units] on the CPU: those of the lowest go first.

    Raises DeviceError, NonFiniteError and ModelError, which name the layer.
    """
    for part in (part for group in groups for part in group.parts()):
        if part.value.is_meta:
            raise DeviceError(
                f"prune_: {join(part.name, part.tensor)} is on the meta device, without data; "
                "load its values first"
            )
    if measure.method == "random":
        generator = torch.Generator().manual_seed(measure.seed)
        return [torch.rand(g.units, generator=generator, dtype=torch.float64) for g in groups]
    if measure.method in DRIVEN:
        with evaluation(model), _plain(model):
            scores = (_activations if measure.method == "activation" else _taylor)(model, groups, measure)
    else:
        scores = [_norms(group, 2 if measure.norm is None else measure.norm) for group in groups]
    scores = [values.double().cpu() for values in scores]
    for group, values in zip(groups, scores, strict=True):
        if not values.isfinite().all():
            unit = int((~values.isfinite()).to(torch.uint8).argmax())
            raise NonFiniteError(
                f"prune_: the scores of {group.name} hold a NaN or an infinity at unit {unit}"
            )
    return scores


def _rows(part: Part, value: Tensor) -> Tensor:
    """What belongs to each unit, [units, n]."""
    positions = part.positions.to(value.device)
    return value.movedim(part.axis, 0)[positions].reshape(len(positions), -1)


def _norms(group: Group, norm: float) -> Tensor:
    rows = torch.cat([_rows(part, part.value.detach()).double() for part in group.made_by], 1)
    return torch.linalg.vector_norm(rows, norm, dim=1)


def _activations(model: nn.Module, groups: list[Group], measure: Measure) -> list[Tensor]:
    """The mean of |a|, or the share of a != 0, at the input of the layer that uses the units."""
    group_of = {group.used_by.module: group for group in groups}
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}

    def see(module: nn.Module, x: Tensor) -> None:
        part = group_of[module].used_by
        features = len(part.positions) * part.positions.shape[1]
        dim = x.ndim - 1 if module.weight.ndim == 2 else x.ndim + 1 - module.weight.ndim
        if x.shape[dim] != features:
            return  # the layer itself explains what is wrong
        values = x.movedim(dim, 0).reshape(features, -1)
        values = values.abs().double() if measure.criterion != "apoz" else (values != 0).double()
        per_unit = values.sum(1)[part.positions.to(x.device)].sum(1)
        sums[module] = sums[module] + per_unit if module in sums else per_unit
        counts[module] = counts.get(module, 0) + x.numel() // len(per_unit)

    seen = 0
    with watching(group_of, see), torch.no_grad():
        for batch in measure.batches():
            measure.forward(model, batch)
            seen += 1
    _check_seen(seen, [group.name for module, group in group_of.items() if module not in sums], "activation")
    return [sums[group.used_by.module] / counts[group.used_by.module] for group in groups]


def _taylor(model: nn.Module, groups: list[Group], measure: Measure) -> list[Tensor]:
    """The sum over a unit's weights of the mean of |w * dL/dw|."""
    parts = [part for group in groups for part in group.made_by]
    weights = [part.value for part in parts]
    asked = [weight.requires_grad for weight in weights]
    sums: list[Tensor | None] = [None] * len(parts)
    seen = 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in measure.batches():
            with torch.inference_mode(False), torch.enable_grad():
                loss = _check_loss(measure.loss_fn(model, batch), seen)
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for i, (part, weight, gradient) in enumerate(zip(parts, weights, gradients, strict=True)):
                if gradient is not None:
                    # The product in double: of bfloat16 numbers it would lose half of the little that it has.
                    added = _rows(part, weight.detach().double() * gradient.double()).abs().sum(1)
                    sums[i] = added if sums[i] is None else sums[i] + added
            seen += 1
    finally:
        for weight, wanted in zip(weights, asked, strict=True):
            weight.requires_grad_(wanted)
    _check_seen(seen, [p.name for p, total in zip(parts, sums, strict=True) if total is None], "taylor")
    found = iter(sums)
    return [sum(next(found) for _ in group.made_by) / seen for group in groups]


def _check_seen(batches: int, unseen: list[str], method: str) -> None:
    if not batches:
        raise ModelError(f"prune_: data has no batches; method {method!r} needs at least one")
    if unseen:
        raise ModelError(
            f"prune_: no batch of data reached {', '.join(unseen[:8])}, so that method {method!r} cannot "
            "score them; exclude them, or give data that does"
        )


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Within the block no fused forward stands in the place of the layers' own: halfbyte's, or torch's fast
    path of encoder layers, which does not call them.
    """
    attach = sys.modules.get("halfbyte.fuse.attach")
    fused = {m: f for m in model.modules() if attach is not None and (f := attach.fused_of(m)) is not None}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in fused:
            attach.detach(module)
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, forward in fused.items():
            attach.attach(module, forward)
