"""`summary`: what runs in each linear layer, how fast and how exactly, and why the others stayed in float."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional

from . import _core
from .modules import check_module, is_linear, shape_of
from .qlinear import QLinear
from .tables import markdown_table, mebibytes, percent, significant, text_table

# Interleaved rounds of about this long: a layer costs some 30 ms, a model of a hundred layers a few seconds.
_ROUNDS = 7
_ROUND_SECONDS = 0.002
_FLOAT_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
}
_UNKNOWN_REASON = "quantize_ has not been called on it"
_NOTE = (
    "float ms and error compare with torch on the dequantized weights, in the dtype of the layer's input: "
    "the error is that of the int8 activations, relative to the norm of the output. "
    "Each layer is measured once, on its first input."
)


@dataclass(frozen=True)
class LayerSummary:
    """One linear layer. Times are medians in milliseconds; None without inputs or where it did not run."""

    name: str
    in_features: int
    out_features: int
    scheme: str  # "float" for a layer that was not quantized
    kernel: str  # "torch" for a layer that was not quantized
    float_bytes: int  # weight and bias as float32, or as they are for a layer that was not quantized
    bytes: int  # in memory: codes, scales and bias, and the packed copy of the codes
    float_ms: float | None
    ms: float | None
    error: float | None  # ||quantized - float|| / ||float|| of the output
    why_float: str


@dataclass(frozen=True)
class Summary:
    """The layers of a model in order, as a table (`str`), JSON or Markdown."""

    layers: tuple[LayerSummary, ...]
    other_bytes: int  # embeddings, norms and whatever else is not a linear layer
    threads: int

    def __str__(self) -> str:
        return self._render(text_table)

    def to_markdown(self) -> str:
        """The table in GitHub Markdown."""
        return self._render(markdown_table)

    def to_json(self) -> str:
        """Every number, unrounded."""
        return json.dumps(asdict(self), indent=1)

    def _render(self, table: Callable[[list[str], list[list[str]]], str]) -> str:
        measured = any(layer.ms is not None for layer in self.layers)
        headers = ["layer", "in -> out", "scheme", "kernel", "float size", "size"]
        headers += ["float ms", "ms", "faster", "error"] if measured else []
        rows = [self._cells(layer, measured) for layer in self.layers]
        if any(layer.why_float for layer in self.layers):
            headers.append("why float")
            rows = [[*row, layer.why_float] for row, layer in zip(rows, self.layers, strict=True)]
        return "\n\n".join([table(headers, rows), self._totals(measured), *([_NOTE] if measured else [])])

    @staticmethod
    def _cells(layer: LayerSummary, measured: bool) -> list[str]:
        cells = [
            layer.name or "(the model)", f"{layer.in_features} -> {layer.out_features}",
            layer.scheme, layer.kernel, mebibytes(layer.float_bytes), mebibytes(layer.bytes),
        ]  # fmt: skip
        if measured:
            faster = f"{layer.float_ms / layer.ms:.2f}x" if layer.ms and layer.float_ms else "-"
            error = "-" if layer.error is None else f"{100 * layer.error:.2f}%"
            cells += [significant(layer.float_ms), significant(layer.ms), faster, error]
        return cells

    def _totals(self, measured: bool) -> str:
        quantized = [layer for layer in self.layers if layer.scheme != "float"]
        before = sum(layer.float_bytes for layer in self.layers) + self.other_bytes
        after = sum(layer.bytes for layer in self.layers) + self.other_bytes
        text = (
            f"{len(quantized)} of {len(self.layers)} linear layers quantized; model {mebibytes(before)} -> "
            f"{mebibytes(after)} ({percent(after / before) if before else '-'}), of which "
            f"{mebibytes(self.other_bytes)} is not in linear layers"
        )
        pairs = [(layer.float_ms, layer.ms) for layer in quantized if layer.ms and layer.float_ms]
        if measured and pairs:
            slow, fast = (sum(column) for column in zip(*pairs, strict=True))
            text += f"; quantized layers {slow:.3f} ms -> {fast:.3f} ms, {self.threads} threads"
        return text + "."


def summary(model: torch.nn.Module, example_inputs: object = None) -> Summary:
    """Per linear layer: shape, scheme, kernel, bytes, why it stayed float; with inputs also times and error.

    example_inputs: what `model` is called with once: a tensor, a tuple or list of positional arguments, or a
    mapping of keyword arguments. The call runs in evaluation mode without gradients; the model is left as it
    was. The error is measured against the dequantized weights, since the original ones are gone. Times are
    those of calling the layer, without hooks. Layers that have not run yet are packed.
    """
    check_module(model, "summary")
    reasons = {entry["name"]: entry["reason"] for entry in getattr(model, "_halfbyte_report", ())}
    targets = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (QLinear, torch.nn.Linear)) or is_linear(module)
    }
    measured: dict[str, tuple[float, float | None, float | None]] = {}
    if example_inputs is not None:
        with _evaluation(model), _hooks(targets, measured), torch.no_grad():
            _call(model, example_inputs)
    layers, counted = [], set()
    for name, module in targets.items():
        own = {key: tensor for key, tensor in _tensors(module).items() if key not in counted}
        packs = {key: size for key, size in packed_bytes(module).items() if key not in counted}
        counted |= own.keys() | packs.keys()
        packed = sum(packs.values())
        layers.append(_layer(name, module, own.values(), packed, measured.get(name), reasons.get(name, "")))
    other = sum(t.nbytes for key, t in _tensors(model).items() if key not in counted)
    return Summary(tuple(layers), other, torch.get_num_threads())


def packed_bytes(model: torch.nn.Module) -> dict[int, int]:
    """Sizes of the packed weights of a model, by pack, since layers may share one; packs what has not run."""
    layers = [m for m in model.modules() if isinstance(m, QLinear) and not m.weight_codes.is_meta]
    return {id(pack): pack.nbytes for pack in [layer._prepare() for layer in layers]}


def _layer(
    name: str,
    module: torch.nn.Module,
    own: Collection[torch.Tensor],
    packed: int,
    times: tuple | None,
    reason: str,
) -> LayerSummary:
    """`own`, `packed`: the tensors of the layer, and bytes of its pack, that no earlier one has."""
    float_ms, ms, error = times or (None, None, None)
    size = sum(tensor.nbytes for tensor in own) + packed
    n, k = shape_of(module)
    if isinstance(module, QLinear):
        float_bytes = sum(4 * t.numel() for t in own if t is module.weight_codes or t is module.bias)
        scheme, kernel, why = str(module.scheme), _core.select(module.scheme.op), ""
    else:
        float_bytes, scheme, kernel, why = size, "float", "torch", reason or _UNKNOWN_REASON
    return LayerSummary(name, k, n, scheme, kernel, float_bytes, size, float_ms, ms, error, why)


def _tensors(module: torch.nn.Module) -> dict[tuple[int, int], torch.Tensor]:
    """Parameters and buffers by the memory that they occupy, so that tied ones count once."""
    return {(t.data_ptr(), t.nbytes): t for t in (*module.parameters(), *module.buffers())}


@contextlib.contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _hooks(targets: dict[str, torch.nn.Module], measured: dict) -> Iterator[None]:
    """Measure each target on its live input, inside the model's forward pass: no input has to be kept."""

    def hook_for(name: str):
        def hook(module, args, kwargs, output):
            if name not in measured:
                handles.pop(name).remove()
                x = args[0] if args else next(iter(kwargs.values()))
                measured[name] = _measure(module, x)

        return hook

    handles = {name: m.register_forward_hook(hook_for(name), with_kwargs=True) for name, m in targets.items()}
    try:
        yield
    finally:
        for handle in handles.values():
            handle.remove()


def _measure(module: torch.nn.Module, x: torch.Tensor) -> tuple[float, float | None, float | None]:
    """(float ms, quantized ms, relative output error); the last two are None for a float layer."""
    if not isinstance(module, QLinear):
        hooked = module._forward_hooks or module._forward_pre_hooks
        call = module.forward if hooked else module
        return _interleaved([lambda: call(x)])[0], None, None
    # Twins, because a call of the layer itself would run the hooks of its user.
    twin = QLinear(module.quantized, module.bias, activation=module.activation)
    twin.static = module.static
    linear = _float_twin(module, x.dtype)
    activation = _FLOAT_ACTIVATIONS[module.activation]

    def in_float() -> torch.Tensor:
        return activation(linear(x))

    exact = in_float().float()
    norm = exact.norm().item()
    difference = (twin(x).float() - exact).norm().item()
    return (*_interleaved([in_float, lambda: twin(x)]), difference / norm if norm else difference)


def _float_twin(module: QLinear, dtype: torch.dtype) -> torch.nn.Linear:
    """The nn.Linear on the dequantized weights."""
    linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(module.quantized.dequantize().to(dtype), requires_grad=False)
    if module.bias is not None:
        linear.bias = torch.nn.Parameter(module.bias.to(dtype), requires_grad=False)
    return linear


def _interleaved(calls: list[Callable[[], object]]) -> list[float]:
    """Median milliseconds of each call over rounds in which they take turns."""
    counts = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        counts.append(max(1, round(_ROUND_SECONDS / max(time.perf_counter() - start, 1e-7))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for call, count, column in zip(calls, counts, samples, strict=True):
            call()  # untimed: refills the caches after the other contestant
            start = time.perf_counter()
            for _ in range(count):
                call()
            column.append((time.perf_counter() - start) / count * 1e3)
    return [statistics.median(column) for column in samples]


def _call(model: torch.nn.Module, inputs: object) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        model(*inputs)
    else:
        model(inputs)
