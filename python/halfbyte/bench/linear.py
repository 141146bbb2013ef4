"""`halfbyte bench linear`: one layer by halfbyte, by other tools and the ceilings, in interleaved rounds."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .. import dispatch
from ..dispatch import force_isa, isa_errors
from ..errors import HalfbyteError
from ..scheme import Scheme
from . import ceilings, peers
from .engine import Timed, median_of_ratios, progress, run_rounds
from .machine import describe, last_level_cache_bytes, private_cache_bytes

OURS = "halfbyte"
_SEED = 20240229
# A layer whose output is further from the float64 product computes something else and is not timed. Weights
# here are normal: absmax rounding is off by 0.009 in 8 bits per channel, in 4 bits by 0.09 in groups of 32,
# 0.12 in groups of 128 and 0.16 per channel of 11008.
_ERROR_LIMITS = {8: 0.05, 4: 0.25}


@dataclass(frozen=True)
class Settings:
    """What to measure and how long."""

    shapes: Sequence[tuple[int, int, int]]
    schemes: Sequence[str]
    vs: Sequence[str] | None  # None: those that do the same job as the scheme
    threads: int
    cold: bool = False
    isa: str | None = None  # forced on halfbyte alone
    rounds: int = 15
    round_seconds: float = 0.01


def run(settings: Settings) -> dict:
    """Measure every shape and scheme; the result holds plain JSON values, with every sample."""
    results = []
    with (
        thread_counts(settings.threads),
        force_isa(settings.isa) if settings.isa else contextlib.nullcontext(),
    ):
        for shape in settings.shapes:
            for scheme in settings.schemes:
                results.append(_measure(shape, scheme, settings))
        return {
            "format": "halfbyte-bench",
            "version": 1,
            "kind": "linear",
            "machine": describe(settings.threads),
            "settings": dataclasses.asdict(settings),
            "results": results,
        }


@contextlib.contextmanager
def thread_counts(threads: int) -> Iterator[None]:
    """Run with that many threads in torch (which halfbyte follows) and in halfbyte alone; no gradients."""
    with contextlib.ExitStack() as stack:
        stack.callback(dispatch.set_num_threads, dispatch.thread_override)
        dispatch.set_num_threads(threads)
        if importlib.util.find_spec("torch"):
            import torch

            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
            stack.enter_context(torch.no_grad())
        yield


def problem(shape: tuple[int, int, int], settings: Settings, scheme: str = "w8a8") -> peers.Problem:
    """Random weights and activations of the given m, n, k; the same for every contestant and every run."""
    m, n, k = shape
    rng = np.random.default_rng([_SEED, m, n, k])
    return peers.Problem(
        x=rng.standard_normal((m, k), dtype=np.float32),
        weight=rng.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k)),
        bias=rng.standard_normal(n, dtype=np.float32),
        threads=settings.threads,
        cold_bytes=peers.COLD_CACHE_MULTIPLE * last_level_cache_bytes() if settings.cold else 0,
        scheme=Scheme.parse(scheme),
    )


def ours(problem: peers.Problem) -> peers.Layer:
    """halfbyte as a user calls it: QLinear on torch tensors or, without torch, hb.linear on numpy arrays."""
    import halfbyte as hb

    scheme = problem.scheme
    quantized = hb.quantize(problem.weight, scheme)
    first = hb.pack(quantized)
    bytes_ = first.nbytes  # what one call reads: packed codes, scales and sums, padding included
    kernel = kernel_name(scheme)
    count = problem.copies(bytes_)
    if importlib.util.find_spec("torch"):
        import torch

        x, bias = torch.from_numpy(problem.x), torch.from_numpy(problem.bias)
        arrays = {f.name: getattr(quantized, f.name) for f in dataclasses.fields(quantized)}
        arrays = {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}
        modules = []
        for _ in range(count):  # a copy of the codes each: layers that share them would share one pack
            tensors = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
            modules.append(hb.QLinear(dataclasses.replace(quantized, **tensors), bias))
        calls = [lambda module=module: module(x) for module in modules]
        return peers.Layer(calls, lambda: calls[0]().numpy(), bytes_, f"QLinear, {kernel}")
    packs = [first, *(hb.pack(quantized) for _ in range(count - 1))]
    calls = [lambda pack=pack: hb.linear(problem.x, pack, problem.bias) for pack in packs]
    return peers.Layer(calls, calls[0], bytes_, f"halfbyte.linear on numpy arrays, {kernel}")


def kernel_name(scheme: str | Scheme) -> str:
    """Kernel that the machine (or the forced ISA) runs for a scheme's linear op."""
    from .. import _core

    with isa_errors:
        return _core.select(Scheme.parse(scheme).op)


def kernel_isa(kernel: str) -> str:
    """Instruction set of a kernel, from the kernel list."""
    from .. import _core

    return next(row["isa"] for row in _core.kernels() if row["name"] == kernel)


def _measure(shape: tuple[int, int, int], scheme: str, settings: Settings) -> dict:
    label = "x".join(map(str, shape)) + f" {scheme}"
    task = problem(shape, settings, scheme)
    kernel = kernel_name(scheme)
    isa = kernel_isa(kernel)
    progress(f"{label}: building {OURS}")
    layers = {OURS: ours(task)}
    unavailable = {}
    for name in peers.default_names(task.scheme) if settings.vs is None else settings.vs:
        progress(f"{label}: building {name}")
        try:
            layers[name] = peers.build(name, task)
        except peers.UnavailableError as error:
            unavailable[name] = str(error)
    exact = task.x.astype(np.float64) @ task.weight.T.astype(np.float64) + task.bias
    errors = {name: relative_error(layer.output(), exact) for name, layer in layers.items()}
    for name, what in _wrong(errors, _ERROR_LIMITS[task.scheme.weight_bits]).items():
        if name == OURS:
            raise HalfbyteError(f"{label}: {kernel} is wrong: {what}; run halfbyte doctor and report it")
        unavailable[name] = what
        del layers[name]
    # Where a call is so long that a round holds but one, warm weights take two untimed calls before it: the
    # first refills the last-level cache, the second runs like those after it. Short calls get more of them.
    warm_calls = 1 if settings.cold else 2
    timed = [Timed(name, layer.calls, settings.round_seconds, warm_calls) for name, layer in layers.items()]
    samples = run_rounds([*timed, *ceilings.samplers(isa, settings.threads)], settings.rounds, label)
    rows = [
        _row(name, layer, task, samples, settings.cold)
        | {"error": errors[name], "calls_per_round": entry.inner}
        for (name, layer), entry in zip(layers.items(), timed, strict=True)
    ]
    return {
        "m": shape[0],
        "n": shape[1],
        "k": shape[2],
        "scheme": scheme,
        "cold": settings.cold,
        "kernel": kernel,
        "ceilings": dataclasses.asdict(ceilings.peaks(isa, samples)),
        "ceiling_samples": {name: samples[name] for name in ceilings.NAMES if name in samples},
        "rows": rows,
        "unavailable": unavailable,
    }


def _wrong(errors: dict[str, float], limit: float) -> dict[str, str]:
    """What to say about the layers that are off by more than `limit`, NaN included."""
    return {
        name: f"its output is off by {error:.2g}, more than {limit} of the float64 product"
        for name, error in errors.items()
        if not error <= limit
    }


def relative_error(got: np.ndarray, exact: np.ndarray) -> float:
    """||got - exact|| / ||exact||."""
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def _read_level(traffic: int, cold: bool) -> str | None:
    """The read ceiling that bounds a call; None where all of it fits in the private caches."""
    if cold or traffic > last_level_cache_bytes():
        return ceilings.DRAM_READ
    return ceilings.CACHE_READ if traffic > private_cache_bytes() else None


def _row(
    name: str, layer: peers.Layer, task: peers.Problem, samples: dict[str, list[float]], cold: bool
) -> dict:
    m, n, k = task.mnk
    seconds = samples[name]
    median = statistics.median(seconds)
    operations = 2 * m * n * k
    traffic = layer.weight_bytes + task.x.nbytes + 4 * m * n  # the least that any implementation has to move
    level = _read_level(traffic, cold)
    quick = (name == OURS or peers.multiplies_int8(name, task.scheme)) and ceilings.PEAK in samples
    products = ceilings.products_per_weight(task.scheme)
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
        "of_peak": median_of_ratios([products * operations / s for s in seconds], samples[ceilings.PEAK])
        if quick
        else None,
        "of_read": level and median_of_ratios([traffic / s for s in seconds], samples[level]),
        "ours_is_faster_by": None if name == OURS else median_of_ratios(seconds, samples[OURS]),
        "copies": len(layer.calls),
        "samples_us": [s * 1e6 for s in seconds],
    }
