"""`profile`: calls a model as it is and recorded, in turns, and makes rows of what was recorded."""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce

import torch
from torch import nn

from ..bench.engine import progress
from ..dispatch import get_num_threads
from ..fuse.attach import Fused, fused_of
from ..modules import check_module
from ..timing import caller, evaluation
from .account import BETWEEN, Account, Key, Names, Sum
from .limits import Limits, least_time
from .record import Recorder
from .result import FusedModule, Profile, Row
from .trace import trace_events


def profile(
    model: nn.Module, inputs: object, *, rounds: int = 5, warmup: int = 2, ceilings: bool = True
) -> Profile:
    """Time of each layer and of each phase of fused blocks, with GOP/s, GB/s and how near that is to what the
    machine can do. Print it, or use `rows`, `to_json()`, `to_chrome_trace(path)` and `plot(path)`.

    inputs: what `model` is called with: a tensor, a tuple or list of positional arguments, or a mapping of
    keyword arguments. Or a function without arguments that calls the model as often as it likes, such as
    `lambda: model.generate(ids)`: then "a call" is one of that function. Calls are made in evaluation mode
    without gradients: `warmup` of them, then in each round one as it is and one recorded.
    ceilings: also sample the peaks and read bandwidths of this machine, some 0.1 s a round; one more call
    after that brings the caches back.

    Times of rows are means over the middle half of the recorded calls, so that they add up. The model is
    left as it was, and what it raises is passed on. Raises DTypeError where `model` is no module.
    """
    check_module(model, "profile")
    for name, value in (("rounds", rounds), ("warmup", warmup)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"profile: {name} is {value!r}; it must be a whole number of at least 1")
    call = caller(model, inputs)
    taken = [(name, module, fused) for name, module in model.named_modules() if (fused := fused_of(module))]
    before = {fused: (fused.calls, Counter(fused.unfused)) for _, _, fused in taken}
    names = Names(model)
    with evaluation(model), torch.no_grad(), _without_gc():
        for _ in range(warmup):
            call()
        unfused = {fused for fused, (calls, _) in before.items() if fused.calls == calls}
        # A function may call the parts of a model; generate does, and refuses hooks that would not run.
        recorder = Recorder(model, unfused, alone=call is inputs)
        limits = _limits(recorder, call, names) if ceilings else None
        plain, accounts = [], []
        for index in range(rounds):
            progress(f"profile: round {index + 1}/{rounds}")
            if limits:
                limits.sample()
                call()
            start = time.perf_counter()
            call()
            plain.append((time.perf_counter() - start) * 1e3)
            accounts.append(_recorded(recorder, call, names))
        progress("")
    rates = limits.rates() if limits else {}
    sorted_ = sorted(accounts, key=lambda account: account.total)
    rows = _rows(sorted_[rounds // 4 : rounds - rounds // 4], rates)
    return Profile(
        model=type(model).__name__,
        rows=tuple(row for row in rows if row.op != BETWEEN),
        between=tuple(row for row in rows if row.op == BETWEEN),
        total_ms=sum(row.ms for row in rows),
        plain_ms=statistics.median(plain),
        recorded_ms=tuple(account.total / 1e6 for account in accounts),
        threads=get_num_threads(),
        fused=tuple(_fused(name, module, fused, *before[fused]) for name, module, fused in taken),
        ceilings=rates,
        trace=trace_events(type(model).__name__, sorted_[(rounds - 1) // 2], names),
    )


def _recorded(recorder: Recorder, call: Callable[[], object], names: Names) -> Account:
    with recorder.attached():
        spans = recorder.call(call)
    return Account(spans, names)


def _limits(recorder: Recorder, call: Callable[[], object], names: Names) -> Limits:
    """Of what a call does, which one that is recorded shows."""
    sums = _recorded(recorder, call, names).sums.values()
    return Limits({unit for found in sums for unit in found.work.units}, get_num_threads())


def _rows(accounts: list[Account], rates: Mapping[str, float]) -> list[Row]:
    """Means over the accounts, in the order of the first."""
    sums: dict[Key, list[Sum]] = {}
    for account in accounts:
        start = account.spans[0].begin
        for key, found in sorted(account.sums.items(), key=lambda item: item[1].begin - start):
            sums.setdefault(key, []).append(found)
    merged = {key: reduce(Sum.__add__, found).scaled(1 / len(accounts)) for key, found in sums.items()}
    in_play = sum(found.work.weight_bytes / found.calls for found in merged.values() if found.calls)
    rows = []
    for key, found in merged.items():
        least, bound = least_time(found.work, found.calls, in_play, rates)
        idle = None if found.idle is None else found.idle / 1e6
        row = Row(
            key.layer, key.phase, *key.part, found.calls, found.time / 1e6, idle,
            found.work.operations, found.work.bytes, least, bound,
        )  # fmt: skip
        rows.append(row)
    return rows


def _fused(name: str, module: nn.Module, fused: Fused, calls: int, unfused: Counter[str]) -> FusedModule:
    reasons = dict(Counter(fused.unfused) - unfused)
    return FusedModule(name or type(module).__name__, fused.kind, fused.what, fused.calls - calls, reasons)


@contextmanager
def _without_gc() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
