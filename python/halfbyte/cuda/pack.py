"""Weights on a GPU: in the layout of csrc/cuda/layout.h, which torch operations make, or left to torch."""

from __future__ import annotations

import weakref
from ctypes import byref

import torch
from torch import Tensor
from torch.nn.functional import pad as padded
from torch.utils._python_dispatch import _disable_current_modes

from ..arrays import place_of
from ..errors import CudaError
from ..pack import GpuWeight
from ..quantize import K_MAX
from ..quantized_tensor import NF4_CODES, PARTS, QuantizedTensor, unscaled
from ..scheme import Scheme
from ..sparse.scheme import SparseScheme
from ..sparse.tensor import SparseTensor
from . import library
from .library import Format, Linear
from .rows import TYPES, on

TILE_N, TILE_K = 64, 128
CODES_K, FLOATS_K = 16, 8  # what the kernel's k is a multiple of: 16 bytes of x
_WHOLE = 128  # the group of a weight that has zero points but no groups: of the scale 1
_MAKE_AT_ONCE = 1 << 24  # elements of a weight that is dequantized: of float32, 64 MiB
W8A8 = Scheme(8, 8)


class CudaPackedWeight(GpuWeight):
    """A weight [n, k] packed for the kernels of halfbyte.cuda; immutable. Made by `pack`."""

    __slots__ = ("weight", "scale", "total", "format", "activation_bits", "_codes")
    starts = columns = None  # of stored blocks
    few_blocks = False

    def __init__(self, q: QuantizedTensor, form: Format):
        super().__init__(q.shape, q.scheme, q.codes.device)
        self.format = form
        self.activation_bits = q.scheme.activation_bits
        codes, scales, offsets = _parts(q, form)
        self.weight = tiles_of(codes, scales, offsets, form)
        self.scale = q.scale.detach().clone(memory_format=torch.contiguous_format)
        self.total = _total(q, codes, scales, offsets, form) if q.scheme.per_token else None
        self._remember(q.codes)

    def _remember(self, codes: Tensor) -> None:
        """Row-major codes serve torch._int_mm as they are, for as long as somebody else keeps them."""
        self._codes = None
        if (self.format.bits, self.format.group, self.activation_bits) == (8, 0, 8):
            (n, k), dense = codes.shape, codes.is_contiguous() and codes.data_ptr() % 16 == 0
            if n % 8 == k % 16 == 0 and dense and not codes.is_inference():
                self._codes = weakref.ref(codes), _state(codes)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.scale, self.total) if t is not None)

    @property
    def kernel(self) -> str:
        return kernel_name(self.format, self.activation_bits, self.shape, self.device)

    def rows(self) -> Tensor:
        """int8 codes of w8a8 by rows, for torch._int_mm: [n, k], or padded with zeros to whole tiles."""
        if self._codes is not None:
            codes, state = self._codes[0](), self._codes[1]
            if codes is not None and _state(codes) == state:
                return codes.detach()
        return self.matrix(self._split()[0])

    def unpack_into(self, codes: Tensor) -> None:
        """Write the codes as a QuantizedTensor has them, unseen by modes that record or fake."""
        check_not_captured(codes)
        n, k = self.shape
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            c = self.matrix(self._split()[0])[:n, :k]
            codes.copy_(c if self.format.bits == 8 else _to_nibbles(c))
        finish(self.device)
        self._remember(codes)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [n, k], each value rounded to `dtype` from float32."""
        n, k = self.shape
        out = torch.empty(n, k, dtype=dtype, device=self.device)
        tiles = max(1, _MAKE_AT_ONCE // (TILE_N * max(k, 1)))
        for first in range(0, -(-n // TILE_N), tiles):
            at = slice(first * TILE_N, min((first + tiles) * TILE_N, n))
            codes, scales, offsets = self._split(slice(first, first + tiles))
            value = self.matrix(codes)[: at.stop - at.start, :k].float()
            if self.format.bits == 4:
                value -= 8
            if scales is not None:
                value *= self._spread(scales, self.format.scale_bytes)[: at.stop - at.start, :k]
            if offsets is not None:
                value += self._spread(offsets, 4)[: at.stop - at.start, :k]
            out[at] = value.mul_(self.scale[at, None])
        return out

    def matrix(self, codes: Tensor) -> Tensor:
        """The codes of tiles [n tiles, k tiles, bytes] as they are stored, by rows and padded."""
        n_tiles, k_tiles, _ = codes.shape
        if self.format.bits == 8:
            c = codes.view(torch.int8).reshape(n_tiles, k_tiles, 4, 4, 8, 4, 2, 2, 4)
            c = c.permute(0, 3, 7, 4, 1, 2, 5, 6, 8)
        else:
            c = codes.reshape(n_tiles, k_tiles, 2, 4, 8, 4, 2, 2, 2, 2)
            c = torch.stack([c & 15, c >> 4]).permute(1, 4, 0, 5, 2, 3, 7, 6, 8, 10, 9)
        return c.reshape(n_tiles * TILE_N, k_tiles * TILE_K)

    def _split(self, tiles: slice = slice(None)) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The bytes of codes, scales and offsets of tiles of channels: [n tiles, k tiles, bytes]."""
        groups = _groups(self.format)
        sizes = [TILE_N * TILE_K * self.format.bits // 8, groups * TILE_N * self.format.scale_bytes]
        sizes.append(groups * TILE_N * 4 * self.format.offsets)
        codes, scales, offsets = self.weight[tiles].split(sizes, 2)
        return codes, scales if sizes[1] else None, offsets if sizes[2] else None

    def _spread(self, parts: Tensor, size: int) -> Tensor:
        """The bytes of scales or offsets as one float32 for each channel and k."""
        groups, (n, k, _) = _groups(self.format), parts.shape
        values = parts.contiguous().view(torch.float16 if size == 2 else torch.float32).float()
        values = values.reshape(n, k, groups, 8, 4, 2).permute(0, 4, 5, 3, 1, 2)
        return values.reshape(n * TILE_N, k * groups).repeat_interleave(self.format.group, 1)


class TorchWeight(GpuWeight):
    """A weight [n, k] that no kernel of halfbyte.cuda multiplies by: torch does, with its values made anew at
    every call. `why` says what is in the way.
    """

    __slots__ = ("source", "why", "shares_codes")
    kernel = "torch"

    def __init__(self, source: QuantizedTensor | Tensor, scheme: Scheme | SparseScheme, why: str):
        dense = isinstance(source, Tensor)
        super().__init__(tuple(source.shape), scheme, source.device if dense else source.codes.device)
        self.source = source
        self.why = why
        self.shares_codes = not dense

    @property
    def nbytes(self) -> int:
        return 0 if self.shares_codes else self.source.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [n, k], each value rounded to `dtype` from float32."""
        if isinstance(self.source, Tensor):
            return self.source.to(dtype)
        return dequantized(self.source, dtype)


def dequantized(q: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """`q.dequantize()` in `dtype`, some rows at a time, so that float32 takes little memory."""
    n, k = q.shape
    out = torch.empty(n, k, dtype=dtype, device=q.codes.device)
    step = max(1, _MAKE_AT_ONCE // max(k, 1))
    for first in range(0, n, step):
        parts = [None if (p := getattr(q, what)) is None else p[first : first + step] for what in PARTS]
        codes, scale, *rest = parts
        out[first : first + step] = unscaled(codes, q.scheme, k, *rest).mul_(scale[:, None])
    return out


def pack(weight: QuantizedTensor | SparseTensor) -> GpuWeight:
    """The weight on a GPU for the ops: packed, or a TorchWeight that says why not."""
    if isinstance(weight, SparseTensor):
        from .sparse import pack as pack_sparse

        return pack_sparse(weight)
    kind = place_of(weight.codes, "codes")
    for what in PARTS[1:]:
        if (part := getattr(weight, what)) is not None:
            kind.check_memory(part, what)
    form, why = format_for(weight.scheme, weight.shape, weight.codes.device, weight.group_scale)
    if why:
        if weight.scheme.nf4 and not kind.has_table(NF4_CODES, weight.codes):
            check_not_captured(weight.codes)
            kind.table(NF4_CODES, weight.codes)
        return TorchWeight(weight, weight.scheme, why)
    check_not_captured(weight.codes)
    with torch.no_grad():
        packed = CudaPackedWeight(weight, form)
    finish(packed.device)
    return packed


_NEW = (
    "a weight or a scale is new or has changed, and what calls need of it would be made here: call the model "
    "once"
)


def check_not_captured(tensor: Tensor, what: str = _NEW) -> None:
    """CudaError where a CUDA graph is being captured: what is packed then would be a part of it."""
    if _capturing(tensor):
        raise CudaError(f"{what} before a CUDA graph is captured")


def _capturing(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    with on(tensor.device):
        return torch.cuda.is_current_stream_capturing()


def finish(device: torch.device) -> None:
    """Wait for what was packed, which calls on other streams read too; nothing captures a graph."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def format_for(
    scheme: Scheme, shape: tuple[int, int], device: torch.device, group_scale: Tensor | None
) -> tuple[Format | None, str]:
    """How the kernels of a GPU read such a weight; or why torch computes with it there, which is so of every
    call then.
    """
    form, why = format_of(scheme, shape[1], group_scale)
    if not shape[0]:
        why = "the weight has no output channels"
    why = why or library.obstacle(device.index or 0)
    return form, why or no_kernel(form, scheme.activation_bits, shape, device)


def no_kernel(form: Format, activation_bits: int, shape: tuple[int, int], device: torch.device) -> str:
    """Why the library has no kernel for a weight; empty where it has. Whether it has does not depend on the
    number of rows.
    """
    if kernel_name(form, activation_bits, shape, device):
        return ""
    return f"no kernel of the library takes a weight of {shape[0]} x {shape[1]} on this GPU"


def kernel_name(form: Format, activation_bits: int, shape: tuple[int, int], device: torch.device) -> str:
    """The library's name of its kernel for one row; empty where it has none."""
    (n, k), codes = shape, activation_bits == 8
    k = -(-k // CODES_K) * CODES_K
    call = Linear(m=1, n=n, k=k, x_type=TYPES[torch.int8 if codes else torch.float16], format=form)
    with on(device):
        return (library.library().linear_kernel(byref(call)) or b"").decode()


def format_of(scheme: Scheme, k: int, group_scale: Tensor | None) -> tuple[Format | None, str]:
    """How the kernels read such a weight of k input features; or None and why none does."""
    if scheme.nf4:
        return None, "no kernel for the levels of +nf4"
    if scheme.activation_group:
        return None, "no kernel for activations with scales per group (+ag)"
    if k == 0:
        return None, "the weight has no input features"
    if scheme.activation_bits == 8 and k > K_MAX:
        return None, f"sums of more than {K_MAX} products of int8 could overflow"
    scale_bytes = 4 if group_scale is not None and group_scale.dtype == torch.float32 else 2
    group = scheme.group or (_WHOLE if scheme.asym else 0)
    return Format(scheme.weight_bits, group, scale_bytes, scheme.asym), ""


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor._version, tensor.data_ptr()


def _groups(form: Format) -> int:
    """Of a tile."""
    return TILE_K // form.group if form.group else 0


def _parts(q: QuantizedTensor, form: Format) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes as they are stored [n, k] (of 4 bits u = c + 8), group scales and float32 offsets [n, groups]."""
    n, k = q.shape
    codes = q.codes.detach()
    if form.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], 2).reshape(n, 2 * codes.shape[1])[:, :k]
    if not form.group:
        return codes, None, None
    groups, scales, offsets = -(-k // form.group), q.group_scale, None
    if scales is None:
        scales = torch.ones(n, 1, dtype=torch.float16, device=codes.device)
    if q.zero is not None:
        offsets = ((8 if form.bits == 4 else 0) - q.zero.float()) * scales.float()
    elif q.minimum is not None:
        offsets = q.minimum.float() + (8 if form.bits == 4 else 0) * scales.float()
    return codes, *(None if p is None else p.detach().expand(n, groups) for p in (scales, offsets))


def _total(
    q: QuantizedTensor, codes: Tensor, scales: Tensor | None, offsets: Tensor | None, form: Format
) -> Tensor:
    """[n]: the sum over k of the weight without `scale`, in float64 and rounded once; of codes as int32."""
    (n, k), group = q.shape, form.group or q.shape[1]
    groups = -(-k // group)
    sums = padded(codes, (0, groups * group - k)).reshape(n, groups, group).sum(2, dtype=torch.int32)
    in_group = torch.full((groups,), group, dtype=torch.int32, device=codes.device)
    in_group[-1] = k - (groups - 1) * group
    if form.bits == 4:
        sums = sums - 8 * in_group
    if scales is None:
        return sums[:, 0].contiguous() if form.bits == 8 else sums[:, 0].float()
    total = sums.double() * scales.double()
    if offsets is not None:
        total += offsets.double() * in_group
    return total.sum(1).float()


def tiles_of(codes: Tensor, scales: Tensor | None, offsets: Tensor | None, form: Format) -> Tensor:
    """uint8 [n tiles, k tiles, bytes of a tile]."""
    n, k = codes.shape
    n_tiles, k_tiles = -(-n // TILE_N), -(-k // TILE_K)
    zero = 8 if form.bits == 4 else 0
    c = padded(codes, (0, k_tiles * TILE_K - k, 0, n_tiles * TILE_N - n), value=zero).contiguous()
    if form.bits == 8:  # piece column, upper, g | piece, t, s, j
        c = c.view(n_tiles, 4, 2, 8, k_tiles, 4, 4, 2, 4).permute(0, 4, 5, 1, 3, 6, 7, 2, 8)
    else:  # piece column, upper, g | piece, half, t, s, j as two bits
        c = c.view(n_tiles, 4, 2, 8, k_tiles, 2, 2, 4, 2, 2, 2)
        c = c[:, :, 0] | c[:, :, 1] << 4
        c = c.permute(0, 3, 4, 1, 2, 6, 5, 7, 9, 8)
    pieces = [c.reshape(n_tiles, k_tiles, -1).view(torch.uint8)]
    for part in (scales, offsets):
        if part is not None:
            size = k_tiles * _groups(form)
            p = padded(part, (0, size - part.shape[1], 0, n_tiles * TILE_N - n)).contiguous()
            p = p.view(n_tiles, 4, 2, 8, k_tiles, _groups(form)).permute(0, 4, 5, 3, 1, 2)
            pieces.append(p.contiguous().view(n_tiles, k_tiles, -1).view(torch.uint8))
    return torch.cat(pieces, 2)


def _to_nibbles(u: Tensor) -> Tensor:
    u = padded(u, (0, u.shape[1] % 2))
    return u[:, 0::2] | u[:, 1::2] << 4

