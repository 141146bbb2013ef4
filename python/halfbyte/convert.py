"""Replacing the linear layers of a model in place: which ones, how, and why the others stay float."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arrays import check_vector, float_code, kind_of
from .errors import DTypeError, ModelError, ShapeError
from .qlinear import QLinear
from .quantize import K_MAX, QuantizedTensor, non_finite, quantize
from .scheme import Scheme

Rules = str | Scheme | Mapping[str, "str | Scheme | None"]


def quantize_(
    model: nn.Module,
    scheme: Rules = "w8a8",
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Replace the linear layers of `model` by QLinear, in place, and return the model.

    Layers: nn.Linear (not its subclasses) and the Conv1D of transformers. A model that is itself such a layer
    cannot be replaced in place: use what is returned.

    scheme: one scheme, or {pattern: scheme or None}, of which the first pattern that fits a layer's name
    decides and the key "_default" the layers that none fits (None, and an absent "_default": stays float).
    Patterns are fnmatch globs, or regular expressions after "re:", matched against the whole dotted name.
    include, exclude: patterns that a layer must, or must not, fit.

    Layers that share one weight share its codes. A weight shared with something that stays float (an
    embedding) stays float too, unless a pattern of `include` or of the mapping asks for its layer, which then
    gets a copy of its own. `model._halfbyte_report` lists, per layer: name, shape, action ("quantized" or
    "float") and reason.

    All layers are checked before the first one is replaced, so that an error leaves the model as it was. Each
    float weight is then released as soon as its layer is replaced, so that the model shrinks while it is
    converted; only an interrupt there leaves a mixed model, which works, and which a second call completes.

    Raises ModelError (nothing to quantize), NonFiniteError, DeviceError, DTypeError, ShapeError, each naming
    the layer, and SchemeError.
    """
    rules = _Rules(scheme, include, exclude)
    names = [
        name for name, module in model.named_modules() if isinstance(module, QLinear) or is_linear(module)
    ]
    if names and (idle := rules.idle(names)):
        warnings.warn(f"quantize_: no linear layer has a name that fits {', '.join(idle)}", stacklevel=2)
    return _convert(model, rules.decide, progress)


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Iterable[type | str] | None = None,
    dtype: torch.dtype = torch.qint8,
    *,
    inplace: bool = False,
) -> nn.Module:
    """Drop-in for torch.ao.quantization.quantize_dynamic: int8 linear layers, on a copy unless `inplace`.

    qconfig_spec: a set of module types and of names of submodules (with all that is below them); {nn.Linear}
    by default. Of the types, nn.Linear is quantized; for another one there is a warning, and it stays float.

    Raises TypeError for the dict of qconfigs that torch also takes, and for a dtype other than torch.qint8.
    """
    if isinstance(qconfig_spec, Mapping):
        raise DTypeError(
            "quantize_dynamic: qconfig objects have no meaning here; pass a set of types and names, or use "
            "quantize_(model, {pattern: scheme})"
        )
    if dtype not in (torch.qint8, torch.int8):
        raise DTypeError(f"quantize_dynamic: dtype {dtype} is not supported; weights become torch.qint8")
    spec = {nn.Linear} if qconfig_spec is None else set(qconfig_spec)
    for item in spec:
        if not isinstance(item, type | str):
            raise DTypeError(
                f"quantize_dynamic: {item!r} is neither a module type nor the name of a submodule"
            )
    if others := sorted(item.__name__ for item in spec if isinstance(item, type) and item is not nn.Linear):
        warnings.warn(
            f"quantize_dynamic: {', '.join(others)} stay float; only nn.Linear is quantized", stacklevel=2
        )
    names = [item for item in spec if isinstance(item, str)]
    scheme = Scheme.parse("w8a8")

    def decide(name: str, module: nn.Module) -> _Decision:
        if type(module) is not nn.Linear:
            return _Decision(None, f"{type(module).__name__} is not in qconfig_spec")
        if nn.Linear in spec:
            return _Decision(scheme)
        named = any(name == prefix or name.startswith(prefix + ".") for prefix in names)
        return _Decision(scheme, asked=True) if named else _Decision(None, "not named in qconfig_spec")

    return _convert(model if inplace else copy.deepcopy(model), decide, progress=True)


@dataclasses.dataclass(frozen=True)
class _Decision:
    scheme: Scheme | None  # None: stays float
    reason: str = ""
    asked: bool = False  # a pattern of the caller's asks for this very layer


class _Rules:
    """The arguments of quantize_, parsed."""

    def __init__(
        self, scheme: Rules, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
    ):
        mapping = dict(scheme) if isinstance(scheme, Mapping) else {"_default": scheme}
        parsed = {p: None if s is None else Scheme.parse(s) for p, s in mapping.items()}
        self.default = parsed.pop("_default", None)
        self.mapping = {_Pattern(p): s for p, s in parsed.items()}
        self.include = None if include is None else _patterns(include)
        self.exclude = _patterns(exclude or ())

    def idle(self, names: list[str]) -> list[str]:
        """The patterns that fit none of the names, quoted."""
        patterns = [*self.mapping, *(self.include or ()), *self.exclude]
        return [repr(p.text) for p in patterns if not any(map(p.fits, names))]

    def decide(self, name: str, module: nn.Module) -> _Decision:
        if any(p.fits(name) for p in self.exclude):
            return _Decision(None, "excluded")
        if self.include is not None and not any(p.fits(name) for p in self.include):
            return _Decision(None, "not included")
        for pattern, scheme in self.mapping.items():
            if pattern.fits(name):
                return _Decision(
                    scheme, "" if scheme else f"the mapping says None for {pattern.text!r}", asked=True
                )
        if self.default is None:
            return _Decision(None, "no pattern of the mapping fits it, and its _default is float")
        return _Decision(self.default, asked=self.include is not None)


class _Pattern:
    """A glob, or a regular expression after "re:", for whole dotted names."""

    def __init__(self, text: str):
        self.text = text
        expression = text[3:] if text.startswith("re:") else fnmatch.translate(text)
        try:
            self.regex = re.compile(expression)
        except re.error as error:
            raise ValueError(f"the pattern {text!r} is no regular expression: {error}") from None

    def fits(self, name: str) -> bool:
        return self.regex.fullmatch(name) is not None


def _patterns(texts: str | Iterable[str]) -> list[_Pattern]:
    return [_Pattern(text) for text in ([texts] if isinstance(texts, str) else texts)]


@dataclasses.dataclass
class _Layer:
    """One float linear layer of the model and the places it is found at."""

    name: str
    module: nn.Module
    sites: list[tuple[nn.Module, str]]  # (parent, attribute); none for a model that is itself the layer
    decision: _Decision

    @property
    def is_conv1d(self) -> bool:
        return type(self.module) is not nn.Linear

    @property
    def weight(self) -> Tensor:
        """[n, k], a view."""
        return self.module.weight.t() if self.is_conv1d else self.module.weight

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": tuple(self.weight.shape),
            "action": "quantized" if self.decision.scheme else "float",
            "reason": self.decision.reason,
        }


def is_linear(module: nn.Module) -> bool:
    """Whether quantize_ replaces `module`: an nn.Linear or a Conv1D of transformers, not a subclass."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return type(module) is nn.Linear or (transformers is not None and type(module) is transformers.Conv1D)


def sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[tuple[nn.Module, str]]]]:
    """Every module of the model once: its first name, itself, and all (parent, attribute) that hold it."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {model: []}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append((parent, attribute))
    for name, module in model.named_modules():
        yield name, module, found[module]


def replace(places: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Put `module` at every (parent, attribute)."""
    for parent, attribute in places:
        parent._modules[attribute] = module


def _convert(model: nn.Module, decide: Callable[[str, nn.Module], _Decision], progress: bool) -> nn.Module:
    layers, report = _find(model, decide)
    _settle_ties(model, layers)
    report += [layer.row() for layer in layers]
    chosen = [layer for layer in layers if layer.decision.scheme is not None]
    if not chosen:
        reasons = [f"{row['name'] or 'the model itself'}: {row['reason']}" for row in report]
        raise ModelError(
            f"nothing to quantize in this {type(model).__name__}: "
            + ("; ".join(reasons[:8]) or "it has no nn.Linear and no Conv1D")
        )
    for layer in chosen:
        _check(layer)

    codes: dict[tuple, QuantizedTensor] = {}
    for layer in _progress_bar(chosen, progress):
        old = layer.module
        key = id(old.weight), layer.decision.scheme, layer.is_conv1d
        if key not in codes:
            codes[key] = quantize(layer.weight, layer.decision.scheme, name=join(layer.name, "weight"))
        new = QLinear(codes[key], old.bias, float_dtype=old.weight.dtype).train(old.training)
        replace(layer.sites, new)
        if old is model:
            model = new
        layer.module = old = None  # the float weight goes, unless another layer still waits for it
    model._halfbyte_report = report
    return model


def _find(model: nn.Module, decide: Callable[[str, nn.Module], _Decision]) -> tuple[list[_Layer], list[dict]]:
    """The float linear layers with what is decided for each, and report rows of those that cannot change."""
    layers, report = [], []
    for name, module, places in sites(model):
        if is_linear(module):
            reason = _obstacle(module)
            layers.append(
                _Layer(name, module, places, _Decision(None, reason) if reason else decide(name, module))
            )
        elif isinstance(module, QLinear):
            report.append(
                {
                    "name": name,
                    "shape": module.quantized.shape,
                    "action": "quantized",
                    "reason": "was quantized before",
                }
            )
        elif isinstance(module, nn.Linear):
            report.append(
                {
                    "name": name,
                    "shape": (module.out_features, module.in_features),
                    "action": "float",
                    "reason": f"{type(module).__name__} is a subclass of nn.Linear",
                }
            )
    return layers, report


def _obstacle(module: nn.Module) -> str:
    """Why a linear layer cannot be swapped without losing something; empty where it can."""
    if "weight" not in module._parameters:
        return "its weight is computed by a hook (weight_norm?), not a parameter"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which a replacement would lose"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return ""


def _settle_ties(model: nn.Module, layers: list[_Layer]) -> None:
    """A weight shared with something that stays float stays float, unless its layer was asked for."""
    layer_of = {layer.module: layer for layer in layers}
    float_holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        layer = layer_of.get(module)
        if layer is None or layer.decision.scheme is None:
            for parameter in module._parameters.values():
                float_holders.setdefault(id(parameter), []).append(name or type(module).__name__)
    for layer in layers:
        if layer.decision.scheme is None or not (holders := float_holders.get(id(layer.module.weight))):
            continue
        if layer.decision.asked:
            note = f"no longer shares its weight with {', '.join(holders)}"
            layer.decision = dataclasses.replace(layer.decision, reason=note)
        else:
            layer.decision = _Decision(
                None, f"shares its weight with {', '.join(holders)}, which stays float"
            )


def _check(layer: _Layer) -> None:
    """Everything that could make the quantization of this layer fail."""
    name, weight, bias = join(layer.name, "weight"), layer.weight.detach(), layer.module.bias
    kind = kind_of(weight, name)
    float_code(kind, weight.dtype, name)
    n, k = weight.shape
    if n == 0 or not 0 < k <= K_MAX:
        raise ShapeError(
            f"{name} has the shape ({n}, {k}); it must have at least one row, and rows of 1 to {K_MAX} "
            "elements; exclude the layer"
        )
    if bias is not None:
        check_vector(kind, bias, n, join(layer.name, "bias"), name)
    if not all(bound.isfinite() for bound in torch.aminmax(weight)):
        raise non_finite(name, int(weight.isfinite().all(1).int().argmin()))


def join(module: str, name: str) -> str:
    """Dotted name of something in a module, whose own name is empty for the whole model."""
    return f"{module}.{name}" if module else name


def _progress_bar(layers: list[_Layer], wanted: bool) -> Iterable[_Layer]:
    """The layers, with a bar on a terminal once the work has lasted for a second."""
    try:
        from tqdm import tqdm
    except ImportError:
        return layers
    return tqdm(layers, "quantize", unit="layer", delay=1, leave=False, disable=None if wanted else True)
