"""The tensors of a checkpoint into a model: quantized layers replace float ones, floats are copied."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .arrays import kind_of
from .checkpoints import read_checkpoint
from .embedding import QEmbedding
from .errors import DeviceError, DTypeError, FormatError, ModelError
from .gguf import read_gguf
from .gguf_header import is_gguf
from .modules import (
    check_module,
    extra_attributes,
    is_embedding,
    is_linear,
    join,
    obstacle,
    replace,
    shape_of,
    sites,
)
from .pack_inplace import restore
from .packed_layer import INPUT_BUFFERS, PackedLayer
from .qlinear import QLinear
from .quantized_tensor import PARTS, QuantizedTensor

Tensors = Mapping[str, QuantizedTensor | Tensor]
_LISTED = 8  # problems that a message names


def load_quantized_(
    model: nn.Module, tensors: Tensors | str | os.PathLike[str], *, strict: bool = True
) -> nn.Module:
    """Put the tensors of a checkpoint into `model`, in place, and return it.

    tensors: {name in the model: QuantizedTensor or tensor}, as `read_gguf(..., names="transformers")` and
    `read_checkpoint` return, or a path: a GGUF file, or a safetensors file or directory.

    A QuantizedTensor called "<layer>.weight" makes a QLinear of an nn.Linear or a Conv1D of transformers and
    a QEmbedding of an nn.Embedding; a "<layer>.bias" goes with it. Other tensors are copied into the model's
    own, in their dtype. A QLinear or SparseLinear of the model hands its activation and static range on to
    its replacement.
    Where the model ties two weights and the checkpoint has one, both are made of it and share its codes.
    `model._halfbyte_report` lists the linear layers and embeddings.

    The float weights of the model are not looked at: parameters may be on the meta device, so that nothing
    is spent on them. Buffers must have values where the checkpoint has none for them.

    `strict=False` warns of names that only the checkpoint or only the model has, instead of raising. A model
    that is itself a linear layer or an embedding is returned anew.

    Raises, before anything in the model is touched: FormatError for damaged files, other shapes and names of
    another model; ModelError for layers that cannot be replaced; DeviceError for what would stay without
    data and for tensors that are not dense CPU memory; what `read_gguf` and `read_checkpoint` raise.
    """
    check_module(model, "load_quantized_")
    with torch.inference_mode(False), torch.no_grad():
        plan = _Plan(model, _read(tensors))
        if plan.problems:
            text = "; ".join(plan.problems[:_LISTED])
            if more := len(plan.problems) - _LISTED:
                text += f"; and {more} more" if more > 0 else ""
            if strict:
                raise FormatError(
                    f"the checkpoint is not of this {type(model).__name__}: {text}; build the model as the "
                    "checkpoint's config says, rename the tensors, or pass strict=False"
                )
            warnings.warn(f"load_quantized_: {text}", stacklevel=2)
        plan.check_memory()
        return plan.carry_out()


def _read(tensors: Tensors | str | os.PathLike[str]) -> Tensors:
    if isinstance(tensors, str | os.PathLike):
        return read_gguf(tensors, names="transformers") if is_gguf(tensors) else read_checkpoint(tensors)
    if not isinstance(tensors, Mapping):
        raise DTypeError(f"tensors must be a mapping or a path, not {type(tensors).__name__}")
    for name, value in tensors.items():
        ours = isinstance(value, Tensor) or (
            isinstance(value, QuantizedTensor) and isinstance(value.codes, Tensor)
        )
        if not ours:
            raise DTypeError(
                f"{name!r} is a {type(value).__name__}; it must be a tensor, or a QuantizedTensor of torch"
            )
        if isinstance(value, Tensor):
            kind_of(value, repr(name))
            continue
        for part in PARTS:
            if (array := getattr(value, part)) is not None:
                kind_of(array, f"{part} of {name!r}")
    return tensors


def _keep_settings(name: str, old: PackedLayer, new: QLinear) -> None:
    """What was set on a layer that is packed already: its activation and the range of its inputs."""
    restore(old)  # so that it has nothing of `pack_` to hand on
    new.activation = old.activation
    if old.input_scale is None:
        return
    if not new.scheme.per_token:
        raise ModelError(
            f"load_quantized_: {name} has a static range of its inputs, which its new scheme {new.scheme} "
            "cannot use; set its `static` to None, or load into the float model"
        )
    for buffer in INPUT_BUFFERS:
        kind_of(getattr(old, buffer), f"{buffer} of {name}")
    new.static = old.static


class _Plan:
    """All that is to be done to a model, checked; making it changes nothing."""

    def __init__(self, model: nn.Module, tensors: Tensors):
        self.model, self.tensors = model, tensors
        self.sites = list(sites(model))
        self.names_of: dict[int, list[str]] = {}  # id of a parameter -> its names
        for its_names, module, _ in self.sites:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self.names_of.setdefault(id(parameter), []).extend(join(n, key) for n in its_names)
        self.used: set[str] = set()
        self.problems: list[str] = []
        self.swaps: list[tuple[str, nn.Module, list, nn.Module]] = []  # name, old, places, new
        self.swapped: set[str] = set()  # names in the state of layers that are replaced
        self.copies: dict[int, tuple[str, Tensor, Tensor]] = {}  # name, target, value
        for its_names, module, places in self.sites:
            if (new := self._layer(its_names, module)) is not None:
                self.swaps.append((its_names[0], module, places, new))
                self.swapped.update(join(n, key) for n in its_names for key in module.state_dict())
        for name, target in model.state_dict(keep_vars=True).items():
            if name not in self.swapped:
                self._copy(name, target)
        self.problems += [f"the model has no {name!r}" for name in tensors if name not in self.used]

    def _first(self, names: Iterable[str]) -> str | None:
        """The first of the names that the checkpoint has."""
        return next((name for name in names if name in self.tensors), None)

    def _layer(self, its_names: list[str], module: nn.Module) -> nn.Module | None:
        """What replaces a module whose weight the checkpoint has as a QuantizedTensor."""
        own = [join(n, "weight") for n in its_names]
        source = self._first([*own, *self.names_of.get(id(module._parameters.get("weight")), ())])
        q = None if source is None else self.tensors[source]
        if not isinstance(q, QuantizedTensor):
            return None
        name = its_names[0] or "the model"
        if not (is_linear(module) or is_embedding(module) or isinstance(module, PackedLayer | QEmbedding)):
            raise FormatError(
                f"{source!r} is quantized in the checkpoint, and {name} in the model is a "
                f"{type(module).__name__}; only nn.Linear, Conv1D and nn.Embedding can hold it: dequantize it"
            )
        if q.shape != (shape := shape_of(module)):
            raise FormatError(
                f"{source!r} is {q.shape[0]} x {q.shape[1]} in the checkpoint and {shape[0]} x {shape[1]} in "
                "the model; build the model as the checkpoint's config says"
            )
        if (is_linear(module) or is_embedding(module)) and (reason := obstacle(module)):
            raise ModelError(f"load_quantized_: {name} cannot be replaced: {reason}")
        self.used.update(n for n in {source, *own} if n in self.tensors)
        dtype = module.weight.dtype
        if isinstance(module, nn.Embedding | QEmbedding):
            new = QEmbedding(q, padding_idx=module.padding_idx, float_dtype=dtype, name=name)
        else:
            new = QLinear(q, self._bias(its_names, module), float_dtype=dtype, name=name)
            if isinstance(module, PackedLayer):
                _keep_settings(name, module, new)
        for attribute, value in extra_attributes(module).items():
            if not hasattr(new, attribute):
                setattr(new, attribute, value)
        return new.train(module.training)

    def _bias(self, its_names: list[str], module: nn.Module) -> Tensor | None:
        names = [join(n, "bias") for n in its_names]
        if module.bias is None:
            return None
        if (source := self._first(names)) is None:
            self.problems.append(f"the checkpoint has no {names[0]!r}")
            if module.bias.is_meta:
                raise DeviceError(f"{names[0]} is on the meta device, and the checkpoint has no value for it")
            return module.bias
        self.used.add(source)
        self._check(source, module.bias)
        return self.tensors[source]

    def _copy(self, name: str, target: Tensor) -> None:
        """Note that `target` gets its value from the checkpoint."""
        if name not in self.tensors:
            others = [n for n in self.names_of.get(id(target), ()) if n not in self.swapped]
            if self._first(others) is None:
                self.problems.append(f"the checkpoint has no {name!r}")
            return
        self._check(name, target)
        self.used.add(name)
        value = self.tensors[name]
        first, _, before = self.copies.setdefault(id(target), (name, target, value))
        if before is not value and not torch.equal(before, value):
            raise FormatError(
                f"{first!r} and {name!r} differ in the checkpoint and are one tensor in the model; build it "
                "without tying them (tie_word_embeddings=False)"
            )

    def _check(self, name: str, target: Tensor) -> None:
        value = self.tensors[name]
        if isinstance(value, QuantizedTensor):
            raise FormatError(
                f"{name!r} is quantized in the checkpoint, but in the model it is not the weight of a linear "
                "layer or an embedding; dequantize it"
            )
        if value.shape != target.shape or value.is_floating_point() != target.is_floating_point():
            raise FormatError(
                f"{name!r} is {value.dtype} {tuple(value.shape)} in the checkpoint, {target.dtype} "
                f"{tuple(target.shape)} in the model; build the model as the checkpoint's config says"
            )

    def check_memory(self) -> None:
        """DeviceError for a tensor that would stay on the meta device."""
        old = {module for _, module, _, _ in self.swaps}
        for its_names, module, _ in self.sites:
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                bare = tensor is not None and tensor.is_meta and id(tensor) not in self.copies
                if bare and module not in old:
                    raise DeviceError(
                        f"{join(its_names[0], key)} is on the meta device, and the checkpoint has no value "
                        "for it; build the model on the CPU, or with its parameters alone on meta"
                    )

    def carry_out(self) -> nn.Module:
        made: dict[int, Tensor] = {}  # id of a meta tensor -> what takes its place
        for _, target, value in self.copies.values():
            if target.is_meta:
                new = value.to(target.dtype, copy=True)
                made[id(target)] = (
                    nn.Parameter(new, requires_grad=target.requires_grad)
                    if isinstance(target, nn.Parameter)
                    else new
                )
            else:
                target.copy_(value)
        for _, module, _ in self.sites if made else ():
            for held in (module._parameters, module._buffers):
                held |= {key: made[id(tensor)] for key, tensor in held.items() if id(tensor) in made}
        root = self.model
        for _, old, places, new in self.swaps:
            replace(places, new)
            root = new if old is self.model else root
        root._halfbyte_report = [
            {"name": name, "shape": shape_of(new), "action": "quantized", "reason": ""}
            for name, _, _, new in self.swaps
        ] + [
            {"name": names[0], "shape": shape_of(module), "action": "float", "reason": "float in the file"}
            for names, module, _ in self.sites
            if is_linear(module) and not any(old is module for _, old, _, _ in self.swaps)
        ]
        return root
