"""Patterns among the quantized layers of modules that are no known block: the norm before a layer, and the
activation, the gate's product and the residual sum after it, go into the layer's call.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .. import _core, dispatch
from ..errors import HalfbyteError
from ..ops import ACTIVATIONS
from ..packed_layer import PackedLayer
from .attach import Fused, RanUnfused, argument_names, check_input
from .products import Product, find, layers_of
from .stack import _GLOBAL_HOOKS, CannotFuse
from .trace import Step, Untraceable, trace

_NOT_TAKEN = "a weight has just changed, or its input is no plain tensor in memory"
_get_num_threads = torch.get_num_threads


class FusedPatterns(Fused):
    """A module whose forward is a few calls of its children, sums, products and activations."""

    kind = "quantized layers"
    whole = False
    _blocked: _Program | None = None  # of the module as it was when all of its patterns were given up

    @property
    def what(self) -> str:
        found = Counter(_Program(self.module).found)
        return ", ".join(f"{count} {name}" for name, count in found.items())

    def check(self, module: nn.Module) -> None:
        """Nothing: `family` has looked, and what is in the way now may go."""

    def blocks(self, module: nn.Module) -> int:
        return len(_Program(module).found)

    def left(self, module: nn.Module) -> str:
        return _Program(module).reason

    def build(self, module: nn.Module) -> tuple[_Program, None]:
        blocked = self._blocked
        program = blocked if blocked is not None and blocked.is_of(module) else _Program(module)
        if not program.found:
            # Where it cannot tell that what is in the way has gone, as of global hooks, it is made anew.
            self._blocked = program if program.reason and program.unchanged() else None
            what = program.reason or "no quantized layer, or nothing that it could take along"
            raise CannotFuse(f"as it is now there is no pattern: {what}")
        self._blocked = None
        program.pack()
        return program, None

    def run(self, module: nn.Module, program: _Program, extra: None, /, **arguments: Any) -> Tensor:
        if list(arguments) != list(argument_names(type(module))[:1]):
            raise CannotFuse("it got something else than its input alone")
        (x,) = arguments.values()
        check_input(x)
        y, calls = program(x)
        if not calls:
            raise RanUnfused(_NOT_TAKEN, y)
        return y


def family(module: nn.Module) -> type[Fused] | None:
    """FusedPatterns for a module that has something for it, now or without what is in the way."""
    if not any(isinstance(child, PackedLayer) for child in module._modules.values()):
        return None
    program = _Program(module)
    return FusedPatterns if program.found or program.reason else None


class _Program:
    """The steps of a module's forward, those around a quantized layer in one call."""

    def __init__(self, module: nn.Module):
        self.found: list[str] = []  # the patterns, by name, one for each place
        self.reason = ""  # why there are no more
        try:
            traced = trace(module)
        except Untraceable:
            return
        self._children = children = dict(module._modules)
        steps = [
            Step(children[step.call] if isinstance(step.call, str) else step.call, step.arguments)
            for step in traced.steps
        ]
        found = find(steps)
        self.found, self.reason = found.names, found.reason
        self._steps, self._output = found.steps, found.output
        self._layers = [layer for call in found.calls for layer in layers_of(call)]
        self._operations = self._in_order(found.calls)
        settings = [(vars(module), name, value, -2) for name, value in traced.values.items()]
        self._watch = _core.Watch(settings + found.watched, _GLOBAL_HOOKS)

    def pack(self) -> None:
        """What the first call would otherwise have its layers do one by one. Raises CannotFuse."""
        for layer in self._layers:
            try:
                layer._prepare()
            except (HalfbyteError, ValueError) as error:  # of its own call, too, which says whose it is
                raise CannotFuse(str(error)) from None

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is what would be made of a module now."""
        return module._modules == self._children and self.unchanged()

    def unchanged(self) -> bool:
        """Whether the program still does what the forward does."""
        return self._watch.unchanged()

    def __call__(self, x: Tensor) -> tuple[Tensor, int]:
        """What the forward returns, and how many calls into the core took part in it."""
        values, calls = {0: x}, 0
        for operation in self._operations:
            if operation.call is not None and operation.call(values):
                calls += 1
            else:
                for number in operation.steps:
                    if number not in values:
                        step = self._steps[number - 1]
                        values[number] = step.call(*[values[i] for i in step.arguments])
            for i in operation.last:
                values.pop(i, None)  # its memory is free about where the forward would free it
        return values[self._output], calls

    def _in_order(self, calls: list[tuple[Product, ...]]) -> list[_Operation]:
        """Calls, each where the first of its results is made, and the steps that are in none."""
        taken = {number for call in calls for product in call for number in product.steps}
        steps = range(1, len(self._steps) + 1)
        placed = [(number, _Operation([number])) for number in steps if number not in taken]
        for call in calls:
            numbers = sorted({number for product in call for number in product.steps})
            placed.append((min(product.result for product in call), _Operation(numbers, _Call(call))))
        operations = [operation for _, operation in sorted(placed, key=lambda pair: pair[0])]
        last = {}
        for operation in operations:
            for number in operation.steps:
                last |= dict.fromkeys((number, *self._steps[number - 1].arguments), operation)
        for number, operation in last.items():
            if number != self._output:
                operation.last.append(number)
        return operations


class _Operation:
    """Some steps, and the call into the core that does them; without it, or where it will not, they are done
    one by one, as in the forward.
    """

    def __init__(self, steps: list[int], call: _Call | None = None):
        self.steps = steps
        self.call = call
        self.last: list[int] = []  # values that nothing needs after it


class _Call:
    """Products of one x in one call. What the core does not do of it for this x, the norm or the sum, is done
    by torch before it or after it.
    """

    def __init__(self, products: tuple[Product, ...]):
        self._x, self._norm, self._normed = products[0].x, products[0].norm, products[0].steps[0]
        self._residual = products[0].residual  # of a call of several there is none
        self._results = [product.result for product in products]
        self._parts = []
        for product in products:
            activated = product.layer if product.gate is None else product.gate
            code = ACTIVATIONS[product.activation or activated.activation]
            self._parts.append((product.layer, code, product.gate))

    def __call__(self, values: dict[int, Tensor]) -> bool:
        """Whether it has put the results into `values`."""
        x, norm = values[self._x], self._norm
        if norm is None:
            return self._multiply(x, None, values)
        if norm.takes(x) and self._multiply(x, norm.given, values):
            return True
        values[self._normed] = x = norm.module(x).contiguous()
        return self._multiply(x, None, values)

    def _multiply(self, x: Tensor, norm: tuple | None, values: dict[int, Tensor]) -> bool:
        residual = None if self._residual is None else values[self._residual]
        results = self._together(x, norm, residual)
        if results is None and residual is not None:
            results = self._together(x, norm, None)
            results = results and [results[0] + residual]
        if results is None:
            return False
        values.update(zip(self._results, results, strict=True))
        return True

    def _together(self, x: Tensor, norm: tuple | None, residual: Tensor | None) -> list[Tensor] | None:
        given = []
        for layer, code, gate in self._parts:
            plans = layer._plan, None if gate is None else gate._plan
            if plans[0] is None or (gate is not None and plans[1] is None):
                return None  # it was moved, or packed for another device
            given.append((plans[0], code, plans[1], residual))
        threads = dispatch.thread_override or _get_num_threads()
        return _core.LinearPlan.together(x, tuple(given), norm, threads)
