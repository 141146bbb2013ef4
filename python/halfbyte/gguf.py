"""GGUF files: tensors of the types Q4_0, Q4_1 and Q8_0 as QuantizedTensors, without any loss.

Blocks are those of ggml (ggml-common.h): 32 elements of a row with a float16 scale d; 16 bytes hold the
elements 0..15 in their low halves and 16..31 in their high ones.

    Q4_0   d * (u - 8)       Q4_1   d * u + m, m float16       Q8_0   d * c, c int8
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import gguf_header
from .assemble import assemble, check_activations, check_finite, scheme, spread
from .errors import FormatError
from .extras import require
from .quantized_tensor import PARTS, QuantizedTensor

Tensors = dict[str, QuantizedTensor | Tensor]

_BLOCK = 32

# Architecture -> whether llama.cpp's converter reorders the rows of attn_q and attn_k.
_ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(
    path: str | os.PathLike[str],
    *,
    activations: str = "a16",
    names: str = "gguf",
    dequantize_others: bool = False,
) -> Tensors:
    """The tensors of a GGUF file by name; matrices are [n, k], as in an nn.Linear.

    Q4_0, Q4_1 and Q8_0 matrices become QuantizedTensors of the schemes w4a16_g32 (+asym where the file has
    negative scales), w4a16_g32+asym and w8a16_g32, with "a8" for `activations` w4a8_g32 and so on. They
    dequantize to what the gguf package makes of them, bit for bit but for the sign of zeros in groups with a
    negative scale. F32, F16, BF16 and F64 become torch tensors of that dtype. A tensor of another type is a
    FormatError, or float32 with `dequantize_others=True`.

    names: "gguf": the file's own, as in "blk.0.attn_q.weight"; "transformers": those of transformers' models
    for the architectures llama, qwen2 and qwen3, and the rows of llama's q and k in transformers' order
    (llama.cpp's converter moves them, for its rotary embedding); what has no such name keeps its own.

    Raises FormatError (truncated, damaged, of an unknown type or architecture, one part of several),
    NonFiniteError for scales that are none, MissingExtraError without the gguf package, OSError.
    """
    check_activations(activations)
    if names not in ("gguf", "transformers"):
        raise ValueError(f"names={names!r} is none of: gguf, transformers")
    gguf = require("gguf", extra="gguf", purpose="reading a GGUF file")
    gguf_header.check(path, gguf)
    try:
        reader = gguf.GGUFReader(path)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is damaged: the gguf package says {error}; get it anew") from None
    parts = _metadata(reader, "split.count")
    if isinstance(parts, int) and parts > 1:
        raise FormatError(f"{path} is one of {parts} parts of a model; merge them with llama-gguf-split")
    rename = _renamer(path, reader) if names == "transformers" else lambda name, x: (name, x)
    with torch.inference_mode(False):
        return dict(
            rename(t.name, _convert(gguf, f"{path}: {t.name}", t, activations, dequantize_others))
            for t in reader.tensors
        )


def _convert(
    gguf: ModuleType, name: str, tensor: Any, activations: str, dequantize_others: bool
) -> QuantizedTensor | Tensor:
    kind = tensor.tensor_type.name
    if kind in ("F32", "F16", "F64"):
        return torch.from_numpy(np.array(tensor.data))
    if kind == "BF16":
        return torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16)
    if kind in _READERS and len(tensor.shape) == 2:
        return _READERS[kind](name, np.asarray(tensor.data), activations)
    if dequantize_others:
        try:
            return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        except NotImplementedError as error:
            raise FormatError(f"{name} is of the type {kind}: {error} in the gguf package") from None
    shape = "x".join(str(x) for x in reversed(tensor.shape.tolist()))
    raise FormatError(
        f"{name} is {shape} of the type {kind}; matrices of Q4_0, Q4_1 and Q8_0 stay quantized: convert the "
        "model to one of them, or pass dequantize_others=True to read_gguf, for float32"
    )


def _q4_0(name: str, data: np.ndarray, act: str) -> QuantizedTensor:
    blocks = _blocks(data, 2 + _BLOCK // 2)
    octets = _nibbles(blocks[..., 2:])
    d = _float16(blocks, 0)
    return assemble(name, octets, 2 * octets.shape[1], d, None, bits=4, group=_BLOCK, act=act)


def _q8_0(name: str, data: np.ndarray, act: str) -> QuantizedTensor:
    blocks = _blocks(data, 2 + _BLOCK)
    octets = torch.from_numpy(blocks[..., 2:].reshape(len(blocks), -1) ^ np.uint8(0x80))  # c + 128
    d = _float16(blocks, 0)
    return assemble(name, octets, octets.shape[1], d, None, bits=8, group=_BLOCK, act=act)


def _q4_1(name: str, data: np.ndarray, act: str) -> QuantizedTensor:
    """d * u + m. A negative d is -d for codes counted from 15 down, and its minimum m + 15 * d, which has to
    be a float32; d = 0 leaves m, for which the codes become 0.
    """
    blocks = _blocks(data, 4 + _BLOCK // 2)
    d, m = _float16(blocks, 0), _float16(blocks, 2)
    check_finite(name, "scale", d)
    check_finite(name, "minimum", m)
    octets = _nibbles(blocks[..., 4:])
    if (flip := d < 0).any():
        lowest = torch.where(flip, m.double() + 15 * d.double(), m.double())
        if not torch.equal(lowest.float().double(), lowest):
            raise FormatError(
                f"{name} has a negative scale whose minimum no float32 holds; convert the model again"
            )
        octets = torch.where(spread(flip, _BLOCK // 2, octets), ~octets, octets)  # 15 - u in each half
        d, m = d.abs().float(), lowest.float()
    if (null := d == 0).any():
        octets = octets.masked_fill(spread(null, _BLOCK // 2, octets), 0)
        d = d.masked_fill(null, 1.0)
    return QuantizedTensor(
        octets, torch.ones(len(octets)), scheme(4, _BLOCK, act, asym=True), group_scale=d, minimum=m
    )


_READERS: dict[str, Callable[[str, np.ndarray, str], QuantizedTensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}


def _blocks(data: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n, blocks, size] of rows [n, bytes]."""
    return data.reshape(len(data), -1, size)


def _float16(blocks: np.ndarray, offset: int) -> Tensor:
    """[n, blocks], the two bytes at `offset` of each block."""
    return torch.from_numpy(blocks[..., offset : offset + 2].copy().view(np.float16)[..., 0])


def _nibbles(halves: np.ndarray) -> Tensor:
    """uint8 [n, k / 2] with elements 2i and 2i + 1 in a byte, of [n, blocks, 16] with i and i + 16 in one."""
    pairs = halves.copy().view(np.uint16)  # of bytes 2i and 2i + 1
    low = (pairs & 0x0F) | ((pairs >> 4) & 0xF0)
    high = ((pairs >> 4) & 0x0F) | ((pairs >> 8) & 0xF0)
    octets = np.concatenate((low, high), axis=-1).astype(np.uint8)
    return torch.from_numpy(octets.reshape(len(octets), -1))


def _metadata(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    try:
        return None if field is None else field.contents()
    except UnicodeDecodeError:
        return None


def _renamer(path: Any, reader: Any) -> Callable[[str, Any], tuple[str, Any]]:
    """Turns (name, tensor) of the file into those of transformers."""
    architecture = _metadata(reader, "general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise FormatError(
            f"{path} is a model of the architecture {architecture!r}; names for transformers are known for "
            f"{', '.join(_ARCHITECTURES)}: read it with names='gguf' and rename the tensors yourself"
        )
    heads = _metadata(reader, f"{architecture}.attention.head_count")
    key_heads = _metadata(reader, f"{architecture}.attention.head_count_kv") or heads
    counts = {"attn_q": heads, "attn_k": key_heads} if _ARCHITECTURES[architecture] else {}

    def rename(name: str, x: Any) -> tuple[str, Any]:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in _NAMES:
            return name, x
        layer, part, what = match.groups()
        if part in counts:
            x = _unpermute(f"{path}: {name}", x, counts[part])
        return f"model.layers.{layer}.{_NAMES[part]}.{what}" if layer else f"{_NAMES[part]}.{what}", x

    return rename


def _unpermute(name: str, x: Any, heads: object) -> Any:
    """x with the rows of each head as they were before llama.cpp's converter made row i the row 2i and row
    i + half a head the row 2i + 1.
    """
    rows = x.shape[0]
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise FormatError(f"{name} has {rows} rows for {heads!r} heads; the file is damaged: get it anew")
    order = torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()
    if isinstance(x, Tensor):
        return x[order]
    return dataclasses.replace(x, **{p: getattr(x, p)[order] for p in PARTS if getattr(x, p) is not None})
