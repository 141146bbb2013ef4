"""Random operands, and calls of the C interface on them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch

from halfbyte import QuantizedTensor, Scheme, SparseScheme
from halfbyte.bench.gpu_clock import Device
from halfbyte.cuda import library
from halfbyte.cuda.library import Dequantize, Finish, Linear, Rows
from halfbyte.cuda.pack import CudaPackedWeight, pack
from halfbyte.cuda.sparse import BLOCKS, TWO_OF_FOUR, CudaSparseWeight

from .record import Skipped, Wrong

PATTERNS = {"2:4": TWO_OF_FOUR, "blocks": BLOCKS}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.int8: 4}
GUARD = 64  # elements behind each row of an output that nothing may write


def loaded() -> library.Library:
    found = library.library()
    if found is None:
        raise RuntimeError(library.missing())
    return found


def random_tensor(
    scheme: str,
    n: int,
    k: int,
    device: torch.device,
    *,
    scale_dtype: torch.dtype = torch.float16,
    minima: bool = False,
) -> QuantizedTensor:
    """A weight of random codes, with zero points or minima, that makes outputs of about 1."""
    form = Scheme.parse(scheme)
    wide, groups = form.weight_bits == 8, form.groups(k)
    shape, dtype = ((n, k), torch.int8) if wide else ((n, (k + 1) // 2), torch.uint8)
    codes = torch.randint(-127 if wide else 0, 128 if wide else 256, shape, dtype=dtype, device=device)
    scale = (0.5 + torch.rand(n, device=device)) / ((70 if wide else 5) * k**0.5)
    group_scale = (0.5 + 0.5 * torch.rand(n, groups, device=device)).to(scale_dtype) if form.group else None
    zero = minimum = None
    if form.asym and minima:
        minimum = torch.randn(n, groups, device=device).to(scale_dtype)
    elif form.asym:
        least, most = (-20, 20) if wide else (4, 12)
        zero = torch.randint(least, most, (n, groups), dtype=torch.int8, device=device)
    return QuantizedTensor(codes, scale, form, k, group_scale, zero, minimum)


def dense(q: QuantizedTensor) -> torch.Tensor:
    """The weight in float64, from its definition."""
    n, k = q.shape
    c = q.codes
    if q.scheme.weight_bits == 4:
        c = torch.stack([c & 15, c >> 4], 2).reshape(n, -1)[:, :k]
    c = c.double()
    if q.scheme.weight_bits == 4 and q.zero is None and q.minimum is None:
        c = c - 8
    spread = q.scheme.group or k

    def each(part: torch.Tensor) -> torch.Tensor:
        return part.double().repeat_interleave(spread, 1)[:, :k]

    if q.zero is not None:
        c = c - each(q.zero)
    if q.group_scale is not None:
        c = c * each(q.group_scale)
    if q.minimum is not None:
        c = c + each(q.minimum)
    return c * q.scale.double()[:, None]


def with_zeros(q: QuantizedTensor, pattern: int, density: float = 0.5) -> QuantizedTensor:
    """Codes of w8a8, of which two of four, or this share of the blocks of 64 x 64, stay."""
    n, k = q.shape
    rows, depth, where = -(-n // 64), -(-k // 64), q.codes.device
    if pattern == TWO_OF_FOUR:
        order = torch.rand(n, depth * 16, 4, device=where).argsort(2)
        kept = (order < 2).view(n, -1)[:, :k]
    else:
        there = torch.rand(rows, depth, device=where) < density
        kept = there.repeat_interleave(64, 0).repeat_interleave(64, 1)[:n, :k]
    return QuantizedTensor(torch.where(kept, q.codes, 0), q.scale, q.scheme)


def packed_zeros(q: QuantizedTensor, pattern: int) -> CudaSparseWeight:
    """The codes of `with_zeros` without their zeros."""
    scheme = SparseScheme.parse("w8a8+2:4" if pattern == TWO_OF_FOUR else "w8a8+unstructured")
    return CudaSparseWeight(q.codes, q.scale, scheme, pattern)


def random_weight(
    scheme: str, n: int, k: int, device: torch.device
) -> tuple[QuantizedTensor, CudaPackedWeight]:
    """(codes, packed) of a scheme, or of w8a8+2:4 or w8a8+blocks, of which a tenth stays."""
    dense_scheme, _, zeros = scheme.partition("+")
    if zeros not in PATTERNS:
        q = random_tensor(scheme, n, k, device)
        return q, packed_tensor(q)
    q = with_zeros(random_tensor(dense_scheme, n, k, device), PATTERNS[zeros], density=0.1)
    return q, packed_zeros(q, PATTERNS[zeros])


def packed_tensor(q: QuantizedTensor) -> CudaPackedWeight:
    made = pack(q)
    if not isinstance(made, CudaPackedWeight):
        raise RuntimeError(f"{q.scheme} was not packed: {made.why}")
    return made


@dataclass
class Output:
    """A matrix [m, n] full of NaN, with a guard behind each row and one more row of it."""

    m: int
    n: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self.whole = torch.empty(self.m + 1, self.n + GUARD, dtype=self.dtype, device=self.device)
        self.poison()

    def poison(self) -> None:
        self.whole.fill_(torch.nan)

    @property
    def value(self) -> torch.Tensor:
        return self.whole[: self.m, : self.n]

    def check(self) -> None:
        """Every element was written, and nothing else."""
        written = ~self.whole.isnan()
        inside = written[: self.m, : self.n]
        if not inside.all():
            raise Wrong("elements that were not written, or NaN")
        if written.sum() != inside.numel():
            raise Wrong("written behind a row")


@dataclass
class Codes:
    """int8 rows, padded to what the kernels read at once, with their scales and zero points."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    k: int

    @classmethod
    def random(cls, m: int, k: int, device: torch.device, *, symmetric: bool = False) -> Codes:
        codes = torch.zeros(m, -(-k // 16) * 16, dtype=torch.int8, device=device)
        codes[:, :k] = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device)
        zero = torch.randint(-128, 128, (m,), dtype=torch.int32, device=device)
        return cls(codes, (0.5 + torch.rand(m, device=device)) / 100, None if symmetric else zero, k)

    def dense(self) -> torch.Tensor:
        c = self.codes[:, : self.k].double()
        if self.zero is not None:
            c = c - self.zero.double()[:, None]
        return c * self.scale.double()[:, None]


def padded_rows(x: torch.Tensor) -> torch.Tensor:
    """The same rows 16 bytes aligned, k a multiple of 8, as the kernels take floats."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 8)).contiguous()


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def linear_call(
    weight: CudaPackedWeight,
    x: torch.Tensor | Codes,
    y: torch.Tensor,
    *,
    gate: CudaPackedWeight | None = None,
    bias: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    **numbers: int,
) -> Linear:
    """A call; what it points to must outlive it. numbers: activation, arch, splits, warps."""
    codes = x if isinstance(x, Codes) else None
    rows = codes.codes if codes else x
    return Linear(
        x=rows.data_ptr(), x_scale=address(codes.scale) if codes else None,
        x_zero=address(codes.zero) if codes else None, weight=weight.weight.data_ptr(),
        scale=weight.scale.data_ptr(), total=address(weight.total), bias=address(bias),
        starts=address(weight.starts), columns=address(weight.columns),
        gate=address(gate.weight) if gate else None, gate_scale=address(gate.scale) if gate else None,
        gate_total=address(gate.total) if gate else None, gate_bias=address(gate_bias),
        residual=address(residual), y=y.data_ptr(), ldx=rows.stride(0), ldy=y.stride(0),
        ld_residual=residual.stride(0) if residual is not None else 0, m=len(rows), n=weight.shape[0],
        k=rows.shape[1], x_type=TYPES[rows.dtype], y_type=TYPES[y.dtype],
        residual_type=TYPES[residual.dtype] if residual is not None else 0, format=weight.format, **numbers,
    )  # fmt: skip


def runner(device: Device, call: Linear | Rows | Finish | Dequantize, *keep: object) -> Callable[[], None]:
    """What runs a call on the current stream. keep: what must live as long; a workspace is made here."""
    lib, kind = loaded(), type(call).__name__.lower()
    run = getattr(lib, f"{kind}_run")
    if isinstance(call, Linear):
        size = lib.linear_workspace(ctypes.byref(call))
        if size < 0:
            raise Skipped(lib.explain(int(size)))
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device.device)
        call.workspace, call.workspace_bytes = workspace.data_ptr(), size
        keep = (*keep, workspace)

    def start(alive: object = keep) -> None:
        lib.check(run(ctypes.byref(call), device.stream()), kind)

    return start


def bytes_of(weight: CudaPackedWeight, m: int, x_bytes: int, y_bytes: int) -> int:
    """What a call must move at least: the weight, x and y once."""
    n, k = weight.shape
    return weight.nbytes + m * (k * x_bytes + n * y_bytes)

