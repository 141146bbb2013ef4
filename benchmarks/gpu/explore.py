"""Every schedule of the linear kernels for the shapes that matter: is the one that is chosen the best?"""

from __future__ import annotations

import itertools
from functools import partial

import torch

from halfbyte.bench.gpu_clock import Call, Device, cold

from .operands import Codes, linear_call, packed_tensor, padded_rows, random_tensor, runner
from .record import FAIL, PASS, Clock, Record, Skipped

PHASE = "explore"
SHAPES = (
    ("w4a16_g128", 1, 8192, 8192), ("w4a16_g128", 1, 4096, 4096), ("w4a16_g128", 1, 28672, 8192),
    ("w4a16_g128", 16, 8192, 8192), ("w8a8", 1, 8192, 8192), ("w4a16_g128", 64, 8192, 8192),
    ("w8a8", 16, 8192, 8192), ("w4a16_g128", 1, 14336, 4096), ("w8a8", 1, 4096, 4096),
)  # fmt: skip
SPLITS, WARPS = (1, 2, 4, 8), (4, 8)
MOST_LOSS = 1.1  # the chosen schedule over the best


def measure(device: Device, record: Record, clock: Clock, archs: tuple[int, ...], tiny: bool) -> None:
    """One row per shape, with the seconds of each schedule."""
    jobs = []
    for scheme, m, n, k in SHAPES[:1] if tiny else SHAPES:
        sizes = (2, 64, 256) if tiny else (m, n, k)
        name = f"{scheme} {sizes[0]}x{sizes[1]}x{sizes[2]}"
        jobs.append((name, partial(_shape, device, archs, scheme, *sizes)))
    record.attempt_all(PHASE, jobs, clock)


def _shape(device: Device, archs: tuple[int, ...], scheme: str, m: int, n: int, k: int) -> dict:
    device.tidy()
    if "a8" in scheme:
        x = Codes.random(m, k, device.device)
    else:
        x = padded_rows(torch.randn(m, k, device=device.device).bfloat16())
    y = torch.empty(m, n, dtype=torch.bfloat16, device=device.device)
    one = packed_tensor(random_tensor(scheme, n, k, device.device))
    weights = [one, *(packed_tensor(random_tensor(scheme, n, k, device.device))
                      for _ in range(device.copies(one.nbytes) - 1))]  # fmt: skip

    def seconds(**numbers: int) -> float:
        turns = iter(weights)

        def make() -> Call:
            weight = next(turns)
            return runner(device, linear_call(weight, x, y, **numbers), weight, x, y)

        return cold(device, make, one.nbytes)

    times = {"chosen": seconds()}
    for arch, warps, splits in itertools.product(archs, WARPS, SPLITS):
        try:
            times[f"sm{arch} {warps} warps {splits} splits"] = seconds(arch=arch, warps=warps, splits=splits)
        except Skipped:
            continue
    times["chosen"] = min(times["chosen"], seconds())  # the clocks may have risen since
    best = min(times, key=times.get)
    loss = times["chosen"] / times[best]
    return {
        "verdict": PASS if loss <= MOST_LOSS else FAIL,
        "note": f"best {best}: {times[best] * 1e6:.1f} us; chosen {times['chosen'] * 1e6:.1f}",
        "seconds": times,
    }
