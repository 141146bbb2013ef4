"""QuantizedTensor: the codes of a weight matrix and what makes numbers of them, the same on every machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .arrays import Array, Kind, check_owner, owner_of
from .errors import DTypeError, NonFiniteError, ShapeError
from .scheme import Scheme

PARTS = ("codes", "scale", "group_scale", "zero", "minimum")  # the arrays of a QuantizedTensor


def _nf4_codes() -> tuple[int, ...]:
    """The 16 levels of NormalFloat4 in units of 1/127: Dettmers et al. 2023 (QLoRA), appendix E.

    Equally spaced quantiles of the normal distribution, 8 above zero and 7 below it, divided by the largest.
    The outermost probability lies in the middle between 1 - 1/32 and 1 - 1/30: half a step of 1/16 and of
    1/15 from the end.
    """
    normal, outermost = NormalDist(), 1 - (1 / 32 + 1 / 30) / 2

    def quantiles(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [normal.inv_cdf(outermost - i * step) / normal.inv_cdf(outermost) for i in range(count)]

    levels = [*(-q for q in quantiles(7)), 0.0, *reversed(quantiles(8))]
    return tuple(round(127 * level) for level in levels)


NF4_CODES = _nf4_codes()


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A weight matrix [n, k] as integers and scales. This is what is saved, loaded and compared; `pack` makes
    of it what the kernels read.

    codes: int8 [n, k]; of 4 bits uint8 [n, ceil(k / 2)], an unsigned nibble u of an even k in the low half of
    a byte and of the next k in the high half, which an odd k leaves 0 and which is ignored.
    scale: float32 [n], a positive factor per output channel.
    group_scale: positive float16 or float32 [n, groups], groups = ceil(k / group); None where the scheme has
    no groups.
    zero: int8 [n, groups] ([n, 1] without groups), 0..15 for 4 bits. minimum: [n, groups] of the dtype of
    group_scale. A scheme with +asym has one of the two, any other none; a minimum needs groups.
    k: in_features; by default what the codes have room for, so give it where it is odd and codes have 4 bits.

    The weight is `((c - zero) * group_scale + minimum) * scale[:, None]` in float32, in this order, absent
    parts left out. c is the int8 code; of 4 bits u - 8, u with a zero or a minimum, NF4_CODES[u] with nf4.

    The arrays are all numpy or all torch. Raises DTypeError, ShapeError, NonFiniteError or ValueError naming
    the array. Numbers are not looked at in fake tensors and on other devices than the CPU, meta among them.
    """

    codes: Array
    scale: Array
    scheme: Scheme
    k: int | None = None
    group_scale: Array | None = None
    zero: Array | None = None
    minimum: Array | None = None

    def __post_init__(self) -> None:
        kind = owner_of(self.codes, "codes")
        for what in PARTS[1:]:
            if (part := getattr(self, what)) is not None:
                check_owner(kind, part, what, "codes")
        self._check_presence()
        self._check_dtypes(kind)
        self._check_shapes()
        for what in PARTS[1:]:
            part = getattr(self, what)
            if part is not None and math.prod(part.shape) and kind.has_values(part):
                self._check_values(kind, what, part)

    def _check_presence(self) -> None:
        scheme = self.scheme
        if (self.group_scale is None) != (scheme.group == 0):
            verb = "lacks" if self.group_scale is None else "takes no"
            raise ShapeError(f"a QuantizedTensor of the scheme {scheme} {verb} group_scale")
        if (self.zero is not None) + (self.minimum is not None) != scheme.asym:
            wanted = "zero or minimum, one of them" if scheme.asym else "neither zero nor minimum"
            raise ShapeError(f"a QuantizedTensor of the scheme {scheme} has {wanted}")
        if self.minimum is not None and not scheme.group:
            raise ShapeError(f"minimum belongs to groups, which the scheme {scheme} does not have; use zero")

    def _check_dtypes(self, kind: Kind) -> None:
        floats = (kind.float16, kind.float32)
        dtypes = {
            "codes": (kind.uint8 if self.scheme.weight_bits == 4 else kind.int8,),
            "scale": (kind.float32,),
            "group_scale": floats,
            "zero": (kind.int8,),
            "minimum": floats if self.group_scale is None else (self.group_scale.dtype,),
        }
        for what, allowed in dtypes.items():
            part = getattr(self, what)
            if part is not None and part.dtype not in allowed:
                names = " or ".join(map(str, allowed))
                raise DTypeError(f"{what} has the dtype {part.dtype}; it must be {names}")

    def _check_shapes(self) -> None:
        per_byte = 2 if self.scheme.weight_bits == 4 else 1
        if self.codes.ndim != 2 or tuple(self.scale.shape) != tuple(self.codes.shape[:1]):
            raise ShapeError(
                f"codes {tuple(self.codes.shape)} and scale {tuple(self.scale.shape)} do not fit: "
                f"they must be {'[n, ceil(k / 2)]' if per_byte == 2 else '[n, k]'} and [n]"
            )
        n, columns = self.codes.shape
        if self.k is None:
            object.__setattr__(self, "k", per_byte * columns)
        elif -(-self.k // per_byte) != columns:
            raise ShapeError(
                f"codes {tuple(self.codes.shape)} do not fit k = {self.k} of the scheme {self.scheme}"
            )
        groups = self.scheme.groups(self.k)
        for what in PARTS[2:]:
            part = getattr(self, what)
            if part is not None and tuple(part.shape) != (n, groups):
                raise ShapeError(
                    f"{what} has the shape {tuple(part.shape)}; it must be {(n, groups)}: [n, groups]"
                )

    def _check_values(self, kind: Kind, what: str, part: Array) -> None:
        low, high = kind.bounds(part)  # NaN where a NaN is
        if what == "zero":
            if self.scheme.weight_bits == 4 and not (0 <= low and high <= 15):
                at = _first(kind, part, lambda z: (z < 0) | (z > 15))
                raise ValueError(f"zero{at} is none of 0..15, which 4-bit codes need")
            return
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NonFiniteError(
                f"{what}{_first(kind, part, lambda v: ~np.isfinite(v))} is a NaN or an infinity"
            )
        if what != "minimum" and low <= 0:
            raise ValueError(
                f"{what}{_first(kind, part, lambda v: v <= 0)} is not positive, as scales must be"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k): output channels, input features."""
        return self.codes.shape[0], self.k

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        parts = (getattr(self, what) for what in PARTS)
        return sum(part.nbytes for part in parts if part is not None)

    def unpacked(self) -> Array:
        """The integers c of the formula above: int8 [n, k]; where codes have 8 bits, the codes themselves."""
        return _unpacked(self.codes, self.scheme, self.k, self.zero is not None or self.minimum is not None)

    def dequantize(self) -> Array:
        """The weight that the codes stand for: float32 [n, k]."""
        return (
            unscaled(self.codes, self.scheme, self.k, self.group_scale, self.zero, self.minimum)
            * self.scale[:, None]
        )

    def rows(self, begin: int, end: int) -> QuantizedTensor:
        """Output channels begin .. end-1, which share the memory of these arrays."""
        parts = {what: None if (part := getattr(self, what)) is None else part[begin:end] for what in PARTS}
        return QuantizedTensor(**parts, scheme=self.scheme, k=self.k)

    def __repr__(self) -> str:
        n, k = self.shape
        return f"QuantizedTensor({n}x{k}, scheme={self.scheme}, nbytes={self.nbytes})"


def unscaled(
    codes: Array,
    scheme: Scheme,
    k: int,
    group_scale: Array | None = None,
    zero: Array | None = None,
    minimum: Array | None = None,
) -> Array:
    """The weight before the last factor, `scale`: float32 [n, k]. Nothing is checked, so that it can be
    traced.
    """
    kind = owner_of(codes, "codes")

    def spread(part: Array) -> Array:
        part = kind.cast(part, kind.float32)
        return kind.repeat(part, scheme.group)[:, :k] if scheme.group else part

    value = kind.cast(_unpacked(codes, scheme, k, zero is not None or minimum is not None), kind.float32)
    if zero is not None:
        value = value - spread(zero)
    if group_scale is not None:
        value = value * spread(group_scale)
    if minimum is not None:
        value = value + spread(minimum)
    return value


def to_nibbles(u: np.ndarray) -> np.ndarray:
    """uint8 [n, k] of 0..15 as 4-bit codes: uint8 [n, ceil(k / 2)]."""
    codes = u[:, 0::2].copy()
    codes[:, : u.shape[1] // 2] |= u[:, 1::2] << 4
    return codes


def _unpacked(codes: Array, scheme: Scheme, k: int, offset: bool) -> Array:
    """int8 [n, k]; offset: there is a zero or a minimum."""
    if scheme.weight_bits == 8:
        return codes
    kind = owner_of(codes, "codes")
    u = kind.module.stack([codes & 15, codes >> 4], 2).reshape(codes.shape[0], 2 * codes.shape[1])[:, :k]
    if scheme.nf4:
        return kind.take(NF4_CODES, u)
    u = kind.cast(u, kind.int8)
    return u if offset else u - 8


def _first(kind: Kind, part: Array, bad) -> list[int]:
    """Index of the first element that is bad."""
    found = bad(kind.to_numpy(part))
    return [int(i) for i in np.unravel_index(found.argmax(), found.shape)]
