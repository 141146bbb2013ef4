"""Replacing the linear layers of a model in place: which ones, how, and why the others stay float."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fnmatch
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arrays import check_vector, kind_of
from .errors import DTypeError, ModelError
from .modules import check_module, extra_attributes, is_linear, join, obstacle, replace, shape_of, sites
from .qlinear import QLinear
from .quantize import QuantizedTensor, quantize
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
    include, exclude: patterns that a layer must, or must not, fit. A layer that the model holds under several
    names fits where one of them does.

    Layers that share one weight share its codes. A weight shared with something that stays float (an
    embedding) stays float too, unless a pattern of `include` or of the mapping asks for its layer, which then
    gets a copy of its own. `model._halfbyte_report` lists, per layer: name, shape, action ("quantized" or
    "float") and reason.

    An error leaves the model as it was, and so does Ctrl-C: every layer is quantized once for trial before
    the first one is replaced. Each float weight is then released as its layer is replaced, so that the model
    shrinks while it is converted; Ctrl-C waits for the end of that. Running out of memory there, or a signal
    other than SIGINT, leaves a mixed model, which works, and which a second call completes.

    Raises ModelError (nothing to quantize), NonFiniteError, DeviceError, DTypeError, ShapeError, each naming
    the layer, and SchemeError.
    """
    check_module(model, "quantize_")
    rules = _Rules(scheme, include, exclude)
    names = [
        name
        for its_names, module, _ in sites(model)
        for name in its_names
        if isinstance(module, QLinear) or is_linear(module)
    ]
    if names and (idle := rules.idle(names)):
        warnings.warn(f"quantize_: no linear layer has a name that fits {', '.join(idle)}", stacklevel=2)
    chosen, report = _choose(model, rules.decide)
    if not chosen:
        reasons = [f"{row['name'] or 'the model itself'}: {row['reason']}" for row in report]
        raise ModelError(
            f"nothing to quantize in this {type(model).__name__}: "
            + ("; ".join(reasons[:8]) or "it has no nn.Linear and no Conv1D")
        )
    return _convert(model, chosen, report, progress)


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Iterable[type | str] | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: None = None,
    inplace: bool = False,
) -> nn.Module:
    """Drop-in for torch.ao.quantization.quantize_dynamic: int8 linear layers, on a copy unless `inplace`.

    qconfig_spec: a set of module types and of names of submodules (with all that is below them); {nn.Linear}
    by default. Of the types, nn.Linear is quantized; for another one there is a warning, and it stays float.
    Where there is no such layer nothing is replaced, as in torch. Float weights that are to be replaced are
    not copied.

    Raises TypeError for the dict of qconfigs and the mapping that torch also takes, and for a dtype other
    than torch.qint8.
    """
    check_module(model, "quantize_dynamic")
    if mapping is not None or isinstance(qconfig_spec, Mapping | str | type):
        raise DTypeError(
            "quantize_dynamic: a mapping and qconfig objects have no meaning here; pass a set of types and "
            "names as qconfig_spec, or use quantize_(model, {pattern: scheme})"
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
    prefixes = {item for item in spec if isinstance(item, str)}
    if unknown := sorted(prefixes.difference(*(names for names, *_ in sites(model)))):
        warnings.warn(f"quantize_dynamic: no module is named {', '.join(unknown)}", stacklevel=2)
    scheme = Scheme.parse("w8a8")

    def decide(names: list[str], module: nn.Module) -> _Decision:
        if type(module) is not nn.Linear:
            return _Decision(None, f"{type(module).__name__} is not in qconfig_spec")
        if nn.Linear in spec:
            return _Decision(scheme)
        named = any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes for name in names)
        return _Decision(scheme, asked=True) if named else _Decision(None, "not named in qconfig_spec")

    if not inplace:
        # A weight that nothing float holds: no reason says that it is shared.
        gone = [layer.module.weight for layer in _choose(model, decide)[0] if not layer.decision.reason]
        model = copy.deepcopy(model, {id(weight): weight for weight in gone})
    return _convert(model, *_choose(model, decide), progress=True)


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
        return [repr(p.text) for p in patterns if not p.fits(*names)]

    def decide(self, names: list[str], module: nn.Module) -> _Decision:
        if any(p.fits(*names) for p in self.exclude):
            return _Decision(None, "excluded")
        if self.include is not None and not any(p.fits(*names) for p in self.include):
            return _Decision(None, "not included")
        for pattern, scheme in self.mapping.items():
            if pattern.fits(*names):
                return _Decision(
                    scheme, "" if scheme else f"the mapping says None for {pattern.text!r}", asked=True
                )
        if self.default is None:
            return _Decision(None, "no pattern of the mapping fits it, and its _default is float")
        return _Decision(self.default, asked=self.include is not None)


class _Pattern:
    """A glob, or a regular expression after "re:", for whole dotted names."""

    def __init__(self, text: str):
        if not isinstance(text, str):
            raise DTypeError(f"{text!r} is no pattern for names of layers: it must be a string")
        self.text = text
        expression = text[3:] if text.startswith("re:") else fnmatch.translate(text)
        try:
            self.regex = re.compile(expression)
        except re.error as error:
            raise ValueError(f"the pattern {text!r} is no regular expression: {error}") from None

    def fits(self, *names: str) -> bool:
        """Whether it fits one of the names."""
        return any(map(self.regex.fullmatch, names))


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
            "shape": shape_of(self.module),
            "action": "quantized" if self.decision.scheme else "float",
            "reason": self.decision.reason,
        }


def _choose(
    model: nn.Module, decide: Callable[[list[str], nn.Module], _Decision]
) -> tuple[list[_Layer], list[dict]]:
    """The layers to quantize, and the report."""
    layers, report = _find(model, decide)
    _settle_ties(model, layers)
    return [x for x in layers if x.decision.scheme is not None], [*report, *(x.row() for x in layers)]


def _convert(model: nn.Module, chosen: list[_Layer], report: list[dict], progress: bool) -> nn.Module:
    # Float weights go as their codes come, so that the model shrinks while it is converted; what can fail has
    # to fail before the first of them goes. The rehearsal makes the codes of every layer and drops them.
    for layer in _progress_bar(chosen, progress):
        _make(layer)
    codes: dict[tuple, QuantizedTensor] = {}
    with _uninterrupted():
        for layer in chosen:  # no bar: writing to a closed terminal raises
            old, key = layer.module, (id(layer.module.weight), layer.decision.scheme, layer.is_conv1d)
            new = _make(layer, codes.get(key))
            codes[key] = new.quantized
            replace(layer.sites, new)
            if old is model:
                model = new
            layer.module = old = None  # the float weight goes, unless another layer still waits for it
        model._halfbyte_report = report
    return model


def _find(
    model: nn.Module, decide: Callable[[list[str], nn.Module], _Decision]
) -> tuple[list[_Layer], list[dict]]:
    """The float linear layers with what is decided for each, and report rows of those that cannot change."""
    layers, report = [], []
    for names, module, places in sites(model):
        name = names[0]
        if is_linear(module):
            reason = obstacle(module)
            decision = _Decision(None, reason) if reason else decide(names, module)
            layers.append(_Layer(name, module, places, decision))
        elif isinstance(module, QLinear):
            report.append(
                {
                    "name": name,
                    "shape": shape_of(module),
                    "action": "quantized",
                    "reason": "was quantized before",
                }
            )
        elif isinstance(module, nn.Linear):
            report.append(
                {
                    "name": name,
                    "shape": shape_of(module),
                    "action": "float",
                    "reason": f"{type(module).__name__} is a subclass of nn.Linear",
                }
            )
    return layers, report


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


def _make(layer: _Layer, q: QuantizedTensor | None = None) -> QLinear:
    """The layer that takes the place of a float one; `q`: its codes, where another layer has them already."""
    old, name = layer.module, join(layer.name, "weight")
    q = q or quantize(layer.weight, layer.decision.scheme, name=name)
    if old.bias is not None:
        check_vector(kind_of(q.codes, name), old.bias, q.shape[0], join(layer.name, "bias"), name)
    new = QLinear(q, old.bias, float_dtype=old.weight.dtype, name=layer.name or "the model")
    for attribute, value in extra_attributes(old).items():
        if not hasattr(new, attribute):
            setattr(new, attribute, value)
    return new.train(old.training)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C within the block takes effect at its end."""
    main = threading.current_thread() is threading.main_thread()  # the only one that Python interrupts
    previous = signal.getsignal(signal.SIGINT) if main else None
    if previous is None:  # or a handler that is not Python's
        yield
        return
    came = []
    signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if came:
        signal.raise_signal(signal.SIGINT)


def _progress_bar(layers: list[_Layer], wanted: bool) -> Iterable[_Layer]:
    """The layers, with a bar on a terminal once the work has lasted for a second."""
    try:
        from tqdm import tqdm
    except ImportError:
        return layers
    return tqdm(layers, "quantize", unit="layer", delay=1, leave=False, disable=None if wanted else True)
