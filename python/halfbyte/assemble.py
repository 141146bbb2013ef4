"""QuantizedTensors out of the codes, scales and zero points of other libraries' files, without any loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import FormatError, NonFiniteError
from .quantized_tensor import QuantizedTensor
from .scheme import Scheme

GROUPS = (128, 64, 32)  # the group sizes that kernels have, preferred first
ACTIVATIONS = ("a16", "a8")


def check_activations(activations: object) -> None:
    """ValueError unless it is one of the formats that loaded weights are multiplied with."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r} is none of: {', '.join(ACTIVATIONS)}")


def assemble(
    name: str, octets: Tensor, k: int, scale: Tensor, zero: Tensor | None, *, bits: int, group: int, act: str
) -> QuantizedTensor:
    """The tensor of values `(u - zero) * scale`, each rounded to float32 once.

    octets: uint8 [n, ceil(k * bits / 8)], unsigned codes u of 4 bits (an even k in the low half of a byte) or
    of 8. scale: [n, groups], floating point. zero: integers [n, groups] below 2^bits, or None: 2^(bits-1).
    group: how many elements of a row share a scale; 0: all. act: "a8" or "a16", for the scheme.

    A QuantizedTensor wants positive scales. A negative one becomes positive with the codes and the zero point
    counted from the other end, for with M = 2^bits - 1

        (u - z) * s = ((M - u) - (M - z)) * -s

    and where a scale is 0 every code becomes the zero point. (Only the sign of a zero can differ.) Groups of
    a multiple of 128, 64 or 32 elements are cut into such ones, which repeat the scale. Scales stay as they
    are: as float16 or, where they do not fit, as float16 times a power of two per row, else as float32.

    Raises NonFiniteError, and FormatError for other group sizes, both naming `name`.
    """
    check_finite(name, "scale", scale)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    scale = scale.float().clone(memory_format=torch.contiguous_format)  # it may lie in a mapped file
    zero = torch.full(scale.shape, middle) if zero is None else zero
    zero = zero.to(torch.uint8).contiguous()
    if group:
        unit = next((g for g in GROUPS if group % g == 0), 0)
        if not unit:
            raise FormatError(
                f"{name} has groups of {group} elements; only multiples of {GROUPS[-1]} can be loaded: "
                "quantize the model again with groups of 32, 64 or 128"
            )
        if unit != group:
            groups = -(-k // unit)
            scale, zero = (
                x.repeat_interleave(group // unit, dim=1)[:, :groups].contiguous() for x in (scale, zero)
            )
        group = unit
    if (flip := scale < 0).any():
        octets = torch.where(spread(flip, group * bits // 8, octets), ~octets, octets)  # M - u in each code
        zero = torch.where(flip, top - zero, zero)
        scale = scale.abs()
    if (null := scale == 0).any():
        filling = zero * 0x11 if bits == 4 else zero
        columns = group * bits // 8
        octets = torch.where(spread(null, columns, octets), spread(filling, columns, octets), octets)
        largest = scale.amax(1, keepdim=True)  # any positive number would do; this one keeps float16 in reach
        scale = torch.where(null, torch.where(largest == 0, 1.0, largest), scale)
    symmetric = bool((zero == middle).all())
    if group:
        row_scale, group_scale = _split(scale)
    else:
        row_scale, group_scale = scale[:, 0].contiguous(), None
    if bits == 8:
        codes, zero = (octets ^ 0x80).view(torch.int8), zero ^ 0x80
    else:
        codes = octets.clone(memory_format=torch.contiguous_format)
        if k % 2:
            codes[:, -1] &= 15
    return QuantizedTensor(
        codes,
        row_scale,
        scheme(bits, group, act, asym=not symmetric),
        k=k,
        group_scale=group_scale,
        zero=None if symmetric else zero.view(torch.int8),
    )


def spread(x: Tensor, columns: int, octets: Tensor) -> Tensor:
    """x [n, groups] as [n, bytes of a row]: a group has so many columns of `octets`, or all of them for 0."""
    if not columns:
        return x.expand(octets.shape)
    return x.repeat_interleave(columns, dim=1)[:, : octets.shape[1]]


def scheme(bits: int, group: int, act: str, *, asym: bool) -> Scheme:
    """The scheme of weights of so many bits, with groups of so many elements (0: none)."""
    return Scheme.parse(f"w{bits}{act}" + f"_g{group}" * bool(group) + "+asym" * asym)


def check_finite(name: str, what: str, values: Tensor) -> None:
    """NonFiniteError where `values` [n, groups] hold a NaN or an infinity."""
    if not (finite := values.isfinite()).all():
        row, group = divmod(int(finite.flatten().int().argmin()), values.shape[1])
        raise NonFiniteError(
            f"{name}: the {what} of row {row}, group {group} is {values[row, group].item()}; the file is "
            "damaged: get it anew"
        )


def word_octets(words: Tensor) -> Tensor:
    """uint8 [rows, 4 * columns] of int32 [rows, columns], low bytes first."""
    # A copy: contiguous() keeps odd strides of a dimension of one element, which view() refuses.
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns * 32 / bits] of int32 [rows, columns] that hold codes of 4 or 8 bits, low ones
    first.
    """
    octets = word_octets(words)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def pack_nibbles(u: Tensor) -> Tensor:
    """uint8 [n, ceil(k / 2)] of codes uint8 [n, k] below 16; the last half of an odd row is 0."""
    if u.shape[1] % 2:
        u = torch.nn.functional.pad(u, (0, 1))
    return u[:, 0::2] | (u[:, 1::2] << 4)


def _split(scale: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) with `a[:, None] * b` exactly the float32 scale [n, groups]; b is float16 where that can be.

    The power of two brings the largest scale of a row into [1/2, 1): the 8 significant bits of a bfloat16
    then fit float16 where the smallest scale of the row is at least 2^-16 of the largest: its last bit
    then is not below the 2^-24 of float16.
    """
    ones = torch.ones(len(scale))
    _, exponent = torch.frexp(scale.amax(1))
    for power in (ones, torch.ldexp(ones, exponent)):
        if power.isfinite().all():
            group_scale = (scale.double() / power.double()[:, None]).half()
            if torch.equal(group_scale.float() * power[:, None], scale) and (group_scale > 0).all():
                return power, group_scale
    return ones, scale
