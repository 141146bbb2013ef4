"""Timing calls against each other, and calling a model as for that."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

# Interleaved rounds of about this long: a layer costs some 30 ms, a model of a hundred layers a few seconds.
_ROUNDS = 7
_ROUND_SECONDS = 0.002


def interleaved(calls: list[Callable[[], object]], device: torch.device | None = None) -> list[float]:
    """Median milliseconds of each call over rounds in which they take turns. device: where they compute; what
    they have put on the queue of a GPU is waited for at the end of their turn.
    """
    wait = partial(torch.cuda.synchronize, device) if device and device.type == "cuda" else _nothing
    counts = []
    for call in calls:
        call()
        wait()
        start = time.perf_counter()
        call()
        wait()
        counts.append(max(1, round(_ROUND_SECONDS / max(time.perf_counter() - start, 1e-7))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for call, count, column in zip(calls, counts, samples, strict=True):
            call()  # untimed: refills the caches after the other contestant
            wait()
            start = time.perf_counter()
            for _ in range(count):
                call()
            wait()
            column.append((time.perf_counter() - start) / count * 1e3)
    return [statistics.median(column) for column in samples]


def _nothing() -> None:
    pass


@contextlib.contextmanager
def evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Within the block all modules are in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def caller(model: torch.nn.Module, inputs: object) -> Callable[[], object]:
    """A call of the model with inputs: a tensor, a tuple or list of positional arguments, or a mapping of
    keyword arguments; or a function without arguments, which is that call.
    """
    if isinstance(inputs, Mapping):
        return partial(model, **inputs)
    if isinstance(inputs, (tuple, list)):
        return partial(model, *inputs)
    if callable(inputs) and not isinstance(inputs, torch.Tensor):
        return inputs
    return partial(model, inputs)
