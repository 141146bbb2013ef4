"""Saving a quantized or sparse model and loading it into a freshly built one; packs are made anew."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from . import manifest
from .embedding import QEmbedding
from .errors import DeviceError, FormatError, HalfbyteError, ModelError
from .extras import require
from .layers import make_layer
from .manifest import LayerEntry, Manifest
from .modules import check_module, is_embedding, is_linear, join, obstacle, replace, shape_of, sites
from .pack_inplace import freed_again
from .packed_layer import INPUT_BUFFERS, PackedLayer
from .qlinear import WEIGHT_BUFFERS
from .quantize import QuantizedTensor, check_static
from .quantized_tensor import PARTS
from .sparse.linear import SPARSE_BUFFERS, SparseLinear
from .sparse.tensor import PARTS as SPARSE_PARTS
from .sparse.tensor import SparseTensor

safetensors = require("safetensors", extra="torch", purpose="saving and loading")
save_file = require("safetensors.torch", extra="torch", purpose="saving and loading").save_file


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a quantized or sparse model, floats included, to a directory, which may exist.

    halfbyte.json says what the layers are, model-<hash>.safetensors holds the tensors; no pickle. A model
    saved there before is replaced whole or, after an error or a crash, not at all; other files of the
    directory are left alone. Of several processes that save to one directory, the last one wins. Codes that
    `pack_` has freed are made for it, and freed again.

    Raises ModelError for a model without quantized or sparse layers, with numbers that are none or with state
    that is no tensor, DeviceError for one with tensors on the meta device, OSError.
    """
    check_module(model, "save")
    with freed_again(model):  # the codes, which have to be made where pack_ freed them
        layers = {
            name: _entry(name, m)
            for name, m in model.named_modules()
            if isinstance(m, (PackedLayer, QEmbedding))
        }
        if not layers:
            raise ModelError(
                f"this {type(model).__name__} has no quantized layer, nor a sparse one; call "
                "halfbyte.quantize_ or sparsify_ first, or save it with torch"
            )
        tensors, aliases = _distinct(model.state_dict())
        floats = {
            row["name"]: row["reason"]
            for row in getattr(model, "_halfbyte_report", ())
            if row["action"] == "float"
        }
        with manifest.replacing(directory, layers, aliases, floats) as path:
            save_file(tensors, path)


def load(model: nn.Module, directory: str | os.PathLike[str], *, strict: bool = True) -> nn.Module:
    """Make `model` the one that was saved, in place, and return it.

    `model` is built as the saved one was before quantization, with any values: its linear layers and
    embeddings are replaced as the file says, and all other parameters and buffers are copied into it, in
    their own dtype. A model that is itself such a layer is returned anew. `strict=False` warns of names that
    only the file or only the model has, instead of raising.

    Raises, before anything in the model is touched: FormatError where the files are truncated, corrupt,
    foreign or from a newer version, or belong to another model; ModelError for a layer with hooks or other
    things that its replacement would lose.
    """
    check_module(model, "load")
    saved = manifest.read(directory)
    manifest.check_weights(saved)
    tensors = _tensors(saved)
    found = {name: (module, places) for names, module, places in sites(model) for name in names}
    swaps, problems = [], []
    for name, entry in saved.layers.items():
        if name not in found:
            problems.append(f"the model has no module {name!r}")
            continue
        module, places = found[name]
        swaps.append((module, places, _layer(saved, name, entry, module, tensors)))
    for _, places, layer in swaps:
        replace(places, layer)
    try:
        root = next((layer for module, _, layer in swaps if module is model), model)
        state = root.state_dict(keep_vars=True)
        problems += _compare(saved, state, tensors)
        if problems and strict:
            raise FormatError(
                f"{saved.directory} is not of this {type(model).__name__}: {'; '.join(problems[:8])}; "
                "build the model as it was built for saving, or pass strict=False"
                + _about_masks(state, tensors)
            )
    except BaseException:
        for module, places, _ in swaps:
            replace(places, module)
        raise
    if problems:
        warnings.warn(f"halfbyte.load: {'; '.join(problems)}", stacklevel=2)
    with torch.no_grad():
        for name, target in state.items():
            if name in tensors and target is not tensors[name]:
                target.copy_(tensors[name])
    root._halfbyte_report = [
        {
            "name": name,
            "shape": (entry.out, entry.in_),
            "action": "sparse" if entry.kind == "sparse" else "quantized",
            "reason": "",
        }
        for name, entry in saved.layers.items()
    ] + [
        {"name": name, "shape": shape_of(found[name][0]), "action": "float", "reason": reason}
        for name, reason in saved.floats.items()
        if name in found
        and (is_linear(found[name][0]) or isinstance(found[name][0], (nn.Linear, nn.Embedding)))
    ]
    return root


def _entry(name: str, m: PackedLayer | QEmbedding) -> LayerEntry:
    n, k = shape_of(m)
    try:
        # The property checks the numbers.
        if isinstance(m, QEmbedding):
            _ = m.quantized
            return LayerEntry("embedding", m.scheme, k, n, False, False, "none")
        _ = m.packable
        if m.static is not None:
            check_static(m.static)
        kind = "sparse" if isinstance(m, SparseLinear) else "linear"
        return LayerEntry(kind, m.scheme, k, n, m.bias is not None, m.static is not None, m.activation)
    except (HalfbyteError, ValueError) as error:
        raise ModelError(f"{name or 'the model'}: {error}") from None


def _distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, as safetensors wants them, and for the other names the one they are
    stored under.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ModelError(
                f"{name!r} in the state of the model is a {type(tensor).__name__}, not a tensor; it cannot "
                "be saved without pickle"
            )
        if tensor.is_meta:
            raise DeviceError(f"{name} is on the meta device, without data; load its values first")
        storage = tensor.untyped_storage().data_ptr()
        key = storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        if tensor.numel() and key in names:
            aliases[name] = names[key]
            continue
        names[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
        if storage in storages:
            tensors[name] = tensors[name].clone()
        storages.add(storage)
    return tensors, aliases


def _tensors(saved: Manifest) -> dict[str, Tensor]:
    """Name -> tensor; aliases are one object, and buffers of quantized layers have their own memory."""
    try:
        with torch.inference_mode(False), safetensors.safe_open(saved.weights, "pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise FormatError(f"{saved.weights} is no safetensors file ({error}); save the model again") from None
    for name in saved.layers:
        for buffer in dict.fromkeys((*WEIGHT_BUFFERS, *SPARSE_BUFFERS, "bias", *INPUT_BUFFERS)):
            if (full := join(name, buffer)) in tensors:
                with torch.inference_mode(False):
                    tensors[full] = tensors[full].clone()
    for alias, name in saved.aliases.items():
        if name not in tensors:
            raise FormatError(
                f"{saved.weights} lacks the tensor {name!r}, which {alias!r} shares; save the model again"
            )
        tensors[alias] = tensors[name]
    return tensors


def _layer(
    saved: Manifest, name: str, entry: LayerEntry, module: nn.Module, tensors: dict[str, Tensor]
) -> PackedLayer | QEmbedding:
    """The quantized or sparse layer that is to take the place of `module`."""
    ours, is_float = (QEmbedding, is_embedding) if entry.kind == "embedding" else (PackedLayer, is_linear)
    if not (isinstance(module, ours) or is_float(module)):
        what = "an embedding" if entry.kind == "embedding" else "a linear layer"
        raise FormatError(
            f"{saved.directory} has {what} {name!r}, which in the model is a "
            f"{type(module).__name__}; build the model as it was built for saving"
        )
    n, k = shape_of(module)
    if (n, k) != (entry.out, entry.in_):
        raise FormatError(
            f"{saved.directory} has {name!r} with {entry.in_} -> {entry.out} features, the model with "
            f"{k} -> {n}; build the model as it was built for saving"
        )
    if is_float(module) and (reason := obstacle(module)):
        raise ModelError(f"load: {name or 'the model'} cannot be replaced: {reason}")
    weight = _weight(saved, name, entry, tensors)
    called = {"float_dtype": module.weight.dtype, "name": name or "the model"}

    def placed(layer: PackedLayer | QEmbedding) -> PackedLayer | QEmbedding:
        device = module.weight.device
        return (layer.to(device) if device.type == "cuda" else layer).train(module.training)

    if entry.kind == "embedding":
        return placed(QEmbedding(weight, padding_idx=module.padding_idx, **called))

    def take(buffer: str, dtype: torch.dtype, *shape: int) -> Tensor:
        tensor = tensors.get(full := join(name, buffer))
        if tensor is None or tensor.dtype != dtype or tensor.shape != shape:
            have = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise FormatError(
                f"{saved.weights}: {full} must be {dtype} {shape} and is {have}; save the model again"
            )
        return tensor

    bias = take("bias", torch.float32, entry.out) if entry.bias else None
    layer = make_layer(weight, bias, activation=entry.activation, **called)
    if entry.static:
        static = take("input_scale", torch.float32).item(), take("input_zero", torch.int32).item()
        try:
            layer.static = static
        except ValueError as error:
            raise FormatError(f"{saved.weights}: {name}: {error}; save the model again") from None
    return placed(layer)


def _weight(
    saved: Manifest, name: str, entry: LayerEntry, tensors: dict[str, Tensor]
) -> QuantizedTensor | SparseTensor:
    """The weight of a layer; the tensors that are there say what the scheme leaves open."""
    sparse = entry.kind == "sparse"
    parts = {}
    for part in SPARSE_PARTS if sparse else PARTS:
        parts[part] = tensors.get(full := join(name, f"weight_{part}"))
        if parts[part] is None and part in (("values",) if sparse else ("codes", "scale")):
            raise FormatError(f"{saved.weights}: {full} is missing; save the model again")
    try:
        if sparse:
            return SparseTensor(scheme=entry.scheme, shape=(entry.out, entry.in_), **parts)
        q = QuantizedTensor(scheme=entry.scheme, k=entry.in_, **parts)
    except (HalfbyteError, ValueError) as error:
        raise FormatError(f"{saved.weights}: {name}: {error}; save the model again") from None
    if q.shape != (entry.out, entry.in_):
        raise FormatError(
            f"{saved.weights}: {name} has codes of {q.shape[1]} -> {q.shape[0]} features instead of "
            f"{entry.in_} -> {entry.out}; save the model again"
        )
    return q


def _about_masks(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """What to do where only the model or only the file has a mask of a float layer."""
    end = ".weight_orig"
    only_model = [name for name in state if f".{name}".endswith(end) and name not in tensors]
    only_file = [n.removesuffix(end) for n in tensors if f".{n}".endswith(end) and n not in state]
    if only_file:
        return (
            "; the file has masked layers: call halfbyte.prune_(model, 0.0, "
            f"include={only_file[:8]}) before, or remove_masks_ before saving"
        )
    return "; the model has masked layers: call halfbyte.remove_masks_(model) before" if only_model else ""


def _compare(saved: Manifest, state: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Names that only the model or only the file has; FormatError for tensors that do not fit."""
    for name in state.keys() & tensors.keys():
        have, want = tensors[name], state[name]
        if have.shape != want.shape or have.is_floating_point() != want.is_floating_point():
            raise FormatError(
                f"{saved.directory} has {name!r} as {have.dtype} {tuple(have.shape)}, the model as "
                f"{want.dtype} {tuple(want.shape)}; build the model as it was built for saving"
            )
        if want.is_meta:
            raise DeviceError(f"{name} of the model is on the meta device; build the model on the CPU")
    return [
        *(f"the file has no {name!r}" for name in state if name not in tensors),
        *(f"the model has no {name!r}" for name in tensors if name not in state),
    ]
