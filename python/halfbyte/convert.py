"""Replacing the linear layers and embeddings of a model in place: which, how, why the others stay float."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .arrays import check_vector, place_of
from .embedding import QEmbedding
from .errors import DTypeError, ModelError, SchemeError
from .modules import (
    check_module,
    extra_attributes,
    float_bias,
    float_weight,
    is_embedding,
    is_linear,
    join,
    mask_numbers,
    obstacle,
    replace,
    shape_of,
    sites,
    weight_parameter,
)
from .packed_layer import PackedLayer
from .qlinear import QLinear
from .quantize import QuantizedTensor, quantize
from .rules import Decision, Patterns, Rules, Schemes
from .scheme import Scheme
from .search import METHODS
from .sparse.linear import SparseLinear

T = TypeVar("T")
Decide = Callable[[list[str], nn.Module], Decision | None]


def quantize_(
    model: nn.Module,
    scheme: Schemes = "w8a8",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    method: str | None = None,
    embeddings: str | Scheme | None = None,
    progress: bool = True,
) -> nn.Module:
    """Replace the linear layers of `model` by QLinear, in place, and return the model.

    Layers: nn.Linear (not its subclasses) and the Conv1D of transformers. A model that is itself such a layer
    cannot be replaced in place: use what is returned.

    scheme: one scheme, or {pattern: scheme or None}, of which the first pattern that fits a layer's name
    decides and the key "_default" the layers that none fits (None, and an absent "_default": stays float).
    Patterns are fnmatch globs, or regular expressions after "re:", matched against the whole dotted name.
    A pruned layer, with masks of torch.nn.utils.prune, is quantized as it is used; masks and hooks go. Zeros
    stay zeros in schemes without +asym.
    include, exclude: patterns that a layer must, or must not, fit. A layer that the model holds under several
    names fits where one of them does.
    method: how codes and scales are found, as `quantize` takes it. "hqq" goes to the layers whose scheme it
    fits (asymmetric, with groups); the others take their default.
    embeddings: a scheme, of which the weight's part counts: every nn.Embedding that `exclude` does not fit
    becomes a QEmbedding (not its subclasses, nor one with max_norm, scale_grad_by_freq or sparse).

    Layers that share one weight share its codes, a head with its embedding too, if the formats of their codes
    are equal; otherwise each gets its own. A weight shared with something that stays float (an embedding,
    say) stays float too, unless a pattern of `include` or of the mapping asks for its layer, which then gets
    a copy of its own. `model._halfbyte_report` lists, per layer: name, shape, action ("quantized" or
    "float"), reason and, for a layer quantized from a weight that another one had too, tied_to: its name.

    An error leaves the model as it was, and so does Ctrl-C: every layer is quantized once for trial (with
    method "absmax", which meets every error that a search meets) before the first one is replaced. Each float
    weight is then released as its layer is replaced, so that the model shrinks while it is converted; Ctrl-C
    waits for the end of that. Running out of memory there, or a signal other than SIGINT, leaves a mixed
    model, which works, and which a second call completes.

    Raises ModelError (nothing to quantize), NonFiniteError, DeviceError, DTypeError, ShapeError, each naming
    the layer, and SchemeError.
    """
    check_module(model, "quantize_")
    rules = Rules(scheme, include, exclude, embeddings)
    linear, tables = _names(model)
    if (linear or tables) and (idle := rules.idle(linear, tables)):
        warnings.warn(f"quantize_: no layer has a name that fits {', '.join(idle)}", stacklevel=2)
    chosen, report = _choose(model, rules.decide)
    if not chosen:
        reasons = [f"{row['name'] or 'the model itself'}: {row['reason']}" for row in report]
        raise ModelError(
            f"nothing to quantize in this {type(model).__name__}: "
            + ("; ".join(reasons[:8]) or "it has no nn.Linear and no Conv1D")
        )
    return _convert(model, chosen, report, progress, method)


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

    def decide(names: list[str], module: nn.Module) -> Decision | None:
        if isinstance(module, nn.Embedding):
            return None
        if type(module) is not nn.Linear:
            return Decision(None, f"{type(module).__name__} is not in qconfig_spec")
        if nn.Linear in spec:
            return Decision(scheme)
        named = any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes for name in names)
        return Decision(scheme, asked=True) if named else Decision(None, "not named in qconfig_spec")

    if not inplace:
        # A weight that nothing float holds: no reason says that it is shared.
        chosen = [layer.module for layer in _choose(model, decide)[0] if not layer.decision.reason]
        gone = [tensor for module in chosen for tensor in (weight_parameter(module), module.weight)]
        model = copy.deepcopy(model, {id(weight): weight for weight in gone})
    return _convert(model, *_choose(model, decide), progress=True)


@dataclasses.dataclass
class _Layer:
    """One float linear layer or embedding of the model and the places it is found at."""

    name: str
    module: nn.Module
    sites: list[tuple[nn.Module, str]]  # (parent, attribute); none for a model that is itself the layer
    decision: Decision
    mask: int = 0  # the same number: layers that share a weight have equal masks
    tied_to: str = ""  # what else had the float weight of this layer, which is to be quantized

    @property
    def is_conv1d(self) -> bool:
        return type(self.module) not in (nn.Linear, nn.Embedding)

    @property
    def weight(self) -> Tensor:
        """[n, k], the masks of torch.nn.utils.prune applied."""
        weight = float_weight(self.module, self.name)
        return weight.t() if self.is_conv1d else weight

    @property
    def codes_key(self) -> tuple:
        """Layers with the same key have the same codes."""
        s, weight = self.decision.scheme, id(weight_parameter(self.module))
        return weight, self.mask, self.is_conv1d, s.weight_bits, s.group, s.asym, s.nf4

    def row(self) -> dict[str, Any]:
        action = "quantized" if self.decision.scheme else "float"
        row = report_row(self.name, self.module, action, self.decision.reason)
        return row | ({"tied_to": self.tied_to} if self.tied_to and self.decision.scheme else {})


def report_row(name: str, module: nn.Module, action: str, reason: str) -> dict[str, Any]:
    """A row of the report. action: "quantized", "sparse" or "float"."""
    return {"name": name, "shape": shape_of(module), "action": action, "reason": reason}


def _names(model: nn.Module) -> tuple[list[str], list[str]]:
    """All names of the linear layers, and of the embeddings, quantized or not."""
    linear, embeddings = [], []
    for names, module, _ in sites(model):
        if isinstance(module, PackedLayer) or is_linear(module):
            linear += names
        elif isinstance(module, QEmbedding | nn.Embedding):
            embeddings += names
    return linear, embeddings


def _choose(model: nn.Module, decide: Decide) -> tuple[list[_Layer], list[dict]]:
    """The layers to quantize, and the report."""
    layers, report = _find(model, decide)
    _settle_ties(model, layers)
    return [x for x in layers if x.decision.scheme is not None], [*report, *(x.row() for x in layers)]


def _convert(
    model: nn.Module, chosen: list[_Layer], report: list[dict], progress: bool, method: str | None = None
) -> nn.Module:
    methods = _methods({layer.decision.scheme for layer in chosen}, method)
    # Float weights go as their codes come, so that the model shrinks while it is converted; what can fail has
    # to fail before the first of them goes. The rehearsal makes the codes of every layer and drops them.
    for layer in tracked(chosen, "check", progress):
        _make(layer, "absmax")
    codes: dict[tuple, QuantizedTensor] = {}
    with uninterrupted():
        for layer in tracked(chosen, "quantize", progress):
            old, key = layer.module, layer.codes_key
            new = _make(layer, methods[layer.decision.scheme], codes.get(key))
            codes[key] = new.quantized
            replace(layer.sites, new)
            if old is model:
                model = new
            layer.module = old = None  # the float weight goes, unless another layer still waits for it
        model._halfbyte_report = report
    return model


def _methods(schemes: set[Scheme], method: str | None) -> dict[Scheme, str | None]:
    """The method for each scheme: "hqq" not for those without offsets, if there are any with."""
    if method is not None and method not in METHODS:
        raise SchemeError(f"no method is called {method!r}; the methods are: {', '.join(METHODS)}")
    if method != "hqq":
        return dict.fromkeys(schemes, method)
    fit = {scheme for scheme in schemes if scheme.asym and scheme.group}
    if not fit:
        names = ", ".join(sorted(map(str, schemes)))
        raise SchemeError(
            f'method "hqq" finds a float offset for each group, which {names} has no place for; give a '
            'scheme such as w4a16_g64+asym, or method="mse"'
        )
    return {scheme: method if scheme in fit else None for scheme in schemes}


def _find(model: nn.Module, decide: Decide) -> tuple[list[_Layer], list[dict]]:
    """The float layers with what is decided for each, and report rows of those that cannot change."""
    layers, report = [], []
    for names, module, places in sites(model):
        name = names[0]
        if is_linear(module) or is_embedding(module):
            decision = decide(names, module)
            if decision is None:
                continue
            if reason := obstacle(module):
                decision = Decision(None, reason)
            layers.append(_Layer(name, module, places, decision))
        elif isinstance(module, QLinear | QEmbedding):
            report.append(report_row(name, module, "quantized", "was quantized before"))
        elif isinstance(module, SparseLinear):
            report.append(report_row(name, module, "sparse", "was made sparse before"))
        elif isinstance(module, nn.Linear | nn.Embedding) and decide(names, module) is not None:
            base = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
            reason = f"{type(module).__name__} is a subclass of nn.{base.__name__}"
            report.append(report_row(name, module, "float", reason))
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
    first: dict[int, _Layer] = {}
    masks = mask_numbers(layer.module for layer in layers)
    for layer in layers:
        layer.mask = masks[layer.module]
        if layer.decision.scheme is None:
            continue
        weight = id(weight_parameter(layer.module))
        holders = float_holders.get(weight)
        if holders and not layer.decision.asked:
            layer.decision = Decision(None, f"shares its weight with {', '.join(holders)}, which stays float")
            continue
        other = first.setdefault(weight, layer)
        if holders:
            note, layer.tied_to = f"no longer shares its weight with {', '.join(holders)}", holders[0]
            layer.decision = dataclasses.replace(layer.decision, reason=note)
        elif other is not layer:
            layer.tied_to = other.name
            if layer.codes_key != other.codes_key:
                what = "their masks" if layer.mask != other.mask else "the formats of their codes"
                note = f"no longer shares its weight with {other.name}: {what} differ"
                layer.decision = dataclasses.replace(layer.decision, reason=note)


def _make(layer: _Layer, method: str | None, q: QuantizedTensor | None = None) -> QLinear | QEmbedding:
    """What takes the place of a float layer; `q`: its codes, where another layer has them already."""
    old, name, scheme = layer.module, join(layer.name, "weight"), layer.decision.scheme
    if q is None:
        q = quantize(layer.weight, scheme, method=method, name=name)
    elif q.scheme != scheme:  # the codes are equal, what they are multiplied with is not
        q = dataclasses.replace(q, scheme=scheme)
    options = {"float_dtype": old.weight.dtype, "name": layer.name or "the model"}
    if is_embedding(old):
        new = QEmbedding(q, padding_idx=old.padding_idx, **options)
    else:
        if (bias := float_bias(old, layer.name)) is not None:
            check_vector(place_of(q.codes, name), bias, q.shape[0], join(layer.name, "bias"), name)
        new = QLinear(q, bias, **options)
    for attribute, value in extra_attributes(old).items():
        if not hasattr(new, attribute):
            setattr(new, attribute, value)
    return new.train(old.training)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
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


def tracked(layers: list[T], what: str, wanted: bool) -> Iterator[T]:
    """The layers, with a bar on a terminal once the work has lasted for a second.

    Nothing that happens to the bar is an error: it must not end the replacement in its middle.
    """
    bar = None
    with contextlib.suppress(Exception):
        from tqdm import tqdm

        off = None if wanted else True  # None: where there is no terminal
        bar = tqdm(total=len(layers), desc=what, unit="layer", delay=1, leave=False, disable=off)
    try:
        for layer in layers:
            yield layer
            with contextlib.suppress(Exception):
                bar.update()
    finally:
        with contextlib.suppress(Exception):
            bar.close()
