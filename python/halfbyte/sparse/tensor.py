"""SparseTensor: the values of a pruned weight and where they lie, on every machine the same; `sparsify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import NUMPY, Array, Gpu, Kind, check_owner, float_code, kind_of, owner_of, place_of
from ..errors import DTypeError, PatternError, SchemeError, ShapeError
from ..quantize import non_finite, quantize
from ..quantized_tensor import QuantizedTensor
from ..scheme import Scheme
from . import exchange
from .check import check_values
from .layout import compress, expand
from .scheme import SparseScheme

PARTS = ("values", "crow", "columns", "positions", "scale")  # the arrays of a SparseTensor
_VALUES = {"w8a8": "int8", "f32": "float32", "bf16": "bfloat16"}
_W8A8 = Scheme(8, 8)


@dataclass(frozen=True, eq=False, repr=False)
class SparseTensor:
    """A pruned weight matrix [n, k]: what is saved, loaded and compared; `pack` lays it out for the kernels.

    values: int8 codes (w8a8), float32 (f32) or torch.bfloat16 (bf16). shape: (n, k).
    Unstructured and blocks of R x C, as torch.sparse_csr and sparse_bsr have them: values [stored] or
    [stored, R, C], crow [block rows + 1], the end of each row of blocks among them, and columns [stored], in
    which block column each is, ascending within a row; crow and columns int32 or int64.
    N:M: values [n, groups * N], groups = ceil(k / M), and positions uint8 [n, ceil(groups * N / 2)]: where in
    its group of M features each value is, two 4-bit numbers to a byte, the first in the low half, ascending
    within a group. A group with fewer nonzero values stores zeros, at any other of its positions.
    scale: float32 [n], a positive factor per output channel, with w8a8; else None.

    The weight is what the values say, times `scale[:, None]`, and 0 elsewhere. What lies outside of [n, k],
    in the last blocks and groups of a weight that they do not divide, is 0. The arrays are all numpy or all
    torch. Raises DTypeError, ShapeError, PatternError (indices), NonFiniteError or ValueError (scale), naming
    the array. Numbers are not looked at in fake tensors and on other devices than the CPU.
    """

    values: Array
    scheme: SparseScheme
    shape: tuple[int, int]
    crow: Array | None = None
    columns: Array | None = None
    positions: Array | None = None
    scale: Array | None = None

    def __post_init__(self) -> None:
        kind = owner_of(self.values, "values")
        for what in PARTS[1:]:
            if (part := getattr(self, what)) is not None:
                check_owner(kind, part, what, "values")
        self._check_presence()
        self._check_dtypes()
        self._check_shapes()
        parts = self.parts()
        if all(kind.has_values(part) for part in parts.values()):
            check_values({what: numpy_of(kind, p) for what, p in parts.items()}, self.scheme, self.shape)

    def _check_presence(self) -> None:
        wanted = {"positions"} if self.scheme.pattern.kind == "nm" else {"crow", "columns"}
        wanted |= {"scale"} if self.scheme.values == "w8a8" else set()
        for what in PARTS[1:]:
            if (getattr(self, what) is None) == (what in wanted):
                verb = "lacks" if what in wanted else "takes no"
                raise ShapeError(f"a SparseTensor of the scheme {self.scheme} {verb} {what}")

    def _check_dtypes(self) -> None:
        dtypes = {
            "values": (_VALUES[self.scheme.values],),
            "crow": ("int32", "int64"),
            "columns": ("int32", "int64"),
            "positions": ("uint8",),
            "scale": ("float32",),
        }
        for what, part in self.parts().items():
            if _name(part.dtype) not in dtypes[what]:
                names = " or ".join(dtypes[what])
                raise DTypeError(f"{what} has the dtype {part.dtype}; it must be {names}")

    def _check_shapes(self) -> None:
        try:
            n, k = (int(size) for size in self.shape)
        except (TypeError, ValueError):
            raise ShapeError(f"shape is {self.shape!r}; it must be a pair of integers (n, k)") from None
        if min(n, k) < 1:
            raise ShapeError(f"shape is {(n, k)}; there is nothing in such a weight")
        object.__setattr__(self, "shape", (n, k))
        p = self.scheme.pattern
        if p.kind == "nm":
            count = -(-k // p.m) * p.n
            wanted = {"values": (n, count), "positions": (n, -(-count // 2))}
        else:
            stored = tuple(self.columns.shape)[:1] or (0,)
            block = () if p.kind == "unstructured" else (p.rows, p.columns)
            wanted = {"columns": stored, "values": stored + block, "crow": (-(-n // p.rows) + 1,)}
        for what, shape in (wanted | {"scale": (n,)}).items():
            part = getattr(self, what)
            if part is not None and tuple(part.shape) != shape:
                raise ShapeError(
                    f"{what} has the shape {tuple(part.shape)}; it must be {shape} in a weight {n} x {k} of "
                    f"the scheme {self.scheme}"
                )

    @classmethod
    def from_mask(
        cls, weight: Array, mask: Array, scheme: str | SparseScheme, *, name: str = "weight"
    ) -> SparseTensor:
        """`weight` [n, k] where `mask` [n, k] is true or not 0, such as a 2:4 mask, and 0 elsewhere.

        Raises what `sparsify` does, and ShapeError for a mask of another shape.
        """
        kind = kind_of(weight, name)
        check_owner(kind, mask, "the mask", name)
        kind.check_memory(mask, "the mask")
        if tuple(mask.shape) != tuple(weight.shape):
            raise ShapeError(
                f"the mask has the shape {tuple(mask.shape)}; it must be that of {name}, "
                f"{tuple(weight.shape)}"
            )
        return sparsify(kind.module.where(mask != 0, weight, 0), scheme, name=name)

    @classmethod
    def from_torch(
        cls, tensor: Any, scheme: str | SparseScheme | None = None, *, name: str = "weight"
    ) -> SparseTensor:
        """Of a torch.sparse_csr or sparse_bsr tensor [n, k] of floats, or of a dense one as `sparsify` does.

        scheme: by default that of float values with the pattern of the tensor: f32+unstructured,
        f32+block16x1 or bf16+block16x1. float64 values are rounded to float32. Zeros that are stored need not
        be kept. Raises PatternError for indices that are unsorted, appear twice or lie outside, and what
        `sparsify` does.
        """
        return exchange.from_torch(tensor, scheme, name)

    def to_torch(self) -> Any:
        """The float32 weight as torch.sparse_bsr where blocks divide it, as they must there; else, and of
        other patterns, torch.sparse_csr.
        """
        return exchange.to_torch(self)

    @classmethod
    def from_scipy(
        cls, matrix: Any, scheme: str | SparseScheme | None = None, *, name: str = "weight"
    ) -> SparseTensor:
        """The same of a scipy.sparse CSR or BSR matrix or array; the arrays are numpy's."""
        return exchange.from_scipy(matrix, scheme, name)

    def to_scipy(self) -> Any:
        """The float32 weight as scipy.sparse.bsr_array where blocks divide it, else csr_array."""
        return exchange.to_scipy(self)

    @property
    def density(self) -> float:
        """The share of the weight that is stored: of blocks those that are kept, of N:M always N/M."""
        return density(self.scheme, self.shape, tuple(self.values.shape))

    @property
    def nnz(self) -> int:
        """Values that are not zero."""
        return int((self.values != 0).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in self.parts().values())

    def parts(self) -> dict[str, Array]:
        """The arrays by name, absent ones left out."""
        return {what: part for what in PARTS if (part := getattr(self, what)) is not None}

    def to_dense(self) -> Array:
        """The weight: float32 [n, k]."""
        dense = place_of(self.values, "values").from_numpy(unscaled(self))
        return dense if self.scale is None else dense * self.scale[:, None]

    def codes(self) -> Array:
        """The int8 codes [n, k] of w8a8, zeros included; SchemeError for other values."""
        if self.scheme.values != "w8a8":
            raise SchemeError(f"a SparseTensor of the scheme {self.scheme} has no codes; use to_dense()")
        return place_of(self.values, "values").from_numpy(_dense(self))

    def rows(self, begin: int, end: int) -> SparseTensor:
        """Output channels begin .. end-1, at least one, as a SparseTensor of their own."""
        kind = place_of(self.values, "values")
        scale = None if self.scale is None else self.scale[begin:end]
        return _of_dense(kind, np.ascontiguousarray(_dense(self)[begin:end]), self.scheme, scale)

    def __repr__(self) -> str:
        (n, k), share = self.shape, f"{self.density:.3g}"
        return f"SparseTensor({n}x{k}, scheme={self.scheme}, density={share}, nbytes={self.nbytes})"


def sparsify(weight: Array, scheme: str | SparseScheme, *, name: str = "weight") -> SparseTensor:
    """The zeros of a weight [n, k] left out, as `scheme` says. `name` is what errors call the weight.

    weight: float32, float16 or (torch) bfloat16, numpy or torch, any strides; with w8a8 it is quantized as
    `quantize(weight, "w8a8")` does, which keeps zeros. Or a QuantizedTensor of w8a8, whose codes stay as they
    are. bf16 rounds to bfloat16 and takes torch tensors.

    Every weight can be stored as unstructured or in blocks, if with many zeros in kept blocks. Raises
    PatternError where the weight is not N:M, saying where: `prune_` first; SchemeError, DTypeError,
    ShapeError, DeviceError and NonFiniteError.
    """
    scheme = SparseScheme.parse(scheme)
    if isinstance(weight, QuantizedTensor):
        if weight.scheme != _W8A8 or scheme.values != "w8a8":
            raise SchemeError(
                f"{name} is quantized as {weight.scheme}; of quantized weights only {_W8A8} can become "
                f"sparse, with a scheme such as w8a8+2:4, not {scheme}"
            )
        kind = kind_of(weight.codes, name)
        kind.check_memory(weight.scale, f"the scale of {name}")
        return _of_dense(kind, numpy_of(kind, weight.codes), scheme, weight.scale, name)
    if scheme.values == "w8a8":
        return sparsify(quantize(weight, _W8A8, name=name), scheme, name=name)
    kind = kind_of(weight, name)
    float_code(kind, weight.dtype, name)
    if weight.ndim != 2 or min(weight.shape) == 0:
        raise ShapeError(f"{name} has the shape {tuple(weight.shape)}; it must be [n, k], neither of them 0")
    if scheme.values == "bf16":
        if kind is NUMPY:
            raise DTypeError(f"{name} is a numpy array; numpy has no bfloat16 for {scheme}: pass a tensor")
        weight = weight.detach().to(kind.torch.bfloat16)
    floats = kind.to_numpy(weight)
    finite = np.isfinite(floats).all(1)
    if not finite.all():
        raise non_finite(name, int(finite.argmin()))
    return _of_dense(kind, floats, scheme, None, name)


def density(scheme: SparseScheme, shape: tuple[int, int], values_shape: tuple[int, ...]) -> float:
    """The share of a weight [n, k] that is stored where the values have a shape."""
    (n, k), p = shape, scheme.pattern
    return p.n / p.m if p.kind == "nm" else values_shape[0] / (-(-n // p.rows) * -(-k // p.columns))


def unscaled(sparse: SparseTensor) -> np.ndarray:
    """The weight before its scale: float32 [n, k]."""
    return np.ascontiguousarray(_dense(sparse), np.float32)


def numpy_of(kind: Kind, part: Array) -> np.ndarray:
    """An array as numpy has it; bfloat16 as float32."""
    if kind is NUMPY:
        return part
    if isinstance(kind, Gpu):
        part = part.cpu()
    return kind.to_numpy(part) if _name(part.dtype) == "bfloat16" else kind.cast(part, part.dtype).numpy()


def _dense(sparse: SparseTensor) -> np.ndarray:
    """[n, k] of int8 codes or of float32."""
    kind = place_of(sparse.values, "values")
    parts = {}
    for what, part in sparse.parts().items():
        kind.check_memory(part, what)
        parts[what] = numpy_of(kind, part)
    return expand(parts, sparse.scheme.pattern, sparse.shape)


def _of_dense(
    kind: Kind, dense: np.ndarray, scheme: SparseScheme, scale: Array | None, name: str = "weight"
) -> SparseTensor:
    """Of a matrix of int8 codes or of float32 that are as `scheme` has them."""
    try:
        parts = compress(dense, scheme.pattern)
    except PatternError as error:
        raise PatternError(
            f"{name} {error}; prune it first: halfbyte.prune_(model, pattern={str(scheme.pattern)!r})"
        ) from None
    arrays = {what: kind.from_numpy(part) for what, part in parts.items()}
    if scheme.values == "bf16":
        arrays["values"] = arrays["values"].to(kind.torch.bfloat16)
    return SparseTensor(**arrays, scheme=scheme, shape=dense.shape, scale=scale)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


