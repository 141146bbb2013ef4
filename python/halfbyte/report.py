"""`summary`: what runs in each layer, how fast and how exactly, and why the others stayed in float."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch.nn import functional

from .arrays import on_gpu
from .embedding import QEmbedding
from .layers import make_layer
from .modules import check_module, is_linear, shape_of
from .pack_inplace import freed_again, freed_bytes, tensors
from .packed_layer import PackedLayer, held
from .sparse.cost import predicted_break_even
from .sparse.linear import SparseLinear
from .tables import markdown_table, mebibytes, percent, significant, text_table
from .timing import caller, evaluation, interleaved

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
    "the error is that of the quantized activations, relative to the norm of the output. "
    "Each layer is measured once, on its first input."
)
_Key = tuple[int, int]  # of a tensor: the memory that it occupies


@dataclass(frozen=True)
class LayerSummary:
    """One linear layer or embedding. Times are medians in milliseconds; None without inputs or where it did
    not run.
    """

    name: str
    in_features: int  # of an embedding: its number of rows
    out_features: int
    scheme: str  # "float" for a layer that was not quantized
    kernel: str  # "torch" for a layer that was not quantized
    float_bytes: int  # weight and bias as they were; what an earlier layer shares counts there only
    bytes: int  # in memory: codes unless pack_ freed them, scales, bias, the packed copy; the same
    float_ms: float | None
    ms: float | None
    error: float | None  # ||quantized - float|| / ||float|| of the output
    why_float: str
    tied_to: str  # the earlier layer that has the same weight
    embedding: bool
    density: float | None  # of a sparse layer, the share of its weight that is stored
    break_even: float | None  # and 1 - density from which on its kernel is predicted to beat the dense one
    why_torch: str = ""  # of a layer on a GPU that torch computes


@dataclass(frozen=True)
class Summary:
    """The layers of a model in order, as a table (`str`), JSON or Markdown."""

    layers: tuple[LayerSummary, ...]
    other_bytes: int  # norms and whatever else is not among the layers
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
        sparse = any(layer.density is not None for layer in self.layers)
        headers = ["layer", "in -> out", "scheme", "kernel", "float size", "size"]
        headers += ["density", "break-even sparsity"] if sparse else []
        headers += ["float ms", "ms", "faster", "error"] if measured else []
        rows = [self._cells(layer, sparse, measured) for layer in self.layers]
        for header, field in (("tied to", "tied_to"), ("why torch", "why_torch"), ("why float", "why_float")):
            if any(column := [getattr(layer, field) for layer in self.layers]):
                headers.append(header)
                rows = [[*row, cell] for row, cell in zip(rows, column, strict=True)]
        return "\n\n".join([table(headers, rows), self._totals(measured), *([_NOTE] if measured else [])])

    @staticmethod
    def _cells(layer: LayerSummary, sparse: bool, measured: bool) -> list[str]:
        cells = [
            layer.name or "(the model)", f"{layer.in_features} -> {layer.out_features}",
            layer.scheme, layer.kernel, mebibytes(layer.float_bytes), mebibytes(layer.bytes),
        ]  # fmt: skip
        if sparse:
            cells += ["-" if x is None else percent(x) for x in (layer.density, layer.break_even)]
        if measured:
            faster = f"{layer.float_ms / layer.ms:.2f}x" if layer.ms and layer.float_ms else "-"
            error = "-" if layer.error is None else f"{100 * layer.error:.2f}%"
            cells += [significant(layer.float_ms), significant(layer.ms), faster, error]
        return cells

    def _totals(self, measured: bool) -> str:
        quantized = [layer for layer in self.layers if layer.scheme != "float"]
        before = sum(layer.float_bytes for layer in self.layers) + self.other_bytes
        after = sum(layer.bytes for layer in self.layers) + self.other_bytes
        embeddings = [layer for layer in self.layers if layer.embedding]
        done, kinds = sum(layer.embedding for layer in quantized), "linear layers"
        text = f"{len(quantized) - done} of {len(self.layers) - len(embeddings)} linear layers"
        if embeddings:
            text += f" and {done} of {len(embeddings)} embeddings"
            kinds += " and embeddings"
        sparse = any(layer.density is not None for layer in quantized)
        done_to = "quantized or sparse" if sparse else "quantized"
        text += (
            f" {done_to}; model {mebibytes(before)} -> {mebibytes(after)} "
            f"({percent(after / before) if before else '-'}), of which "
            f"{mebibytes(self.other_bytes)} is not in {kinds}"
        )
        pairs = [(layer.float_ms, layer.ms) for layer in quantized if layer.ms and layer.float_ms]
        if measured and pairs:
            slow, fast = (sum(column) for column in zip(*pairs, strict=True))
            text += f"; {done_to} layers {slow:.3f} ms -> {fast:.3f} ms, {self.threads} threads"
        return text + "."


def summary(model: torch.nn.Module, example_inputs: object = None) -> Summary:
    """Per layer: shape, scheme, kernel, bytes, why it stayed float; with inputs also times and error.

    Layers: the linear ones, and the embeddings that quantize_ looked at. Of a layer on a GPU the kernel is
    what runs for inputs of its `float_dtype`; where torch computes there, it says why. Sparse ones have their
    density and the sparsity from which on their kernel is predicted to be faster than the dense one.
    example_inputs: what `model` is called with once: a tensor, a tuple or list of positional arguments, or a
    mapping of keywords.
    The call runs in evaluation mode without gradients; the model is left as it was. The error is measured
    against the dequantized weights, since the original ones are gone. Times are those of calling the layer,
    without hooks. Layers that have not run yet are packed.
    """
    check_module(model, "summary")
    report = {row["name"]: row for row in getattr(model, "_halfbyte_report", ())}
    targets = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (PackedLayer, QEmbedding, torch.nn.Linear))
        or is_linear(module)
        or (isinstance(module, torch.nn.Embedding) and name in report)
    }
    measured: dict[str, tuple[float, float | None, float | None]] = {}
    if example_inputs is not None:
        with freed_again(model), evaluation(model), _hooks(targets, measured), torch.no_grad():
            caller(model, example_inputs)()
    layers: list[LayerSummary] = []
    counted: dict[_Key, str] = {}  # the tensors of the layers so far, and whose they are
    packs: dict[int, int] = {}
    for name, module in targets.items():
        own = {key: tensor for key, tensor in _tensors(module).items() if key not in counted}
        new_packs = {key: size for key, size in packed_bytes(module).items() if key not in packs}
        row = _layer(name, module, report.get(name, {}), own, counted, measured.get(name))
        layers.append(replace(row, bytes=row.bytes + sum(new_packs.values())))
        counted |= dict.fromkeys(own, name)
        packs |= new_packs
    other = sum(t.nbytes for key, t in _tensors(model).items() if key not in counted)
    return Summary(tuple(layers), other, torch.get_num_threads())


def packed_bytes(model: torch.nn.Module) -> dict[int, int]:
    """Sizes of the packed weights of a model, by pack, since layers may share one; packs what has not run."""
    layers = [m for m in model.modules() if isinstance(m, PackedLayer) and m.device.type != "meta"]
    return {id(pack): pack.nbytes for pack in [layer._prepare() for layer in layers]}


def _layer(
    name: str,
    module: torch.nn.Module,
    row: dict,
    own: dict[_Key, torch.Tensor],
    counted: dict[_Key, str],
    times: tuple | None,
) -> LayerSummary:
    """The layer without its pack. row: of the report; own: its tensors that none of `counted` is."""
    float_ms, ms, error = times or (None, None, None)
    size = sum(tensor.nbytes for tensor in own.values())
    n, k = shape_of(module)
    embedding = isinstance(module, (QEmbedding, torch.nn.Embedding))
    if isinstance(module, (PackedLayer, QEmbedding)):
        weight = held(module)["weight_values" if isinstance(module, SparseLinear) else "weight_codes"]
        size -= freed_bytes(module) if _key(weight) in own else 0
        elements = 0 if row.get("tied_to") or _key(weight) not in own else n * k
        if isinstance(module, PackedLayer) and module.bias is not None and _key(module.bias) in own:
            elements += n
        float_bytes = elements * module.float_dtype.itemsize
        scheme, why, (kernel, why_torch) = str(module.scheme), "", module._kernels()
    else:
        weight, why_torch = module.weight, ""
        float_bytes, scheme, kernel, why = size, "float", "torch", row.get("reason") or _UNKNOWN_REASON
    density, break_even = None, None
    if isinstance(module, SparseLinear):
        density = module.density
        break_even = None if on_gpu(weight) else predicted_break_even(module.scheme)
    return LayerSummary(
        name, *((n, k) if embedding else (k, n)), scheme, kernel, float_bytes, size, float_ms, ms, error, why,
        counted.get(_key(weight), ""), embedding, density, break_even, why_torch,
    )  # fmt: skip


def _key(tensor: torch.Tensor) -> _Key:
    return tensor.data_ptr() or id(tensor), tensor.nbytes  # one without memory is itself


def _tensors(module: torch.nn.Module) -> dict[_Key, torch.Tensor]:
    """Parameters and buffers by the memory that they occupy, so that tied ones count once."""
    return {_key(t): t for t in tensors(module)}


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
    if isinstance(module, QEmbedding):
        return _measure_embedding(module, x)
    if not isinstance(module, PackedLayer):
        hooked = module._forward_hooks or module._forward_pre_hooks
        call = module.forward if hooked else module
        return interleaved([lambda: call(x)], x.device)[0], None, None
    # Twins, because a call of the layer itself would run the hooks of its user.
    twin = make_layer(module.packable, module.bias, activation=module.activation)
    twin.static = module.static
    linear = _float_twin(module, x.dtype)
    activation = _FLOAT_ACTIVATIONS[module.activation]

    def in_float() -> torch.Tensor:
        return activation(linear(x))

    return _compare(in_float, lambda: twin(x))


def _measure_embedding(module: QEmbedding, ids: torch.Tensor) -> tuple[float, float, float]:
    twin = QEmbedding(module.quantized, float_dtype=module.float_dtype)
    table = module.quantized.dequantize().to(module.float_dtype)
    return _compare(lambda: functional.embedding(ids, table), lambda: twin(ids))


def _compare(
    in_float: Callable[[], torch.Tensor], quantized: Callable[[], torch.Tensor]
) -> tuple[float, float, float]:
    """(float ms, quantized ms, relative difference of what they return)."""
    exact = in_float().float()
    norm = exact.norm().item()
    difference = (quantized().float() - exact).norm().item()
    return (*interleaved([in_float, quantized], exact.device), difference / norm if norm else difference)


def _float_twin(module: PackedLayer, dtype: torch.dtype) -> torch.nn.Linear:
    """The nn.Linear on the dequantized weights."""
    linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(module.dequantize().to(dtype), requires_grad=False)
    if module.bias is not None:
        linear.bias = torch.nn.Parameter(module.bias.to(dtype), requires_grad=False)
    return linear
