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
from . import ceilings, peers
from .engine import Timed, median_of_ratios, progress, run_rounds
from .machine import describe, last_level_cache_bytes, private_cache_bytes

OURS = "halfbyte"
_SEED = 20240229


@dataclass(frozen=True)
class Settings:
    """What to measure and how long."""

    shapes: Sequence[tuple[int, int, int]]
    schemes: Sequence[str]
    vs: Sequence[str]
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


def problem(shape: tuple[int, int, int], settings: Settings) -> peers.Problem:
    """Random weights and activations of the given m, n, k; the same for every contestant and every run."""
    m, n, k = shape
    rng = np.random.default_rng([_SEED, m, n, k])
    return peers.Problem(
        x=rng.standard_normal((m, k), dtype=np.float32),
        weight=rng.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k)),
        bias=rng.standard_normal(n, dtype=np.float32),
        threads=settings.threads,
        cold_bytes=peers.COLD_CACHE_MULTIPLE * last_level_cache_bytes() if settings.cold else 0,
    )


def ours(problem: peers.Problem, scheme: str) -> peers.Layer:
    """halfbyte as a user calls it: QLinear on torch tensors or, without torch, hb.linear on numpy arrays."""
    import halfbyte as hb

    quantized = hb.quantize(problem.weight, scheme)
    bytes_ = quantized.nbytes
    kernel = kernel_name(scheme)
    count = problem.copies(bytes_)
    if importlib.util.find_spec("torch"):
        import torch

        x = torch.from_numpy(problem.x)
        layer = torch.nn.Linear(
            *reversed(problem.weight.shape), device="meta"
        )  # its own values would be discarded
        layer.weight = torch.nn.Parameter(torch.from_numpy(problem.weight), requires_grad=False)
        layer.bias = torch.nn.Parameter(torch.from_numpy(problem.bias), requires_grad=False)
        modules = [hb.QLinear.from_linear(layer, scheme) for _ in range(count)]
        calls = [lambda module=module: module(x) for module in modules]
        return peers.Layer(calls, lambda: calls[0]().numpy(), bytes_, f"QLinear, {kernel}")
    packs = [hb.pack(quantized) for _ in range(count)]
    calls = [lambda pack=pack: hb.linear(problem.x, pack, problem.bias) for pack in packs]
    return peers.Layer(calls, calls[0], bytes_, f"halfbyte.linear on numpy arrays, {kernel}")


def kernel_name(scheme: str) -> str:
    """Kernel that the machine (or the forced ISA) runs for a scheme's linear op."""
    from .. import _core
    from ..scheme import Scheme

    with isa_errors:
        return _core.select(Scheme.parse(scheme).op)


def kernel_isa(kernel: str) -> str:
    """Instruction set of a kernel, from the kernel list."""
    from .. import _core

    return next(row["isa"] for row in _core.kernels() if row["name"] == kernel)


def _measure(shape: tuple[int, int, int], scheme: str, settings: Settings) -> dict:
    label = "x".join(map(str, shape)) + f" {scheme}"
    task = problem(shape, settings)
    kernel = kernel_name(scheme)
    isa = kernel_isa(kernel)
    progress(f"{label}: building {OURS}")
    layers = {OURS: ours(task, scheme)}
    unavailable = {}
    for name in settings.vs:
        progress(f"{label}: building {name}")
        try:
            layers[name] = peers.build(name, task)
        except peers.UnavailableError as error:
            unavailable[name] = str(error)
    exact = task.x.astype(np.float64) @ task.weight.T.astype(np.float64) + task.bias
    errors = {name: relative_error(layer.output(), exact) for name, layer in layers.items()}
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
    quick = (name == OURS or name in peers.INT8_PEERS) and ceilings.PEAK in samples
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
        "of_peak": median_of_ratios([operations / s for s in seconds], samples[ceilings.PEAK])
        if quick
        else None,
        "of_read": level and median_of_ratios([traffic / s for s in seconds], samples[level]),
        "ours_is_faster_by": None if name == OURS else median_of_ratios(seconds, samples[OURS]),
        "copies": len(layer.calls),
        "samples_us": [s * 1e6 for s in seconds],
    }
