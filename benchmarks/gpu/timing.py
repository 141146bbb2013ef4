"""Seconds of every op with cold weights, as shares of the ceilings and against torch: targets.json's rows."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

import halfbyte as hb
from halfbyte.bench.gpu_clock import Call, Device, cold
from halfbyte.cuda.library import Dequantize
from halfbyte.cuda.rows import codes_of

from .baselines import TINYGEMM_ROWS, Baselines
from .operands import TYPES, Codes, linear_call, packed_tensor, random_tensor, random_weight, runner
from .record import Clock, Record, Wrong
from .verdicts import steps, verdict

PHASE = "timing"
TARGETS = Path(__file__).with_name("targets.json")
STEPS = "steps between neighbouring m"
KERNEL_ROWS = 128  # up to so many the kernel of int8 rows is timed without what makes the codes, too
TINY = {"m": 3, "n": 64, "k": 128}


def label(target: dict) -> str:
    """The name of a row: op, scheme, MxNxK; of rows only what makes the codes is timed."""
    sizes = "x".join(str(target[size]) for size in ("m", "n", "k") if size in target)
    what = "(codes)" if target["op"].endswith(("_quantize", "_rows")) else target.get("scheme", "")
    return " ".join(part for part in (target["op"], what, sizes) if part)


def measure(device: Device, record: Record, clock: Clock, archs: tuple[int, ...], tiny: bool) -> None:
    """The rows in their order, as far as time allows."""
    baselines, seen, jobs = Baselines(device), set(), []
    for target in json.loads(TARGETS.read_text()):
        if tiny:  # each op once, and linear of w8a8, which has peers of its own
            kind = target["op"], target.get("scheme") == "w8a8"
            if kind in seen:
                continue
            seen.add(kind)
            target = target | {size: value for size, value in TINY.items() if size in target}
        jobs.append((label(target), partial(_row, device, record, baselines, target)))
    record.attempt_all(PHASE, jobs, clock)
    if not tiny:
        record.attempt(PHASE, STEPS, partial(steps, record.rows(PHASE)))


def _row(device: Device, record: Record, baselines: Baselines, target: dict) -> dict:
    device.tidy()
    op = target["op"]
    job = {"linear": _linear, "gated": _gated, "int_mm": _int_mm, "dequantize": _dequantize}.get(op, _rows)
    measured = job(device, baselines, target)
    ceilings = record.data["ceilings"]
    needed = ["copy", measured["unit"]] if measured.get("operations") else ["copy"]
    if unknown := [name for name in needed if name not in ceilings]:
        measured.setdefault("missing", {})["share"] = f"no ceiling {', '.join(unknown)}"
    else:
        floors = {"memory": measured["bytes"] / ceilings["copy"]}
        if measured.get("operations"):
            floors["math"] = measured["operations"] / ceilings[measured["unit"]]
        bound = max(floors, key=floors.get)
        measured |= {"bound": bound, "share": floors[bound] / measured["seconds"]}
    gpu = record.data["environment"].get("gpu", {}).get("name", "")
    return {"target": target, **measured, **verdict(target, measured, record.rows(PHASE), gpu)}


def _sizes(target: dict) -> tuple[int, int, int]:
    return target["m"], target["n"], target["k"]


def _linear(device: Device, baselines: Baselines, target: dict) -> dict:
    """hb.linear as a layer calls it: with the quantization of x, by the road that it takes."""
    (m, n, k), scheme = _sizes(target), target["scheme"]
    x = torch.randn(m, k, device=device.device).bfloat16()

    def make() -> Call:
        q, packed = random_weight(scheme, n, k, device.device)
        return lambda q=q: hb.linear(x, packed)  # the layer that has a weight keeps its codes

    nbytes = random_weight(scheme, n, k, device.device)[1].nbytes
    seconds = cold(device, make, nbytes)
    unit = "int8" if "a8" in scheme else "bf16"
    measured = {"seconds": seconds, "bytes": nbytes + 2 * m * (n + k)}
    if "+2:4" not in scheme and "+blocks" not in scheme:  # which multiply less
        measured |= {"operations": 2 * m * n * k, "unit": unit}
    if "a8" in scheme and m <= KERNEL_ROWS:
        measured["kernel_seconds"] = _kernel(device, scheme, m, n, k, nbytes)
        measured["rows_seconds"] = device.seconds([lambda: codes_of(x)] * 20)
    others = ["bf16"] + ["int_mm", "codes_mm"] * scheme.startswith("w8a8")
    if scheme.startswith("w4"):
        others += ["tinygemm"] * (m <= TINYGEMM_ROWS) + ["dequantize_mm"] * (m <= 256)
    missing = {}
    for other in others:
        theirs, missing[other] = baselines.seconds(other, m, n, k)
        if theirs:
            measured[other] = theirs / seconds
    if missing := {other: why for other, why in missing.items() if why}:
        measured["missing"] = missing
    return measured


def _kernel(device: Device, scheme: str, m: int, n: int, k: int, nbytes: int) -> float:
    x, y = Codes.random(m, k, device.device), torch.empty(m, n, dtype=torch.bfloat16, device=device.device)

    def make() -> Call:
        _, weight = random_weight(scheme, n, k, device.device)
        return runner(device, linear_call(weight, x, y), weight, x, y)

    return cold(device, make, nbytes)


def _gated(device: Device, baselines: Baselines, target: dict) -> dict:
    """Two products and silu in one call; in bf16 two calls and two more kernels."""
    (m, n, k), scheme = _sizes(target), target["scheme"]
    x = torch.randn(m, k, device=device.device).bfloat16()

    def make() -> Call:
        up, gate = (packed_tensor(random_tensor(scheme, n, k, device.device)) for _ in range(2))
        return lambda: hb.gated_linear(x, up, gate)

    def floats() -> Call:
        up, gate = (torch.randn(n, k, device=device.device, dtype=torch.bfloat16) for _ in range(2))
        return lambda: functional.linear(x, up) * functional.silu(functional.linear(x, gate))

    nbytes = 2 * packed_tensor(random_tensor(scheme, n, k, device.device)).nbytes
    seconds = cold(device, make, nbytes)
    return {
        "seconds": seconds, "bytes": nbytes + 2 * m * (n + k), "operations": 4 * m * n * k, "unit": "bf16",
        "bf16": cold(device, floats, 4 * n * k) / seconds,
    }  # fmt: skip


def _int_mm(device: Device, baselines: Baselines, target: dict) -> dict:
    """torch._int_mm alone, of which many rows of w8a8 consist."""
    m, n, k = _sizes(target)
    seconds, why = baselines.seconds("int_mm_alone", m, n, k)
    if not seconds:
        raise Wrong(f"not measured: {why}")
    return {
        "seconds": seconds, "bytes": n * k + m * k + 4 * m * n,
        "operations": 2 * m * n * k, "unit": "int8",
    }  # fmt: skip


def _rows(device: Device, baselines: Baselines, target: dict) -> dict:
    """Rows of bfloat16 to codes, as linear wants them: without the sum of the codes, which the public
    function adds. Small ones stay in the cache, as in a model.
    """
    op, m, k = target["op"], target["m"], target["k"]
    weight = torch.randn(k, device=device.device)
    half = weight.bfloat16()
    inputs = 2 if op == "silu_mul_quantize" else 1

    def make(unfused: bool = False) -> Call:
        x, up = (torch.randn(m, k, device=device.device).bfloat16() for _ in range(2))
        if unfused:
            return lambda: codes_of(functional.rms_norm(x, (k,), half, 1e-6))
        return {
            "quantize_rows": lambda: codes_of(x),
            "rmsnorm_quantize": lambda: codes_of(x, kind=2, weight=weight, eps=1e-6),
            "silu_mul_quantize": lambda: codes_of(x, kind=3, residual=up),
        }[op]

    moved = m * k * (2 * inputs + 1) + 8 * m
    rotate = 2 * inputs * m * k if moved > (1 << 24) else 1 << 60
    measured = {"seconds": cold(device, make, rotate), "bytes": moved}
    if op == "rmsnorm_quantize":
        measured["unfused"] = cold(device, partial(make, True), rotate) / measured["seconds"]
    return measured


def _dequantize(device: Device, baselines: Baselines, target: dict) -> dict:
    n, k = target["n"], target["k"]
    y = torch.empty(n, k, dtype=torch.bfloat16, device=device.device)

    def make() -> Call:
        weight = packed_tensor(random_tensor(target["scheme"], n, k, device.device))
        call = Dequantize(
            weight=weight.weight.data_ptr(), scale=weight.scale.data_ptr(), y=y.data_ptr(), ldy=k, n=n, k=k,
            y_type=TYPES[y.dtype], format=weight.format,
        )  # fmt: skip
        return runner(device, call, weight, y)

    nbytes = packed_tensor(random_tensor(target["scheme"], n, k, device.device)).nbytes
    return {"seconds": cold(device, make, nbytes), "bytes": nbytes + 2 * n * k}
