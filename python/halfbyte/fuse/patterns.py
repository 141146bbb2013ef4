"""Patterns among the quantized layers of modules that are no known block: activations go into the call of the
layer before them; residual sums and gates are applied in place to what a layer gives.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _core, dispatch
from ..ops import ACTIVATIONS
from ..packed_layer import PackedLayer
from .attach import Fused, argument_names, check_input
from .parts import activation_of
from .stack import _GLOBAL_HOOKS, _HOOKS, CannotFuse
from .trace import Step, Untraceable, trace

_ACTIVATION, _GATED, _RESIDUAL = "linear + activation", "gated product", "linear + residual"
_get_num_threads = torch.get_num_threads


class FusedPatterns(Fused):
    """A module whose forward is a few calls of its children, sums, products and activations."""

    kind = "quantized layers"
    whole = False

    @property
    def what(self) -> str:
        found = Counter(_Program(self.module).found)
        return ", ".join(f"{count} {name}" for name, count in found.items())

    def check(self, module: nn.Module) -> None:
        self.build(module)

    def blocks(self, module: nn.Module) -> int:
        return len(_Program(module).found)

    def build(self, module: nn.Module) -> tuple[_Program, None]:
        program = _Program(module)
        if not program.found:
            raise CannotFuse("as it is now there is no pattern: no quantized layer, or a hook")
        return program, None

    def run(self, module: nn.Module, program: _Program, extra: None, /, **arguments: Any) -> Tensor:
        if list(arguments) != list(argument_names(type(module))[:1]):
            raise CannotFuse("it got something else than its input alone")
        (x,) = arguments.values()
        check_input(x)
        return program(x)


def family(module: nn.Module) -> type[Fused] | None:
    """FusedPatterns for a module that has something for it."""
    if not any(isinstance(child, PackedLayer) for child in module._modules.values()):
        return None
    return FusedPatterns if _Program(module).found else None


class _Program:
    """The steps of a module's forward, with what follows a quantized layer taken into its call."""

    def __init__(self, module: nn.Module):
        self.found: list[str] = []  # the patterns, by name, one for each place
        try:
            traced = trace(module)
        except Untraceable:
            return
        self._children = dict(module._modules)
        self._uses = Counter(i for step in traced.steps for i in step.arguments)
        self._skipped: list[nn.Module] = []  # activations that are not called
        self._operations: list[_Operation] = []
        for number, step in enumerate(traced.steps, 1):
            self._operations.append(self._operation(number, step))
        self._operations = [operation for operation in self._operations if operation.call is not None]
        self._last = {i: operation.result for operation in self._operations for i in operation.arguments}
        watched = [(vars(module), name, value, -2) for name, value in traced.values.items()]
        for skipped in self._skipped:
            watched += [
                (vars(skipped), name, vars(skipped).get(name), -2) for name in ("forward", "approximate")
            ]
        self._watch = _core.Watch(watched, [*_GLOBAL_HOOKS, *(h for m in self._skipped for h in _hooks(m))])

    def unchanged(self) -> bool:
        """Whether the program still does what the forward does."""
        return self._watch.unchanged()

    def __call__(self, x: Tensor) -> Tensor:
        values = {0: x}
        for call, arguments, result, _ in self._operations:
            values[result] = call(*[values[i] for i in arguments])
            for i in arguments:
                if self._last[i] == result:
                    values.pop(i, None)  # its memory is free where the forward would free it
        return values[result]

    def _operation(self, number: int, step: Step) -> _Operation:
        call = self._children[step.call] if isinstance(step.call, str) else step.call
        plain = _Operation(call, step.arguments, number, call if isinstance(call, PackedLayer) else None)
        if (name := _activation(call)) and (before := self._single(step.arguments[0])) and before.linear:
            self._take(before, _ACTIVATION)
            if isinstance(call, nn.Module):
                self._skipped.append(call)
            return _Operation(_WithActivation(before.linear, name, call), before.arguments, number)
        if call is operator.mul:
            # The gate's product is ours alone: nothing else sees it change.
            for here, other in (step.arguments, step.arguments[::-1]):
                if (before := self._single(here)) and isinstance(before.call, _WithActivation):
                    self.found.append(_GATED)
                    return _Operation(_multiply, (here, other), number)
        if call is operator.add:
            for here, other in (step.arguments, step.arguments[::-1]):
                if (before := self._single(here)) and before.linear:
                    self._take(before, _RESIDUAL)
                    return _Operation(_WithResidual(before.linear), (*before.arguments, other), number)
        return plain

    def _single(self, number: int) -> _Operation | None:
        """The operation that makes a value which is used once."""
        return self._operations[number - 1] if number and self._uses[number] == 1 else None

    def _take(self, operation: _Operation, pattern: str) -> None:
        """The next operation does the work of this one."""
        self._operations[operation.result - 1] = operation._replace(call=None)
        self.found.append(pattern)


class _Operation(NamedTuple):
    """One call; arguments and result are numbers of values."""

    call: Callable | None
    arguments: tuple[int, ...]
    result: int
    linear: PackedLayer | None = None  # that `call` is


class _WithActivation:
    """A layer and the activation that follows it."""

    def __init__(self, linear: PackedLayer, name: str, activation: Callable):
        self._linear, self._code, self._activation = linear, ACTIVATIONS[name], activation

    def __call__(self, x: Tensor) -> Tensor:
        linear = self._linear
        if (plan := linear._plan) is not None and linear.activation == "none":
            y = plan(x, self._code, dispatch.thread_override or _get_num_threads(), False)
            if y is not None:
                return y
        return self._activation(linear(x))  # makes the plan for the next time, where there can be one


class _WithResidual:
    """A layer and the sum that follows it."""

    def __init__(self, linear: PackedLayer):
        self._linear = linear

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        linear = self._linear
        if (plan := linear._plan) is not None:
            y = plan(x, ACTIVATIONS[linear.activation], dispatch.thread_override or _get_num_threads(), False)
            if y is not None:  # and nobody else has it
                same = y.dtype == residual.dtype and y.shape == residual.shape
                return y.add_(residual) if same else y + residual
        return linear(x) + residual


def _multiply(gate: Tensor, up: Tensor) -> Tensor:
    return gate.mul_(up) if gate.dtype == up.dtype and gate.shape == up.shape else gate * up


def _activation(call: Callable) -> str:
    """The name of an activation that need not be called; empty for anything else."""
    if isinstance(call, PackedLayer) or (isinstance(call, nn.Module) and _is_seen(call)):
        return ""
    try:
        name = activation_of(call)
    except CannotFuse:
        return ""
    return "" if name == "none" else name


def _hooks(module: nn.Module) -> list[dict]:
    return [getattr(module, name) for name in _HOOKS]


def _is_seen(module: nn.Module) -> bool:
    """Whether something would notice that a module is not called."""
    return "forward" in vars(module) or any(_hooks(module)) or any(_GLOBAL_HOOKS)
