"""`halfbyte bench sparse`: pruned layers by halfbyte, dense ones and other tools, in interleaved rounds."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..dispatch import force_isa
from ..errors import HalfbyteError
from ..extras import require
from ..scheme import Scheme
from ..sparse.pattern import Pattern
from ..sparse.scheme import SparseScheme
from . import linear, peers
from .contest import OURS, Contestant, kernel_of, measure
from .machine import describe

DENSE = f"{OURS}-dense"
SHAPES = ((128, 3072, 768), (512, 4096, 4096), (32, 4096, 4096), (1, 4096, 4096))
SPARSITIES = (0.4, 0.5, 0.8, 0.9)
SCHEMES = (
    "f32+block16x1",
    "f32+unstructured",
    "w8a8+block16x4",
    "w4a8_g128+block16x4",
    "w8a8+2:4",
    "w8a8+unstructured",
)
# What a scheme is compared with where nobody says, by its values; of codes always also the same ones, dense.
_DEFAULTS = {
    "f32": ("torch-fp32", "torch-csr", "deepsparse"),
    "bf16": ("torch-fp32", "torch-bf16", "torch-csr", "deepsparse"),
}
_DEFAULTS_OF_CODES = ("torch-fp32",)
# Peers that leave zeros out wherever they are: they get as many of them, at the best places.
_UNSTRUCTURED = ("torch-csr", "deepsparse")
# Errors above which something else is computed; those of codes are `linear.error_limit`. bfloat16 has 8
# bits, float32 24.
_ERROR_LIMITS = {"bf16": 0.01, "f32": 1e-4}


@dataclass(frozen=True)
class Settings:
    """What to measure and how long."""

    shapes: Sequence[tuple[int, int, int]]
    schemes: Sequence[str]
    sparsities: Sequence[float]  # shares of zeros; N:M has its own
    vs: Sequence[str] | None  # None: those that do the same job as the scheme
    threads: int
    cold: bool = False
    isa: str | None = None  # forced on halfbyte alone
    rounds: int = 15
    round_seconds: float = 0.01


def run(settings: Settings) -> dict:
    """Measure every shape, scheme and sparsity; the result holds plain JSON values, with every sample."""
    require("torch", extra="torch", purpose="halfbyte bench sparse")
    results = []
    with (
        linear.thread_counts(settings.threads),
        force_isa(settings.isa) if settings.isa else contextlib.nullcontext(),
    ):
        for shape in settings.shapes:
            for scheme in map(SparseScheme.parse, settings.schemes):
                amount = scheme.pattern.amount
                for sparsity in settings.sparsities if amount is None else [amount]:
                    results.append(_measure(shape, scheme, sparsity, settings))
        return {
            "format": "halfbyte-bench",
            "version": 1,
            "kind": "sparse",
            "machine": describe(settings.threads),
            "settings": dataclasses.asdict(settings),
            "results": results,
        }


def prune(problem: peers.Problem, pattern: Pattern, sparsity: float) -> peers.Problem:
    """The problem with the smallest weights, or blocks of them, set to zero."""
    import torch

    keep = pattern.select(torch.from_numpy(problem.weight).square(), sparsity)
    return dataclasses.replace(problem, weight=problem.weight * keep.numpy())


def ours(problem: peers.Problem, scheme: SparseScheme) -> peers.Layer:
    """halfbyte as a user calls it: SparseLinear on torch tensors."""
    import torch

    import halfbyte as hb

    x, bias = torch.from_numpy(problem.x), torch.from_numpy(problem.bias)
    sparse = hb.sparsify(torch.from_numpy(problem.weight), scheme)
    bytes_ = hb.pack(sparse).nbytes  # what one call reads: values, indices, scales and sums
    module = hb.SparseLinear(sparse, bias)
    modules = [copy.deepcopy(module) for _ in range(problem.copies(bytes_))]
    calls = [lambda module=module: module(x) for module in modules]
    note = f"SparseLinear, {kernel_of(scheme.op)}"
    return peers.Layer(calls, lambda: calls[0]().numpy(), bytes_, note)


def _measure(shape: tuple[int, int, int], scheme: SparseScheme, sparsity: float, settings: Settings) -> dict:
    m, n, k = shape
    label = f"{m}x{n}x{k} {scheme} {sparsity:.0%}"
    whole = linear.problem(shape, settings)
    task = prune(whole, scheme.pattern, sparsity)
    anywhere = functools.cache(lambda: prune(whole, Pattern("unstructured"), sparsity))
    nonzero = int(np.count_nonzero(task.weight))
    if scheme.quantized:
        task = dataclasses.replace(task, scheme=Scheme.parse(scheme.values))
        limit, defaults = linear.error_limit(task.scheme), _DEFAULTS_OF_CODES
    else:
        limit, defaults = _ERROR_LIMITS[scheme.values], _DEFAULTS[scheme.values]
    mine = ours(task, scheme)

    def dense() -> Contestant:
        layer = linear.ours(task)
        if not np.array_equal(layer.output(), mine.output()):
            raise HalfbyteError(
                f"{label}: {mine.note} and the dense {layer.note} differ on the same codes; "
                "run halfbyte doctor and report it"
            )
        return Contestant(layer, task, limit, 2 * m * n * k)

    def peer(name: str) -> Contestant:
        own = anywhere() if name in _UNSTRUCTURED else task
        peer_limit = _ERROR_LIMITS["bf16" if name == "torch-bf16" else "f32"]
        return Contestant(peers.build(name, own), own, peer_limit)

    operations = 2 * m * nonzero if scheme.quantized else None
    builders = {OURS: lambda: Contestant(mine, task, limit, operations)}
    if scheme.quantized:
        builders[DENSE] = dense
    names = defaults if settings.vs is None else settings.vs
    builders |= {name: lambda name=name: peer(name) for name in names}
    return {
        "m": m,
        "n": n,
        "k": k,
        "scheme": str(scheme),
        "sparsity": 1 - nonzero / (n * k),
        **measure(builders, kernel_of(scheme.op), label, settings),
    }
