"""The least time that work takes on this machine: its peaks and bandwidths, sampled between the calls."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from ..bench.ceilings import CACHE_READ, DRAM_READ, PEAK
from ..bench.ceilings import samplers as int8_samplers
from ..bench.engine import settle
from ..bench.linear import thread_counts
from ..bench.machine import last_level_cache_bytes, private_cache_bytes
from .work import FLOAT, Work

_FLOAT_PEAK = f"{FLOAT} peak"
_SCALAR = "scalar"  # has no peak of its own to measure
# Rows and columns of the product that shows the float peak: 3 MB, and 1 ms on two cores.
_FLOAT_SIZE = 512
_SAMPLE_SECONDS, _FLOAT_CALLS = 0.02, 5


class Limits:
    """Ceilings of the instruction sets that a profile has met."""

    def __init__(self, units: Iterable[str], threads: int):
        """units: of Work."""
        self._threads = threads
        self._samplers = {}
        for isa in sorted({*units} - {FLOAT}) or [_SCALAR]:
            for ceiling in int8_samplers(isa, threads):
                name = _int8_peak(isa) if ceiling.name == PEAK else ceiling.name
                self._samplers[name] = ceiling.sample
        if FLOAT in units:
            self._samplers[_FLOAT_PEAK] = _float_peak
        self._samples: dict[str, list[float]] = {name: [] for name in self._samplers}

    def sample(self) -> None:
        """Measure each once more: some 20 ms each."""
        with thread_counts(self._threads):
            for name, sample in self._samplers.items():
                self._samples[name].append(sample())
                settle()

    def rates(self) -> dict[str, float]:
        """Operations or bytes per second: the best of the samples, as others may have been disturbed."""
        return {name: max(samples) for name, samples in self._samples.items()}


def least_time(
    work: Work, calls: float, weights_in_play: float, rates: dict[str, float]
) -> tuple[float, str] | tuple[None, str]:
    """(ms that the ceilings allow, which of them that is), or (None, "") where none is known.

    Weights come from where all weights of the model fit, other data from where it fits itself; private
    caches have no ceiling here.
    """
    bounds: dict[str, float] = {}
    peaks = {FLOAT: _FLOAT_PEAK} | {unit: _int8_peak(unit) for unit in work.units if unit != FLOAT}
    known = {unit: rates[peaks[unit]] for unit in work.units if peaks[unit] in rates}
    if work.units and len(known) == len(work.units):
        largest = max(work.units, key=lambda unit: work.units[unit] / known[unit])
        bounds[peaks[largest]] = sum(count / known[unit] for unit, count in work.units.items())
    traffic = weights_in_play if work.weight_bytes else work.bytes / calls
    if traffic > private_cache_bytes():
        level = DRAM_READ if traffic > last_level_cache_bytes() else CACHE_READ
        if level in rates:
            bounds[level] = work.bytes / rates[level]
    if not bounds:
        return None, ""
    bound = max(bounds, key=bounds.__getitem__)
    return bounds[bound] * 1e3, bound


def _int8_peak(isa: str) -> str:
    return f"{PEAK}, {isa}"


def _float_peak() -> float:
    """Operations per second of torch's own product of float32 matrices that fit the caches: the fastest of
    some 20 ms, of which the first calls only wake the threads.
    """
    a = torch.ones(_FLOAT_SIZE, _FLOAT_SIZE)
    b, out = torch.ones_like(a), torch.empty_like(a)
    times: list[float] = []
    while len(times) < _FLOAT_CALLS or sum(times) < _SAMPLE_SECONDS:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - start)
    return 2 * _FLOAT_SIZE**3 / min(times)
