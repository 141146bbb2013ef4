"""prune_: masks on the linear layers of a model, by a method, in a pattern, for a share of zeros."""

from __future__ import annotations

import contextlib
import difflib
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DTypeError, ModelError, SchemeError
from ..modules import check_module
from ..rules import Patterns
from ..sparse.pattern import Pattern, count_of, lowest
from . import scores
from .inputs import Forward, batches_of, call, evaluation, input_norms
from .layers import Choice, Layer, dense_row, find, names_of
from .masks import put
from .scores import LossFunction
from .sparsegpt import prune_layers
from .state import State

METHODS = ("magnitude", "random", "taylor", "wanda", "sparsegpt")
STRUCTURED = ("neuron", "head", "channel")
SCOPES = ("layer", "global")


def share_of(amount: object) -> object:
    """`amount` with numbers of all kinds as floats; what is no number is left to Pattern.check_amount.

    Raises DTypeError for whole numbers above 0, which torch.nn.utils.prune takes as numbers of weights.
    """
    if isinstance(amount, bool) or not isinstance(amount, Real):
        return amount
    if isinstance(amount, Integral) and amount > 0:
        raise DTypeError(
            f"prune_: amount is the integer {amount}; it must be a share: 1.0 prunes everything; torch's "
            "integer amounts, a number of weights, are not taken"
        )
    return float(amount)


def prune_(
    model: nn.Module,
    amount: float | None = None,
    *,
    method: str = "magnitude",
    pattern: str | Pattern = "unstructured",
    scope: str = "layer",
    data: Iterable | None = None,
    loss_fn: LossFunction | None = None,
    forward: Forward | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    threshold: float | None = None,
    seed: int = 0,
    norm: float | None = None,
    criterion: str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Prune linear layers of `model` (nn.Linear, not its subclasses, and Conv1D), in place; return the model.

    Masks are those of torch.nn.utils.prune: a parameter `weight_orig`, which optimizers go on training, a
    buffer `weight_mask`, and a hook that multiplies them. `remove_masks_` makes them permanent. What is
    masked already, by whomever, stays so.

    amount: the share of zeros to reach, 0.0 to 1.0, what was masked before and zeros included. Exactly
    floor(amount * weights) are masked, or floor(amount * blocks) blocks, in each layer or, with scope
    "global", in all together; of equal scores the first go. N:M has one amount, 1 - N/M: None is enough.
    threshold (magnitude, unstructured): instead of an amount; a weight stays if and only if |w| > threshold.

    method: "magnitude", |w|. "random", by `seed`. "taylor", |w * dL/dw|, mean over batches, in the
    manner of Molchanov et al. (2017), for weights. "wanda", |w| times the norm of the input feature (Sun et
    al. 2023); unstructured, it compares within each row, each of which loses the same share, +-1 weight.
    "sparsegpt" (Frantar and Alistarh 2023): also updates the weights that stay, layer after layer. Blocks go
    by the sum of their weights' scores, which are squared for magnitude and sparsegpt.
    pattern: "unstructured", N:M, blockRxC, and those that make layers smaller instead of masking them:
    "neuron", "head", "channel", with the methods "ln_structured" (norm: p of the norm, 2 by default),
    "activation" (criterion: "mean" or "apoz"), "magnitude", "taylor" and "random".
    data: batches, for taylor, wanda, sparsegpt and activation. The model is called with each, a mapping as
    keyword arguments, a tuple or list as positional ones; or forward(model, batch) is. sparsegpt reads them
    several times, from a list that is made. loss_fn(model, batch) -> scalar: for taylor, instead of a call.
    All run in evaluation mode.
    include, exclude: as in quantize_. Output heads (get_output_embeddings() of transformers' models, layers
    called lm_head, score, classifier or qa_outputs, and layers that share a weight with something that is not
    pruned) stay dense unless `include` asks for them. Layers smaller than one block or group stay dense.
    Layers that share a weight share its mask.

    `model._halfbyte_pruning` lists, per layer: name, shape, action ("pruned" or "dense"), reason, and for
    the pruned ones pattern, method and amount (the share that is masked). An error, and Ctrl-C, leaves the
    model as it was. Modes, hooks, gradients and torch's generator of the CPU are never changed.

    Raises SchemeError (pattern, method, scope, amount), DTypeError (arguments, missing data or loss_fn,
    dtype of a weight), ModelError (nothing to prune, a quantized model, data that reaches no layer),
    NonFiniteError, ShapeError, DeviceError, each naming the layer.
    """
    check_module(model, "prune_")
    amount = share_of(amount)
    if pattern in STRUCTURED:
        from .structured import prune_structured_

        amount = Pattern("unstructured").check_amount(amount)
        if threshold is not None:
            raise SchemeError(f"prune_: a threshold is for single weights, not for the pattern {pattern!r}")
        return prune_structured_(
            model, amount, method, pattern, scope, data, loss_fn, include, exclude,
            forward=forward, seed=seed, progress=progress, norm=norm, criterion=criterion,
        )  # fmt: skip
    if norm is not None or criterion is not None:
        raise DTypeError(f"prune_: norm and criterion are for the patterns {', '.join(STRUCTURED)}")
    request = _Request.checked(amount, method, pattern, scope, threshold)
    source = _Source(data, loss_fn, forward or call, seed, progress)
    source.check(method)
    choice = Choice(include, exclude)
    layers, report = find(model, choice, request.pattern, updates=method == "sparsegpt")
    if (names := names_of(model)) and (idle := choice.idle(names)):
        warnings.warn(f"prune_: no layer has a name that fits {', '.join(idle)}", stacklevel=2)
    if not layers:
        reasons = [f"{row['name'] or 'the model itself'}: {row['reason']}" for row in report]
        raise ModelError(
            f"nothing to prune in this {type(model).__name__}: "
            + ("; ".join(reasons[:8]) or "it has no nn.Linear and no Conv1D")
        )
    with _undone_on_error(model, layers, values=method == "sparsegpt"):
        keep = _keep(model, layers, request, source)
        missed = [layer.name for layer in layers if layer.name not in keep]
        for layer in layers:
            if layer.name in keep:
                put(layer, keep[layer.name])
            report += _rows(layer, request, reached=layer.name in keep)
        model._halfbyte_pruning = report
    if missed:
        warnings.warn(f"prune_: data did not reach {', '.join(missed)}; they stay as they were", stacklevel=2)
    return model


@dataclass(frozen=True)
class _Request:
    """What to reach, checked."""

    amount: float
    method: str
    pattern: Pattern
    scope: str
    threshold: float | None

    @classmethod
    def checked(
        cls, amount: float | None, method: str, pattern: str | Pattern, scope: str, threshold: float | None
    ) -> _Request:
        if method not in METHODS:
            near = difflib.get_close_matches(str(method), METHODS, 1, 0)
            raise SchemeError(
                f"prune_: no method that masks weights is called {method!r}; the nearest is {near[0]} of "
                f"{', '.join(METHODS)}"
            )
        if scope not in SCOPES:
            raise SchemeError(f"prune_: scope is {scope!r}; it must be one of: {', '.join(SCOPES)}")
        try:
            pattern = Pattern.parse(pattern)
        except SchemeError as error:
            raise SchemeError(f"{error}; prune_ also takes {', '.join(STRUCTURED)}") from None
        if method == "sparsegpt" and scope == "global":
            raise SchemeError(
                'prune_: sparsegpt updates each layer as it prunes it, so it has scope="layer" only'
            )
        if threshold is None:
            return cls(pattern.check_amount(amount), method, pattern, scope, None)
        if amount is not None or method != "magnitude" or pattern.kind != "unstructured":
            raise SchemeError(
                "prune_: threshold is for method magnitude and the pattern unstructured, without an amount"
            )
        if isinstance(threshold, bool) or not isinstance(threshold, Real):
            raise DTypeError(f"prune_: threshold must be a number, not {type(threshold).__name__}")
        if not (math.isfinite(threshold) and threshold >= 0):
            raise SchemeError(f"prune_: threshold is {threshold}; it must be finite and at least 0")
        return cls(0.0, method, pattern, scope, float(threshold))


@dataclass(frozen=True)
class _Source:
    """What a method learns from."""

    data: Iterable | None
    loss_fn: LossFunction | None
    forward: Forward
    seed: int
    progress: bool

    def check(self, method: str) -> None:
        """DTypeError for what the method lacks."""
        if method in ("taylor", "wanda", "sparsegpt"):
            self.batches(method)
        if method == "taylor" and not callable(self.loss_fn):
            raise DTypeError("prune_: method 'taylor' needs loss_fn, called as loss_fn(model, batch)")
        if not callable(self.forward):
            raise DTypeError("prune_: forward must be called as forward(model, batch)")

    def batches(self, method: str) -> Iterable:
        return batches_of(self.data, method, self.progress)


@contextlib.contextmanager
def _undone_on_error(model: nn.Module, layers: list[Layer], values: bool) -> Iterable[None]:
    """Bring back the modules, and the `values` of the layers' weights, when the block raises."""
    before = State(model, values=False)
    kept = [(layer.parameter, layer.parameter.detach().clone()) for layer in layers] if values else []
    try:
        yield
    except BaseException:
        before.restore()
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        raise


def _keep(model: nn.Module, layers: list[Layer], request: _Request, source: _Source) -> dict[str, Tensor]:
    """The weights to keep, bool [n, k], by layer; without the layers that data did not reach."""
    if request.threshold is not None:
        return {layer.name: layer.weight.abs() > request.threshold for layer in layers}
    pattern, amount = request.pattern, request.amount
    if request.method == "sparsegpt":
        with evaluation(model):
            batches = list(source.data)
            return prune_layers(model, layers, pattern, amount, batches, source.forward, source.progress)
    score = _scorer(model, layers, request, source)
    if request.scope == "global" and pattern.kind != "nm":
        ranked = {layer.name: layer.rank(s) for layer in layers if (s := score(layer)) is not None}
        return _select_global(ranked, pattern, amount)
    per_row = request.method == "wanda"
    return {
        layer.name: pattern.select(layer.rank(s), amount, per_row=per_row)
        for layer in layers
        if (s := score(layer)) is not None
    }


def _scorer(
    model: nn.Module, layers: list[Layer], request: _Request, source: _Source
) -> Callable[[Layer], Tensor | None]:
    """The scores [n, k] of a layer, by the method; None of one that data did not reach."""
    if request.method == "magnitude":
        return lambda layer: scores.magnitude(layer, request.pattern)
    if request.method == "random":
        generator = torch.Generator().manual_seed(source.seed)
        return lambda layer: scores.random(layer, request.pattern, generator)
    with evaluation(model):
        batches = source.batches(request.method)
        if request.method == "taylor":
            found = scores.taylor(model, layers, batches, source.loss_fn)
            return lambda layer: found.get(layer.name)
        norms = input_norms(model, layers, batches, source.forward)
    return lambda layer: scores.wanda(layer, norms[layer.name]) if layer.name in norms else None


def _select_global(ranked: dict[str, Tensor], pattern: Pattern, amount: float) -> dict[str, Tensor]:
    """As Pattern.select, over the units of all layers together."""
    units = {name: pattern.units(scores) for name, scores in ranked.items()}
    together = torch.cat([u.flatten().cpu() for u in units.values()])
    gone = lowest(together, count_of(amount, together.numel()))
    parts = gone.split([u.numel() for u in units.values()])
    return {
        name: pattern.expand(~part.reshape(u.shape).to(u.device), ranked[name].shape)
        for (name, u), part in zip(units.items(), parts, strict=True)
    }


def _rows(layer: Layer, request: _Request, reached: bool) -> list[dict[str, Any]]:
    """Rows of the report on a layer, and on those that share its weight."""
    if not reached:
        places = zip(layer.names, layer.modules, strict=True)
        return [dense_row(name, module, "data did not reach it") for name, module in places]
    share = 1 - float(layer.mask.mean(dtype=torch.float64))
    same = {"shape": layer.shape, "action": "pruned", "reason": "", "pattern": str(request.pattern)}
    same |= {"method": request.method, "amount": share}
    ties = [{}, *({"tied_to": layer.name} for _ in layer.names[1:])]
    return [{"name": name} | same | tie for name, tie in zip(layer.names, ties, strict=True)]
