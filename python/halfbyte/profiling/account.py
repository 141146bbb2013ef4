"""From the spans of one call to times and work: of layers, phases of fused blocks, and what is between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .. import _core
from ..embedding import OP as EMBEDDING_OP
from ..embedding import QEmbedding
from ..fuse.attach import fused_of
from ..fuse.patterns import FusedPatterns
from ..fuse.stack import FusedStack, StackRun
from ..modules import is_embedding, is_linear, shape_of
from ..packed_layer import PackedLayer
from .record import Span
from .stacks import Part, StackParts, spent
from .work import NOTHING, Work, packed_layers

BETWEEN = "between"  # the op of what a module does besides calling its parts
CALL, MODEL = "(the call)", "(the model)"


class Key(NamedTuple):
    """What a row is about."""

    layer: str
    phase: str  # of a fused block, else ""
    part: Part


@dataclass
class Sum:
    """ns, calls and work that a row has of a call."""

    begin: int  # of the first
    time: float = 0
    idle: float | None = None
    calls: float = 0
    work: Work = NOTHING

    def add(self, time: float, work: Work) -> None:
        self.time += time
        self.calls += 1
        self.work += work

    def __add__(self, other: Sum) -> Sum:
        idle = None if self.idle is None or other.idle is None else self.idle + other.idle
        time, calls, work = self.time + other.time, self.calls + other.calls, self.work + other.work
        return Sum(self.begin, time, idle, calls, work)

    def scaled(self, factor: float) -> Sum:
        """Of so many times as many calls."""
        idle = None if self.idle is None else self.idle * factor
        return Sum(self.begin, self.time * factor, idle, self.calls * factor, self.work.scaled(factor))


class Names:
    """What the modules and stacks of a model are called."""

    def __init__(self, model: nn.Module):
        self._modules = {module: name for name, module in model.named_modules()}
        self._fused = [(name, fused) for module, name in self._modules.items() if (fused := fused_of(module))]
        self._stacks: dict[FusedStack, StackParts] = {}
        self._parts: dict[nn.Module, Part] = {}

    def module(self, module: nn.Module | None) -> str:
        return CALL if module is None else self._modules.get(module, "?") or MODEL

    def stack(self, stack: FusedStack) -> StackParts:
        """Parts of a stack, named after the module that it was built for."""
        if (parts := self._stacks.get(stack)) is None:
            built = ((name, fused._built) for name, fused in self._fused)
            name = next((name for name, b in built if b is not None and b.stack is stack), "")
            parts = self._stacks[stack] = StackParts(stack, name or MODEL, name, self._modules)
        return parts

    def part(self, module: nn.Module) -> Part:
        """What runs where a module is called."""
        if (part := self._parts.get(module)) is None:
            part = self._parts[module] = _part(module)
        return part


class Account:
    """All rows of one recorded call; their times add up to `total`, in ns."""

    def __init__(self, spans: list[Span], names: Names):
        self.spans = spans
        self.sums: dict[Key, Sum] = {}
        for span in spans:
            name = names.module(span.module)
            own = span.end - span.begin - span.inner
            part = names.part(span.module) if is_row(span) else Part(BETWEEN, "", "")
            self._sum(Key(name, "", part), span.begin).add(own, span.work)
            for run in span.runs:
                self._add_run(run, names.stack(run.stack))
        self.total = sum(s.time for s in self.sums.values())

    def _add_run(self, run: StackRun, parts: StackParts) -> None:
        for (block, phase), took in spent(run.events).items():
            key = Key(parts.block(block, phase), phase, parts.part(block, phase))
            found = self._sum(key, took.begin)
            found.add(took.time, parts.work(block, phase, run))
            found.idle = (found.idle or 0) + took.idle

    def _sum(self, key: Key, begin: int) -> Sum:
        found = self.sums.setdefault(key, Sum(begin))
        found.begin = min(found.begin, begin)
        return found


def is_row(span: Span) -> bool:
    """Whether its own time is that of an op."""
    return span.row and span.module is not None


def _part(module: nn.Module) -> Part:
    kind = type(module).__name__
    if isinstance(module, PackedLayer):
        return Part(module.scheme.op, _core.select(module.scheme.op), _shape(module))
    if isinstance(module, QEmbedding):
        return Part(EMBEDDING_OP, _core.select(EMBEDDING_OP), _shape(module))
    if isinstance(fused_of(module), FusedPatterns):
        layers = packed_layers(module)
        ops = list(dict.fromkeys(layer.scheme.op for layer in layers))
        return Part("+".join(ops), ", ".join(map(_core.select, ops)), ", ".join(map(_shape, layers)))
    if is_linear(module) or is_embedding(module):
        return Part(kind, "torch", _shape(module))
    return Part(kind, "torch", "")


def _shape(module: nn.Module) -> str:
    n, k = shape_of(module)
    return f"{n} -> {k}" if hasattr(module, "num_embeddings") else f"{k} -> {n}"
