"""SparseTensor: the values of a pruned weight and where they lie, on every machine the same; `sparsify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import NUMPY, Array, Gpu, Kind, check_owner, float_code, kind_of, owner_of, place_of
from ..errors import DTypeError, PatternError, SchemeError, ShapeError
from ..quantize import non_finite, quantize
from ..quantized_tensor import QuantizedTensor, to_nibbles
from ..scheme import Scheme
from . import exchange
from .check import check_values
from .layout import compress, expand
from .scheme import SparseScheme

# The arrays of a SparseTensor.
PARTS = ("values", "crow", "columns", "positions", "scale", "group_scale")
_VALUES = {"w8a8": "int8", "f32": "float32", "bf16": "bfloat16"}
_NIBBLE_ZERO = 8  # how a QuantizedTensor has the code 0


@dataclass(frozen=True, eq=False, repr=False)
class SparseTensor:
    """A pruned weight matrix [n, k]: what is saved, loaded and compared; `pack` lays it out for the kernels.

    values: int8 codes (w8a8), float32 (f32) or torch.bfloat16 (bf16); of w4a8 uint8, the codes + 8 of two
    input features in a byte, that of the first in the low half: [stored, R, C / 2]. shape: (n, k).
    Unstructured and blocks of R x C, as torch.sparse_csr and sparse_bsr have them: values [stored] or
    [stored, R, C], crow [block rows + 1], the end of each row of blocks among them, and columns [stored], in
    which block column each is, ascending within a row; crow and columns int32 or int64.
    N:M: values [n, groups * N], groups = ceil(k / M), and positions uint8 [n, ceil(groups * N / 2)]: where in
    its group of M features each value is, two 4-bit numbers to a byte, the first in the low half, ascending
    within a group. A group with fewer nonzero values stores zeros, at any other of its positions.
    scale: float32 [n], a positive factor per output channel, with w8a8 and w4a8; else None.
    group_scale: float16 or float32 [n, ceil(k / N)], positive, with w4a8_gN; else None.

    The weight is what the values say, times that of its group and `scale[:, None]`, and 0 elsewhere. What
    lies outside of [n, k], in the last blocks and groups of a weight that they do not divide, is 0. The
    arrays are all numpy or all torch. Raises DTypeError, ShapeError, PatternError (indices), NonFiniteError
    or ValueError (scale), naming the array. Numbers are not looked at in fake tensors and on other devices
    than the CPU.
    """

    values: Array
    scheme: SparseScheme
    shape: tuple[int, int]
    crow: Array | None = None
    columns: Array | None = None
    positions: Array | None = None
    scale: Array | None = None
    group_scale: Array | None = None

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
            arrays = {what: numpy_of(kind, part) for what, part in parts.items()}
            arrays["values"] = _numbers(self.scheme, arrays["values"])
            check_values(arrays, self.scheme, self.shape)

    def _check_presence(self) -> None:
        wanted = {"positions"} if self.scheme.pattern.kind == "nm" else {"crow", "columns"}
        wanted |= {"scale"} if self.scheme.quantized else set()
        wanted |= {"group_scale"} if self.scheme.group else set()
        for what in PARTS[1:]:
            if (getattr(self, what) is None) == (what in wanted):
                verb = "lacks" if what in wanted else "takes no"
                raise ShapeError(f"a SparseTensor of the scheme {self.scheme} {verb} {what}")

    def _check_dtypes(self) -> None:
        dtypes = {
            "values": (_VALUES.get(self.scheme.values, "uint8"),),
            "crow": ("int32", "int64"),
            "columns": ("int32", "int64"),
            "positions": ("uint8",),
            "scale": ("float32",),
            "group_scale": ("float16", "float32"),
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
            block = () if p.kind == "unstructured" else (p.rows, p.columns // (2 if self.scheme.group else 1))
            wanted = {"columns": stored, "values": stored + block, "crow": (-(-n // p.rows) + 1,)}
        wanted["scale"] = (n,)
        if self.scheme.group:
            wanted["group_scale"] = (n, -(-k // self.scheme.group))
        for what, shape in wanted.items():
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
        kind = place_of(self.values, "values")
        return int(np.count_nonzero(_numbers(self.scheme, numpy_of(kind, self.values))))

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
        """The codes of w8a8 and w4a8, zeros included: int8 [n, k]; SchemeError for other values."""
        if not self.scheme.quantized:
            raise SchemeError(f"a SparseTensor of the scheme {self.scheme} has no codes; use to_dense()")
        return place_of(self.values, "values").from_numpy(_dense(self))

    def to_quantized(self) -> QuantizedTensor:
        """The same weight with its zeros; SchemeError for float values."""
        codes, scheme = self.codes(), Scheme.parse(self.scheme.values)
        if not self.scheme.group:
            return QuantizedTensor(codes, self.scale, scheme)
        kind = place_of(codes, "codes")
        nibbles = kind.from_numpy(_nibbles(numpy_of(kind, codes)))
        return QuantizedTensor(nibbles, self.scale, scheme, self.shape[1], self.group_scale)

    def rows(self, begin: int, end: int) -> SparseTensor:
        """Output channels begin .. end-1, at least one, as a SparseTensor of their own."""
        kind = place_of(self.values, "values")
        scales = [None if s is None else s[begin:end] for s in (self.scale, self.group_scale)]
        return _of_dense(kind, np.ascontiguousarray(_dense(self)[begin:end]), self.scheme, *scales)

    def __repr__(self) -> str:
        (n, k), share = self.shape, f"{self.density:.3g}"
        return f"SparseTensor({n}x{k}, scheme={self.scheme}, density={share}, nbytes={self.nbytes})"


def sparsify(weight: Array, scheme: str | SparseScheme, *, name: str = "weight") -> SparseTensor:
    """The zeros of a weight [n, k] left out, as `scheme` says. `name` is what errors call the weight.

    weight: float32, float16 or (torch) bfloat16, numpy or torch, any strides; with w8a8 and w4a8_gN it is
    quantized as `quantize(weight, "w8a8")` does, which keeps zeros. Or a QuantizedTensor of that scheme,
    whose codes stay as they are. bf16 rounds to bfloat16 and takes torch tensors.

    Every weight can be stored as unstructured or in blocks, if with many zeros in kept blocks. Raises
    PatternError where the weight is not N:M, saying where: `prune_` first; SchemeError, DTypeError,
    ShapeError, DeviceError and NonFiniteError.
    """
    scheme = SparseScheme.parse(scheme)
    if isinstance(weight, QuantizedTensor):
        if str(weight.scheme) != scheme.values:
            raise SchemeError(
                f"{name} is quantized as {weight.scheme}, which cannot become {scheme}: codes stay as they "
                "are, so those of w8a8 take a scheme such as w8a8+2:4, of w4a8_g64 w4a8_g64+block16x4"
            )
        kind = kind_of(weight.codes, name)
        for part in (weight.scale, weight.group_scale):
            if part is not None:
                kind.check_memory(part, f"the scale of {name}")
        codes = np.ascontiguousarray(numpy_of(kind, weight.unpacked()))
        return _of_dense(kind, codes, scheme, weight.scale, weight.group_scale, name)
    if scheme.quantized:
        return sparsify(quantize(weight, scheme.values, name=name), scheme, name=name)
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
    return _of_dense(kind, floats, scheme, name=name)


def density(scheme: SparseScheme, shape: tuple[int, int], values_shape: tuple[int, ...]) -> float:
    """The share of a weight [n, k] that is stored where the values have a shape."""
    (n, k), p = shape, scheme.pattern
    return p.n / p.m if p.kind == "nm" else values_shape[0] / (-(-n // p.rows) * -(-k // p.columns))


def unscaled(sparse: SparseTensor) -> np.ndarray:
    """The weight before its scale: float32 [n, k]."""
    values = np.ascontiguousarray(_dense(sparse), np.float32)
    if sparse.group_scale is not None:
        kind = place_of(sparse.group_scale, "group_scale")
        scale = np.repeat(numpy_of(kind, sparse.group_scale).astype(np.float32), sparse.scheme.group, 1)
        values *= scale[:, : sparse.shape[1]]
    return values


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
    parts["values"] = _numbers(sparse.scheme, parts["values"])
    return expand(parts, sparse.scheme.pattern, sparse.shape)


def _numbers(scheme: SparseScheme, values: np.ndarray) -> np.ndarray:
    """The codes, int8, or floats that are stored."""
    if not scheme.group:
        return values
    codes = np.stack([values & 15, values >> 4], -1).astype(np.int8) - np.int8(_NIBBLE_ZERO)
    return codes.reshape(*values.shape[:-1], 2 * values.shape[-1])


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """4-bit codes [.., k] as a QuantizedTensor has them: uint8 [.., ceil(k / 2)]."""
    flat = (codes + np.int8(_NIBBLE_ZERO)).astype(np.uint8).reshape(-1, codes.shape[-1])
    return to_nibbles(flat).reshape(*codes.shape[:-1], -(-codes.shape[-1] // 2))


def _of_dense(
    kind: Kind,
    dense: np.ndarray,
    scheme: SparseScheme,
    scale: Array | None = None,
    group_scale: Array | None = None,
    name: str = "weight",
) -> SparseTensor:
    """Of a matrix of int8 codes or of float32 that are as `scheme` has them."""
    try:
        parts = compress(dense, scheme.pattern)
    except PatternError as error:
        raise PatternError(
            f"{name} {error}; prune it first: halfbyte.prune_(model, pattern={str(scheme.pattern)!r})"
        ) from None
    if scheme.group:
        parts["values"] = _nibbles(parts["values"])
    arrays = {what: kind.from_numpy(part) for what, part in parts.items()}
    if scheme.values == "bf16":
        arrays["values"] = arrays["values"].to(kind.torch.bfloat16)
    return SparseTensor(**arrays, scheme=scheme, shape=dense.shape, scale=scale, group_scale=group_scale)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
