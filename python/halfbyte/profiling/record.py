"""Spans of one call of a model: its modules through forward hooks, fused stacks through their recorder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import nn

from ..embedding import QEmbedding
from ..fuse.attach import Fused, fused_of
from ..fuse.patterns import FusedPatterns
from ..fuse.stack import StackRun, recording
from ..packed_layer import PackedLayer
from .work import NOTHING, Counter, Work, counter_of, patterns_counter

_clock = time.perf_counter_ns  # CLOCK_MONOTONIC, as std::chrono::steady_clock, which times the stacks


@dataclass(slots=True)
class Span:
    """One call of a module, in ns; what recording it took lies between enter and begin, and end and after."""

    module: nn.Module | None  # None: the call as a whole
    parent: Span | None
    enter: int
    begin: int = 0
    end: int = 0
    after: int = 0
    work: Work = NOTHING
    inner: int = 0  # ns of the spans in it, with what recording them took
    runs: list[StackRun] = field(default_factory=list)
    row: bool = True  # whether its own time is that of an op; else between its parts
    whole: bool = False  # whether that is so whatever else is in it

    def add(self, inner: int) -> None:
        """Something in it that took so long."""
        self.inner += inner
        self.row = self.whole


class Recorder:
    """Records calls of a model on the thread that makes it."""

    def __init__(self, model: nn.Module, unfused: set[Fused], alone: bool = False):
        """unfused: those that do not run now, so that their parts are worth looking at. alone: the model gets
        no hook itself, only its parts.
        """
        self._hooked: list[nn.Module] = []
        self._timed: list[
            tuple[nn.Module, object, str]
        ] = []  # modules without hooks: a method that runs instead
        self._patterns: set[nn.Module] = set()
        self._choose(model, unfused)
        if alone and model._modules and model in self._hooked:
            self._hooked.remove(model)
        self._counters: dict[nn.Module, Counter] = {}
        self._thread = get_ident()
        self._open: list[Span] = []
        self._spans: list[Span] = []

    def _choose(self, model: nn.Module, unfused: set[Fused]) -> None:
        """Where to look: everywhere but inside of what would then run differently."""
        seen: set[nn.Module] = set()
        kept_out: set[nn.Module] = set()  # what stacks watch, hooks among it
        stack = [model]
        while stack:
            module = stack.pop()
            if module in seen:
                continue
            seen.add(module)
            children = [child for child in module._modules.values() if child is not None]
            fused = fused_of(module)
            if fused is not None and fused not in unfused:
                self._timed.append((module, fused, "run"))
                if isinstance(fused, FusedPatterns):
                    # Its layers, and what follows them, would run one by one.
                    self._patterns.add(module)
                    children = [child for child in children if child._modules]
                elif (built := fused._built) is not None:
                    kept_out.update(built.stack.spec.modules)
            elif module not in kept_out:
                if _takes_short_way(module):
                    self._timed.append((module, module, "forward"))
                    continue
                if _is_closed(module):
                    continue
                self._hooked.append(module)
                if hasattr(module, "_orig_mod"):  # that torch.compile compiles
                    continue
            stack += reversed(children)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block calls are recorded."""
        with ExitStack() as stack:
            for module, owner, method in self._timed:
                stack.enter_context(_timed(self, module, owner, method))
            for module in self._hooked:
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                hook = module.register_forward_hook(self._leave, prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(recording(self._ran))
            yield

    def call(self, function: Callable[[], object]) -> list[Span]:
        """Call it. Returns the span of that, and those of all modules in the order in which they ended."""
        root = Span(None, None, _clock())
        self._open, self._spans = [root], [root]
        root.begin = _clock()
        try:
            function()
            root.end = root.after = _clock()
            self._drop_above(root)
            return self._spans
        finally:
            self._open = []

    def _enter(self, module: nn.Module, _: object) -> None:
        enter = _clock()
        if get_ident() == self._thread and self._open:
            self._open.append(span := Span(module, self._open[-1], enter, whole=module in self._patterns))
            span.begin = _clock()

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        end = _clock()
        if (span := self._span_of(module)) is None:
            return
        self._drop_above(span)
        self._open.pop()
        span.end = end
        if span.row and (span.whole or not module._modules):
            span.work = self._counter(module)(args, kwargs, output)
        self._spans.append(span)
        span.after = _clock()
        span.parent.add(span.after - span.enter)

    def _fail(self, module: nn.Module) -> None:
        """Its call ended in an exception."""
        if (span := self._span_of(module)) is not None:
            self._drop_above(span.parent)

    def _span_of(self, module: nn.Module) -> Span | None:
        """Of its innermost call that has not ended; none where this is another thread's."""
        if get_ident() != self._thread:
            return None
        return next((span for span in reversed(self._open) if span.module is module), None)

    def _drop_above(self, last: Span) -> None:
        """Forget calls in `last` that ended in an exception, which was caught, but not what they did."""
        while (span := self._open[-1]) is not last:
            self._open.pop()
            span.parent.add(span.inner)
            span.parent.runs += span.runs

    def _counter(self, module: nn.Module) -> Counter:
        if (counter := self._counters.get(module)) is None:
            make = patterns_counter if module in self._patterns else counter_of
            counter = self._counters[module] = make(module)
        return counter

    def _ran(self, run: StackRun) -> None:
        if self._open and run.events:
            span = self._open[-1]
            span.runs.append(run)
            span.add(max(e[4] for e in run.events) - min(e[3] for e in run.events))


def _takes_short_way(module: nn.Module) -> bool:
    """Whether it runs as one fused operator of torch, as long as nothing in it has hooks."""
    return (
        isinstance(module, nn.TransformerEncoderLayer)
        and fused_of(module) is None
        and not any(isinstance(part, (PackedLayer, QEmbedding)) for part in module.modules())
    )


def _is_closed(module: nn.Module) -> bool:
    """Whether it takes no hooks, or none that would not be compiled with it."""
    return isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None


@contextmanager
def _timed(recorder: Recorder, module: nn.Module, owner: object, method: str) -> Iterator[None]:
    """Within the block a method of `owner` is recorded as calls of `module`."""
    before, call = vars(owner).get(method), getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        recorder._enter(module, args)
        try:
            output = call(*args, **kwargs)
        except BaseException:
            recorder._fail(module)
            raise
        recorder._leave(module, args, kwargs, output)
        return output

    setattr(owner, method, timed)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, method)
        else:
            setattr(owner, method, before)
