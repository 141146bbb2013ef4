"""What the GPU can do at most, measured in the same run: all times of the suite are shares of these."""

from __future__ import annotations

from collections.abc import Callable

import torch

from halfbyte.bench.gpu_clock import Call, Device, cold

from .operands import packed_tensor, random_tensor
from .record import Clock, Record

PHASE = "ceilings"
COPY_BYTES = 4 << 30
MATRIX = 8192


def measure(device: Device, record: Record, clock: Clock, archs: tuple[int, ...], tiny: bool) -> None:
    """copy, read and read_packed in bytes a second; bf16 and int8 in operations a second."""
    side, nbytes = (256, 1 << 20) if tiny else (MATRIX, COPY_BYTES)
    bf16 = [torch.randn(side, side, dtype=torch.bfloat16, device=device.device) for _ in range(2)]
    int8 = [torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device.device) for _ in range(2)]
    for _ in range(1 if tiny else 40):  # clocks rise with work
        bf16[0] @ bf16[1].T
    source = torch.randint(-999, 999, (nbytes // 4,), dtype=torch.int32, device=device.device)
    target = torch.empty_like(source)

    def rate(name: str, unit: str, amount: float, seconds: Callable[[], float]) -> tuple:
        def job() -> dict:
            value = amount / seconds()
            record.set("ceilings", **{name: value})
            return {"value": f"{value / 1e12:.3g} T{unit}/s"}

        return name, job

    rows = 128 if tiny else MATRIX

    # An int4 weight's bytes, as many at a time as the kernels read, by a reduction of torch.
    def read_packed() -> Call:
        words = packed_tensor(random_tensor("w4a16_g128", rows, rows, device.device)).weight
        return lambda: words.view(torch.float32).sum()

    size = packed_tensor(random_tensor("w4a16_g128", rows, rows, device.device)).weight.nbytes
    operations = 2.0 * side**3

    def int_mm() -> torch.Tensor:
        return torch._int_mm(int8[0], int8[1].T)

    jobs = [
        rate("copy", "B", 2.0 * nbytes, lambda: device.seconds([lambda: target.copy_(source)])),
        rate("read", "B", 1.0 * nbytes, lambda: device.seconds([lambda: source.view(torch.float32).sum()])),
        rate("read_packed", "B", 1.0 * size, lambda: cold(device, read_packed, size)),
        rate("bf16", "FLOP", operations, lambda: device.seconds([lambda: bf16[0] @ bf16[1].T] * 3)),
        rate("int8", "OP", operations, lambda: device.seconds([int_mm] * 3)),
    ]
    record.attempt_all(PHASE, jobs, clock)

