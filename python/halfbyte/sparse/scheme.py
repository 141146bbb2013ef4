"""SparseScheme: the numbers and the pattern of a pruned weight, from short names such as `w8a8+block16x4`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ..errors import SchemeError
from .pattern import Pattern

# Every scheme that runs, and the op that multiplies by such weights, as in `halfbyte.kernels()`. The kernel
# of int8 products finds its values by blocks or within a group; one of floats has an index for each value,
# so that N:M is to it as any other weight.
_OPS = {
    "w8a8+block16x4": "spmm_block_w8a8",
    "w4a8_g32+block16x4": "spmm_block_w4a8",
    "w4a8_g64+block16x4": "spmm_block_w4a8",
    "w4a8_g128+block16x4": "spmm_block_w4a8",
    "w8a8+1:4": "spmm_nm_w8a8",
    "w8a8+2:4": "spmm_nm_w8a8",
    "w8a8+4:8": "spmm_nm_w8a8",
    "w8a8+unstructured": "spmm_unstructured_w8a8",
    "f32+block16x1": "spmm_block_f32",
    "f32+1:4": "spmm_unstructured_f32",
    "f32+2:4": "spmm_unstructured_f32",
    "f32+4:8": "spmm_unstructured_f32",
    "f32+unstructured": "spmm_unstructured_f32",
    "bf16+block16x1": "spmm_block_bf16",
}
NAMES = tuple(_OPS)


@dataclass(frozen=True)
class SparseScheme:
    """The numbers of a sparse linear layer and where its zeros lie: `{w8a8|w4a8_gN|f32|bf16}+{pattern}`.

    values: "w8a8" int8 codes with one float32 scale per output channel, "w4a8_gN" int4 codes with one scale
    more per N input features, of these the blocks; activations are quantized as by the dense scheme of that
    name, whose result it has bit for bit. "f32" float32 weights and products; "bf16" weights stored as
    bfloat16, float32 products. pattern: see `Pattern`.

    Raises SchemeError (a ValueError) for a combination that no kernel runs.
    """

    values: str
    pattern: Pattern

    def __post_init__(self) -> None:
        if str(self) not in NAMES:
            raise SchemeError(_unknown(str(self)))

    @classmethod
    def parse(cls, text: str | SparseScheme) -> SparseScheme:
        """The scheme that `text` names; a SparseScheme is returned as it is."""
        if isinstance(text, SparseScheme):
            return text
        if not is_sparse(text):
            raise SchemeError(_unknown(text))
        values, _, pattern = text.partition("+")
        return cls(values, Pattern.parse(pattern))

    @property
    def op(self) -> str:
        """Name of the op that multiplies by such weights, as in `halfbyte.kernels()`."""
        return _OPS[str(self)]

    @property
    def per_token(self) -> bool:
        """Whether activations have one scale and zero point per token, which `calibrate` can fix."""
        return self.quantized

    @property
    def quantized(self) -> bool:
        """Whether its values are codes; `values` is then the name of the dense scheme."""
        return self.values.startswith("w")

    @property
    def group(self) -> int:
        """Input features per scale; 0: one scale per output channel, or none."""
        return int(self.values.partition("_g")[2] or 0)

    def __str__(self) -> str:
        return self.values + "+" + str(self.pattern)  # which torch.compile traces, unlike a format


def is_sparse(text: object) -> bool:
    """Whether it is the name of a sparse scheme, or one itself."""
    return isinstance(text, SparseScheme) or (isinstance(text, str) and text in NAMES)


def _unknown(text: object) -> str:
    nearest = difflib.get_close_matches(str(text), NAMES, 3, 0)
    return (
        f"no kernel runs the sparse scheme {text!r}; the nearest that run are {', '.join(nearest)}; a sparse "
        "scheme is values+pattern, such as w8a8+block16x4"
    )
