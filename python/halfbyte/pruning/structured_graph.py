"""Units of any module that torch.fx can trace: layers that make them, and the one layer that uses them.

A module is traced on a copy that shares its tensors, in evaluation and in training mode, its optional
arguments at their defaults. Where a module cannot be traced, the ones within it are.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ..extras import quiet
from ..modules import is_linear, join
from .structured_families import is_known
from .structured_units import (
    CONVOLUTIONS,
    NORMS,
    TRANSPOSED,
    CannotPrune,
    Group,
    is_convolution,
    is_elementwise,
    is_layer,
    outputs_of,
)

_SINGLE = "relu relu_ sigmoid sigmoid_ tanh tanh_ clamp clamp_ clone contiguous float half bfloat16 double"
_METHODS = {*_SINGLE.split(), "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"}
_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub}
_ARITHMETIC |= {operator.imul, operator.itruediv, torch.add, torch.sub, torch.mul, torch.div}
# What treats every channel alike and by itself, in so many dimensions.
_POOLS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")
_SPATIAL = {getattr(functional, f"{pool}{n}d"): n for pool in _POOLS for n in (1, 2, 3)}
_SPATIAL |= {functional.lp_pool1d: 1, functional.lp_pool2d: 2, torch.max_pool1d: 1, torch.max_pool2d: 2}
_SPATIAL |= {torch.max_pool3d: 3, torch.avg_pool1d: 1}
_SPATIAL_MODULES = (
    "AdaptiveAvgPool", "AdaptiveMaxPool", "AvgPool", "CircularPad", "ConstantPad", "LPPool", "MaxPool",
    "ReflectionPad", "ReplicationPad", "ZeroPad",
)  # fmt: skip


def traced(model: nn.Module, pattern: str, done: set[nn.Module]) -> tuple[list[Group], dict[str, str]]:
    """The units in `model` outside of the modules `done`, and why layers that could make some have none."""
    groups: list[Group] = []
    reasons: dict[str, str] = {}
    stack = [("", model, "the model consists of it")]
    done = set(done)
    while stack:
        name, module, caller = stack.pop()
        if module in done:
            continue
        done.add(module)
        if is_layer(module, pattern):
            reasons.setdefault(name, caller)
        if sum(is_linear(m) or is_convolution(m) for m in module.modules()) < 2:
            inside = _children(name, module)
        elif isinstance(graph := _analyzed(module, name, pattern), str):
            inside = _children(name, module)
            if type(module).forward is not nn.Module.forward:  # not so an nn.ModuleList
                caller = f"torch.fx cannot trace the {type(module).__name__} that calls it: {graph}"
        else:
            groups += graph.groups
            reasons |= graph.reasons
            inside = [(join(name, target), module.get_submodule(target)) for target in graph.opaque]
            caller = "a hook or an unusual module stands around it"
        stack += [(inner, child, caller) for inner, child in reversed(list(inside))]
    return groups, reasons


def _children(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((join(name, attribute), child) for attribute, child in module.named_children())


def _analyzed(module: nn.Module, name: str, pattern: str) -> _Graph | str:
    """What both modes of a module agree on, or why it cannot be traced."""
    if _is_closed(module):
        return "it is a module of torch"
    graphs = []
    for training in (False, True):
        try:
            graphs.append(_Graph(module, name, pattern, _trace(module, training)))
        except Exception as error:  # whatever code does that gets something else than a tensor
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return lines[0][:100]
    found, other = graphs
    agreed = {tuple(group.layers()) for group in other.groups}
    for group in found.groups:
        if tuple(group.layers()) not in agreed:
            group.reason = "it is used in another way in training mode"
    return found


def _is_closed(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that none is changed while its module is traced

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        hooked = any(value for key, value in vars(module).items() if key.endswith("_hooks"))
        known = is_known(module) or is_linear(module) or is_elementwise(module)
        return known or hooked or "forward" in vars(module) or super().is_leaf_module(module, name)


def _trace(module: nn.Module, training: bool) -> fx.Graph:
    held = (vars(part) | part._parameters | part._buffers for part in module.modules())
    shared = {id(value): value for values in held for value in values.values() if isinstance(value, Tensor)}
    twin = copy.deepcopy(module, shared).train(training)
    vars(twin).pop("forward", None)
    parameters = inspect.signature(type(twin).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    with quiet():
        graph = _Tracer().trace(twin, defaults)
    if any(isinstance(value, fx.Proxy) for m in twin.modules() for value in vars(m).values()):
        raise CannotPrune("its forward keeps values in attributes")
    return graph


@dataclass
class _Stream:
    """A value that carries units, from the layers that make them on."""

    units: int
    makers: list[str]  # targets of the graph
    between: list[str]
    layout: str  # "last": in the last dimension; "channels": in the second one; "flat": in blocks, flattened
    dims: int  # behind the channels

    def merged(self, other: _Stream) -> _Stream:
        """Of two values that are combined element by element."""
        if self is other:
            return self
        if (self.units, self.layout, self.dims) != (other.units, other.layout, other.dims):
            raise CannotPrune("it meets units of another layer that has a different number of them")
        makers = [*self.makers, *(m for m in other.makers if m not in self.makers)]
        between = [*self.between, *(m for m in other.between if m not in self.between)]
        return _Stream(self.units, makers, between, self.layout, self.dims)


class _Graph:
    """The units in a traced module."""

    def __init__(self, module: nn.Module, name: str, pattern: str, graph: fx.Graph):
        self.module, self.name, self.pattern = module, name, pattern
        self.groups: list[Group] = []
        self.reasons: dict[str, str] = {}
        self.opaque: list[str] = []
        self._streams: dict[fx.Node, _Stream] = {}
        calls = [node for node in graph.nodes if node.op == "call_module"]
        self._calls = Counter(self._module(node) for node in calls)
        self._read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
        for node in graph.nodes:
            self._visit(node)
        for target in dict.fromkeys(node.target for node in calls):
            called = module.get_submodule(target)
            if any(called.children()):
                self.opaque.append(target)

    def _visit(self, node: fx.Node) -> None:
        inputs = [self._streams[n] for n in node.all_input_nodes if n in self._streams]
        if inputs and not _is_query(node):
            try:
                self._advance(node, inputs)
            except CannotPrune as reason:
                self._end(inputs, str(reason))
        if node.op == "call_module" and is_layer(layer := self._module(node), self.pattern):
            if is_linear(layer):
                self._streams[node] = _Stream(outputs_of(layer), [node.target], [], "last", 0)
            elif layer.groups == 1:
                self._streams[node] = _Stream(outputs_of(layer), [node.target], [], "channels", _dims(layer))
            else:
                self.reasons[join(self.name, node.target)] = f"its channels are in {layer.groups} groups"
        if (stream := self._streams.get(node)) is not None:
            users = [user for user in node.users if not _is_query(user)]
            if len(users) != 1:
                names = ", ".join(user.name for user in users)
                self._end(
                    [stream],
                    f"{len(users)} operations use its output: {names}" if users else "it is not used",
                )
                del self._streams[node]

    def _advance(self, node: fx.Node, inputs: list[_Stream]) -> None:
        """What becomes of units that go into an operation."""
        stream = inputs[0]
        for other in inputs[1:]:
            if not _is_elementwise(node):
                raise CannotPrune(f"it goes into {node.name} together with other units")
            stream = stream.merged(other)
        if node.op == "output":
            where = f"the {type(self.module).__name__} {self.name}" if self.name else "the model"
            raise CannotPrune(f"its output is that of {where}")
        if node.op == "call_module":
            layer = self._module(node)
            if is_linear(layer) or (is_convolution(layer) and layer.groups == 1):
                self._close(stream, node, layer)
                return
            stream = _through(stream, node.target, layer)
        elif _is_elementwise(node):
            for other in node.all_input_nodes:
                if other not in self._streams:
                    raise CannotPrune(f"{node.name} combines it with something else ({other.name})")
        elif node.target in _SPATIAL and stream.layout == "channels" and _SPATIAL[node.target] == stream.dims:
            pass
        elif _flattens(node):
            stream = _flat(stream)
        else:
            raise CannotPrune(f"its output goes into {node.name}, which is not known to keep units apart")
        self._streams[node] = stream

    def _close(self, stream: _Stream, node: fx.Node, layer: nn.Module) -> None:
        fits = stream.layout != "channels" if is_linear(layer) else stream.layout == "channels"
        if not fits or (not is_linear(layer) and _dims(layer) != stream.dims):
            raise CannotPrune(f"its output goes into {node.target} along another dimension")
        group = Group(join(self.name, stream.makers[0]), stream.units)
        for target in stream.makers:
            group.add_maker(join(self.name, target), self._once(target))
        for target in stream.between:
            between = self._once(target)
            depthwise = is_convolution(between)
            sizes = ("out_channels", "in_channels", "groups") if depthwise else (_size(between),)
            group.add_between(join(self.name, target), between, getattr(between, sizes[0]), sizes)
        group.set_user(join(self.name, node.target), self._once(node.target))
        self.groups.append(group)

    def _once(self, target: str) -> nn.Module:
        """The module of that name, which must be called once, its parameters used by nothing else."""
        module = self.module.get_submodule(target)
        if self._calls[module] > 1:
            raise CannotPrune(f"{join(self.name, target)} is called {self._calls[module]} times")
        if target in self._read:
            raise CannotPrune(f"the parameters of {join(self.name, target)} are used without calling it")
        return module

    def _end(self, streams: list[_Stream], reason: str) -> None:
        for stream in streams:
            self.reasons |= dict.fromkeys([join(self.name, target) for target in stream.makers], reason)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(node.target)


def _through(stream: _Stream, target: str, module: nn.Module) -> _Stream:
    """The units behind a module that makes no new ones."""
    cls, between = type(module), [*stream.between, target]
    spatial = stream.layout == "channels"
    if any(value for name, value in vars(module).items() if name.endswith("_hooks")):
        raise CannotPrune(f"its output goes into {target}, which has hooks")
    if is_elementwise(module):
        return stream
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return _flat(stream)
    if (cls in NORMS and (NORMS[cls] or stream.dims) == stream.dims) if spatial else cls is nn.BatchNorm1d:
        count = module.num_features
        if count == stream.units or (stream.layout == "flat" and count % stream.units == 0):
            return _Stream(stream.units, stream.makers, between, stream.layout, stream.dims)
    if spatial and is_convolution(module) and _dims(module) == stream.dims:
        if module.groups == module.in_channels == module.out_channels == stream.units:
            return _Stream(stream.units, stream.makers, between, stream.layout, stream.dims)
    if spatial and cls is nn.PReLU and module.num_parameters == stream.units:
        return _Stream(stream.units, stream.makers, between, stream.layout, stream.dims)
    if (
        spatial
        and cls.__module__.startswith("torch.nn")
        and cls.__name__.removesuffix(f"{stream.dims}d") in _SPATIAL_MODULES
    ):
        return stream
    raise CannotPrune(f"its output goes into a {cls.__name__}, which is not known to keep units apart")


def _flat(stream: _Stream) -> _Stream:
    if stream.layout == "last":
        raise CannotPrune("its output is flattened together with other dimensions")
    return _Stream(stream.units, stream.makers, stream.between, "flat", 0)


def _dims(convolution: nn.Module) -> int:
    kinds = CONVOLUTIONS if type(convolution) in CONVOLUTIONS else TRANSPOSED
    return 1 + kinds.index(type(convolution))


def _size(module: nn.Module) -> str:
    return "num_parameters" if isinstance(module, nn.PReLU) else "num_features"


def _is_elementwise(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op == "call_function" and (node.target in _ARITHMETIC or is_elementwise(node.target))


def _is_query(node: fx.Node) -> bool:
    """Whether a node asks for the size of the batch only."""
    shape = node.op == "call_function" and node.target is getattr and node.args[1:] == ("shape",)
    if shape or (node.op == "call_method" and node.target == "size" and len(node.args) == 1):
        asked = [user for user in node.users if user.users or user.target is not operator.getitem]
        return all(user.target is operator.getitem and user.args[1:] == (0,) for user in asked)
    return node.op == "call_method" and node.target == "size" and node.args[1:] == (0,)


def _flattens(node: fx.Node) -> bool:
    """Whether it flattens all but the first dimension."""
    if node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
        start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
        end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
        return (start, end) == (1, -1)
    if node.op != "call_method" or node.target not in ("view", "reshape"):
        return False
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    batch = sizes[0] if len(sizes) == 2 and sizes[1] == -1 else None
    if not isinstance(batch, fx.Node):
        return False
    source = batch.args[0] if batch.target is operator.getitem else batch
    return isinstance(source, fx.Node) and _is_query(source)
