"""What `profile` returns: rows of time and work, as tables, JSON, a trace or a plot."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..tables import markdown_table, percent, significant, text_table

_NUMBER = re.compile(r"(?<![^. ])\d+(?![^. ])")  # a whole part of a dotted name
_NOTE = (
    "ms: of a call; share: of all. GOP/s count 2 operations per product of weights or of attention, GB/s the "
    "packed weights, inputs and outputs. of ceiling: the time that the nearest limit of this machine allows, "
    "by the time taken. idle: of the threads, waiting for the slowest."
)
_WIDTH = 110
Table = Callable[[list[str], list[list[str]]], str]


@dataclass(frozen=True)
class Row:
    """A layer, a phase of a fused block, or what a module does besides calling its parts; of one call."""

    layer: str
    phase: str  # of a fused block: qkv, attention, ...; else empty
    op: str  # as in halfbyte.kernels(), or the class of a module of torch; "between"
    kernel: str
    shape: str
    calls: float
    ms: float
    idle_ms: float | None  # waiting for the slowest thread, the mean over the threads; None: not known
    operations: float
    bytes: float
    least_ms: float | None  # what the ceilings allow; None: none applies, or they were not measured
    bound: str  # the ceiling that least_ms is of

    @property
    def gops(self) -> float | None:
        """Billions of operations per second."""
        return self.operations / self.ms / 1e6 if self.operations and self.ms else None

    @property
    def gbps(self) -> float | None:
        """Billions of bytes per second."""
        return self.bytes / self.ms / 1e6 if self.bytes and self.ms else None

    @property
    def of_ceiling(self) -> float | None:
        """A fraction: 1 is as fast as the machine can do it."""
        return None if self.least_ms is None or not self.ms else self.least_ms / self.ms


@dataclass(frozen=True)
class FusedModule:
    """A module that `fuse_` has taken over, and what became of its calls while the profile was made."""

    layer: str
    kind: str
    what: str
    calls: int  # that ran fused
    unfused: dict[str, int]  # reason: calls


@dataclass(frozen=True)
class Profile:
    """Where the time of a model's calls goes. `rows` and `between` add up to `total_ms`."""

    model: str
    rows: tuple[Row, ...]  # in the order in which they first ran
    between: tuple[Row, ...]  # modules by themselves: Python, and functions of torch that are no modules
    total_ms: float  # of a recorded call, without what recording itself took
    plain_ms: float  # of a call that is not recorded
    recorded_ms: tuple[float, ...]  # all recorded calls; total_ms is the mean of the middle half
    threads: int
    fused: tuple[FusedModule, ...]
    ceilings: dict[str, float]  # operations or bytes per second
    trace: list[dict] = field(repr=False)

    @property
    def unaccounted_ms(self) -> float:
        """What no row has."""
        return sum(row.ms for row in self.between)

    def by(self, what: str) -> tuple[Row, ...]:
        """Rows added up, with `between` among them. what: "op"; "layer": all of "encoder.layer.3"; "alike":
        those that differ only in the numbers of their layers.
        """
        names = {
            "op": lambda row: ("", "", row.op, row.kernel, ""),
            "layer": lambda row: (_block(row.layer), "", "", "", ""),
            "alike": lambda row: (_NUMBER.sub("*", row.layer), *_what(row)[1:]),
        }
        if what not in names:
            raise ValueError(f"rows can be added up by {', '.join(names)}; not by {what!r}")
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in (*self.rows, *self.between):
            groups.setdefault(names[what](row), []).append(row)
        alone = what == "alike"
        return tuple(
            rows[0] if alone and len(rows) == 1 else _added(name, rows) for name, rows in groups.items()
        )

    def table(self, by: str = "row") -> str:
        """A table of all rows, or of what `by` returns."""
        return self._table(text_table, by)

    def __str__(self) -> str:
        return self._render(text_table)

    def to_markdown(self) -> str:
        """What print shows, in GitHub Markdown."""
        return self._render(markdown_table)

    def to_json(self, path: str | Path | None = None) -> str:
        """Every number, unrounded, without the trace; also written to `path` if that is given."""
        data = asdict(replace(self, trace=[]))
        del data["trace"]
        for kind in ("rows", "between"):
            for row, given in zip(data[kind], getattr(self, kind), strict=True):
                row |= {"share": given.ms / self.total_ms, "gops": given.gops, "gbps": given.gbps}
                row |= {"of_ceiling": given.of_ceiling}
        text = json.dumps(data | {"unaccounted_ms": self.unaccounted_ms}, indent=1)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def to_chrome_trace(self, path: str | Path) -> None:
        """Write one of the recorded calls in the Trace Event format: open it in https://ui.perfetto.dev or
        chrome://tracing. One track has the calls of modules, the others what the threads of fused stacks did.
        """
        Path(path).write_text(json.dumps({"traceEvents": self.trace, "displayTimeUnit": "ms"}))

    def plot(self, path: str | Path) -> None:
        """Draw the call into the image `path` (format by suffix): modules above their parts, as wide as their
        time. MissingExtraError without matplotlib; ValueError for a suffix that it does not draw.
        """
        from .plot import icicle

        icicle(self, Path(path))

    def _render(self, table: Table) -> str:
        return "\n\n".join(
            [
                self._head(),
                self._table(table, "alike"),
                self._table(table, "op"),
                *self._fused(),
                textwrap.fill(_NOTE, _WIDTH),
            ]
        )

    def _head(self) -> str:
        rounds = len(self.recorded_ms)
        text = (
            f"{self.model}: {significant(self.plain_ms, 4)} ms a call, {significant(self.total_ms, 4)} ms "
            f"recorded ({rounds} call{'s' * (rounds > 1)}), {self.threads} thread{'s' * (self.threads > 1)}; "
            f"{percent(self.unaccounted_ms / self.total_ms)} is between the layers"
        )
        limits = [
            f"{name} {rate / 1e9:.0f} {'GB/s' if 'read' in name else 'GOP/s'}"
            for name, rate in self.ceilings.items()
        ]
        return f"{text}.\nCeilings: {'; '.join(limits)}." if limits else f"{text}."

    def _fused(self) -> list[str]:
        lines = []
        for module in self.fused:
            line = f"fused: {module.layer}, {module.kind} ({module.what}), {module.calls} calls"
            lines += [
                line,
                *(f"  left to its own forward: {why} ({n} calls)" for why, n in module.unfused.items()),
            ]
        return ["\n".join(lines)] if lines else []

    def _table(self, table: Table, by: str) -> str:
        rows = (*self.rows, *self.between) if by == "row" else self.by(by)
        names = ["layer", "phase", "op", "shape"]
        cells = [[row.layer, row.phase, row.op, row.shape, *self._numbers(row), row.kernel] for row in rows]
        headers = [*names, "calls", "ms", "share", "GOP/s", "GB/s", "of ceiling", "idle", "kernel"]
        shown = [i for i, _ in enumerate(headers) if any(row[i] not in ("", "-") for row in cells)]
        return table([headers[i] for i in shown], [[row[i] for i in shown] for row in cells])

    def _numbers(self, row: Row) -> list[str]:
        ceiling = " ".join([percent(row.of_ceiling), row.bound.partition(",")[0]]).rstrip()
        idle = "-" if row.idle_ms is None or not row.ms else percent(row.idle_ms / row.ms)
        return [
            f"{row.calls:g}", significant(row.ms), f"{100 * row.ms / self.total_ms:.1f}%",
            significant(row.gops), significant(row.gbps), ceiling, idle,
        ]  # fmt: skip


def _what(row: Row) -> tuple[str, str, str, str, str]:
    """What a row is of; its first fields."""
    return row.layer, row.phase, row.op, row.kernel, row.shape


def _added(what: tuple[str, ...], rows: list[Row]) -> Row:
    """One row for all of them."""
    return Row(
        *what,
        calls=sum(row.calls for row in rows),
        ms=sum(row.ms for row in rows),
        idle_ms=_sum(row.idle_ms for row in rows),
        operations=sum(row.operations for row in rows),
        bytes=sum(row.bytes for row in rows),
        least_ms=_sum(row.least_ms for row in rows),
        bound=rows[0].bound if len({row.bound for row in rows}) == 1 else "",
    )


def _sum(numbers: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _block(layer: str) -> str:
    """The name of a layer up to its first number."""
    found = _NUMBER.search(layer)
    return layer[: found.end()] if found else layer
