"""Saving a quantized model, and loading it into a freshly built one; packs are not saved but made anew."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import manifest
from .convert import is_linear, join, replace, sites
from .errors import DeviceError, FormatError, ModelError
from .manifest import LayerEntry, Manifest
from .qlinear import QLinear
from .quantize import QuantizedTensor


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a quantized model, its float parameters and buffers included, to a directory, which may exist.

    halfbyte.json says what the layers are, model-<digest>.safetensors holds the tensors; no pickle. A model
    saved there before is replaced whole or, after an error or a crash, not at all; other files of the
    directory are left alone.

    Raises ModelError for a model without quantized layers or with state that is no tensor, DeviceError for
    one with tensors on the meta device, OSError.
    """
    layers = {
        name: LayerEntry(
            m.scheme, m.in_features, m.out_features, m.bias is not None, m.static is not None, m.activation
        )
        for name, m in model.named_modules()
        if isinstance(m, QLinear)
    }
    if not layers:
        raise ModelError(
            f"this {type(model).__name__} has no quantized layer; call halfbyte.quantize_ first, or save it "
            "with torch"
        )
    tensors, aliases = _distinct(model.state_dict())
    with manifest.replacing(directory, layers, aliases) as path:
        save_file(tensors, path)


def load(model: nn.Module, directory: str | os.PathLike[str], *, strict: bool = True) -> nn.Module:
    """Make `model` the one that was saved, in place, and return it.

    `model` is built as the saved one was before quantization, with any values: its linear layers are replaced
    as the file says, and all other parameters and buffers are copied into it, in their own dtype. A model
    that is itself a linear layer is returned anew. `strict=False` warns of names that only the file or only
    the model has, instead of raising.

    Raises FormatError, before anything in the model is touched: the files are truncated, corrupt, foreign or
    from a newer version, or belong to another model.
    """
    saved = manifest.read(directory)
    manifest.check_weights(saved)
    tensors = _tensors(saved)
    found = {name: (module, places) for name, module, places in sites(model)}
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
    return root


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
        with safe_open(saved.weights, "pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise FormatError(f"{saved.weights} is no safetensors file ({error}); save the model again") from None
    for name in saved.layers:
        for buffer in ("weight_codes", "weight_scale", "bias", "input_scale", "input_zero"):
            if (full := join(name, buffer)) in tensors:
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
) -> QLinear:
    """The quantized layer that is to take the place of `module`."""
    if isinstance(module, QLinear) or type(module) is nn.Linear:
        shape = module.out_features, module.in_features
    elif is_linear(module):
        shape = tuple(module.weight.t().shape)
    else:
        raise FormatError(
            f"{saved.directory} has a linear layer {name!r}, which in the model is a "
            f"{type(module).__name__}; build the model as it was built for saving"
        )
    if shape != (entry.out, entry.in_):
        raise FormatError(
            f"{saved.directory} has {name!r} with {entry.in_} -> {entry.out} features, the model with "
            f"{shape[1]} -> {shape[0]}; build the model as it was built for saving"
        )

    def take(buffer: str, dtype: torch.dtype, *shape: int) -> Tensor:
        tensor = tensors.get(full := join(name, buffer))
        if tensor is None or tensor.dtype != dtype or tensor.shape != shape:
            have = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise FormatError(
                f"{saved.weights}: {full} must be {dtype} {shape} and is {have}; save the model again"
            )
        return tensor

    q = QuantizedTensor(
        take("weight_codes", torch.int8, entry.out, entry.in_),
        take("weight_scale", torch.float32, entry.out),
        entry.scheme,
    )
    bias = take("bias", torch.float32, entry.out) if entry.bias else None
    layer = QLinear(q, bias, float_dtype=module.weight.dtype).train(module.training)
    layer.activation = entry.activation
    if entry.static:
        layer.input_scale, layer.input_zero = (
            take("input_scale", torch.float32),
            take("input_zero", torch.int32),
        )
    return layer


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
