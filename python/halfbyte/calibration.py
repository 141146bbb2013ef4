"""Static activation scales: watch what quantized layers are fed, then fix one scale and zero point each.

The three observers: the extremes; the central part of the values (percentile); the range whose rounding and
clipping error over the values seen is least (mean squared error).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ModelError, NonFiniteError
from .modules import check_module
from .packed_layer import INPUT_BUFFERS, PackedLayer, held
from .quantize import TINY


@contextmanager
def calibrate(model: nn.Module, observer: str = "minmax", percentile: float = 99.99) -> Iterator[nn.Module]:
    """Run typical inputs through `model` within the block; at its end every QLinear that ran becomes static,
    and every SparseLinear of int8 weights.

    A static layer quantizes all inputs with one scale and zero point, which saves the pass that finds them
    per token and costs accuracy where tokens differ. Within the block layers are dynamic. Layers whose scheme
    scales activations per group of features (a16, +ag) or takes floats (sparse f32, bf16) are left out.

    observer: "minmax", "percentile" (the range that holds the central `percentile` percent of the values), or
    "mse" (the range of least squared error). Clipping hurts models with outlier features, as transformers
    have: compare before you choose. Layers that did not run keep what they had, and are named in a warning;
    after an exception, every layer does.

    Raises ModelError for a model without a layer that can become static, ValueError for an unknown observer
    or percentile, NonFiniteError naming the layer when an input holds a NaN or an infinity.
    """
    check_module(model, "calibrate")
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    if not quantized:
        raise ModelError(
            f"this {type(model).__name__} has no quantized layer to calibrate; call halfbyte.quantize_ first"
        )
    layers = {name: module for name, module in quantized.items() if module.scheme.per_token}
    if not layers:
        schemes = ", ".join(sorted({str(module.scheme) for module in quantized.values()}))
        raise ModelError(
            f"the layers of this {type(model).__name__} have the scheme {schemes}, whose activations have no "
            "scale per token but scales per group of features, or none: there is nothing to calibrate"
        )
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; it must be above 0 and at most 100")
    observers = {name: _observer(observer, percentile) for name in layers}
    before = {name: (layer.input_scale, layer.input_zero) for name, layer in layers.items()}
    hooks = []
    done = False
    try:
        for name, layer in layers.items():
            layer.static = None
            watch = partial(_watch, observers[name], name)
            hooks.append(layer.register_forward_pre_hook(watch, with_kwargs=True))
        yield model
        found = {name: static_range(*watch.range()) for name, watch in observers.items() if watch.seen}
        done = True
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            held(layer).update(zip(INPUT_BUFFERS, before[name], strict=True))
            if done and name in found:
                layer.static = found[name]
    if idle := [name or "the model itself" for name in layers if name not in found]:
        warnings.warn(f"calibrate: no input reached {', '.join(idle)}; they stay as they were", stacklevel=3)


def decalibrate_(model: nn.Module) -> nn.Module:
    """Make every layer of `model` dynamic again, in place: a scale and zero point per token. Returns the
    model.
    """
    check_module(model, "decalibrate_")
    for module in model.modules():
        if isinstance(module, PackedLayer):
            module.static = None
    return model


def static_range(low: float, high: float) -> tuple[float, int]:
    """(scale, zero) of asymmetric int8 codes for values from low to high, widened to hold 0; in float32, as
    the op does.
    """
    low, high = min(np.float32(low), np.float32(0)), max(np.float32(high), np.float32(0))
    scale = high / np.float32(255) - low / np.float32(255)
    if scale < TINY:
        return 1.0, 0
    zero = np.clip(np.rint(-(low * (np.float32(1) / scale))) - 128, -128, 127)
    return float(scale), int(zero)


def _watch(observer: _MinMax, name: str, layer: PackedLayer, args: tuple, kwargs: dict) -> None:
    x = args[0] if args else kwargs.get("x")
    if not isinstance(x, Tensor) or x.numel() == 0:  # the layer itself explains what is wrong with it
        return
    x = x.detach().float()
    low, high = (bound.item() for bound in torch.aminmax(x))
    if not np.isfinite([low, high]).all():
        raise NonFiniteError(f"calibrate: the input of {name or 'the model'} holds a NaN or an infinity")
    observer.add(x, low, high)


def _observer(name: str, percentile: float) -> _MinMax:
    if name == "minmax":
        return _MinMax()
    if name == "percentile":
        return _Percentile(percentile)
    if name == "mse":
        return _LeastSquares()
    raise ValueError(f"observer {name!r} is none of: minmax, percentile, mse")


class _MinMax:
    """The smallest and the largest value seen."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.seen = False

    def add(self, x: Tensor, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.seen = True

    def range(self) -> tuple[float, float]:
        return self.low, self.high


class _Histogram(_MinMax):
    """Counts in equal bins from -limit to limit. The limit doubles as larger values come: bins then merge in
    pairs.
    """

    BINS = 8192  # at least 16 bins per code, so that the place of a value in its bin does not matter

    def __init__(self) -> None:
        super().__init__()
        self.limit = TINY
        self.counts = np.zeros(self.BINS)

    def add(self, x: Tensor, low: float, high: float) -> None:
        super().add(x, low, high)
        while self.limit < max(-low, high):
            self.limit *= 2
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), self.BINS // 4)
        x = x.double() if self.limit > 2.0**126 else x  # a range of float32 bounds must be a float32 itself
        self.counts += torch.histc(x, self.BINS, -self.limit, self.limit).double().cpu().numpy()

    def edges(self) -> np.ndarray:
        return np.linspace(-self.limit, self.limit, self.BINS + 1)


class _Percentile(_Histogram):
    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.tail = (100 - percentile) / 200

    def range(self) -> tuple[float, float]:
        share = np.concatenate([[0], np.cumsum(self.counts)]) / self.counts.sum()
        low, high = np.interp([self.tail, 1 - self.tail], share, self.edges())
        return max(low, self.low), min(high, self.high)


class _LeastSquares(_Histogram):
    """Clips either end by factors 2^(-i/8) in turn, twice, and keeps what lowers the squared error."""

    FACTORS = 2.0 ** (-np.arange(1, 41) / 8)

    def range(self) -> tuple[float, float]:
        edges = self.edges()
        used = self.counts > 0
        values, counts = (edges[:-1] + edges[1:])[used] / 2, self.counts[used]

        def error(bounds: tuple[float, float]) -> float:
            scale, zero = static_range(*bounds)
            codes = np.clip(np.rint(values / scale) + zero, -128, 127)
            return float(counts @ ((codes - zero) * scale - values) ** 2)

        best = self.low, self.high
        for _ in range(2):
            best = min([best, *((best[0], self.high * f) for f in self.FACTORS)], key=error)
            best = min([best, *((self.low * f, best[1]) for f in self.FACTORS)], key=error)
        return best
