"""Finds what one call of a quantized layer can take along, in the steps of a forward."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..packed_layer import INPUT_BUFFERS, PackedLayer, held
from .parts import activation_of, any_norm
from .stack import _GLOBAL_HOOKS, _IDENTITY, _LENGTH, CannotFuse, float_vector, hooks_of, obstacle, watched
from .trace import Step

_ACTIVATION, _GATED, _RESIDUAL = "linear + activation", "gated product", "linear + residual"
_NORM = "norm + linear"
_MOST_PRODUCTS = 3  # of one call
# What a pattern is made of, beside the parameters of norms and what layers notice themselves.
_SETTINGS = ("_activation", "approximate", "inplace", "training", "p")
_SETTINGS += ("eps", "variance_epsilon", "normalized_shape")  # of norms
_CHANGE_NOTHING = (nn.Linear, nn.Dropout, nn.Identity, nn.LayerNorm, nn.RMSNorm)


class NormStep:
    """The norm that rows go through before a layer."""

    def __init__(self, module: nn.Module):
        """Raises CannotFuse for what is no norm that the core has."""
        rms, spec, self.size = any_norm(module)
        self.module = module
        parameters, vectors = module._parameters, {"weight": spec.weight, "bias": spec.bias}
        if any(parameters.get(name) is not vector for name, vector in vectors.items()):
            raise CannotFuse(f"a parameter of its {type(module).__name__} is computed")
        self.watched = [watched(parameters, name) for name in vectors]
        self._kept: list[Tensor] = []  # what the addresses are of
        addresses = [float_vector(vector, self._kept) for vector in vectors.values()]
        self.given = (rms, *addresses, spec.eps)  # what LinearPlan.together takes
        self._dtypes = {vector.dtype for vector in vectors.values() if vector is not None}
        if type(module) is nn.RMSNorm and module.eps is None:
            self._dtypes.add(torch.float32)  # for others it means another eps in some versions of torch

    def takes(self, x: Tensor) -> bool:
        """Whether the norm, called, would give the dtype of x."""
        return all(dtype is x.dtype for dtype in self._dtypes)


class Product(NamedTuple):
    """`activation(layer(norm(x))) + residual` or, with a gate, `layer(norm(x)) * activation(gate(norm(x))) +
    residual`, of which the norm, the activation and the residual may be absent.
    """

    layer: PackedLayer
    x: int  # the number of a value, as the result and the residual are
    result: int
    steps: tuple[int, ...]  # whose work it is
    norm: NormStep | None = None
    activation: str = ""  # that follows the layer, or the gate; empty: its own
    gate: PackedLayer | None = None
    residual: int | None = None

    @property
    def bare(self) -> bool:
        """Whether it is the layer alone, which has no activation of its own."""
        return len(self.steps) == 1 and self.layer.activation == "none"

    @property
    def input(self) -> tuple:
        """What layers agree in that quantize in the same way."""
        return self.layer.scheme, self.layer.in_features, self.layer.static


class Found(NamedTuple):
    """steps: of the forward, without dropouts in evaluation. output: the number of what it returns. names:
    the patterns, one for each place. calls: those into the core, of products that have one x and one norm,
    and quantize alike. watched: what they were made of, for Watch. reason: why there are no more, where
    something can be done about it.
    """

    steps: list[Step]
    output: int
    names: list[str]
    calls: list[tuple[Product, ...]]
    watched: list[tuple]
    reason: str


def find(steps: list[Step]) -> Found:
    """The patterns in the steps of a forward, whose calls are modules and functions."""
    modules = dict.fromkeys(step.call for step in steps if isinstance(step.call, nn.Module))
    obstacles: dict[str, list[nn.Module]] = {}
    for module in modules:
        if reason := "there are global module hooks" if any(_GLOBAL_HOOKS) else obstacle(module):
            obstacles.setdefault(reason, []).append(module)
    finder = _Finder(steps, [module for called in obstacles.values() for module in called])
    calls = finder.calls()
    reasons = []
    if obstacles:
        most = _names(_Finder(steps, ()).calls())
        reasons = [why for why, called in obstacles.items() if _names(_Finder(steps, called).calls()) != most]

    norms = dict.fromkeys(product.norm for call in calls for product in call if product.norm is not None)
    entries = [entry for norm in norms for entry in norm.watched]
    for module in modules:
        settings = [name for name in _SETTINGS if name in vars(module)]
        entries += [_entry(vars(module), name) for name in ("forward", *settings)]
        entries += [(hooks, "", None, _LENGTH) for hooks in hooks_of(module)]
    shared = [layer for call in calls for layer in layers_of(call) if len(layers_of(call)) > 1]
    entries += [_entry(held(layer), name) for layer in shared for name in INPUT_BUFFERS]
    return Found(finder.steps, finder.output, _names(calls), calls, entries, "; ".join(reasons))


def layers_of(call: tuple[Product, ...]) -> list[PackedLayer]:
    """Those whose products a call is."""
    return [layer for product in call for layer in (product.layer, product.gate) if layer is not None]


class _Finder:
    """Goes through the steps, and puts what follows a layer, and then what precedes it, into a product.

    seen: modules that have to be called, each where the forward calls it: something would notice.
    """

    def __init__(self, steps: list[Step], seen: Collection[nn.Module]):
        self.steps: list[Step] = []
        self._seen: set[int] = set()  # the numbers of calls of these modules
        numbers = [0]  # that the values have here: a dropout in evaluation gives what it got
        for step in steps:
            arguments = tuple(numbers[i] for i in step.arguments)
            called = any(step.call is module for module in seen)
            if type(step.call) is nn.Dropout and not called:
                numbers.append(arguments[0])
                continue
            self.steps.append(Step(step.call, arguments))
            numbers.append(len(self.steps))
            if called:
                self._seen.add(len(self.steps))
        self.output = numbers[-1]
        self._uses = Counter(number for step in self.steps for number in step.arguments)
        self._uses[self.output] += 1
        self._products: dict[int, Product] = {}  # by their results

    def calls(self) -> list[tuple[Product, ...]]:
        free = [(number, step) for number, step in enumerate(self.steps, 1) if number not in self._seen]
        for number, step in free:
            if isinstance(step.call, PackedLayer):
                self._products[number] = Product(step.call, step.arguments[0], number, (number,))
            else:
                self._extend(number, step)
        for number, step in free:
            self._put_before(number, step)
        calls: list[tuple[Product, ...]] = []
        for product in self._products.values():
            if len(product.steps) == 1:
                continue
            for i, call in enumerate(calls):
                if self._join(call, product):
                    calls[i] = (*call, product)
                    break
            else:
                calls.append((product,))
        return calls

    def _extend(self, number: int, step: Step) -> None:
        """Have the product before a step do it, where it can."""
        if activation := _activation(step.call):
            if (product := self._single(step.arguments[0])) and product.bare:
                self._replace(product, number, activation=activation)
        elif step.call in (operator.mul, operator.add):
            made = [product for i in step.arguments if (product := self._single(i)) is not None]
            # One whose input others need is best left to share its quantization with them.
            for product in sorted(made, key=lambda product: (self._uses[product.x], -product.result)):
                other = step.arguments[step.arguments[0] == product.result]
                if step.call is operator.add:
                    if product.residual is None and self._replace(product, number, residual=other):
                        return
                elif (gate := self._single(other)) and self._gate(product, gate, number):
                    return

    def _gate(self, up: Product, gate: Product, number: int) -> bool:
        alike = up.x == gate.x and up.input == gate.input and up.layer.out_features == gate.layer.out_features
        if not (alike and up.bare and gate.gate is None and gate.residual is None):
            return False
        parts = {"activation": gate.activation, "gate": gate.layer}
        return self._replace(up, number, gate.steps, **parts)

    def _replace(self, product: Product, number: int, others: tuple[int, ...] = (), **parts: Any) -> bool:
        """Have a product do this step and others; False where they must stay in their places."""
        steps = tuple(sorted((*product.steps, *others, number)))
        if not self._movable(steps):
            return False
        for taken in self._products.keys() & set(steps):
            del self._products[taken]
        self._products[number] = product._replace(result=number, steps=steps, **parts)
        return True

    def _put_before(self, number: int, step: Step) -> None:
        """Have the products that take what a norm gives do its work, where nothing else takes it."""
        users = [product for product in self._products.values() if product.x == number]
        if self._uses[number] != sum(1 + (product.gate is not None) for product in users) or not users:
            return
        if not isinstance(step.call, nn.Module):
            return
        try:
            norm = NormStep(step.call)
        except CannotFuse:
            return
        longer = [p._replace(x=step.arguments[0], steps=(number, *p.steps), norm=norm) for p in users]
        if all(p.layer.in_features == norm.size and self._movable(p.steps) for p in longer):
            self._products |= {p.result: p for p in longer}

    def _join(self, call: tuple[Product, ...], product: Product) -> bool:
        """Whether one quantization of a norm's output is for this product, too."""
        every = (*call, product)
        if product.norm is None or any(p.norm is not product.norm or p.residual is not None for p in every):
            return False
        alike = len(every) <= _MOST_PRODUCTS and all(p.input == product.input for p in every)
        return alike and self._movable(tuple(sorted({number for p in every for number in p.steps})))

    def _single(self, number: int) -> Product | None:
        """The product that makes a value which is used once."""
        return self._products.get(number) if self._uses[number] == 1 else None

    def _movable(self, steps: tuple[int, ...]) -> bool:
        """Whether steps can be done at once, before or after what lies between them."""
        return all(i in steps or self._changes_nothing(i) for i in range(steps[0], steps[-1]))

    def _changes_nothing(self, number: int) -> bool:
        """Whether a step is known to leave its arguments as they are, or to have one that is its own."""
        step = self.steps[number - 1]
        if number in self._seen:
            return False
        if not isinstance(step.call, nn.Module) or isinstance(step.call, PackedLayer):
            return True
        if getattr(step.call, "inplace", False):
            (source,) = step.arguments
            made = source > 0 and isinstance(self.steps[source - 1].call, PackedLayer)
            own = made and source not in self._seen and self._uses[source] == 1
            return own and _is_known(step.call)
        return type(step.call) in _CHANGE_NOTHING or _is_known(step.call)


def _names(calls: list[tuple[Product, ...]]) -> list[str]:
    products = [product for call in calls for product in call]
    names = [_NORM] * len({product.norm for product in products} - {None})
    for product in products:
        names += [_ACTIVATION] * bool(product.activation) + [_GATED] * (product.gate is not None)
        names += [_RESIDUAL] * (product.residual is not None)
    return names


def _entry(holder: dict, name: str) -> tuple[dict, str, object, int]:
    """For Watch, of which object it is."""
    return holder, name, holder.get(name), _IDENTITY


def _is_known(module: nn.Module) -> bool:
    """Whether it is an activation or a norm that the core has."""
    for kind in (activation_of, any_norm):
        try:
            kind(module)
        except CannotFuse:
            continue
        return True
    return False


def _activation(call: Callable) -> str:
    """The name of an activation that need not be called; empty for anything else."""
    try:
        name = activation_of(call)
    except CannotFuse:
        return ""
    return "" if name == "none" else name
