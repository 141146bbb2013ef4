"""What a small module does with its parts, found by calling its forward on a stand-in for the input.

The forward runs once, on a copy of the module whose children are stand-ins too, which note what they are
called with. Its code may name nothing but children, plain values and the few functions below, so that running
it changes nothing. A branch on what is no plain value ends the attempt, as does every unknown operation.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_PLAIN = (bool, int, float, str, type(None))
_NAMES = {"torch", "nn", "functional", "F", "relu", "gelu", "silu", "add", "mul"}
_GELU_TANH = functools.partial(functional.gelu, approximate="tanh")
_FUNCTIONS = {
    functional.relu: functional.relu,
    functional.gelu: functional.gelu,
    functional.silu: functional.silu,
    torch.relu: functional.relu,
    torch.add: operator.add,
    torch.mul: operator.mul,
}


class Untraceable(Exception):
    """The forward does something that is not known here."""


@dataclass(frozen=True)
class Step:
    """One operation: `call` is the name of a child or a function of values; arguments are numbers of values,
    of which 0 is the input and i + 1 what step i returns.
    """

    call: str | Callable
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """The steps of a forward, of which the last returns the output; and the plain values that it read."""

    steps: list[Step]
    values: dict[str, Any]


def trace(module: nn.Module) -> Trace:
    """What the forward of a module does. Raises Untraceable."""
    names = _check_code(module)
    tape = _Tape()
    children = {name: child and _Child(tape, name) for name, child in module._modules.items()}
    copy = object.__new__(type(module))
    state = vars(module) | {"_modules": children}
    state.pop("forward", None)
    vars(copy).update(state)
    try:
        output = type(module).forward(copy, _Value(tape, 0))
    except Exception as error:  # whatever code does that gets something else than a tensor
        raise Untraceable(str(error)) from None
    if vars(copy).keys() != state.keys() or any(
        vars(copy)[name] is not value for name, value in state.items()
    ):
        raise Untraceable("it changes its attributes")
    if not isinstance(output, _Value) or output.number != len(tape.steps) or not tape.steps:
        raise Untraceable("it returns something else than its last step")
    return Trace(tape.steps, {name: vars(module)[name] for name in names if name in vars(module)})


def _check_code(module: nn.Module) -> tuple[str, ...]:
    """The names in the code of its forward, which are of children, plain values and known functions only."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or forward.__code__.co_freevars:
        raise Untraceable("its forward is no plain function")
    _, *inputs = inspect.signature(forward).parameters.values()
    needed = [p for p in inputs if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(needed) != 1 or needed[0].kind is not needed[0].POSITIONAL_OR_KEYWORD:
        raise Untraceable("it does not take one input")
    code = forward.__code__
    if any(isinstance(constant, CodeType) for constant in code.co_consts):
        raise Untraceable("it has functions inside")
    for name in code.co_names:
        if name in module._modules or name in _NAMES:
            continue
        value = vars(module).get(name, module)
        if not isinstance(value, _PLAIN) and not any(value is function for function in _FUNCTIONS):
            raise Untraceable(f"it uses {name}")
    return code.co_names


class _Tape:
    def __init__(self):
        self.steps: list[Step] = []

    def note(self, call: str | Callable, *arguments: Any) -> _Value:
        if not all(isinstance(argument, _Value) for argument in arguments):
            raise Untraceable("an operand is no result of its parts")
        self.steps.append(Step(call, tuple(argument.number for argument in arguments)))
        return _Value(self, len(self.steps))


class _Child:
    """Stands for a child of the module."""

    def __init__(self, tape: _Tape, name: str):
        self.__tape, self.__name = tape, name

    def __call__(self, x: Any) -> _Value:
        return self.__tape.note(self.__name, x)


class _Value:
    """Stands for a tensor."""

    def __init__(self, tape: _Tape, number: int):
        self.tape, self.number = tape, number

    def __add__(self, other: Any) -> _Value:
        return self.tape.note(operator.add, self, other)

    def __mul__(self, other: Any) -> _Value:
        return self.tape.note(operator.mul, self, other)

    def relu(self) -> _Value:
        return self.tape.note(functional.relu, self)

    add, mul = __add__, __mul__

    def _unknown(self, *_: Any) -> Any:
        raise Untraceable("it branches on values, or changes them in place")

    __bool__ = __iadd__ = __imul__ = __eq__ = _unknown
    __hash__ = None

    @classmethod
    def __torch_function__(
        cls, function: Callable, _: Any, args: tuple = (), kwargs: dict | None = None
    ) -> _Value:
        kwargs = {
            name: value for name, value in (kwargs or {}).items() if (name, value) != ("inplace", False)
        }
        if function is functional.gelu and kwargs == {"approximate": "tanh"}:
            function, kwargs = _GELU_TANH, {}
        else:
            function = _FUNCTIONS.get(function)
        if function is None or kwargs or not isinstance(args[0], cls):
            raise Untraceable("it calls a function that is not known")
        return args[0].tape.note(function, *args)
