"""Runs of fused stacks: the time of each phase from what the threads did when, and the work that is in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import commonprefix
from typing import NamedTuple

from torch import Tensor, nn

from .. import _core
from ..fuse.stack import FusedStack, LinearLike, Rows, StackRun
from ..packed_layer import PackedLayer
from .work import FLOAT, NOTHING, Work, linear_work, unit_of

PHASES = ("input", "qkv", "rope", "attention", "o", "up", "down", "output")
_LINEARS = {"qkv": ("q", "k", "v"), "o": ("o",), "up": ("gate", "up"), "down": ("down",)}
_FLOAT_OP, _FLOAT_BYTES = "linear_f32", 4
IDLE = "idle"

Event = tuple[int, int, int, int, int]  # block, phase, thread, begin, end


@dataclass
class Spent:
    """ns that a phase took, and of those, waiting for the slowest thread: the mean over the threads."""

    begin: int
    time: float = 0
    idle: float = 0


class Part(NamedTuple):
    """What runs: its op, kernel, and the shape of its weights or heads."""

    op: str
    kernel: str
    shape: str


def spent(events: list[Event]) -> dict[tuple[int, str], Spent]:
    """(block, phase) -> time; all times add up to that from the first begin to the last end.

    Threads that work on each phase together wait for one another before the next: a phase lasts from where
    the slowest thread ended the one before to where the slowest ends it. Threads that run sequences of
    their own do not wait: a phase lasts the mean over the threads of what each spent in it, and what they
    wait for the last of them at the end is a phase of its own, IDLE, of block -1.
    """
    threads = by_thread(events)
    count = len(threads)
    found: dict[tuple[int, str], Spent] = {}
    begin, end = min(e[3] for e in events), max(e[4] for e in events)
    if together(threads):
        for step in zip(*threads, strict=True):
            last = max(e[4] for e in step)
            phase = found.setdefault(key_of(step[0]), Spent(begin))
            phase.time += last - begin
            phase.idle += sum(last - e[4] for e in step) / count
            begin = last
        return found
    for e in events:
        found.setdefault(key_of(e), Spent(e[3])).time += (e[4] - e[3]) / count
    rest = end - begin - sum(phase.time for phase in found.values())
    found[-1, IDLE] = Spent(end, rest, rest)
    return found


def together(threads: list[list[Event]]) -> bool:
    """Whether all of them did the same steps, none before all had ended the one before."""
    if len({tuple(e[:2] for e in thread) for thread in threads}) > 1:
        return False
    steps = list(zip(*threads, strict=True))
    return all(
        max(e[4] for e in before) <= min(e[4] for e in step)
        for before, step in zip(steps, steps[1:], strict=False)
    )


def by_thread(events: list[Event]) -> list[list[Event]]:
    """Those of each thread, in order."""
    threads: dict[int, list[Event]] = defaultdict(list)
    for e in sorted(events, key=lambda e: (e[2], e[3], e[4])):
        threads[e[2]].append(e)
    return list(threads.values())


def key_of(event: Event) -> tuple[int, str]:
    """Its block and the name of its phase."""
    block, phase = event[:2]
    return block, PHASES[phase] if phase < len(PHASES) else f"phase {phase}"


class StackParts:
    """Names, kernels and work of the phases of one stack."""

    def __init__(self, stack: FusedStack, title: str, prefix: str, names: Mapping[nn.Module, str]):
        """title: of the fused module; prefix: its name, which may be empty; names: of all modules."""
        self.spec = stack.spec
        self.title = title
        self._names = [self._block_name(i, prefix, names) for i in range(len(self.spec.blocks))]
        self._parts: dict[tuple[int, str], Part] = {}
        self._sizes = {
            (i, phase): [_size(linear) for part in parts if (linear := getattr(block, part)) is not None]
            for i, block in enumerate(self.spec.blocks)
            for phase, parts in _LINEARS.items()
        }

    def block(self, index: int, phase: str) -> str:
        """The name of a block; input, output and idle time are the stack's."""
        return self.title if phase in ("input", "output", IDLE) else self._names[index]

    def part(self, block: int, phase: str) -> Part:
        """What runs in a phase."""
        if (part := self._parts.get((block, phase))) is None:
            part = self._parts[block, phase] = self._part(block, phase)
        return part

    def _part(self, block: int, phase: str) -> Part:
        s = self.spec
        if (sizes := self._sizes.get((block, phase))) is not None:
            ops = list(dict.fromkeys(size.op for size in sizes))
            kernels = [_core.select(op) for op in ops]
            n, k = sum(size.n for size in sizes), sizes[0].k
            return Part("+".join(ops), ", ".join(kernels), f"{k} -> {n}")
        if phase == "attention":
            kv = "" if s.heads == s.kv_heads else f", {s.kv_heads} of k and v"
            return Part(phase, _core.select(phase), f"{s.heads} heads of {s.head_size}{kv}")
        if phase == "rope":
            return Part(phase, _core.select(phase), f"{s.heads + s.kv_heads} heads of {s.head_size}")
        if phase == "output" or (phase == "input" and s.first_norm is not None):
            return Part("norm", _core.select("norm"), str(s.hidden))
        if phase == "input":
            return Part("copy", _core.select("quantize_rows"), str(s.hidden))
        return Part(phase, "", "")

    def work(self, block: int, phase: str, run: StackRun) -> Work:
        """Of one phase of one run. Activations between phases are float32."""
        s, rows = self.spec, run.batch * run.tokens
        q_width, kv_width = s.heads * s.head_size, s.kv_heads * s.head_size
        if (sizes := self._sizes.get((block, phase))) is not None:
            width = sum(size.n for size in sizes) // (2 if phase == "up" and len(sizes) > 1 else 1)  # gated
            residual = s.hidden if phase in ("o", "down") else 0
            # A post-norm block writes what its norms give, which is the next residual.
            norms = not s.pre_norm and (phase == "up" or (phase == "qkv" and block > run.blocks[0]))
            normed = s.hidden if norms else 0
            moved = rows * (sizes[0].k + width + residual + normed) * _FLOAT_BYTES
            total = Work(0, moved)
            for size in sizes:
                total += linear_work(rows, size.n, size.k, size.bytes, 0, size.unit, size.products)
            return total
        if phase == "attention":
            return self._attention(run)
        if phase == "rope":
            rotated = 2 * rows * (q_width + kv_width) * _FLOAT_BYTES if s.rotary_dims else 0
            stored = 0 if run.cache is None else 2 * rows * kv_width * run.cache.dtype.itemsize
            return Work(0, rotated + stored)
        if phase in ("input", "output"):
            return Work(0, rows * s.hidden * (_FLOAT_BYTES + run.dtype.itemsize))
        return NOTHING

    def _attention(self, run: StackRun) -> Work:
        s = self.spec
        keys = run.tokens if run.cache is None else run.past + run.tokens
        pairs = attended(run.tokens, keys, s.causal, s.window)
        operations = 4 * run.batch * s.heads * s.head_size * pairs
        q_bytes = 2 * run.tokens * s.heads * s.head_size * _FLOAT_BYTES  # q, and what comes out
        seen = min(keys, run.tokens + s.window - 1) if s.window and s.causal else keys
        itemsize = _FLOAT_BYTES if run.cache is None else run.cache.dtype.itemsize
        kv_bytes = 2 * seen * s.kv_heads * s.head_size * itemsize
        return Work(operations, run.batch * (q_bytes + kv_bytes), 0, {FLOAT: operations})

    def _block_name(self, index: int, prefix: str, names: Mapping[nn.Module, str]) -> str:
        """What the names of its layers have in common."""
        layers = [getattr(self.spec.blocks[index], part) for parts in _LINEARS.values() for part in parts]
        modules = [layer.of if isinstance(layer, Rows) else layer for layer in layers]
        known = [names[m].split(".")[:-1] for m in modules if isinstance(m, nn.Module) and m in names]
        shared = ".".join(commonprefix(known))
        if shared == prefix or not f"{shared}.".startswith(f"{prefix}." if prefix else ""):
            return f"{self.title} block {index}"
        return shared


def attended(queries: int, keys: int, causal: bool, window: int) -> int:
    """Pairs of a query and a key that it attends to, of one head, where no mask takes any away."""
    if not causal:
        return queries * keys
    visible = range(keys - queries + 1, keys + 1)  # keys up to the query itself
    return sum(min(count, window) for count in visible) if window else sum(visible)


class _Size(NamedTuple):
    n: int
    k: int
    op: str
    bytes: float
    unit: str
    products: float


def _size(linear: LinearLike) -> _Size:
    """Of the weight as it is packed, and its bias."""
    of = linear.of if isinstance(linear, Rows) else linear
    if isinstance(of, PackedLayer):
        n, k = (linear.end - linear.begin if isinstance(linear, Rows) else of.out_features), of.in_features
        weight_bytes = of._prepare().nbytes * n / of.out_features
        bias = 0 if of.bias is None else n * _FLOAT_BYTES
        return _Size(n, k, of.scheme.op, weight_bytes + bias, *unit_of(of))
    weight = of if isinstance(of, Tensor) else of.weight
    n, k = weight.shape
    if isinstance(linear, Rows):
        n = linear.end - linear.begin
    bias = 0 if linear.bias is None else n
    return _Size(n, k, _FLOAT_OP, (n * k + bias) * _FLOAT_BYTES, FLOAT, 1)
