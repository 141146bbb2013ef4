"""What this machine can reach: int8 multiply-add rate and read bandwidth, sampled between contestants."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from ..scheme import Scheme
from .engine import Ceiling
from .machine import last_level_cache_bytes

PEAK, CACHE_READ, DRAM_READ = "int8 peak", "cache read", "DRAM read"
NAMES = (PEAK, CACHE_READ, DRAM_READ)
_SAMPLE_SECONDS = 0.02
# Half of the last-level cache stays resident next to the code that reads it; four times the cache cannot.
_CACHE_FRACTION, _DRAM_MULTIPLE = 2, 4
_NO_PEAK = frozenset({"scalar"})  # no vector multiply-add chain to measure


@dataclass(frozen=True)
class Peaks:
    """Medians of one run: ops/s of the instruction set in use (None for scalar), bytes/s of two reads."""

    isa: str
    int8: float | None
    cache_read: float
    dram_read: float


def products_per_weight(scheme: str | Scheme) -> int:
    """int8 products that one weight takes: two for 16-bit activations, which are two bytes, else one.

    The peak of a scheme is the int8 peak divided by it. 4-bit codes are widened to 8 before they multiply.
    """
    return Scheme.parse(scheme).activation_bits // 8


def samplers(isa: str, threads: int) -> list[Ceiling]:
    """One sampler per ceiling; `isa` is the instruction set of the kernel that is being measured."""
    from .. import _core

    cache = last_level_cache_bytes()

    def read(nbytes: int):
        return lambda: _core.measure_read(nbytes, threads, _SAMPLE_SECONDS)

    ceilings = [
        Ceiling(CACHE_READ, read(cache // _CACHE_FRACTION)),
        Ceiling(DRAM_READ, read(cache * _DRAM_MULTIPLE)),
    ]
    if isa not in _NO_PEAK:
        ceilings.append(Ceiling(PEAK, lambda: _core.measure_peak(isa, threads, _SAMPLE_SECONDS)))
    return ceilings


def peaks(isa: str, samples: dict[str, list[float]]) -> Peaks:
    """Medians of the samples that `samplers` gave."""
    return Peaks(
        isa=isa,
        int8=statistics.median(samples[PEAK]) if PEAK in samples else None,
        cache_read=statistics.median(samples[CACHE_READ]),
        dram_read=statistics.median(samples[DRAM_READ]),
    )
