"""`halfbyte bench linear --device cuda`: one layer on a GPU, by halfbyte and by torch.

Calls are timed within CUDA graphs, so that starting them costs nothing, and rotate over copies of the
weights, so that none is in the cache when its turn comes.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

import halfbyte as hb

from ..cuda.linear import INT_MM_ROWS
from ..errors import CudaError, HalfbyteError
from ..scheme import Scheme
from .engine import median_of_ratios, progress
from .gpu_clock import Call, Device, Gpu, cold
from .machine import describe

OURS = "halfbyte"
DTYPE = torch.bfloat16  # of x
_TINYGEMM_GROUP, _TINYGEMM_K_TILES = 128, 8
_COPY_BYTES = 1 << 30
# As for the CPU: a layer whose output is further from the float64 product computes something else.
_ERROR_LIMITS = {8: 0.05, 4: 0.25}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure and how long."""

    shapes: Sequence[tuple[int, int, int]]
    schemes: Sequence[str]
    rounds: int = 5


def run(settings: Settings, device: Device | None = None) -> dict:
    """Measure every shape and scheme; the result holds plain JSON values. CudaError where there is no GPU."""
    if device is None:
        if not torch.cuda.is_available():
            raise CudaError("torch sees no GPU: --device cuda needs one, and a torch built with CUDA")
        device = Gpu()
    with torch.no_grad():
        return {
            "format": "halfbyte-bench",
            "version": 1,
            "kind": "gpu",
            "machine": describe(torch.get_num_threads()) | {"gpu": device.name},
            "settings": dataclasses.asdict(settings),
            "copy_bytes_per_s": _copy_rate(device),
            "results": [
                _measure(device, shape, scheme, settings.rounds)
                for shape in settings.shapes
                for scheme in settings.schemes
            ],
        }


def _copy_rate(device: Device) -> float:
    """Bytes read and written in a second by a copy of the device's memory."""
    size = _COPY_BYTES if device.real else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device.device).random_()
    target = torch.empty_like(source)
    return 2 * size / device.seconds([lambda: target.copy_(source)])


def _measure(device: Device, shape: tuple[int, int, int], scheme: str, rounds: int) -> dict:
    m, n, k = shape
    torch.manual_seed(m + 1000003 * n + 7 * k)
    x = torch.randn(m, k).to(device.device, DTYPE)
    weight = torch.randn(n, k) / k**0.5
    quantized = hb.quantize(weight.to(device.device), scheme)
    exact = x.double() @ weight.to(device.device).double().T
    makers = {OURS: _ours(x, quantized)} | _torch_ways(x, weight, Scheme.parse(scheme))
    limit = _ERROR_LIMITS[Scheme.parse(scheme).weight_bits]
    errors, unavailable = {}, {}
    for name, (make, _, note) in makers.items():
        progress(f"{m}x{n}x{k} {scheme}: {name}")
        try:
            y = make()()
        except (RuntimeError, NotImplementedError) as problem:
            if name == OURS or "CUDA error" in str(problem):
                raise
            unavailable[name] = str(problem).splitlines()[0]
            continue
        errors[name] = None if y is None else ((y.double() - exact).norm() / exact.norm()).item()
        if name == OURS and not errors[name] <= limit:
            raise HalfbyteError(f"{m}x{n}x{k} {scheme}: {note} is off by {errors[name]:.2g}: it is wrong")
    samples: dict[str, list[float]] = {name: [] for name in errors}
    for index in range(rounds):
        progress(f"{m}x{n}x{k} {scheme}: round {index + 1}/{rounds}")
        for name, seconds in samples.items():
            seconds.append(cold(device, *makers[name][:2]))
    rows = [
        _row(name, samples, errors[name], *makers[name][1:], 2 * m * n * k, x.nbytes + m * n * DTYPE.itemsize)
        for name in errors
    ]
    return {"m": m, "n": n, "k": k, "scheme": scheme, "rows": rows, "unavailable": unavailable}


def _row(
    name: str,
    samples: dict[str, list[float]],
    error: float | None,
    nbytes: int,
    note: str,
    operations: int,
    other_bytes: int,
) -> dict:
    seconds = statistics.median(samples[name])
    return {
        "name": name,
        "note": note,
        "us": seconds * 1e6,
        "gbps": (nbytes + other_bytes) / seconds / 1e9,
        "tflops": operations / seconds / 1e12,
        "bytes": nbytes + other_bytes,
        "error": error,
        "ours_is_faster_by": None if name == OURS else median_of_ratios(samples[name], samples[OURS]),
        "samples_us": [s * 1e6 for s in samples[name]],
    }


# A new call on a weight of its own, the bytes of the weight, what runs.
_Maker = tuple[Callable[[], Call], int, str]


def _ours(x: Tensor, quantized: hb.QuantizedTensor) -> _Maker:
    def make() -> Call:
        parts = {
            field.name: value.clone()
            for field in dataclasses.fields(quantized)
            if isinstance(value := getattr(quantized, field.name), Tensor)
        }
        layer = hb.QLinear(dataclasses.replace(quantized, **parts), float_dtype=DTYPE)
        return lambda: layer(x)

    packed = hb.pack(quantized)
    return make, packed.nbytes or quantized.nbytes, f"QLinear, {packed.kernel}"


def _torch_ways(x: Tensor, weight: Tensor, scheme: Scheme) -> dict[str, _Maker]:
    """What torch offers for the same layer."""
    m, (n, k), where = len(x), weight.shape, x.device

    def bf16() -> Call:
        w = weight.to(where, DTYPE)
        return lambda: functional.linear(x, w)

    def int_mm() -> Call:
        scale = weight.abs().amax(1).to(where) / 127
        codes = (weight.to(where) / scale[:, None]).round().to(torch.int8)

        def call() -> Tensor:
            x_scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-6) / 127
            q = functional.pad((x / x_scale).round().to(torch.int8), (0, 0, 0, max(0, INT_MM_ROWS - m)))
            return (torch._int_mm(q, codes.t())[:m] * (x_scale * scale)).to(DTYPE)

        return call

    def tinygemm() -> Call:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=where)
        packed = torch._convert_weight_to_int4pack(codes, _TINYGEMM_K_TILES)
        scales = torch.rand(k // _TINYGEMM_GROUP, n, 2, device=where).to(DTYPE)

        def call() -> None:  # weights of no meaning: only its time is wanted
            torch._weight_int4pack_mm(x, packed, _TINYGEMM_GROUP, scales)

        return call

    ways: dict[str, _Maker] = {"torch-bf16": (bf16, 2 * n * k, "F.linear")}
    if scheme.activation_bits == 8:
        ways["torch-int8"] = (int_mm, n * k, "x to codes, _int_mm and scales, each by torch")
    if scheme.weight_bits == 4:
        nbytes = n * k // 2 + k // _TINYGEMM_GROUP * n * 4
        ways["torch-int4"] = (tinygemm, nbytes, f"_weight_int4pack_mm, groups of {_TINYGEMM_GROUP}")
    return ways
