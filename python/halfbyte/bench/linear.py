"""`halfbyte bench linear`: one layer by halfbyte, by other tools and the ceilings, in interleaved rounds."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .. import dispatch
from ..dispatch import force_isa
from ..scheme import Scheme
from . import ceilings, peers
from .contest import OURS, Contestant, Length, kernel_of, measure
from .machine import describe, last_level_cache_bytes

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


def error_limit(scheme: Scheme) -> float:
    """The relative error of an output above which something else than the scheme is computed."""
    return _ERROR_LIMITS[scheme.weight_bits]


def problem(shape: tuple[int, int, int], settings: Length, scheme: str = "w8a8") -> peers.Problem:
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
    return kernel_of(Scheme.parse(scheme).op)


def _measure(shape: tuple[int, int, int], scheme: str, settings: Settings) -> dict:
    m, n, k = shape
    task = problem(shape, settings, scheme)
    limit = error_limit(task.scheme)
    operations = ceilings.products_per_weight(task.scheme) * 2 * m * n * k

    def build(name: str) -> Contestant:
        quick = operations if peers.multiplies_int8(name, task.scheme) else None
        return Contestant(peers.build(name, task), task, limit, quick)

    names = peers.default_names(task.scheme) if settings.vs is None else settings.vs
    builders = {OURS: lambda: Contestant(ours(task), task, limit, operations)}
    builders |= {name: lambda name=name: build(name) for name in names}
    label = f"{m}x{n}x{k} {scheme}"
    result = measure(builders, kernel_name(scheme), label, settings)
    return {"m": m, "n": n, "k": k, "scheme": scheme, **result}
