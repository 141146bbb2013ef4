"""One layer and its contestants: built, compared with the float64 product, sampled in interleaved rounds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..dispatch import isa_errors
from ..errors import HalfbyteError
from . import ceilings, peers
from .engine import Timed, median_of_ratios, progress, run_rounds
from .machine import last_level_cache_bytes, private_cache_bytes

OURS = "halfbyte"


@dataclass
class Contestant:
    """A layer, the problem that it solves, and the error above which it solves another one."""

    layer: peers.Layer
    task: peers.Problem
    limit: float
    int8_operations: int | None = None  # of one call, where they are what it multiplies with: for the peak


class Length(Protocol):
    """What the settings of every contest have."""

    threads: int
    cold: bool
    rounds: int
    round_seconds: float


def measure(
    builders: Mapping[str, Callable[[], Contestant]], kernel: str, label: str, settings: Length
) -> dict:
    """Rows and ceilings of one result, as plain JSON values; `builders` has OURS, which runs `kernel`.

    Those that cannot be built, or whose output is wrong, are listed with the reason. HalfbyteError where that
    is ours.
    """
    contestants, unavailable = _build(builders, label)
    tasks = {id(one.task): one.task for one in contestants.values()}
    exact = {key: exact_product(task) for key, task in tasks.items()}
    errors = {
        name: relative_error(one.layer.output(), exact[id(one.task)]) for name, one in contestants.items()
    }
    for name, error in errors.items():
        limit = contestants[name].limit
        if error <= limit:  # not where it is NaN
            continue
        what = f"its output is off by {error:.2g}, more than {limit} of the float64 product"
        if name == OURS:
            raise HalfbyteError(f"{label}: {kernel} is wrong: {what}; run halfbyte doctor and report it")
        unavailable[name] = what
        del contestants[name]
    # Where a call is so long that a round holds but one, warm weights take two untimed calls before it: the
    # first refills the last-level cache, the second runs like those after it. Short calls get more of them.
    warm = 1 if settings.cold else 2
    timed = [
        Timed(name, one.layer.calls, settings.round_seconds, warm, elsewhere=one.layer.elsewhere)
        for name, one in contestants.items()
    ]
    isa = kernel_isa(kernel)
    samples = run_rounds([*timed, *ceilings.samplers(isa, settings.threads)], settings.rounds, label)
    rows = [
        _row(name, one, samples, settings.cold) | {"error": errors[name], "calls_per_round": entry.inner}
        for (name, one), entry in zip(contestants.items(), timed, strict=True)
    ]
    return {
        "cold": settings.cold,
        "kernel": kernel,
        "ceilings": dataclasses.asdict(ceilings.peaks(isa, samples)),
        "ceiling_samples": {name: samples[name] for name in ceilings.NAMES if name in samples},
        "rows": rows,
        "unavailable": unavailable,
    }


def exact_product(task: peers.Problem) -> np.ndarray:
    """x @ weight.T + bias in float64."""
    return task.x.astype(np.float64) @ task.weight.T.astype(np.float64) + task.bias


def relative_error(got: np.ndarray, exact: np.ndarray) -> float:
    """||got - exact|| / ||exact||."""
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def kernel_of(op: str) -> str:
    """Kernel that the machine (or the forced ISA) runs for an op."""
    from .. import _core

    with isa_errors:
        return _core.select(op)


def kernel_isa(kernel: str) -> str:
    """Instruction set of a kernel, from the kernel list."""
    from .. import _core

    return next(row["isa"] for row in _core.kernels() if row["name"] == kernel)


def _build(
    builders: Mapping[str, Callable[[], Contestant]], label: str
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants, and why the others are missing."""
    contestants, unavailable = {}, {}
    for name, build in builders.items():
        progress(f"{label}: building {name}")
        try:
            contestants[name] = build()
        except peers.UnavailableError as error:
            unavailable[name] = str(error)
    return contestants, unavailable


def _read_level(traffic: int, cold: bool) -> str | None:
    """The read ceiling that bounds a call; None where all of it fits in the private caches."""
    if cold or traffic > last_level_cache_bytes():
        return ceilings.DRAM_READ
    return ceilings.CACHE_READ if traffic > private_cache_bytes() else None


def _row(name: str, one: Contestant, samples: dict[str, list[float]], cold: bool) -> dict:
    layer, (m, n, k) = one.layer, one.task.mnk
    seconds = samples[name]
    median = statistics.median(seconds)
    operations = 2 * m * n * k
    # The least that any implementation has to move.
    traffic = layer.weight_bytes + one.task.x.nbytes + 4 * m * n
    level = _read_level(traffic, cold)
    of_peak = None
    if one.int8_operations is not None and ceilings.PEAK in samples:
        of_peak = median_of_ratios([one.int8_operations / s for s in seconds], samples[ceilings.PEAK])
    return {
        "name": name,
        "note": layer.note,
        "us": median * 1e6,
        "us_min": min(seconds) * 1e6,
        "us_max": max(seconds) * 1e6,
        "gops": operations / median / 1e9,
        "gbps": traffic / median / 1e9,
        "bytes": traffic,
        "read_level": level,
        "of_peak": of_peak,
        "of_read": level and median_of_ratios([traffic / s for s in seconds], samples[level]),
        "ours_is_faster_by": None if name == OURS else median_of_ratios(seconds, samples[OURS]),
        "copies": len(layer.calls),
        "samples_us": [s * 1e6 for s in seconds],
    }
