"""Checkpoints of other libraries in safetensors files: GPTQ, AWQ and compressed-tensors, without any loss."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .assemble import check_activations
from .errors import DTypeError, FormatError, NonFiniteError
from .extras import require
from .layouts import METHODS
from .quantized_tensor import QuantizedTensor

safetensors = require("safetensors", extra="torch", purpose="reading a checkpoint")

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# Where libraries write how they quantized: file, key in it (None: the whole file).
_CONFIGS = (
    ("config.json", "quantization_config"),
    ("config.json", "compression_config"),  # older compressed-tensors
    ("quantize_config.json", None),  # older GPTQ
)


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    quantization: Mapping[str, Any] | None = None,
    activations: str | None = None,
) -> dict[str, QuantizedTensor | Tensor]:
    """The tensors of a safetensors checkpoint by name; quantized ones as QuantizedTensors.

    path: a model's directory (model.safetensors, or parts with an index, or a single safetensors file) or a
    safetensors file. quantization: the `quantization_config`; by default that of the config.json beside the
    tensors. Its quant_method must be one of

        gptq                 bits 4 and 8, with and without sym, no act-order
        awq                  the version gemm
        compressed-tensors   int-quantized and pack-quantized with 4 or 8 bits

    with one scale per row or tensor, or per group of a multiple of 32 elements. The weight of a layer is
    called "<layer>.weight", whatever its parts are called. All other tensors come as they are. A checkpoint
    without quantized layers needs no config.

    activations: "a8" or "a16", for the schemes of the QuantizedTensors; None: what the checkpoint says, which
    is "a16" but for compressed-tensors with 8-bit activations. (Those are symmetric there; here w4a8 and w8a8
    find a zero point per token.)

    Raises FormatError (truncated, damaged, incomplete, of an unknown method, act-order), NonFiniteError for
    scales that are none, OSError.
    """
    if activations is not None:
        check_activations(activations)
    if quantization is not None and not isinstance(quantization, Mapping):
        raise DTypeError(f"quantization must be a mapping, not {type(quantization).__name__}")
    path = Path(path)
    directory = path if path.is_dir() else path.parent
    with torch.inference_mode(False):
        tensors = _tensors(path)
        if quantization is None:
            quantization = _config(directory)
        if quantization is None:
            keys = {f".{key}" for method in METHODS.values() for key in method.keys}
            if found := next((name for name in tensors if name.endswith(tuple(keys))), None):
                raise FormatError(
                    f"{path} has quantized layers ({found!r}), but no config.json beside it says how; call "
                    "halfbyte.read_checkpoint(path, quantization={...}) with its quantization_config"
                )
            return tensors
        return _build(path, tensors, quantization, activations)


def _build(
    path: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], activations: str | None
) -> dict[str, QuantizedTensor | Tensor]:
    method = config.get("quant_method", "gptq" if "bits" in config and "sym" in config else None)
    if not isinstance(method, str) or method not in METHODS:
        raise FormatError(
            f"{path}: the quant_method is {method!r}; those that can be read are: {', '.join(METHODS)}"
        )
    try:
        layout = METHODS[method](config)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else error
        raise FormatError(f"{path}: its quantization_config is damaged ({what})") from None
    layers = {
        name.removesuffix(f".{key}"): None
        for name in tensors
        for key in layout.keys
        if name.endswith(f".{key}")
    }
    result: dict[str, QuantizedTensor | Tensor] = {}
    used = set()
    for layer in layers:
        parts = {p: tensors[f"{layer}.{p}"] for p in layout.parts if f"{layer}.{p}" in tensors}
        used.update(f"{layer}.{part}" for part in parts)
        try:
            result[f"{layer}.weight"] = layout.build(layer, parts, activations or layout.activations(layer))
        except (FormatError, NonFiniteError) as error:
            raise type(error)(f"{path}: {error}") from None
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if name in used:
            continue
        if part in layout.parts and part != "weight":
            raise FormatError(
                f"{path} has {name!r} without {layer}.{layout.keys[0]}; the file is incomplete: get it anew"
            )
        result[name] = tensor
    return result


def _tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file, names in _files(path).items():
        try:
            with safetensors.safe_open(file, "pt") as opened:
                have = set(opened.keys())
                if missing := sorted((names or have) - have):
                    raise FormatError(
                        f"{file} lacks {missing[0]!r}, which the index says it has; get it anew"
                    )
                tensors |= {name: opened.get_tensor(name) for name in sorted(names or have)}
        except safetensors.SafetensorError as error:
            raise FormatError(f"{file} is truncated or no safetensors file ({error}); get it anew") from None
    return tensors


def _files(path: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a checkpoint and the names to take from each; None: all."""
    if not path.is_dir():
        return {path: None}
    if (index := path / _INDEX).exists():
        files: dict[Path, set[str] | None] = {}
        weight_map = _json(index).get("weight_map", {})
        if not isinstance(weight_map, dict):
            raise FormatError(f"{index} is damaged: its weight_map is no object; get it anew")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise FormatError(f"{index} is damaged: {file!r} is no name of a file; get it anew")
            files.setdefault(path / file, set()).add(name)
        if not files:
            raise FormatError(f"{index} is damaged: it names no file; get it anew")
        for file in files:
            if not file.exists():
                raise FormatError(f"{file}, which {_INDEX} names, is missing; copy the whole directory")
        return files
    found = [path / _FILE] if (path / _FILE).exists() else sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise FormatError(
            f"{path} has {len(found) or 'no'} safetensors files and no {_INDEX}; give the file that is meant"
        )
    return {found[0]: None}


def _config(directory: Path) -> Mapping[str, Any] | None:
    for file, key in _CONFIGS:
        if (path := directory / file).exists():
            config = _json(path)
            config = config if key is None else config.get(key)
            if isinstance(config, dict):
                return config
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is truncated or damaged ({error}); get it anew") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path} is damaged: it holds no object; get it anew")
    return data
