"""QEmbedding: the module in the place of nn.Embedding; and halfbyte::embedding, its torch operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.weak import WeakIdKeyDictionary

from . import _core
from .arrays import float_code, kind_of, on_gpu, place_of
from .dispatch import isa_errors
from .errors import DeviceError, DTypeError, HalfbyteError, ModelError
from .modules import embedding_obstacle
from .packed_layer import counting, note_scheme, recorded
from .qlinear import WEIGHT_BUFFERS, other_format
from .quantize import QuantizedTensor, quantize
from .quantized_tensor import PARTS, unscaled
from .scheme import Scheme
from .torch_ops import state
from .weight_view import WeightView

OP = "embedding"  # in halfbyte.kernels()
_OFFSETS = ("weight_zero", "weight_minimum")  # a scheme with +asym has one of them
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class QEmbedding(nn.Module):
    """An embedding table on quantized weights: row `ids[...]` of the dequantized table.

    ids: integers of any dtype and shape, where the table is; the output is [..., embedding_dim] of
    `float_dtype`. It has no gradient. Under torch.compile and tracing the call is the torch operator
    halfbyte::embedding. On a GPU torch gathers the rows, and an id outside the table makes a row of NaN.

    Buffers, all in the state_dict: weight_codes, weight_scale and, where the scheme has them,
    weight_group_scale, weight_zero and weight_minimum: the fields of a QuantizedTensor. None of them changes
    under .half() and .bfloat16(), only `float_dtype` does. Nothing is packed: the rows are read as they are.

    padding_idx: kept for code that reads it; its row is what the table holds, as in nn.Embedding.
    float_dtype: of the output, and what `weight.dtype` says.
    name: what errors call the module; its place in the model where quantize_ made it.
    """

    def __init__(
        self,
        q: QuantizedTensor,
        *,
        padding_idx: int | None = None,
        float_dtype: torch.dtype = torch.float32,
        name: str = "QEmbedding",
    ):
        super().__init__()
        if not isinstance(q, QuantizedTensor) or not isinstance(q.codes, Tensor):
            raise DTypeError(
                "QEmbedding takes a QuantizedTensor of torch tensors; quantize() makes one of a torch weight"
            )
        self.scheme: Scheme = q.scheme
        self.num_embeddings, self.embedding_dim = q.shape
        self.padding_idx = padding_idx
        self.float_dtype = float_dtype
        self.name = name
        for buffer, part in zip(WEIGHT_BUFFERS, PARTS, strict=True):
            self.register_buffer(buffer, counting(getattr(q, part)))

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        scheme: str | Scheme,
        *,
        method: str | None = None,
        name: str = "embedding",
    ) -> QEmbedding:
        """The quantized twin of an nn.Embedding, which is left as it is. `name` is what errors call it.

        Of `scheme` only the weight's part matters. Raises what `quantize` raises, and ModelError for one with
        max_norm or the like, which a table of codes cannot do.
        """
        if reason := embedding_obstacle(embedding):
            raise ModelError(f"{name} cannot be quantized: {reason}")
        q = quantize(embedding.weight, scheme, method=method, name=f"{name}.weight")
        twin = cls(q, padding_idx=embedding.padding_idx, float_dtype=embedding.weight.dtype, name=name)
        return twin.train(embedding.training)

    @property
    def quantized(self) -> QuantizedTensor:
        """The table as a QuantizedTensor that shares this module's buffers."""
        codes, scale, *rest = self._parts()
        return QuantizedTensor(codes, scale, self.scheme, self.embedding_dim, *rest)

    @property
    def weight(self) -> WeightView:
        """Stands for the dequantized table, for code that reads `embedding.weight`."""
        return WeightView(self)

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self.weight_scale.device

    def dequantize(self) -> Tensor:
        """The table that the codes stand for: float32 [rows, embedding_dim]."""
        return self.quantized.dequantize()

    def forward(self, ids: Tensor) -> Tensor:
        """The rows [..., embedding_dim] of ids [...].

        Raises IndexError for an id outside the table, on the CPU, DTypeError and DeviceError, each naming the
        module.
        """
        arguments = str(self.scheme), self.embedding_dim, self.float_dtype, *self._parts()
        if is_compiling():
            return embedding(ids, *arguments)
        try:
            if not isinstance(ids, Tensor):
                raise DTypeError(f"ids must be a torch tensor, not {type(ids).__name__}")
            if recorded(ids):
                return embedding(ids, *arguments)
            return _embedding(ids, *arguments)
        except (HalfbyteError, ValueError, IndexError) as error:
            error.args = (f"{self.name}: {error}",)
            raise

    def _parts(self) -> tuple[Tensor | None, ...]:
        return tuple(self._buffers[name] for name in WEIGHT_BUFFERS)

    def _apply(self, fn: Any, recurse: bool = True) -> QEmbedding:
        kept = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if (moved := self._buffers[name]).dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_scheme(self.scheme, destination, prefix)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if mismatch := other_format(self.scheme, state_dict, prefix, args[0]):
            args[-1].append(mismatch)
            return
        if prefix + "weight" in state_dict:
            args[-1].append(
                f"{prefix}weight is float and this embedding is quantized: load it before quantize_"
            )
        if prefix + "weight_codes" in state_dict:
            self._follow({name: state_dict.get(prefix + name) for name in WEIGHT_BUFFERS})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _follow(self, saved: dict[str, Tensor | None]) -> None:
        """Have the buffers that are saved where the scheme leaves a choice: which of zero and minimum there
        is, and the dtype of group scales.
        """
        if self.scheme.asym and sum(saved[name] is not None for name in _OFFSETS) == 1:
            for name in _OFFSETS:
                if (saved[name] is None) != (self._buffers[name] is None):
                    value, device = saved[name], self.device
                    self._buffers[name] = None if value is None else torch.empty_like(value, device=device)
        for name in ("weight_group_scale", "weight_minimum"):
            buffer, value = self._buffers[name], saved[name]
            if buffer is not None and value is not None and value.dtype in (torch.float16, torch.float32):
                self._buffers[name] = buffer.to(value.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, scheme={self.scheme}, "
            f"kernel={self._kernels()[0]}"
        )

    def _kernels(self) -> tuple[str, str]:
        """What reads the rows where the table is, and why torch where it is torch."""
        if on_gpu(self.weight_scale):
            return "torch", "no kernel for embeddings"
        return _core.select(OP), ""


class _Table(NamedTuple):
    """What the core reads of a QuantizedTensor."""

    arguments: tuple  # of _core.embedding, the ids and the output left out
    memory: tuple  # what the pointers among them point to


# codes -> (scheme, k, states of all parts, the other parts, _Table); an entry lives as long as its codes.
# Checking the values of a table takes longer than reading a few rows of it.
_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _table(scheme: str, k: int, *parts: Tensor | None) -> _Table:
    """Checked once, and again after a tensor was changed or given other memory; tensors of inference mode do
    not count their changes, so that those are checked at every call.
    """
    codes, *rest = parts
    present = [part for part in parts if part is not None]
    if any(part.is_inference() for part in present):
        return _make_table(QuantizedTensor(codes, rest[0], Scheme.parse(scheme), k, *rest[1:]))
    key = scheme, k, [state(part) for part in present], [id(part) for part in rest]
    entry = _tables.get(codes)
    if entry is None or entry[0] != key:
        q = QuantizedTensor(codes, rest[0], Scheme.parse(scheme), k, *rest[1:])
        entry = _tables[codes] = key, rest, _make_table(q)
    return entry[2]


def _make_table(q: QuantizedTensor) -> _Table:
    kind = kind_of(q.codes, "weight_codes")
    dense: dict[str, Tensor] = {}
    for what in PARTS[1:]:
        if (part := getattr(q, what)) is not None:
            kind.check_memory(part, f"weight_{what}")
            dense[what] = kind.cast(part, part.dtype)
    (n, k), scheme = q.shape, q.scheme
    codes, ld = kind.rows(q.codes, q.codes.shape[1])
    scale, group_scale, zero, minimum = (
        kind.pointer(dense[what]) if what in dense else 0 for what in PARTS[1:]
    )
    type_code = kind.codes[q.scale.dtype if q.group_scale is None else q.group_scale.dtype]
    arguments = (
        kind.pointer(codes), n, k, ld, scheme.weight_bits, scheme.nf4, scale, scheme.group, group_scale,
        type_code, zero, minimum,
    )  # fmt: skip
    return _Table(arguments, (codes, *dense.values()))


_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define(
    "embedding(Tensor ids, str scheme, SymInt features, ScalarType dtype, Tensor codes, Tensor scale, "
    "Tensor? group_scale=None, Tensor? zero=None, Tensor? minimum=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _embedding(
    ids: Tensor,
    scheme: str,
    features: int,
    dtype: torch.dtype,
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor | None = None,
    zero: Tensor | None = None,
    minimum: Tensor | None = None,
) -> Tensor:
    _check_together(ids, codes)
    kind = place_of(ids, "ids")
    _check_ids(ids)
    out_code = float_code(kind, dtype, "the output")
    if on_gpu(ids):
        kind.check_memory(codes, "weight_codes")
        return _gather(ids, scheme, features, dtype, codes, scale, group_scale, zero, minimum)
    kind_of(codes, "weight_codes")
    table = _table(scheme, features, codes, scale, group_scale, zero, minimum)
    out = kind.empty((*ids.shape, features), dtype)
    flat = kind.cast(ids, torch.int64)
    with isa_errors:
        _core.embedding(
            *table.arguments,
            kind.pointer(flat),
            flat.numel(),
            kind.pointer(out),
            features,
            out_code,
            kind.threads(),
        )
    return out


def _gather(
    ids: Tensor, scheme: str, features: int, dtype: torch.dtype, *parts: Tensor | None
) -> Tensor:
    """In torch, on a GPU: an id outside the table makes a row of NaN there, since an error would have to wait
    for the GPU, and torch's own ends the process's use of it.
    """
    ids = ids.detach().long()
    inside = ((ids >= 0) & (ids < parts[0].shape[0])).reshape(-1, 1)
    rows = ids.reshape(-1).clamp(0, max(parts[0].shape[0] - 1, 0))
    codes, scale, *rest = (None if part is None else part.index_select(0, rows) for part in parts)
    values = unscaled(codes, Scheme.parse(scheme), features, *rest) * scale[:, None]
    return values.where(inside, torch.nan).to(dtype).reshape(*ids.shape, features)


def _embedding_fake(
    ids: Tensor, scheme: str, features: int, dtype: torch.dtype, codes: Tensor, *parts: Any
) -> Tensor:
    _check_together(ids, codes)
    _check_ids(ids)
    return (codes if codes.is_meta else ids).new_empty((*ids.shape, features), dtype=dtype)


def _check_together(ids: Tensor, codes: Tensor) -> None:
    """DeviceError where one is on a GPU and the other is not there."""
    if ids.device == codes.device or ids.is_meta or codes.is_meta:
        return
    if on_gpu(ids) or on_gpu(codes):
        raise DeviceError(
            f"ids are on the device {str(ids.device)!r} and the table on {str(codes.device)!r}: move the ids "
            "there"
        )


def _check_ids(ids: Tensor) -> None:
    if ids.dtype not in _INTEGERS:
        raise DTypeError(f"ids have the dtype {ids.dtype}; they must be integers, of int64 for one")


for _key in ("CPU", "CUDA"):
    _library.impl("embedding", _embedding, _key)
torch.library.register_fake("halfbyte::embedding", _embedding_fake, lib=_library)

embedding = torch.ops.halfbyte.embedding.default
