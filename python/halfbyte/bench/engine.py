"""Interleaved measurement: every contestant and every ceiling is sampled once in each of many rounds."""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# A contestant's worker threads spin after its last call: libgomp's for about a millisecond, onnxruntime's for
# up to tens of milliseconds. On a machine with few cores they would take a core from whoever is measured
# next, so the engine idles after each sample until the process uses less than a tenth of a core, or this long
# at the most.
_SETTLE_SLICE_S = 0.002
_SETTLE_LIMIT_S = 0.15
_SETTLE_BUSY = 0.1


class Sampler(Protocol):
    """Something that yields one number per round."""

    name: str

    def sample(self) -> float: ...


@dataclass
class Timed:
    """Seconds per call of `calls`, used in turn (several calls = several weight copies, for cold caches).

    elsewhere: makes that many of the calls in another process, and gives the seconds that they took there.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    round_seconds: float
    warm_calls: int
    inner: int = 1
    elsewhere: Callable[[int], float] | None = None
    _cycle: itertools.cycle = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._cycle = itertools.cycle(self.calls)
        settle()  # what was built and called before this contestant may still spin
        self.inner = max(1, round(self.round_seconds / self._estimate()))

    def _seconds(self, count: int) -> float:
        """Of the next `count` calls together."""
        if self.elsewhere:
            return self.elsewhere(count)
        batch = list(itertools.islice(self._cycle, count))
        start = time.perf_counter()
        for call in batch:
            call()
        return time.perf_counter() - start

    def _fastest(self, count: int) -> float:
        """Seconds of the fastest of the next `count` calls; of those made elsewhere the mean."""
        if self.elsewhere:
            return self.elsewhere(count) / count
        return min(self._seconds(1) for _ in range(count))

    def _estimate(self) -> float:
        """Seconds per call after warm-up: the fastest of as many as fit a round, at least four of each.

        The fastest, because a first call packs weights and starts threads, and one stall of some milliseconds
        would leave a round with a single call.
        """
        best, start = float("inf"), time.perf_counter()
        for count in itertools.count(1):
            best = min(best, self._fastest(1))
            if count >= 4 * len(self.calls) and time.perf_counter() - start > self.round_seconds:
                return max(best, 1e-9)

    def sample(self) -> float:
        # Untimed calls first, as many as will be timed but at most 32: they wake this contestant's threads
        # and, where the weights fit, refill the caches that the previous contestant emptied. A last-level
        # cache that takes what L2 evicts needs some ten passes over a 16 MB weight for that.
        best = self._fastest(max(self.warm_calls, min(self.inner, 32)))
        # The estimate was too high if other threads were still spinning then: 20 times on a call of 0.2 ms.
        self.inner = max(self.inner, round(self.round_seconds / best))
        return self._seconds(self.inner) / self.inner


@dataclass
class Ceiling:
    """A rate that the machine reaches, from one short run of `measure`."""

    name: str
    measure: Callable[[], float]

    def sample(self) -> float:
        return self.measure()


def run_rounds(samplers: Sequence[Sampler], rounds: int, label: str = "") -> dict[str, list[float]]:
    """`rounds` samples of every sampler, round-robin; the first one moves on by one in each round.

    Returns name -> samples, index = round.
    """
    samples: dict[str, list[float]] = {s.name: [] for s in samplers}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds):
            progress(f"{label}: round {index + 1}/{rounds}")
            shift = index % len(samplers)
            for sampler in [*samplers[shift:], *samplers[:shift]]:
                samples[sampler.name].append(sampler.sample())
                settle()
    finally:
        if collecting:
            gc.enable()
        progress("")
    return samples


def settle() -> None:
    """Sleep until the threads of this process have gone quiet (see the constants above)."""
    deadline = time.perf_counter() + _SETTLE_LIMIT_S
    while time.perf_counter() < deadline:
        wall, used = time.perf_counter(), time.process_time()
        time.sleep(_SETTLE_SLICE_S)
        if time.process_time() - used < _SETTLE_BUSY * (time.perf_counter() - wall):
            return


def fastest(variants: dict[str, Callable[[], object]], seconds: float = 0.03) -> str:
    """Name of the variant with the smallest best time, for tools that have several engines for one job."""
    best = dict.fromkeys(variants, float("inf"))
    for name, call in list(variants.items()) * 3:
        call()
        start = time.perf_counter()
        while time.perf_counter() - start < seconds / 3:
            begin = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begin)
        settle()
    return min(best, key=best.__getitem__)


def median_of_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of numerator/denominator: a clock that drifts between rounds cancels out."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def progress(message: str) -> None:
    """One status line on stderr, rewritten in place; nothing where stderr is not a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)
