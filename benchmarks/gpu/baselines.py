"""What torch offers for the same product, timed in the same way: seconds of a call with cold weights."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from halfbyte.bench.gpu_clock import Call, Device, cold
from halfbyte.cuda.library import Dequantize
from halfbyte.cuda.linear import INT_MM_ROWS
from halfbyte.cuda.rows import codes_of
from halfbyte.errors import CudaError

from .operands import TYPES, packed_tensor, random_tensor, runner

PADDED_ROWS = 32  # what fewer rows become in front of it
TINYGEMM_ROWS = 64  # more take it much longer than anything else
TINYGEMM_GROUP, TINYGEMM_K_TILES = 128, 8


class Baselines:
    """(seconds, or None and why) by (m, n, k), measured when they are first asked for: torch may have no such
    call, or no memory for it.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.seconds = cache(self._seconds)

    def _seconds(self, name: str, m: int, n: int, k: int) -> tuple[float | None, str]:
        try:
            return cold(self.device, *getattr(self, f"_{name}")(m, n, k)), ""
        except (RuntimeError, NotImplementedError) as error:
            if "CUDA error" in str(error) or isinstance(error, CudaError):
                raise
            return None, f"{type(error).__name__}: {error}".splitlines()[0][:200]

    def _x(self, m: int, k: int) -> torch.Tensor:
        return torch.randn(m, k, device=self.device.device).bfloat16()

    def _bf16(self, m: int, n: int, k: int) -> tuple:
        x = self._x(m, k)

        def make() -> Call:
            weight = torch.randn(n, k, device=self.device.device, dtype=torch.bfloat16)
            return lambda: functional.linear(x, weight)

        return make, 2 * n * k

    def _int_mm(self, m: int, n: int, k: int) -> tuple:
        """Rows to codes, _int_mm, scales, all in torch; few rows are padded to as many as it takes."""
        x, rows = self._x(m, k), m if m >= INT_MM_ROWS else PADDED_ROWS
        padded = functional.pad(x, (0, 0, 0, rows - m))

        def make() -> Call:
            codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=self.device.device)
            scale = torch.rand(n, device=self.device.device)

            def call() -> torch.Tensor:
                x_scale = padded.abs().amax(1, keepdim=True).float().clamp_min(1e-6) / 127
                q = (padded / x_scale).round().to(torch.int8)
                return (torch._int_mm(q, codes.T)[:m] * (x_scale[:m] * scale)).bfloat16()

            return call

        return make, n * k

    def _codes_mm(self, m: int, n: int, k: int) -> tuple:
        """Codes by our kernel, _int_mm, one multiplication by the row's scale into bfloat16: three kernels,
        and the weight's scales left out.
        """
        x, where = self._x(m, k), self.device.device
        least = 0 if m >= INT_MM_ROWS else PADDED_ROWS

        def make() -> Call:
            codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=where)
            y = torch.empty(m, n, dtype=torch.bfloat16, device=where)

            def call() -> torch.Tensor:
                q, scale, _ = codes_of(x, least_rows=least, symmetric=True)
                return torch.mul(torch._int_mm(q, codes.T)[:m], scale[:, None], out=y)

            return call

        return make, n * k

    def _int_mm_alone(self, m: int, n: int, k: int) -> tuple:
        q = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=self.device.device)

        def make() -> Call:
            codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=self.device.device)
            return lambda: torch._int_mm(q, codes.T)

        return make, n * k

    def _tinygemm(self, m: int, n: int, k: int) -> tuple:
        x = self._x(m, k)

        def make() -> Call:
            where = self.device.device
            codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=where)
            packed = torch._convert_weight_to_int4pack(codes, TINYGEMM_K_TILES)
            scales = torch.rand(k // TINYGEMM_GROUP, n, 2, device=where).bfloat16()
            return lambda: torch._weight_int4pack_mm(x, packed, TINYGEMM_GROUP, scales)

        return make, n * k // 2

    def _dequantize_mm(self, m: int, n: int, k: int) -> tuple:
        """Our kernel makes a bfloat16 matrix of the int4 weight, by which torch multiplies."""
        x = self._x(m, k)
        size = packed_tensor(random_tensor("w4a16_g128", n, k, self.device.device)).nbytes

        def make() -> Call:
            weight = packed_tensor(random_tensor("w4a16_g128", n, k, self.device.device))
            floats = torch.empty(n, k, dtype=torch.bfloat16, device=self.device.device)
            call = Dequantize(
                weight=weight.weight.data_ptr(), scale=weight.scale.data_ptr(), y=floats.data_ptr(), ldy=k,
                n=n, k=k, y_type=TYPES[floats.dtype], format=weight.format,
            )  # fmt: skip
            start = runner(self.device, call, weight)

            def both() -> torch.Tensor:
                start()
                return functional.linear(x, floats)

            return both

        return make, size
