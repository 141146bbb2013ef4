"""Keys and values of the tokens so far, in one buffer; and a DynamicCache of transformers as views of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _core
from ..errors import DTypeError, ShapeError
from .stack import CannotFuse

if TYPE_CHECKING:
    from transformers import DynamicCache

# In the order of the codes of the core.
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
_CODES = {dtype: code for code, dtype in enumerate(_TYPES.values())}

_ROOM = 64  # tokens that a buffer has room for beyond those that it was made for


class Shape(NamedTuple):
    """What a cache holds of each token."""

    blocks: int
    batch: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype


def cache_dtype(given: str | torch.dtype) -> torch.dtype:
    """The dtype that a cache is asked to have, by name or as such. Raises DTypeError."""
    dtype = _TYPES.get(given, given)
    if dtype not in _CODES:
        raise DTypeError(f"a cache of {given} is none of: {', '.join(_TYPES)}")
    return dtype


class KVCache:
    """Keys and values of the tokens that a fused decoder has seen; it grows as they come.

    k, v: [blocks, batch, kv_heads, capacity, head_size] of the dtype, tokens in the first `length` positions.
    In int8 each head of each token has one scale, in k_scale and v_scale: float32 [blocks, batch, kv_heads,
    capacity].
    dropped: tokens before the first that is held; a sliding window needs them no more.

    Pass it to a fused model as past_key_values, or let `generate` make one. `for_model` finds out the shape.
    """

    is_compileable = False

    def __init__(
        self,
        blocks: int,
        batch: int,
        kv_heads: int,
        head_size: int,
        *,
        dtype: str | torch.dtype = torch.float32,
        capacity: int = 0,
    ):
        self.shape = Shape(blocks, batch, kv_heads, head_size, cache_dtype(dtype))
        if min(self.shape[:4]) < 1 or capacity < 0:
            raise ShapeError(
                f"a cache of {self.shape[:4]} (blocks, batch, heads, size) and {capacity} tokens"
            )
        self.length = 0
        self.dropped = 0
        self.version = 0  # changes where a DynamicCache no longer shows what is held
        self._allocate(self.shape, capacity)

    @classmethod
    def for_model(
        cls, model: nn.Module, batch: int = 1, *, dtype: str | torch.dtype | None = None, capacity: int = 0
    ) -> KVCache:
        """An empty cache for a fused model. dtype: default that of the model's embeddings."""
        from .llama import decoder_of

        return decoder_of(model).new_cache(batch, dtype, capacity)

    @property
    def capacity(self) -> int:
        """Tokens that there is memory for."""
        return self.k.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.shape.dtype

    @property
    def nbytes(self) -> int:
        """Of the memory, used or not."""
        return sum(t.nbytes for t in self._tensors() if t is not None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, as transformers asks for them."""
        return self.dropped + self.length

    def grow(self, capacity: int) -> None:
        """Make room for at least `capacity` tokens, held ones included: twice what there was, or more."""
        if capacity > self.capacity:
            self._replace(self.shape, max(capacity, 2 * self.capacity))

    def make_room(self, tokens: int, window: int = 0) -> None:
        """Make room for `tokens` more; of those held, a window needs the last `window` - 1 only."""
        need = self.length + tokens
        if need <= self.capacity:
            return
        spare = self.length - (window - 1) if window else 0
        # Only where it gains half of the memory: each token is moved once or twice at most.
        if spare > 0 and 2 * spare >= self.capacity and need - spare <= self.capacity:
            self._drop(spare)
        else:
            self.grow(need + _ROOM)

    def crop(self, tokens: int) -> None:
        """Forget the last -`tokens` tokens: a negative number, as in transformers."""
        if tokens > 0 or -tokens > self.length:
            raise ValueError(
                f"crop({tokens}): give how many tokens to remove as a negative number; {self.length} are held"
            )
        if tokens and self.dropped:
            raise ValueError(
                f"crop({tokens}): {self.dropped} tokens before the window were dropped, and would be needed"
            )
        self.length += tokens

    def reset(self) -> None:
        """Forget all tokens; the memory is kept."""
        self.length = self.dropped = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        self._replace(self.shape._replace(batch=len(indices)), self.capacity, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self.batch_select_indices(torch.arange(self.shape.batch).repeat_interleave(repeats))

    def call_of(self, stack: Any) -> Any:
        """The call of a stack of the core with this memory, parsed once."""
        if self._call is None or self._call[0] is not stack:
            self._call = stack, _core.StackCall(stack, self._description())
        return self._call[1]

    def _description(self) -> dict[str, int]:
        k, v, k_scale, v_scale = self._tensors()
        block, batch, head, row, _ = k.stride()
        scales = (0, 0, 0, 0) if k_scale is None else k_scale.stride()
        return {
            "k": k.data_ptr(),
            "v": v.data_ptr(),
            "type": _CODES[self.dtype],
            "block": block,
            "batch": batch,
            "head": head,
            "row": row,
            "positions": self.capacity,
            "k_scale": 0 if k_scale is None else k_scale.data_ptr(),
            "v_scale": 0 if v_scale is None else v_scale.data_ptr(),
            "scale_block": scales[0],
            "scale_batch": scales[1],
            "scale_head": scales[2],
            "sequences": self.shape.batch,
            "blocks": self.shape.blocks,
            "kv_heads": self.shape.kv_heads,
            "head_size": self.shape.head_size,
        }

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.k, self.v, self.k_scale, self.v_scale

    def _allocate(self, shape: Shape, capacity: int) -> None:
        *sizes, head_size, dtype = shape
        sizes.append(capacity)
        # Views of tensors made in inference mode could not be changed outside of it.
        with torch.inference_mode(False):
            self.k = torch.empty(*sizes, head_size, dtype=dtype)
            self.v = torch.empty(*sizes, head_size, dtype=dtype)
            quantized = dtype is torch.int8
            self.k_scale = torch.empty(sizes) if quantized else None
            self.v_scale = torch.empty(sizes) if quantized else None
        self.shape = shape
        self._call: tuple | None = None

    def _replace(self, shape: Shape, capacity: int, sequences: Tensor | None = None) -> None:
        """Other memory, with the tokens of these sequences."""
        olds = self._tensors()
        self._allocate(shape, capacity)
        for old, new in zip(olds, self._tensors(), strict=True):
            if old is not None and self.length:
                held = old[:, :, :, : self.length]
                new[:, :, :, : self.length] = held if sequences is None else held[:, sequences]

    def _drop(self, tokens: int) -> None:
        """Hold all but the first tokens, in other memory: a DynamicCache may still show what was there."""
        olds, end = self._tensors(), self.length
        self._allocate(self.shape, self.capacity)
        self.length, self.dropped = end - tokens, self.dropped + tokens
        self.version += 1
        for old, new in zip(olds, self._tensors(), strict=True):
            if old is not None:
                new[:, :, :, : self.length] = old[:, :, :, tokens:end]

    def __getstate__(self) -> dict:
        return vars(self) | {"_call": None}

    def __repr__(self) -> str:
        blocks, batch, kv_heads, head_size, dtype = self.shape
        return (
            f"KVCache({self.get_seq_length()} tokens, blocks={blocks}, batch={batch}, kv_heads={kv_heads}, "
            f"head_size={head_size}, {dtype}, {self.nbytes / 2**20:.1f} MiB)"
        )


class Published:
    """What a DynamicCache was given: views of a KVCache. Copies of it find none and read their tensors."""

    def __init__(self, kv: KVCache, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]):
        self.kv, self.keys, self.values, self.version = kv, keys, values, kv.version

    def untouched(self, layers: list) -> bool:
        """Whether the layers hold what they were given."""
        seen = self.kv.get_seq_length()
        return all(
            layer.keys is k and layer.values is v and getattr(layer, "cumulative_length", seen) == seen
            for layer, k, v in zip(layers, self.keys, self.values, strict=True)
        )

    def __reduce__(self) -> tuple:
        return type(None), ()


_ATTRIBUTE = "_halfbyte"


def kv_of(cache: DynamicCache, shape: Shape, window: int) -> KVCache:
    """The KVCache behind a DynamicCache: that of its views, or one with what its layers hold.

    Raises CannotFuse for a cache that works otherwise or does not fit.
    """
    layers = _layers(cache, shape.blocks, window)
    held: Published | None = vars(cache).get(_ATTRIBUTE)
    if held is not None and (held.version != held.kv.version or held.kv.shape != shape):
        held = None  # another cache has gone on with the buffer, or a call was interrupted
    if held is not None and len(layers) == shape.blocks and held.untouched(layers):
        return held.kv
    filled = [layer for layer in layers if layer.keys is not None and layer.keys.numel()]
    if not filled:
        if any(layer.get_seq_length() for layer in layers):
            raise CannotFuse("the cache has seen tokens and holds none")
        return KVCache(*shape[:4], dtype=shape.dtype)
    seen = {layer.get_seq_length() for layer in layers}
    lengths = {t.shape[2] for layer in filled for t in (layer.keys, layer.values) if t.ndim == 4}
    if len(filled) < shape.blocks or len(seen) > 1 or len(lengths) > 1:
        raise CannotFuse("the layers of the cache hold different numbers of tokens")
    length = lengths.pop() if lengths else 0
    fits = (shape.batch, shape.kv_heads, length, shape.head_size)
    for t in (t for layer in filled for t in (layer.keys, layer.values)):
        if t.shape != fits or t.dtype is not shape.dtype or not t.is_cpu:
            raise CannotFuse("the cache holds tensors of another shape, dtype or device than this call")
    if held is not None and _cropped(held.kv, layers, length):
        held.kv.length = length
        held.kv.version += 1
        return held.kv
    kv = KVCache(*shape[:4], dtype=shape.dtype, capacity=length + _ROOM)
    for i, layer in enumerate(filled):
        kv.k[i, :, :, :length] = layer.keys
        kv.v[i, :, :, :length] = layer.values
    kv.length, kv.dropped = length, seen.pop() - length
    return kv


def publish(cache: DynamicCache, kv: KVCache, length: int, window: int) -> None:
    """Have a DynamicCache hold the first `length` tokens of a KVCache, which holds them from now on."""
    layers = cache.layers
    while len(layers) < kv.shape.blocks:
        layers.append(cache.layer_class_to_replicate())
    kv.length, seen = length, kv.dropped + length
    kv.version += 1
    sliding = hasattr(layers[0], "cumulative_length")
    begin = max(0, length - (window - 1)) if sliding else 0
    keys = kv.k[:, :, :, begin:length].unbind(0)
    values = kv.v[:, :, :, begin:length].unbind(0)
    for layer, k, v in zip(layers, keys, values, strict=True):
        if not layer.is_initialized:
            layer.lazy_initialization(k, v)
        layer.keys, layer.values = k, v
        if sliding:
            layer.cumulative_length = seen
    setattr(cache, _ATTRIBUTE, Published(kv, keys, values))


def _layers(cache: DynamicCache, blocks: int, window: int) -> list:
    """Those of a cache that works as `publish` expects."""
    from transformers import cache_utils

    if type(cache) is not cache_utils.DynamicCache:
        raise CannotFuse(f"past_key_values is a {type(cache).__name__}")
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False) or len(layers) > blocks:
        raise CannotFuse("its DynamicCache is offloaded, or not one of this model")
    if not layers and cache.layer_class_to_replicate is not cache_utils.DynamicLayer:
        raise CannotFuse("its DynamicCache has layers of an unknown class")
    kinds = {type(layer) for layer in layers}
    if kinds == {cache_utils.DynamicSlidingWindowLayer}:
        if {layer.sliding_window for layer in layers} != {window}:
            raise CannotFuse("its DynamicCache is of another sliding window")
        if any(getattr(layer, "record_past", False) for layer in layers):
            raise CannotFuse("its DynamicCache records what leaves the sliding window")
    elif kinds - {cache_utils.DynamicLayer}:
        raise CannotFuse(f"its DynamicCache has layers of: {', '.join(sorted(k.__name__ for k in kinds))}")
    return layers


def _cropped(kv: KVCache, layers: list, length: int) -> bool:
    """Whether the layers hold the first `length` tokens of the KVCache, in its own memory."""
    if length > kv.length or any(layer.get_seq_length() != length for layer in layers):
        return False
    return all(
        t.data_ptr() == own.data_ptr() and t.stride() == own.stride()
        for layer, k, v in zip(layers, kv.k, kv.v, strict=True)
        for t, own in ((layer.keys, k), (layer.values, v))
    )
