"""The layouts in which GPTQ, AWQ and compressed-tensors keep a layer's integers, as QuantizedTensors.

Each class reads the `quantization_config` of a checkpoint; its `build` makes the weight of one layer out of
the tensors that have the layer's name before `parts`, of which `keys` say that there is such a layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .assemble import assemble, pack_nibbles, unpack_words, word_octets
from .errors import FormatError
from .quantized_tensor import QuantizedTensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_WORD = 32
_BITS = (4, 8)

Parts = Mapping[str, Tensor]


class Gptq:
    """GPTQ, as AutoGPTQ and GPTQModel write it: value (u - z) * s.

    qweight int32 [k * bits / 32, n], codes packed along k; scales [groups, n]; qzeros int32
    [groups, n * bits / 32], packed along n, with z - 1 modulo 2^bits, or z where the checkpoint_format is
    gptq_v2; g_idx int32 [k], the group of each element, which must be the one of its place.

    A checkpoint with `sym` has z = 2^(bits-1) throughout. Some of those say the one format and store the
    other one: there both are read.
    """

    parts = ("qweight", "qzeros", "scales", "g_idx")
    keys = ("qweight",)

    def __init__(self, config: Mapping[str, Any]):
        self.bits = _option(config, "bits", _BITS)
        self.group = _group(config.get("group_size", -1))
        self.symmetric = config.get("sym")
        self.act_order = bool(config.get("desc_act"))
        stored = config.get("checkpoint_format", "gptq")
        if stored not in ("gptq", "gptq_v2"):
            raise FormatError(f"checkpoint_format is {stored!r}; gptq and gptq_v2 can be read")
        self.offset = 0 if stored == "gptq_v2" else 1

    def activations(self, layer: str) -> str:
        """Activations are no matter of GPTQ."""
        return "a16"

    def build(self, layer: str, parts: Parts, activations: str) -> QuantizedTensor:
        per_word = _WORD // self.bits
        words = _take(layer, parts, "qweight", (torch.int32,), None, None)
        k, n = len(words) * per_word, words.shape[1]
        groups = _groups(k, self.group)
        scale = _take(layer, parts, "scales", _FLOATS, groups, n)
        zeros = _take(layer, parts, "qzeros", (torch.int32,), groups, -(-n // per_word))
        if "g_idx" in parts:
            _check_order(layer, parts["g_idx"], k, self.group)
        elif self.act_order and self.group:
            raise FormatError(f"{layer} has desc_act and no g_idx: the file is incomplete; get it anew")
        stored = unpack_words(zeros, self.bits)[:, :n].t()
        zero = (stored + self.offset) & (2**self.bits - 1)
        if self.symmetric:
            middle = 2 ** (self.bits - 1)
            if not ((stored == middle - 1).all() or (stored == middle).all()):
                raise FormatError(
                    f"{layer}: the checkpoint is symmetric by its config, but not by its qzeros, which must "
                    f'all be {middle - 1} or {middle}; correct "sym" in the config'
                )
            zero = None
        octets = word_octets(words.t())
        return assemble(layer, octets, k, scale.t(), zero, bits=self.bits, group=self.group, act=activations)


class Awq:
    """AWQ, as AutoAWQ writes its version "gemm": value (u - z) * s, 4 bits.

    qweight int32 [k, n / 8], codes packed along n, qzeros int32 [groups, n / 8]: of 8 columns, the halves of
    the bytes hold 0, 2, 4, 6, 1, 3, 5, 7 from the lowest on; scales [groups, n].
    """

    parts = ("qweight", "qzeros", "scales")
    keys = ("qweight",)
    _PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # column -> half byte: the inverse of the order above

    def __init__(self, config: Mapping[str, Any]):
        _option(config, "bits", (4,))
        self.group = _group(config.get("group_size", 128))
        version = config.get("version") or config.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise FormatError(f"the AWQ version is {version!r}; only gemm can be read")

    def activations(self, layer: str) -> str:
        """Activations are no matter of AWQ."""
        return "a16"

    def build(self, layer: str, parts: Parts, activations: str) -> QuantizedTensor:
        words = _take(layer, parts, "qweight", (torch.int32,), None, None)
        k, n = len(words), words.shape[1] * 8
        groups = _groups(k, self.group)
        scale = _take(layer, parts, "scales", _FLOATS, groups, n)
        zeros = _take(layer, parts, "qzeros", (torch.int32,), groups, n // 8)
        octets, zero = pack_nibbles(self._columns(words).t()), self._columns(zeros).t()
        return assemble(layer, octets, k, scale.t(), zero, bits=4, group=self.group, act=activations)

    def _columns(self, words: Tensor) -> Tensor:
        """uint8 [rows, n]."""
        return unpack_words(words, 4).view(len(words), -1, 8)[:, :, self._PLACES].flatten(1)


class _Group(NamedTuple):
    """One of compressed-tensors' config_groups."""

    targets: tuple[str, ...]
    format: str
    bits: int
    group: int | None  # None: one scale for the tensor; 0: one per row
    symmetric: bool
    activations: str | None  # None: some that no scheme here has
    activation_text: str


class CompressedTensors:
    """compressed-tensors, formats int-quantized and pack-quantized: value (c - z) * s with signed c and z.

    int-quantized: weight int8 [n, k]; weight_zero_point int8, of the shape of the scale. pack-quantized:
    weight_packed int32 [n, ceil(k * bits / 32)], codes c + 2^(bits-1) packed along k; weight_shape [n, k];
    weight_zero_point int32 [ceil(n * bits / 32), groups], packed along n in the same way, or plain int8.
    weight_scale: [n, groups], [n, 1], or one number. weight_g_idx as GPTQ's g_idx.
    """

    parts = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
    )
    keys = ("weight_packed", "weight_scale")

    def __init__(self, config: Mapping[str, Any]):
        for what in ("sparsity_config", "transform_config"):
            kept = config.get(what) or {}
            if kept and (what == "transform_config" or kept.get("format") not in (None, "dense")):
                raise FormatError(f"it has a {what}, which is not supported; get the model without it")
        self.groups = [_parse_group(g, config.get("format")) for g in config["config_groups"].values()]

    def activations(self, layer: str) -> str:
        """What the checkpoint says of the activations of a layer. FormatError for what no scheme here has."""
        group = self._group(layer)
        if group.activations is None:
            raise FormatError(
                f"{layer} wants activations of {group.activation_text}, which no scheme has; "
                "call halfbyte.read_checkpoint(path, activations='a8') (found at run time, per token or "
                "group) or activations='a16' to take its weights alone"
            )
        return group.activations

    def build(self, layer: str, parts: Parts, activations: str) -> QuantizedTensor:
        group = self._group(layer)
        middle = 2 ** (group.bits - 1)
        if group.format == "pack-quantized":
            words = _take(layer, parts, "weight_packed", (torch.int32,), None, None)
            n, k = _take_shape(layer, parts)
            if tuple(words.shape) != (n, -(-k * group.bits // _WORD)):
                raise FormatError(
                    f"{layer}.weight_packed is {tuple(words.shape)} for {n} x {k} elements of {group.bits} "
                    "bits; the file is damaged: get it anew"
                )
            octets = word_octets(words)[:, : -(-k * group.bits // 8)]
        else:
            codes = _take(layer, parts, "weight", (torch.int8,), None, None)
            n, k = codes.shape
            octets = _unsigned(layer, "weight", codes, group.bits)
            octets = pack_nibbles(octets) if group.bits == 4 else octets
        size = group.group or 0
        scale = _rows(layer, "weight_scale", _need(layer, parts, "weight_scale"), n, _groups(k, size))
        if scale.dtype not in _FLOATS:
            _wrong(layer, "weight_scale", scale, "floating point")
        zero = parts.get("weight_zero_point")
        if zero is None:
            if not group.symmetric:
                raise FormatError(f"{layer} is asymmetric and has no weight_zero_point; get the file anew")
        elif zero.dtype == torch.int32:
            per_word = _WORD // group.bits
            zero = _take(layer, parts, "weight_zero_point", (torch.int32,), -(-n // per_word), scale.shape[1])
            zero = unpack_words(zero.t(), group.bits)[:, :n].t()
        else:
            zero = _rows(layer, "weight_zero_point", zero, n, scale.shape[1])
            zero = _unsigned(layer, "weight_zero_point", zero, group.bits)
        if zero is not None and group.symmetric and not (zero == middle).all():
            raise FormatError(f"{layer} is symmetric by its config, but has zero points; correct the config")
        if "weight_g_idx" in parts:
            _check_order(layer, parts["weight_g_idx"], k, size)
        return assemble(layer, octets, k, scale, zero, bits=group.bits, group=size, act=activations)

    def _group(self, layer: str) -> _Group:
        """The group whose targets name the layer or, else, the class Linear."""
        for fits in (lambda t: t == layer or (t[:3] == "re:" and re.match(t[3:], layer)), "Linear".__eq__):
            for group in self.groups:
                if any(map(fits, group.targets)):
                    return group
        raise FormatError(f"no group of the config has {layer} among its targets; correct the config")


def _parse_group(config: Mapping[str, Any], default: object) -> _Group:
    weights, inputs = config["weights"], config.get("input_activations")
    layout = config.get("format") or default
    if layout not in ("int-quantized", "pack-quantized") or weights.get("type", "int") != "int":
        raise FormatError(
            f"the format is {layout!r} with weights of the type {weights.get('type', 'int')!r}; "
            "int-quantized and pack-quantized, of integers, can be read"
        )
    targets = tuple(map(str, config.get("targets") or ("Linear",)))
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(f"the target {target!r} is no regular expression ({error})") from None
    size = weights.get("group_size")
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
    if strategy not in ("tensor", "channel", "group"):
        raise FormatError(f"the weights' strategy is {strategy!r}; tensor, channel and group can be read")
    activations, text = "a16", ""
    if inputs:
        known = inputs.get("num_bits") == 8 and inputs.get("type", "int") == "int" and inputs.get("dynamic")
        activations = "a8" if known is True else None
        dynamic = "dynamic" if inputs.get("dynamic") else "fixed"
        text = f"{inputs.get('num_bits')} bits, {inputs.get('type', 'int')}, with {dynamic} scales"
    return _Group(
        targets,
        layout,
        _option(weights, "num_bits", _BITS),
        _group(size) if strategy == "group" else 0 if strategy == "channel" else None,
        bool(weights.get("symmetric", True)),
        activations,
        text,
    )


METHODS = {"gptq": Gptq, "awq": Awq, "compressed-tensors": CompressedTensors}


def _option(config: Mapping[str, Any], key: str, allowed: tuple[int, ...]) -> int:
    if (value := config.get(key)) not in allowed:
        raise FormatError(f"{key} is {value!r}; {' and '.join(map(str, allowed))} can be read")
    return int(value)


def _group(size: object) -> int:
    """Elements of a group; 0 for -1, which is all of a row."""
    if type(size) is not int or (size < 1 and size != -1):
        raise FormatError(f"group_size is {size!r}; it must be a positive integer or -1")
    return max(size, 0)


def _groups(k: int, group: int) -> int:
    return -(-k // group) if group else 1


def _need(layer: str, parts: Parts, part: str) -> Tensor:
    if part not in parts:
        raise FormatError(f"{layer}.{part} is missing; the file is incomplete: get it anew")
    return parts[part]


def _take(layer: str, parts: Parts, part: str, dtypes: tuple[torch.dtype, ...], *shape: int | None) -> Tensor:
    """A tensor of one of the dtypes and of the shape, of which None stands for any number but 0."""
    x = _need(layer, parts, part)
    fits = len(shape) == x.ndim and all(w in (None, h) and h for w, h in zip(shape, x.shape, strict=True))
    if x.dtype not in dtypes or not fits:
        wanted = " x ".join("?" if size is None else str(size) for size in shape)
        _wrong(layer, part, x, f"{wanted}, {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}")
    return x


def _wrong(layer: str, part: str, x: Tensor, wanted: str) -> NoReturn:
    raise FormatError(
        f"{layer}.{part} is {' x '.join(map(str, x.shape))}, {str(x.dtype).removeprefix('torch.')}; with "
        f"this config it must be {wanted}: correct the config, or get the file anew"
    )


def _take_shape(layer: str, parts: Parts) -> tuple[int, int]:
    x = _need(layer, parts, "weight_shape")
    if tuple(x.shape) != (2,) or x.is_floating_point() or min(x.tolist()) < 1:
        raise FormatError(f"{layer}.weight_shape is {x.tolist()}, not [n, k]; the file is damaged")
    return tuple(x.tolist())


def _rows(layer: str, part: str, x: Tensor, n: int, groups: int) -> Tensor:
    """[n, groups] of that, of [n] or of one number."""
    if x.numel() == 1 and x.ndim < 2:
        return x.reshape(1, 1).expand(n, groups)
    if groups == 1 and tuple(x.shape) == (n,):
        return x[:, None]
    if tuple(x.shape) != (n, groups):
        _wrong(layer, part, x, f"{n} x {groups}")
    return x


def _unsigned(layer: str, part: str, x: Tensor, bits: int) -> Tensor:
    """uint8 c + 2^(bits-1) of signed c."""
    middle = 2 ** (bits - 1)
    if x.dtype != torch.int8:
        _wrong(layer, part, x, "int8")
    if bits < 8 and (x.amin() < -middle or x.amax() >= middle):
        raise FormatError(f"{layer}.{part} holds numbers of more than {bits} bits; correct the config")
    return (x.view(torch.uint8) + middle) & (2**bits - 1)


def _check_order(layer: str, indices: Tensor, k: int, group: int) -> None:
    """FormatError unless element i is of the group i // group."""
    expected = torch.arange(k) // (group or k)
    if tuple(indices.shape) != (k,) or indices.is_floating_point() or not torch.equal(indices, expected):
        raise FormatError(
            f"{layer} was quantized with act-order: its groups are not runs of {group or k} elements "
            "(g_idx), which no kernel here reads; quantize the model with desc_act=False (actorder null)"
        )
