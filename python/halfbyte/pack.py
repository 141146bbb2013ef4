"""PackedWeight: a weight in the layout that this machine's kernels read. A cache, never saved."""

from __future__ import annotations

from typing import Any

from . import _core
from .arrays import F32, Array, kind_of, on_gpu
from .dispatch import isa_errors
from .errors import DTypeError
from .quantized_tensor import PARTS, QuantizedTensor
from .scheme import Scheme
from .sparse.scheme import SparseScheme
from .sparse.tensor import SparseTensor


class PackedWeight:
    """Packed weights [n, k]; immutable, safe to share between threads. Made by `pack`."""

    __slots__ = ("core", "scheme")
    shares_codes = False  # it is a copy: codes may be freed

    def __init__(self, core: _core.PackedWeight, scheme: Scheme | SparseScheme):
        self.core = core
        self.scheme = scheme

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k): output channels, input features."""
        return self.core.n, self.core.k

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copy, padding included."""
        return self.core.nbytes

    @property
    def kernel(self) -> str:
        """Name of the kernel that would run now, on this thread."""
        with isa_errors:
            return _core.select(self.core.op)

    def __repr__(self) -> str:
        n, k = self.shape
        return f"PackedWeight({n}x{k}, scheme={self.scheme}, kernel={self.kernel}, nbytes={self.nbytes})"


class GpuWeight:
    """A weight [n, k] on a GPU, for the ops there: halfbyte.cuda.pack has the two kinds. Made by `pack`."""

    __slots__ = ("shape", "scheme", "device", "__weakref__")
    shares_codes = False  # whether it reads the codes that it was made of

    def __init__(self, shape: tuple[int, int], scheme: Scheme | SparseScheme, device: Any):
        self.shape = shape
        self.scheme = scheme
        self.device = device

    def __reduce_ex__(self, protocol: int) -> Any:
        raise TypeError(
            f"a {type(self).__name__} is a cache of one GPU, which is neither pickled nor copied: do so with "
            "the QuantizedTensor, the SparseTensor or the layer, and pack that"
        )

    def __repr__(self) -> str:
        (n, k), on = self.shape, f"device={str(self.device)!r}"
        made = f"kernel={self.kernel}, nbytes={self.nbytes}"
        return f"{type(self).__name__}({n}x{k}, scheme={self.scheme}, {on}, {made})"


def pack(q: QuantizedTensor | SparseTensor) -> PackedWeight | GpuWeight:
    """Lay a weight out for the kernels of the machine or, of tensors on a GPU, for those of the GPU. One pack
    serves every batch size, every ISA and every architecture.
    """
    if not isinstance(q, (QuantizedTensor, SparseTensor)):
        raise DTypeError(
            "pack takes the QuantizedTensor that quantize() returns, or the SparseTensor of sparsify(), not "
            f"{type(q).__name__}"
        )
    if on_gpu(q.values if isinstance(q, SparseTensor) else q.codes):
        from .cuda.pack import pack as pack_on_gpu

        return pack_on_gpu(q)
    if isinstance(q, SparseTensor):
        return _pack_sparse(q)
    kind = kind_of(q.codes, "codes")
    dense: dict[str, Array] = {}
    for what in PARTS[1:]:
        if (part := getattr(q, what)) is not None:
            kind.check_memory(part, what)
            dense[what] = kind.cast(part, part.dtype)
    pointers = {what: kind.pointer(part) for what, part in dense.items()}
    n, k = q.shape
    codes, ld = kind.rows(q.codes, q.codes.shape[1])
    with isa_errors:
        core = _core.pack_linear(
            q.scheme.op,
            kind.pointer(codes),
            n,
            k,
            ld,
            group=q.scheme.group,
            group_scale_type=kind.codes[q.scale.dtype if q.group_scale is None else q.group_scale.dtype],
            nf4=q.scheme.nf4,
            activation_group=q.scheme.activation_group,
            **pointers,
        )
    return PackedWeight(core, q.scheme)


def _pack_sparse(weight: SparseTensor) -> PackedWeight:
    kind, scheme, (n, k) = kind_of(weight.values, "values"), weight.scheme, weight.shape
    dense, ld = kind.rows(weight.to_dense() if weight.scale is None else weight.codes(), k)
    scale = None if weight.scale is None else kind.cast(weight.scale, kind.float32)
    groups = {}
    if (group_scale := weight.group_scale) is not None:
        group_scale = kind.cast(group_scale, group_scale.dtype)
        groups = {
            "group": scheme.group,
            "group_scale": kind.pointer(group_scale),
            "group_scale_type": kind.codes[group_scale.dtype],
        }
    grouped = scheme.per_token and scheme.pattern.kind == "nm"  # the op of floats has an index for each value
    with isa_errors:
        core = _core.pack_sparse(
            scheme.op,
            kind.pointer(dense),
            F32,
            n,
            k,
            ld,
            scale=0 if scale is None else kind.pointer(scale),
            nonzero=scheme.pattern.n if grouped else 0,
            of=scheme.pattern.m if grouped else 0,
            **groups,
        )
    return PackedWeight(core, scheme)
