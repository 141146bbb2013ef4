"""PackedWeight: a QuantizedTensor in the layout that this machine's kernels read. A cache, never saved."""

from __future__ import annotations

from . import _core
from .arrays import kind_of
from .dispatch import isa_errors
from .errors import DTypeError
from .quantize import QuantizedTensor
from .scheme import Scheme


class PackedWeight:
    """Packed weights [n, k]; immutable, safe to share between threads. Made by `pack`."""

    __slots__ = ("core", "scheme")

    def __init__(self, core: _core.PackedWeight, scheme: Scheme):
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


def pack(q: QuantizedTensor) -> PackedWeight:
    """Lay the codes of `q` out for the kernels of this machine. One pack serves every batch size and every
    ISA.
    """
    if not isinstance(q, QuantizedTensor):
        raise DTypeError(f"pack takes the QuantizedTensor that quantize() returns, not {type(q).__name__}")
    kind = kind_of(q.codes, "codes")
    n, k = q.shape
    codes, ld = kind.rows(q.codes, k)
    scale = kind.cast(q.scale, kind.float32)
    with isa_errors:
        core = _core.pack_linear_w8a8(kind.pointer(codes), n, k, ld, kind.pointer(scale))
    return PackedWeight(core, q.scheme)
