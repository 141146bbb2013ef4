"""Scheme: how a layer is quantized, parsed from the short names that users write, such as `w8a8`."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache

from .errors import SchemeError
from .sparse.scheme import is_sparse

GROUPS = (32, 64, 128)
WIDE_GROUP = 128  # of 16-bit activations where the weight has none: 32639 * 255 * 128 is below 2^31

# Every scheme that runs, by its name.
NAMES = (
    *(
        f"w{w}a{a}{g}{z}"
        for w in (8, 4)
        for a in (8, 16)
        for g in ("", *(f"_g{n}" for n in GROUPS))
        for z in ("", "+asym")
    ),
    *(f"w4a16_g{n}+nf4" for n in GROUPS),
    *(f"w{w}a8{g}{z}+ag{n}" for w in (8, 4) for n in GROUPS for g in ("", f"_g{n}") for z in ("", "+asym")),
)

_FORM = "w{4|8}a{8|16}[_g{32|64|128}][+asym][+nf4][+ag{32|64|128}]"
_NAME = re.compile(r"w([48])a(8|16)((?:[_+][a-z0-9]+)*)")
_SUFFIX = re.compile(
    r"_g(?P<group>32|64|128)|\+(?P<asym>asym)|\+(?P<nf4>nf4)|\+ag(?P<activation_group>32|64|128)"
)


@dataclass(frozen=True)
class Scheme:
    """The number formats of one linear layer: `w{4|8}a{8|16}[_g{32|64|128}][+asym][+nf4][+ag{32|64|128}]`.

    Weights: integers of 4 or 8 bits with one float32 scale per output channel, and with `_gN` also one per N
    consecutive input features. Symmetric; with `+asym` each group (or channel) has a zero point or a float
    minimum; with `+nf4` (only `w4a16_gN`) the 4 bits choose one of the 16 levels of NormalFloat4.

    Activations, quantized inside the op: `a8` int8, asymmetric, one scale and zero point per token (or fixed
    beforehand by `calibrate`); `a8` with `+agN` int8, symmetric, one scale per token and N features, the N of
    the weight where that has one; `a16` 16 bits, symmetric, one scale per token and group of the weight (128
    features where it has none).

    parse takes the suffixes in any order; str gives the order above. Raises SchemeError (a ValueError) for a
    combination that no kernel runs.
    """

    weight_bits: int
    activation_bits: int
    group: int = 0  # input features per scale; 0: one scale per output channel
    asym: bool = False
    nf4: bool = False
    activation_group: int = 0  # input features per scale of +ag; 0: per token, or a16

    def __post_init__(self) -> None:
        if str(self) not in NAMES:
            raise SchemeError(_unknown(str(self)))

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """The scheme that `text` names; a Scheme is returned as it is."""
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):
            raise SchemeError(_unknown(text))
        return _parse(text)

    @property
    def op(self) -> str:
        """Name of the op that multiplies by such weights, as in `halfbyte.kernels()`."""
        return f"linear_w{self.weight_bits}a{self.activation_bits}"

    @property
    def per_token(self) -> bool:
        """Whether activations have one scale and zero point per token, which `calibrate` can fix."""
        return self.activation_bits == 8 and not self.activation_group

    @property
    def fold_group(self) -> int:
        """Input features whose products are summed as integers before a float scale; 0: all of them."""
        return self.group or self.activation_group or (WIDE_GROUP if self.activation_bits == 16 else 0)

    def groups(self, k: int) -> int:
        """Scales per output channel of a weight of k input features, as in the shape [n, groups]."""
        return -(-k // self.group) if self.group else 1

    def __str__(self) -> str:
        return (
            f"w{self.weight_bits}a{self.activation_bits}"
            + (f"_g{self.group}" if self.group else "")
            + ("+asym" if self.asym else "")
            + ("+nf4" if self.nf4 else "")
            + (f"+ag{self.activation_group}" if self.activation_group else "")
        )


@cache
def _parse(text: str) -> Scheme:
    match = _NAME.fullmatch(text)
    if match is None:
        raise SchemeError(_unknown(text))
    fields: dict[str, int | bool] = {}
    for part in re.findall(r"[_+][a-z0-9]+", match[3]):
        suffix = _SUFFIX.fullmatch(part)
        if suffix is None or suffix.lastgroup in fields:
            raise SchemeError(_unknown(text))
        value = suffix[suffix.lastgroup]
        fields[suffix.lastgroup] = int(value) if value.isdecimal() else True
    try:
        return Scheme(int(match[1]), int(match[2]), **fields)
    except SchemeError:
        raise SchemeError(_unknown(text)) from None  # as it was written


def _unknown(text: object) -> str:
    if is_sparse(text):
        return (
            f"{str(text)!r} is a scheme of sparse weights: call sparsify_(model, scheme={str(text)!r}) on a "
            "pruned model, or sparsify on a weight"
        )
    nearest = difflib.get_close_matches(str(text), NAMES, 3, 0)
    return (
        f"no kernel runs the scheme {text!r}; the nearest that run are {', '.join(nearest)}; a scheme is "
        f"{_FORM}, such as w8a8"
    )
