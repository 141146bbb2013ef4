"""Patterns among the quantized layers of modules that are no known block: the norm before a layer, and the
activation, the gate's product and the residual sum after it, go into the layer's call.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .. import _core, dispatch
from ..ops import ACTIVATIONS
from ..packed_layer import PackedLayer
from .attach import Fused, argument_names, check_input
from .products import Product, find
from .stack import CannotFuse
from .trace import Step, Untraceable, trace

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
    """The steps of a module's forward, those around a quantized layer in one call."""

    def __init__(self, module: nn.Module):
        self.found: list[str] = []  # the patterns, by name, one for each place
        try:
            traced = trace(module)
        except Untraceable:
            return
        children = dict(module._modules)
        self._steps = [
            Step(children[step.call] if isinstance(step.call, str) else step.call, step.arguments)
            for step in traced.steps
        ]
        found = find(self._steps)
        self.found = found.names
        self._operations = self._in_order(found.calls)
        settings = [(vars(module), name, value, -2) for name, value in traced.values.items()]
        self._watch = _core.Watch(settings + found.watched, found.hooks)

    def unchanged(self) -> bool:
        """Whether the program still does what the forward does."""
        return self._watch.unchanged()

    def __call__(self, x: Tensor) -> Tensor:
        values = {0: x}
        for operation in self._operations:
            if operation.call is None or not operation.call(values):
                for number in operation.steps:
                    if number not in values:
                        step = self._steps[number - 1]
                        values[number] = step.call(*[values[i] for i in step.arguments])
            for i in operation.last:
                values.pop(i, None)  # its memory is free about where the forward would free it
        return values[len(self._steps)]

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
            if number != len(self._steps):
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
    """Products of one x in one call."""

    def __init__(self, products: tuple[Product, ...]):
        self._products = products
        self._x, self._norm = products[0].x, products[0].norm
        self._results = [product.result for product in products]

    def __call__(self, values: dict[int, Tensor]) -> bool:
        """Whether it has put the results into `values`."""
        x, norm = values[self._x], self._norm
        if norm is not None and not norm.takes(x):
            return False
        given = []
        for product in self._products:
            if (one := _given(product, values)) is None:
                return False
            given.append(one)
        threads = dispatch.thread_override or _get_num_threads()
        results = _core.LinearPlan.together(x, tuple(given), norm and norm.given, threads)
        if results is None:
            return False
        values.update(zip(self._results, results, strict=True))
        return True


def _given(product: Product, values: dict[int, Tensor]) -> tuple | None:
    """What LinearPlan.together takes; None before there are plans, which the layers make when called, and
    where an activation of a layer's own stands in the way.
    """
    layer, gate = product.layer, product.gate
    activated = layer if gate is None else gate
    own, code = activated.activation, ACTIVATIONS[product.activation or activated.activation]
    if (product.activation and own != "none") or (gate is not None and layer.activation != "none"):
        return None
    plans = layer._plan, None if gate is None else gate._plan
    if plans[0] is None or (gate is not None and plans[1] is None):
        return None
    residual = None if product.residual is None else values[product.residual]
    return plans[0], code, plans[1], residual
