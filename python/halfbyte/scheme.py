"""Scheme: how a layer is quantized, parsed from the short names that users write, such as `w8a8`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import SchemeError

# scheme -> the op that runs it
_OPS = {"w8a8": "linear_w8a8"}


@dataclass(frozen=True)
class Scheme:
    """The number formats of one linear layer.

    `w8a8`: int8 weights, symmetric, one float32 scale per output channel; int8 activations, asymmetric, one
    scale and zero point per token, found inside the op (or fixed beforehand by `calibrate`).

    Raises SchemeError (a ValueError) for a combination that no kernel runs.
    """

    weight_bits: int
    activation_bits: int

    def __post_init__(self) -> None:
        if str(self) not in _OPS:
            raise SchemeError(_unknown(str(self)))

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """The scheme that `text` names; a Scheme is returned as it is."""
        if isinstance(text, Scheme):
            return text
        match = re.fullmatch(r"w([1-9]\d*)a([1-9]\d*)", text) if isinstance(text, str) else None
        if match is None:
            raise SchemeError(_unknown(text))
        return cls(*map(int, match.groups()))

    @property
    def op(self) -> str:
        """Name of the op that multiplies by such weights, as in `halfbyte.kernels()`."""
        return _OPS[str(self)]

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}"


def _unknown(text: object) -> str:
    return f"no kernel runs the scheme {text!r}; the schemes that run are: {', '.join(_OPS)}"
